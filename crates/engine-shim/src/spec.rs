//! What to start and how: the one file the shim reads.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::user::User;

/// Everything the shim needs to start one engine. Written as JSON by the daemon (mode 0600: it may hold secrets);
/// the shim's argv carries only its path.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// Names this one start; copied into both records.
    pub nonce: String,
    /// The engine's executable, an absolute path.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub args: Vec<String>,
    /// Its whole environment: nothing is inherited.
    pub env: Vec<(String, String)>,
    /// Its working directory.
    pub workdir: PathBuf,
    /// Where its stdout and stderr go. The previous part is kept beside it, with `.1` appended to the name.
    pub log: PathBuf,
    /// The most bytes in `log`, and again in `log.1` (at least 4 KiB).
    pub log_max_bytes: u64,
    /// Secret values, replaced by `[redacted]` in the log.
    #[serde(default)]
    pub scrub: Vec<String>,
    /// Where the [`ExitRecord`](crate::ExitRecord) is written.
    pub exit_record: PathBuf,
    /// Where the [`StartRecord`](crate::StartRecord) is written.
    pub start_record: PathBuf,
    /// Where it is written a second time: a place that outlives the first.
    #[serde(default)]
    pub start_record_copy: Option<PathBuf>,
    /// Whether stdin is a locked file. It stays open in the shim and in the engine, so the lock holds as long as they.
    #[serde(default)]
    pub lock_on_stdin: bool,
    /// Files that are locked in shared mode before the start, for as long as shim and engine live. They must exist.
    #[serde(default)]
    pub shared_locks: Vec<PathBuf>,
    /// The `cgroup.procs` files the engine joins before exec. The shim stays where it was started.
    #[serde(default)]
    pub cgroup_procs: Vec<PathBuf>,
    /// The `cgroup.procs` files it is moved to right after exec, while it loads: those that only count. A move takes the
    /// kernel 10 to 20 ms. One that fails is noted in the log.
    #[serde(default)]
    pub later_cgroup_procs: Vec<PathBuf>,
    /// Those it joins before exec because they limit it. They prove nothing about who it is.
    #[serde(default)]
    pub limiting_cgroup_procs: Vec<PathBuf>,
    /// `RLIMIT_NOFILE`, soft and hard; `None` leaves it as it is.
    #[serde(default)]
    pub nofile: Option<u64>,
    /// Who the engine runs as, without any capability. `None` changes nothing.
    #[serde(default)]
    pub run_as: Option<User>,
    /// Files in `workdir` that only the engine's user may read, while it runs.
    #[serde(default)]
    pub secrets: Vec<SecretFile>,
    /// Where shared memory lies as files; what the engine leaves there is removed when it is gone.
    #[serde(default)]
    pub shm_dir: Option<PathBuf>,
    /// Whether everything is stopped when nobody reads the reports any more.
    #[serde(default)]
    pub stop_when_parent_gone: bool,
}

/// A secret that an engine reads from a file: in its argv or its environment others could see it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretFile {
    /// The file's name in the working directory.
    pub name: String,
    /// What it holds.
    pub value: String,
}

/// Leaves out the value.
impl fmt::Debug for SecretFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretFile").field("name", &self.name).finish_non_exhaustive()
    }
}

impl LaunchSpec {
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_reader(BufReader::new(File::open(path)?))?)
    }
}

/// Leaves out the values that may be secret.
impl fmt::Debug for LaunchSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchSpec")
            .field("nonce", &self.nonce)
            .field("program", &self.program)
            .field("workdir", &self.workdir)
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}
