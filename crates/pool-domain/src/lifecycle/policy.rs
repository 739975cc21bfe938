//! The numbers a lifecycle runs by.

use std::time::Duration;

use crate::{BackoffPolicy, BreakerPolicy};

/// How long a start may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartPolicy {
    /// Longest time without any progress.
    pub stall: Duration,
    /// Longest time in all.
    pub max: Duration,
}

/// How a ready engine is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthPolicy {
    /// Time between checks.
    pub interval: Duration,
    /// Longest time one check may take.
    pub timeout: Duration,
    /// Misses in a row that end the engine; the second already makes it Suspect.
    pub failures: u32,
    /// Longest time a busy engine may show no progress where nothing would tell of it: while it reads a prompt, on a kind
    /// that does not say how far.
    pub busy_stall: Duration,
    /// Whether an idle engine is asked for one unit of work. Without, it may hang unseen until somebody needs it.
    pub canary: bool,
}

/// How an engine is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopPolicy {
    /// Between TERM and KILL.
    pub grace: Duration,
    /// Between KILL and Fenced.
    pub prove: Duration,
}

/// Everything together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Policy {
    /// Delays between starts.
    pub backoff: BackoffPolicy,
    /// When starting stops.
    pub breaker: BreakerPolicy,
    /// Start timers.
    pub start: StartPolicy,
    /// Health checks.
    pub health: HealthPolicy,
    /// Stop timers.
    pub stop: StopPolicy,
}

impl Default for StartPolicy {
    fn default() -> Self {
        Self { stall: Duration::from_secs(300), max: Duration::from_secs(1800) }
    }
}

impl Default for HealthPolicy {
    fn default() -> Self {
        // Three misses, begun ten seconds apart, the last answered or not within five: a hang is seen within 45 s, also
        // if what stands still moved for the last time just after a check.
        Self {
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            failures: 3,
            busy_stall: Duration::from_secs(300),
            canary: true,
        }
    }
}

impl Default for StopPolicy {
    fn default() -> Self {
        Self { grace: Duration::from_secs(30), prove: Duration::from_secs(10) }
    }
}

impl StopPolicy {
    /// The grace of a stop that is forced: a deadline has passed or `stop` was asked for. Everything is to be gone 2 s
    /// later, so what is deaf is killed a little earlier than that.
    #[must_use]
    pub fn forced_grace(&self) -> Duration {
        self.grace.min(Duration::from_millis(1_800))
    }
}
