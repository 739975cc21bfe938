//! The wire form of how fast an engine was.

use pool_domain::perf::{Mean, Perf, PerfKey};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpeedRecord {
    engine: String,
    model: String,
    mask: String,
    first_token: Option<MeanRecord>,
    token: Option<MeanRecord>,
}

/// In whole microseconds: the checksum of a record is over its text, and what a float is as text depends on who writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct MeanRecord {
    us: u64,
    samples: u64,
}

impl From<Mean> for MeanRecord {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is not negative; what is too big stays at the biggest"
    )]
    fn from(m: Mean) -> Self {
        Self { us: (m.ms * 1e3).round() as u64, samples: m.samples }
    }
}

impl From<MeanRecord> for Mean {
    #[expect(clippy::cast_precision_loss, reason = "microseconds")]
    fn from(r: MeanRecord) -> Self {
        Self { ms: r.us as f64 / 1e3, samples: r.samples }
    }
}

impl From<&(PerfKey, Perf)> for SpeedRecord {
    fn from((key, perf): &(PerfKey, Perf)) -> Self {
        let PerfKey { engine, model, mask } = key.clone();
        Self { engine, model, mask, first_token: perf.first_token.map(Into::into), token: perf.token.map(Into::into) }
    }
}

impl SpeedRecord {
    pub(crate) fn read(&self) -> (PerfKey, Perf) {
        let Self { engine, model, mask, .. } = self.clone();
        let perf = Perf { first_token: self.first_token.map(Into::into), token: self.token.map(Into::into) };
        (PerfKey { engine, model, mask }, perf)
    }
}
