//! How long to wait before the next start.

use std::time::Duration;

use thiserror::Error;

use crate::Draw;

/// Exponential backoff with proportional jitter that is applied at the cap too, so that replicas that fail together do
/// not come back together: the n-th delay lies in `[v·(1 − jitter), v]` with `v = min(max, initial·factorⁿ)`
/// (`jitter = 0.5` is AWS's "equal jitter").
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BackoffPolicy {
    initial: Duration,
    max: Duration,
    factor: f64,
    jitter: f64,
    reset_after: Duration,
}

/// Why numbers make no backoff.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
#[non_exhaustive]
pub enum BackoffError {
    /// The first delay is zero.
    #[error("initial must be longer than zero")]
    InitialZero,
    /// The cap can never apply.
    #[error("max {max:?} is shorter than initial {initial:?}")]
    MaxBelowInitial {
        /// The first delay.
        initial: Duration,
        /// The cap.
        max: Duration,
    },
    /// Delays would shrink, or the factor is no number.
    #[error("factor must be a number from 1 to 100")]
    Factor,
    /// Jitter outside its range.
    #[error("jitter must be a number from 0 to 1")]
    Jitter,
    /// Every engine would come back at once, however often it dies.
    #[error("reset_after must be longer than zero")]
    ResetAfterZero,
}

impl Default for BackoffPolicy {
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(1),
            max: Duration::from_secs(60),
            factor: 2.0,
            jitter: 0.5,
            reset_after: Duration::from_secs(600),
        }
    }
}

impl BackoffPolicy {
    /// A checked policy.
    ///
    /// # Errors
    /// When the numbers contradict each other or could never fire.
    pub fn new(
        initial: Duration,
        max: Duration,
        factor: f64,
        jitter: f64,
        reset_after: Duration,
    ) -> Result<Self, BackoffError> {
        if initial.is_zero() {
            return Err(BackoffError::InitialZero);
        }
        if max < initial {
            return Err(BackoffError::MaxBelowInitial { initial, max });
        }
        if !(1.0..=100.0).contains(&factor) {
            return Err(BackoffError::Factor);
        }
        if !(0.0..=1.0).contains(&jitter) {
            return Err(BackoffError::Jitter);
        }
        if reset_after.is_zero() {
            return Err(BackoffError::ResetAfterZero);
        }
        Ok(Self { initial, max, factor, jitter, reset_after })
    }

    /// How long an engine must have been Ready for its next crash to be forgiven.
    #[must_use]
    pub fn reset_after(&self) -> Duration {
        self.reset_after
    }

    /// The longest delay.
    #[must_use]
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The range in which the delay after `failures` earlier failures lies.
    #[must_use]
    pub fn bounds(&self, failures: u32, multiplier: f64) -> (Duration, Duration) {
        let grown =
            self.initial.as_secs_f64() * self.factor.powi(i32::try_from(failures.min(10_000)).unwrap_or(10_000));
        let v = (grown * multiplier.max(0.0)).min(self.max.as_secs_f64());
        (Duration::from_secs_f64(v * (1.0 - self.jitter)), Duration::from_secs_f64(v))
    }
}

/// The failures counted so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Continues a count kept on disk.
    #[must_use]
    pub fn resume(failures: u32) -> Self {
        Self { failures }
    }

    /// Failures since the last reset.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Counts a failure and says how long to wait.
    pub fn next_delay(&mut self, policy: &BackoffPolicy, multiplier: f64, draw: Draw) -> Duration {
        let (low, high) = policy.bounds(self.failures, multiplier);
        self.failures = self.failures.saturating_add(1);
        low + (high - low).mul_f64(draw.get())
    }

    /// Forgets the failures.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn defaults_follow_the_promise() {
        let p = BackoffPolicy::default();
        let highs: Vec<u64> = (0..8).map(|n| p.bounds(n, 1.0).1.as_secs()).collect();
        assert_eq!(highs, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn numbers_that_can_never_fire_are_rejected() {
        let s = Duration::from_secs;
        assert_eq!(BackoffPolicy::new(s(0), s(1), 2.0, 0.5, s(1)), Err(BackoffError::InitialZero));
        assert!(matches!(BackoffPolicy::new(s(2), s(1), 2.0, 0.5, s(1)), Err(BackoffError::MaxBelowInitial { .. })));
        for f in [0.5, f64::NAN, f64::INFINITY] {
            assert_eq!(BackoffPolicy::new(s(1), s(2), f, 0.5, s(1)), Err(BackoffError::Factor));
        }
        assert_eq!(BackoffPolicy::new(s(1), s(2), 2.0, 1.5, s(1)), Err(BackoffError::Jitter));
        assert_eq!(BackoffPolicy::new(s(1), s(2), 2.0, 0.5, s(0)), Err(BackoffError::ResetAfterZero));
    }

    #[test]
    fn still_jittered_at_the_cap() {
        let p = BackoffPolicy::default();
        let delays: Vec<f64> = (0..1000)
            .map(|i| Backoff::resume(20).next_delay(&p, 1.0, Draw::new(f64::from(i) / 1000.0)).as_secs_f64())
            .collect();
        let mean = delays.iter().sum::<f64>() / 1000.0;
        let sd = (delays.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 1000.0).sqrt();
        // A uniform draw over [cap/2, cap] has a standard deviation of cap/2/√12 ≈ 0.144·cap.
        assert!(sd > 0.14 * p.max().as_secs_f64(), "{sd}");
    }

    proptest! {
        #[test]
        fn within_bounds(initial in 1u64..100_000, extra in 0u64..1_000_000, factor in 1.0f64..10.0, jitter in 0.0f64..=1.0,
                         n in 0u32..100_000, multiplier in 0.0f64..100.0, draw in 0.0f64..1.0) {
            let ms = Duration::from_millis;
            let p = BackoffPolicy::new(ms(initial), ms(initial + extra), factor, jitter, ms(1)).unwrap();
            let (low, high) = p.bounds(n, multiplier);
            let d = Backoff::resume(n).next_delay(&p, multiplier, Draw::new(draw));
            prop_assert!(low <= d && d <= high && high <= p.max() + Duration::from_micros(1));
        }
    }
}
