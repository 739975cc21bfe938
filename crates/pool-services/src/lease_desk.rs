//! Leases that cross a wire: one task holds their guards until they are released or expire.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::admission::SlotGuard;

/// What the desk is told.
#[derive(Debug)]
pub(crate) enum DeskCommand {
    Keep { id: String, guard: SlotGuard, ttl: Duration },
    Release { id: String, known: oneshot::Sender<bool> },
}

/// Runs until nobody can command it any more.
pub(crate) async fn run(mut commands: mpsc::Receiver<DeskCommand>) {
    let mut held: BTreeMap<String, (SlotGuard, Instant)> = BTreeMap::new();
    loop {
        let next = held.values().map(|(_, until)| *until).min();
        let expiry = async {
            match next {
                Some(t) => tokio::time::sleep_until(t).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = expiry => {
                let now = Instant::now();
                held.retain(|_, (guard, until)| *until > now && guard.valid());
            }
            command = commands.recv() => match command {
                Some(DeskCommand::Keep { id, guard, ttl }) => { held.insert(id, (guard, Instant::now() + ttl)); }
                Some(DeskCommand::Release { id, known }) => { let _ = known.send(held.remove(&id).is_some()); }
                None => return,
            },
        }
    }
}
