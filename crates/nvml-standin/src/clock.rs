//! The wall's clock. A library in a foreign process has neither tokio's nor a test's.
#![expect(clippy::disallowed_types, clippy::disallowed_methods, reason = "a C library's calls block and see real time")]

use std::time::{Duration, Instant};

/// A moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment(Instant);

impl Moment {
    pub(crate) fn now() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}

/// Between two looks at a script, or at a file that keeps a call.
const LOOK: Duration = Duration::from_millis(50);

/// Waits for one look, or for what is left.
pub(crate) fn pause(at_most: Duration) {
    std::thread::sleep(LOOK.min(at_most));
}
