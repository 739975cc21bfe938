//! What each layer keeps: keys and values for each token, or a state for each sequence.
//!
//! After llama.cpp: `load_hparams` and `create_memory` in `llama-model.cpp` (defaults, which layers have a cache),
//! `llama-kv-cache.cpp` (its shape; no values with MLA), `n_embd_r` and `n_embd_s` in `llama-hparams.cpp` (the state, kept
//! in f32), `load_arch_hparams` in `src/models/*.cpp` (which layers are recurrent).

use pool_domain::{KvShape, LayerProfile};

use super::limits::MAX_LAYERS;
use super::model::Meta;
use super::tensors::Tensors;
use super::window::windows;
use crate::ProfileError;

/// What the engine keeps while it generates.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Nothing: encoders, and diffusion models that see their whole text each time.
    Nothing,
    /// Keys and values.
    Attention,
    /// A state for each sequence.
    Recurrent,
    /// Some layers this, some that.
    Hybrid,
    /// Both in each layer.
    Both,
}

impl Memory {
    fn of(architecture: &str) -> Self {
        match architecture {
            "bert" | "jina-bert-v2" | "jina-bert-v3" | "nomic-bert" | "nomic-bert-moe" | "neo-bert" | "eurobert"
            | "wavtokenizer-dec" | "modern-bert" | "gemma-embedding" | "dream" | "llada" | "llada-moe" | "rnd1"
            | "clef" => Self::Nothing,
            "mamba" | "mamba2" | "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" => Self::Recurrent,
            "falcon-h1" => Self::Both,
            "jamba" | "plamo2" | "granitehybrid" | "lfm2" | "lfm2moe" | "nemotron_h" | "nemotron_h_moe"
            | "qwen3next" | "qwen35" | "qwen35moe" | "kimi-linear" | "kimi-k3" | "bailingmoe3" | "glm5-next"
            | "minimax-01" => Self::Hybrid,
            _ => Self::Attention,
        }
    }
}

/// The shape as the header gives it.
struct Shape {
    memory: Memory,
    /// Layers for prediction of further tokens keep keys and values though they are not used: the engine has no filter.
    keeps_further: bool,
    /// All layers, and those without prediction of further tokens.
    stored: u32,
    trunk: u32,
    heads: Vec<u32>,
    heads_kv: Vec<u32>,
    feed_forward: Vec<u32>,
    windows: Vec<Option<u64>>,
    recurrent: Vec<bool>,
    /// Numbers in key and value of a head; with a window, without.
    bounded: (u32, u32),
    full: (u32, u32),
    /// Keys alone are kept, in compressed form.
    mla: bool,
    /// Layers from this one on use what an earlier one keeps.
    shared_from: u32,
    /// Numbers that a selector of tokens keeps besides, by layer: of keys, of values.
    selector: Vec<(u32, u32)>,
}

/// Layers that the header counts.
pub(super) fn stored(meta: &Meta<'_>) -> Result<u32, ProfileError> {
    match meta.need("block_count")? {
        n if n > MAX_LAYERS => {
            Err(ProfileError::TooLarge { what: "a number of layers", value: n.into(), limit: MAX_LAYERS.into() })
        }
        n => Ok(n),
    }
}

/// All layers, in order.
pub(super) fn layers(meta: &Meta<'_>, tensors: &Tensors) -> Result<Vec<LayerProfile>, ProfileError> {
    let shape = Shape::read(meta)?;
    let state = match shape.memory {
        Memory::Nothing | Memory::Attention => 0,
        _ => state_bytes(meta, &shape)?,
    };
    let widths = widths(meta, &shape)?;
    let mut layers = Vec::with_capacity(shape.stored as usize);
    for (layer, width) in (0..shape.stored).zip(widths) {
        let i = layer as usize;
        let keeps_state = shape.keeps_state(layer);
        let kv = if shape.keeps_kv(layer) { shape.kv(i)? } else { None };
        let attends = kv.is_some() || shape.memory == Memory::Nothing || layer >= shape.shared_from;
        // The engine reads the layers for prediction of further tokens only when it is told to; they keep their number.
        let read = layer < shape.trunk;
        layers.push(LayerProfile {
            bytes: if read { tensors.layers.get(&layer).copied().unwrap_or(0) } else { 0 },
            heads: if attends && read { shape.heads[i] } else { 0 },
            kv,
            recurrent_bytes: if keeps_state { state } else { 0 },
            feed_forward_length: width.into(),
        });
    }
    shape.expect_memory(meta, &layers)?;
    if meta.architecture == "graniteswitch" {
        // A layer of one head that remembers the adapter, after all others.
        let (key_length, value_length) = shape.full;
        let kv = Some(KvShape { heads_kv: 1, key_length, value_length, window: None });
        layers.push(LayerProfile { heads: 1, kv, ..LayerProfile::default() });
    }
    if meta.architecture == "nanbeige" {
        // The layers are gone through several times; each time keeps its own keys and values.
        let loops = meta.small("num_loops")?.unwrap_or(1).max(1);
        if loops.saturating_mul(shape.stored) > MAX_LAYERS {
            return Err(meta.wrong("num_loops", format!("{loops} is too large")));
        }
        let again: Vec<_> = layers.iter().map(|l| LayerProfile { bytes: 0, ..*l }).collect();
        (1..loops).for_each(|_| layers.extend_from_slice(&again));
    }
    Ok(layers)
}

