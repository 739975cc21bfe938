//! Keeps the past of a replica on disk, beside the driver, which never waits for a disk.

use std::sync::Arc;
use std::time::Duration;

use pool_domain::ReplicaKey;
use pool_domain::lifecycle::Past;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::ports::StateLedger;

/// Between two tries on a disk that does not take it.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// The newest past of a replica; what was not written before the next change is not written at all.
#[derive(Debug)]
pub(crate) struct Memory(watch::Sender<Past>);

impl Memory {
    /// Starts to keep what is told, which is `past` so far. The task ends, with the last of it written, once this is
    /// dropped.
    pub(crate) fn start(
        key: ReplicaKey,
        past: Past,
        ledger: Arc<dyn StateLedger>,
        clock: Clock,
        tasks: &TaskTracker,
    ) -> Self {
        let (tx, told) = watch::channel(past);
        tasks.spawn(keep(key, told, ledger, clock));
        Self(tx)
    }

    /// Remembers this. Never waits.
    pub(crate) fn keep(&self, past: Past) {
        self.0.send_if_modified(|kept| {
            let changed = *kept != past;
            *kept = past;
            changed
        });
    }
}

async fn keep(key: ReplicaKey, mut told: watch::Receiver<Past>, ledger: Arc<dyn StateLedger>, clock: Clock) {
    let mut healthy = true;
    while told.changed().await.is_ok() {
        loop {
            let past = *told.borrow_and_update();
            let Err(error) = ledger.note_past(&key, past, clock.now()).await else {
                healthy = true;
                break;
            };
            if std::mem::replace(&mut healthy, false) {
                tracing::error!(pool_id = %key.pool, replica_id = %key.replica, %error, "its failures will not survive a restart of the daemon");
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(TRY_AGAIN) => {}
                changed = told.changed() => if changed.is_err() { return },
            }
        }
    }
}
