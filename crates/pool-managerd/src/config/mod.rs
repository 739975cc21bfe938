//! The config file: read, checked, and explained where it is wrong.

mod check;
mod error;
mod exposure;
mod models;
mod parse;
mod raw;
mod source;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::ConfigError;
pub use models::Models;
use pool_api::dto::EngineView;
use pool_api::spec::Defaults;
use pool_domain::xid::XidTable;
use pool_services::{Declared, PoolSpec};
pub use raw::{LogFormat, OnExit, Profile, RawConfig};
pub(crate) use source::{At, Step};

/// No config is larger.
pub const MAX_BYTES: u64 = 1024 * 1024;

/// What the command line says on top of the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--listen`
    pub listen: Option<String>,
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--model`, each a pool of its own.
    pub models: Vec<String>,
}

/// A checked config.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node and its API.
    pub node: Node,
    /// Where tokens are, if they are asked for.
    pub auth: Option<Auth>,
    /// Certificate and key, if TLS is spoken.
    pub tls: Option<Tls>,
    /// The devices.
    pub gpu: Gpu,
    /// What follows from errors that the driver reports of devices; `None`: nothing.
    pub xids: Option<XidTable>,
    /// Where models come from.
    pub models: Models,
    /// Declared engines, the built-in ones included.
    pub engines: BTreeMap<String, Engine>,
    /// The pools.
    pub pools: Vec<Declared>,
    source: source::Source,
    overrides: Overrides,
}

/// The node and its API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The set of defaults that was chosen.
    pub profile: Profile,
    /// Where the API listens.
    pub listen: SocketAddr,
    /// A further address for probes.
    pub probe_listen: Option<SocketAddr>,
    /// A socket for the daemon's own user.
    pub socket: Option<PathBuf>,
    /// Somebody wants it reachable without tokens or TLS.
    pub insecure: bool,
    /// Further Host names.
    pub hosts: Vec<String>,
    /// Allowed origins.
    pub origins: Vec<String>,
    /// Durable facts.
    pub state_dir: PathBuf,
    /// Where engines listen.
    pub engine_listen: IpAddr,
    /// Whether each engine gets an API key.
    pub engine_keys: bool,
    /// Ports engines are given.
    pub engine_ports: RangeInclusive<u16>,
    /// What becomes of engines at the end.
    pub on_exit: OnExit,
    /// Time for an orderly stop.
    pub shutdown_deadline: Duration,
    /// How much of that is for leases that run.
    pub shutdown_drain: Duration,
    /// Longest lease.
    pub max_lease_ttl: Duration,
    /// How long a request to the gateway waits for a slot.
    pub gateway_wait: Duration,
    /// How long a replica that became Ready neither stops unused nor gives way to others.
    pub min_ready_time: Duration,
    /// How the log looks.
    pub log: LogFormat,
}

/// Where tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// A file.
    pub file: Option<PathBuf>,
    /// A variable of the environment.
    pub env: Option<String>,
}

/// Where certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The chain.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// The devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpu {
    /// The NVIDIA driver.
    Nvml {
        /// How long to wait for devices at boot; `None` is for ever.
        wait: Option<Duration>,
        /// The kernel's log, if it is to be read.
        kernel_log: Option<PathBuf>,
    },
    /// A topology file.
    Simulated {
        /// The file.
        topology: PathBuf,
    },
}

/// A declared engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// Its kind.
    pub kind: EngineKind,
    /// How it comes to run.
    pub mode: EngineMode,
}

impl Engine {
    /// As the API shows it, under the name that pools give.
    #[must_use]
    pub fn view(&self, name: &str) -> EngineView {
        let kind = match self.kind {
            EngineKind::LlamaCpp => "llama.cpp",
            EngineKind::Vllm => "vllm",
            EngineKind::Stub => "stub",
        };
        let mode = match self.mode {
            EngineMode::Binary(_) => "binary",
            EngineMode::External(_) => "external",
        };
        EngineView { name: name.to_owned(), kind: kind.to_owned(), mode: mode.to_owned(), versions: Vec::new() }
    }
}

/// The kinds there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// llama.cpp's `llama-server`.
    LlamaCpp,
    /// vLLM.
    Vllm,
    /// The engine without a model.
    Stub,
}

/// How an engine comes to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineMode {
    /// The daemon starts this program: a path, or a name to look for in PATH. `None` is the kind's own.
    Binary(Option<PathBuf>),
    /// Somebody else starts it; it listens here.
    External(SocketAddr),
}

/// Reads and checks a config file, or takes the defaults where there is none.
///
/// # Errors
/// The first thing that is wrong, with its place.
pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Config, ConfigError> {
    let source = match path {
        Some(path) => parse::read(path)?,
        None => source::Source::default(),
    };
    let raw = parse::parse(&source)?;
    check::check(raw, source, overrides)
}

impl Config {
    /// The same once more, from the file as it is now.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn reread(&self) -> Result<Self, ConfigError> {
        load(self.file(), &self.overrides)
    }

    /// What the pools are to be.
    pub fn specs(&self) -> impl Iterator<Item = &PoolSpec> {
        self.pools.iter().map(|p| &p.spec)
    }

    /// What a pool gets when it does not say.
    #[must_use]
    pub fn defaults(&self) -> Defaults {
        self.node.profile.defaults()
    }

    /// Where the engine of a pool listens, if somebody else runs it.
    #[must_use]
    pub fn external(&self, pool: &PoolSpec) -> Option<SocketAddr> {
        check::external(&self.engines, pool)
    }

    /// Keys outside `[[pool]]` that another config has otherwise. None of them can be changed without a restart.
    #[must_use]
    pub fn differs_outside(&self, other: &Self) -> Vec<String> {
        let mut keys = Vec::new();
        let mut compare = |key: String, same: bool| {
            if !same {
                keys.push(key);
            }
        };
        macro_rules! node {
            ($($field:ident)*) => {$( compare(concat!("node.", stringify!($field)).into(), self.node.$field == other.node.$field); )*};
        }
        node!(profile listen probe_listen socket insecure hosts origins state_dir engine_listen engine_keys engine_ports shutdown_deadline shutdown_drain gateway_wait log);
        // Nobody writes `bound`.
        compare("node.on_exit".into(), self.node.on_exit == OnExit::Bound || self.node.on_exit == other.node.on_exit);
        compare("auth".into(), self.auth == other.auth);
        compare("tls".into(), self.tls == other.tls);
        compare("gpu".into(), self.gpu == other.gpu && self.xids == other.xids);
        self.models.differs(&other.models).into_iter().for_each(|key| compare(key.into(), false));
        let names: std::collections::BTreeSet<_> = self.engines.keys().chain(other.engines.keys()).collect();
        for name in names {
            compare(format!("engines.{name}"), self.engines.get(name) == other.engines.get(name));
        }
        keys
    }

    /// The file it was read from.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        self.source.file.as_deref()
    }

    /// An error about a key of one of the pools, dotted below the pool, found out later than the file was read.
    #[must_use]
    pub fn pool_error(&self, index: usize, key: &str, message: impl Into<String>) -> ConfigError {
        let mut path = vec![Step::Key("pool"), Step::Index(index)];
        path.extend(key.split('.').map(Step::Key));
        self.source.error(At::Key(&path), message)
    }

    /// An error about a key of a section.
    #[must_use]
    pub fn section_error(&self, section: &str, key: &str, message: impl Into<String>) -> ConfigError {
        self.source.error(At::Key(&[Step::Key(section), Step::Key(key)]), message)
    }
}
