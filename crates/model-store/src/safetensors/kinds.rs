//! Which layers attend, how far, and which keep a state.
//!
//! From the configuration classes of `transformers` (defaults of `layer_types` there, patterns of older configs) and the
//! state shapes of vLLM's `MambaStateShapeCalculator`.

use serde_json::Value;

use super::config::Keys;
use crate::ProfileError;
use crate::profile::shown;

/// What a layer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Keys and values; of so many tokens, where that is bounded.
    Attention(Option<u64>),
    /// A state.
    State,
    /// Both.
    Both,
    /// Neither: a feed-forward layer by itself.
    Neither,
}

impl Kind {
    pub(super) fn attends(&self) -> bool {
        matches!(self, Self::Attention(_) | Self::Both)
    }

    pub(super) fn keeps_state(&self) -> bool {
        matches!(self, Self::State | Self::Both)
    }
}

/// The kind of each layer.
pub(super) fn kinds(keys: &Keys, architecture: &str, count: u32) -> Result<Vec<Kind>, ProfileError> {
    let all = |kind: Kind| Ok(vec![kind; count as usize]);
    let by = |kind: &dyn Fn(u32) -> Kind| Ok((0..count).map(kind).collect());
    match architecture {
        "mamba" | "mamba2" | "falcon_mamba" => return all(Kind::State),
        "falcon_h1" => return all(Kind::Both),
        "rwkv" | "rwkv6" | "rwkv7" | "recurrent_gemma" | "zamba" | "zamba2" => {
            return Err(ProfileError::Architecture(shown(architecture.as_bytes())));
        }
        "jamba" => {
            let period = keys.number(&["attn_layer_period"])?.unwrap_or(8).max(1);
            let offset = keys.number(&["attn_layer_offset"])?.unwrap_or(4);
            return by(&|i| if i % period == offset { Kind::Attention(None) } else { Kind::State });
        }
        "bamba" => {
            let attends = numbers(keys, "attn_layer_indices");
            return by(&|i| if attends.contains(&i) { Kind::Attention(None) } else { Kind::State });
        }
        "nemotron_h" => {
            let pattern = keys.text(&["hybrid_override_pattern"]).unwrap_or_default();
            let kinds: Vec<Kind> = pattern
                .bytes()
                .take(count as usize + 1)
                .map(|c| match c {
                    b'M' => Kind::State,
                    b'*' => Kind::Attention(None),
                    _ => Kind::Neither,
                })
                .collect();
            if kinds.len() != count as usize {
                return Err(ProfileError::value("hybrid_override_pattern", format!("it is not of {count} layers")));
            }
            return Ok(kinds);
        }
        _ => {}
    }
    let window = window(keys, architecture)?;
    if let Some(types) = keys.list("layer_types").or_else(|| keys.list("layers_block_type")) {
        if types.len() != count as usize {
            let problem = format!("it has {} values for {count} layers", types.len());
            return Err(ProfileError::value("layer_types", problem));
        }
        let chunk = keys.number(&["attention_chunk_size"])?.map(u64::from);
        let kind = |v: &Value| match v.as_str() {
            Some("sliding_attention") => Ok(Kind::Attention(window)),
            Some("chunked_attention") => Ok(Kind::Attention(chunk.or(window))),
            Some("full_attention" | "attention" | "global_attention") => Ok(Kind::Attention(None)),
            Some("linear_attention" | "mamba" | "conv" | "recurrent") => Ok(Kind::State),
            _ => {
                let text = v.as_str().unwrap_or_default();
                Err(ProfileError::value("layer_types", format!("`{}` is not known", shown(text.as_bytes()))))
            }
        };
        return types.iter().map(kind).collect();
    }
    let attends = |bounded: bool| Kind::Attention(window.filter(|_| bounded));
    match architecture {
        "qwen3_next" | "qwen3_5" | "qwen3_5_moe" | "qwen3_5_text" | "qwen3_5_moe_text" => {
            let every = keys.number(&["full_attention_interval"])?.unwrap_or(4).max(1);
            by(&|i| if (i + 1).is_multiple_of(every) { Kind::Attention(None) } else { Kind::State })
        }
        "lfm2" | "lfm2_moe" => {
            let full = numbers(keys, "full_attn_idxs");
            by(&|i| if full.contains(&i) { Kind::Attention(None) } else { Kind::State })
        }
        "llama4" | "llama4_text" => {
            let chunk = u64::from(keys.number(&["attention_chunk_size"])?.unwrap_or(8192));
            by(&|i| Kind::Attention((!(i + 1).is_multiple_of(4)).then_some(chunk)))
        }
        "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe" => {
            let first = keys.number(&["max_window_layers"])?.unwrap_or(28);
            by(&|i| attends(i >= first))
        }
        _ => {
            let default = match architecture {
                "gemma2" | "gpt_oss" => Some(2),
                "gemma3" | "gemma3_text" => Some(6),
                "gemma3n" | "gemma3n_text" => Some(5),
                "cohere2" | "exaone4" | "olmo3" => Some(4),
                _ => None,
            };
            match keys.number(&["sliding_window_pattern", "_sliding_window_pattern"]).ok().flatten().or(default) {
                Some(every) if every > 0 => by(&|i| attends(!(i + 1).is_multiple_of(every))),
                _ => all(attends(true)),
            }
        }
    }
}

