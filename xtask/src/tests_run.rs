//! `cargo xtask test`: a real engine at hand, then every test.

use std::process::Command;

use crate::error::Result;
use crate::{engine, process};

/// The cargo-nextest that CI uses.
pub(crate) const NEXTEST: &str = "0.9.143";

/// `cargo-nextest nextest …`, installed when missing.
pub(crate) fn nextest() -> Result<Command> {
    let mut command = Command::new(process::tool("cargo-nextest", NEXTEST)?);
    command.current_dir(process::root()).arg("nextest");
    Ok(command)
}

/// Runs all tests; `args` go to nextest.
pub(crate) fn run(args: &[String]) -> Result<()> {
    engine::run(false)?;
    process::run(&mut process::cargo(["build", "--package", "pool-managerd", "--bins"]))?;
    process::run(nextest()?.args(["run", "--workspace"]).args(args))?;
    process::run(&mut process::cargo(["test", "--doc", "--workspace"]))
}
