//! Time and chance as values.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Milliseconds of boot time (suspend included). Comparable only within one boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

impl Tick {
    /// Time from `earlier` to `self`; zero when `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Tick) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Tick {
    type Output = Tick;
    /// Saturates at the end of time, and rounds up so that a deadline is never early.
    fn add(self, d: Duration) -> Tick {
        Tick(self.0.saturating_add(u64::try_from(d.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Tick {
    type Output = Tick;
    fn sub(self, d: Duration) -> Tick {
        Tick(self.0.saturating_sub(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// A random draw in `[0, 1)`, made by the caller.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw(f64);

impl Draw {
    /// Clamps into `[0, 1)`; NaN becomes 0, so no source of chance can break a formula.
    #[must_use]
    pub fn new(value: f64) -> Self {
        if value.is_nan() { Self(0.0) } else { Self(value.clamp(0.0, 1.0 - f64::EPSILON)) }
    }

    /// The value in `[0, 1)`.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}
