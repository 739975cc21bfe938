//! Growing a model's header, tensor by tensor.

use crate::gguf::{INT32, Kind, Metadata, Tensor};

/// One model without its weights.
pub(super) struct Shape {
    /// The model whose shape it is.
    pub(super) name: &'static str,
    /// What is special about it.
    pub(super) kind: &'static str,
    arch: &'static str,
    metadata: Metadata,
    pub(super) tensors: Vec<Tensor>,
    /// Tokens of the vocabulary; written when the file is.
    pub(super) vocabulary: u32,
    /// What Ollama's predictor reads: layers, fewest KV heads, embedding length, heads.
    pub(super) ollama: [u64; 4],
}

impl Shape {
    /// The same model with hardly any vocabulary: what the engine then computes with is what its layers need.
    pub(super) fn without_vocabulary(mut self) -> Self {
        let few = 256;
        for tensor in &mut self.tensors {
            if matches!(tensor.name.as_str(), "token_embd.weight" | "output.weight") {
                tensor.dims[1] = u64::from(few);
            }
        }
        self.vocabulary = few;
        self
    }

    /// The whole metadata.
    pub(super) fn metadata(&self) -> Metadata {
        let mut metadata = self.metadata.clone();
        metadata.u32(&format!("{}.vocab_size", self.arch), self.vocabulary);
        metadata
    }
}

/// Grows a shape.
pub(super) struct Builder {
    arch: &'static str,
    pub(super) shape: Shape,
    embd: u64,
}

