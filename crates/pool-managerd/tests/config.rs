//! Configs that are right, and what is said about those that are not.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::fs;
use std::path::{Path, PathBuf};

use pool_managerd::config::{self, Config, ConfigError, LogFormat, Overrides};
use pool_services::Activation;

fn load(text: &[u8]) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, text).unwrap();
    config::load(Some(&path), &Overrides::default())
}

fn error(text: &str) -> ConfigError {
    load(text.as_bytes()).expect_err(text)
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config/pool-managerd.example.toml")
}

#[test]
fn the_example_is_valid_and_complete() {
    let config = config::load(Some(&example()), &Overrides::default()).unwrap();
    assert_eq!(config.pools.len(), 1);
    assert_eq!(config.engines.len(), 4);
    // Every key that exists stands in the example, at least as a comment.
    let text = fs::read_to_string(example()).unwrap();
    let schema = serde_json::to_value(schemars::schema_for!(config::RawConfig)).unwrap();
    let mut tables: Vec<&serde_json::Value> = vec![&schema];
    tables.extend(schema["$defs"].as_object().unwrap().values());
    for table in tables {
        let Some(keys) = table["properties"].as_object() else { continue };
        for (key, property) in keys {
            let later = property["description"].as_str().is_some_and(|d| d.starts_with("Not supported yet"));
            let named = [format!("{key} = "), format!("[{key}"), format!(".{key}]")].iter().any(|k| text.contains(k));
            assert!(later || named, "the example lacks `{key}`");
        }
    }
}

#[test]
fn an_empty_config_and_none_are_the_defaults() {
    for config in [load(b"").unwrap(), config::load(None, &Overrides::default()).unwrap()] {
        assert_eq!(config.node.listen.to_string(), "127.0.0.1:9200");
        assert_eq!(config.node.engine_ports, 42000..=42999);
        assert!(config.pools.is_empty());
        assert!(config.engines.contains_key("llama.cpp") && config.engines.contains_key("stub"));
    }
}

#[test]
fn a_byte_order_mark_is_passed_over() {
    assert_eq!(load(b"\xef\xbb\xbf[node]\nlisten = \"[::1]:1\"\n").unwrap().node.listen.to_string(), "[::1]:1");
}

#[test]
fn profiles_set_defaults_only() {
    let pools = "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n[[pool]]\nid = \"b\"\nmodel = \"stub:b\"\nengine = \"stub\"\nactivation = \"on_demand\"\n";
    let home = load(pools.as_bytes()).unwrap();
    assert_eq!((home.pools[0].spec.activation, home.node.log), (Activation::OnDemand, LogFormat::Pretty));
    let cloud = load(format!("[node]\nprofile = \"cloud\"\n[auth]\n{pools}").as_bytes()).unwrap();
    assert_eq!((cloud.pools[0].spec.activation, cloud.node.log), (Activation::Preload, LogFormat::Json));
    assert_eq!(cloud.pools[1].spec.activation, Activation::OnDemand);
    let quiet = load(b"[node]\nprofile = \"cloud\"\nlog = \"pretty\"\ninsecure = true\n").unwrap();
    assert_eq!(quiet.node.log, LogFormat::Pretty);
}

#[test]
fn relative_paths_start_at_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    fs::write(&path, "[models]\nroots = [\"m\"]\n[node]\nstate_dir = \"s\"\n").unwrap();
    let config = config::load(Some(&path), &Overrides::default()).unwrap();
    assert_eq!(config.models.roots, [dir.path().join("m")]);
    assert_eq!(config.node.state_dir, dir.path().join("s"));
}

