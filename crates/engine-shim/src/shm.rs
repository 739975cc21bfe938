//! Shared memory that an engine leaves behind when it has no chance to clear up: files in /dev/shm that nobody removes.
//!
//! A file is the engine's if it came to be while the engine ran, belongs to its user, and was open or mapped by one of its
//! processes when it did. It is removed once no process of this machine has it open or mapped.
#![expect(unsafe_code, reason = "no safe interface asks for a lease, or to be told of a directory")]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::reaper;
use crate::spawn::raw_pid;

/// Of fcntl(2), which libc does not have.
const DN_CREATE: u32 = 0x4;
const DN_RENAME: u32 = 0x10;
const DN_MULTISHOT: u32 = 0x8000_0000;
/// Most files remembered: whoever leaves more has other troubles.
const MOST: usize = 4096;

/// Watches a directory for files of one engine. While it does, SIGIO comes for every new one.
pub(crate) struct SharedMemory {
    dir: PathBuf,
    uid: u32,
    /// What lay there at the last look, of the engine's user.
    known: Vec<Held>,
    own: Vec<Held>,
    _watched: File,
}

/// One file, by its name and by what cannot be taken over by another one while it is open.
#[derive(Clone, PartialEq, Eq)]
struct Held {
    name: OsString,
    device: u64,
    inode: u64,
}

impl SharedMemory {
    /// From now on. (Not by inotify: to take that down holds up the end of the shim for 10 to 20 ms.)
    pub(crate) fn watch(dir: &Path, uid: u32) -> io::Result<Self> {
        let directory = OFlags::DIRECTORY.bits().cast_signed();
        let watched = OpenOptions::new().read(true).custom_flags(directory).open(dir)?;
        let new = libc::c_ulong::from(DN_CREATE | DN_RENAME | DN_MULTISHOT);
        // SAFETY: F_NOTIFY takes an integer and touches no memory; the descriptor is open for as long as the borrow.
        if unsafe { libc::fcntl(watched.as_raw_fd(), libc::F_NOTIFY, new) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut watch = Self { dir: dir.to_owned(), uid, known: Vec::new(), own: Vec::new(), _watched: watched };
        watch.known = watch.files();
        Ok(watch)
    }

    /// Looks at the files that came since the last look, and keeps those that the engine has.
    pub(crate) fn look(&mut self) {
        let found = self.files();
        let mut new: Vec<Held> = found.iter().filter(|held| !self.known.contains(held)).cloned().collect();
        self.known = found;
        if new.is_empty() {
            return;
        }
        let pids = reaper::descendants();
        new.retain(|held| pids.iter().any(|&pid| holds(pid, held) == Some(true)));
        let room = MOST.saturating_sub(self.own.len());
        self.own.extend(new.into_iter().take(room));
    }

    fn files(&self) -> Vec<Held> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| self.file(&entry.file_name())).collect()
    }

    /// Removes what is left and in nobody's hands, once the engine has no process any more. Says how many it removed.
    pub(crate) fn sweep(&mut self) -> usize {
        let own = std::mem::take(&mut self.own);
        own.iter().filter(|held| self.remove_if_free(held).unwrap_or(false)).count()
    }

    fn remove_if_free(&self, held: &Held) -> io::Result<bool> {
        let path = self.dir.join(&held.name);
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&path)?;
        if !held.is(&file.metadata()?) || self.file(&held.name).as_ref() != Some(held) {
            return Ok(false);
        }
        // The file itself stays held until it has lost its name.
        let free = lease(&file).unwrap_or_else(|| processes().all(|pid| self.cannot_hold(held, pid)));
        if free {
            fs::remove_file(path)?;
        }
        Ok(free)
    }

    /// A file of the engine's user with this name, now.
    fn file(&self, name: &OsStr) -> Option<Held> {
        let found = fs::symlink_metadata(self.dir.join(name)).ok()?;
        let own = found.is_file() && found.uid() == self.uid;
        own.then(|| Held { name: name.to_owned(), device: found.dev(), inode: found.ino() })
    }

    /// Whether a process has the file neither open nor mapped. One that does not let itself be looked at cannot, if it is
    /// another user's and the file is for its owner alone.
    fn cannot_hold(&self, held: &Held, pid: u32) -> bool {
        if let Some(holds) = holds(pid, held) {
            // The sweeper itself has it open.
            return !holds || pid == raw_pid(rustix::process::getpid());
        }
        let owner = fs::metadata(format!("/proc/{pid}")).map(|process| process.uid());
        let private = fs::symlink_metadata(self.dir.join(&held.name)).is_ok_and(|file| file.mode() & 0o077 == 0);
        owner.map_or(true, |owner| private && owner != self.uid)
    }
}

/// Whether nobody else has the file open or mapped, in the kernel's own words: only then does it give a write lease.
/// `None` if this kernel, file system or user gets none.
fn lease(file: &File) -> Option<bool> {
    // SAFETY: F_SETLEASE takes an integer and touches no memory; the descriptor is open for as long as the borrow.
    let given = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    match (given, io::Error::last_os_error().kind()) {
        (0, _) => Some(true),
        (_, ErrorKind::WouldBlock) => Some(false),
        _ => None,
    }
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether a process has the file open or mapped. `None` if it does not let itself be looked at; one that has
/// ended has nothing.
fn holds(pid: u32, file: &Held) -> Option<bool> {
    let unknown = |error: io::Error| match error.kind() {
        ErrorKind::PermissionDenied => None,
        _ended => Some(false),
    };
    let maps = match fs::read(format!("/proc/{pid}/maps")) {
        Ok(maps) => maps,
        Err(error) => return unknown(error),
    };
    if maps.split(|&byte| byte == b'\n').any(|line| maps_it(line, file)) {
        return Some(true);
    }
    let fds = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(fds) => fds,
        Err(error) => return unknown(error),
    };
    for fd in fds.flatten() {
        // The name first: to look at a file itself may take as long as its file system likes.
        let named = |link: PathBuf| is_named(link.as_os_str(), &file.name);
        if fs::read_link(fd.path()).is_ok_and(named) && fs::metadata(fd.path()).is_ok_and(|found| file.is(&found)) {
            return Some(true);
        }
    }
    Some(false)
}

impl Held {
    fn is(&self, found: &Metadata) -> bool {
        (self.device, self.inode) == (found.dev(), found.ino())
    }
}

fn is_named(path: &OsStr, name: &OsStr) -> bool {
    path.as_bytes().ends_with(name.as_bytes())
}

/// A line of proc_pid_maps(5): range, permissions, offset, device, inode, path.
fn maps_it(line: &[u8], file: &Held) -> bool {
    let mut fields = line.split(|&byte| byte == b' ').skip(3);
    let (Some(device), Some(inode)) = (fields.next(), fields.next()) else { return false };
    let (major, minor) = (rustix::fs::major(file.device), rustix::fs::minor(file.device));
    inode == file.inode.to_string().as_bytes() && device == format!("{major:02x}:{minor:02x}").as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_known_by_device_and_inode() {
        let file = Held { name: "psm_1".into(), device: rustix::fs::makedev(0, 0x1a), inode: 77 };
        let line = b"7f00-7f01 rw-s 00000000 00:1a 77                 /dev/shm/psm_1 (deleted)";
        assert!(maps_it(line, &file));
        assert!(!maps_it(line, &Held { inode: 7, ..file.clone() }));
        assert!(!maps_it(b"7f00-7f01 rw-s 00000000 00:1b 77   /dev/shm/psm_1", &file));
        assert!(!maps_it(b"", &file));
    }
}
