//! Moves an engine that runs into cgroups that only count.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::Pid;

use crate::reaper;
use crate::spawn::raw_pid;

/// Moves the process, with what it has started so far, by each of these `cgroup.procs` files. Tells which moves failed;
/// that something has ended meanwhile is no failure.
pub(crate) fn join(procs: &[PathBuf], main: Pid) -> Vec<(&Path, io::Error)> {
    procs.iter().filter_map(|procs| Some((procs.as_path(), join_one(procs, main).err()?))).collect()
}

/// What a process starts after its own move is born inside.
fn join_one(procs: &Path, main: Pid) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(procs)?;
    let mut left = vec![raw_pid(main)];
    while let Some(pid) = left.pop() {
        match file.write_all(pid.to_string().as_bytes()) {
            Err(error) if error.raw_os_error() != Some(Errno::SRCH.raw_os_error()) => return Err(error),
            _ => left.extend(reaper::children_of(pid)),
        }
    }
    Ok(())
}