impl Shape {
    fn read(meta: &Meta<'_>) -> Result<Self, ProfileError> {
        let memory = Memory::of(meta.architecture);
        let stored = stored(meta)?;
        let further = meta.small("nextn_predict_layers")?.unwrap_or(0);
        let trunk = match stored.checked_sub(further) {
            // A file with nothing else: a draft model.
            Some(0) => stored,
            Some(n) => n,
            None => return Err(meta.wrong("nextn_predict_layers", format!("{further} of {stored} layers"))),
        };
        let embedding = meta.need("embedding_length")?;
        let zeros = || vec![0; stored as usize];
        let heads = meta.per_layer("attention.head_count", stored)?.unwrap_or_else(zeros);
        let heads_kv = meta.per_layer("attention.head_count_kv", stored)?.unwrap_or_else(|| heads.clone());
        let feed_forward = meta.per_layer("feed_forward_length", stored)?.unwrap_or_else(zeros);
        let length = |name: &str, default: u32| Ok::<_, ProfileError>(meta.small(name)?.unwrap_or(default));
        let full = match embedding.checked_div(heads[0]) {
            Some(n) => (length("attention.key_length", n)?, length("attention.value_length", n)?),
            // The engine then does not look at the keys, with one exception.
            None if meta.architecture == "plamo2" => {
                (length("attention.key_length", 0)?, length("attention.value_length", 0)?)
            }
            None => (0, 0),
        };
        let bounded = (length("attention.key_length_swa", full.0)?, length("attention.value_length_swa", full.1)?);
        let mla = length("attention.key_length_mla", 0)? > 0 && length("attention.value_length_mla", 0)? > 0;
        let mut shape = Self {
            memory,
            keeps_further: matches!(meta.architecture, "nemotron_h" | "nemotron_h_moe" | "bailingmoe3"),
            stored,
            trunk,
            windows: windows(meta, trunk, stored)?,
            recurrent: Vec::new(),
            heads,
            heads_kv,
            feed_forward,
            bounded,
            full,
            mla,
            shared_from: shared_from(meta, stored)?,
            selector: Vec::new(),
        };
        shape.recurrent = shape.recurrent(meta)?;
        shape.selector = shape.selector(meta)?;
        Ok(shape)
    }

    /// Layers that keep a state.
    fn recurrent(&self, meta: &Meta<'_>) -> Result<Vec<bool>, ProfileError> {
        let every = match meta.architecture {
            _ if self.memory == Memory::Attention || self.memory == Memory::Nothing => {
                return Ok(vec![false; self.stored as usize]);
            }
            _ if self.memory != Memory::Hybrid => return Ok(vec![true; self.stored as usize]),
            "nemotron_h" | "nemotron_h_moe" => {
                let of = |i: usize| i < self.trunk as usize && self.heads_kv[i] == 0 && self.feed_forward[i] == 0;
                return Ok((0..self.stored as usize).map(of).collect());
            }
            "qwen3next" | "qwen35" | "qwen35moe" => 4,
            "minimax-01" => 8,
            _ => return Ok(self.heads_kv.iter().map(|heads| *heads == 0).collect()),
        };
        if let Some(listed) = meta.per_layer("attention.recurrent_layers", self.stored)? {
            return Ok(listed.into_iter().map(|n| n != 0).collect());
        }
        let name = "full_attention_interval";
        let every = meta.small(name)?.unwrap_or(every);
        if every == 0 {
            return Err(meta.wrong(name, "0 is not possible"));
        }
        Ok((1..=self.stored).map(|n| !n.is_multiple_of(every)).collect())
    }

