//! An engine without a model: it speaks llama-server's HTTP API, answers with made-up words and misbehaves on request,
//! for demos, tests and fault injection.
//!
//! It is a binary of its own and, through [`run_if_asked`], a hidden subcommand of whatever program hosts it.

#![forbid(unsafe_code)]

mod answer;
mod args;
mod death;
mod engine;
mod faults;
mod generate;
mod handlers;
mod log;
mod reexec;
mod serve;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

/// The subcommand word under which a hosting program runs the stub engine.
pub const SUBCOMMAND: &str = "stub-engine";

/// Runs the stub engine when this program was started as `PROGRAM stub-engine ARGS…`; call it first in `main` and
/// return the code if there is one.
pub fn run_if_asked() -> Option<ExitCode> {
    reexec::is_subcommand().then(|| run(std::env::args_os().skip(2)))
}

/// Runs the stub engine until it is told to stop, or until the fault it was asked for ends it.
///
/// `args` are the flags alone, without a program name. Some faults start the current program again; behind a
/// subcommand word other than [`SUBCOMMAND`] they would not find their way back here.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args = match args::Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Also the way out for --help and --version. If the output is gone there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if let Some(signal) = args.raise {
        return death::by_signal(signal);
    }
    if args.sleep_forever {
        return reexec::sleep_forever();
    }
    if args.daemonize_sleep {
        return reexec::daemonize_sleep();
    }
    serve::serve(args)
}
