//! An engine below its shim.

use std::fs;
use std::future::pending;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use engine_shim::Report;
use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass};
use pool_services::ports::{Listener, RunningEngine};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::io::{BufReader, Interest, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::adopt::ExitFile;
use crate::cgroup::Cgroup;
use crate::log_patterns;
use crate::memory_cgroup::MemoryCgroup;
use crate::tree::{self, Root};

/// The shim's reports.
pub(crate) type Reports = Lines<BufReader<ChildStdout>>;

const SIGKILL: i32 = 9;
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What is known of a shim and of the engine below it.
#[derive(Debug)]
pub(crate) struct Launched {
    /// The shim, unless it is gone. The descriptor cannot mean another process: the shim is our child, or was found to be
    /// the right one after it was pinned.
    pub(crate) shim: Option<OwnedFd>,
    /// The shim, as the root of the engine's processes.
    pub(crate) root: Option<Root>,
    /// The engine's main process, unless it is gone.
    pub(crate) main: Option<u32>,
    pub(crate) kind: String,
    pub(crate) log: PathBuf,
    pub(crate) cgroup: Option<Cgroup>,
    /// Where version 1 counts its memory.
    pub(crate) memory: Option<MemoryCgroup>,
}

/// A launched engine.
#[derive(Debug)]
pub(crate) struct ShimEngine(Arc<State>);

#[derive(Debug)]
struct State {
    launched: Launched,
    exited: watch::Sender<Option<Failure>>,
    gone: watch::Sender<bool>,
}

impl ShimEngine {
    /// Takes over a shim that has reported the start.
    pub(crate) fn supervise(launched: Launched, shim: Child, reports: Reports) -> Self {
        let state = Arc::new(State { launched, exited: watch::Sender::new(None), gone: watch::Sender::new(false) });
        tokio::spawn(Arc::clone(&state).follow(shim, reports));
        Self(state)
    }

    /// Takes over what an earlier daemon launched; `main` pins its main process, unless that is gone.
    pub(crate) fn found(launched: Launched, main: Option<OwnedFd>, exit: ExitFile) -> Self {
        let state = Arc::new(State { launched, exited: watch::Sender::new(None), gone: watch::Sender::new(false) });
        tokio::spawn(Arc::clone(&state).follow_found(main, exit));
        Self(state)
    }

    /// Something that is not taken over, with what may be used to end it.
    pub(crate) fn remains(shim: Option<OwnedFd>, cgroup: Option<Cgroup>) -> Self {
        let launched =
            Launched { shim, root: None, main: None, kind: String::new(), log: PathBuf::new(), cgroup, memory: None };
        let state = Arc::new(State { launched, exited: watch::Sender::new(None), gone: watch::Sender::new(false) });
        tokio::spawn(Arc::clone(&state).follow_remains());
        Self(state)
    }
}

impl State {
    /// Turns reports into facts, until nothing is left.
    async fn follow(self: Arc<Self>, mut shim: Child, mut reports: Reports) {
        let mut gone = false;
        while let Ok(Some(line)) = reports.next_line().await {
            match serde_json::from_str(&line) {
                Ok(Report::Exited { code, signal }) => {
                    let exit = code.map(Exit::Code).or(signal.map(Exit::Signal)).unwrap_or(Exit::Unknown);
                    let failure = self.classify(exit).await;
                    self.exited.send_replace(Some(failure));
                }
                Ok(Report::Gone) => gone = true,
                unexpected => tracing::warn!(?unexpected, "the shim reports out of turn"),
            }
        }
        // Also takes it off the process table.
        if let Err(error) = shim.wait().await {
            tracing::warn!(%error, "the shim cannot be waited for");
        }
        // A shim that is gone takes the main process with it, by PDEATHSIG.
        let unseen = self.exited.borrow().is_none();
        if unseen {
            self.exited.send_replace(Some(Failure::crash(Exit::Unknown)));
        }
        self.prove_gone(gone).await;
    }

    /// The same for an engine of which no reports come: its exit and its end are on record.
    async fn follow_found(self: Arc<Self>, main: Option<OwnedFd>, record: ExitFile) {
        if let Some(main) = main {
            ended(&main).await;
        }
        // The shim writes it down after the end.
        let exit = loop {
            let (exit, Some(shim)) = (record.read(), &self.launched.shim) else { break record.read() };
            if exit.is_some() {
                break exit;
            }
            if timeout(LOOK_AGAIN, ended(shim)).await.is_ok() {
                break record.read();
            }
        };
        let failure = match exit.map(|exit| (exit.code, exit.signal)) {
            Some((code, signal)) => {
                self.classify(code.map(Exit::Code).or(signal.map(Exit::Signal)).unwrap_or(Exit::Unknown)).await
            }
            None => Failure::crash(Exit::Unknown),
        };
        self.exited.send_replace(Some(failure));
        if let Some(shim) = &self.launched.shim {
            ended(shim).await;
        }
        self.prove_gone(record.read().is_some_and(|exit| exit.gone)).await;
    }

    /// For what is only to be ended. Without a cgroup nothing proves that it has.
    async fn follow_remains(self: Arc<Self>) {
        let Some(cgroup) = &self.launched.cgroup else { return };
        if let Some(shim) = &self.launched.shim {
            ended(shim).await;
        }
        cgroup.emptied().await;
        cgroup.remove();
        self.gone.send_replace(true);
    }

    /// `gone`: the shim said that no descendant was left.
    async fn prove_gone(&self, gone: bool) {
        match &self.launched.cgroup {
            Some(cgroup) => {
                if !gone {
                    tracing::warn!("a shim ended before its engine was gone: ending the engine by its cgroup");
                    cgroup.kill();
                }
                cgroup.emptied().await;
                cgroup.remove();
            }
            None if gone => {}
            None => {
                tracing::error!("a shim ended before its engine was gone, and there is no cgroup to prove it by");
                return;
            }
        }
        if let Some(memory) = &self.launched.memory {
            memory.remove();
        }
        self.gone.send_replace(true);
    }

    async fn classify(self: &Arc<Self>, exit: Exit) -> Failure {
        let oom = self.launched.cgroup.as_ref().is_some_and(Cgroup::oom_killed)
            || self.launched.memory.as_ref().is_some_and(MemoryCgroup::oom_killed);
        if oom && exit == Exit::Signal(SIGKILL) {
            return Failure::new(FailureClass::HostOom, "the kernel ended the engine for memory of the host");
        }
        let state = Arc::clone(self);
        let look = move || log_patterns::classify(&state.launched.kind, &state.launched.log, exit);
        let failure = tokio::task::spawn_blocking(look).await.unwrap_or_else(|_| Failure::crash(exit));
        match failure.class {
            // One of its processes was ended, and its main process gave up.
            FailureClass::Crash(_) if oom => {
                let detail = format!("the kernel ended a part of it for memory of the host; {}", failure.detail);
                Failure::new(FailureClass::HostOom, detail)
            }
            _ => failure,
        }
    }

    fn signal(&self, signal: i32) {
        let Some(signal) = Signal::from_named_raw(signal) else { return };
        let Some(shim) = &self.launched.shim else { return };
        match pidfd_send_signal(shim, signal) {
            // Nobody is left to be told.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => tracing::warn!(%error, ?signal, "the shim cannot be signalled"),
        }
    }

    fn pids(&self) -> Vec<u32> {
        if *self.gone.borrow() {
            return Vec::new();
        }
        let stats = self.launched.root.map(Root::descendants).unwrap_or_default();
        let mut pids: Vec<u32> = stats.iter().filter_map(|stat| u32::try_from(stat.pid).ok()).collect();
        pids.extend(self.launched.cgroup.iter().flat_map(Cgroup::pids));
        pids.sort_unstable();
        pids.dedup();
        pids
    }
}

#[async_trait]
impl RunningEngine for ShimEngine {
    fn pid(&self) -> Option<u32> {
        self.0.launched.main
    }

    fn pids(&self) -> Vec<u32> {
        self.0.pids()
    }

    async fn exited(&self) -> Failure {
        let mut exited = self.0.exited.subscribe();
        let failure = exited.wait_for(Option::is_some).await.ok().and_then(|failure| failure.clone());
        match failure {
            Some(failure) => failure,
            None => pending().await,
        }
    }

    async fn gone(&self) {
        let mut gone = self.0.gone.subscribe();
        let resolved = gone.wait_for(|gone| *gone).await.is_ok();
        if !resolved {
            pending::<()>().await;
        }
    }

    fn terminate(&self) {
        self.0.signal(engine_shim::TERMINATE);
    }

    fn kill(&self) {
        self.0.signal(engine_shim::KILL);
        if let Some(cgroup) = self.0.launched.cgroup.as_ref().filter(|_| !*self.0.gone.borrow()) {
            cgroup.kill();
        }
    }

    fn progress(&self) -> u64 {
        let mut progress = DefaultHasher::new();
        if let Ok(log) = fs::metadata(&self.0.launched.log) {
            (log.len(), log.modified().ok()).hash(&mut progress);
        }
        for stat in self.0.launched.root.map(Root::descendants_at_a_glance).unwrap_or_default() {
            // A process that reads a mapped file uses next to no time, but has faults.
            (stat.pid, stat.utime, stat.stime, stat.majflt).hash(&mut progress);
        }
        progress.finish()
    }

    fn listener(&self, addr: SocketAddr) -> Listener {
        let quick = || {
            let stats = self.0.launched.root.map(Root::descendants_at_a_glance).unwrap_or_default();
            stats.iter().map(|stat| stat.pid.cast_unsigned()).collect()
        };
        tree::listener(addr, [&quick, &|| self.0.pids()])
    }

    fn executable(&self) -> Option<String> {
        self.0.launched.main.and_then(engine_shim::executable)
    }
}

/// Returns when a pinned process has ended. Its pid may be in use again by then.
#[expect(
    deprecated,
    reason = "its successor is unsafe for the sake of types without I/O safety; a borrowed descriptor has it"
)]
pub(crate) async fn ended(process: &OwnedFd) {
    // The descriptor becomes readable at the end and stays so.
    match AsyncFd::with_interest(process.as_fd(), Interest::READABLE) {
        Ok(watched) => drop(watched.readable().await),
        Err(error) => {
            tracing::warn!(%error, "the end of a process has to be looked for");
            let has_ended = || {
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)], Some(&now)).is_ok_and(|n| n > 0)
            };
            while !has_ended() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
    }
}
