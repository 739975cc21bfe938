//! Before anything is started: looks for the engines of earlier daemons.
//!
//! Those that belong to a replica go to its driver. Those that belong to nobody any more are ended; until nothing of
//! them is left, their devices are closed to newcomers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::{PoolId, ReplicaId, ReplicaKey};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::declared::Restored;
use crate::driver::{Found, Ports, busy};
use crate::ports::{Endpoint, EngineProbe, EngineRecord, NotAdopted, Phase, RunningEngine};
use crate::returned::Held;
use crate::spec::PoolSpec;

/// Devices that admit nobody, by UUID.
pub(crate) type Closed = BTreeSet<String>;

/// What an engine that nobody wants any more gets to stop by itself.
const GRACE: Duration = Duration::from_millis(1_800);
/// What a kill takes to be proved.
const KILLED: Duration = Duration::from_secs(2);
/// Between two looks at a device that something unknown may be on.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Between two questions of one engine that leaves.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What was found.
pub(crate) struct Boot {
    pub(crate) found: BTreeMap<ReplicaKey, Found>,
    /// Which replica has each place of each pool.
    pub(crate) places: BTreeMap<PoolId, Vec<ReplicaId>>,
    pub(crate) closed: watch::Receiver<Closed>,
    pub(crate) strays: Strays,
}

/// Engines that nobody wants any more, on their way out.
#[derive(Debug)]
pub(crate) struct Strays {
    /// How many are left.
    left: watch::Receiver<usize>,
    /// Cancelled when those of a pool have no more time.
    hurry: Arc<Hurry>,
}

/// Who can hurry the strays of each pool that has any.
pub(crate) type Hurry = BTreeMap<PoolId, CancellationToken>;

impl Strays {
    pub(crate) fn hurry(&self) -> Arc<Hurry> {
        Arc::clone(&self.hurry)
    }

    /// Ends them, whatever they still serve; says whether they are gone within `patience`, and what ends any takes.
    pub(crate) async fn end(&self, patience: Duration) -> bool {
        self.hurry.values().for_each(CancellationToken::cancel);
        let gone = async { self.left.clone().wait_for(|left| *left == 0).await.is_ok() };
        // Whoever counts them has ended when none is left.
        let gone = async { gone.await || *self.left.borrow() == 0 };
        tokio::time::timeout(patience.min(GRACE + KILLED), gone).await.unwrap_or(false)
    }
}

/// An engine of a replica that is no more.
struct Stray {
    record: EngineRecord,
    engine: Arc<dyn RunningEngine>,
}

