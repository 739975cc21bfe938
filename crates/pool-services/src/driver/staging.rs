//! How far the model of an attempt has come, told to people without flooding anybody.

use std::time::Duration;

use pool_domain::lifecycle::State;
use pool_domain::{Generation, Tick};
use tokio::sync::{mpsc, watch};

use super::{Driver, Report};
use crate::events::{EventKind, amount, size};
use crate::ports::{Staging, StagingStep};

/// Between two pictures of a model that is being fetched.
const PICTURE: Duration = Duration::from_secs(1);
/// Between two events about it.
const EVENT: Duration = Duration::from_secs(10);

/// What a driver keeps of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    now: Staging,
    /// Since when it is being fetched, and when that was last told.
    fetching: Option<(Tick, Tick)>,
}

/// Tells a driver how far its model is, at once and then once a second at most; never ends.
pub(super) async fn tell_staging(
    mut progress: watch::Receiver<Option<Staging>>,
    tx: &mpsc::Sender<(Generation, Report)>,
    generation: Generation,
) {
    while progress.changed().await.is_ok() {
        let staging = *progress.borrow_and_update();
        if let Some(staging) = staging
            && tx.send((generation, Report::Staging(staging))).await.is_err()
        {
            break;
        }
        tokio::time::sleep(PICTURE).await;
    }
    std::future::pending::<()>().await;
}

/// The same for people.
pub(super) fn words(staging: &Staging) -> String {
    let amount = amount(staging.done, staging.total);
    let step = match staging.step {
        StagingStep::Waiting => return format!("waiting for the model, which is being fetched already: {amount}"),
        StagingStep::Fetching => "fetching the model",
        StagingStep::Verifying => "verifying the model",
    };
    let rate = if staging.rate == 0 { String::new() } else { format!(" at {}/s", size(staging.rate)) };
    let left = staging.left().map(|left| format!(", {} s left", left.as_secs())).unwrap_or_default();
    format!("{step}: {amount}{rate}{left}")
}

impl Driver {
    pub(super) fn progressed(&mut self, now: Staging) {
        let tick = self.clock.now();
        let mut fetching = self.attempt.staging.and_then(|p| p.fetching);
        if now.step == StagingStep::Fetching {
            let due = fetching.is_none_or(|(_, told)| tick.since(told) >= EVENT);
            if due {
                self.emit(EventKind::ModelFetching { done: now.done, total: now.total });
                fetching = Some((fetching.map_or(tick, |(began, _)| began), tick));
            }
        }
        self.attempt.staging = Some(Progress { now, fetching });
    }

    /// The model is there.
    pub(super) fn staged(&mut self) {
        if let Some(Progress { now, fetching: Some((began, _)) }) = self.attempt.staging.take() {
            let bytes = now.total.unwrap_or(now.done);
            self.emit(EventKind::ModelFetched { bytes, took: self.clock.now().since(began) });
        }
    }

    /// Percent of its model that the engine says it has loaded, while it loads.
    pub(super) fn loaded(&self) -> Option<u8> {
        self.attempt.loaded.filter(|_| matches!(self.replica.state, State::Starting { .. }))
    }

    pub(super) fn staging(&self) -> Option<Staging> {
        let progress = self.attempt.staging.filter(|_| matches!(self.replica.state, State::Staging { .. }))?;
        Some(progress.now)
    }
}
