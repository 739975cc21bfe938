//! Signals as readable pipes.

use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGIO, SIGPIPE, SIGTERM, SIGUSR1};

/// Sent to the shim (SIGTERM): asks the engine's process group to stop (SIGTERM, then SIGCONT). Once the main
/// process has ended, asks every child the shim has adopted.
pub const TERMINATE: i32 = SIGTERM;

/// Sent to the shim (SIGUSR1): kills the engine and every descendant, however it has detached itself.
pub const KILL: i32 = SIGUSR1;

/// One kind of signal.
pub(crate) struct SignalPipe(PipeReader);

impl SignalPipe {
    fn of(signal: i32) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        signal_hook::low_level::pipe::register(signal, writer)?;
        Ok(Self(reader))
    }

    /// Forgets the signals that have come; call it when the pipe is readable.
    pub(crate) fn clear(&mut self) {
        let _count = self.0.read(&mut [0; 64]);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The signals the shim listens to.
pub(crate) struct Signals {
    pub(crate) child: SignalPipe,
    pub(crate) terminate: SignalPipe,
    pub(crate) kill: SignalPipe,
    /// Wakes who waits for a new file in a watched directory.
    pub(crate) new_file_wakes: SignalPipe,
    /// Whether there is one, already before who waits is woken.
    pub(crate) new_file: Arc<AtomicBool>,
}

impl Signals {
    /// Installs the handlers. Those that are to do nothing get one too, rather than `SIG_IGN`: exec resets a
    /// handler, but the engine would inherit the other.
    pub(crate) fn install() -> io::Result<Self> {
        for signal in [SIGHUP, SIGINT, SIGPIPE] {
            signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
        }
        let new_file = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGIO, Arc::clone(&new_file))?;
        Ok(Self {
            new_file_wakes: SignalPipe::of(SIGIO)?,
            new_file,
            child: SignalPipe::of(SIGCHLD)?,
            terminate: SignalPipe::of(TERMINATE)?,
            kill: SignalPipe::of(KILL)?,
        })
    }
}
