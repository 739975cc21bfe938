//! `cargo xtask clients`: programs of others that tests talk to the daemon with, under `target/clients`.

use crate::error::Result;
use crate::{engine, process};

const PACKAGES: &str = include_str!("../assets/clients.txt");

/// Installs what is missing.
pub(crate) fn run() -> Result<()> {
    let packages: Vec<&str> = PACKAGES.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    engine::install(&process::root().join("target/clients"), "python", &packages)
}
