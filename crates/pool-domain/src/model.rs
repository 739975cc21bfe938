//! What a model's header says about the memory it needs. The readers are in `model-store`, the arithmetic in
//! `estimate`.

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelFormat {
    /// One GGUF file, or several of one split.
    Gguf,
    /// `config.json` and safetensors files.
    Safetensors,
}

/// A model as far as planning needs it. All sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelProfile {
    /// How it is stored.
    pub format: ModelFormat,
    /// Architecture as the file names it, such as `llama`, `qwen2`, `gemma3`, `deepseek2`, `mamba`.
    pub architecture: String,
    /// Its repeating layers, in order.
    pub layers: Vec<LayerProfile>,
    /// Token embedding and whatever else is needed before the first layer.
    pub input_bytes: u64,
    /// Output norm and output matrix, as stored; without a matrix of its own see `tied_embeddings`.
    pub output_bytes: u64,
    /// Tensors of no layer that belong to neither end, such as rope factors.
    pub other_bytes: u64,
    /// The output matrix is the token embedding, which an engine then holds twice where input and output lie apart.
    pub tied_embeddings: bool,
    /// Bytes of the token embedding alone; it is a part of `input_bytes`.
    pub embedding_bytes: u64,
    /// Width of the hidden state (`embedding_length`).
    pub embedding_length: u64,
    /// Context the model was trained for, in tokens.
    pub context_length: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Experts of a mixture; 0 for a dense model.
    pub experts: u32,
    /// Experts used for each token.
    pub experts_used: u32,
    /// Main type of the weights, such as `Q4_K_M`, `BF16`; empty if unknown.
    pub quantisation: String,
    /// Bytes of all tensor data, whatever it is for.
    pub tensor_bytes: u64,
    /// Digest of the headers (`sha256:…`), which names the model's shape and metadata, not its weights; empty if unknown.
    pub header_digest: String,
}

/// One repeating layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerProfile {
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Query heads; 0 without attention.
    pub heads: u32,
    /// What it keeps for each token of the context; `None` without attention.
    pub kv: Option<KvShape>,
    /// Bytes of recurrent state it keeps for each sequence, in f32 as the engines do; 0 without.
    pub recurrent_bytes: u64,
    /// Width of the feed-forward part, of one expert in a mixture; 0 without.
    pub feed_forward_length: u64,
}

/// What one attention layer keeps for each token. With MLA that is the compressed form: one head, no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Key and value heads.
    pub heads_kv: u32,
    /// Numbers in a key of one head.
    pub key_length: u32,
    /// Numbers in a value of one head.
    pub value_length: u32,
    /// Tokens it looks back, where that is bounded.
    pub window: Option<u64>,
}

impl ModelProfile {
    /// Bytes of the weights an engine needs in memory, each counted once.
    #[must_use]
    pub fn weights(&self) -> u64 {
        let layers = self.layers.iter().fold(0u64, |sum, l| sum.saturating_add(l.bytes));
        [self.input_bytes, self.output_bytes, self.other_bytes].into_iter().fold(layers, u64::saturating_add)
    }

    /// Numbers kept for each token by all layers together, keys and values apart: (keys, values).
    #[must_use]
    pub fn kv_numbers_per_token(&self) -> (u64, u64) {
        self.layers.iter().filter_map(|l| l.kv).fold((0u64, 0u64), |(k, v), s| {
            let (heads, key, value) = (u64::from(s.heads_kv), u64::from(s.key_length), u64::from(s.value_length));
            (k.saturating_add(heads * key), v.saturating_add(heads * value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(layers: usize, heads_kv: u32, length: u32) -> ModelProfile {
        let kv = KvShape { heads_kv, key_length: length, value_length: length, window: None };
        ModelProfile {
            format: ModelFormat::Gguf,
            architecture: "llama".into(),
            layers: vec![LayerProfile { bytes: 10, heads: 32, kv: Some(kv), ..LayerProfile::default() }; layers],
            input_bytes: 1,
            output_bytes: 2,
            other_bytes: 3,
            tied_embeddings: false,
            embedding_bytes: 1,
            embedding_length: 4096,
            context_length: 8192,
            vocabulary: 128_256,
            experts: 0,
            experts_used: 0,
            quantisation: String::new(),
            tensor_bytes: 0,
            header_digest: String::new(),
        }
    }

    /// Llama-3.1-8B, Qwen2.5-7B and Llama-3-70B, with f16 keys and values, from their published shapes.
    #[test]
    fn bytes_per_token_are_those_of_the_published_shapes() {
        for (layers, heads_kv, bytes) in [(32, 8, 131_072), (28, 4, 57_344), (80, 8, 327_680)] {
            let (k, v) = dense(layers, heads_kv, 128).kv_numbers_per_token();
            assert_eq!(2 * (k + v), bytes);
        }
        assert_eq!(dense(32, 8, 128).weights(), 326);
    }
}
