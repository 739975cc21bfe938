//! Before anything is started: looks for the engines of earlier daemons.
//!
//! Those that belong to a replica go to its driver. Those that belong to nobody any more are ended; until nothing of
//! them is left, their devices are closed to newcomers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pool_domain::ReplicaKey;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::driver::{Found, Ports};
use crate::ports::{EngineRecord, NotAdopted, RunningEngine};
use crate::spec::PoolSpec;

/// Devices that admit nobody, by UUID.
pub(crate) type Closed = BTreeSet<String>;

/// What an engine that nobody wants any more gets to stop by itself.
const GRACE: Duration = Duration::from_secs(2);
/// Between two looks at a device that something unknown may be on.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What was found.
pub(crate) struct Boot {
    pub(crate) found: BTreeMap<ReplicaKey, Found>,
    pub(crate) closed: watch::Receiver<Closed>,
}

/// An engine of a replica that is no more.
struct Stray {
    record: EngineRecord,
    engine: Arc<dyn RunningEngine>,
}

/// Looks at every record, and at what no record names.
pub(crate) async fn look(ports: &Ports, pools: &[PoolSpec], bell: &Arc<Notify>) -> Boot {
    let (mut found, mut strays, mut known) = (BTreeMap::new(), Vec::new(), Vec::new());
    for record in ports.ledger.recorded().await {
        let key = record.key.clone();
        let outcome = ports.host.adopt(&record).await;
        if let Err(NotAdopted { why, rest: None }) = &outcome {
            tracing::info!(pool_id = %key.pool, replica_id = %key.replica, %why, "nothing is left of an earlier engine");
            if let Err(error) = ports.ledger.forget(&key, record.generation).await {
                tracing::warn!(pool_id = %key.pool, %error, "not written down");
            }
            continue;
        }
        known.push(record.clone());
        let wanted = pools.iter().any(|p| p.id == key.pool && key.replica.0 < p.replicas);
        // A generation that was followed by another is never taken up again.
        if wanted && record.generation >= ports.ledger.last_generation(&key).await {
            // At once, or not now.
            let gone = match &outcome {
                Ok(engine) => tokio::time::timeout(Duration::ZERO, engine.gone()).await.is_ok(),
                Err(_) => false,
            };
            found.insert(key, Found { record, outcome, gone });
        } else if let Ok(engine) | Err(NotAdopted { rest: Some(engine), .. }) = outcome {
            tracing::warn!(pool_id = %key.pool, replica_id = %key.replica, "ending an engine that nobody wants any more");
            strays.push(Stray { record, engine });
        }
    }
    let devices: Vec<String> = ports.gpu.inventory().borrow().devices.iter().map(|d| d.uuid.clone()).collect();
    let unknown = ports.host.end_unknown(&known, &devices).await;
    for uuid in &unknown {
        tracing::error!(device = %uuid, "something of an engine that is on no record may be left on a device: it is fenced");
    }
    let mut closed: Closed = strays.iter().flat_map(|s| s.record.devices.uuids.clone()).collect();
    closed.extend(unknown.iter().cloned());
    let (tx, closed) = watch::channel(closed);
    if !strays.is_empty() || !unknown.is_empty() {
        tokio::spawn(reopen(tx, strays, unknown, ports.clone(), Arc::clone(bell)));
    }
    Boot { found, closed }
}

/// Ends the strays and opens each device again once nothing is left there.
async fn reopen(
    tx: watch::Sender<Closed>,
    strays: Vec<Stray>,
    mut unknown: Vec<String>,
    ports: Ports,
    bell: Arc<Notify>,
) {
    let mut left: BTreeMap<ReplicaKey, Vec<String>> = BTreeMap::new();
    let mut ends = JoinSet::new();
    for Stray { record, engine } in strays {
        left.insert(record.key.clone(), record.devices.uuids.clone());
        ends.spawn(async move {
            engine.terminate();
            if tokio::time::timeout(GRACE, engine.gone()).await.is_err() {
                engine.kill();
                engine.gone().await;
            }
            record
        });
    }
    let mut look_again = tokio::time::interval(LOOK_AGAIN);
    while !left.is_empty() || !unknown.is_empty() {
        tokio::select! {
            biased;
            Some(ended) = ends.join_next() => {
                let Ok(record) = ended else { continue };
                left.remove(&record.key);
                if let Err(error) = ports.ledger.forget(&record.key, record.generation).await {
                    tracing::warn!(pool_id = %record.key.pool, %error, "not written down");
                }
            }
            _ = look_again.tick() => unknown.retain(|device| !ports.host.device_clear(device)),
        }
        let closed: Closed = left.values().flatten().chain(&unknown).cloned().collect();
        let changed = tx.send_if_modified(|now| {
            let changed = *now != closed;
            *now = closed;
            changed
        });
        if changed {
            bell.notify_one();
        }
    }
}