/// Text, line, key, a part of the message, a part of the hint.
const BAD: &[(&str, usize, &str, &str, &str)] = &[
    ("[node]\nlistne = \"a\"\n", 2, "node.listne", "unknown field `listne`", "did you mean `listen`?"),
    ("[nodes]\n", 1, "nodes", "unknown field `nodes`", "`node`"),
    ("[gpu]\nzzz = 1\n", 2, "gpu.zzz", "unknown field `zzz`", "known here: backend, topology, wait"),
    ("\n[[pool]]\nid = \"a\"\nmodle = \"stub:a\"\n", 4, "pool[0].modle", "unknown field", "`model`"),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\n[pool.drain]\ndedline = \"1s\"\n",
        5,
        "pool[0].drain.dedline",
        "unknown field",
        "`deadline`",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\n[pool.drain]\ndeadline = \"-1s\"\n",
        5,
        "pool[0].drain.deadline",
        "negative",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\ndevices = \"0,0\"\n",
        5,
        "pool[0].devices",
        "twice",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\ndevices = \"-1\"\n",
        5,
        "pool[0].devices",
        "`-1`",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\ndevices = \"GPU-nope\"\n",
        5,
        "pool[0].devices",
        "GPU-nope",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\ndevices = \"\"\n",
        5,
        "pool[0].devices",
        "empty",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n[pool.backoff]\ninitial = \"9s\"\nmax = \"1s\"\n",
        7,
        "pool[0].backoff.max",
        "shorter",
        "",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n",
        6,
        "pool[1].id",
        "two pools",
        "id of its own",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"/m.gguf\"\nengine = \"llama-cpp\"\n",
        4,
        "pool[0].engine",
        "not declared",
        "did you mean `llama.cpp`?",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\naliases = [\"b\"]\n[[pool]]\nid = \"b\"\nmodel = \"stub:b\"\nengine = \"stub\"\n",
        7,
        "pool[1].id",
        "an alias of another",
        "another id",
    ),
    (
        "[engines.x]\nkind = \"stub\"\nmode = \"external\"\nendpoint = \"127.0.0.1:8080\"\n[engines.y]\nkind = \"stub\"\nmode = \"external\"\nendpoint = \"http://127.0.0.1:8080\"\n\
         [[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"x\"\n[[pool]]\nid = \"b\"\nmodel = \"stub:b\"\nengine = \"y\"\n",
        16,
        "pool[1].engine",
        "the engine at port 8080 would be of two pools",
        "engine of its own",
    ),
    (
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n[pool.reload]\ndeadline = \"0s\"\n",
        6,
        "pool[0].reload.deadline",
        "longer than zero",
        "",
    ),
    ("[[pool]]\nmodel = \"stub:a\"\n", 1, "pool[0]", "missing field `id`", ""),
    ("[node]\nprofile = \"clod\"\n", 2, "node.profile", "unknown variant `clod`", "did you mean `cloud`?"),
    ("[node]\nlisten = \"localhost\"\n", 2, "node.listen", "no address with a port", "127.0.0.1:9200"),
    ("[node]\nlisten = \"0.0.0.0:9200\"\n", 2, "node.listen", "not loopback", "insecure = true"),
    ("[node]\nlisten = \"0.0.0.0:9200\"\n[auth]\n[gpu]\n", 2, "node.listen", "for everybody to read", "add [tls]"),
    (
        "[node]\nlisten = \"[::]:9200\"\n[tls]\ncert = \"c\"\nkey = \"k\"\n",
        2,
        "node.listen",
        "could do everything",
        "add [auth]",
    ),
    ("[node]\nprofile = \"cloud\"\n", 2, "node.profile", "cloud profile requires tokens", "add [auth]"),
    ("[auth]\ntoken_file = \"t\"\n", 2, "auth.token_file", "unknown", "tokens_file"),
    ("[auth]\ntokens_file = \"\"\n", 2, "auth.tokens_file", "empty", ""),
    ("[auth]\ntokens_env = \"A=B\"\n", 2, "auth.tokens_env", "no name", ""),
    ("[tls]\ncert = \"t\"\n", 1, "tls", "missing field `key`", ""),
    ("[node]\nlisten = 9200\n", 2, "node.listen", "invalid type", ""),
    ("[node]\nengine_listen = \"0.0.0.0\"\n", 2, "node.engine_listen", "no address", "of this machine"),
    ("[node]\nengine_keys = \"never\"\n", 2, "node.engine_keys", "never", "auto"),
    ("[node]\nengine_ports = \"80-90\"\n", 2, "node.engine_ports", "below 1024", "42000-42999"),
    ("[node]\nengine_ports = \"5000-4000\"\n", 2, "node.engine_ports", "backwards", "42000-42999"),
    ("[node]\nengine_ports = \"70000-70001\"\n", 2, "node.engine_ports", "no range", "42000-42999"),
    ("[node]\nengine_ports = \"9000-9300\"\n", 2, "node.engine_ports", "port of the API", ""),
    ("[node]\non_exit = \"bound\"\n", 2, "node.on_exit", "bound", "keep"),
    ("[node]\nmax_lease_ttl = \"0s\"\n", 2, "node.max_lease_ttl", "outside", "1h"),
    ("[node]\nmax_lease_ttl = \"1y\"\n", 2, "node.max_lease_ttl", "outside", "1h"),
    ("[node]\nshutdown_deadline = \"-5s\"\n", 2, "node.shutdown_deadline", "no duration", "30s"),
    ("[node]\nshutdown_drain = \"51s\"\n", 2, "node.shutdown_drain", "need 10s of", "shutdown_deadline = \"1m 1s\""),
    ("[node]\nstate_dir = \"\"\n", 2, "node.state_dir", "empty", ""),
    ("[gpu]\nbackend = \"simulated\"\n", 2, "gpu.backend", "need a topology", "two-gpus.toml"),
    (
        "[gpu]\nbackend = \"simulated\"\ntopology = \"t\"\n[node]\nlisten = \"10.0.0.1:1\"\ninsecure = true\n",
        2,
        "gpu.backend",
        "beyond loopback",
        "",
    ),
    (
        "[gpu]\nbackend = \"simulated\"\ntopology = \"t\"\n[auth]\n[node]\nprofile = \"cloud\"\n",
        2,
        "gpu.backend",
        "cloud profile",
        "",
    ),
    ("[gpu]\ntopology = \"t\"\n", 2, "gpu.topology", "simulated devices only", "simulated"),
    ("[gpu]\nwait = \"soon\"\n", 2, "gpu.wait", "no duration", "forever"),
    ("[models]\nallow = [\"hf:*/x\"]\n", 2, "models.allow", "`*` stands at the end", "hf:ORG/*"),
    ("[models]\nallow = [\"http://*/*\"]\n", 2, "models.allow", "name the host in full", "hf:ORG/*"),
    ("[models]\nhf_endpoint = \"mirror\"\n", 2, "models.hf_endpoint", "no address", "https://"),
    ("[models]\ncache_max = \"much\"\n", 2, "models.cache_max", "no size", ""),
    ("[models.tokens]\n\"https://h.org\" = \"t\"\n", 2, "models.tokens.\"https://h.org\"", "no host", "huggingface.co"),
    ("[[pool]]\nid = \"a\"\nmodel = \"hf:a/b\"\n", 3, "pool[0].model", "`[models] allow`", "add \"hf:a/b\""),
    ("[engines.x]\nkind = \"lama.cpp\"\n", 2, "engines.x.kind", "not known", "did you mean `llama.cpp`?"),
    ("[engines.x]\nkind = \"stub\"\nmode = \"container\"\n", 3, "engines.x.mode", "not supported yet", "external"),
    ("[engines.x]\nkind = \"stub\"\nmode = \"external\"\n", 3, "engines.x.mode", "needs an endpoint", "endpoint ="),
    (
        "[engines.x]\nkind = \"stub\"\nmode = \"external\"\nendpoint = \"http://elsewhere\"\n",
        4,
        "engines.x.endpoint",
        "no endpoint",
        "127.0.0.1",
    ),
    ("[engines.x]\nkind = \"stub\"\nendpoint = \"127.0.0.1:1\"\n", 3, "engines.x.endpoint", "external", ""),
    ("[engines.\"a b\"]\nkind = \"stub\"\n", 1, "engines.\"a b\"", "engine name", ""),
    ("[node\n", 1, "", "", ""),
    ("a = 1\na = 2\n", 2, "", "duplicate key", ""),
];