/// Tokens that a bounded layer looks back.
fn window(keys: &Keys, architecture: &str) -> Result<Option<u64>, ProfileError> {
    // The Qwen family carries a window that it does not use unless told.
    let unused = match keys.flag("use_sliding_window") {
        Some(used) => !used,
        None => matches!(architecture, "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe"),
    };
    if unused {
        return Ok(None);
    }
    let window = keys.number(&["sliding_window", "sliding_window_size"])?;
    let default = match architecture {
        "gemma2" | "gemma3" | "gemma3_text" | "cohere2" => Some(4096),
        _ => None,
    };
    Ok(window.or(default.filter(|_| keys.get(&["sliding_window"]).is_none())).filter(|n| *n > 0).map(u64::from))
}

fn numbers(keys: &Keys, name: &str) -> Vec<u32> {
    let list = keys.list(name).map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_u64).filter_map(|n| u32::try_from(n).ok()).collect()
}

/// Bytes of one layer's state for one sequence, in f32.
pub(super) fn state_bytes(keys: &Keys, architecture: &str, embedding: u32) -> Result<u64, ProfileError> {
    let large = || ProfileError::Malformed("its layers would keep a state larger than any memory".to_owned());
    let need = |names: &[&str]| keys.need(names).map(u64::from);
    let embedding = u64::from(embedding);
    // Width of what is remembered of the last tokens, tokens remembered, numbers of the sum over all tokens.
    let (width, tokens, sum) = if architecture.starts_with("lfm2") {
        (Some(embedding), need(&["conv_L_cache"])? - 1, Some(0))
    } else if keys.get(&["linear_num_value_heads"]).is_some() {
        let (key, value) = (need(&["linear_key_head_dim"])?, need(&["linear_value_head_dim"])?);
        let values = need(&["linear_num_value_heads"])?.checked_mul(value).ok_or_else(large)?;
        let wide = need(&["linear_num_key_heads"])?.checked_mul(2 * key).and_then(|n| n.checked_add(values));
        (wide, need(&["linear_conv_kernel_dim"])? - 1, values.checked_mul(key))
    } else {
        let tokens = need(&["conv_kernel", "mamba_d_conv", "d_conv"])? - 1;
        let state = need(&["ssm_state_size", "state_size", "mamba_d_state", "d_state"])?;
        let heads = keys.number(&["mamba_n_heads", "mamba_num_heads"])?;
        let length = keys.number(&["mamba_d_head", "mamba_head_dim"])?;
        let inner = match (architecture, heads, length) {
            // Here `expand` may have a fraction, and the width is told.
            ("mamba" | "falcon_mamba", ..) => keys.number(&["intermediate_size"])?.map(u64::from),
            (_, Some(heads), Some(length)) => Some(u64::from(heads) * u64::from(length)),
            _ => keys.number(&["mamba_d_ssm"])?.map(u64::from),
        };
        let inner = match inner.filter(|n| *n > 0) {
            Some(inner) => inner,
            None => u64::from(keys.number(&["expand", "mamba_expand"])?.unwrap_or(2)).saturating_mul(embedding),
        };
        let groups = match architecture {
            "mamba" | "falcon_mamba" | "jamba" => 0,
            _ => u64::from(keys.number(&["n_groups", "mamba_n_groups"])?.unwrap_or(1)),
        };
        let wide = groups.checked_mul(2 * state).and_then(|n| n.checked_add(inner));
        (wide, tokens, inner.checked_mul(state))
    };
    let numbers = width.and_then(|n| n.checked_mul(tokens)).and_then(|n| n.checked_add(sum?));
    numbers.and_then(|n| n.checked_mul(4)).filter(|n| i64::try_from(*n).is_ok()).ok_or_else(large)
}
