//! From [`RawConfig`] to [`Config`]: everything that can be known without touching the machine.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_api::spec::Defaults;
use pool_domain::ModelRef;
use pool_domain::model_policy::Allowed;
use pool_domain::xid::{XidAction, XidTable};
use pool_services::{Activation, Clash, Declared, PoolSpec};
use sha2::{Digest, Sha256};

use super::exposure;
use super::parse::similar;
use super::raw::{Backend, EngineKeys, RawConfig, RawEngine, RawGpu, RawNode};
use super::source::Source;
use super::{
    At, Config, ConfigError, Engine, EngineKind, EngineMode, Gpu, LogFormat, Node, Overrides, Profile, Step, models,
};

/// Of an orderly stop, after leases: what a drain takes at most once its time is up, and then some.
const TO_END: Duration = Duration::from_secs(10);
const LATER: &str = "is not supported yet";

pub(crate) fn check(raw: RawConfig, source: Source, overrides: &Overrides) -> Result<Config, ConfigError> {
    let auth = exposure::auth(raw.auth.as_ref(), &source)?;
    let tls = exposure::tls(raw.tls.as_ref(), &source)?;
    let node = node(&raw, &source, overrides)?;
    let gpu = gpu(&raw.gpu, &raw.node, &node, &source)?;
    let xids = xids(&raw.gpu, &source)?;
    let mut models = models::check(&raw.models, &source)?;
    let engines = engines(raw.engines, &source)?;
    let mut pools: Vec<Declared> = Vec::new();
    for (i, wire) in raw.pool.into_iter().enumerate() {
        let document = document(&wire);
        let pool = pool(i, wire, &node, &engines, &source)?;
        models::permitted(i, &pool, &models, &source)?;
        for other in pools.iter().map(|p| &p.spec) {
            beside(i, &pool, other, &engines, &source)?;
        }
        pools.push(declared(pool, document));
    }
    for reference in &overrides.models {
        let (pool, named) = pool_of_model(reference, &pools, &source)?;
        match named {
            Named::File(root) => models.roots.push(root),
            Named::Remote(allowed) => models.policy.allow.push(allowed),
            Named::Nothing => {}
        }
        pools.push(pool);
    }
    Ok(Config { node, auth, tls, gpu, xids, models, engines, pools, source, overrides: overrides.clone() })
}

/// The table in its wire form, however it was written.
fn document(wire: &pool_api::spec::PoolSpec) -> String {
    // It was read from such a form, so that it can be written as one.
    serde_json::to_string(wire).unwrap_or_default()
}

fn declared(spec: PoolSpec, document: String) -> Declared {
    let digest = Sha256::digest(document.as_bytes()).iter().map(|b| format!("{b:02x}")).collect();
    Declared { spec, document, source: pool_services::Source::File { digest } }
}

/// Where the engine of a pool listens, if somebody else runs it.
pub(crate) fn external(engines: &BTreeMap<String, Engine>, pool: &PoolSpec) -> Option<SocketAddr> {
    match engines.get(pool.engine.as_str())?.mode {
        EngineMode::External(addr) => Some(addr),
        EngineMode::Binary(_) => None,
    }
}

/// Whether a pool can stand beside one that stands before it.
fn beside(
    index: usize,
    pool: &PoolSpec,
    other: &PoolSpec,
    engines: &BTreeMap<String, Engine>,
    source: &Source,
) -> Result<(), ConfigError> {
    if pool.id == other.id {
        return Err(source
            .error(At::Key(&pool_key(index, "id")), format!("`{}` is the id of two pools", pool.id))
            .hinting("give each pool an id of its own"));
    }
    let Some(clash) = pool.clashes_with(other, || (external(engines, pool), external(engines, other))) else {
        return Ok(());
    };
    let (key, hint) = match &clash {
        Clash::Name(name) if *name == pool.id => ("id", "give the pool another id, or the other one another alias"),
        Clash::Name(_) => ("aliases", "give the pool another alias, or the other one another id"),
        Clash::Endpoint(_) => ("engine", "give each pool an engine of its own"),
    };
    let why = format!("{clash}: pool `{}` is there already", other.id);
    Err(source.error(At::Key(&pool_key(index, key)), why).hinting(hint))
}

