//! How much memory a model needs on each device.
//!
//! Arithmetic only: no file is read and nothing is measured. What an engine will take is known before it starts from the
//! model's header and the engine's settings; how near that comes to the real engine is in `docs/estimates.md`, made by
//! `cargo xtask estimates`. An estimate is a filter for admission, never a proof: the engine's own failure to allocate
//! is the truth, and what it really took is learnt (`learnt`).

mod compute;
pub mod learnt;
pub mod llama_cpp;
#[cfg(test)]
mod tests;
pub mod vllm;

use std::fmt;
use std::str::FromStr;

pub use learnt::{Correction, CorrectionKey, WORTH_A_TRY};
pub use llama_cpp::{FlashAttention, LlamaCppSettings, Outputs, estimate, estimate_single, layer_loads, output_load};
pub use vllm::VllmSettings;

/// One MiB.
pub const MIB: u64 = 1 << 20;

/// What a number of the KV cache is stored as. Blocks of 32 numbers share a scale, so bytes are counted in blocks.
///
/// Source: block layouts of ggml (`ggml-common.h`), as the reference's 34/32 and 18/32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvType {
    /// 4 bytes.
    F32,
    /// 2 bytes; what llama.cpp uses unless told.
    #[default]
    F16,
    /// 2 bytes.
    Bf16,
    /// 34 bytes for 32 numbers.
    Q8_0,
    /// 18 bytes for 32 numbers.
    Q4_0,
    /// 20 bytes for 32 numbers.
    Q4_1,
    /// 18 bytes for 32 numbers.
    Iq4Nl,
    /// 22 bytes for 32 numbers.
    Q5_0,
    /// 24 bytes for 32 numbers.
    Q5_1,
}

impl KvType {
    /// All of them, the widest first.
    pub const ALL: [Self; 9] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q5_1, Self::Q5_0, Self::Q4_1, Self::Q4_0, Self::Iq4Nl];

    /// Bytes of 32 numbers; exact.
    #[must_use]
    pub const fn bytes_per_32(self) -> u64 {
        match self {
            Self::F32 => 128,
            Self::F16 | Self::Bf16 => 64,
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
        }
    }

    /// Bytes of `numbers` numbers that lie together; a block begun is a whole one.
    #[must_use]
    pub const fn bytes(self, numbers: u64) -> u64 {
        if self.is_quantized() {
            numbers.div_ceil(32).saturating_mul(self.bytes_per_32())
        } else {
            numbers.saturating_mul(self.bytes_per_32() / 32)
        }
    }

    /// Whether numbers share a scale.
    #[must_use]
    pub const fn is_quantized(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The name that llama.cpp's `--cache-type-k` takes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Iq4Nl => "iq4_nl",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No KV type has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no KV cache type (known are f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl)")]
pub struct UnknownKvType(pub String);

impl FromStr for KvType {
    type Err = UnknownKvType;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| UnknownKvType(s.to_owned()))
    }
}

/// What an engine takes on one device, or in the host's memory. Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceEstimate {
    /// Tensors of the model.
    pub weights: u64,
    /// Keys and values, and the states of recurrent layers, of all slots.
    pub kv: u64,
    /// Intermediate results.
    pub compute: u64,
    /// What the runtime takes for itself: a CUDA context, kernels, scratch of libraries.
    pub runtime: u64,
    /// What is kept free because an estimate is one.
    pub margin: u64,
}

impl DeviceEstimate {
    /// What the engine is expected to take, without the margin.
    #[must_use]
    pub fn expected(&self) -> u64 {
        [self.kv, self.compute, self.runtime].into_iter().fold(self.weights, u64::saturating_add)
    }

    /// What has to be promised: everything together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.expected().saturating_add(self.margin)
    }
}

/// What an engine takes, device by device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// One entry a device, in the order of the assignment.
    pub devices: Vec<DeviceEstimate>,
    /// The host's memory: the input embedding, layers that are not on a device, buffers of results. Runtime and margin
    /// are 0: the host's memory is not promised.
    pub host: DeviceEstimate,
    /// Whether models of this architecture were compared with the real engine (`docs/estimates.md`); if not, the formulas
    /// are those of the family it resembles.
    pub compared: bool,
}

impl MemoryEstimate {
    /// The largest total of a device: what a mask without a split must offer on each.
    #[must_use]
    pub fn worst(&self) -> u64 {
        self.devices.iter().map(DeviceEstimate::total).max().unwrap_or(0)
    }
}

/// What is added to the engine's own sizes on each device it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overheads {
    /// Taken by the runtime.
    pub runtime: u64,
    /// Least margin.
    pub margin_min: u64,
    /// Margin as a part of what is expected, in percent.
    pub margin_percent: u64,
}

impl Default for Overheads {
    /// Runtime: 457 MiB, the most of what peers count for a CUDA context (Ollama 457 MiB, gguf-parser 250 MiB).
    /// Margin: the larger of 512 MiB and 5 %, the reference's advice (§2.7); llama.cpp's own fit leaves 1024 MiB free.
    fn default() -> Self {
        Self { runtime: 457 * MIB, margin_min: 512 * MIB, margin_percent: 5 }
    }
}

impl Overheads {
    /// Nothing added: the engine's own sizes, to compare with what it prints.
    pub const NONE: Self = Self { runtime: 0, margin_min: 0, margin_percent: 0 };

    /// Adds runtime and margin to a device that is used at all.
    fn add_to(self, device: &mut DeviceEstimate) {
        if device.expected() == 0 {
            return;
        }
        device.runtime = self.runtime;
        let part = u128::from(device.expected()) * u128::from(self.margin_percent) / 100;
        device.margin = self.margin_min.max(u64::try_from(part).unwrap_or(u64::MAX));
    }
}

/// Why no estimate can be made. In every case the pool's `vram = SIZE` stands in for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EstimateError {
    /// The engine keeps things for this architecture that the header does not tell.
    #[error("the memory of {0:?} models cannot be estimated: set `vram`")]
    Architecture(String),
    /// The header lacks what the formulas need.
    #[error("the model's header does not say {0}: set `vram`")]
    Shape(&'static str),
    /// A setting that no engine accepts.
    #[error("{0}")]
    Setting(&'static str),
    /// The assignment has not one entry a layer, or names a device that is not there.
    #[error("{layers} layers are assigned to devices, the model has {expected}")]
    Assignment {
        /// Entries of the assignment.
        layers: usize,
        /// Layers of the model.
        expected: usize,
    },
}
