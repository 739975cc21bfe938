//! How much an engine does and how fast it is: totals over all engines of the replica, and a speed that is remembered for
//! the next one of the same kind.

use std::sync::Arc;

use pool_domain::PoolId;
use pool_domain::meters::{Growth, Meters, Reading};
use pool_domain::perf::{Perf, PerfHints, PerfKey, Speeds};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::ports::StateLedger;

/// A speed, and what it belongs to.
type Known = (PerfKey, Perf);

/// Keeps speeds on disk, beside the driver, which never waits for one.
#[derive(Debug)]
pub(crate) struct SpeedBook(watch::Sender<Option<Known>>);

impl SpeedBook {
    /// Starts to keep what is told. The task ends, with the last of it written, once this is dropped.
    pub(crate) fn start(pool: PoolId, ledger: Arc<dyn StateLedger>, tasks: &TaskTracker) -> Self {
        let (tx, told) = watch::channel(None);
        tasks.spawn(async move {
            let write = |known: Option<Known>| {
                let (ledger, pool) = (Arc::clone(&ledger), pool.clone());
                async move {
                    match known {
                        Some((key, perf)) => ledger.note_speed(&pool, &key, perf).await,
                        None => Ok(()),
                    }
                }
            };
            crate::remember::keep(told, write, |error| {
                tracing::warn!(pool_id = %pool, %error, "how fast its engines are will not survive a restart of the daemon");
            })
            .await;
        });
        Self(tx)
    }
}

/// The numbers of one replica.
#[derive(Debug)]
pub(crate) struct Pace {
    meters: Meters,
    /// The same of answers that passed through here, which are counted over all engines.
    answers: Meters,
    speeds: Speeds,
    perf: Perf,
    /// What the speed belongs to; unset before the first engine.
    key: Option<PerfKey>,
    written: Perf,
    book: SpeedBook,
}

impl Pace {
    /// What is known before there is an engine.
    pub(crate) fn new(speeds: Speeds, model: &str, book: SpeedBook) -> Self {
        let perf = speeds.of_model(model).unwrap_or_default();
        Self {
            meters: Meters::default(),
            answers: Meters::default(),
            speeds,
            perf,
            key: None,
            written: Perf::default(),
            book,
        }
    }

    /// Another model is to be served.
    pub(super) fn of_model(&mut self, model: &str) {
        self.rest();
        if self.key.take_if(|key| key.model != model).is_some() {
            self.perf = self.speeds.of_model(model).unwrap_or_default();
        }
    }

    /// An engine begins.
    pub(super) fn begin(&mut self, key: PerfKey) {
        self.meters.begin();
        self.now_of(key);
    }

    /// One of an earlier daemon is taken over.
    pub(super) fn take_over(&mut self, key: PerfKey) {
        self.meters.take_over();
        self.now_of(key);
    }

    fn now_of(&mut self, key: PerfKey) {
        let known = self.speeds.of(&key);
        self.perf = known.unwrap_or_default();
        self.written = self.perf;
        self.key = Some(key);
    }

    /// It proved that it serves, in this time.
    pub(super) fn proved(&mut self, first_unit_ms: u64) {
        self.perf = self.perf.seeded(first_unit_ms);
        self.write_if(Perf::worth_writing);
    }

    /// It was looked at. What was seen of its answers counts where it does not tell the same itself.
    pub(super) fn read(&mut self, told: Reading, seen: Reading) {
        let (by_engine, by_answers) = (self.meters.read(told), self.answers.read(seen));
        let grown = Growth {
            first_token: if told.first_token.is_some() { by_engine.first_token } else { by_answers.first_token },
            decode: if told.decode.is_some() { by_engine.decode } else { by_answers.decode },
        };
        self.perf = self.perf.and(&grown);
        self.write_if(Perf::worth_writing);
    }

    /// Nothing runs any more, or nothing will be learnt for a while.
    pub(super) fn rest(&mut self) {
        self.meters.end();
        self.write_if(|now, written| now != written);
    }

    fn write_if(&mut self, worth: impl FnOnce(&Perf, &Perf) -> bool) {
        let Some(key) = &self.key else { return };
        if worth(&self.perf, &self.written) {
            self.written = self.perf;
            self.speeds.keep(key.clone(), self.perf);
            self.book.0.send_replace(Some((key.clone(), self.perf)));
        }
    }

    pub(super) fn shown(&self) -> Reading {
        self.meters.shown()
    }

    pub(crate) fn hints(&self) -> PerfHints {
        self.perf.hints()
    }
}