fn pool_key(index: usize, key: &str) -> [Step<'_>; 3] {
    [Step::Key("pool"), Step::Index(index), Step::Key(key)]
}

fn address(text: &str, source: &Source, at: At<'_>) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| {
        source
            .error(at, format!("`{text}` is no address with a port"))
            .hinting("write an IP address and a port, for example \"127.0.0.1:9200\" or \"[::1]:9200\"")
    })
}

fn node(whole: &RawConfig, source: &Source, overrides: &Overrides) -> Result<Node, ConfigError> {
    let raw = &whole.node;
    let at = |key: &'static str| [Step::Key("node"), Step::Key(key)];
    let listen_key = at("listen");
    let (listen_at, text) = match &overrides.listen {
        Some(text) => (At::Flag("--listen"), text),
        None => (At::Key(&listen_key), &raw.listen),
    };
    let listen = address(text, source, listen_at)?;
    exposure::reachable(whole, listen, listen_at, source)?;
    let engine_listen: IpAddr = raw.engine_listen.parse().map_err(|_| {
        source.error(At::Key(&at("engine_listen")), format!("`{}` is no IP address", raw.engine_listen))
    })?;
    if engine_listen.is_unspecified() || engine_listen.is_multicast() {
        return Err(source
            .error(
                At::Key(&at("engine_listen")),
                format!("`{engine_listen}` is no address by which an engine can be reached: leases hand it out"),
            )
            .hinting("write an address of this machine, such as that of its inner network"));
    }
    let engine_ports = ports(&raw.engine_ports).map_err(|why| {
        source
            .error(At::Key(&at("engine_ports")), why)
            .hinting("write the first and the last port, for example \"42000-42999\"")
    })?;
    if engine_ports.contains(&listen.port()) && engine_listen == listen.ip() {
        return Err(source
            .error(At::Key(&at("engine_ports")), format!("the range holds the port of the API, {}", listen.port())));
    }
    let shutdown_deadline = duration(&raw.shutdown_deadline, source, At::Key(&at("shutdown_deadline")))?;
    Ok(Node {
        profile: raw.profile,
        listen,
        probe_listen: raw
            .probe_listen
            .as_deref()
            .map(|text| address(text, source, At::Key(&at("probe_listen"))))
            .transpose()?,
        socket: raw.socket.as_deref().map(|s| path(s, source, At::Key(&at("socket")))).transpose()?,
        insecure: raw.insecure,
        hosts: raw.hosts.clone(),
        origins: raw.origins.clone(),
        state_dir: match (&overrides.state_dir, &raw.state_dir) {
            (Some(dir), _) => std::path::absolute(dir).unwrap_or_else(|_| dir.clone()),
            (None, Some(text)) => path(text, source, At::Key(&at("state_dir")))?,
            (None, None) => default_state_dir(),
        },
        engine_listen,
        engine_keys: raw.engine_keys == EngineKeys::Always || !engine_listen.is_loopback(),
        engine_ports,
        on_exit: raw.on_exit,
        shutdown_deadline,
        shutdown_drain: shutdown_drain(&raw.shutdown_drain, shutdown_deadline, source)?,
        max_lease_ttl: max_lease_ttl(&raw.max_lease_ttl, source)?,
        gateway_wait: duration(&raw.gateway_wait, source, At::Key(&at("gateway_wait")))?,
        min_ready_time: duration(&raw.min_ready_time, source, At::Key(&at("min_ready_time")))?,
        log: raw.log.unwrap_or(match raw.profile {
            Profile::Home => LogFormat::Pretty,
            Profile::Cloud => LogFormat::Json,
        }),
    })
}

