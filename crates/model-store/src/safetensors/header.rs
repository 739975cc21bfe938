//! The header of a safetensors file: a length of 8 bytes, then JSON (the `safetensors` project's README, "Format"). It is
//! parsed as a stream: no entry is kept.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufReader, Read};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sha2::{Digest, Sha256};

use super::tensors::Tensors;
use crate::ProfileError;
use crate::profile::shown;

/// Bytes of one header. The format allows 100 MB, the files of the largest models have less than 1 MiB: they are cut at 5
/// GB, and an entry takes about 150 bytes.
const MAX_HEADER: u64 = 4 << 20;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 16;
/// Bytes of a file's name.
const MAX_NAME: usize = 255;

/// Reads one header and adds its tensors.
pub(super) fn read(
    mut reader: impl Read,
    length: u64,
    digest: &mut Sha256,
    tensors: &mut Tensors,
) -> Result<(), ProfileError> {
    let cut = |end: u64| ProfileError::CutShort { what: "the header", end, length };
    let mut size = [0; 8];
    reader.read_exact(&mut size).map_err(|_| cut(8))?;
    let header = u64::from_le_bytes(size);
    if header > MAX_HEADER {
        return Err(ProfileError::TooLarge { what: "a header", value: header, limit: MAX_HEADER });
    }
    let data = 8 + header;
    if data > length {
        return Err(cut(data));
    }
    tensors.allow(header)?;
    digest.update(size);
    let mut end = 0;
    let mut wrong = None;
    let text = BufReader::new(Hashing { inner: reader.take(header), digest });
    let mut json = serde_json::Deserializer::from_reader(text);
    let mut entries = Entries { tensors, end: &mut end, wrong: &mut wrong };
    let parsed = (&mut entries).deserialize(&mut json).and_then(|()| json.end());
    if let Some(wrong) = wrong {
        return Err(wrong);
    }
    parsed.map_err(|e| malformed(&e))?;
    match data.checked_add(end) {
        Some(end) if end <= length => Ok(()),
        end => Err(ProfileError::CutShort { what: "the last tensor", end: end.unwrap_or(u64::MAX), length }),
    }
}

/// Names of the files in an index. Its `weight_map` has one entry a tensor.
pub(super) fn index(reader: impl Read, limit: usize) -> Result<BTreeSet<String>, ProfileError> {
    let mut files = Files { names: BTreeSet::new(), limit, wrong: None };
    let mut json = serde_json::Deserializer::from_reader(reader);
    let parsed = IndexSeed(&mut files).deserialize(&mut json).and_then(|()| json.end());
    if let Some(wrong) = files.wrong {
        return Err(wrong);
    }
    parsed.map_err(|e| malformed(&e))?;
    if files.names.is_empty() {
        return Err(ProfileError::Missing("weight_map".to_owned()));
    }
    Ok(files.names)
}

pub(super) fn malformed(error: &serde_json::Error) -> ProfileError {
    ProfileError::Malformed(shown(error.to_string().as_bytes()))
}

/// Hashes what is read.
struct Hashing<'a, R> {
    inner: R,
    digest: &'a mut Sha256,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.digest.update(&buffer[..n]);
        Ok(n)
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Number of elements; `None` if that is too large a number.
struct Shape(Option<u64>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let (mut elements, mut dims) = (Some(1u64), 0);
                while let Some(size) = list.next_element::<u64>()? {
                    dims += 1;
                    if dims > MAX_DIMS {
                        return Err(A::Error::custom("too many dimensions"));
                    }
                    elements = elements.and_then(|n| n.checked_mul(size));
                }
                Ok(Shape(elements))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}

/// Takes the entries of a header one by one.
struct Entries<'a> {
    tensors: &'a mut Tensors,
    end: &'a mut u64,
    wrong: &'a mut Option<ProfileError>,
}

impl<'de> DeserializeSeed<'de> for &mut Entries<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry a tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let entry: Entry = map.next_value()?;
            match self.tensors.add(&name, &entry.dtype, entry.shape.0, entry.data_offsets) {
                Ok(()) => *self.end = (*self.end).max(entry.data_offsets.1),
                Err(error) => {
                    *self.wrong = Some(error);
                    return Err(A::Error::custom("told apart"));
                }
            }
        }
        Ok(())
    }
}

struct Files {
    names: BTreeSet<String>,
    limit: usize,
    wrong: Option<ProfileError>,
}

struct IndexSeed<'a>(&'a mut Files);
struct MapSeed<'a>(&'a mut Files);

impl<'de> DeserializeSeed<'de> for IndexSeed<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for IndexSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an index of tensors")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "weight_map" {
                map.next_value_seed(MapSeed(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for MapSeed<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MapSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file name for each tensor")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Files { names, limit, wrong } = self.0;
        while map.next_key::<IgnoredAny>()?.is_some() {
            let name: String = map.next_value()?;
            if names.contains(&name) {
                continue;
            }
            // A name, not a way out of the folder.
            let plain = name.len() <= MAX_NAME && name.ends_with(".safetensors") && !name.contains(['/', '\0']);
            if !plain {
                *wrong = Some(ProfileError::Malformed(format!("it names `{}` as a file", shown(name.as_bytes()))));
                return Err(A::Error::custom("told apart"));
            }
            names.insert(name);
            if names.len() > *limit {
                let (value, limit) = (names.len() as u64, *limit as u64);
                *wrong = Some(ProfileError::TooLarge { what: "a number of files", value, limit });
                return Err(A::Error::custom("told apart"));
            }
        }
        Ok(())
    }
}
