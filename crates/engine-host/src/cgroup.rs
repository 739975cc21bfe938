//! A cgroup for each engine, where cgroup2 is there and ours to divide. It names all processes of an engine, ends them
//! at once and proves that none is left.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::delegated::{hand_down, is_delegated, step_aside};
use crate::memory_cgroup::counted;

/// How often to look whether a cgroup has emptied: its file tells of that by poll(2) only.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Names tried for one cgroup.
pub(crate) const TRIES: u32 = 16;
/// Where `DelegateSubgroup=` of deploy/systemd puts the daemon, so that no process is in the cgroup of the unit itself: only
/// then may controllers be given to cgroups below it (cgroup-v2.rst, "No Internal Process Constraint").
pub(crate) const SUBGROUP: &str = "supervisor";
/// Which controllers cgroups below may use.
pub(crate) const CONTROL: &str = "cgroup.subtree_control";
pub(crate) const PREFIX: &str = "pool-managerd-";

/// Where this process makes its cgroups.
#[derive(Debug)]
pub(crate) struct Parent {
    dir: PathBuf,
}

impl Parent {
    /// Makes `pool-managerd-<pid>` in this process's own cgroup, or beside it where it has one for itself.
    pub(crate) fn create() -> io::Result<Arc<Self>> {
        let unsupported = |what: &str| io::Error::new(ErrorKind::Unsupported, what.to_owned());
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let cgroups = fs::read_to_string("/proc/self/cgroup")?;
        let own = own_cgroup(&mounts, &cgroups).ok_or_else(|| unsupported("no cgroup2 is mounted"))?;
        let (pid, divided) = (std::process::id(), to_divide(own.clone()));
        if divided != own || step_aside(&own, is_delegated, pid) {
            hand_down(&divided);
        }
        let dir = divided.join(format!("{PREFIX}{pid}"));
        create_new_or_existing(&dir)?;
        let parent = Self { dir };
        let writable = rustix::fs::access(parent.dir.join("cgroup.procs"), rustix::fs::Access::WRITE_OK);
        writable.map_err(io::Error::from)?;
        // So that kills for memory are counted for each engine, where we were given that to divide.
        hand_down(&parent.dir);
        Ok(Arc::new(parent))
    }

    /// Removes what is left of earlier daemons, but for the engines of these launches.
    pub(crate) fn sweep(&self, known: &[&str]) {
        remove_leftovers(self.dir.parent(), known);
    }

    /// Makes an empty cgroup of this name, or one like it.
    pub(crate) fn engine(self: &Arc<Self>, name: &str) -> io::Result<Cgroup> {
        create_new_or_existing(&self.dir)?;
        for attempt in 0..TRIES {
            let dir = self.dir.join(if attempt == 0 { name.to_owned() } else { format!("{name}.{attempt}") });
            match fs::create_dir(&dir) {
                Ok(()) => return Ok(Cgroup { dir, _parent: Some(Arc::clone(self)) }),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(ErrorKind::AlreadyExists.into())
    }
}

/// Removes it if it is empty.
impl Drop for Parent {
    fn drop(&mut self) {
        let _in_use = fs::remove_dir(&self.dir);
    }
}

pub(crate) fn create_new_or_existing(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Removes the empty cgroups of daemons that are no more. One with processes in it cannot be removed; one that bears a name of
/// `known` may be empty and count still how its engine ended.
pub(crate) fn remove_leftovers(own: Option<&Path>, known: &[&str]) {
    for entry in own.map(fs::read_dir).into_iter().flatten().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        for engine in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            let name = engine.file_name();
            if !name.to_str().is_some_and(|name| known.iter().any(|nonce| name.contains(nonce))) {
                let _in_use = fs::remove_dir(engine.path());
            }
        }
        let _in_use = fs::remove_dir(entry.path());
    }
}

/// The cgroup in which engines get theirs.
fn to_divide(own: PathBuf) -> PathBuf {
    let of_the_unit = own.parent().filter(|unit| {
        let ours = rustix::fs::access(unit.join(CONTROL), rustix::fs::Access::WRITE_OK).is_ok();
        ours && own.file_name().is_some_and(|name| name == SUBGROUP)
    });
    of_the_unit.map(Path::to_owned).unwrap_or(own)
}

/// The directory of this process's cgroup.
fn own_cgroup(mounts: &str, cgroups: &str) -> Option<PathBuf> {
    let own = Path::new(cgroups.lines().find_map(|line| line.strip_prefix("0::"))?);
    mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        if kind.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = fields.split(' ').skip(3);
        let (root, mount) = (unescape(fields.next()?), unescape(fields.next()?));
        Some(Path::new(&mount).join(own.strip_prefix(root).ok()?))
    })
}

