//! Stops restarting what does not get better.

use std::time::Duration;

use thiserror::Error;

use crate::Tick;

/// When a breaker opens and closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerPolicy {
    failed_starts: u32,
    early_crashes: u32,
    open_for: Duration,
    max_open_for: Duration,
    close_after: Duration,
}

/// Why numbers make no breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BreakerError {
    /// A threshold of zero would never let anything start.
    #[error("{0} must be at least 1")]
    ThresholdZero(&'static str),
    /// A time of zero.
    #[error("{0} must be longer than zero")]
    Zero(&'static str),
    /// The cap can never apply.
    #[error("max_open_for {max:?} is shorter than open_for {open:?}")]
    MaxBelowOpen {
        /// The first pause.
        open: Duration,
        /// The cap.
        max: Duration,
    },
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self {
            failed_starts: 5,
            early_crashes: 3,
            open_for: Duration::from_secs(30),
            max_open_for: Duration::from_secs(300),
            close_after: Duration::from_secs(60),
        }
    }
}

impl BreakerPolicy {
    /// A checked policy.
    ///
    /// # Errors
    /// When the numbers contradict each other or could never fire.
    pub fn new(
        failed_starts: u32,
        early_crashes: u32,
        open_for: Duration,
        max_open_for: Duration,
        close_after: Duration,
    ) -> Result<Self, BreakerError> {
        for (n, what) in [(failed_starts, "failed_starts"), (early_crashes, "early_crashes")] {
            if n == 0 {
                return Err(BreakerError::ThresholdZero(what));
            }
        }
        for (d, what) in [(open_for, "open_for"), (close_after, "close_after")] {
            if d.is_zero() {
                return Err(BreakerError::Zero(what));
            }
        }
        if max_open_for < open_for {
            return Err(BreakerError::MaxBelowOpen { open: open_for, max: max_open_for });
        }
        Ok(Self { failed_starts, early_crashes, open_for, max_open_for, close_after })
    }

    /// Failed starts in a row that open it.
    #[must_use]
    pub fn failed_starts(&self) -> u32 {
        self.failed_starts
    }

    /// Early crashes in a row that open it.
    #[must_use]
    pub fn early_crashes(&self) -> u32 {
        self.early_crashes
    }

    /// The first pause.
    #[must_use]
    pub fn open_for(&self) -> Duration {
        self.open_for
    }

    /// The longest pause.
    #[must_use]
    pub fn max_open_for(&self) -> Duration {
        self.max_open_for
    }

    /// How long an engine must be Ready for a half-open breaker to close.
    #[must_use]
    pub fn close_after(&self) -> Duration {
        self.close_after
    }

    fn pause(&self, trips: u32) -> Duration {
        self.open_for
            .saturating_mul(1u32.checked_shl(trips.saturating_sub(1)).unwrap_or(u32::MAX))
            .min(self.max_open_for)
    }
}

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Starts are free.
    Closed {
        /// Failed starts in a row.
        failed_starts: u32,
        /// Crashes in a row, each before the engine had been Ready for long.
        early_crashes: u32,
    },
    /// Nothing starts before `until`.
    Open {
        /// End of the pause.
        until: Tick,
        /// How often it opened since it was last closed.
        trips: u32,
    },
    /// One start is being tried.
    HalfOpen {
        /// How often it opened since it was last closed.
        trips: u32,
    },
}

/// A circuit breaker for starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CircuitBreaker {
    state: BreakerState,
}

impl Default for BreakerState {
    fn default() -> Self {
        Self::Closed { failed_starts: 0, early_crashes: 0 }
    }
}

