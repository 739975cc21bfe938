//! Files that are replaced whole or not at all, also when the power fails.

#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use fault_points::{Point, reached};

const TEMPORARY: &str = ".new-";

/// Whether a file was being written when its writer died.
#[must_use]
pub fn is_leftover(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(TEMPORARY))
}

/// Puts a file of this content in place of one of that name.
///
/// # Errors
/// When it could not be written; the old one stands then, unless only the directory could not be synced.
pub fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    reached(Point::BeforeRename);
    file.persist(dir.join(name)).map_err(|e| e.error)?;
    reached(Point::AfterRename);
    sync_dir(dir)
}

/// Removes a file; one that is not there is removed already.
///
/// # Errors
/// When it is still there, or may be again after a power cut.
pub fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    sync_dir(dir)
}

/// Makes what was renamed, made or removed in a directory last.
///
/// # Errors
/// When the directory cannot be synced.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
