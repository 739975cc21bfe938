//! The shim's life: start the engine, then one loop over signals, output and the report pipe.

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::access;
use crate::cgroups;
use crate::locks;
use crate::log::EngineLog;
use crate::reaper::{self, Reaped};
use crate::record::{self, ExitRecord, StartRecord};
use crate::report::{Report, Reports};
use crate::secrets;
use crate::shm::SharedMemory;
use crate::signals::Signals;
use crate::slim;
use crate::spawn::{Engine, raw_pid, spawn};
use crate::spec::LaunchSpec;
use crate::sysv::Segments;

/// What an engine gets to stop by itself when the daemon has gone.
const GRACE: Duration = Duration::from_secs(2);
/// Until an engine has said and mapped most of what it says and maps while it starts.
const SETTLED: Duration = Duration::from_secs(2);
/// While killing, how often to look for children that came without a signal.
const KILL_AGAIN: Duration = Duration::from_millis(100);
/// The most output read for the log when the engine has ended: no writer is waited for.
const LAST_OUTPUT: usize = 4 * 1024 * 1024;

/// Runs the shim on the launch spec at this path, until no descendant of the engine is left.
///
/// Call it from a process that has one thread and no children. Reports go to stdout; the exit code is 0 if the
/// engine was started, whatever became of it, and 1 if it was not.
#[must_use]
pub fn run(spec_path: &Path) -> ExitCode {
    if spec_path == Path::new(access::ACCESS) {
        return access::answer();
    }
    let mut reports = Reports::on_stdout();
    let started = LaunchSpec::read(spec_path)
        .map_err(|error| Report::failed("spec", &error))
        .and_then(|spec| Shim::start(spec, &mut reports));
    let failure = match started {
        Ok(mut shim) => {
            shim.supervise(&mut reports);
            shim.failure
        }
        Err(failure) => Some(failure),
    };
    reports.send(failure.as_ref().unwrap_or(&Report::Gone));
    if failure.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Shim {
    spec: LaunchSpec,
    signals: Signals,
    log: EngineLog,
    output: Option<PipeReader>,
    buffer: Box<[u8; 16 * 1024]>,
    /// The engine's main process and group, until it is reaped: then the number may be somebody else's.
    main: Option<Pid>,
    killing: bool,
    kill_at: Option<Instant>,
    /// When it gives back what only the start needed.
    slim_at: Option<Instant>,
    /// Why the engine has to go again though its exec succeeded.
    failure: Option<Report>,
    /// How the main process ended.
    exit: Option<ExitRecord>,
    shared_memory: Option<SharedMemory>,
    segments: Segments,
    _locks: Vec<OwnedFd>,
}

/// What poll found.
struct Ready {
    child: bool,
    terminate: bool,
    kill: bool,
    output: bool,
    parent_gone: bool,
    new_file: bool,
}

impl Shim {
    fn start(mut spec: LaunchSpec, reports: &mut Reports) -> Result<Self, Report> {
        become_parent().map_err(|errno| Report::failed("shim", &errno.into()))?;
        let mut log = EngineLog::open(spec.log.clone(), spec.log_max_bytes, &spec.scrub)
            .map_err(|error| Report::failed("log", &error))?;
        let locks = locks::take(&spec).map_err(|error| Report::failed("lock", &error))?;
        // Before the engine: a signal that comes while it starts is acted on once it has.
        let signals = Signals::install().map_err(|error| Report::failed("signals", &error))?;
        let uid = spec.run_as.as_ref().map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid);
        // Where there is none, none is left.
        let shared_memory = spec.shm_dir.as_deref().and_then(|dir| SharedMemory::watch(dir, uid).ok());
        let segments = Segments::watch(uid);
        let Engine { pid, output } = spawn(&spec)?;
        // None is needed again, and all may hold secrets.
        spec.env = Vec::new();
        spec.scrub = Vec::new();
        spec.secrets.iter_mut().for_each(|secret| secret.value = String::new());

        let recorded = StartRecord::of(&spec, raw_pid(pid)).and_then(|start| {
            record::write(&spec.start_record, &start)?;
            spec.start_record_copy.as_ref().map_or(Ok(()), |copy| record::write(copy, &start))?;
            Ok(start)
        });
        let failure = match recorded {
            Ok(StartRecord { pid, start_time, .. }) => {
                reports.send(&Report::Started { pid, start_time });
                None
            }
            Err(error) => Some(Report::failed("start_record", &error)),
        };
        if failure.is_none() {
            for (procs, error) in cgroups::join(&spec.later_cgroup_procs, pid) {
                log.note(&format!("the engine could not be moved by {}: {error}", procs.display()));
            }
        }
        Ok(Self {
            spec,
            signals,
            log,
            output: Some(output),
            buffer: Box::new([0; 16 * 1024]),
            main: Some(pid),
            killing: failure.is_some(),
            kill_at: None,
            slim_at: None,
            failure,
            exit: None,
            shared_memory,
            segments,
            _locks: locks,
        })
    }

    /// Returns when no descendant is left and the log is complete.
    fn supervise(&mut self, reports: &mut Reports) {
        self.slim_at = Some(Instant::now() + SETTLED);
        loop {
            if self.killing {
                self.kill_everything();
            }
            let ready = self.wait(reports);
            if ready.new_file {
                self.signals.new_file_wakes.clear();
            }
            // Before anybody is ended, or waited for.
            if ready.child || ready.terminate || ready.kill || ready.parent_gone {
                self.segments.look();
            }
            self.segments.look_at_times();
            // Before the output is read: what came before it has been looked at when it stands in the log.
            if self.signals.new_file.swap(false, Ordering::Relaxed)
                && let Some(shared_memory) = &mut self.shared_memory
            {
                shared_memory.look();
            }
            if ready.output {
                self.pump(self.buffer.len());
            }
            if ready.terminate {
                self.signals.terminate.clear();
                self.terminate();
            }
            if ready.parent_gone {
                reports.close();
                if self.spec.stop_when_parent_gone {
                    self.terminate();
                    self.kill_at = Some(Instant::now() + GRACE);
                }
            }
            if ready.kill {
                self.signals.kill.clear();
                self.killing = true;
            }
            if self.kill_at.is_some_and(|at| at <= Instant::now()) {
                self.kill_at = None;
                self.killing = true;
            }
            if self.slim_at.is_some_and(|at| at <= Instant::now()) {
                self.slim_at = None;
                slim::drop_code();
            }
            if ready.child {
                self.signals.child.clear();
            }
            if (ready.child || self.killing) && self.reap(reports) {
                break;
            }
        }
        self.pump(LAST_OUTPUT);
        secrets::remove(&self.spec);
        match self.shared_memory.as_mut().map_or(0, SharedMemory::sweep) {
            0 => {}
            count => self.log.note(&format!("removed {count} file(s) of shared memory that the engine left")),
        }
        match self.segments.sweep() {
            0 => {}
            count => self.log.note(&format!("removed {count} System V segment(s) that the engine left")),
        }
        if let Some(exit) = &mut self.exit {
            // For a daemon that comes later: nobody else can tell it that nothing is left.
            exit.gone = true;
            if let Err(error) = record::write(&self.spec.exit_record, exit) {
                self.log.note(&format!("the exit record could not be completed: {error}"));
            }
        }
        self.log.finish();
    }

    fn wait(&self, reports: &Reports) -> Ready {
        let again = self.killing.then_some(KILL_AGAIN);
        let grace = self.kill_at.map(|at| at.saturating_duration_since(Instant::now()));
        let slim = self.slim_at.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = again.or(grace.into_iter().chain(slim).min()).and_then(|wait| Timespec::try_from(wait).ok());

        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.child.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.terminate.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.kill.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.new_file_wakes.fd(), PollFlags::IN),
        ];
        let output = watch(&mut fds, self.output.as_ref().map(AsFd::as_fd), PollFlags::IN);
        // Without a wish for anything: poll tells of an error (no reader) unasked.
        let parent = watch(&mut fds, reports.fd(), PollFlags::empty());

        let polled = poll(&mut fds, timeout.as_ref());
        let ready = |at: usize| polled.is_ok() && !fds[at].revents().is_empty();
        Ready {
            child: ready(0),
            terminate: ready(1),
            kill: ready(2),
            output: output.is_some_and(ready),
            parent_gone: parent.is_some_and(ready),
            new_file: ready(3),
        }
    }

    /// Moves output to the log: at most about this much, and only what is there.
    fn pump(&mut self, at_most: usize) {
        let mut moved = 0;
        while moved < at_most {
            let Some(output) = &mut self.output else { return };
            match output.read(&mut self.buffer[..]) {
                Ok(0) => self.output = None,
                Ok(count) => {
                    self.log.push(&self.buffer[..count]);
                    moved += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_broken) => self.output = None,
            }
        }
    }

    fn terminate(&self) {
        for signal in [Signal::TERM, Signal::CONT] {
            match self.main {
                Some(group) => {
                    let _ended = rustix::process::kill_process_group(group, signal);
                }
                None => reaper::signal_children(signal),
            }
        }
    }

    /// Kills what can be named now: the group and every direct child. What they leave behind becomes a direct child
    /// when they end, and is killed in the next round.
    fn kill_everything(&self) {
        if let Some(group) = self.main {
            let _ended = rustix::process::kill_process_group(group, Signal::KILL);
        }
        reaper::signal_children(Signal::KILL);
    }

    /// Waits for all that have ended. True if no descendant is left.
    fn reap(&mut self, reports: &mut Reports) -> bool {
        loop {
            match reaper::reap_one() {
                Reaped::Child(pid, status) if self.main == Some(pid) => self.main_ended(status, reports),
                Reaped::Child(..) => {}
                Reaped::NoneEnded => return false,
                Reaped::NoneLeft => return true,
            }
        }
    }

    fn main_ended(&mut self, status: WaitStatus, reports: &mut Reports) {
        self.main = None;
        if self.failure.is_some() {
            return;
        }
        let (code, signal) = (status.exit_status(), status.terminating_signal());
        let exit = ExitRecord::now(&self.spec.nonce, code, signal);
        if let Err(error) = record::write(&self.spec.exit_record, &exit) {
            self.log.note(&format!("the exit record could not be written: {error}"));
        }
        self.exit = Some(exit);
        // Its last words, so that who reads the report finds them in the log. It does not wait for any.
        self.pump(LAST_OUTPUT);
        reports.send(&Report::Exited { code, signal });
    }
}

/// Adds what is open to the watch list and says where it stands there.
fn watch<'fd>(fds: &mut Vec<PollFd<'fd>>, fd: Option<BorrowedFd<'fd>>, wish: PollFlags) -> Option<usize> {
    fds.push(PollFd::from_borrowed_fd(fd?, wish));
    Some(fds.len() - 1)
}

/// A session of its own, orphans come to it, and its files are nobody else's (the engine's too).
fn become_parent() -> Result<(), Errno> {
    match rustix::process::setsid() {
        // It leads a group already: that group is its own.
        Ok(_) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    Ok(())
}
