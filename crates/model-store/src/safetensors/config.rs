//! `config.json` of a `transformers` model. Names differ between families; those that mean the same are looked up in turn.
//!
//! Shapes: the configuration classes of `transformers`; what is kept for each token: vLLM's attention layers (with MLA one
//! compressed key, no value; layers that share keys and values keep none).

use pool_domain::{KvShape, LayerProfile};
use serde_json::{Map, Value};

use super::header::malformed;
use super::kinds::{Kind, kinds, state_bytes};
use crate::ProfileError;
use crate::profile::shown;

/// Layers; the engines' own limits are lower.
const MAX_LAYERS: u32 = 512;

/// What the config says.
pub(super) struct Config {
    pub(super) architecture: String,
    /// Without their bytes.
    pub(super) layers: Vec<LayerProfile>,
    pub(super) tied: Option<bool>,
    pub(super) embedding_length: u64,
    pub(super) context_length: u64,
    pub(super) vocabulary: u64,
    pub(super) experts: u32,
    pub(super) experts_used: u32,
    pub(super) quantisation: Option<String>,
    /// There are layers after the last one, for prediction of further tokens.
    pub(super) further_layers: bool,
}

/// The config's keys: those of the language model first, then those of the whole.
pub(super) struct Keys {
    inner: Map<String, Value>,
    outer: Map<String, Value>,
}

impl Keys {
    fn read(text: &[u8]) -> Result<Self, ProfileError> {
        let Value::Object(mut outer) = serde_json::from_slice(text).map_err(|e| malformed(&e))? else {
            return Err(ProfileError::Malformed("it is not an object".to_owned()));
        };
        let nested = ["text_config", "llm_config", "language_config"];
        let inner = nested.iter().find_map(|name| match outer.remove(*name) {
            Some(Value::Object(inner)) => Some(inner),
            _ => None,
        });
        Ok(Self { inner: inner.unwrap_or_default(), outer })
    }

    /// The first of the names that has a value.
    pub(super) fn get(&self, names: &[&str]) -> Option<&Value> {
        names
            .iter()
            .find_map(|n| self.inner.get(*n).filter(|v| !v.is_null()))
            .or_else(|| names.iter().find_map(|n| self.outer.get(*n).filter(|v| !v.is_null())))
    }

    pub(super) fn text(&self, names: &[&str]) -> Option<&str> {
        self.get(names)?.as_str()
    }

    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.get(&[name])?.as_bool()
    }

    pub(super) fn list(&self, name: &str) -> Option<&Vec<Value>> {
        self.get(&[name])?.as_array()
    }

    pub(super) fn number(&self, names: &[&str]) -> Result<Option<u32>, ProfileError> {
        let Some(value) = self.get(names) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
        number.map(Some).ok_or_else(|| ProfileError::value(names[0], "its value is not a whole number of a usual size"))
    }

    pub(super) fn need(&self, names: &[&str]) -> Result<u32, ProfileError> {
        match self.number(names)? {
            Some(0) => Err(ProfileError::value(names[0], "0 is not possible")),
            Some(n) => Ok(n),
            None => Err(ProfileError::Missing(names[0].to_owned())),
        }
    }
}

const HIDDEN: &[&str] = &["hidden_size", "n_embd", "d_model", "dim"];
const HEADS: &[&str] = &["num_attention_heads", "n_head", "n_heads", "num_heads"];

impl Config {
    pub(super) fn read(text: &[u8]) -> Result<Self, ProfileError> {
        let keys = Keys::read(text)?;
        let architecture = keys.text(&["model_type"]).ok_or_else(|| ProfileError::Missing("model_type".to_owned()))?;
        let count = match keys.need(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"])? {
            n if n > MAX_LAYERS => {
                let (value, limit) = (n.into(), MAX_LAYERS.into());
                return Err(ProfileError::TooLarge { what: "a number of layers", value, limit });
            }
            n => n,
        };
        let embedding = keys.need(HIDDEN)?;
        let context =
            ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"];
        let experts = keys.number(&["num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"])?;
        let used = keys.number(&["num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts"])?;
        let kinds = kinds(&keys, architecture, count)?;
        let shape = Attention::read(&keys, embedding, kinds.iter().any(Kind::attends))?;
        let state = match kinds.iter().any(Kind::keeps_state) {
            true => state_bytes(&keys, architecture, embedding)?,
            false => 0,
        };
        let widths = Widths::read(&keys, experts.unwrap_or(0) > 0)?;
        let shared_from = count.saturating_sub(keys.number(&["num_kv_shared_layers"])?.unwrap_or(0));
        let layer = |(i, kind): (u32, &Kind)| LayerProfile {
            bytes: 0,
            heads: if kind.attends() { shape.heads } else { 0 },
            kv: if i < shared_from { shape.kv(kind) } else { None },
            recurrent_bytes: if kind.keeps_state() { state } else { 0 },
            feed_forward_length: widths.of(i).into(),
        };
        Ok(Self {
            layers: (0..).zip(&kinds).map(layer).collect(),
            tied: keys.flag("tie_word_embeddings"),
            embedding_length: embedding.into(),
            // Models without attention have no limit of their own.
            context_length: keys.number(&context)?.unwrap_or(0).into(),
            vocabulary: keys.number(&["vocab_size"])?.unwrap_or(0).into(),
            experts: experts.unwrap_or(0),
            experts_used: used.unwrap_or(0),
            quantisation: quantisation(&keys),
            further_layers: keys.number(&["num_nextn_predict_layers", "mtp_num_hidden_layers"])?.unwrap_or(0) > 0,
            architecture: shown(architecture.as_bytes()),
        })
    }
}

