//! The config file: read, checked, and explained where it is wrong.

mod check;
mod error;
mod parse;
mod raw;
mod source;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::ConfigError;
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
    /// The devices.
    pub gpu: Gpu,
    /// Where models come from.
    pub models: Models,
    /// Declared engines, the built-in ones included.
    pub engines: BTreeMap<String, Engine>,
    /// The pools.
    pub pools: Vec<pool_services::PoolSpec>,
    source: source::Source,
}

/// The node and its API.
#[derive(Debug, Clone)]
pub struct Node {
    /// The set of defaults that was chosen.
    pub profile: Profile,
    /// Where the API listens.
    pub listen: SocketAddr,
    /// Further Host names.
    pub hosts: Vec<String>,
    /// Allowed origins.
    pub origins: Vec<String>,
    /// Durable facts.
    pub state_dir: PathBuf,
    /// Where engines listen.
    pub engine_listen: IpAddr,
    /// Ports engines are given.
    pub engine_ports: RangeInclusive<u16>,
    /// What becomes of engines at the end.
    pub on_exit: OnExit,
    /// Time for an orderly stop.
    pub shutdown_deadline: Duration,
    /// How the log looks.
    pub log: LogFormat,
}

/// The devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpu {
    /// The NVIDIA driver.
    Nvml {
        /// How long to wait for devices at boot; `None` is for ever.
        wait: Option<Duration>,
    },
    /// A topology file.
    Simulated {
        /// The file.
        topology: PathBuf,
    },
}

/// Where models come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Models {
    /// Directories, or single files named on the command line.
    pub roots: Vec<PathBuf>,
}

/// A declared engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// Its kind.
    pub kind: EngineKind,
    /// How it comes to run.
    pub mode: EngineMode,
}

/// The kinds there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// llama.cpp's `llama-server`.
    LlamaCpp,
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
