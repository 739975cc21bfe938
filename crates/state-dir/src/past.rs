//! The wire form of what is held against a replica. Ticks mean something only with the boot they belong to.

use std::time::{Duration, UNIX_EPOCH};

use pool_domain::lifecycle::Past;
use pool_domain::{BreakerState, FailureClass, Generation, Tick};
use pool_services::snapshot::LastError;
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
    /// Unset in records of before there was such a number; who does not know it passes over it.
    #[serde(default)]
    counted: u64,
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
            counted: past.counted.0,
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
        let past = Past {
            failures: self.failures,
            breaker,
            not_before: self.not_before.map(Tick),
            restarts: self.restarts,
            counted: Generation(self.counted),
        };
        if self.boot_id == boot_id { past } else { past.carried_over(Tick(self.noted), now) }
    }
}

/// The last failure of a replica, as people are told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ErrorRecord {
    class: String,
    detail: String,
    /// Milliseconds since 1970.
    at: u64,
}

impl From<&LastError> for ErrorRecord {
    fn from(e: &LastError) -> Self {
        let at = e.at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Self { class: e.class.code().to_owned(), detail: e.detail.clone(), at: u64::try_from(at).unwrap_or(u64::MAX) }
    }
}

impl ErrorRecord {
    /// `None` for a class that this version does not know.
    pub(crate) fn read(&self) -> Option<LastError> {
        Some(LastError {
            class: FailureClass::from_code(&self.class)?,
            detail: self.detail.clone(),
            at: UNIX_EPOCH.checked_add(Duration::from_millis(self.at))?,
        })
    }
}
