//! What can go wrong in a task.

use std::io;
use std::path::{Path, PathBuf};

/// The result of a task.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a task failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot run `{command}`: {source}")]
    Start {
        /// The command line.
        command: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed ({status})")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// Cargo's answer was not understood.
    #[error("cargo's answer was not understood: {0}")]
    Json(#[from] serde_json::Error),
    /// A check found something; the findings are printed already.
    #[error("{0}")]
    Check(String),
}

/// Turns an I/O error into one that names the file.
pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// Prints what a check found and fails if that is anything.
pub(crate) fn verdict(check: &str, findings: &[String]) -> Result<()> {
    if findings.is_empty() {
        return Ok(());
    }
    for finding in findings {
        eprintln!("{check}: {finding}");
    }
    Err(Error::Check(format!("{check}: {} finding(s)", findings.len())))
}
