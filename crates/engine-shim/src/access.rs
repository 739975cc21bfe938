//! What a user may do with files, found out by becoming that user: the kernel knows about lists, mounts and whatever else
//! decides, and no rule is written down here a second time.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::Access as Mode;
use serde::{Deserialize, Serialize};

use crate::user::{Change, User};

/// Given in place of a launch spec's path, makes the shim answer an [`AccessQuestion`] from stdin, and end.
pub const ACCESS: &str = "--access";

/// What is wanted of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// To read it: a file, or what a directory lists.
    Read,
    /// To run it.
    Execute,
    /// To work in it: a directory.
    Work,
}

/// Asks whether a user can do all of this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessQuestion {
    /// Who.
    pub user: User,
    /// Absolute paths.
    pub wanted: Vec<(PathBuf, Access)>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccessAnswer {
    /// For each path the first thing that stands in the way: a directory above it, or the path itself.
    Barriers(Vec<Option<PathBuf>>),
    /// The question could not be put.
    Failed(String),
}

pub(crate) fn answer() -> ExitCode {
    let mut text = Vec::new();
    let question = io::stdin().read_to_end(&mut text).and_then(|_| Ok(serde_json::from_slice(&text)?));
    let answer = question.and_then(|question: AccessQuestion| {
        Change::to(&question.user).make()?;
        Ok(question.wanted.iter().map(|(path, access)| barrier(path, *access)).collect())
    });
    let answer = match answer {
        Ok(barriers) => AccessAnswer::Barriers(barriers),
        Err(error) => AccessAnswer::Failed(error.to_string()),
    };
    let written = serde_json::to_vec(&answer).map_err(io::Error::from).and_then(|text| io::stdout().write_all(&text));
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// From the root down, so that the first one is named.
fn barrier(path: &Path, access: Access) -> Option<PathBuf> {
    let above: Vec<&Path> = path.ancestors().skip(1).collect();
    let closed = above.into_iter().rev().find(|dir| rustix::fs::access(*dir, Mode::EXEC_OK).is_err());
    let mode = match access {
        Access::Read if path.is_dir() => Mode::READ_OK | Mode::EXEC_OK,
        Access::Read => Mode::READ_OK,
        Access::Execute => Mode::EXEC_OK,
        Access::Work => Mode::READ_OK | Mode::WRITE_OK | Mode::EXEC_OK,
    };
    closed.or_else(|| rustix::fs::access(path, mode).is_err().then_some(path)).map(Path::to_owned)
}
