//! Files that are replaced whole or not at all.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use fault_points::{Point, reached};
use serde::Serialize;

const TEMPORARY: &str = ".new-";

/// Whether a file was being written when its writer died.
pub(crate) fn is_leftover(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(TEMPORARY))
}

/// Writes a value as JSON so that it is there, whole, after a power cut.
pub(crate) fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(dir)?;
    file.write_all(&bytes)?;
    file.as_file().sync_all()?;
    reached(Point::BeforeRename);
    file.persist(dir.join(name)).map_err(|e| e.error)?;
    reached(Point::AfterRename);
    sync_dir(dir)
}

/// Removes a file; one that is not there is removed already.
pub(crate) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
