//! Starts a program as a member of a cgroup from its first instant on.
//!
//! To move a process into a cgroup the kernel waits for an RCU grace period, 10 to 20 ms; one that is born there costs
//! nothing (clone3(2), `CLONE_INTO_CGROUP`, Linux 5.7).
#![expect(unsafe_code, reason = "no safe interface makes a process in a cgroup")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, WaitOptions};

/// `CLONE_INTO_CGROUP` of linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// How the attempt ended.
pub(crate) enum Birth {
    /// It runs.
    Alive(Pid),
    /// It was made, but could not become the program; nothing is left of it.
    Failed(io::Error),
    /// Nothing was made: the process has to be started, and then moved.
    NotHere,
}

/// The directory of a cgroup, if its `cgroup.procs` belongs to a version 2 hierarchy.
pub(crate) fn cgroup2_of(procs: &Path) -> Option<File> {
    let directory = File::open(procs.parent()?).ok()?;
    let magic = rustix::fs::fstatfs(&directory).ok()?.f_type;
    (u64::try_from(magic).ok()? == CGROUP2_MAGIC).then_some(directory)
}

/// Runs `command` in the cgroup, whose new process first calls `born`. The caller has one thread.
pub(crate) fn into_cgroup(directory: &File, command: &mut Command, born: impl FnOnce()) -> Birth {
    let Ok((mut failure, tell)) = io::pipe() else { return Birth::NotHere };
    let Some(pid) = fork_into(directory.as_raw_fd()) else { return Birth::NotHere };
    let Some(pid) = pid else {
        born();
        let error = command.exec();
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        let _told = rustix::io::write(&tell, &errno.to_ne_bytes());
        // SAFETY: ends this process without running anything that its parent also runs at its end.
        unsafe { libc::_exit(127) }
    };
    drop(tell);
    let mut errno = [0; size_of::<i32>()];
    // Closed without a word by a successful exec.
    match failure.read_exact(&mut errno) {
        Err(_closed) => Birth::Alive(pid),
        Ok(()) => {
            let _reaped = rustix::process::waitpid(Some(pid), WaitOptions::empty());
            Birth::Failed(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
        }
    }
}

/// Like fork(2): `Some(None)` in the new process. `None` if there is none, because this kernel, or who guards it, does
/// not want to.
fn fork_into(cgroup: RawFd) -> Option<Option<Pid>> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = CLONE_INTO_CGROUP;
    args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    args.cgroup = u64::from(cgroup.unsigned_abs());
    // SAFETY: without CLONE_VM the new process has its own copy of all memory and goes on here, as after fork. What
    // fork does beyond this is for programs with threads; the shim has none.
    let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match i32::try_from(made) {
        Ok(0) => Some(None),
        Ok(pid) if pid > 0 => Some(Pid::from_raw(pid)),
        _ => None,
    }
}
