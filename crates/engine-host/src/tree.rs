//! The processes below a shim, from /proc.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use pool_services::ports::Listener;
use procfs::ProcError;
use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::{FDTarget, Process, Stat, all_processes};

use rustix::fs::{FileType, fstat};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::listening;

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Root {
    pid: i32,
    start_time: u64,
}

impl Root {
    /// Names a process that is known to be alive, or not yet waited for.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        let stat = Process::new(pid).ok()?.stat().ok()?;
        Some(Self { pid, start_time: stat.starttime })
    }

    /// A name that no later process has.
    pub(crate) fn name(self) -> String {
        format!("{}-{}", self.pid, self.start_time)
    }

    /// Names a process whose start time is known.
    pub(crate) fn known(pid: u32, start_time: u64) -> Option<Self> {
        Some(Self { pid: i32::try_from(pid).ok()?, start_time })
    }

    /// What is below it, found quickly: from parent to child, whatever else runs here. While children come and go the
    /// kernel may skip one (proc_pid_task_tid_children(5)).
    pub(crate) fn descendants_at_a_glance(self) -> Vec<Stat> {
        let root = Process::new(self.pid).ok().filter(|p| p.stat().is_ok_and(|s| s.starttime == self.start_time));
        let mut found = Vec::new();
        let mut parents: Vec<Process> = root.into_iter().collect();
        while let Some(parent) = parents.pop() {
            let tasks = parent.tasks().into_iter().flatten().flatten();
            let children = tasks.flat_map(|task| task.children().unwrap_or_default());
            for child in children.filter_map(|pid| Process::new(i32::try_from(pid).ok()?).ok()) {
                found.extend(child.stat());
                parents.push(child);
            }
        }
        found
    }

    /// Everything below it.
    pub(crate) fn descendants(self) -> Vec<Stat> {
        let Ok(processes) = all_processes() else { return Vec::new() };
        let mut children: HashMap<i32, Vec<Stat>> = HashMap::new();
        let mut alive = false;
        for stat in processes.filter_map(|process| process.ok()?.stat().ok()) {
            alive |= stat.pid == self.pid && stat.starttime == self.start_time;
            children.entry(stat.ppid).or_default().push(stat);
        }
        if !alive {
            return Vec::new();
        }
        let mut found = Vec::new();
        let mut parents = vec![self.pid];
        while let Some(parent) = parents.pop() {
            for child in children.remove(&parent).unwrap_or_default() {
                parents.push(child.pid);
                found.push(child);
            }
        }
        found
    }
}

/// Whose socket takes the connections to `addr`. `own` gives pids that are ours: each of its answers is tried, the
/// quick one first.
pub(crate) fn listener(addr: SocketAddr, own: [&dyn Fn() -> Vec<u32>; 2]) -> Listener {
    let mut foreign = listening_at(addr);
    if foreign.is_empty() {
        return Listener::None;
    }
    for pid in own.into_iter().flat_map(|pids| pids()) {
        for inode in sockets(pid) {
            foreign.remove(&inode);
        }
        if foreign.is_empty() {
            return Listener::Own;
        }
    }
    Listener::Foreign
}

/// The inodes of the sockets that a process has open. What another user has open is no file that this one may look at
/// unless it is root; but who may trace a process may have its descriptors.
fn sockets(pid: u32) -> Vec<u64> {
    let Some(process) = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok()) else { return Vec::new() };
    let listed = process.fd().map(|fds| {
        let socket = |fd: procfs::process::FDInfo| match fd.target {
            FDTarget::Socket(inode) => Some(inode),
            _ => None,
        };
        fds.flatten().filter_map(socket).collect()
    });
    match listed {
        Ok(inodes) => inodes,
        Err(ProcError::PermissionDenied(_)) => sockets_by_trace(&process).unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

fn sockets_by_trace(process: &Process) -> Option<Vec<u64>> {
    let pidfd = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    // Its table of descriptors is so long.
    let count = i32::try_from(process.status().ok()?.fdsize).ok()?;
    let inode = |number| {
        let found = fstat(pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()?).ok()?;
        (FileType::from_raw_mode(found.st_mode) == FileType::Socket).then_some(found.st_ino)
    };
    Some((0..count).filter_map(inode).collect())
}

/// The inodes of the sockets that listen there. One bound to the very address wins over one bound to all.
fn listening_at(addr: SocketAddr) -> HashSet<u64> {
    // Where the kernel has no sock_diag, or a filter of system calls forbids it.
    let tables = || {
        let entries = [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten();
        let here = |entry: &TcpNetEntry| entry.state == TcpState::Listen && entry.local_address.port() == addr.port();
        entries.filter(here).map(|entry| (entry.local_address, entry.inode)).collect()
    };
    let entries: Vec<(SocketAddr, u64)> = listening::at_port(addr.port()).unwrap_or_else(|_| tables());
    let inodes = |matches: &dyn Fn(IpAddr) -> bool| -> HashSet<u64> {
        entries.iter().filter(|(at, _)| matches(at.ip().to_canonical())).map(|(_, inode)| *inode).collect()
    };
    let wanted = addr.ip().to_canonical();
    let exact = inodes(&|ip| ip == wanted);
    if exact.is_empty() { inodes(&|ip| ip.is_unspecified()) } else { exact }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_known_by_its_process() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = socket.local_addr().unwrap();
        let (me, nobody) = (|| vec![std::process::id()], Vec::new);
        assert_eq!(listener(addr, [&me, &|| unreachable!("it is known already")]), Listener::Own);
        assert_eq!(listener(addr, [&nobody, &me]), Listener::Own);
        assert_eq!(listener(addr, [&nobody, &nobody]), Listener::Foreign);
        drop(socket);
        assert_eq!(listener(addr, [&nobody, &nobody]), Listener::None);
    }

    #[test]
    fn a_socket_is_found_by_tracing_too() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("600").stdin(std::os::fd::OwnedFd::from(socket)).spawn().unwrap();
        let process = Process::new(child.id().cast_signed()).unwrap();
        let (listed, traced) = (sockets(child.id()), sockets_by_trace(&process).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((listed.len(), &listed), (1, &traced));
    }

    #[test]
    fn another_process_with_the_pid_has_no_descendants_of_ours() {
        let root = Root::of(std::process::id()).unwrap();
        let another = Root { start_time: root.start_time + 1, ..root };
        assert!(another.descendants().is_empty() && another.descendants_at_a_glance().is_empty());
    }

    #[test]
    fn a_child_of_a_child_is_found_both_ways() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 600 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It has its child once it says something.
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let root = Root::of(std::process::id()).unwrap();
        let below =
            |stats: Vec<Stat>| stats.into_iter().filter(|s| s.ppid == shell.id().cast_signed()).collect::<Vec<_>>();
        let (all, quick) = (below(root.descendants()), below(root.descendants_at_a_glance()));
        let pids = |stats: &[Stat]| stats.iter().map(|s| s.pid).collect::<Vec<_>>();
        assert_eq!((all.len(), pids(&all)), (1, pids(&quick)));
        let sleep = rustix::process::Pid::from_raw(all[0].pid).unwrap();
        rustix::process::kill_process(sleep, rustix::process::Signal::KILL).unwrap();
        shell.wait().unwrap();
    }
}
