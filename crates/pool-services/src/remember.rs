//! Keeps the newest of something on disk, beside its owner, who never waits for a disk.

use std::time::Duration;

use tokio::sync::watch;

use crate::ports::LedgerError;

/// Between two tries on a disk that does not take it.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Writes what is told, until nobody can tell any more and the last of it is written. What was not written before the next
/// change is not written at all. `refused` is called once for each time that the disk falls ill.
pub(crate) async fn keep<T, W>(
    mut told: watch::Receiver<T>,
    write: impl Fn(T) -> W + Send,
    refused: impl Fn(LedgerError) + Send,
) where
    T: Clone + Send + Sync,
    W: Future<Output = Result<(), LedgerError>> + Send,
{
    let mut healthy = true;
    while told.changed().await.is_ok() {
        loop {
            let newest = told.borrow_and_update().clone();
            let Err(error) = write(newest).await else {
                healthy = true;
                break;
            };
            if std::mem::replace(&mut healthy, false) {
                refused(error);
            }
            tokio::select! {
                biased;
                () = tokio::time::sleep(TRY_AGAIN) => {}
                changed = told.changed() => if changed.is_err() { return },
            }
        }
    }
}
