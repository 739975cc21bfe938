//! Sums up the tensors of a model by the place where an engine puts them.
//!
//! Places: `LLM_TENSOR_NAMES` and `LLM_TENSOR_INFOS` in `llama-arch.cpp`.

use std::collections::BTreeMap;

use super::header::Names;
use super::limits::MAX_LAYERS;
use super::types::{TYPES, tensor_type};
use crate::ProfileError;

/// Needed before the first layer (`LLM_TENSOR_LAYER_INPUT`, and the norm that follows it).
const INPUT: [&str; 6] =
    ["token_embd", "token_embd_norm", "position_embd", "token_types", "per_layer_token_embd", "masked_embd_centroids"];
/// Needed after the last one (`LLM_TENSOR_LAYER_OUTPUT`); also all names that begin with one of these and a dot or `_hc`.
const OUTPUT: [&str; 11] = [
    "output",
    "output_norm",
    "output_res_score",
    "cls",
    "decision",
    "enc.output_norm",
    "dec.output_norm",
    "dense_2",
    "dense_3",
    "altup_proj",
    "altup_unembd_proj",
];

/// Bytes of the tensors, by place.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    names: Names,
    /// By number of the layer.
    pub(super) layers: BTreeMap<u32, u64>,
    pub(super) input: u64,
    pub(super) output: u64,
    pub(super) other: u64,
    /// `token_embd.weight` alone.
    pub(super) embedding: u64,
    /// Rows of `token_embd.weight`.
    pub(super) vocabulary: u64,
    /// There is a matrix of its own for the output.
    pub(super) output_matrix: bool,
    /// All of them.
    pub(super) total: u64,
    by_type: BTreeMap<u32, u64>,
}

impl Tensors {
    pub(super) fn count(&self) -> u64 {
        self.names.count()
    }

    /// Adds one.
    pub(super) fn add(&mut self, name: &[u8], number: u32, shape: [u64; 4], bytes: u64) -> Result<(), ProfileError> {
        self.names.first(name)?;
        let too_much = || ProfileError::Malformed("its tensors are larger than any file".to_owned());
        // No sum below is larger than this one.
        self.total = self.total.checked_add(bytes).ok_or_else(too_much)?;
        *self.by_type.entry(number).or_default() += bytes;
        let name = std::str::from_utf8(name).unwrap_or_default();
        if let Some(layer) = layer_of(name) {
            *self.layers.entry(layer).or_default() += bytes;
            return Ok(());
        }
        match name {
            "token_embd.weight" => {
                self.embedding = bytes;
                self.vocabulary = shape[1];
            }
            "output.weight" => self.output_matrix = true,
            _ => {}
        }
        let stem = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name);
        if INPUT.contains(&stem) {
            self.input += bytes;
        } else if OUTPUT.iter().any(|o| {
            stem.strip_prefix(o).is_some_and(|rest| rest.is_empty() || rest.starts_with('.') || rest.starts_with("_hc"))
        }) {
            self.output += bytes;
        } else {
            self.other += bytes;
        }
        Ok(())
    }

    /// Name of the type that holds most bytes.
    pub(super) fn main_type(&self) -> Option<&'static str> {
        debug_assert!(self.by_type.len() <= TYPES, "only known types are added");
        let (number, _) = self.by_type.iter().max_by_key(|(_, bytes)| **bytes)?;
        tensor_type(*number).map(|t| t.name)
    }
}

/// Number of the layer, from `blk.N.…`; encoder and decoder layers of one number lie together.
fn layer_of(name: &str) -> Option<u32> {
    let name = name.strip_prefix("enc.").or_else(|| name.strip_prefix("dec.")).unwrap_or(name);
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    number.parse().ok().filter(|n| *n < MAX_LAYERS)
}
