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

/// What was seen of an engine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Correction {
    /// Most bytes seen on one device of an engine that had become ready; or what it was promised, if that was too little.
    /// 0: nothing was measured.
    pub taken: u64,
    /// How often it was measured.
    pub samples: u32,
    /// Bytes that were free to it, on all its devices together, when it ran out of memory while it started; 0: it did not,
    /// or has become ready since.
    pub short: u64,
}

/// Kept free above a learnt figure, which is read after one token: an engine's use still grows (scratch of a full
/// prefill, graphs captured for other batch sizes). As the least margin of an estimate.
pub const LEARNT_MARGIN: u64 = 512 << 20;

/// A start that ran out of memory is tried again only where so much more is free: less is what figures vary by.
pub const WORTH_A_TRY: u64 = 256 << 20;

impl Correction {
    /// The first measurement.
    #[must_use]
    pub fn new(taken: u64) -> Self {
        Self { taken, samples: 1, short: 0 }
    }

    /// One more measurement: the most counts, because it happened.
    #[must_use]
    pub fn and(self, taken: u64) -> Self {
        Self { taken: self.taken.max(taken), samples: self.samples.saturating_add(1), short: 0 }
    }

    /// It ran out of memory. `promised`: what it had on its one device by an estimate, which was too little; no more is
    /// believed of it than that a device of `usable` bytes still has room for the next promise. `room`: what was free to it
    /// on all its devices together; unset for one that had become ready, whose start needed no more.
    #[must_use]
    pub fn ran_out(self, promised: Option<u64>, usable: u64, room: Option<u64>) -> Self {
        let too_little = promised.unwrap_or(0).min(usable.saturating_sub(LEARNT_MARGIN));
        Self { taken: self.taken.max(too_little), short: room.map_or(self.short, |room| room.max(self.short)), ..self }
    }

    /// The same where no more than this was free at some moment since.
    #[must_use]
    pub fn since(self, lowest: u64) -> Self {
        Self { short: self.short.min(lowest), ..self }
    }

    /// Whether a start may be tried where so much is free to it.
    #[must_use]
    pub fn may_try(self, room: u64) -> bool {
        self.short == 0 || room >= self.short.saturating_add(WORTH_A_TRY)
    }

    /// Whether there is a figure that stands in for an estimate.
    #[must_use]
    pub fn is_measured(self) -> bool {
        self.taken > 0
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
