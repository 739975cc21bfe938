//! The shim and the stub engine in one program, as the daemon has them; for this crate's tests.

use std::process::ExitCode;

fn main() -> ExitCode {
    engine_shim::run_if_asked().or_else(stub_engine::run_if_asked).unwrap_or(ExitCode::from(2))
}