/// Mountinfo writes blanks and the like as `\040`.
pub(crate) fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |field, (from, to)| field.replace(from, to))
}

/// The cgroup of one engine.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
    /// Unset for one that an earlier daemon made.
    _parent: Option<Arc<Parent>>,
}

impl Cgroup {
    /// The one that an earlier daemon made for a launch, if it bears the launch's name: then nobody else is in it.
    pub(crate) fn own(procs: &[PathBuf], nonce: &str) -> Option<Self> {
        let dir = procs.first()?.parent()?;
        let ours = !nonce.is_empty() && dir.file_name()?.to_str()?.contains(nonce);
        ours.then(|| Self { dir: dir.to_owned(), _parent: None })
    }

    /// The file by which a process joins.
    pub(crate) fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Who is in it.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let list = fs::read_to_string(self.procs()).unwrap_or_default();
        list.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Kills all that are in it.
    pub(crate) fn kill(&self) {
        if let Err(error) = fs::write(self.dir.join("cgroup.kill"), "1") {
            tracing::debug!(%error, "cgroup.kill");
        }
    }

    /// Whether memory is counted here.
    pub(crate) fn limits_memory(&self) -> bool {
        self.dir.join("memory.max").exists()
    }

    /// Lets it have at most this much memory, and no swap beyond it.
    pub(crate) fn limit_memory(&self, bytes: u64) -> io::Result<()> {
        fs::write(self.dir.join("memory.max"), bytes.to_string())?;
        // Not there without swap.
        let _no_swap = fs::write(self.dir.join("memory.swap.max"), "0");
        Ok(())
    }

    /// Whether the kernel killed here for memory.
    pub(crate) fn oom_killed(&self) -> bool {
        counted(&fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default())
    }

    fn is_empty(&self) -> bool {
        match fs::read_to_string(self.dir.join("cgroup.events")) {
            Ok(events) => events.lines().any(|line| line == "populated 0"),
            // Only an empty one can have been removed.
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }

    /// Removes it if it is empty.
    pub(crate) fn remove(&self) {
        let _in_use = fs::remove_dir(&self.dir);
    }

    /// Returns when nobody is in it.
    pub(crate) async fn emptied(&self) {
        while !self.is_empty() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// Removes it if it is empty.
impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn engines_are_beside_a_daemon_that_has_a_cgroup_for_itself() {
        let unit = tempfile::tempdir().unwrap();
        let [own, other] = [SUBGROUP, "other"].map(|name| unit.path().join(name));
        assert_eq!(to_divide(own.clone()), own, "the unit's is not ours to divide");
        fs::write(unit.path().join(CONTROL), "").unwrap();
        assert_eq!(to_divide(own), unit.path());
        assert_eq!(to_divide(other.clone()), other);
    }

    #[test]
    fn the_own_cgroup_is_found_below_the_mount() {
        let own = |mounts, cgroups| own_cgroup(mounts, cgroups).map(|path| path.display().to_string());
        assert_eq!(own(MOUNTS, "1:cpu:/x\n0::/a/b\n").as_deref(), Some("/sys/fs/cgroup/uni fied/a/b"));
        assert_eq!(own(MOUNTS, "1:cpu:/x\n"), None);
        let part = "41 31 0:38 /a /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        assert_eq!(own(part, "0::/a/b").as_deref(), Some("/sys/fs/cgroup/b"));
        assert_eq!(own(part, "0::/c"), None);
    }
}
