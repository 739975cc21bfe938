//! The header itself: keys with values, then one entry for each tensor. Layout: the GGUF page of ggml
//! (`docs/gguf.md`), strictness: `gguf.cpp`.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek};

use super::limits::{
    MAX_ALIGNMENT, MAX_ARRAY, MAX_DIMS, MAX_KEPT, MAX_KEPT_ARRAY, MAX_KEPT_TEXT, MAX_KEY, MAX_KEYS, MAX_TENSOR_NAME,
    MAX_TENSORS, PIECE,
};
use super::source::Source;
use super::tensors::Tensors;
use super::types::tensor_type;
use crate::ProfileError;
use crate::profile::shown;

/// Where tensor data begins at multiples of this, unless the file says otherwise (`GGUF_DEFAULT_ALIGNMENT`).
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT: &str = "general.alignment";

/// What a key holds, as far as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// A number that is no less than zero, or a truth value.
    Number(u64),
    /// A number below zero or with a fraction; nothing that is asked for here.
    Other,
    /// A text; only short ones are kept.
    Text(String),
    /// Numbers, one a layer.
    Numbers(Vec<u64>),
    /// An array of which only the length is kept.
    Array(u64),
}

/// The keys of one part.
#[derive(Debug, Default)]
pub(super) struct Keys(HashMap<String, Value>);

impl Keys {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// A number, if the key is there.
    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, ProfileError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Number(n)) => Ok(Some(*n)),
            Some(_) => Err(ProfileError::value(key, "its value is not a whole number")),
        }
    }
}

/// Reads the header of one part: its keys are given back, its tensors are added to those of the parts before.
pub(super) fn read<R: Read + Seek>(source: &mut Source<R>, tensors: &mut Tensors) -> Result<Keys, ProfileError> {
    if source.length() < 4 || source.take(4)? != b"GGUF" {
        return Err(ProfileError::NotGguf);
    }
    match source.u32()? {
        2 | 3 => {}
        v if (1..=3).contains(&v.swap_bytes()) => return Err(ProfileError::BigEndian),
        v => return Err(ProfileError::Version(v)),
    }
    let tensor_count = limited("a number of tensors", source.u64()?, MAX_TENSORS.saturating_sub(tensors.count()))?;
    let key_count = limited("a number of keys", source.u64()?, MAX_KEYS)?;
    let keys = read_keys(source, key_count)?;
    let alignment = keys.number(ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(ProfileError::value(ALIGNMENT, format!("{alignment} is not a power of two up to {MAX_ALIGNMENT}")));
    }
    let mut data = 0;
    for _ in 0..tensor_count {
        data = data.max(read_tensor(source, tensors, alignment)?);
    }
    // Both sums are far from overflowing: a header ends before 256 MiB, `data` is the end of an existing i64.
    let end = source.at().next_multiple_of(alignment).saturating_add(data);
    if data > 0 && end > source.length() {
        return Err(ProfileError::CutShort { what: "the last tensor", end, length: source.length() });
    }
    Ok(keys)
}

