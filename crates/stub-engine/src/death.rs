//! Ways to die.

use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

use crate::{log, reexec};

/// A signal that ends a process that does nothing about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeathSignal {
    name: &'static str,
    signal: Signal,
}

/// SIGPIPE is missing: Rust's runtime ignores it from the start.
const SIGNALS: [DeathSignal; 17] = [
    DeathSignal { name: "HUP", signal: Signal::HUP },
    DeathSignal { name: "INT", signal: Signal::INT },
    DeathSignal { name: "QUIT", signal: Signal::QUIT },
    DeathSignal { name: "ILL", signal: Signal::ILL },
    DeathSignal { name: "TRAP", signal: Signal::TRAP },
    DeathSignal { name: "ABRT", signal: Signal::ABORT },
    DeathSignal { name: "BUS", signal: Signal::BUS },
    DeathSignal { name: "FPE", signal: Signal::FPE },
    DeathSignal { name: "KILL", signal: Signal::KILL },
    DeathSignal { name: "USR1", signal: Signal::USR1 },
    DeathSignal { name: "SEGV", signal: Signal::SEGV },
    DeathSignal { name: "USR2", signal: Signal::USR2 },
    DeathSignal { name: "ALRM", signal: Signal::ALARM },
    DeathSignal { name: "TERM", signal: Signal::TERM },
    DeathSignal { name: "XCPU", signal: Signal::XCPU },
    DeathSignal { name: "XFSZ", signal: Signal::XFSZ },
    DeathSignal { name: "SYS", signal: Signal::SYS },
];

impl FromStr for DeathSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        SIGNALS.into_iter().find(|signal| signal.name == name).ok_or_else(|| {
            let names: Vec<_> = SIGNALS.iter().map(|signal| signal.name).collect();
            format!("not a signal to die by; known are {}", names.join(", "))
        })
    }
}

impl fmt::Display for DeathSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// How this process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    Exit(u8),
    Signal(DeathSignal),
}

impl Death {
    /// Ends the process, by returning the code `main` is to return where it is an exit.
    pub(crate) fn die(self) -> ExitCode {
        match self {
            Self::Exit(code) => ExitCode::from(code),
            Self::Signal(signal) => {
                strike(signal);
                // Still alive: the server has a handler for this one. A fresh image of the same process has none.
                let error = reexec::replace_self(&["--raise", signal.name]);
                log::error(format_args!("could not die by SIG{signal}: {error}"));
                ExitCode::FAILURE
            }
        }
    }
}

/// Dies by the signal, in an image that handles none.
pub(crate) fn by_signal(signal: DeathSignal) -> ExitCode {
    strike(signal);
    log::error(format_args!("SIG{signal} is ignored here"));
    ExitCode::FAILURE
}

/// Sends the signal to this process. Twice, since Rust's own handler for SIGSEGV and SIGBUS swallows the first one.
fn strike(signal: DeathSignal) {
    for _ in 0..2 {
        if let Err(error) = kill_process(getpid(), signal.signal) {
            log::error(format_args!("kill: {error}"));
        }
        // The signal may reach another thread first.
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_with_and_without_their_prefix() {
        for text in ["SEGV", "SIGSEGV", "sigsegv"] {
            assert_eq!(text.parse::<DeathSignal>().unwrap().signal, Signal::SEGV);
        }
        assert!("CHLD".parse::<DeathSignal>().unwrap_err().contains("SEGV"));
    }
}
