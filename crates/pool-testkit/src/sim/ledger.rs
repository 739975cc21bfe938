//! The state directory of the simulated node.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::Past;
use pool_domain::perf::{Perf, PerfKey, Speeds};
use pool_domain::{Generation, PoolId, ReplicaKey, Tick};
use pool_services::ports::{AgainstDevices, EngineRecord, Handoff, LedgerError, StateLedger, StoredPool};
use pool_services::snapshot::LastError;

use super::Plant;
use super::world::World;

/// What is written down. A past goes with the boot in which it was noted, and when.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    generations: BTreeMap<ReplicaKey, Generation>,
    pasts: BTreeMap<ReplicaKey, (u32, Past, Tick)>,
    held: BTreeSet<PoolId>,
    handoffs: BTreeMap<ReplicaKey, Handoff>,
    pub(super) records: BTreeMap<ReplicaKey, EngineRecord>,
    learnt: BTreeMap<(PoolId, CorrectionKey), Correction>,
    speeds: BTreeMap<PoolId, Speeds>,
    last_errors: BTreeMap<ReplicaKey, LastError>,
    /// With the boot in which they were noted.
    against_devices: (u32, AgainstDevices),
    pub(super) stored: BTreeMap<PoolId, StoredPool>,
}

impl Facts {
    /// At first: the pools that somebody has declared over the API before.
    pub(super) fn of(schedule: &super::Schedule) -> Self {
        let stored = |id: &PoolId| StoredPool {
            pool: id.clone(),
            revision: 1,
            document: "0".into(),
            file_digest: None,
            previous: None,
            probation: None,
        };
        let ids = schedule.pools.iter().filter(|p| p.api).map(|p| p.spec.id.clone());
        Self { stored: ids.map(|id| (id.clone(), stored(&id))).collect(), ..Self::default() }
    }
}

impl World {
    /// One write, as a disk does it: it may land before anybody is told so, and the daemon may die before, in or after it.
    async fn write(&self, change: impl FnOnce(&mut Facts) + Send) -> Result<(), LedgerError> {
        let _turn = self.turn.acquire().await;
        self.call().await;
        let (takes, early, mut change) = {
            let mut inner = self.lock();
            let mut change = Some(change);
            // A disk that refuses has sometimes taken it all the same.
            let early = inner.rng.bool() && (!inner.disk.refuses || inner.rng.bool());
            if early && let Some(change) = change.take() {
                inner.unsynced = Some(inner.facts.clone());
                change(&mut inner.facts);
            }
            (inner.disk.takes, early, change)
        };
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        self.call().await;
        {
            let mut inner = self.lock();
            inner.unsynced = None;
            if inner.disk.refuses {
                return Err(LedgerError { what: "a fact", source: std::io::ErrorKind::StorageFull.into() });
            }
            if !early && let Some(change) = change.take() {
                change(&mut inner.facts);
            }
        }
        self.call().await;
        Ok(())
    }

    /// A daemon takes the directory over: no handoff of an earlier one stands.
    pub fn reopen(&self) {
        self.lock().facts.handoffs.clear();
    }

    /// The handoffs that stand.
    #[must_use]
    pub fn handoffs(&self) -> Vec<Handoff> {
        self.lock().facts.handoffs.values().cloned().collect()
    }

    /// What is written down of what a pool is to be.
    #[must_use]
    pub fn stored(&self, pool: &PoolId) -> Option<StoredPool> {
        self.lock().facts.stored.get(pool).cloned()
    }

    /// Whether this generation of a replica is written down, with a record.
    pub(super) fn durable(&self, record: &EngineRecord) -> bool {
        let inner = self.lock();
        let noted = inner.facts.generations.get(&record.key).copied().unwrap_or_default();
        // A person may have changed the name in the record meanwhile.
        noted == record.generation
            && inner.facts.records.get(&record.key).is_some_and(|r| r.generation == record.generation)
    }
}

