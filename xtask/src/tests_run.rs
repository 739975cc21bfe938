//! `cargo xtask test`: a real engine at hand, then every test.

use std::fs;
use std::process::Command;

use crate::error::{self, Error, Result};
use crate::{browser, clients, engine, metadata, process};

/// The cargo-nextest that CI uses.
pub(crate) const NEXTEST: &str = "0.9.143";

/// What only a daemon with fault points has in it: the name of a variable that it reads.
const FAULT_POINTS: &[u8] = b"POOL_MANAGERD_FAULT_ORDERS";

/// `cargo-nextest nextest …`, installed when missing.
pub(crate) fn nextest() -> Result<Command> {
    let mut command = Command::new(process::tool("cargo-nextest", NEXTEST)?);
    command.current_dir(process::root()).arg("nextest");
    Ok(command)
}

/// Runs all tests; `args` go to nextest.
pub(crate) fn run(args: &[String]) -> Result<()> {
    engine::run(false)?;
    clients::run()?;
    let pages: &[&str] = if browser::run()? { &[] } else { &["--filterset", "not binary(e2e_dashboard)"] };
    process::run(&mut process::cargo(["build", "--package", "pool-managerd", "--bins"]))?;
    without_fault_points()?;
    // Locks of engines, by the name of each state directory: those of tests are none of this machine's.
    let locks = metadata::load()?.target_directory.join("tmp/runtime");
    fs::create_dir_all(&locks).map_err(error::io(&locks))?;
    process::run(nextest()?.args(["run", "--workspace"]).args(pages).args(args).env("XDG_RUNTIME_DIR", &locks))?;
    process::run(process::cargo(["test", "--doc", "--workspace"]).env("XDG_RUNTIME_DIR", &locks))
}

/// The daemon that was just built has the features that one has which ships.
fn without_fault_points() -> Result<()> {
    let daemon = metadata::load()?.target_directory.join("debug/pool-managerd");
    let program = fs::read(&daemon).map_err(error::io(&daemon))?;
    if program.windows(FAULT_POINTS.len()).any(|part| part == FAULT_POINTS) {
        return Err(Error::Check(format!("{}: built without tests, it has fault points", daemon.display())));
    }
    Ok(())
}
