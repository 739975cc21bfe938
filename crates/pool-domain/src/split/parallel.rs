//! Equal shares of every layer.

use super::{Miss, SplitDevice, SplitError, SplitShortfall};

/// What to share out, for engines that cut every layer (vLLM, SGLang, TGI, TensorRT-LLM). Sizes are bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorParallelInput<'a> {
    /// All weights.
    pub weights: u64,
    /// The KV cache of all KV heads.
    pub kv: u64,
    /// Attention heads.
    pub heads: u32,
    /// KV heads; with MLA 1.
    pub kv_heads: u32,
    /// The devices; the engine numbers its ranks in their order.
    pub devices: &'a [SplitDevice],
}

/// The same share for every device, so the smallest one caps the share of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorParallelPlan {
    /// Weights on each device, in bytes.
    pub weights: u64,
    /// KV cache on each device, in bytes.
    pub kv: u64,
    /// KV heads on each device.
    pub kv_heads: u32,
    /// How many devices hold the same KV head: 1, or more where there are fewer heads than devices.
    pub kv_replicas: u32,
    /// The devices.
    pub devices: Vec<SplitDevice>,
}

impl TensorParallelPlan {
    /// Equal shares. As in vLLM's `QKVParallelLinear`, every device gets the same number of attention heads and of KV
    /// heads; where there are fewer KV heads than devices each gets a copy of one.
    ///
    /// # Errors
    /// When heads do not divide; says with how many devices they would.
    pub fn compute(input: &TensorParallelInput<'_>) -> Result<Self, SplitError> {
        let devices = input.devices.len();
        let count = match u32::try_from(devices) {
            Ok(0) => return Err(SplitError::Empty),
            Ok(count) if count <= 1024 => count,
            _ => return Err(SplitError::TooManyDevices { devices }),
        };
        let divides = |n: u32| input.heads.is_multiple_of(n) && kv_divides(input.kv_heads, n);
        let uneven = |what, heads| {
            let possible: Vec<String> = (1..=count).filter(|n| divides(*n)).map(|n| n.to_string()).collect();
            SplitError::Heads { what, heads, devices, possible: possible.join(", ") }
        };
        if input.heads == 0 || !input.heads.is_multiple_of(count) {
            return Err(uneven("attention heads", input.heads));
        }
        if !kv_divides(input.kv_heads, count) {
            return Err(uneven("KV heads", input.kv_heads));
        }
        let kv_heads = (input.kv_heads / count).max(1);
        Ok(Self {
            weights: input.weights.div_ceil(u64::from(count)),
            kv: input.kv.div_ceil(u64::from(input.kv_heads.min(count).max(1))),
            kv_heads,
            kv_replicas: (count / input.kv_heads.max(1)).max(1),
            devices: input.devices.to_vec(),
        })
    }

    /// One ratio for each device; all alike, they sum to 1.
    #[must_use]
    pub fn ratios(&self) -> Vec<f32> {
        let count = u16::try_from(self.devices.len()).unwrap_or(u16::MAX);
        vec![1.0 / f32::from(count); self.devices.len()]
    }

    /// The most KV cache each device may hold: what the smallest has left beside its weights.
    #[must_use]
    pub fn kv_cap(&self) -> u64 {
        let room = |d: &SplitDevice| d.usable.saturating_sub(d.fixed).saturating_sub(self.weights);
        self.devices.iter().map(room).min().unwrap_or(0)
    }

    /// Proves that every device holds its share and none more KV cache than the smallest can.
    ///
    /// # Errors
    /// With the bytes that are missing, by device.
    pub fn validate(&self) -> Result<(), SplitShortfall> {
        let needed = |d: &SplitDevice| d.fixed.saturating_add(self.weights).saturating_add(self.kv);
        let too_small = |(device, d): (usize, &SplitDevice)| {
            (needed(d) > d.usable).then(|| Miss { device, uuid: d.uuid.clone(), needed: needed(d), usable: d.usable })
        };
        let misses: Vec<Miss> = self.devices.iter().enumerate().filter_map(too_small).collect();
        if misses.is_empty() {
            return Ok(());
        }
        let capped_by = misses.iter().max_by_key(|m| m.missing()).map(|m| m.device);
        Err(SplitShortfall { misses, capped_by })
    }
}

/// Whether so many KV heads can be shared, or copied, evenly. None at all (no attention) always can.
fn kv_divides(kv_heads: u32, devices: u32) -> bool {
    kv_heads == 0 || kv_heads.is_multiple_of(devices) || (kv_heads < devices && devices.is_multiple_of(kv_heads))
}
