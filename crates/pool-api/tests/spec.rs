//! Pools as people write them, in TOML and JSON.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

use std::time::Duration;

use pool_api::spec::{Defaults, PoolSpec};
use pool_domain::isolation::{Isolation, RunAs, UserName};
use pool_domain::lifecycle::{OnDeadline, Policy};
use pool_domain::rollout::Strategy;
use pool_domain::{DeviceMask, ModelRef};
use pool_services::{Activation, ReloadPolicy, Workload};

const DEFAULTS: Defaults = Defaults { activation: Activation::OnDemand };

#[derive(Debug, serde::Deserialize)]
struct File {
    pool: Vec<PoolSpec>,
}

fn toml_pool(body: &str) -> Result<PoolSpec, String> {
    let text = format!("[[pool]]\nid = \"chat\"\nmodel = \"file:/m/a.gguf\"\n{body}\n");
    toml::from_str::<File>(&text).map(|mut f| f.pool.remove(0)).map_err(|e| e.to_string())
}

fn check(body: &str) -> Result<pool_services::PoolSpec, String> {
    toml_pool(body)?.check(&DEFAULTS).map_err(|e| e.to_string())
}

const EVERYTHING: &str = r#"
engine = "llama.cpp"
args = ["--flash-attn", "on"]
version = "b9"
workload = "embed"
devices = ["0,1", "GPU-51000000-0000-4000-8000-000000000001"]
replicas = 2
activation = "preload"
idle_ttl = "10m"
pin = false
context = 8192
slots = 8
kv_type = ["f16", "f16"]
vram = "1.5 GiB"
tensor_split = "off"
aliases = ["gpt-4o-mini"]
[pool.backoff]
initial = "2s"
max = "20s"
factor = 1.5
jitter = 0
reset_after = "5m"
[pool.breaker]
failed_starts = 2
early_crashes = 2
open_for = "1s"
max_open_for = "1m"
close_after = "2m"
[pool.health]
startup_stall = "1m"
startup_max = "2m"
interval = "1s"
timeout = "500ms"
failures = 2
[pool.drain]
deadline = "0s"
on_deadline = "abort"
stop_grace = "3s"
[pool.reload]
strategy = "rolling"
deadline = "2m"
on_deadline = "force"
probation = "0s"
[pool.isolation]
"#;

#[test]
fn the_shortest_pool() {
    let p = check("").unwrap();
    assert_eq!((p.engine.as_str(), p.slots, p.replicas), ("llama.cpp", 4, 1));
    assert_eq!((p.activation, p.workload), (Activation::OnDemand, Workload::Generate));
    assert_eq!((p.devices, p.vram, p.context), (vec![DeviceMask::Auto], None, None));
    assert_eq!((p.policy, p.on_deadline), (Policy::default(), OnDeadline::Force));
    assert_eq!(p.model, ModelRef::file("/m/a.gguf"));
    assert_eq!((p.reload, p.idle_ttl, p.pin), (ReloadPolicy::default(), None, false));
}

#[test]
fn the_longest_pool_in_toml_and_json() {
    let written = toml_pool(EVERYTHING).unwrap();
    let json = serde_json::to_string(&written).unwrap();
    assert_eq!(serde_json::from_str::<PoolSpec>(&json).unwrap(), written);
    let p = written.check(&DEFAULTS).unwrap();
    assert_eq!((p.vram, p.slots, p.replicas), (Some(1_610_612_736), 8, 2));
    assert_eq!(p.devices.len(), 2);
    assert_eq!((p.activation, p.workload), (Activation::Preload, Workload::Embed));
    assert_eq!((p.drain_deadline, p.on_deadline), (Duration::ZERO, OnDeadline::Abort));
    assert_eq!((p.policy.health.timeout, p.policy.health.failures), (Duration::from_millis(500), 2));
    assert_eq!((p.policy.stop.grace, p.policy.start.max), (Duration::from_secs(3), Duration::from_secs(120)));
    assert_eq!(p.policy.breaker.close_after(), Duration::from_secs(120));
    assert_eq!((p.idle_ttl, p.pin), (Some(Duration::from_secs(600)), false));
    let (strategy, on_deadline) = (Strategy::Rolling, OnDeadline::Force);
    let (deadline, probation) = (Duration::from_secs(120), Duration::ZERO);
    assert_eq!(p.reload, ReloadPolicy { strategy, deadline, on_deadline, probation });
}