    /// What the selectors of sparse attention keep (`llama-kv-cache-dsa.cpp`, `-msa.cpp`, `llama-memory-hybrid-idx.cpp`).
    fn selector(&self, meta: &Meta<'_>) -> Result<Vec<(u32, u32)>, ProfileError> {
        let none = vec![(0, 0); self.stored as usize];
        let mut own: Vec<bool> = match meta.architecture {
            "deepseek32" | "glm5-next" => vec![true; self.stored as usize],
            "minimax-m3" => {
                let dense = meta.small("leading_dense_block_count")?.unwrap_or(0);
                (0..self.stored).map(|layer| layer >= dense).collect()
            }
            // GLM 5 and 5.1 do not say; 5.2, known by its context, has one in each four layers.
            "glm-dsa" if meta.need("context_length")? < 1 << 20 => vec![true; self.stored as usize],
            "glm-dsa" => (0..self.stored).map(|layer| layer < 2 || layer % 4 == 2).collect(),
            "hy_v4" if meta.small("attention.indexer.top_k")?.unwrap_or(0) == 0 => return Ok(none),
            "hy_v4" | "dots3note" => vec![false; self.stored as usize],
            _ => return Ok(none),
        };
        if meta.architecture != "deepseek32" && meta.architecture != "minimax-m3" {
            let types = meta.list("attention.indexer.types")?.unwrap_or_default();
            types.into_iter().zip(&mut own).for_each(|(kind, own)| *own = kind != 0);
        }
        let mut key = meta.need("attention.indexer.key_length")?;
        if meta.architecture == "glm5-next" && meta.small("attention.indexer.kpool")?.unwrap_or(0) > 0 {
            // Key, gate and pooled key.
            key = key.saturating_mul(3);
        }
        let value = if self.mla { 0 } else { self.full.1 };
        let of = |(own, recurrent): (bool, &bool)| if own && !recurrent { (key, value) } else { (0, 0) };
        Ok(own.into_iter().zip(&self.recurrent).map(of).collect())
    }

    fn keeps_state(&self, layer: u32) -> bool {
        layer < self.trunk && self.recurrent[layer as usize]
    }

    fn keeps_kv(&self, layer: u32) -> bool {
        let i = layer as usize;
        match self.memory {
            Memory::Nothing | Memory::Recurrent => false,
            Memory::Attention | Memory::Both => layer < self.trunk && layer < self.shared_from,
            Memory::Hybrid => !self.recurrent[i] && (layer < self.trunk || self.keeps_further),
        }
    }

    /// What the layer keeps for each token; `None` if that is nothing.
    fn kv(&self, i: usize) -> Result<Option<KvShape>, ProfileError> {
        let (key, value) = if self.windows[i].is_some() { self.bounded } else { self.full };
        let mut kv = KvShape {
            heads_kv: self.heads_kv[i],
            key_length: key,
            value_length: if self.mla { 0 } else { value },
            window: self.windows[i],
        };
        let (more_keys, more_values) = self.selector[i];
        if more_keys > 0 {
            // The selector's key lies beside those of all heads, so they are counted as one.
            let all = |length: u32, more: u32| {
                kv.heads_kv.checked_mul(length).and_then(|n| n.checked_add(more)).ok_or_else(|| {
                    ProfileError::Malformed(format!("layer {i} would keep more numbers for a token than fit"))
                })
            };
            (kv.key_length, kv.value_length) = (all(kv.key_length, more_keys)?, all(kv.value_length, more_values)?);
            kv.heads_kv = 1;
        }
        // Feed-forward layers of `nemotron_h` are neither.
        let nothing = kv.heads_kv == 0 || (kv.key_length == 0 && kv.value_length == 0);
        Ok((!nothing).then_some(kv))
    }

