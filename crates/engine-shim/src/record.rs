//! The two records that outlive the daemon, and the facts from /proc that go into them.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::spawn::raw_pid;
use crate::spec::LaunchSpec;

/// Who was started: what a later daemon compares before it adopts.
///
/// The shim writes it right after exec, before it reports the start. Should the shim die in between, the engine
/// dies too, so a living engine always has its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRecord {
    /// From the launch spec.
    pub nonce: String,
    /// The engine's main process.
    pub pid: u32,
    /// Its start time (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
    /// The shim: where [`TERMINATE`](crate::TERMINATE) and [`KILL`](crate::KILL) go.
    pub shim_pid: u32,
    /// The shim's start time.
    pub shim_start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// The PID namespace, in which alone the pids mean anything (`/proc/self/ns/pid`).
    #[serde(default)]
    pub pid_namespace: String,
    /// The engine's executable right after its exec, as [`executable`] tells it.
    #[serde(default)]
    pub executable: Option<String>,
    /// The shim's.
    #[serde(default)]
    pub shim_executable: Option<String>,
    /// The `cgroup.procs` files that the engine joined.
    #[serde(default)]
    pub cgroup_procs: Vec<PathBuf>,
    /// Those that it is moved to after its start.
    #[serde(default)]
    pub later_cgroup_procs: Vec<PathBuf>,
}

/// How the main process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// From the launch spec.
    pub nonce: String,
    /// Its exit code, if it exited.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// When the shim saw it, in milliseconds of unix time.
    pub exited_at_ms: u64,
    /// Whether, after that, the last descendant has ended too.
    #[serde(default)]
    pub gone: bool,
}

/// Names the file that a process runs, whatever has become of its path since: its device and inode.
#[must_use]
pub fn executable(pid: u32) -> Option<String> {
    let file = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some(format!("{}:{}", file.dev(), file.ino()))
}

/// Names the PID namespace of the caller.
#[must_use]
pub fn pid_namespace() -> String {
    fs::read_link("/proc/self/ns/pid").map(|link| link.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Names this boot of the machine.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

impl StartRecord {
    pub(crate) fn of(spec: &LaunchSpec, pid: u32) -> io::Result<Self> {
        let shim_pid = raw_pid(rustix::process::getpid());
        Ok(Self {
            nonce: spec.nonce.clone(),
            pid,
            start_time: stat_field(pid, 22)?,
            shim_pid,
            shim_start_time: stat_field(shim_pid, 22)?,
            boot_id: boot_id()?,
            pid_namespace: pid_namespace(),
            executable: executable(pid),
            shim_executable: executable(shim_pid),
            cgroup_procs: spec.cgroup_procs.clone(),
            later_cgroup_procs: spec.later_cgroup_procs.clone(),
        })
    }
}

impl ExitRecord {
    pub(crate) fn now(nonce: &str, code: Option<i32>, signal: Option<i32>) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let exited_at_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        Self { nonce: nonce.to_owned(), code, signal, exited_at_ms, gone: false }
    }
}

/// Writes a record so that a reader sees all of it or none.
pub(crate) fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let temporary = with_suffix(path, ".tmp");
    fs::write(&temporary, serde_json::to_vec(record)?)?;
    fs::rename(temporary, path)
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// A numeric field of `/proc/<pid>/stat`, counted as in proc(5); only those after the name (4 and up).
pub(crate) fn stat_field(pid: u32, field: usize) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat, field).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "unexpected /proc/<pid>/stat"))
}

/// The name (field 2) may hold anything, a closing bracket too: count from the last one.
fn parse_stat(stat: &[u8], field: usize) -> Option<u64> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(&stat[name_end + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(field.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse_stat;

    #[test]
    fn fields_are_counted_after_the_last_bracket() {
        let stat = b"7 (a) 9 (b) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23";
        assert_eq!(parse_stat(stat, 4), Some(4));
        assert_eq!(parse_stat(stat, 22), Some(22));
        assert_eq!(parse_stat(b"7 sh S 4", 4), None);
    }
}
