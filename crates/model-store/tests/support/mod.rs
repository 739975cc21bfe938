//! Writes small GGUF headers.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test binary uses a part; it is no API"
)]

use std::io::{Cursor, Read, Result, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use model_store::{ProfileError, profile_gguf};
use pool_domain::{LayerProfile, ModelProfile};

pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q8_0: u32 = 8;
pub const Q4_K: u32 = 12;
pub const Q6_K: u32 = 14;

/// A header in the making.
#[derive(Clone, Default)]
pub struct Gguf {
    arch: String,
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<Vec<u8>>,
    data: u64,
}

impl Gguf {
    /// The keys that each model has.
    pub fn new(arch: &str, layers: u32, embedding: u32, context: u32) -> Self {
        Self { arch: arch.into(), ..Self::default() }
            .text("general.architecture", arch)
            .n("block_count", layers)
            .n("embedding_length", embedding)
            .n("context_length", context)
    }

    /// A model with attention in each layer.
    pub fn dense(arch: &str, layers: u32, embedding: u32, heads: u32, heads_kv: u32) -> Self {
        Self::new(arch, layers, embedding, 131_072)
            .n("attention.head_count", heads)
            .n("attention.head_count_kv", heads_kv)
    }

    pub fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.push((key.into(), [&kind.to_le_bytes(), value].concat()));
        self
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string(value))
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    /// A number below the architecture's name.
    pub fn n(self, key: &str, value: u32) -> Self {
        let key = format!("{}.{key}", self.arch);
        self.u32(&key, value)
    }

    /// A number for each layer.
    pub fn list(self, key: &str, values: &[u32]) -> Self {
        let key = format!("{}.{key}", self.arch);
        let values: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let count = values.len() as u64 / 4;
        self.raw(&key, 9, &[&4u32.to_le_bytes()[..], &count.to_le_bytes(), &values].concat())
    }

    /// A truth value for each layer.
    pub fn flags(self, key: &str, values: &[bool]) -> Self {
        let key = format!("{}.{key}", self.arch);
        let count = values.len() as u64;
        let values: Vec<u8> = values.iter().map(|v| u8::from(*v)).collect();
        self.raw(&key, 9, &[&7u32.to_le_bytes()[..], &count.to_le_bytes(), &values].concat())
    }

    pub fn strings<'a>(self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) -> Self {
        let mut bytes = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.for_each(|v| bytes.extend(string(v)));
        self.raw(key, 9, &bytes)
    }

    /// A tensor after those before it; `bytes` is what it takes.
    pub fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: u64) -> Self {
        let offset = self.data.next_multiple_of(32);
        self.data = offset + bytes;
        self.raw_tensor(name, shape, kind, offset)
    }

    pub fn raw_tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        let mut bytes = string(name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        self.tensors.push(bytes);
        self
    }

    /// Embedding, norm and output of F16, one tensor of `layer` F32 numbers for each layer.
    pub fn weights(mut self, layers: u32, vocabulary: u64, embedding: u64, layer: u64) -> Self {
        self = self.tensor("token_embd.weight", &[embedding, vocabulary], F16, embedding * vocabulary * 2);
        for i in 0..layers {
            self = self.tensor(&format!("blk.{i}.attn_q.weight"), &[layer], F32, layer * 4);
        }
        self.tensor("output_norm.weight", &[embedding], F32, embedding * 4).tensor(
            "output.weight",
            &[embedding, vocabulary],
            F16,
            embedding * vocabulary * 2,
        )
    }

    /// The header of version 3.
    pub fn header(&self) -> Vec<u8> {
        self.header_of(3)
    }

    pub fn header_of(&self, version: u32) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(string(key));
            out.extend(value);
        }
        self.tensors.iter().for_each(|t| out.extend(t));
        out
    }

    /// Length of the file with all its data.
    pub fn length(&self) -> u64 {
        (self.header().len() as u64).next_multiple_of(32) + self.data
    }

    /// The file, without any data, as something to read from.
    pub fn sparse(&self) -> Sparse {
        Sparse { header: self.header(), length: self.length(), at: 0 }
    }

    pub fn profile(&self) -> std::result::Result<ModelProfile, ProfileError> {
        profile_gguf(self.sparse())
    }

    pub fn layers(&self) -> Vec<LayerProfile> {
        self.profile().unwrap().layers
    }

    /// Writes it as a sparse file of its true length.
    pub fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, self.header()).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(self.length()).unwrap();
        path
    }
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn profile_bytes(bytes: &[u8]) -> std::result::Result<ModelProfile, ProfileError> {
    profile_gguf(Cursor::new(bytes))
}

/// A header with a hole behind it, and no data at all.
pub struct Sparse {
    pub header: Vec<u8>,
    pub length: u64,
    pub at: u64,
}

impl Read for Sparse {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let left = self.header.get(self.at as usize..).unwrap_or_default();
        assert!(!left.is_empty() || self.at >= self.length, "tensor data is never read");
        let n = left.len().min(buffer.len());
        buffer[..n].copy_from_slice(&left[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        self.at = match to {
            SeekFrom::Start(n) => n,
            SeekFrom::End(n) => self.length.saturating_add_signed(n),
            SeekFrom::Current(n) => self.at.saturating_add_signed(n),
        };
        Ok(self.at)
    }
}
