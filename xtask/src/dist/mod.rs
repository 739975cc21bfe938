//! `cargo xtask dist`: a Debian package and a tarball of a release build, with the licences of everything inside.
//!
//! Nothing of the machine or of the moment is in them: paths are cut off, times are `SOURCE_DATE_EPOCH` (by default the
//! commit's), so that the same commit and compiler give the same bytes.

mod deb;
mod licences;
mod stage;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{self, Error, Result};
use crate::process;

/// What is packaged, and where it goes.
#[derive(Debug)]
struct Release {
    /// Version of the workspace.
    version: String,
    /// What stands in for the version of the Debian package.
    deb_version: String,
    /// Seconds since 1970 that every file is dated with.
    epoch: u64,
    /// The program.
    program: PathBuf,
    /// Where results go.
    out: PathBuf,
}

/// Builds and packages. `deb_version` instead of the workspace's version; with `program` nothing is built.
pub(crate) fn run(deb_version: Option<&str>, program: Option<&Path>) -> Result<()> {
    let version = version()?;
    let epoch = epoch()?;
    let out = process::root().join("target/dist");
    fs::create_dir_all(&out).map_err(error::io(&out))?;
    let program = match program {
        Some(program) => program.to_owned(),
        None => build(&version, epoch, &out)?,
    };
    let deb_version = deb_version.unwrap_or(&version).to_owned();
    let release = Release { version, deb_version, epoch, program, out };
    let licences = licences::report()?;
    let made = [deb::build(&release, &licences)?, stage::tarball(&release, &licences)?];
    for file in &made {
        let sum = process::output(Command::new("sha256sum").current_dir(&release.out).arg(name(file)))?;
        let to = release.out.join(format!("{}.sha256", name(file)));
        fs::write(&to, &sum).map_err(error::io(&to))?;
        println!("dist: target/dist/{}", sum.split_whitespace().rev().collect::<Vec<_>>().join("  sha256 "));
    }
    Ok(())
}

/// Installs, upgrades and purges the package of the last build in a clean root. Builds first where there was none.
pub(crate) fn try_package() -> Result<()> {
    let out = process::root().join("target/dist");
    let version = version()?;
    let deb = |version: &str| out.join(format!("pool-managerd_{version}_{}.deb", deb::architecture()));
    // What is upgraded from: the same program as another file under a lower version.
    let before = format!("{version}~before");
    let program = out.join("build/release/pool-managerd");
    run(None, program.is_file().then_some(program.as_path()))?;
    run(Some(&before), Some(&program))?;
    let mut script = Command::new("bash");
    script.current_dir(process::root()).arg("xtask/assets/try-package.sh").arg(deb(&before)).arg(deb(&version));
    process::run(&mut script)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn version() -> Result<String> {
    let id = process::output(&mut process::cargo(["pkgid", "--package", "pool-managerd"]))?;
    id.trim()
        .rsplit(['#', '@'])
        .next()
        .map(ToOwned::to_owned)
        .ok_or_else(|| Error::Check(format!("no version in {id}")))
}

fn git(args: &[&str]) -> Result<String> {
    process::output(Command::new("git").current_dir(process::root()).args(args)).map(|text| text.trim().to_owned())
}

/// The time that everything is dated with.
fn epoch() -> Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => git(&["log", "-1", "--format=%ct"])?,
    };
    text.parse().map_err(|_| Error::Check(format!("SOURCE_DATE_EPOCH is no number of seconds: {text}")))
}

/// The daemon as it ships, in a target directory of its own: other flags would make other builds begin anew.
fn build(version: &str, epoch: u64, out: &Path) -> Result<PathBuf> {
    let commit = match env::var("POOL_MANAGERD_COMMIT") {
        Ok(commit) => commit,
        Err(_) => {
            let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
            git(&["rev-parse", "--short=12", "HEAD"])? + if changed { "+changes" } else { "" }
        }
    };
    let date = process::output(Command::new("date").args(["--utc", "--date", &format!("@{epoch}"), "+%Y-%m-%d"]))?;
    let target = out.join("build");
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"))).unwrap_or_default();
    let flags = [
        format!("--remap-path-prefix={}=/cargo", home.display()),
        format!("--remap-path-prefix={}=/source", process::root().display()),
    ];
    let mut cargo = process::cargo(["build", "--release", "--locked", "--package", "pool-managerd", "--bins"]);
    cargo.arg("--target-dir").arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}")).env("SOURCE_DATE_EPOCH", epoch.to_string());
    cargo.env("POOL_MANAGERD_BUILD", format!("{version} (commit {commit}, {})", date.trim()));
    process::run(&mut cargo)?;
    let program = target.join("release/pool-managerd");
    says_its_commit(&program, &commit)?;
    Ok(program)
}

/// The program says which commit it is of.
fn says_its_commit(program: &Path, commit: &str) -> Result<()> {
    let told = process::output(Command::new(program).arg("--version"))?;
    if told.contains(commit) { Ok(()) } else { Err(Error::Check(format!("the program says it is {told}"))) }
}