impl Builder {
    pub(super) fn new(name: &'static str, kind: &'static str, arch: &'static str, base: [u32; 4]) -> Self {
        let [layers, embd, vocab, context] = base;
        let mut metadata = Metadata::default();
        metadata.string("general.architecture", arch);
        metadata.string("general.name", name);
        metadata.u32("general.file_type", 15);
        // Without a tokenizer the header stays small; the vocabulary's size is in a key of its own.
        metadata.string("tokenizer.ggml.model", "no_vocab");
        let ollama = [u64::from(layers), 0, u64::from(embd), 1];
        let shape = Shape { name, kind, arch, metadata, tensors: Vec::new(), vocabulary: vocab, ollama };
        let mut b = Self { arch, shape, embd: u64::from(embd) };
        b.u("block_count", layers).u("embedding_length", embd).u("context_length", context);
        b.shape.metadata.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5);
        b.w("token_embd.weight", &[u64::from(embd), u64::from(vocab)]).w("output_norm.weight", &[u64::from(embd)]);
        b
    }

    pub(super) fn u(&mut self, key: &str, value: u32) -> &mut Self {
        self.shape.metadata.u32(&format!("{}.{key}", self.arch), value);
        self
    }

    pub(super) fn us(&mut self, key: &str, values: &[u32]) -> &mut Self {
        let values = values.iter().map(|v| v.to_le_bytes());
        self.shape.metadata.array(&format!("{}.{key}", self.arch), INT32, values);
        self
    }

    pub(super) fn f(&mut self, key: &str, value: f32) -> &mut Self {
        self.shape.metadata.f32(&format!("{}.{key}", self.arch), value);
        self
    }

    /// A tensor, stored as a Q4_K_M file stores it: vectors and small matrices in f32, the output in Q6_K.
    pub(super) fn w(&mut self, name: &str, dims: &[u64]) -> &mut Self {
        let wide = ["ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_d", "shortconv.conv", "lerp", "norm", "ssm_dt"];
        let kind = match dims {
            [_] => Kind::F32,
            _ if name.ends_with("bias") || wide.iter().any(|w| name.contains(w)) => Kind::F32,
            [n, ..] if n % 256 != 0 => [Kind::F16, Kind::Q8_0][usize::from(n % 32 == 0)],
            _ if name == "output.weight" => Kind::Q6K,
            _ => Kind::Q4K,
        };
        self.typed(name, dims, kind)
    }

    pub(super) fn typed(&mut self, name: &str, dims: &[u64], kind: Kind) -> &mut Self {
        self.shape.tensors.push(Tensor { name: name.to_owned(), dims: dims.to_vec(), kind });
        self
    }

    /// A weight of a layer.
    pub(super) fn l(&mut self, layer: usize, part: &str, dims: &[u64]) -> &mut Self {
        self.w(&format!("blk.{layer}.{part}.weight"), dims)
    }

    /// An output matrix of its own.
    pub(super) fn untied(&mut self) -> &mut Self {
        self.w("output.weight", &[self.embd, u64::from(self.shape.vocabulary)])
    }

    pub(super) fn heads(&mut self, heads: u32, kv: u32, length: u32) -> &mut Self {
        self.shape.ollama[1] = u64::from(kv);
        self.shape.ollama[3] = u64::from(heads);
        self.u("attention.head_count", heads).u("attention.head_count_kv", kv).lengths(length, length)
    }

    pub(super) fn lengths(&mut self, key: u32, value: u32) -> &mut Self {
        self.u("attention.key_length", key).u("attention.value_length", value)
    }

    /// Projections of one attention layer: `q` numbers of queries, `kv` of keys and of values.
    pub(super) fn attention(&mut self, layer: usize, q: u64, kv: u64) -> &mut Self {
        let e = self.embd;
        self.l(layer, "attn_q", &[e, q]).l(layer, "attn_k", &[e, kv]).l(layer, "attn_v", &[e, kv]);
        self.l(layer, "attn_output", &[q, e])
    }

    pub(super) fn norms(&mut self, layer: usize, names: &[&str], width: u64) -> &mut Self {
        for name in names {
            self.l(layer, name, &[width]);
        }
        self
    }

    pub(super) fn feed_forward(&mut self, layer: usize, ff: u64) -> &mut Self {
        let e = self.embd;
        self.l(layer, "ffn_gate", &[e, ff]).l(layer, "ffn_up", &[e, ff]).l(layer, "ffn_down", &[ff, e])
    }

    pub(super) fn experts(&mut self, layer: usize, ff: u64, experts: u64) -> &mut Self {
        let e = self.embd;
        self.l(layer, "ffn_gate_inp", &[e, experts]).l(layer, "ffn_gate_exps", &[e, ff, experts]);
        self.l(layer, "ffn_up_exps", &[e, ff, experts]).l(layer, "ffn_down_exps", &[ff, e, experts])
    }

    pub(super) fn shared_expert(&mut self, layer: usize, ff: u64) -> &mut Self {
        let e = self.embd;
        self.l(layer, "ffn_gate_shexp", &[e, ff]).l(layer, "ffn_up_shexp", &[e, ff]);
        self.l(layer, "ffn_down_shexp", &[ff, e])
    }

    pub(super) fn ssm(&mut self, conv: u32, inner: u32, state: u32, rank: u32, groups: Option<u32>) -> &mut Self {
        self.u("ssm.conv_kernel", conv).u("ssm.inner_size", inner).u("ssm.state_size", state);
        self.u("ssm.time_step_rank", rank);
        if let Some(groups) = groups {
            self.u("ssm.group_count", groups);
        }
        self
    }

    /// The state space part of one layer, first kind.
    pub(super) fn mamba(&mut self, layer: usize, [conv, inner, state, rank]: [u64; 4]) -> &mut Self {
        let e = self.embd;
        self.l(layer, "ssm_in", &[e, 2 * inner]).l(layer, "ssm_conv1d", &[conv, inner]);
        self.w(&format!("blk.{layer}.ssm_conv1d.bias"), &[inner]).l(layer, "ssm_x", &[inner, rank + 2 * state]);
        self.l(layer, "ssm_dt", &[rank, inner]).w(&format!("blk.{layer}.ssm_dt.bias"), &[inner]);
        self.w(&format!("blk.{layer}.ssm_a"), &[state, inner]).w(&format!("blk.{layer}.ssm_d"), &[inner]);
        self.l(layer, "ssm_out", &[inner, e])
    }

    /// The state space part of one layer, second kind.
    pub(super) fn mamba2(&mut self, layer: usize, [conv, inner, state, heads, groups]: [u64; 5]) -> &mut Self {
        let (e, wide) = (self.embd, inner + 2 * groups * state);
        self.l(layer, "ssm_in", &[e, inner + wide + heads]).l(layer, "ssm_conv1d", &[conv, wide]);
        self.w(&format!("blk.{layer}.ssm_conv1d.bias"), &[wide]).w(&format!("blk.{layer}.ssm_dt.bias"), &[heads]);
        self.w(&format!("blk.{layer}.ssm_a"), &[1, heads]).w(&format!("blk.{layer}.ssm_d"), &[1, heads]);
        self.l(layer, "ssm_norm", &[inner / groups, groups]).l(layer, "ssm_out", &[inner, e])
    }

    pub(super) fn done(&mut self) -> Shape {
        Shape {
            metadata: std::mem::take(&mut self.shape.metadata),
            tensors: std::mem::take(&mut self.shape.tensors),
            ..self.shape
        }
    }
}
