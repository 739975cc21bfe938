//! Sums up tensors by the place that their name, as `transformers` gives it, puts them.

use std::collections::{BTreeMap, HashSet};

use sha2::{Digest, Sha256};

use crate::ProfileError;
use crate::profile::shown;

/// Bytes of all headers of a model. Those of DeepSeek-V3 come to 14 MB, those of Kimi-K2 to 20.
const MAX_HEADERS: u64 = 48 << 20;
/// Tensors of a model. Kimi-K2, with each expert apart, has about 140,000.
const MAX_TENSORS: usize = 1 << 18;

/// Bytes of the tensors, by place.
pub(super) struct Tensors {
    /// Half a SHA-256 of each name: the names themselves would take 20 MiB for the largest models.
    names: HashSet<[u8; 16]>,
    headers: u64,
    /// Layers after the last one are for prediction of further tokens, and are not read.
    further: bool,
    pub(super) layers: Vec<u64>,
    pub(super) input: u64,
    pub(super) output: u64,
    pub(super) other: u64,
    pub(super) embedding: u64,
    pub(super) output_matrix: bool,
    pub(super) total: u64,
    by_type: BTreeMap<String, u64>,
}

impl Tensors {
    pub(super) fn new(layers: usize, further: bool) -> Self {
        Self {
            names: HashSet::new(),
            headers: 0,
            further,
            layers: vec![0; layers],
            input: 0,
            output: 0,
            other: 0,
            embedding: 0,
            output_matrix: false,
            total: 0,
            by_type: BTreeMap::new(),
        }
    }

    /// One more header of so many bytes.
    pub(super) fn allow(&mut self, bytes: u64) -> Result<(), ProfileError> {
        self.headers += bytes;
        if self.headers > MAX_HEADERS {
            return Err(ProfileError::TooLarge { what: "headers", value: self.headers, limit: MAX_HEADERS });
        }
        Ok(())
    }

    pub(super) fn add(
        &mut self,
        name: &str,
        dtype: &str,
        elements: Option<u64>,
        (begin, end): (u64, u64),
    ) -> Result<(), ProfileError> {
        let bad = |problem: &str| ProfileError::Malformed(format!("the tensor `{}` {problem}", shown(name.as_bytes())));
        let bytes = end.checked_sub(begin).ok_or_else(|| bad("ends before it begins"))?;
        if let Some(bits) = bits(dtype)
            && elements.and_then(|n| n.checked_mul(bits)).map(|n| n.div_ceil(8)) != Some(bytes)
        {
            return Err(bad("has another size than its shape needs"));
        }
        let mut short = [0; 16];
        short.copy_from_slice(&Sha256::digest(name)[..16]);
        if !self.names.insert(short) {
            return Err(ProfileError::Duplicate { what: "tensor", name: shown(name.as_bytes()) });
        }
        if self.names.len() > MAX_TENSORS {
            let (value, limit) = (self.names.len() as u64, MAX_TENSORS as u64);
            return Err(ProfileError::TooLarge { what: "a number of tensors", value, limit });
        }
        // No sum below is larger than this one.
        self.total = self.total.checked_add(bytes).ok_or_else(|| bad("is larger than any file"))?;
        match bits(dtype) {
            Some(_) => *self.by_type.entry(dtype.to_owned()).or_default() += bytes,
            None => *self.by_type.entry(String::new()).or_default() += bytes,
        }
        match place(name) {
            Place::Layer(n) => match self.layers.get_mut(n) {
                Some(layer) => *layer += bytes,
                None if self.further => {}
                None => self.other += bytes,
            },
            Place::Embedding => {
                self.embedding += bytes;
                self.input += bytes;
            }
            Place::Input => self.input += bytes,
            Place::Output { matrix } => {
                self.output_matrix |= matrix;
                self.output += bytes;
            }
            Place::Other => self.other += bytes,
        }
        Ok(())
    }

    /// The type that holds most bytes.
    pub(super) fn main_type(&self) -> Option<String> {
        self.by_type.iter().max_by_key(|(_, bytes)| **bytes).map(|(name, _)| name.clone())
    }
}

/// Bits of an element; `None` for a type yet to come, whose size is then believed.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

enum Place {
    Layer(usize),
    Embedding,
    Input,
    Output { matrix: bool },
    Other,
}

fn place(name: &str) -> Place {
    let mut parts = name.split('.').peekable();
    let mut last = "";
    while let Some(part) = parts.next() {
        // Towers for other senses have layers of their own.
        if ["vision", "visual", "audio", "image", "speech", "multi_modal"].iter().any(|sense| part.starts_with(sense)) {
            return Place::Other;
        }
        let next_number = parts.peek().and_then(|n| n.parse().ok());
        if let (Some(n), "layers" | "layer" | "h" | "blocks" | "block") = (next_number, part) {
            return Place::Layer(n);
        }
        match part {
            "embed_tokens" | "wte" | "word_embeddings" | "embed_in" | "tok_embeddings" => return Place::Embedding,
            // `backbone.embeddings.weight` is the matrix itself, `bert.embeddings.LayerNorm` is not.
            "embeddings" if parts.peek() == Some(&"weight") => return Place::Embedding,
            "embeddings" if parts.peek() == Some(&"word_embeddings") => return Place::Embedding,
            "wpe" | "embeddings" | "embed_positions" | "embed_tokens_per_layer" | "word_embeddings_layernorm" => {
                return Place::Input;
            }
            "lm_head" | "embed_out" => return Place::Output { matrix: true },
            "output" if last.is_empty() => return Place::Output { matrix: true },
            "norm" | "ln_f" | "norm_f" | "final_layernorm" | "final_layer_norm" | "score" | "classifier" | "pooler" => {
                return Place::Output { matrix: false };
            }
            _ => last = part,
        }
    }
    Place::Other
}