fn shutdown_drain(text: &str, deadline: Duration, source: &Source) -> Result<Duration, ConfigError> {
    let at = [Step::Key("node"), Step::Key("shutdown_drain")];
    let drain = duration(text, source, At::Key(&at))?;
    if drain.is_zero() || drain + TO_END <= deadline {
        return Ok(drain);
    }
    let why = format!("engines need {} of shutdown_deadline to end", humantime::format_duration(TO_END));
    let needed = humantime::format_duration(drain + TO_END);
    Err(source.error(At::Key(&at), why).hinting(format!("write less, or shutdown_deadline = \"{needed}\"")))
}

fn gpu(raw: &RawGpu, raw_node: &RawNode, node: &Node, source: &Source) -> Result<Gpu, ConfigError> {
    let at = |key: &'static str| [Step::Key("gpu"), Step::Key(key)];
    let wait = match raw.wait.as_str() {
        "forever" => None,
        text => Some(duration(text, source, At::Key(&at("wait"))).map_err(|mut e| {
            e.hint = Some("write a duration like \"30s\", or \"forever\"".into());
            e
        })?),
    };
    match raw.backend {
        Backend::Nvml => match &raw.topology {
            None => {
                let kernel_log = match raw.kernel_log.as_str() {
                    "off" => None,
                    text => Some(path(text, source, At::Key(&at("kernel_log")))?),
                };
                Ok(Gpu::Nvml { wait, kernel_log })
            }
            Some(_) => Err(source
                .error(At::Key(&at("topology")), "a topology is for simulated devices only")
                .hinting("remove it, or write backend = \"simulated\"")),
        },
        Backend::Simulated => {
            let refuse = |message: String| Err(source.error(At::Key(&at("backend")), message));
            if raw_node.profile == Profile::Cloud {
                return refuse("simulated devices are refused with the cloud profile".into());
            }
            if !node.listen.ip().is_loopback() {
                return refuse(format!(
                    "simulated devices are refused beyond loopback, and the API listens on {}",
                    node.listen
                ));
            }
            let Some(text) = &raw.topology else {
                return Err(source
                    .error(At::Key(&at("backend")), "simulated devices need a topology")
                    .hinting("add topology = \"two-gpus.toml\""));
            };
            Ok(Gpu::Simulated { topology: path(text, source, At::Key(&at("topology")))? })
        }
    }
}

fn xids(raw: &RawGpu, source: &Source) -> Result<Option<XidTable>, ConfigError> {
    let mut table = XidTable::default();
    for (number, word) in &raw.xid {
        let at = [Step::Key("gpu"), Step::Key("xid"), Step::Key(number)];
        let xid = number.parse().map_err(|_| {
            source
                .error(At::Key(&at), format!("`{number}` is no XID"))
                .hinting("write its number, for example 94 = \"restart_engine\"")
        })?;
        let action = XidAction::from_code(word).ok_or_else(|| {
            let words = || XidAction::ALL.iter().map(|action| action.code());
            source.error(At::Key(&at), format!("`{word}` is nothing that can follow from an XID")).hinting(
                match similar(word, words()) {
                    Some(word) => format!("did you mean `{word}`?"),
                    None => format!("one of {}", words().collect::<Vec<_>>().join(", ")),
                },
            )
        })?;
        table.overrides.insert(xid, action);
    }
    Ok(raw.health_checks.then_some(table))
}

fn engines(raw: BTreeMap<String, RawEngine>, source: &Source) -> Result<BTreeMap<String, Engine>, ConfigError> {
    let mut engines = BTreeMap::from([
        ("llama.cpp".to_owned(), Engine { kind: EngineKind::LlamaCpp, mode: EngineMode::Binary(None) }),
        ("vllm".to_owned(), Engine { kind: EngineKind::Vllm, mode: EngineMode::Binary(None) }),
        ("stub".to_owned(), Engine { kind: EngineKind::Stub, mode: EngineMode::Binary(None) }),
    ]);
    for (name, raw) in raw {
        let engine = engine(&name, &raw, source)?;
        engines.insert(name, engine);
    }
    Ok(engines)
}

