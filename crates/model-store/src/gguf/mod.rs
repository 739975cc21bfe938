//! GGUF files.

mod header;
mod layers;
mod limits;
mod model;
mod source;
mod tensors;
mod types;
mod window;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use pool_domain::ModelProfile;
use sha2::Sha256;

use self::header::{Keys, Value};
use self::source::Source;
use self::tensors::Tensors;
use crate::profile::{digest_text, open, shown};
use crate::{ProfileError, file_problem};

/// A file, and the other parts if it is one of several.
pub(crate) fn file(path: &Path) -> Result<ModelProfile, ProfileError> {
    let (file, length) = open(path)?;
    let mut parts = Parts::default();
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(split) = Split::of(&name) else {
        let keys = parts.read(file, length)?;
        return match keys.number(SPLIT_COUNT)? {
            Some(n) if n > 1 => Err(ProfileError::value(
                SPLIT_COUNT,
                format!(
                    "a file of that name cannot be found to be one of the {n} parts; it has to end in `-00001-of-{n:05}.gguf`"
                ),
            )),
            _ => parts.profile(&keys),
        };
    };
    if split.number == 1 {
        let keys = parts.read(file, length)?;
        return split.rest(path, parts, &keys);
    }
    drop(file);
    let first = split.name(1);
    let keys = open(&path.with_file_name(&first))
        .and_then(|(file, length)| parts.read(file, length))
        .map_err(|e| e.in_part(shown(first.as_bytes())))?;
    split.rest(path, parts, &keys)
}

/// One file from something that can be read.
pub(crate) fn single(mut reader: impl Read + Seek) -> Result<ModelProfile, ProfileError> {
    let told = |e: std::io::Error| ProfileError::Unreadable(file_problem(&e));
    let length = reader.seek(SeekFrom::End(0)).map_err(told)?;
    reader.seek(SeekFrom::Start(0)).map_err(told)?;
    let mut parts = Parts::default();
    let keys = parts.read(reader, length)?;
    parts.profile(&keys)
}

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NUMBER: &str = "split.no";

/// What has been read of a model's parts.
#[derive(Default)]
struct Parts {
    tensors: Tensors,
    read: u64,
    digest: Sha256,
}

impl Parts {
    fn read(&mut self, reader: impl Read + Seek, length: u64) -> Result<Keys, ProfileError> {
        let mut source = Source::new(reader, length, self.read, std::mem::take(&mut self.digest));
        let keys = header::read(&mut source, &mut self.tensors)?;
        (self.read, self.digest) = source.finish();
        Ok(keys)
    }

    fn profile(self, keys: &Keys) -> Result<ModelProfile, ProfileError> {
        model::profile(keys, &self.tensors, digest_text(self.digest))
    }
}

/// The name of a part: `{stem}-00002-of-00005.gguf` (`llama_split_path` in `llama.cpp`).
struct Split {
    stem: String,
    number: u32,
    count: u32,
}

impl Split {
    fn of(name: &str) -> Option<Self> {
        let five = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok()).flatten();
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let (number, count) = (five(number)?, five(count)?);
        (number >= 1 && number <= count).then(|| Self { stem: stem.to_owned(), number, count })
    }

    fn name(&self, number: u32) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }

    /// Reads the parts after the first one.
    fn rest(&self, path: &Path, mut parts: Parts, first: &Keys) -> Result<ModelProfile, ProfileError> {
        match first.number(SPLIT_COUNT)? {
            // Such a name says nothing by itself.
            None | Some(0 | 1) => return parts.profile(first),
            Some(n) if n == u64::from(self.count) => {}
            Some(n) => {
                let problem = format!("{n} parts are not the {} of its name", self.count);
                return Err(ProfileError::value(SPLIT_COUNT, problem));
            }
        }
        if self.count > limits::MAX_PARTS {
            let (value, limit) = (u64::from(self.count), u64::from(limits::MAX_PARTS));
            return Err(ProfileError::TooLarge { what: "a number of parts", value, limit });
        }
        let numbered = |keys: &Keys, number: u32| match keys.get(SPLIT_NUMBER) {
            Some(Value::Number(n)) if *n == u64::from(number - 1) => Ok(()),
            _ => Err(ProfileError::value(SPLIT_NUMBER, format!("its name makes it part {number}"))),
        };
        numbered(first, 1)?;
        for number in 2..=self.count {
            let name = self.name(number);
            let part = |(file, length): (File, u64)| numbered(&parts.read(file, length)?, number);
            open(&path.with_file_name(&name)).and_then(part).map_err(|e| e.in_part(shown(name.as_bytes())))?;
        }
        parts.profile(first)
    }
}