impl CircuitBreaker {
    /// Goes on from a state kept on disk. No pause lasts beyond `latest`.
    #[must_use]
    pub fn resume(mut state: BreakerState, latest: Tick) -> Self {
        if let BreakerState::Open { until, .. } = &mut state {
            *until = (*until).min(latest);
        }
        Self { state }
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// The state as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self.state {
            BreakerState::Closed { .. } => "closed",
            BreakerState::Open { .. } => "open",
            BreakerState::HalfOpen { .. } => "half_open",
        }
    }

    /// When an open breaker lets one start through.
    #[must_use]
    pub fn open_until(&self) -> Option<Tick> {
        match self.state {
            BreakerState::Open { until, .. } => Some(until),
            BreakerState::Closed { .. } | BreakerState::HalfOpen { .. } => None,
        }
    }

    /// Asks for a start. An open breaker whose pause is over becomes half-open and admits exactly this one.
    pub fn admit(&mut self, now: Tick) -> bool {
        match self.state {
            BreakerState::Closed { .. } => true,
            BreakerState::HalfOpen { .. } => false,
            BreakerState::Open { until, trips } if now >= until => {
                self.state = BreakerState::HalfOpen { trips };
                true
            }
            BreakerState::Open { .. } => false,
        }
    }

    /// A start failed before Ready.
    pub fn failed_start(&mut self, policy: &BreakerPolicy, now: Tick) {
        match &mut self.state {
            BreakerState::Closed { failed_starts, .. } => {
                *failed_starts = failed_starts.saturating_add(1);
                if *failed_starts >= policy.failed_starts {
                    self.trip(policy, now, 1);
                }
            }
            BreakerState::HalfOpen { trips } => {
                let trips = trips.saturating_add(1);
                self.trip(policy, now, trips);
            }
            BreakerState::Open { .. } => {}
        }
    }

    /// An engine that had been Ready, but not for long, failed.
    pub fn early_crash(&mut self, policy: &BreakerPolicy, now: Tick) {
        match &mut self.state {
            BreakerState::Closed { early_crashes, .. } => {
                *early_crashes = early_crashes.saturating_add(1);
                if *early_crashes >= policy.early_crashes {
                    self.trip(policy, now, 1);
                }
            }
            BreakerState::HalfOpen { trips } => {
                let trips = trips.saturating_add(1);
                self.trip(policy, now, trips);
            }
            BreakerState::Open { .. } => {}
        }
    }

    /// A start that neither failed nor succeeded (stopped by hand, port taken): a trial may be tried again at once.
    pub fn inconclusive(&mut self, now: Tick) {
        if let BreakerState::HalfOpen { trips } = self.state {
            self.state = BreakerState::Open { until: now, trips };
        }
    }

    /// The engine is Ready: the row of failed starts ends.
    pub fn became_ready(&mut self) {
        if let BreakerState::Closed { failed_starts, .. } = &mut self.state {
            *failed_starts = 0;
        }
    }

    /// The engine has been Ready for `ready_for`.
    pub fn proved(&mut self, policy: &BreakerPolicy, ready_for: Duration) {
        if matches!(self.state, BreakerState::HalfOpen { .. }) && ready_for >= policy.close_after {
            self.reset();
        }
    }

    /// Closes it and forgets everything.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    fn trip(&mut self, policy: &BreakerPolicy, now: Tick, trips: u32) {
        self.state = BreakerState::Open { until: now + policy.pause(trips), trips };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn opens_after_five_failed_starts_and_doubles() {
        let p = BreakerPolicy::default();
        let mut b = CircuitBreaker::default();
        for _ in 0..4 {
            b.failed_start(&p, Tick(0));
            assert_eq!(b.code(), "closed");
        }
        b.failed_start(&p, Tick(0));
        let mut now = Tick(0);
        for pause in [30u64, 60, 120, 240, 300, 300] {
            let until = b.open_until().unwrap();
            assert_eq!(until.since(now).as_secs(), pause);
            assert!(!b.admit(until - Duration::from_millis(1)));
            now = until;
            assert!(b.admit(now) && !b.admit(now));
            b.failed_start(&p, now);
        }
    }

    #[test]
    fn three_early_crashes_open_and_sixty_seconds_ready_close() {
        let p = BreakerPolicy::default();
        let mut b = CircuitBreaker::default();
        for _ in 0..3 {
            b.became_ready();
            b.early_crash(&p, Tick(0));
        }
        assert_eq!(b.code(), "open");
        assert!(b.admit(Tick(30_000)));
        b.became_ready();
        b.proved(&p, Duration::from_secs(59));
        assert_eq!(b.code(), "half_open");
        b.proved(&p, Duration::from_secs(60));
        assert_eq!(b, CircuitBreaker::default());
    }

    proptest! {
        #[test]
        fn exactly_one_half_open_start(ops in prop::collection::vec((0u8..6, 0u64..400_000), 1..200)) {
            let p = BreakerPolicy::default();
            let mut b = CircuitBreaker::default();
            let mut now = Tick(0);
            let mut trial_running = false;
            for (op, dt) in ops {
                now = now + Duration::from_millis(dt);
                match op {
                    0 => b.failed_start(&p, now),
                    1 => b.early_crash(&p, now),
                    2 => b.became_ready(),
                    3 => b.proved(&p, Duration::from_millis(dt)),
                    _ => {
                        let was = b.state();
                        let ok = b.admit(now);
                        match was {
                            BreakerState::HalfOpen { .. } => prop_assert!(!ok && trial_running),
                            BreakerState::Open { until, .. } => prop_assert_eq!(ok, now >= until),
                            BreakerState::Closed { .. } => prop_assert!(ok),
                        }
                    }
                }
                trial_running = matches!(b.state(), BreakerState::HalfOpen { .. });
            }
        }
    }
}
