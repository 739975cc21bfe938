//! Running other programs, and the places of this workspace.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// `cargo` in the root of the workspace.
pub(crate) fn cargo<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    command
}

/// `python3 -m …` in the root of the workspace.
pub(crate) fn python<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new("python3");
    command.current_dir(root()).arg("-m").args(args);
    command
}

/// Runs a program with this one's output; an error when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|source| Error::Start { command: show(command), source })?;
    if status.success() { Ok(()) } else { Err(Error::Failed { command: show(command), status }) }
}

/// Runs a program and gives what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output =
        command.stderr(Stdio::inherit()).output().map_err(|source| Error::Start { command: show(command), source })?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Error::Failed { command: show(command), status: output.status })
    }
}

fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args()).map(|word| word.to_string_lossy());
    words.collect::<Vec<_>>().join(" ")
}

/// Where pinned tools are installed.
fn tools() -> PathBuf {
    root().join("target/tools")
}

/// A cargo tool from PATH, else from `target/tools`, else the pinned version installed there.
pub(crate) fn tool(name: &str, version: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found =
        env::split_paths(&path).chain([tools().join("bin")]).map(|dir| dir.join(name)).find(|file| file.is_file());
    if let Some(file) = found {
        return Ok(file);
    }
    println!("installing {name} {version} under target/tools (minutes, once)");
    let tools_dir = tools();
    let mut install = cargo(["install", "--locked", "--version", version, "--root"]);
    // Its own target directory: a running build of the workspace must not wait for it.
    install.arg(&tools_dir).arg(name).env("CARGO_TARGET_DIR", tools_dir.join("build"));
    run(&mut install)?;
    Ok(tools_dir.join("bin").join(name))
}
