//! Writes down what consumers and a later daemon need to know, in a task of its own, so that a slow or full disk delays
//! nobody. Only the newest of each is written; what a disk refused is tried again.

use std::sync::Arc;
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::{Generation, ReplicaKey};
use tokio::sync::{oneshot, watch};

use crate::ports::{EngineRecord, Handoff, LedgerError, Phase, StateLedger};

/// Between two tries to write what could not be written.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// How often that is tried again for a replica that is no more, which keeps the state directory in use.
const LAST_TRIES: u32 = 300;

/// What is to stand of the engine.
#[derive(Debug, Clone, PartialEq)]
enum Kept {
    Record(Box<EngineRecord>),
    /// Nothing of this generation, nor of those before.
    Nothing(Generation),
}

impl Kept {
    /// The points before it is written and after.
    fn points(&self) -> [Option<Point>; 2] {
        match self {
            Self::Record(record) => match record.phase {
                Phase::Starting => [None, None],
                Phase::Ready { .. } => [Some(Point::BeforeReadyRecord), Some(Point::AfterReadyRecord)],
                Phase::Draining { .. } => [None, Some(Point::AfterDrainRecord)],
                Phase::Stopping => [Some(Point::BeforeStopRecord), Some(Point::AfterStopRecord)],
            },
            Self::Nothing(_) => [Some(Point::BeforeForget), Some(Point::AfterForget)],
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Wish {
    /// Grows with every change of `kept`.
    number: u64,
    /// Unset: as it was found, or as a start wrote it.
    kept: Option<Kept>,
    handoff: Option<Handoff>,
    /// Of which generation, and of those before.
    of: Generation,
}

/// The record and the handoff of one replica.
pub(super) struct Scribe {
    wanted: watch::Sender<Wish>,
    /// The number of the record that was tried last.
    tried: watch::Receiver<u64>,
    /// Told once everything was tried after the last wish.
    over: oneshot::Receiver<()>,
}

impl Scribe {
    pub(super) fn start(key: ReplicaKey, ledger: Arc<dyn StateLedger>) -> Self {
        let (wanted, wishes) = watch::channel(Wish::default());
        let (told, tried) = watch::channel(0);
        let (ends, over) = oneshot::channel();
        tokio::spawn(write(key, ledger, wishes, told, ends));
        Self { wanted, tried, over }
    }

    /// The handoff that is to stand from now on.
    pub(super) fn want(&self, of: Generation, handoff: Option<Handoff>) {
        self.wanted.send_modify(|w| (w.of, w.handoff) = (of, handoff));
    }

    pub(super) fn record(&self, record: EngineRecord) {
        self.keep(Kept::Record(Box::new(record)));
    }

    pub(super) fn forget(&self, generation: Generation) {
        self.keep(Kept::Nothing(generation));
    }

    fn keep(&self, kept: Kept) {
        self.wanted.send_modify(|w| {
            w.number += 1;
            w.kept = Some(kept);
        });
    }

    /// Resolves once nothing older than what is wanted now is being written any more: a start that writes a record of its
    /// own must not be overtaken by the last words about the engine before it.
    pub(super) fn tried(&self) -> impl Future<Output = ()> + Send + 'static {
        let (number, mut tried) = (self.wanted.borrow().number, self.tried.clone());
        async move {
            let _ = tried.wait_for(|t| *t >= number).await;
        }
    }

    /// Resolves once what is wanted was written or tried. What a disk refused is tried again for a while, beside whatever
    /// comes after.
    pub(super) async fn finish(self) {
        drop(self.wanted);
        // A task that panicked has nothing more to write.
        let _ = self.over.await;
    }
}

async fn write(
    key: ReplicaKey,
    ledger: Arc<dyn StateLedger>,
    mut wanted: watch::Receiver<Wish>,
    told: watch::Sender<u64>,
    ends: oneshot::Sender<()>,
) {
    // The handoff is unset while nobody knows: what a disk refused may stand all the same.
    let (mut written, mut stands) = (0, Some(None));
    let (mut open, mut ends) = (true, Some(ends));
    let mut tries_left = LAST_TRIES;
    let well = |done: Result<(), LedgerError>| {
        if let Err(e) = &done {
            tracing::warn!(pool_id = %key.pool, replica_id = %key.replica, error = %e, "not written down");
        }
        done.is_ok()
    };
    loop {
        let wish = wanted.borrow_and_update().clone();
        if wish.number != written {
            let [before, after] = wish.kept.as_ref().map(Kept::points).unwrap_or_default();
            before.into_iter().for_each(reached);
            let done = match &wish.kept {
                Some(Kept::Record(record)) => ledger.record(record).await,
                Some(Kept::Nothing(generation)) => ledger.forget(&key, *generation).await,
                None => Ok(()),
            };
            after.into_iter().for_each(reached);
            if well(done) {
                written = wish.number;
            }
            told.send_replace(wish.number);
        }
        if stands.as_ref() != Some(&wish.handoff) {
            let done = match &wish.handoff {
                Some(handoff) => {
                    reached(Point::BeforeHandoff);
                    let done = ledger.publish_handoff(handoff).await;
                    reached(Point::AfterHandoff);
                    done
                }
                None => ledger.withdraw_handoff(&key, wish.of).await,
            };
            stands = well(done).then(|| wish.handoff.clone());
        }
        // What was wished for meanwhile comes first.
        if wanted.has_changed().unwrap_or(false) {
            continue;
        }
        if !open {
            if let Some(ends) = ends.take() {
                // Nobody waits if the driver is gone without a word.
                let _ = ends.send(());
            }
            if stands.is_some() && wish.number == written || tries_left == 0 {
                return;
            }
            tries_left -= 1;
            tokio::time::sleep(TRY_AGAIN).await;
            continue;
        }
        tokio::select! {
            biased;
            changed = wanted.changed() => open = changed.is_ok(),
            () = tokio::time::sleep(TRY_AGAIN), if stands.is_none() || wish.number != written => {}
        }
    }
}
