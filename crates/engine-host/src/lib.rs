//! Engines: found and checked ([`Provisioner`]), launched and ended ([`ProcessHost`]), asked ([`HttpProbe`]).
//!
//! Every engine is a child of an `engine-shim`, which is a child of this process or of a daemon before it. Only that shim is
//! ever signalled, through its pidfd; nothing here sends a signal to a bare pid.
#![forbid(unsafe_code)]

mod adopt;
mod cgroup;
mod decl;
mod delegated;
mod discover;
mod external;
mod host;
mod http;
mod isolation;
mod kinds;
mod listening;
mod locks;
mod log_patterns;
mod memory_cgroup;
pub mod preflight;
mod probe;
mod provision;
mod running;
mod signals;
mod text;
mod tree;
mod users;
mod vllm;

pub use decl::{EngineDecl, Kind, Mode, StubCommand};
pub use host::{HostOptions, ProcessHost, ShimCommand, log_path};
pub use isolation::{Unkept, can_keep};
pub use probe::HttpProbe;
pub use provision::Provisioner;
