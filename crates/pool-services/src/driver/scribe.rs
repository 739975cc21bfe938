//! Writes down for consumers which engine is Ready, in a task of its own, so that a slow or full disk delays nobody.

use std::sync::Arc;
use std::time::Duration;

use pool_domain::ReplicaKey;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::ports::{Handoff, StateLedger};

/// Between two tries to write what could not be written.
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// The handoff of one replica.
pub(super) struct Scribe {
    wanted: watch::Sender<Option<Handoff>>,
    task: JoinHandle<()>,
}

impl Scribe {
    /// Begins without one.
    pub(super) fn start(key: ReplicaKey, ledger: Arc<dyn StateLedger>) -> Self {
        let (wanted, wishes) = watch::channel(None);
        Self { wanted, task: tokio::spawn(write(key, ledger, wishes)) }
    }

    /// What is to stand from now on.
    pub(super) fn want(&self, handoff: Option<Handoff>) {
        self.wanted.send_replace(handoff);
    }

    /// Resolves once what is wanted was written, or tried for the last time.
    pub(super) async fn finish(self) {
        drop(self.wanted);
        // A task that panicked has nothing more to write.
        let _ = self.task.await;
    }
}

async fn write(key: ReplicaKey, ledger: Arc<dyn StateLedger>, mut wanted: watch::Receiver<Option<Handoff>>) {
    let mut stands: Option<Handoff> = None;
    let mut open = true;
    loop {
        let wish = wanted.borrow_and_update().clone();
        let mut written = true;
        if wish != stands {
            let done = match &wish {
                Some(handoff) => ledger.publish_handoff(handoff).await,
                None => ledger.withdraw_handoff(&key).await,
            };
            match done {
                Ok(()) => stands = wish,
                Err(e) => {
                    tracing::warn!(pool_id = %key.pool, replica_id = %key.replica, error = %e, "handoff file not written");
                    written = false;
                }
            }
            // What was wished for meanwhile comes first.
            if wanted.has_changed().unwrap_or(false) {
                continue;
            }
        }
        if !open {
            return;
        }
        tokio::select! {
            biased;
            changed = wanted.changed() => open = changed.is_ok(),
            () = tokio::time::sleep(TRY_AGAIN), if !written => {}
        }
    }
}