fn engine(name: &str, raw: &RawEngine, source: &Source) -> Result<Engine, ConfigError> {
    let error = |key: &str, message: String| {
        source.error(At::Key(&[Step::Key("engines"), Step::Key(name), Step::Key(key)]), message)
    };
    if let Err(e) = name.parse::<pool_domain::EngineName>() {
        return Err(source.error(At::Key(&[Step::Key("engines"), Step::Key(name)]), e.to_string()));
    }
    let kind = match raw.kind.as_str() {
        "llama.cpp" => EngineKind::LlamaCpp,
        "vllm" => EngineKind::Vllm,
        "stub" => EngineKind::Stub,
        other => {
            let hint = match similar(other, ["llama.cpp", "vllm", "stub"].into_iter()) {
                Some(word) => format!("did you mean `{word}`?"),
                None => "known kinds: llama.cpp, vllm, stub".into(),
            };
            return Err(error("kind", format!("engine kind `{other}` is not known")).hinting(hint));
        }
    };
    let mode = match raw.mode.as_str() {
        "binary" => {
            if raw.endpoint.is_some() {
                return Err(error("endpoint", "an endpoint is for mode `external` only".into()));
            }
            if kind == EngineKind::Stub && raw.path.is_some() {
                return Err(error("path", "a stub engine has no path: the daemon is its program".into()));
            }
            EngineMode::Binary(match raw.path.as_deref() {
                Some("") => return Err(error("path", "the path is empty".into())),
                // A bare name is looked for in PATH.
                Some(p) if !p.contains('/') => Some(PathBuf::from(p)),
                Some(p) => Some(path(p, source, At::Key(&[Step::Key("engines"), Step::Key(name), Step::Key("path")]))?),
                None => None,
            })
        }
        "external" => {
            if raw.path.is_some() {
                return Err(error("path", "a path is for mode `binary` only".into()));
            }
            let Some(text) = &raw.endpoint else {
                return Err(error("mode", "mode `external` needs an endpoint".into())
                    .hinting("add endpoint = \"http://127.0.0.1:8080\""));
            };
            let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
            EngineMode::External(bare.parse().map_err(|_| {
                error("endpoint", format!("`{text}` is no endpoint"))
                    .hinting("write an IP address and a port, for example \"http://127.0.0.1:8080\"")
            })?)
        }
        later @ ("container" | "package" | "source") => {
            return Err(error("mode", format!("mode `{later}` {LATER}")).hinting("modes: binary, external"));
        }
        other => {
            return Err(error("mode", format!("mode `{other}` is not known")).hinting("modes: binary, external"));
        }
    };
    Ok(Engine { kind, mode })
}

/// What may be used because it was named on the command line.
enum Named {
    File(PathBuf),
    Remote(Allowed),
    Nothing,
}

/// The pool of `--model REF`.
fn pool_of_model(reference: &str, others: &[Declared], source: &Source) -> Result<(Declared, Named), ConfigError> {
    let at = At::Flag("--model");
    let error = |message: String| source.error(at, message);
    let stub = reference.starts_with("stub:");
    let remote = ["hf:", "https:", "http:", "s3:", "oci:"].iter().any(|scheme| reference.starts_with(scheme));
    let (model, named) = if stub {
        (reference.to_owned(), Named::Nothing)
    } else if remote {
        let model = reference.parse::<ModelRef>().map_err(|e| error(e.to_string()))?;
        let ModelRef::Remote(source) = &model else { return Err(error(format!("`{reference}` is no model"))) };
        let allowed = Allowed::exactly(&source.source).map_err(|e| error(e.to_string()))?;
        (reference.to_owned(), Named::Remote(allowed))
    } else {
        let file = reference.strip_prefix("file:").unwrap_or(reference);
        let file = std::fs::canonicalize(file).map_err(|e| error(format!("`{reference}`: {e}")))?;
        let text = file.to_str().ok_or_else(|| error(format!("`{reference}` is not UTF-8")))?;
        (format!("file:{text}"), Named::File(file))
    };
    let model_id = model.parse::<ModelRef>().map_err(|e| error(e.to_string()))?.model_id();
    let stem: String = model_id
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(56)
        .collect();
    let stem = if stem.is_empty() { "model".to_owned() } else { stem };
    let id = (1..)
        .map(|n| if n == 1 { stem.clone() } else { format!("{stem}-{n}") })
        .find(|id| others.iter().all(|p| p.spec.id.as_str() != id))
        .unwrap_or(stem);
    let wire = serde_json::json!({
        "id": id, "model": model, "engine": if stub { "stub" } else { "llama.cpp" }, "activation": "preload",
        "context": CONTEXT_OF_MODEL,
    });
    let wire: pool_api::spec::PoolSpec = serde_json::from_value(wire).map_err(|e| error(e.to_string()))?;
    let document = document(&wire);
    let defaults = Defaults { activation: Activation::Preload };
    let pool = wire.check(&defaults).map_err(|e| error(e.to_string()))?;
    Ok((declared(pool, document), named))
}

