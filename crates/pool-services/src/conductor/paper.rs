//! Writes down what a pool is to be, in a task of its own, one write after the other: none overtakes a later one.

use std::sync::Arc;
use std::time::Duration;

use pool_domain::PoolId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::ports::{LedgerError, StateLedger, StoredPool};

/// Between two tries.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Each write is waited for before the next, but for one that is tried again.
const QUEUE: usize = 8;

/// What is to stand: nothing, where the config file says it.
type Text = Option<StoredPool>;

#[derive(Debug)]
struct Order {
    text: Text,
    /// It is what stands, so that it has to be written some time.
    until_written: bool,
    answer: oneshot::Sender<Result<(), LedgerError>>,
}

/// The written form of one pool.
#[derive(Debug)]
pub(crate) struct Paper {
    orders: Option<mpsc::Sender<Order>>,
    task: Option<JoinHandle<()>>,
}

impl Paper {
    pub(crate) fn of(pool: PoolId, ledger: Arc<dyn StateLedger>) -> Self {
        let (orders, queue) = mpsc::channel(QUEUE);
        Self { orders: Some(orders), task: Some(tokio::spawn(write(pool, ledger, queue))) }
    }

    /// Writes once, and tells whether it was. What must stand is tried again until it does, or something newer is to.
    pub(super) fn write(&self, text: Text, until_written: bool) -> oneshot::Receiver<Result<(), LedgerError>> {
        let (answer, answered) = oneshot::channel();
        if let Some(orders) = &self.orders {
            let _full = orders.try_send(Order { text, until_written, answer });
        }
        answered
    }

    /// Resolves when nothing is being written any more.
    pub(super) async fn finish(&mut self) {
        self.orders = None;
        if let Some(task) = self.task.take() {
            // A task that panicked writes nothing more.
            let _ = task.await;
        }
    }
}

async fn write(pool: PoolId, ledger: Arc<dyn StateLedger>, mut orders: mpsc::Receiver<Order>) {
    let put = |text: Text| async {
        match text {
            Some(stored) => ledger.store_pool(&stored).await,
            None => ledger.drop_pool(&pool).await,
        }
    };
    let mut owed: Option<Text> = None;
    loop {
        let order = tokio::select! {
            biased;
            order = orders.recv() => order,
            () = tokio::time::sleep(TRY_AGAIN), if owed.is_some() => {
                if let Some(text) = owed.clone() && put(text).await.is_ok() {
                    owed = None;
                }
                continue;
            }
        };
        let Some(Order { text, until_written, answer }) = order else { break };
        let written = put(text.clone()).await;
        // Whoever asked for something newer decides what is owed.
        owed = (written.is_err() && until_written).then_some(text);
        let _ = answer.send(written);
    }
    if let Some(text) = owed
        && let Err(error) = put(text).await
    {
        tracing::error!(pool_id = %pool, %error, "a restart may find the pool in another form than it has");
    }
}
