//! Keeps the past of a replica on disk, beside the driver, which never waits for a disk.

use std::sync::Arc;

use pool_domain::ReplicaKey;
use pool_domain::lifecycle::Past;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::ports::StateLedger;
use crate::snapshot::LastError;

/// What is remembered of a replica.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Remembered {
    pub(crate) past: Past,
    /// For people.
    pub(crate) last_error: Option<LastError>,
}

/// The newest past of a replica; what was not written before the next change is not written at all.
#[derive(Debug)]
pub(crate) struct Memory(watch::Sender<Remembered>);

impl Memory {
    /// Starts to keep what is told, which is `so_far` until then. The task ends, with the last of it written, once this is
    /// dropped.
    pub(crate) fn start(
        key: ReplicaKey,
        so_far: Remembered,
        ledger: Arc<dyn StateLedger>,
        clock: Clock,
        tasks: &TaskTracker,
    ) -> Self {
        let (tx, told) = watch::channel(so_far);
        tasks.spawn(keep(key, told, ledger, clock));
        Self(tx)
    }

    /// Remembers this. Never waits.
    pub(crate) fn keep(&self, past: Past, last_error: Option<&LastError>) {
        self.0.send_if_modified(|kept| {
            let changed = kept.past != past || kept.last_error.as_ref() != last_error;
            if changed {
                *kept = Remembered { past, last_error: last_error.cloned() };
            }
            changed
        });
    }
}

async fn keep(key: ReplicaKey, told: watch::Receiver<Remembered>, ledger: Arc<dyn StateLedger>, clock: Clock) {
    let write = |Remembered { past, last_error }| {
        let (ledger, key) = (Arc::clone(&ledger), key.clone());
        async move { ledger.note_past(&key, past, last_error.as_ref(), clock.now()).await }
    };
    crate::remember::keep(told, write, |error| {
        tracing::error!(pool_id = %key.pool, replica_id = %key.replica, %error, "its failures will not survive a restart of the daemon");
    })
    .await;
}
