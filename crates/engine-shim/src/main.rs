//! `engine-shim [engine-shim] <launch spec>`: see the library.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    engine_shim::run_if_asked()
        .unwrap_or_else(|| engine_shim::run(Path::new(&std::env::args_os().nth(1).unwrap_or_default())))
}
