//! The stub engine as a program of its own.

use std::process::ExitCode;

fn main() -> ExitCode {
    stub_engine::run_if_asked().unwrap_or_else(|| stub_engine::run(std::env::args_os().skip(1)))
}
