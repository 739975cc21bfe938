//! Writes down whether a pool is held, in a task of its own: the conductor goes on telling what its replicas do while a
//! disk is slow, and what could not be written is tried again.

use std::sync::Arc;
use std::time::Duration;

use pool_domain::PoolId;
use tokio::sync::watch;

use crate::ports::StateLedger;

/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// A pool's hold, and how far it is written down.
#[derive(Debug)]
pub(crate) struct Hold {
    wanted: watch::Sender<(u64, bool)>,
    tried: watch::Receiver<u64>,
}

impl Hold {
    /// As it was found. The task ends with this.
    pub(crate) fn found(pool: PoolId, ledger: Arc<dyn StateLedger>, held: bool) -> Self {
        let (wanted, wishes) = watch::channel((0, held));
        let (told, tried) = watch::channel(0);
        tokio::spawn(write(pool, ledger, wishes, told));
        Self { wanted, tried }
    }

    pub(crate) fn held(&self) -> bool {
        self.wanted.borrow().1
    }

    pub(crate) fn set(&self, held: bool) {
        self.wanted.send_if_modified(|(number, now)| {
            let changed = *now != held;
            *number += u64::from(changed);
            *now = held;
            changed
        });
    }

    /// Resolves once it was tried to write down what is wanted now.
    pub(crate) fn tried(&self) -> impl Future<Output = ()> + Send + 'static {
        let (number, mut tried) = (self.wanted.borrow().0, self.tried.clone());
        async move {
            let _ = tried.wait_for(|t| *t >= number).await;
        }
    }
}

async fn write(
    pool: PoolId,
    ledger: Arc<dyn StateLedger>,
    mut wishes: watch::Receiver<(u64, bool)>,
    told: watch::Sender<u64>,
) {
    let (mut written, mut open) = (0, true);
    loop {
        let (number, held) = *wishes.borrow_and_update();
        if number != written {
            match ledger.set_hold(&pool, held).await {
                Ok(()) => written = number,
                Err(e) => tracing::error!(pool_id = %pool, error = %e, "the hold would not survive a restart"),
            }
            told.send_replace(number);
            // What was wished for meanwhile comes first.
            if wishes.has_changed().unwrap_or(false) {
                continue;
            }
        }
        if !open {
            return;
        }
        tokio::select! {
            biased;
            changed = wishes.changed() => open = changed.is_ok(),
            () = tokio::time::sleep(TRY_AGAIN), if number != written => {}
        }
    }
}
