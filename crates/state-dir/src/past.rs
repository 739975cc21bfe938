//! The wire form of what is held against a replica. Ticks mean something only with the boot they belong to.

use pool_domain::lifecycle::Past;
use pool_domain::{BreakerState, Tick};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PastRecord {
    boot_id: String,
    /// When it was written.
    noted: u64,
    failures: u32,
    breaker: BreakerRecord,
    not_before: Option<u64>,
    restarts: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum BreakerRecord {
    Closed { failed_starts: u32, early_crashes: u32 },
    Open { until: u64, trips: u32 },
    HalfOpen { trips: u32 },
}

impl PastRecord {
    pub(crate) fn new(past: Past, boot_id: String, now: Tick) -> Self {
        let breaker = match past.breaker {
            BreakerState::Closed { failed_starts, early_crashes } => {
                BreakerRecord::Closed { failed_starts, early_crashes }
            }
            BreakerState::Open { until, trips } => BreakerRecord::Open { until: until.0, trips },
            BreakerState::HalfOpen { trips } => BreakerRecord::HalfOpen { trips },
        };
        Self {
            boot_id,
            noted: now.0,
            failures: past.failures,
            breaker,
            not_before: past.not_before.map(|t| t.0),
            restarts: past.restarts,
        }
    }

    pub(crate) fn read(&self, boot_id: &str, now: Tick) -> Past {
        let breaker = match self.breaker {
            BreakerRecord::Closed { failed_starts, early_crashes } => {
                BreakerState::Closed { failed_starts, early_crashes }
            }
            BreakerRecord::Open { until, trips } => BreakerState::Open { until: Tick(until), trips },
            BreakerRecord::HalfOpen { trips } => BreakerState::HalfOpen { trips },
        };
        let past =
            Past { failures: self.failures, breaker, not_before: self.not_before.map(Tick), restarts: self.restarts };
        if self.boot_id == boot_id { past } else { past.carried_over(Tick(self.noted), now) }
    }
}
