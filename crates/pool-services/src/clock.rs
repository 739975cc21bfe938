//! The one clock.

use std::time::{Duration, SystemTime};

use pool_domain::Tick;
use tokio::time::Instant;

/// Tokio's clock as ticks, so that paused tests drive it, and the wall clock for display.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    origin: Instant,
    boot_ms: u64,
}

impl Clock {
    /// A clock that starts at `boot_ms` milliseconds of boot time.
    #[must_use]
    pub fn starting_at(boot_ms: u64) -> Self {
        Self { origin: Instant::now(), boot_ms }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Tick {
        Tick(self.boot_ms) + self.origin.elapsed()
    }

    /// Now, for people.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock, for display")]
    pub fn wall(&self) -> SystemTime {
        SystemTime::now()
    }

    /// Sleeps until a tick; for ever without one.
    pub async fn sleep_until(&self, tick: Option<Tick>) {
        match tick {
            Some(t) => {
                tokio::time::sleep_until(self.origin + Duration::from_millis(t.0.saturating_sub(self.boot_ms))).await;
            }
            None => std::future::pending().await,
        }
    }
}
