//! Finds the engines of earlier daemons.
//!
//! A record is believed only if everything matches: boot, start times, executables, cgroup and nonce, each looked at
//! after the process was pinned by a pidfd. Nothing is ever sent to a bare pid.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine_shim::{ExitRecord, StartRecord};
use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass};
use pool_services::ports::{EngineRecord, NotAdopted};
use procfs::process::Process;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::{Instant, timeout};

use crate::cgroup::Cgroup;
use crate::locks::Locks;
use crate::memory_cgroup::MemoryCgroup;
use crate::running::{Launched, ShimEngine};
use crate::tree::Root;

/// In the environment of every shim: the one thing about a process that nobody else's can have.
pub(crate) const NONCE_ENV: &str = "POOL_MANAGERD_NONCE";

/// How long a shim whose lock is held may take to say what it started.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a shim may take to write down an exit, and one that is killed to be gone.
const SHORTLY: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The files in which a shim tells of one generation.
#[derive(Debug, Clone)]
pub(crate) struct Files {
    pub(crate) start: PathBuf,
    pub(crate) exit: PathBuf,
    pub(crate) log: PathBuf,
}

/// Where the shim writes how one launch ended.
#[derive(Debug)]
pub(crate) struct ExitFile {
    path: PathBuf,
    nonce: String,
}

impl ExitFile {
    pub(crate) fn read(&self) -> Option<ExitRecord> {
        let exit: ExitRecord = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        (exit.nonce == self.nonce).then_some(exit)
    }
}

