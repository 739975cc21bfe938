//! System V shared memory that an engine leaves behind: segments stay until somebody removes them, and are no files.
//!
//! A segment is the engine's if one of its processes made it. The kernel names the process by its pid, which means something
//! only while nobody else can have it: so it is looked at while that process is below the shim, ended or not, but not waited for.
#![expect(unsafe_code, reason = "no safe interface removes a segment")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::reaper;

/// Between two looks at an engine that says something.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Most segments remembered: whoever leaves more has other troubles.
const MOST: usize = 4096;

/// One segment. Its id is not given to another while this one exists, and counts up when it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    id: i32,
    /// Who made it.
    creator: u32,
    uid: u32,
    attached: u64,
}

impl Segment {
    fn is(&self, other: &Self) -> bool {
        (self.id, self.creator, self.uid) == (other.id, other.creator, other.uid)
    }
}

/// Watches the segments of one engine.
pub(crate) struct Segments {
    list: PathBuf,
    uid: u32,
    /// Those that were there before it.
    before: Vec<Segment>,
    own: Vec<Segment>,
    looked: Instant,
}

impl Segments {
    /// From now on.
    pub(crate) fn watch(uid: u32) -> Self {
        let list = PathBuf::from("/proc/sysvipc/shm");
        let before = read(&list);
        Self { list, uid, before, own: Vec::new(), looked: Instant::now() }
    }

    /// Looks, if that was not just done.
    pub(crate) fn look_at_times(&mut self) {
        if self.looked.elapsed() >= LOOK_AGAIN {
            self.look();
        }
    }

    /// Keeps in mind what the engine's processes have made. To be called before one that has ended is waited for.
    pub(crate) fn look(&mut self) {
        self.looked = Instant::now();
        let mut new = read(&self.list);
        new.retain(|s| s.uid == self.uid && ![&self.before, &self.own].iter().any(|of| of.iter().any(|o| o.is(s))));
        if new.is_empty() {
            return;
        }
        let pids = reaper::descendants();
        let room = MOST.saturating_sub(self.own.len());
        self.own.extend(new.into_iter().filter(|s| pids.contains(&s.creator)).take(room));
    }

    /// Removes what is left and attached to nobody, once the engine has no process any more. Says how many it removed.
    pub(crate) fn sweep(&mut self) -> usize {
        let own = std::mem::take(&mut self.own);
        if own.is_empty() {
            return 0;
        }
        let left = read(&self.list);
        let free = left.iter().filter(|s| s.attached == 0 && own.iter().any(|o| o.is(s)));
        free.filter(|s| remove(s.id).is_ok()).count()
    }
}

/// Whoever attaches meanwhile keeps it: it goes with the last that is attached.
fn remove(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no buffer, and touches no memory of this process.
    match unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Every segment of the namespace; none where the kernel has none.
fn read(list: &Path) -> Vec<Segment> {
    fs::read_to_string(list).unwrap_or_default().lines().skip(1).filter_map(parse).collect()
}

/// A line of proc_sysvipc(5): key, shmid, perms, size, cpid, lpid, nattch, uid, gid, cuid, …
fn parse(line: &str) -> Option<Segment> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    Some(Segment {
        id: fields.get(1)?.parse().ok()?,
        creator: fields.get(4)?.parse().ok()?,
        attached: fields.get(6)?.parse().ok()?,
        uid: fields.get(9)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_known_by_its_id_and_who_made_it() {
        let line =
            "         0      65537   600                 4096  4711  4712      2  1000  1000  1001  1000 1 0 1 4096 0";
        let segment = parse(line).unwrap();
        assert_eq!(segment, Segment { id: 65_537, creator: 4_711, uid: 1_001, attached: 2 });
        assert!(segment.is(&Segment { attached: 0, ..segment }));
        assert!(!segment.is(&Segment { creator: 1, ..segment }) && !segment.is(&Segment { id: 1, ..segment }));
        assert_eq!(parse("       key      shmid perms"), None);
    }
}
