//! Before anything is started: looks for the engines of earlier daemons.
//!
//! Those that belong to a replica go to its driver. Those that belong to nobody any more are ended; until nothing of
//! them is left, their devices are closed to newcomers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::lifecycle::StopPolicy;
use pool_domain::{PoolId, ReplicaId, ReplicaKey, Tick};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::declared::Restored;
use crate::driver::{Found, Ports, busy};
use crate::node::Node;
use crate::ports::{Endpoint, EngineProbe, EngineRecord, NotAdopted, Phase, RunningEngine};
use crate::returned::Held;
use crate::spec::PoolSpec;
use pool_domain::returned::Back;

/// Devices that admit nobody, by UUID.
pub(crate) type Closed = BTreeSet<String>;

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

/// An engine of a replica that is no more.
struct Stray {
    record: EngineRecord,
    engine: Arc<dyn RunningEngine>,
}

/// How far the end of a stray has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Ending,
    /// It was killed, and something of it may be left all the same.
    Unproved,
}

/// The ends of all strays.
struct Ends {
    left: BTreeMap<ReplicaKey, (Stage, Vec<String>)>,
    /// Each says whether nothing is left.
    ending: JoinSet<(Stray, bool)>,
    stages: watch::Sender<Vec<Stage>>,
}

/// The strays as a shutdown sees them.
#[derive(Debug)]
pub(crate) struct Strays {
    left: watch::Receiver<Vec<Stage>>,
    hurry: CancellationToken,
    /// The same for those of one pool.
    pub(crate) of_pools: Arc<Hurry>,
}

/// What tells the strays of each pool that has any that their time is over.
pub(crate) type Hurry = BTreeMap<PoolId, CancellationToken>;

impl Strays {
    /// Their requests get no more time than those of other engines.
    pub(crate) fn hurry(&self) {
        self.hurry.cancel();
    }

    /// Resolves once nothing is left of them but what may never be proved gone.
    pub(crate) async fn end(&self) {
        let mut left = self.left.clone();
        let _gone = left.wait_for(|left| left.iter().all(|s| *s == Stage::Unproved)).await;
    }

    /// Whether something of them may be left.
    pub(crate) fn left(&self) -> bool {
        !self.left.borrow().is_empty()
    }
}

/// Looks at every record, and at what no record names.
pub(crate) async fn look(node: &Node, pools: &[Restored]) -> Boot {
    let ports = &node.ports;
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
                        && Held::of(&record).is_back(&*ports.gpu).await == Back::Yes
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
    let (stages, left) = watch::channel(vec![Stage::Ending; strays.len()]);
    let hurry = CancellationToken::new();
    let of_pools: Hurry = strays.iter().map(|s| (s.record.key.pool.clone(), hurry.child_token())).collect();
    if !strays.is_empty() || !unknown.is_empty() {
        let mut ends = Ends { left: BTreeMap::new(), ending: JoinSet::new(), stages };
        for stray in strays {
            let (key, devices) = (stray.record.key.clone(), stray.record.devices.uuids.clone());
            let hurry = of_pools.get(&key.pool).cloned().unwrap_or_default();
            ends.left.insert(key, (Stage::Ending, devices));
            ends.ending.spawn(stray.end(ports.clone(), node.clock.now(), hurry, node.last_call.clone()));
        }
        tokio::spawn(reopen(tx, ends, unknown, ports.clone(), Arc::clone(&node.bell)));
    }
    Boot { found, places, closed, strays: Strays { left, hurry, of_pools: Arc::new(of_pools) } }
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

impl Stray {
    /// Asks it to end, and makes it. Says how far that came within the time in which an end is proved.
    async fn end(
        self,
        ports: Ports,
        now: Tick,
        hurry: CancellationToken,
        last_call: CancellationToken,
    ) -> (Self, bool) {
        let Self { record, engine } = &self;
        if let Phase::Draining { deadline, .. } = record.phase {
            // It was leaving; those that it serves have the time they were given.
            let idle = tokio::time::timeout(deadline.since(now), idle(&*ports.probe, &record.endpoint));
            tokio::select! {
                biased;
                () = hurry.cancelled() => {}
                _late = idle => {}
            }
        }
        let stop = StopPolicy::default();
        engine.terminate();
        let ended = tokio::select! {
            biased;
            () = last_call.cancelled() => false,
            ended = tokio::time::timeout(stop.forced_grace(), engine.gone()) => ended.is_ok(),
        };
        if !ended {
            engine.kill();
        }
        if tokio::time::timeout(stop.prove, self.nothing_left(&ports)).await.is_err() {
            return (self, false);
        }
        self.forget(&ports).await;
        (self, true)
    }

    /// Resolves once its processes are gone and its memory is back. May never.
    async fn nothing_left(&self, ports: &Ports) {
        self.engine.gone().await;
        Held::of(&self.record).back(&*ports.gpu).await;
    }

    async fn forget(&self, ports: &Ports) {
        if let Err(error) = ports.ledger.forget(&self.record.key, self.record.generation).await {
            tracing::warn!(pool_id = %self.record.key.pool, %error, "not written down");
        }
    }
}

/// Ends the strays and opens each device again once nothing is left there.
async fn reopen(tx: watch::Sender<Closed>, mut ends: Ends, mut unknown: Vec<String>, ports: Ports, bell: Arc<Notify>) {
    let Ends { left, ending, stages } = &mut ends;
    let mut look_again = tokio::time::interval(LOOK_AGAIN);
    while !left.is_empty() || !unknown.is_empty() {
        tokio::select! {
            biased;
            Some(ended) = ending.join_next() => match ended {
                Ok((stray, true)) => {
                    left.remove(&stray.record.key);
                }
                Ok((stray, false)) => {
                    let key = &stray.record.key;
                    tracing::error!(pool_id = %key.pool, replica_id = %key.replica, "something of an engine that nobody wants may be left: its devices stay closed");
                    left.entry(key.clone()).and_modify(|(stage, _)| *stage = Stage::Unproved);
                    let ports = ports.clone();
                    ending.spawn(async move {
                        stray.nothing_left(&ports).await;
                        stray.forget(&ports).await;
                        (stray, true)
                    });
                }
                Err(_) => continue,
            },
            _ = look_again.tick() => unknown.retain(|device| !ports.host.device_clear(device)),
        }
        let closed: Closed = left.values().flat_map(|(_, devices)| devices).chain(&unknown).cloned().collect();
        stages.send_replace(left.values().map(|(stage, _)| *stage).collect());
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
