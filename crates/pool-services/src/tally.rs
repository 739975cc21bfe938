//! How many guards of this process were granted and refused. Counted beside the admission words and not told one by one:
//! such a lease costs less than an event would.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::admission::Refused;
use crate::snapshot::GuardCounts;

/// The counts of one pool; nothing of them is shared with another. They say nothing about slots: the word does.
#[derive(Debug, Default)]
#[repr(align(128))] // no cache line of another pool's
pub(crate) struct Tally {
    granted: AtomicU64,
    saturated: AtomicU64,
    closed: AtomicU64,
}

impl Tally {
    pub(crate) fn granted(&self) {
        self.granted.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self, why: Refused) {
        let refused = match why {
            Refused::Saturated => &self.saturated,
            Refused::Closed => &self.closed,
        };
        refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count<T>(&self, answer: &Result<T, Refused>) {
        match answer {
            Ok(_) => self.granted(),
            Err(why) => self.refused(*why),
        }
    }

    pub(crate) fn read(&self) -> GuardCounts {
        let [granted, saturated, closed] =
            [&self.granted, &self.saturated, &self.closed].map(|n| n.load(Ordering::Relaxed));
        GuardCounts { granted, saturated, closed }
    }
}