/// What a pid has turned out to be.
enum Seen {
    /// The very process, pinned.
    Same(OwnedFd),
    /// It has ended, whoever has its pid now.
    Ended,
    /// It is there, and something about it is not as it was.
    Differs(&'static str),
}

/// Looks for the engine of a record.
pub(crate) async fn find(locks: &Locks, files: &Files, record: &EngineRecord) -> Result<ShimEngine, NotAdopted> {
    let key = record.key.to_string();
    let nothing = |what: &str| NotAdopted { why: unknown(what), rest: None };
    let Some(start) = start_record(locks, files, record).await else {
        if locks.replica_held(&key) {
            return Err(refused("it does not say what it started", None, &[], ""));
        }
        return Err(nothing("it was never started"));
    };
    match engine_shim::boot_id() {
        Ok(boot) if boot != start.boot_id => return Err(nothing("the machine was started anew since")),
        Ok(_) => {}
        Err(_) => return Err(refused("this boot has no name", None, &[], "")),
    }
    if start.pid_namespace != engine_shim::pid_namespace() {
        // In another container. With that it ended, or it still holds its lock.
        if locks.replica_held(&key) {
            return Err(refused("it runs in another container", None, &[], ""));
        }
        return Err(nothing("the container it ran in is gone"));
    }
    let own = &start.cgroup_procs;
    if start.nonce != record.nonce {
        return Err(refused("its nonce differs from the recorded one", None, own, &start.nonce));
    }
    let exit = ExitFile { path: files.exit.clone(), nonce: record.nonce.clone() };
    let shim = match shim(&start).await {
        Seen::Same(shim) => Some(shim),
        Seen::Ended => None,
        Seen::Differs(what) => return Err(refused(what, None, own, &start.nonce)),
    };
    let root = shim.as_ref().and_then(|_| Root::known(start.shim_pid, start.shim_start_time));
    let launched = |shim, main| Launched {
        shim,
        root,
        main,
        kind: record.endpoint.kind.clone(),
        log: files.log.clone(),
        memory: MemoryCgroup::own(&start.later_cgroup_procs, &start.nonce),
        cgroup: Cgroup::own(own, &start.nonce),
    };
    let Some(shim) = shim else {
        // The engine ended before, or with it.
        return Ok(ShimEngine::found(launched(None, None), None, exit));
    };
    match main(&start, record) {
        Seen::Same(main) => Ok(ShimEngine::found(launched(Some(shim), Some(start.pid)), Some(main), exit)),
        Seen::Ended if written(&exit, &shim).await => Ok(ShimEngine::found(launched(Some(shim), None), None, exit)),
        Seen::Ended => {
            Err(refused("its main process is gone and its exit is not on record", Some(shim), own, &start.nonce))
        }
        Seen::Differs(what) => Err(refused(what, Some(shim), own, &start.nonce)),
    }
}

/// The start as the shim tells it, once it does: after a launch that nobody saw the end of it may be about to.
async fn start_record(locks: &Locks, files: &Files, record: &EngineRecord) -> Option<StartRecord> {
    let key = record.key.to_string();
    let read = || {
        let copy = || read(&locks.start_record(&key)).filter(|start| start.nonce == record.nonce);
        read(&files.start).or_else(copy)
    };
    let end = Instant::now() + START_TIMEOUT;
    loop {
        // In this order: it tells before it can have let go.
        let over = !locks.replica_held(&key) || Instant::now() > end;
        let start = read();
        if over || start.is_some() {
            return start;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn read(path: &Path) -> Option<StartRecord> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Whether the exit is on record, or is shortly.
async fn written(exit: &ExitFile, shim: &OwnedFd) -> bool {
    let look = async {
        while exit.read().is_none() {
            if timeout(LOOK_AGAIN, crate::running::ended(shim)).await.is_ok() {
                return;
            }
        }
    };
    let _late = timeout(SHORTLY, look).await;
    exit.read().is_some()
}

/// Pins the process that has a pid now, and says whether it is the one that started then.
fn pin(pid: u32, start_time: u64) -> Result<(OwnedFd, Process), Seen> {
    let raw = i32::try_from(pid).map_err(|_| Seen::Ended)?;
    let named = Pid::from_raw(raw).ok_or(Seen::Ended)?;
    let pinned = match pidfd_open(named, PidfdFlags::empty()) {
        Ok(pinned) => pinned,
        Err(Errno::SRCH) => return Err(Seen::Ended),
        Err(_) => return Err(Seen::Differs("it cannot be looked at")),
    };
    let process = Process::new(raw).map_err(|_| Seen::Ended)?;
    let stat = process.stat().map_err(|_| Seen::Ended)?;
    if stat.starttime != start_time || matches!(stat.state, 'Z' | 'X') {
        Err(Seen::Ended)
    } else {
        Ok((pinned, process))
    }
}

async fn shim(start: &StartRecord) -> Seen {
    let (pinned, process) = match pin(start.shim_pid, start.shim_start_time) {
        Ok(pinned) => pinned,
        Err(seen) => return seen,
    };
    let program = engine_shim::executable(start.shim_pid);
    let environment = process.environ().unwrap_or_default();
    let nonce = environment.get(std::ffi::OsStr::new(NONCE_ENV));
    let differs = if program != start.shim_executable {
        "its shim is another program"
    } else if nonce.is_none_or(|nonce| *nonce != *start.nonce) {
        "its shim has another nonce"
    } else {
        return Seen::Same(pinned);
    };
    // One that is on its way out has neither any more, and is there for a while yet.
    let leaves = engine_shim::executable(start.shim_pid).is_none();
    if leaves && timeout(SHORTLY, crate::running::ended(&pinned)).await.is_ok() {
        return Seen::Ended;
    }
    Seen::Differs(differs)
}

fn main(start: &StartRecord, record: &EngineRecord) -> Seen {
    let (pinned, process) = match pin(start.pid, start.start_time) {
        Ok(pinned) => pinned,
        Err(seen) => return seen,
    };
    if process.stat().is_ok_and(|stat| stat.ppid.cast_unsigned() != start.shim_pid) {
        return Seen::Differs("it is no child of its shim");
    }
    let expected = record.executable.as_ref().or(start.executable.as_ref());
    if engine_shim::executable(start.pid).as_ref() != expected {
        // It may have ended while it was looked at.
        return if pin(start.pid, start.start_time).is_err() {
            Seen::Ended
        } else {
            Seen::Differs("it is another program")
        };
    }
    match start.cgroup_procs.first().map(|_| Cgroup::own(&start.cgroup_procs, &start.nonce)) {
        None => {}
        Some(Some(cgroup)) if cgroup.pids().contains(&start.pid) => {}
        Some(_) => return Seen::Differs("it is not in its cgroup"),
    }
    Seen::Same(pinned)
}

/// What is not taken over. The shim only if it is certain; a cgroup only if it bears this launch's name.
fn refused(what: &str, shim: Option<OwnedFd>, cgroup_procs: &[PathBuf], nonce: &str) -> NotAdopted {
    let rest = ShimEngine::remains(shim, Cgroup::own(cgroup_procs, nonce));
    NotAdopted {
        why: unknown(&format!("the engine of an earlier daemon is not what is on record: {what}")),
        rest: Some(Arc::new(rest)),
    }
}

fn unknown(what: &str) -> Failure {
    Failure::new(FailureClass::Crash(Exit::Unknown), what)
}

/// Ends what holds the lock of a replica that no record names. Says whether the lock is free then.
pub(crate) async fn end_holder(locks: &Locks, key: &str) -> bool {
    let Some(start) = read(&locks.start_record(key)) else { return false };
    if engine_shim::boot_id().ok().as_ref() != Some(&start.boot_id)
        || start.pid_namespace != engine_shim::pid_namespace()
    {
        return false;
    }
    tracing::warn!(replica = key, "ending an engine of an earlier daemon that is on no record");
    if let Seen::Same(shim) = shim(&start).await {
        let signal = Signal::from_named_raw(engine_shim::KILL);
        let sent = signal.map_or(Ok(()), |signal| pidfd_send_signal(&shim, signal)).map_err(io::Error::from);
        if let Err(error) = sent {
            tracing::warn!(%error, "its shim cannot be signalled");
        }
    }
    if let Some(cgroup) = Cgroup::own(&start.cgroup_procs, &start.nonce) {
        cgroup.kill();
    }
    let freed = async {
        while locks.replica_held(key) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    timeout(SHORTLY, freed).await.is_ok()
}