/// Context of a model that is named on the command line, where nobody says more.
const CONTEXT_OF_MODEL: u32 = 8192;

fn pool(
    index: usize,
    wire: pool_api::spec::PoolSpec,
    node: &Node,
    engines: &BTreeMap<String, Engine>,
    source: &Source,
) -> Result<PoolSpec, ConfigError> {
    let pool = wire.check(&node.profile.defaults()).map_err(|e| {
        let mut path = vec![Step::Key("pool"), Step::Index(index)];
        path.extend(e.field.split('.').map(Step::Key));
        source.error(At::Key(&path), e.message)
    })?;
    if !engines.contains_key(pool.engine.as_str()) {
        let names = || engines.keys().map(String::as_str);
        let hint = match similar(pool.engine.as_str(), names()) {
            Some(word) => format!("did you mean `{word}`?"),
            None => format!("declared: {}", names().collect::<Vec<_>>().join(", ")),
        };
        return Err(source
            .error(
                At::Key(&pool_key(index, "engine")),
                format!("engine `{}` is not declared in [engines]", pool.engine),
            )
            .hinting(hint));
    }
    Ok(pool)
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |p: &str| p.trim().parse::<u16>().map_err(|_| format!("`{text}` is no range of ports"));
    let (first, last) = (port(first)?, port(last)?);
    if first < 1024 {
        return Err(format!("port {first} is below 1024, which is for privileged services"));
    }
    if first > last {
        return Err(format!("`{text}` runs backwards"));
    }
    Ok(first..=last)
}

fn max_lease_ttl(text: &str, source: &Source) -> Result<Duration, ConfigError> {
    const BOUNDS: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600);
    let at = [Step::Key("node"), Step::Key("max_lease_ttl")];
    let ttl = duration(text, source, At::Key(&at))?;
    if BOUNDS.contains(&ttl) {
        return Ok(ttl);
    }
    Err(source
        .error(At::Key(&at), format!("`{text}` is outside one second to seven days"))
        .hinting("write for example \"1h\": a lease can be renewed as often as its client likes"))
}

fn duration(text: &str, source: &Source, at: At<'_>) -> Result<Duration, ConfigError> {
    humantime::parse_duration(text).map_err(|e| {
        source
            .error(at, format!("`{text}` is no duration: {e}"))
            .hinting("write a number with a unit, for example \"30s\", \"10m\" or \"1h 30m\"")
    })
}

/// A path of the config: `~/` is the home directory, and relative paths start where the file lies.
pub(super) fn path(text: &str, source: &Source, at: At<'_>) -> Result<PathBuf, ConfigError> {
    if text.is_empty() {
        return Err(source.error(at, "the path is empty"));
    }
    if text.contains('\0') {
        return Err(source.error(at, "the path holds a NUL character"));
    }
    let joined = match text.strip_prefix("~/") {
        Some(rest) => home().map(|h| h.join(rest)).ok_or_else(|| source.error(at, "`~` needs HOME to be set"))?,
        None => source.dir().join(text),
    };
    Ok(std::path::absolute(&joined).unwrap_or(joined))
}

pub(super) fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|h| !h.is_empty()).map(PathBuf::from)
}

fn default_state_dir() -> PathBuf {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    state
        .or_else(|| home().map(|h| h.join(".local/state")))
        .unwrap_or_else(|| Path::new("/var/lib").to_owned())
        .join("pool-managerd")
}
