//! The small single-threaded parent of every engine.
//!
//! The daemon starts `engine-shim <launch spec>`; the shim starts the engine, pumps its output into a bounded and
//! scrubbed log, records its start and its exit, adopts whatever it leaves behind, and goes when nothing is left.
//! So the daemon may die: output goes on, the exit is known later, and inherited locks hold. Should the shim itself
//! die, the engine dies with it (`PR_SET_PDEATHSIG`; safe because the shim never has a second thread).
//!
//! **Reports** leave on the shim's stdout, one JSON [`Report`] a line.
//! **Control** is by signals to the shim: [`TERMINATE`] and [`KILL`]. SIGHUP, SIGINT and SIGPIPE do nothing.
//! **Locks**: a descriptor handed to the shim without close-on-exec stays open in the shim and in the engine.
//!
//! The binary takes the spec's path, alone or after the word `engine-shim`. A program that wants to be its own shim
//! calls [`run_if_asked`] first in `main`, before it starts a thread.

mod access;
mod born;
mod cgroups;
mod locks;
mod log;
mod reaper;
mod record;
mod report;
mod run;
mod secrets;
mod shm;
mod signals;
mod slim;
mod spawn;
mod spec;
mod sysv;
mod user;

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

pub use access::{ACCESS, Access, AccessAnswer, AccessQuestion};
pub use record::{ExitRecord, StartRecord, boot_id, executable, pid_namespace};
pub use report::Report;
pub use run::run;
pub use signals::{KILL, TERMINATE};
pub use spec::{LaunchSpec, SecretFile};
pub use user::User;

/// The first argument that turns a program into a shim.
pub const SUBCOMMAND: &str = "engine-shim";

/// Runs the shim if this process was started as `<program> engine-shim <launch spec>`, and says how it ended.
///
/// Call it first in `main`: the shim must be the only thread.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != OsStr::new(SUBCOMMAND) {
        return None;
    }
    // A missing path is a spec that cannot be read, and is reported as one.
    let spec_path = args.next().unwrap_or_default();
    Some(run(Path::new(&spec_path)))
}
