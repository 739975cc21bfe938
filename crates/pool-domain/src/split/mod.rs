//! Which layers of a model go to which device. Opt-in: without it an engine gets one device.
//!
//! Two ways of splitting: whole layers over devices of any size ([`SplitPlan`], llama.cpp), and equal shares of every
//! layer ([`TensorParallelPlan`], vLLM and its like).

mod balance;
mod parallel;
mod plan;
mod ratios;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::reserve::gib;

pub use parallel::{TensorParallelInput, TensorParallelPlan};
pub use plan::{DeviceShare, KvCap, SplitDevice, SplitInput, SplitPlan};
pub use ratios::{Offload, SplitRatios, assign, assign_as};

/// Most devices one engine is split over: llama.cpp's `--tensor-split` takes fewer entries than its
/// `llama_max_devices()`, which is 16.
pub const MAX_DEVICES: usize = 15;

/// Most repeating layers: llama.cpp's `LLAMA_MAX_LAYERS`.
pub const MAX_LAYERS: usize = 512;

/// Why something is no split. Every variant names what is wrong and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SplitError {
    /// Nothing to split over.
    #[error("the split is empty: write one ratio for each device, such as \"3,1\"")]
    Empty,
    /// A ratio that is no number.
    #[error("split entry {place}, `{entry}`, is no number: write ratios such as \"3,1\" or \"0.6,0.4\"")]
    Malformed {
        /// Which entry, from 1.
        place: usize,
        /// The entry.
        entry: String,
    },
    /// NaN, infinite, or beyond what the engine can read.
    #[error("split entry {place}, `{entry}`, is not finite: write a number from 0 to 1e30")]
    NotFinite {
        /// Which entry, from 1.
        place: usize,
        /// The entry.
        entry: String,
    },
    /// Below zero.
    #[error("split entry {place}, `{entry}`, is negative: a device that shall get nothing has 0")]
    Negative {
        /// Which entry, from 1.
        place: usize,
        /// The entry.
        entry: String,
    },
    /// So small that the engine refuses to read it.
    #[error("split entry {place}, `{entry}`, is too close to 0: write 0 for a device that shall get nothing")]
    TooSmall {
        /// Which entry, from 1.
        place: usize,
        /// The entry.
        entry: String,
    },
    /// All zero, which llama.cpp reads as "by free memory".
    #[error("every entry of the split is 0: at least one device must get something")]
    AllZero,
    /// More entries than devices.
    #[error("split entry {place}, `{entry}`, is one too many: the mask has {devices} devices")]
    TooMany {
        /// The first superfluous entry, from 1.
        place: usize,
        /// The entry.
        entry: String,
        /// Devices of the mask.
        devices: usize,
    },
    /// More devices than an engine takes.
    #[error("a split over {devices} devices is too wide: engines take at most {MAX_DEVICES}")]
    TooManyDevices {
        /// Devices asked for.
        devices: usize,
    },
    /// A model without layers, or with more than an engine takes.
    #[error("a model of {layers} layers cannot be split: engines take 1 to {MAX_LAYERS}")]
    Layers {
        /// Its layers.
        layers: usize,
    },
    /// The loads do not add up.
    #[error("{0}")]
    Loads(&'static str),
    /// The engine would read the ratios as another assignment.
    #[error("no ratios make the engine place the layers as planned")]
    NotExpressible,
    /// Attention heads cannot be shared out evenly.
    #[error("{heads} {what} cannot be shared evenly by {devices} devices: use {possible}")]
    Heads {
        /// Which heads.
        what: &'static str,
        /// How many there are.
        heads: u32,
        /// Devices asked for.
        devices: usize,
        /// Numbers of devices that would work, as text.
        possible: String,
    },
}

/// A device that is too small for its share. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// Its place in the mask, from 0.
    pub device: usize,
    /// Its UUID.
    pub uuid: String,
    /// What its share needs.
    pub needed: u64,
    /// What it has for us.
    pub usable: u64,
}

impl Miss {
    /// Bytes that are missing.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.needed.saturating_sub(self.usable)
    }
}

/// A plan that does not fit: by how much, and where.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}", self.text())]
pub struct SplitShortfall {
    /// The devices that are too small; at least one.
    pub misses: Vec<Miss>,
    /// The device whose room for the KV cache is used up first and so caps the context of all, if any keeps KV.
    pub capped_by: Option<usize>,
}

impl SplitShortfall {
    /// Bytes missing on all devices together.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.misses.iter().map(Miss::missing).fold(0, u64::saturating_add)
    }

    fn text(&self) -> String {
        let one =
            |m: &Miss| format!("{} needs {}, which is {} more than it has", m.uuid, gib(m.needed), gib(m.missing()));
        self.misses.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// The largest multiple of `step`, up to `most`, that fits; `None` if not even one step does. What fits must also fit
/// when smaller. `most` itself is tried too, though it be no multiple. For contexts in tokens, with `step` the
/// engine's padding; `fits` plans a split or an estimate anew.
pub fn largest_context(fits: impl Fn(u64) -> bool, most: u64, step: u64) -> Option<u64> {
    let step = step.max(1);
    if most > 0 && fits(most) {
        return Some(most);
    }
    // low steps fit (none at all always do), high steps do not
    let (mut low, mut high) = (0, most.div_ceil(step));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle * step) {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low > 0).then_some(low * step)
}
