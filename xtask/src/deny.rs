//! `cargo xtask deny`: bans, licences and sources, offline. Advisories need a database that CI does not have.

use std::process::Command;

use crate::error::Result;
use crate::process;

const CARGO_DENY: &str = "0.20.2";

/// Runs the checks of deny.toml.
pub(crate) fn run() -> Result<()> {
    let deny = process::tool("cargo-deny", CARGO_DENY)?;
    process::run(&mut process::cargo(["fetch", "--quiet", "--locked"]))?;
    let mut check = Command::new(deny);
    check.current_dir(process::root()).args(["--offline", "check", "bans", "licenses", "sources"]);
    process::run(&mut check)
}
