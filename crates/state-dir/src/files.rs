//! Files that are replaced whole or not at all.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub(crate) use durable_files::{is_leftover, remove, replace};

/// Writes a value as JSON so that it is there, whole, after a power cut.
pub(crate) fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    replace(dir, name, &bytes)
}

/// Where the checksum of a sealed value stands in it.
const SEAL: &str = "sha256";

/// The two files of one value: the second is written after the first, so that a whole one is always there.
pub(crate) fn both(name: &str) -> [String; 2] {
    [name.to_owned(), format!("{name}.copy")]
}

/// A value with its checksum.
pub(crate) fn sealed(value: &impl Serialize) -> io::Result<Value> {
    let mut value = serde_json::to_value(value)?;
    let sum = checksum(&value)?;
    value[SEAL] = sum.into();
    Ok(value)
}

/// Writes a value, with its checksum, durably into both of its files. Unless it is there twice it does not count.
pub(crate) fn write_sealed(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let value = sealed(value)?;
    both(name).iter().try_for_each(|name| write_json(dir, name, &value))
}

/// Reads one file of a sealed value; `None` where there is none. One without a checksum is as it was written before there
/// were any, and believed only if `must` does not say otherwise.
pub(crate) fn read_sealed(path: &Path, must: bool) -> io::Result<Option<Value>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let invalid = |why: &str| io::Error::new(ErrorKind::InvalidData, why.to_owned());
    let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| invalid(&e.to_string()))?;
    let seal = value.as_object_mut().ok_or_else(|| invalid("it is no record"))?.remove(SEAL);
    match seal {
        Some(seal) if seal == checksum(&value)?.as_str() => Ok(Some(value)),
        None if !must => Ok(Some(value)),
        Some(_) | None => Err(invalid("its checksum is not that of its content")),
    }
}

/// Of a value as serde_json writes it: keys in order, no blanks.
fn checksum(value: &Value) -> io::Result<String> {
    let sum = Sha256::digest(serde_json::to_vec(value)?);
    Ok(sum.iter().map(|byte| format!("{byte:02x}")).collect())
}