#[async_trait]
impl StateLedger for World {
    async fn last_generation(&self, key: &ReplicaKey) -> Generation {
        self.call().await;
        let known = self.lock().facts.generations.get(key).copied().unwrap_or_default();
        if self.plant == Plant::GenerationsForgotten { Generation(0) } else { known }
    }
    async fn intend(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        self.write(|f| {
            f.generations.insert(key.clone(), generation);
        })
        .await
    }
    async fn past(&self, key: &ReplicaKey, now: Tick) -> Past {
        self.call().await;
        let inner = self.lock();
        match inner.facts.pasts.get(key) {
            Some((boot, past, _)) if *boot == inner.boot => *past,
            Some((_, past, noted)) => past.carried_over(*noted, now),
            None => Past::default(),
        }
    }
    async fn note_past(
        &self,
        key: &ReplicaKey,
        past: Past,
        last_error: Option<&LastError>,
        now: Tick,
    ) -> Result<(), LedgerError> {
        if self.plant == Plant::PastForgotten {
            return Ok(());
        }
        let boot = self.lock().boot;
        self.write(|f| {
            f.pasts.insert(key.clone(), (boot, past, now));
            f.last_errors.extend(last_error.map(|e| (key.clone(), e.clone())));
        })
        .await
    }
    async fn last_error(&self, key: &ReplicaKey) -> Option<LastError> {
        self.call().await;
        self.lock().facts.last_errors.get(key).cloned()
    }
    async fn against_devices(&self) -> AgainstDevices {
        self.call().await;
        let inner = self.lock();
        let (boot, held) = &inner.facts.against_devices;
        if *boot == inner.boot { held.clone() } else { AgainstDevices::default() }
    }
    async fn note_against_devices(&self, held: &AgainstDevices) -> Result<(), LedgerError> {
        let boot = self.lock().boot;
        self.write(|f| f.against_devices = (boot, held.clone())).await
    }
    async fn held(&self, pool: &PoolId) -> bool {
        self.call().await;
        self.lock().facts.held.contains(pool)
    }
    async fn set_hold(&self, pool: &PoolId, held: bool) -> Result<(), LedgerError> {
        if self.plant == Plant::HoldForgotten {
            return Ok(());
        }
        self.write(|f| {
            if held {
                f.held.insert(pool.clone());
            } else {
                f.held.remove(pool);
            }
        })
        .await
    }
    async fn record(&self, record: &EngineRecord) -> Result<(), LedgerError> {
        self.write(|f| {
            f.records.insert(record.key.clone(), record.clone());
        })
        .await
    }
    async fn forget(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        self.write(|f| f.records.retain(|k, r| k != key || r.generation > generation)).await
    }
    async fn recorded(&self) -> Vec<EngineRecord> {
        self.call().await;
        if self.plant == Plant::RecordsForgotten {
            return Vec::new();
        }
        self.lock().facts.records.values().cloned().collect()
    }
    async fn publish_handoff(&self, handoff: &Handoff) -> Result<(), LedgerError> {
        self.write(|f| {
            f.handoffs.insert(handoff.key.clone(), handoff.clone());
        })
        .await
    }
    async fn withdraw_handoff(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        if self.plant == Plant::HandoffStays {
            return Ok(());
        }
        self.write(|f| {
            f.handoffs.retain(|k, h| k != key || h.generation > generation);
        })
        .await
    }
    async fn learnt(&self, pool: &PoolId, key: &CorrectionKey) -> Option<Correction> {
        self.call().await;
        self.lock().facts.learnt.get(&(pool.clone(), key.clone())).copied()
    }
    async fn learn(&self, pool: &PoolId, key: &CorrectionKey, correction: Correction) -> Result<(), LedgerError> {
        self.write(|f| {
            f.learnt.insert((pool.clone(), key.clone()), correction);
        })
        .await
    }
    // No promise is about speeds: they are no calls at which a daemon is killed, so that those that matter are met more often.
    async fn speeds(&self, pool: &PoolId) -> Speeds {
        self.lock().facts.speeds.get(pool).cloned().unwrap_or_default()
    }
    async fn note_speed(&self, pool: &PoolId, key: &PerfKey, perf: Perf) -> Result<(), LedgerError> {
        self.lock().facts.speeds.entry(pool.clone()).or_default().keep(key.clone(), perf);
        Ok(())
    }
    async fn stored_pools(&self) -> Vec<StoredPool> {
        self.call().await;
        self.lock().facts.stored.values().cloned().collect()
    }
    async fn store_pool(&self, pool: &StoredPool) -> Result<(), LedgerError> {
        self.write(|f| {
            f.stored.insert(pool.pool.clone(), pool.clone());
        })
        .await
    }
    async fn drop_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        self.write(|f| {
            f.stored.remove(pool);
        })
        .await
    }
    async fn forget_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        self.write(|f| {
            f.held.remove(pool);
            f.pasts.retain(|key, _| key.pool != *pool);
            f.learnt.retain(|(of, _), _| of != pool);
            f.speeds.remove(pool);
        })
        .await
    }
}
