//! `cargo xtask browser`: a Chromium that the dashboard's tests drive.

use std::env;
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::process;

/// Says that a machine has none, and that the dashboard's tests are to be left out.
pub(crate) const NONE: &str = "POOL_MANAGERD_NO_BROWSER";
const PROGRAMS: [&str; 2] = ["chromium", "chromedriver"];

fn runs(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Installs it from Debian's packages where it is missing and that can be done. Says whether there is one.
pub(crate) fn run() -> Result<bool> {
    if PROGRAMS.iter().all(|program| runs(program)) {
        return Ok(true);
    }
    if env::var_os(NONE).is_some() {
        eprintln!("warning: {NONE} is set: the tests of the dashboard are left out");
        return Ok(false);
    }
    if !rustix::process::geteuid().is_root() || !runs("apt-get") {
        let how = format!(
            "the dashboard's tests need chromium and chromedriver: install them (Debian: chromium chromium-driver; Fedora: \
             chromium chromedriver; Arch: chromium), or leave these tests out with {NONE}=1"
        );
        return Err(Error::Check(how));
    }
    println!("installing chromium and chromium-driver (once)");
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        process::run(command.args(args).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))
    };
    let install = ["install", "--yes", "--no-install-recommends", "chromium", "chromium-driver"];
    // A list of packages may be missing, or name files that are gone.
    apt(&install).or_else(|_| apt(&["update"]).and_then(|()| apt(&install)))?;
    Ok(true)
}
