//! Starting this same program again, for the faults that need more than one process.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};

use crate::{SUBCOMMAND, log};

/// Whether this program was started with the subcommand word.
pub(crate) fn is_subcommand() -> bool {
    std::env::args_os().nth(1).is_some_and(|word| word == SUBCOMMAND)
}

fn command(args: &[&str]) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    if is_subcommand() {
        command.arg(SUBCOMMAND);
    }
    command.args(args).stdin(Stdio::null());
    Ok(command)
}

/// Starts a process that does nothing until it is killed. It keeps the log pipes open, as a real worker does.
pub(crate) fn spawn_sleeper() -> io::Result<Child> {
    command(&["--sleep-forever"])?.spawn()
}

/// Leaves a sleeper behind in a session of its own, and waits until its parent is gone.
pub(crate) fn spawn_detached() -> io::Result<()> {
    let status = command(&["--daemonize-sleep"])?.status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("the middle process ended with {status}"))) }
}

/// Replaces this process by a fresh image of itself; returns only if that fails.
pub(crate) fn replace_self(args: &[&str]) -> io::Error {
    match command(args) {
        Ok(mut command) => command.exec(),
        Err(error) => error,
    }
}

/// What a sleeper does.
pub(crate) fn sleep_forever() -> ExitCode {
    loop {
        std::thread::park();
    }
}

/// What the middle process of a double fork does.
pub(crate) fn daemonize_sleep() -> ExitCode {
    let started = rustix::process::setsid().map_err(io::Error::from).and_then(|_| spawn_sleeper());
    match started {
        // Not waited for: to be orphaned is what it is there for.
        Ok(sleeper) => {
            log::info(format_args!("detached pid {}", sleeper.id()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            log::error(format_args!("double fork: {error}"));
            ExitCode::FAILURE
        }
    }
}
