//! `cargo xtask soak`: many seeds of the simulation on all cores, built with optimisation.

use crate::error::Result;
use crate::process;

/// Runs `seeds` seeds from `from` on; fails when one breaks a promise.
pub(crate) fn run(seeds: u64, from: u64) -> Result<()> {
    let built = ["run", "--quiet", "--profile", "soak", "--package", "pool-testkit", "--example", "soak", "--"];
    process::run(process::cargo(built).args([seeds.to_string(), from.to_string()]))
}