#[test]
fn bad_configs_are_explained() {
    let mut wrong = Vec::new();
    for &(text, line, key, message, hint) in BAD {
        let e = error(text);
        let ok = e.line == Some(line)
            && (key.is_empty() || e.key.as_deref() == Some(key))
            && e.message.contains(message)
            && e.hint.as_deref().unwrap_or_default().contains(hint)
            && !e.to_string().contains('\n');
        if !ok {
            wrong.push(format!("{text:?}\n  gave {e:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let e = load(b"[node]\n\xff\n").unwrap_err();
    assert_eq!((e.line, e.message.as_str()), (Some(2), "is not UTF-8"));
    assert!(load(&vec![b'#'; 1024 * 1024 + 1]).unwrap_err().message.contains("larger than 1024 KiB"));
    assert!(load(&vec![b'\n'; 1024 * 1024]).is_ok());
    let missing = config::load(Some(Path::new("/no/such/file.toml")), &Overrides::default()).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/file.toml: cannot be read"), "{missing}");
    assert!(config::load(Some(Path::new("/")), &Overrides::default()).unwrap_err().message.contains("regular file"));
}

#[test]
fn the_command_line_is_checked_like_the_file() {
    let over = |f: fn(&mut Overrides)| {
        let mut o = Overrides::default();
        f(&mut o);
        config::load(None, &o)
    };
    let e = over(|o| o.listen = Some("0.0.0.0:1".into())).unwrap_err();
    assert_eq!((e.file, e.line, e.key.as_deref()), (None, None, Some("--listen")));
    assert!(over(|o| o.models = vec!["/no/such.gguf".into()]).unwrap_err().to_string().starts_with("--model: "));
    // What is named on the command line is allowed by that, and nothing else is.
    let remote = over(|o| o.models = vec!["hf:a/b/c.gguf".into()]).unwrap();
    assert_eq!(remote.models.policy.allow, ["hf:a/b/c.gguf".parse().unwrap()]);
    assert_eq!(remote.pools[0].spec.id.as_str(), "c");
    assert!(over(|o| o.models = vec!["hf:a".into()]).unwrap_err().message.contains("write hf:"));
    let stubs = over(|o| o.models = vec!["stub:a".into(), "stub:a".into()]).unwrap();
    assert_eq!(stubs.specs().map(|p| p.id.as_str()).collect::<Vec<_>>(), ["a", "a-2"]);
}

#[test]
fn a_model_file_is_its_own_root() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("My Model!.gguf");
    fs::write(&file, "GGUF").unwrap();
    let overrides = Overrides { models: vec![file.to_str().unwrap().into()], ..Overrides::default() };
    let config = config::load(None, &overrides).unwrap();
    assert_eq!(config.models.roots, [file.canonicalize().unwrap()]);
    assert_eq!(config.pools[0].spec.id.as_str(), "My-Model-");
    assert_eq!(config.pools[0].spec.activation, Activation::Preload);
}

#[test]
fn old_paths_still_lead_there() {
    let registry = pool_managerd::registry::Registry::default();
    assert_eq!(registry.get_active_leases("nobody"), 0);
    assert!(!pool_managerd::health::HealthStatus::default().ready);
}

#[test]
fn what_lies_outside_of_pools_is_compared_by_key() {
    let base = "[engines.x]\nkind = \"stub\"\n[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n";
    let config = load(base.as_bytes()).unwrap();
    assert_eq!(config.differs_outside(&load(base.as_bytes()).unwrap()), [""; 0]);
    let other = base.replace(
        "[engines.x]\nkind = \"stub\"",
        "[node]\non_exit = \"keep\"\n[gpu]\nwait = \"1s\"\n[engines.y]\nkind = \"stub\"",
    );
    let other = load(other.as_bytes()).unwrap();
    assert_eq!(config.differs_outside(&other), ["node.on_exit", "gpu", "engines.x", "engines.y"]);
    // A pool is compared by what its table says, however it is written.
    let digest = |text: &str| load(text.as_bytes()).unwrap().pools[0].source.digest().unwrap().to_owned();
    assert_eq!(digest(base), digest(&format!("# a word\n{}", base.replace(" = ", "="))));
    assert_ne!(digest(base), digest(&format!("{base}slots = 2\n")));
}

/// The config within the manifests that the chart renders: what Helm writes, the daemon reads.
#[test]
fn the_config_of_the_plain_manifests_is_one() {
    for (preset, pools) in [("shared", 0), ("dedicated", 1)] {
        let path = format!("{}/../../deploy/kubernetes/{preset}.yaml", env!("CARGO_MANIFEST_DIR"));
        let manifest = fs::read_to_string(path).unwrap();
        let lines = manifest.lines().skip_while(|line| !line.starts_with("  pool-managerd.toml: |")).skip(1);
        let text: Vec<_> =
            lines.map_while(|line| line.strip_prefix("    ").or((line.is_empty()).then_some(""))).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pool-managerd.toml");
        fs::write(&file, text.join("\n")).unwrap();
        let config = config::load(Some(&file), &Overrides::default()).unwrap();
        assert_eq!(config.pools.len(), pools, "{preset}");
        assert!(config.auth.is_some() && config.tls.is_some() && !config.node.insecure, "{preset}");
        assert_eq!((config.node.shutdown_drain.as_secs(), config.node.shutdown_deadline.as_secs()), (60, 70));
        assert!(config.node.hosts.contains(&"pool-managerd.pool-managerd.svc".to_owned()), "{preset}");
    }
}
