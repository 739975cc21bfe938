//! Where memory is counted by cgroups of version 1, as on hybrid and legacy hosts: a memory cgroup for each engine, which
//! counts the kills of the kernel for memory. Where cgroup2 counts it, `cgroup` reads that.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cgroup::{PREFIX, TRIES, create_new_or_existing, remove_leftovers, unescape};

/// Where this process makes them.
#[derive(Debug)]
pub(crate) struct MemoryParent {
    dir: PathBuf,
}

impl MemoryParent {
    /// Makes `pool-managerd-<pid>` in this process's own memory cgroup; `None` where version 1 does not count memory, or
    /// not for us.
    pub(crate) fn create() -> Option<Arc<Self>> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let own = own_memory_cgroup(&mounts, &fs::read_to_string("/proc/self/cgroup").ok()?)?;
        let parent = Self { dir: own.join(format!("{PREFIX}{}", std::process::id())) };
        let usable = || {
            create_new_or_existing(&parent.dir)?;
            rustix::fs::access(parent.dir.join("cgroup.procs"), rustix::fs::Access::WRITE_OK).map_err(io::Error::from)
        };
        if let Err(error) = usable() {
            tracing::debug!(%error, "kills for memory of the host cannot be told from others");
            return None;
        }
        Some(Arc::new(parent))
    }

    /// Removes what is left of earlier daemons, but for the engines of these launches.
    pub(crate) fn sweep(&self, known: &[&str]) {
        remove_leftovers(self.dir.parent(), known);
    }

    /// Makes one for an engine of this name, or none.
    pub(crate) fn engine(self: &Arc<Self>, name: &str) -> Option<MemoryCgroup> {
        create_new_or_existing(&self.dir).ok()?;
        // One that is there still counts what was: it is another engine's.
        let names = (0..TRIES).map(|n| if n == 0 { name.to_owned() } else { format!("{name}.{n}") });
        let dir = names.map(|name| self.dir.join(name)).find(|dir| fs::create_dir(dir).is_ok())?;
        Some(MemoryCgroup { dir, _parent: Some(Arc::clone(self)) })
    }
}

/// Removes it if it is empty.
impl Drop for MemoryParent {
    fn drop(&mut self) {
        let _in_use = fs::remove_dir(&self.dir);
    }
}

/// The directory of this process's memory cgroup.
fn own_memory_cgroup(mounts: &str, cgroups: &str) -> Option<PathBuf> {
    let own = Path::new(cgroups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|c| c == "memory").then_some(path)
    })?);
    mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1)?);
        if name != "cgroup" || !options.split(',').any(|o| o == "memory") {
            return None;
        }
        let mut fields = fields.split(' ').skip(3);
        let (root, mount) = (unescape(fields.next()?), unescape(fields.next()?));
        Some(Path::new(&mount).join(own.strip_prefix(root).ok()?))
    })
}

/// The memory cgroup of one engine. Removed when it is dropped, if it is empty.
#[derive(Debug)]
pub(crate) struct MemoryCgroup {
    dir: PathBuf,
    /// Unset for one that an earlier daemon made.
    _parent: Option<Arc<MemoryParent>>,
}

impl MemoryCgroup {
    /// The one that an earlier daemon made for a launch, if it bears the launch's name: then it counts nobody else's.
    pub(crate) fn own(procs: &[PathBuf], nonce: &str) -> Option<Self> {
        let mut dirs = procs.iter().filter_map(|procs| procs.parent());
        let ours =
            |dir: &&Path| dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(nonce));
        let counts = |dir: &&Path| dir.join("memory.oom_control").exists();
        let dir = dirs.find(|dir| !nonce.is_empty() && ours(dir) && counts(dir))?;
        Some(Self { dir: dir.to_owned(), _parent: None })
    }

    /// The file by which a process joins.
    pub(crate) fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Lets it have at most this much memory, and no swap beyond it.
    pub(crate) fn limit(&self, bytes: u64) -> io::Result<()> {
        fs::write(self.dir.join("memory.limit_in_bytes"), bytes.to_string())?;
        // Both together; not there where swap is not counted.
        let _no_swap = fs::write(self.dir.join("memory.memsw.limit_in_bytes"), bytes.to_string());
        Ok(())
    }

    /// Whether the kernel killed here for memory.
    pub(crate) fn oom_killed(&self) -> bool {
        counted(&fs::read_to_string(self.dir.join("memory.oom_control")).unwrap_or_default())
    }

    /// Removes it if it is empty.
    pub(crate) fn remove(&self) {
        let _in_use = fs::remove_dir(&self.dir);
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Whether `memory.events` of version 2, or `memory.oom_control` of version 1, counts a kill.
pub(crate) fn counted(events: &str) -> bool {
    events.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_memory_cgroup_is_found_below_its_mount() {
        let mounts = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            35 31 0:32 /a /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,hugetlb,memory\n";
        let own = |cgroups| own_memory_cgroup(mounts, cgroups).map(|path| path.display().to_string());
        assert_eq!(own("1:cpu:/x\n4:hugetlb,memory:/a/b:c\n0::/y\n").as_deref(), Some("/sys/fs/cgroup/memory/b:c"));
        assert_eq!(own("4:memory:/other\n"), None);
        assert_eq!(own("0::/a/b\n"), None);
    }

    #[test]
    fn kills_are_counted_in_the_words_of_both_versions() {
        assert!(counted("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"));
        assert!(counted("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"));
        assert!(!counted("oom_kill_disable 0\nunder_oom 1\noom_kill 0\n"));
        // Before Linux 4.13 version 1 did not count.
        assert!(!counted("oom_kill_disable 0\nunder_oom 0\n") && !counted(""));
    }
}
