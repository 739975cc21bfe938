//! The shim's children: the engine's main process and, as the shim is a subreaper, every orphan below it.
//!
//! Only direct children that have not been waited for are ever signalled. Nobody else can have their pid.

use std::fs;
use std::io::ErrorKind;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::record::stat_field;
use crate::spawn::raw_pid;

/// How far reaping has come.
pub(crate) enum Reaped {
    /// This child has ended and been waited for.
    Child(Pid, WaitStatus),
    /// Children are left, none of which has ended.
    NoneEnded,
    /// No child is left; since orphans come to the shim, no descendant is.
    NoneLeft,
}

/// Waits for one child that has ended.
pub(crate) fn reap_one() -> Reaped {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => return Reaped::Child(pid, status),
            Ok(None) => return Reaped::NoneEnded,
            Err(Errno::INTR) => {}
            Err(_no_child) => return Reaped::NoneLeft,
        }
    }
}

/// Sends a signal to every direct child.
pub(crate) fn signal_children(signal: Signal) {
    for child in children() {
        let _ended = rustix::process::kill_process(child, signal);
    }
}

/// The direct children, ended ones included. May miss some while others end: ask again after reaping.
fn children() -> Vec<Pid> {
    let shim = rustix::process::getpid();
    match fs::read_to_string(format!("/proc/self/task/{}/children", raw_pid(shim))) {
        Ok(list) => list.split_ascii_whitespace().filter_map(parse_pid).collect(),
        // A kernel built without CONFIG_PROC_CHILDREN.
        Err(error) if error.kind() == ErrorKind::NotFound => scan_for_children(shim),
        Err(_) => Vec::new(),
    }
}

/// Every process below the shim, from parent to child. May miss one that comes or goes meanwhile.
pub(crate) fn descendants() -> Vec<u32> {
    let mut found: Vec<u32> = children().into_iter().map(raw_pid).collect();
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        found.extend(children_of(parent));
        next += 1;
    }
    found
}

/// The children of all threads of a process. Empty where the kernel does not tell (`CONFIG_PROC_CHILDREN`).
pub(crate) fn children_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn scan_for_children(shim: Pid) -> Vec<Pid> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| parse_pid(entry.file_name().to_str()?));
    pids.filter(|&pid| stat_field(raw_pid(pid), 4).is_ok_and(|parent| parent == u64::from(raw_pid(shim)))).collect()
}

fn parse_pid(text: &str) -> Option<Pid> {
    Pid::from_raw(text.parse().ok()?)
}
