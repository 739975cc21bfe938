//! What an engine really took, learnt after Ready and used at the next start of the same model with the same settings.

use super::{DeviceEstimate, MemoryEstimate};

/// What a learnt figure belongs to. Both texts are made by whoever starts the engine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CorrectionKey {
    /// Digest of the model's header.
    pub model: String,
    /// Fingerprint of engine, version and everything that decides about memory.
    pub settings: String,
}

/// What was measured on one device of an engine that had become ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// Most bytes seen.
    pub taken: u64,
    /// How often it was measured.
    pub samples: u32,
}

/// Kept free above a learnt figure, which is read after one token: an engine's use still grows (scratch of a full
/// prefill, graphs captured for other batch sizes). As the least margin of an estimate.
pub const LEARNT_MARGIN: u64 = 512 << 20;

impl Correction {
    /// The first measurement.
    #[must_use]
    pub fn new(taken: u64) -> Self {
        Self { taken, samples: 1 }
    }

    /// One more measurement: the most counts, because it happened.
    #[must_use]
    pub fn and(self, taken: u64) -> Self {
        Self { taken: self.taken.max(taken), samples: self.samples.saturating_add(1) }
    }

    /// What to promise next time in place of the estimate's total: the learnt bytes and [`LEARNT_MARGIN`].
    ///
    /// The margin of an estimate covers not knowing; what was measured on the same model, settings and engine is known,
    /// so the promise may become smaller than the estimate (a card is not left half empty by caution) as well as larger
    /// (a start that would run out of memory is not tried). It never falls below weights, keys and values, which are
    /// exact: a smaller figure was read too early or belongs to another process.
    #[must_use]
    pub fn apply(self, estimate: &DeviceEstimate) -> u64 {
        let floor = estimate.weights.saturating_add(estimate.kv);
        self.taken.max(floor).saturating_add(LEARNT_MARGIN)
    }
}

impl MemoryEstimate {
    /// What to promise on each device: what was learnt there, else the estimate's total.
    #[must_use]
    pub fn promises(&self, learnt: &[Option<Correction>]) -> Vec<u64> {
        let known = learnt.iter().copied().chain(std::iter::repeat(None));
        let promise = |(device, learnt): (&DeviceEstimate, Option<Correction>)| {
            learnt.map_or(device.total(), |correction| correction.apply(device))
        };
        self.devices.iter().zip(known).map(promise).collect()
    }
}