fn read_keys<R: Read + Seek>(source: &mut Source<R>, count: u64) -> Result<Keys, ProfileError> {
    let mut keys = HashMap::new();
    let mut kept = 0;
    for _ in 0..count {
        let name = source.string("a key length", MAX_KEY)?;
        let Ok(name) = std::str::from_utf8(name).map(str::to_owned) else {
            return Err(ProfileError::Malformed(format!("the key `{}` is not text", shown(name))));
        };
        let kind = source.u32()?;
        let value =
            if kind == ARRAY { read_array(source, &name, &mut kept)? } else { read_scalar(source, kind, &name)? };
        if keys.insert(name.clone(), value).is_some() {
            return Err(ProfileError::Duplicate { what: "key", name: shown(name.as_bytes()) });
        }
    }
    Ok(Keys(keys))
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a value of fixed size.
fn size_of(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | BOOL => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

fn number(kind: u32, bytes: &[u8]) -> Option<u64> {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let value = u64::from_le_bytes(wide);
    let top = 1u64.checked_shl(8 * bytes.len() as u32 - 1)?;
    match kind {
        0 | 2 | 4 | 10 => Some(value),
        BOOL => Some(u64::from(value != 0)),
        1 | 3 | 5 | 11 if value & top == 0 => Some(value),
        _ => None,
    }
}

fn read_scalar<R: Read + Seek>(source: &mut Source<R>, kind: u32, key: &str) -> Result<Value, ProfileError> {
    if kind == STRING {
        let length = source.u64()?;
        source.fits(length)?;
        if length > MAX_KEPT_TEXT {
            // Chat templates and licences.
            source.skip(length)?;
            return Ok(Value::Other);
        }
        let text = source.take(length as usize)?;
        return Ok(Value::Text(String::from_utf8_lossy(text).into_owned()));
    }
    let size = size_of(kind).ok_or_else(|| bad_type(key, kind))?;
    Ok(number(kind, source.take(size)?).map_or(Value::Other, Value::Number))
}

fn read_array<R: Read + Seek>(source: &mut Source<R>, key: &str, kept: &mut usize) -> Result<Value, ProfileError> {
    let kind = source.u32()?;
    let length = limited("an array length", source.u64()?, MAX_ARRAY)?;
    if kind == STRING {
        // Each has its length before it, so a count too high is told before anything is read.
        source.fits(length * 8)?;
        limited("an array length", length, source.allowance() / 8)?;
        for _ in 0..length {
            let n = source.u64()?;
            source.fits(n)?;
            match usize::try_from(n) {
                Ok(n) if n <= PIECE => {
                    source.take(n)?;
                }
                _ => source.skip(n)?,
            }
        }
        return Ok(Value::Array(length));
    }
    let size = size_of(kind).ok_or_else(|| bad_type(key, kind))?;
    source.fits(length * size as u64)?;
    if length > MAX_KEPT_ARRAY || key.starts_with("tokenizer.") {
        source.skip(length * size as u64)?;
        return Ok(Value::Array(length));
    }
    *kept += length as usize;
    limited("a number of array elements", *kept as u64, MAX_KEPT as u64)?;
    let bytes = source.take(length as usize * size)?;
    let numbers: Option<Vec<u64>> = bytes.chunks_exact(size).map(|b| number(kind, b)).collect();
    Ok(numbers.map_or(Value::Array(length), Value::Numbers))
}

/// One tensor; gives back where its data ends, counted from where data begins.
fn read_tensor<R: Read + Seek>(
    source: &mut Source<R>,
    tensors: &mut Tensors,
    alignment: u64,
) -> Result<u64, ProfileError> {
    let name = source.string("a tensor name length", MAX_TENSOR_NAME)?.to_owned();
    let bad = |problem: &str| ProfileError::Malformed(format!("the tensor `{}` {problem}", shown(&name)));
    let dims = source.u32()?;
    if dims > MAX_DIMS {
        return Err(bad(&format!("has {dims} dimensions; at most {MAX_DIMS} are possible")));
    }
    let mut shape = [1u64; MAX_DIMS as usize];
    for size in shape.iter_mut().take(dims as usize) {
        *size = source.u64()?;
    }
    let number = source.u32()?;
    let offset = source.u64()?;
    let kind = tensor_type(number).ok_or_else(|| bad(&format!("is of type {number}, which is not known")))?;
    if !shape[0].is_multiple_of(kind.block) {
        return Err(bad(&format!("has rows of {}, which type {} cannot store", shape[0], kind.name)));
    }
    if !offset.is_multiple_of(alignment) {
        return Err(bad("begins at an odd place"));
    }
    // As the engine's: the number of elements, also of all but empty dimensions, and the end have to be an i64.
    let whole = |n: u64| i64::try_from(n).is_ok().then_some(n);
    let elements = shape.iter().try_fold(1u64, |n, &d| whole(d).and_then(|d| n.checked_mul(d.max(1))).and_then(whole));
    let empty = shape.contains(&0);
    let bytes = elements.and_then(|n| (n / kind.block).checked_mul(kind.bytes)).map(|n| if empty { 0 } else { n });
    let end = bytes.and_then(|n| n.checked_add(offset)).and_then(whole);
    let (Some(bytes), Some(end)) = (bytes, end) else {
        return Err(bad("is larger than any file"));
    };
    tensors.add(&name, number, shape, bytes)?;
    Ok(end)
}

fn bad_type(key: &str, kind: u32) -> ProfileError {
    ProfileError::Malformed(format!("the key `{}` is of type {kind}, which is not known", shown(key.as_bytes())))
}

fn limited(what: &'static str, value: u64, limit: u64) -> Result<u64, ProfileError> {
    if value > limit { Err(ProfileError::TooLarge { what, value, limit }) } else { Ok(value) }
}

/// Names that have been seen; a name may occur once in all parts together.
#[derive(Debug, Default)]
pub(super) struct Names(HashSet<Box<[u8]>>);

impl Names {
    pub(super) fn first(&mut self, name: &[u8]) -> Result<(), ProfileError> {
        if self.0.insert(name.into()) {
            Ok(())
        } else {
            Err(ProfileError::Duplicate { what: "tensor", name: shown(name) })
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }
}
