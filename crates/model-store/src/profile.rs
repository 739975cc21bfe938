//! What a model's header says about the memory it needs, read without its weights.
//!
//! A header comes from strangers, so each count in it is checked against a limit before anything is done with it, sums
//! are checked, and memory is never taken in proportion to a number in the file.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use pool_domain::ModelProfile;
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};

use crate::{file_problem, gguf, regular, safetensors};

/// Why a model's header tells nothing. The text goes after the file's name: "model file `x` {error}".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The file system says no, or it is no regular file.
    #[error("{0}")]
    Unreadable(String),
    /// No format that can be read.
    #[error("is neither a GGUF file nor a folder with `config.json` and safetensors files")]
    UnknownFormat,
    /// The first bytes are not those of a GGUF file.
    #[error("is not a GGUF file")]
    NotGguf,
    /// Numbers are stored high byte first.
    #[error("is a big-endian GGUF file; only little-endian ones can be read")]
    BigEndian,
    /// A version of the format that is too old or too new.
    #[error("is GGUF of version {0}; versions 2 and 3 can be read")]
    Version(u32),
    /// The header or a tensor's data does not fit into the file.
    #[error("is cut short: {what} ends at byte {end} of a file of {length} bytes")]
    CutShort {
        /// What does not fit.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Length of the file.
        length: u64,
    },
    /// A count or size is beyond what any model needs.
    #[error("has {what} of {value}; at most {limit} can be read")]
    TooLarge {
        /// What is counted or measured.
        what: &'static str,
        /// What the file says.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The header contradicts its format.
    #[error("has a malformed header: {0}")]
    Malformed(String),
    /// A name occurs twice.
    #[error("has the {what} `{name}` twice")]
    Duplicate {
        /// `key` or `tensor`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A key that the engines need is absent.
    #[error("does not say `{0}`")]
    Missing(String),
    /// A key has a value that no model can have.
    #[error("says `{key}`, but {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// How the architecture uses memory is not known here.
    #[error("is of architecture `{0}`, whose memory cannot be told from its header")]
    Architecture(String),
    /// One of the files that make up the model.
    #[error("is incomplete or damaged: its part `{part}` {error}")]
    Part {
        /// Name of the file.
        part: String,
        /// What is wrong with it.
        #[source]
        error: Box<ProfileError>,
    },
}

impl ProfileError {
    pub(crate) fn in_part(self, part: String) -> Self {
        Self::Part { part, error: Box::new(self) }
    }

    pub(crate) fn value(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Value { key: key.into(), problem: problem.into() }
    }
}

/// Reads what the header of a model says about memory: of a GGUF file, of all parts of a split GGUF when one of them is
/// named, or of a folder (or its `config.json`) with safetensors files. Blocks on the file system; never waits on a FIFO.
///
/// # Errors
/// What is wrong with the file or one of its parts.
pub fn profile(path: &Path) -> Result<ModelProfile, ProfileError> {
    if path.is_dir() {
        return safetensors::folder(path);
    }
    let name = path.file_name().map(|n| n.to_string_lossy());
    match name.as_deref() {
        Some("config.json") => safetensors::folder(path.parent().unwrap_or_else(|| Path::new("."))),
        Some(n) if n.ends_with(".safetensors") => safetensors::folder(path.parent().unwrap_or_else(|| Path::new("."))),
        _ => gguf::file(path),
    }
}

/// The same for one GGUF file that is at hand as something that can be read, such as bytes in memory.
///
/// # Errors
/// What is wrong with it.
pub fn profile_gguf(reader: impl Read + Seek) -> Result<ModelProfile, ProfileError> {
    gguf::single(reader)
}

/// The same for one safetensors file in memory and its `config.json`.
///
/// # Errors
/// What is wrong with them.
pub fn profile_safetensors(config: &[u8], file: &[u8]) -> Result<ModelProfile, ProfileError> {
    safetensors::single(config, file)
}

/// Opens a regular file; its length comes with it.
pub(crate) fn open(path: &Path) -> Result<(File, u64), ProfileError> {
    let told = |e: &std::io::Error| ProfileError::Unreadable(file_problem(e));
    // A FIFO must not make the opener wait.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(|e| told(&e))?;
    let metadata = file.metadata().map_err(|e| told(&e))?;
    regular(&metadata).map_err(ProfileError::Unreadable)?;
    Ok((file, metadata.len()))
}

/// A small text file as a whole, if it is no longer than the limit.
pub(crate) fn small_file(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>, ProfileError> {
    let (file, length) = open(path)?;
    if length > limit {
        return Err(ProfileError::TooLarge { what, value: length, limit });
    }
    let mut bytes = Vec::new();
    // The file may grow while it is read.
    BufReader::new(file).take(limit).read_to_end(&mut bytes).map_err(|e| ProfileError::Unreadable(file_problem(&e)))?;
    Ok(bytes)
}

/// A digest as it is written: `sha256:` and hexadecimal digits.
pub(crate) fn digest_text(digest: Sha256) -> String {
    digest.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
        text.extend([byte >> 4, byte & 15].into_iter().filter_map(|half| char::from_digit(u32::from(half), 16)));
        text
    })
}

/// Text from a file as it may stand in a message: no control characters, not long.
pub(crate) fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let short: String = text.chars().take(64).collect();
    short.escape_debug().to_string()
}
