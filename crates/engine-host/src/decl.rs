//! Which engines there are.

use std::net::SocketAddr;
use std::path::PathBuf;

use pool_domain::EngineName;

/// What protocol and flags an engine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `llama-server`.
    LlamaCpp,
    /// `vllm serve`.
    Vllm,
    /// The stub engine.
    Stub,
}

impl Kind {
    /// The kind as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::LlamaCpp => "llama.cpp",
            Self::Vllm => "vllm",
            Self::Stub => "stub",
        }
    }
}

/// Where an engine comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// A program on this machine.
    Binary {
        /// A path, or a name that is looked up in `PATH`. Not used by [`Kind::Stub`], which runs the
        /// [`StubCommand`].
        path: PathBuf,
    },
    /// A server that somebody else runs.
    External {
        /// Where it listens.
        addr: SocketAddr,
    },
}

/// An engine that pools may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineDecl {
    /// The name pools use.
    pub name: EngineName,
    /// What it is.
    pub kind: Kind,
    /// Where it comes from.
    pub mode: Mode,
}

/// How the stub engine is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StubCommand {
    /// The program, for example this daemon's own.
    pub program: PathBuf,
    /// What comes before the engine's flags, for example `stub-engine`.
    pub args: Vec<String>,
}
