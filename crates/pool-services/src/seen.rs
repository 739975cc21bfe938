//! How fast answers of an engine were that passed through here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pool_domain::meters::{Reading, Spent};

/// A total of time and of what took it.
#[derive(Debug, Default)]
struct Total {
    micros: AtomicU64,
    count: AtomicU64,
}

impl Total {
    fn add(&self, took: Duration, count: u64) {
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(0), Ordering::Relaxed);
        self.count.fetch_add(count, Ordering::Relaxed);
    }

    fn spent(&self) -> Option<Spent> {
        let count = self.count.load(Ordering::Relaxed);
        let time = Duration::from_micros(self.micros.load(Ordering::Relaxed));
        (count > 0).then_some(Spent { seconds: time.as_secs_f64(), count })
    }
}

/// Totals over the answers of one replica.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    first_token: Total,
    decode: Total,
}

impl Seen {
    /// An answer began this long after the engine had the request.
    pub(crate) fn began(&self, after: Duration) {
        self.first_token.add(after, 1);
    }

    /// So many further tokens came within this.
    pub(crate) fn decoded(&self, took: Duration, tokens: u64) {
        self.decode.add(took, tokens);
    }

    /// As an engine would publish it.
    pub(crate) fn reading(&self) -> Reading {
        let (first_token, decode) = (self.first_token.spent(), self.decode.spent());
        Reading { first_token, decode, ..Reading::default() }
    }
}
