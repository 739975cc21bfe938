//! vLLM's memory: a fixed part of each device, whatever the model needs.

use super::{EstimateError, KvType};
use crate::model::ModelProfile;

/// Tokens of a block of the cache; only whole blocks are used.
const BLOCK: u64 = 16;

/// The settings that decide about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VllmSettings {
    /// `--gpu-memory-utilization` in thousandths: 920 is the 0.92 of newer versions, 900 that of older ones.
    pub utilization_permille: u32,
    /// `--kv-cache-dtype`; f16 or bf16 unless set.
    pub kv_type: KvType,
    /// Tensors are spread over this many devices.
    pub tensor_parallel: u32,
    /// `--max-num-batched-tokens`, which sizes the activations.
    pub batched_tokens: u64,
}

impl Default for VllmSettings {
    fn default() -> Self {
        Self { utilization_permille: 920, kv_type: KvType::Bf16, tensor_parallel: 1, batched_tokens: 8192 }
    }
}

/// What vLLM takes on a device, and what that leaves for its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VllmBudget {
    /// Bytes taken on the device, all in all.
    pub bytes: u64,
    /// Whether it starts: it refuses when less than that is free.
    pub starts: bool,
    /// Bytes by which free memory falls short.
    pub missing: u64,
    /// Bytes left for keys and values.
    pub kv: u64,
    /// Tokens that fit there, over all sequences.
    pub kv_tokens: u64,
}

/// Budget on one device.
///
/// Source: vLLM's `request_memory` and `gpu_worker`: the budget is `ceil(total × utilization)` of the device's *total*
/// memory, a start fails when less is free, and the cache gets the budget less weights and peak activation. The peak of
/// activations is measured by vLLM in a trial run; here it is the widest intermediate result of a layer for one batch.
///
/// # Errors
/// When the settings make no sense or the model has no attention shape.
pub fn budget(
    profile: &ModelProfile,
    settings: &VllmSettings,
    total: u64,
    free: u64,
) -> Result<VllmBudget, EstimateError> {
    if settings.utilization_permille == 0 || settings.utilization_permille > 1000 {
        return Err(EstimateError::Setting("gpu_memory_utilization lies above 0 and is at most 1"));
    }
    if profile.layers.is_empty() {
        return Err(EstimateError::Shape("how many layers it has"));
    }
    let shares = u64::from(settings.tensor_parallel.max(1));
    let product = u128::from(total) * u128::from(settings.utilization_permille);
    let bytes = u64::try_from(product.div_ceil(1000)).unwrap_or(u64::MAX);
    let widest = profile.layers.iter().map(|l| l.feed_forward_length).max().unwrap_or(0);
    let experts = u64::from(if profile.experts > 0 { profile.experts_used.max(1) } else { 1 });
    let width = widest.saturating_mul(experts).saturating_mul(2).saturating_add(profile.embedding_length);
    let activation = width.saturating_mul(settings.batched_tokens).saturating_mul(2) / shares;
    let taken = profile.tensor_bytes.div_ceil(shares).saturating_add(activation);
    let kv = bytes.saturating_sub(taken);
    let per_token = profile.layers.iter().filter_map(|l| l.kv).fold(0u64, |sum, shape| {
        // Heads are shared out; fewer heads than devices are kept by each, as is the one of MLA.
        let heads = u64::from(shape.heads_kv).div_ceil(shares);
        let length = u64::from(shape.key_length).saturating_add(u64::from(shape.value_length));
        sum.saturating_add(settings.kv_type.bytes(heads.saturating_mul(length)))
    });
    let kv_tokens = kv.checked_div(per_token).unwrap_or(0) / BLOCK * BLOCK;
    Ok(VllmBudget { bytes, starts: free >= bytes, missing: bytes.saturating_sub(free), kv, kv_tokens })
}