#[test]
fn what_is_malformed_has_a_line() {
    for (body, says) in [
        (r#"devices = "0,0""#, "stands twice"),
        (r#"devices = "-1""#, "names no device"),
        (r#"devices = "GPU-nope""#, "names no device"),
        (r#"devices = """#, "mask is empty"),
        (r#"devices = []"#, "one mask per replica"),
        (r#"devices = ["0", "1,1"]"#, "stands twice"),
        ("devices = 0", "a list with one mask per replica"),
        (r#"idle_ttl = "-5s""#, "is negative"),
        (r#"idle_ttl = "soon""#, "no length of time"),
        (r#"idle_ttl = "5""#, "write a number and a unit"),
        (r#"idle_ttl = "90000000000h""#, "longer than a year"),
        ("idle_ttl = 10", "a time such as"),
        (r#"vram = "-1 GiB""#, "is negative"),
        (r#"vram = "24""#, "is no size"),
        (r#"vram = "0 GiB""#, "is nothing"),
        (r#"vram = "lots""#, "or \"auto\""),
        (r#"vram = "9999999 TiB""#, "more than 1 PiB"),
        ("vram = 24", "a size such as"),
        ("replicas = -1", "u16"),
        (r#"engine = "../x""#, "only a-z"),
        (r#"workload = "dream""#, "generate"),
        (r#"activation = "never""#, "on_demand"),
        ("tensor_split = true", "ratios"),
        ("slotz = 4", "slotz"),
        ("[pool.health]\nintervall = \"1s\"", "intervall"),
        ("[pool.drain]\non_deadline = \"hope\"", "abort"),
    ] {
        let error = toml_pool(body).unwrap_err();
        assert!(error.contains(says), "{body}: {error}");
        assert!(error.contains("line "), "{body}: {error}");
    }
    for (bad, says) in [
        (r#"{"id":"../x","model":"stub:a"}"#, "pool id"),
        (r#"{"id":"a","model":"http://169.254.169.254/"}"#, "model reference"),
        (r#"{"id":"a"}"#, "model"),
        (r#"{"id":"a","model":"stub:a","devices":["-1"]}"#, "names no device"),
        (r#"{"id":"a","model":"stub:a","x":1}"#, "unknown field"),
    ] {
        let error = serde_json::from_str::<PoolSpec>(bad).unwrap_err().to_string();
        assert!(error.contains(says), "{bad}: {error}");
    }
}

#[test]
fn what_cannot_be_names_its_field() {
    for (body, field) in [
        ("replicas = 0", "replicas"),
        ("replicas = 65", "replicas"),
        ("slots = 0", "slots"),
        ("context = 0", "context"),
        (r#"aliases = ["a", "a"]"#, "aliases"),
        (r#"aliases = [""]"#, "aliases"),
        (r#"args = ["a\u0000"]"#, "args"),
        (r#"args = ["--alias\n--host"]"#, "args"),
        (r#"args = ["\u001b[2J"]"#, "args"),
        (r#"devices = ["0", "1"]"#, "devices"),
        (r#"tensor_split = "on""#, "tensor_split"),
        ("tensor_split = [3, -1]", "tensor_split"),
        (r#"kv_type = ["f16", "q9"]"#, "kv_type"),
        ("[pool.backoff]\ninitial = \"0s\"", "backoff.initial"),
        ("[pool.backoff]\nmax = \"1ms\"", "backoff.max"),
        ("[pool.backoff]\nfactor = 0.5", "backoff.factor"),
        ("[pool.backoff]\njitter = nan", "backoff.jitter"),
        ("[pool.backoff]\nreset_after = \"0s\"", "backoff.reset_after"),
        ("[pool.breaker]\nfailed_starts = 0", "breaker"),
        ("[pool.breaker]\nmax_open_for = \"1s\"", "breaker"),
        ("[pool.health]\nfailures = 1", "health.failures"),
        ("[pool.health]\ninterval = \"0s\"", "health.interval"),
        ("[pool.health]\nstartup_max = \"1s\"", "health.startup_max"),
        ("[pool.health]\nbusy_stall = \"0s\"", "health.busy_stall"),
        (r#"idle_ttl = "0s""#, "idle_ttl"),
        ("[pool.reload]\ndeadline = \"0s\"", "reload.deadline"),
        ("[pool.reload]\ndeadline = \"25h\"", "reload.deadline"),
        ("[pool.reload]\nprobation = \"25h\"", "reload.probation"),
        ("[pool.isolation]\nnofile = 5", "isolation.nofile"),
        ("[pool.isolation]\nnofile = 2000000", "isolation.nofile"),
        ("[pool.isolation]\nmemory_max = \"1 MiB\"", "isolation.memory_max"),
        ("[pool.isolation]\nrun_as = \"a:b\"", "isolation.run_as"),
        ("[pool.isolation]\nrun_as = \"\"", "isolation.run_as"),
    ] {
        let error = check(body).unwrap_err();
        assert!(error.starts_with(&format!("{field}: ")), "{body}: {error}");
    }
    let stub: PoolSpec = serde_json::from_str(r#"{"id":"a","model":"stub:a"}"#).unwrap();
    assert_eq!(stub.check(&DEFAULTS).unwrap_err().field, "model");
}

#[test]
fn what_an_engine_is_kept_from() {
    let isolation = |keys: &str| check(&format!("[pool.isolation]\n{keys}")).unwrap().isolation;
    assert_eq!(isolation(""), Isolation::default());
    let all = isolation("run_as = \"llm\"\nmemory_max = \"64 MiB\"\nnofile = 4096");
    assert_eq!((all.memory_max, all.nofile), (Some(64 << 20), Some(4096)));
    assert_eq!(all.run_as, Some(RunAs::User(UserName::Name("llm".into()))));
    assert_eq!(isolation("run_as = \"1000:7\"").run_as, Some(RunAs::Ids { uid: 1000, gid: 7 }));
    // Another user is another engine; what says nothing changes nothing.
    let fingerprint = |keys: &str| check(&format!("[pool.isolation]\n{keys}")).unwrap().fingerprint(0);
    assert_ne!(fingerprint("run_as = \"llm\""), fingerprint("run_as = \"llm2\""));
    assert_eq!(fingerprint(""), check("").unwrap().fingerprint(0));
}

#[test]
fn there_is_a_schema() {
    let schema = serde_json::to_value(schemars::schema_for!(PoolSpec)).unwrap();
    assert_eq!(schema["additionalProperties"], false);
    for key in ["id", "devices", "idle_ttl", "backoff", "isolation"] {
        assert!(schema["properties"][key].is_object(), "{key}");
    }
}
