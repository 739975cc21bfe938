//! Files that are replaced whole or not at all.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use fault_points::{Point, reached};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

const TEMPORARY: &str = ".new-";
/// The member that vouches for all others of a record.
const CHECKSUM: &str = "checksum";

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

/// The same for a record of our own, with a checksum in it.
pub(crate) fn write_record(dir: &Path, name: &str, record: &impl Serialize) -> io::Result<()> {
    let mut value = serde_json::to_value(record)?;
    let sum = checksum(&value);
    if let Value::Object(members) = &mut value {
        members.insert(CHECKSUM.to_owned(), sum.into());
    }
    write_json(dir, name, &value)
}

/// Takes the checksum out of a record that was read, and says whether it is right. Records of before there were any have
/// none.
pub(crate) fn verified(mut value: Value) -> io::Result<Value> {
    let sum = value.as_object_mut().and_then(|members| members.remove(CHECKSUM));
    if sum.is_none_or(|sum| sum == checksum(&value)) {
        Ok(value)
    } else {
        Err(io::Error::new(ErrorKind::InvalidData, "its checksum is wrong"))
    }
}

/// Of the members in the order of their names, whatever the order and the blanks in the file.
fn checksum(value: &Value) -> String {
    Sha256::digest(value.to_string()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
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