/// Heads and their sizes.
struct Attention {
    heads: u32,
    heads_kv: u32,
    key: u32,
    value: u32,
    /// Of layers without a window, where they differ: heads, key and value.
    global: (u32, u32, u32),
    mla: bool,
}

impl Attention {
    fn read(keys: &Keys, embedding: u32, needed: bool) -> Result<Self, ProfileError> {
        if !needed {
            return Ok(Self { heads: 0, heads_kv: 0, key: 0, value: 0, global: (0, 0, 0), mla: false });
        }
        let heads = keys.need(HEADS)?;
        // Falcon-7B and its like share one key among all heads.
        let one = keys.flag("multi_query") == Some(true) && keys.flag("new_decoder_architecture") != Some(true);
        let heads_kv =
            match keys.number(&["num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"])? {
                Some(0) => return Err(ProfileError::value("num_key_value_heads", "0 is not possible")),
                Some(n) if !one => n,
                _ if one => 1,
                _ => heads,
            };
        if let Some(rank) = keys.number(&["kv_lora_rank"])?.filter(|n| *n > 0) {
            let key = rank.saturating_add(keys.need(&["qk_rope_head_dim"])?);
            return Ok(Self { heads, heads_kv: 1, key, value: 0, global: (1, key, 0), mla: true });
        }
        let key = keys.number(&["head_dim", "attention_head_dim", "kv_channels"])?.unwrap_or(embedding / heads);
        let value = keys.number(&["v_head_dim"])?.unwrap_or(key);
        let global_heads = keys.number(&["num_global_key_value_heads"])?.unwrap_or(heads_kv);
        let global = match keys.number(&["global_head_dim"])? {
            Some(n) => (global_heads, n, n),
            None => (global_heads, key, value),
        };
        if key == 0 || value == 0 || global.0 == 0 || global.1 == 0 {
            return Err(ProfileError::value("head_dim", "0 is not possible"));
        }
        Ok(Self { heads, heads_kv, key, value, global, mla: false })
    }

    fn kv(&self, kind: &Kind) -> Option<KvShape> {
        let window = match *kind {
            Kind::Attention(window) => window,
            Kind::Both => None,
            Kind::State | Kind::Neither => return None,
        };
        let (heads_kv, key_length, value_length) =
            if window.is_some() && !self.mla { (self.heads_kv, self.key, self.value) } else { self.global };
        Some(KvShape { heads_kv, key_length, value_length, window })
    }
}

/// Widths of the feed-forward parts.
struct Widths {
    dense: u32,
    expert: Option<u32>,
    first_mixed: u32,
}

impl Widths {
    fn read(keys: &Keys, mixture: bool) -> Result<Self, ProfileError> {
        let dense = keys.get(&["intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"]);
        // Gemma-3n has a list of one width a layer; the largest is told.
        let wide = |v: &Value| v.as_u64().or_else(|| v.as_array()?.iter().filter_map(Value::as_u64).max());
        let dense = dense.and_then(wide).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let expert = keys.number(&["moe_intermediate_size", "expert_intermediate_size"])?.filter(|_| mixture);
        Ok(Self { dense, expert, first_mixed: keys.number(&["first_k_dense_replace"])?.unwrap_or(0) })
    }

    fn of(&self, layer: u32) -> u32 {
        self.expert.filter(|_| layer >= self.first_mixed).unwrap_or(self.dense)
    }
}

/// How the weights are stored, as far as the config says: a method with its bits, or a type.
fn quantisation(keys: &Keys) -> Option<String> {
    if let Some(Value::Object(method)) = keys.get(&["quantization_config"]) {
        let name = method.get("quant_method")?.as_str()?.to_ascii_uppercase();
        let bits = method.get("bits").and_then(Value::as_u64).filter(|bits| *bits < 64);
        return Some(shown(bits.map_or(name.clone(), |bits| format!("{name}-{bits}bit")).as_bytes()));
    }
    Some(match keys.text(&["torch_dtype", "dtype"])? {
        "bfloat16" => "BF16".to_owned(),
        "float16" => "F16".to_owned(),
        "float32" => "F32".to_owned(),
        other => shown(other.to_ascii_uppercase().as_bytes()),
    })
}