/// Looks at every record, and at what no record names.
pub(crate) async fn look(ports: &Ports, pools: &[Restored], clock: Clock, bell: &Arc<Notify>) -> Boot {
    let (mut found, mut strays, mut known) = (BTreeMap::new(), Vec::new(), Vec::new());
    let recorded = ports.ledger.recorded().await;
    let of =
        |p: &PoolSpec| (p.id.clone(), places(p, &recorded.iter().filter(|r| r.key.pool == p.id).collect::<Vec<_>>()));
    let places: BTreeMap<_, _> = pools.iter().map(|p| of(&p.declared.spec)).collect();
    for record in recorded {
        let key = record.key.clone();
        reached(Point::BeforeAdopt);
        let outcome = ports.host.adopt(&record).await;
        reached(Point::AfterAdopt);
        if let Err(NotAdopted { why, rest: None }) = &outcome {
            tracing::info!(pool_id = %key.pool, replica_id = %key.replica, %why, "nothing is left of an earlier engine");
            if let Err(error) = ports.ledger.forget(&key, record.generation).await {
                tracing::warn!(pool_id = %key.pool, %error, "not written down");
            }
            continue;
        }
        known.push(record.clone());
        let wanted = places.get(&key.pool).is_some_and(|ids| ids.contains(&key.replica));
        // A generation that was followed by another is never taken up again.
        if wanted && record.generation >= ports.ledger.last_generation(&key).await {
            // At once, or not now.
            let gone = match &outcome {
                Ok(engine) => {
                    tokio::time::timeout(Duration::ZERO, engine.gone()).await.is_ok()
                        && Held::of(&record).is_back(&*ports.gpu).await
                }
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
    let (count, left) = watch::channel(strays.len());
    let hurry: Arc<Hurry> =
        Arc::new(strays.iter().map(|s| (s.record.key.pool.clone(), CancellationToken::new())).collect());
    if !strays.is_empty() || !unknown.is_empty() {
        tokio::spawn(reopen(
            (tx, count),
            (strays, Arc::clone(&hurry)),
            unknown,
            ports.clone(),
            clock,
            Arc::clone(bell),
        ));
    }
    Boot { found, places, closed, strays: Strays { left, hurry } }
}

/// Who has each place of a pool: first whoever was made for it, then the replica that bears its number. So a reload that
/// was committed goes on with the new replicas, whatever their numbers, and one that was not goes back to the old.
fn places(spec: &PoolSpec, records: &[&EngineRecord]) -> Vec<ReplicaId> {
    let mut taken: BTreeMap<u16, ReplicaId> = BTreeMap::new();
    let fits = |record: &EngineRecord, place: u16| record.fingerprint == spec.fingerprint(place);
    // One that serves before one that only began to, and each in its own place if it can be.
    let rank = |record: &EngineRecord, place: u16| {
        (!matches!(record.phase, Phase::Ready { .. }), record.key.replica.0 != place, record.key.replica)
    };
    for place in 0..spec.replicas {
        let free = |r: &&&EngineRecord| !taken.values().any(|id| *id == r.key.replica) && r.phase != Phase::Stopping;
        let best = records.iter().filter(free).filter(|r| fits(r, place)).min_by_key(|r| rank(r, place));
        if let Some(record) = best {
            taken.insert(place, record.key.replica);
        }
    }
    for place in 0..spec.replicas {
        if !taken.contains_key(&place) {
            let unused = |id: &ReplicaId| !taken.values().any(|taken| taken == id);
            let strange = |id: &ReplicaId| records.iter().any(|r| r.key.replica == *id);
            let own = Some(ReplicaId(place)).filter(unused);
            let other = || (0..u16::MAX).map(ReplicaId).find(|id| unused(id) && !strange(id));
            if let Some(id) = own.or_else(other) {
                taken.insert(place, id);
            }
        }
    }
    taken.into_values().collect()
}

/// Resolves when an engine says that it works on nothing; at once if it does not say.
async fn idle(probe: &dyn EngineProbe, endpoint: &Endpoint) {
    while busy(probe, endpoint).await > 0 {
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Ends the strays and opens each device again once nothing is left there.
async fn reopen(
    (tx, count): (watch::Sender<Closed>, watch::Sender<usize>),
    (strays, hurry): (Vec<Stray>, Arc<Hurry>),
    mut unknown: Vec<String>,
    ports: Ports,
    clock: Clock,
    bell: Arc<Notify>,
) {
    let mut left: BTreeMap<ReplicaKey, Vec<String>> = BTreeMap::new();
    let mut ends = JoinSet::new();
    for Stray { record, engine } in strays {
        left.insert(record.key.clone(), record.devices.uuids.clone());
        let (probe, gpu, now) = (Arc::clone(&ports.probe), Arc::clone(&ports.gpu), clock.now());
        let hurry = hurry.get(&record.key.pool).cloned().unwrap_or_default();
        ends.spawn(async move {
            if let Phase::Draining { deadline, .. } = record.phase {
                // It was leaving; those that it serves have the time they were given.
                let idle = idle(&*probe, &record.endpoint);
                let idle = tokio::time::timeout(deadline.since(now), idle);
                let _late = hurry.run_until_cancelled(idle).await;
            }
            engine.terminate();
            if tokio::time::timeout(GRACE, engine.gone()).await.is_err() {
                engine.kill();
                engine.gone().await;
            }
            Held::of(&record).back(&*gpu).await;
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
                count.send_replace(left.len());
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