    /// Some layer has to keep something, or the header would promise that any context is free.
    fn expect_memory(&self, meta: &Meta<'_>, layers: &[LayerProfile]) -> Result<(), ProfileError> {
        if self.memory == Memory::Nothing || layers.iter().any(|l| l.kv.is_some() || l.recurrent_bytes > 0) {
            return Ok(());
        }
        if self.memory == Memory::Recurrent {
            return Err(ProfileError::Malformed("no layer keeps a state".to_owned()));
        }
        let zero = |list: &[u32]| list.iter().all(|n| *n == 0);
        for (name, list) in [("attention.head_count", &self.heads), ("attention.head_count_kv", &self.heads_kv)] {
            if zero(list) {
                return match meta.list(name)?.is_some() || meta.small(name)?.is_some() {
                    true => Err(meta.wrong(name, "there are no heads")),
                    false => Err(ProfileError::Missing(meta.key(name))),
                };
            }
        }
        Err(meta.wrong("attention.key_length", "no layer keeps anything"))
    }
}

fn shared_from(meta: &Meta<'_>, stored: u32) -> Result<u32, ProfileError> {
    Ok(match meta.architecture {
        // Fixed in the engine.
        "gemma3n" => 20,
        "gemma4" => {
            let name = "attention.shared_kv_layers";
            let shared = meta.small(name)?.unwrap_or(0);
            stored.checked_sub(shared).ok_or_else(|| meta.wrong(name, format!("{shared} of {stored} layers")))?
        }
        _ => stored,
    })
}

/// Width of the feed-forward part of each layer, of one expert where the layer has experts of a width of their own.
fn widths(meta: &Meta<'_>, shape: &Shape) -> Result<Vec<u32>, ProfileError> {
    let experts = meta.small("expert_count")?.unwrap_or(0);
    let own = match meta.per_layer("expert_feed_forward_length", shape.stored)? {
        Some(own) if experts > 0 => own,
        _ => return Ok(shape.feed_forward.clone()),
    };
    let dense = meta.small("leading_dense_block_count")?.unwrap_or(0);
    let step = meta.small("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let of = |layer: u32| {
        let i = layer as usize;
        let mixed = layer >= dense && (layer + 1).is_multiple_of(step) && own[i] > 0;
        if mixed { own[i] } else { shape.feed_forward[i] }
    };
    Ok((0..shape.stored).map(of).collect())
}

/// Bytes of the state that one layer keeps for one sequence: what is left of the last tokens, and the sum over all.
fn state_bytes(meta: &Meta<'_>, shape: &Shape) -> Result<u64, ProfileError> {
    let small = |name: &str, default: u32| Ok::<u64, ProfileError>(meta.small(name)?.unwrap_or(default).into());
    let need = |name: &str| Ok::<u64, ProfileError>(meta.need(name)?.into());
    let heads = u64::from(shape.heads[0]);
    let embedding = need("embedding_length")?;
    // Factors, each below 2^34; some products have three.
    let numbers: [Option<u64>; 2] = match meta.architecture {
        "rwkv6" | "rwkv6qwen2" | "rwkv7" | "arwkv7" => {
            [small("token_shift_count", 2)?.checked_mul(embedding), need("wkv.head_size")?.checked_mul(embedding)]
        }
        "lfm2" | "lfm2moe" => [(need("shortconv.l_cache")? - 1).checked_mul(embedding), Some(0)],
        "kimi-linear" | "kimi-k3" | "bailingmoe3" | "glm5-next" => {
            let (kernel, length) = (need("ssm.conv_kernel")?, need("kda.head_dim")?);
            let inner = heads.checked_mul(length);
            [inner.and_then(|n| n.checked_mul(3 * (kernel - 1))), inner.and_then(|n| n.checked_mul(length))]
        }
        "minimax-01" => {
            let length = u64::from(shape.full.0);
            [Some(0), length.checked_mul(length).and_then(|n| n.checked_mul(heads))]
        }
        architecture => {
            let (kernel, inner, state) = (need("ssm.conv_kernel")?, need("ssm.inner_size")?, need("ssm.state_size")?);
            let groups = match architecture {
                "mamba" | "jamba" => 0,
                _ => need("ssm.group_count")?,
            };
            let width = groups.checked_mul(2 * state).and_then(|n| n.checked_add(inner));
            [width.and_then(|n| n.checked_mul(kernel - 1)), state.checked_mul(inner)]
        }
    };
    let [Some(shift), Some(sum)] = numbers else {
        return Err(ProfileError::Malformed("its layers would keep a state larger than any memory".to_owned()));
    };
    shift
        .checked_add(sum)
        .and_then(|n| n.checked_mul(4))
        .filter(|n| i64::try_from(*n).is_ok())
        .ok_or_else(|| ProfileError::Malformed("its layers would keep a state larger than any memory".to_owned()))
}
