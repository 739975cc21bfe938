//! The facade: the verbs over drivers, conductors and the steward.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::{DeviceSnapshot, Generation, PoolId, ReplicaKey};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, Refused, SlotGuard};
use crate::clock::Clock;
use crate::conditions::{self, Conditions, StewardCommand};
use crate::conductor::{ConductorCommand, PoolFacts, Wish};
use crate::control::{
    ControlError, DrainOptions, Lease, Operation, OperationState, PlacementRequest, PlanRequest, PoolControl,
};
use crate::driver::Ports;
use crate::events::{EventKind, EventSink};
use crate::lease_desk::DeskCommand;
use crate::planning::{self, Placed, PlanReport, Surroundings};
use crate::ports::Inventory;
use crate::snapshot::{NodeSnapshot, PoolSnapshot};
use crate::spec::{Activation, PoolSpec};
use crate::steward::Ledgered;

use crate::builder::Builder;

/// What a killed engine gets to be gone before the daemon is.
const LAST_CALL: Duration = Duration::from_secs(2);

/// What the manager has of a pool.
#[derive(Debug)]
pub(crate) struct PoolHandle {
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) commands: mpsc::Sender<ConductorCommand>,
    pub(crate) facts: watch::Receiver<PoolFacts>,
    pub(crate) admissions: Vec<(ReplicaKey, Arc<Admission>)>,
}

/// What clones of a manager share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) pools: BTreeMap<PoolId, PoolHandle>,
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) ledgered: watch::Receiver<Ledgered>,
    pub(crate) conditions: watch::Receiver<Conditions>,
    pub(crate) steward: mpsc::Sender<StewardCommand>,
    pub(crate) desk: mpsc::Sender<DeskCommand>,
    pub(crate) clock: Clock,
    pub(crate) events: EventSink,
    pub(crate) seed: u64,
    pub(crate) broken: CancellationToken,
    pub(crate) leases: AtomicU64,
    /// What still has to be written when the drivers are gone.
    pub(crate) memories: TaskTracker,
    /// Also held because the ledger is what keeps other daemons out.
    pub(crate) ports: Ports,
    /// For engines that are left when time is up.
    pub(crate) last_call: CancellationToken,
}

/// The pools of one node. Clones share it.
#[derive(Debug, Clone)]
pub struct PoolManager {
    pub(crate) inner: Arc<Inner>,
}

impl PoolManager {
    /// Begins to gather.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The devices as they stand now.
    fn inventory(&self) -> Inventory {
        let mut inventory = self.inner.inventory.borrow().clone();
        let conditions = self.inner.conditions.borrow();
        inventory.devices.iter_mut().for_each(|d| conditions::overlay(d, &conditions));
        inventory
    }

    fn handle(&self, id: &PoolId) -> Result<&PoolHandle, ControlError> {
        self.inner.pools.get(id).ok_or_else(|| ControlError::PoolNotFound(id.to_string()))
    }

    async fn wish(&self, id: &PoolId, wish: Wish) -> Result<Operation, ControlError> {
        let handle = self.handle(id)?;
        let (answer, answered) = oneshot::channel();
        handle
            .commands
            .try_send(ConductorCommand { wish, answer })
            .map_err(|_| ControlError::Unreachable("the pool is too busy or stopping".into()))?;
        answered.await.map_err(|_| ControlError::Unreachable("the daemon is stopping".into()))?
    }

    /// Takes a slot in this process; it is given back when the guard is dropped.
    ///
    /// # Errors
    /// When no replica is Ready or every slot is taken.
    pub fn allocate_lease(&self, id: &PoolId) -> Result<(ReplicaKey, SlotGuard), ControlError> {
        let handle = self.handle(id)?;
        let mut by_room: Vec<_> = handle.admissions.iter().collect();
        by_room.sort_by_key(|(key, a)| (std::cmp::Reverse(a.free()), key.replica));
        let mut saturated = false;
        for (key, admission) in by_room {
            match admission.acquire() {
                Ok(guard) => {
                    let generation = self.generation_of(handle, key);
                    self.inner.events.send(key, generation, EventKind::LeaseGranted);
                    return Ok((key.clone(), guard));
                }
                Err(Refused::Saturated) => saturated = true,
                Err(Refused::Closed) => {}
            }
        }
        let (error, reason) = refusal(&self.picture(handle), saturated);
        if let Some((key, _)) = handle.admissions.first() {
            self.inner.events.send(key, self.generation_of(handle, key), EventKind::LeaseRefused { reason });
        }
        Err(error)
    }

    fn generation_of(&self, handle: &PoolHandle, key: &ReplicaKey) -> Generation {
        let facts = handle.facts.borrow();
        facts.snapshot.replicas.iter().find(|r| r.id == key.replica).map_or(Generation(0), |r| r.generation)
    }

    fn picture(&self, handle: &PoolHandle) -> PoolSnapshot {
        let now = self.inner.clock.now();
        let (mut snapshot, next_starts) = {
            let facts = handle.facts.borrow();
            (facts.snapshot.clone(), facts.next_starts.clone())
        };
        for (r, due) in snapshot.replicas.iter_mut().zip(next_starts) {
            r.next_start_in_ms = due.map(|due| u64::try_from(due.since(now).as_millis()).unwrap_or(u64::MAX));
        }
        // Leases move faster than snapshots are published.
        for (r, (_, a)) in snapshot.replicas.iter_mut().zip(&handle.admissions) {
            r.active_leases = u32::from(a.in_use());
        }
        snapshot
    }

    /// Stops every engine and waits until nothing is left, at most `deadline`. What is left then is killed. Says whether
    /// nothing was: what is Fenced is not waited for, and may be left.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        // Not `stop`: that would leave a hold behind.
        let in_time = self.end(Wish::Shutdown, deadline).await;
        if !in_time {
            self.inner.last_call.cancel();
            // Nothing is waited for any more, but the signals have to be sent.
            let _ = self.end(Wish::Shutdown, LAST_CALL).await;
        }
        let fenced = |handle: &PoolHandle| handle.facts.borrow().snapshot.replicas.iter().any(|r| r.state == "fenced");
        in_time && !self.inner.pools.values().any(fenced)
    }

    /// Ends the management and leaves every engine as it is, for a later daemon to take over.
    pub async fn leave(&self, deadline: Duration) -> bool {
        self.end(Wish::Leave, deadline).await
    }

    async fn end(&self, wish: Wish, deadline: Duration) -> bool {
        for (id, handle) in &self.inner.pools {
            let (answer, _) = oneshot::channel();
            if handle.commands.send(ConductorCommand { wish, answer }).await.is_err() {
                tracing::debug!(pool_id = %id, "already stopped");
            }
        }
        let all_rest = async {
            for handle in self.inner.pools.values() {
                let mut facts = handle.facts.clone();
                // The conductor ends, and with it the channel, once its drivers rest.
                while facts.changed().await.is_ok() {}
            }
            self.inner.memories.close();
            self.inner.memories.wait().await;
        };
        tokio::time::timeout(deadline, all_rest).await.is_ok()
    }

    fn find_operation(&self, id: &str) -> Result<(watch::Receiver<PoolFacts>, Operation), ControlError> {
        for handle in self.inner.pools.values() {
            let found = handle.facts.borrow().operations.iter().find(|o| o.id == id).cloned();
            if let Some(o) = found {
                return Ok((handle.facts.clone(), o));
            }
        }
        Err(ControlError::OperationNotFound(id.to_owned()))
    }

    /// Leases move faster than operations are judged.
    fn with_leases(&self, mut operation: Operation) -> Operation {
        if operation.state == OperationState::Running
            && matches!(operation.verb.as_str(), "drain" | "stop")
            && let Ok(handle) = self.handle(&operation.pool_id)
        {
            let leases: u32 = handle.admissions.iter().map(|(_, a)| u32::from(a.in_use())).sum();
            operation.progress = format!("{}, {leases} leases left", operation.progress);
        }
        operation
    }

    /// The devices as they are, with who else uses them; and what is promised on them, but for one pool.
    fn devices_without(&self, pool: Option<&PoolId>) -> (Vec<DeviceSnapshot>, BTreeMap<String, u64>) {
        let (inventory, mut told) = (self.inventory(), self.inner.ledgered.borrow().clone());
        let mut devices = inventory.devices;
        for device in &mut devices {
            device.vram_foreign = device.vram_foreign.max(told.foreign.get(&device.uuid).copied().unwrap_or(0));
        }
        for (_, held) in told.held.iter().filter(|(key, _)| Some(&key.pool) == pool) {
            for (uuid, bytes) in held {
                if let Some(promised) = told.promised.get_mut(uuid) {
                    *promised = promised.saturating_sub(*bytes);
                }
                if let Some(device) = devices.iter_mut().find(|d| d.uuid == *uuid) {
                    device.vram_used = device.vram_used.saturating_sub(*bytes);
                }
            }
        }
        (devices, told.promised)
    }

    /// Resolves when the steward has gone round once more: whether it still does. A watchdog asks this.
    pub async fn answers(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        self.inner.steward.send(StewardCommand::Ping { answer }).await.is_ok() && answered.await.is_ok()
    }

    /// Resolves when a task that the manager cannot do without has met a bug. Nothing is started any more then.
    pub async fn broken(&self) {
        self.inner.broken.cancelled().await;
    }

    /// Events that did not fit their channel, and so are missing in logs and metrics.
    #[must_use]
    pub fn events_lost(&self) -> u64 {
        self.inner.events.lost()
    }
}

fn refusal(snapshot: &PoolSnapshot, saturated: bool) -> (ControlError, &'static str) {
    if saturated {
        return (ControlError::Saturated, "saturated");
    }
    if snapshot.hold || snapshot.draining() {
        return (ControlError::Draining, "draining");
    }
    let Some(lead) = snapshot.lead() else { return (ControlError::Unready("it has no replicas".into()), "unready") };
    match (lead.breaker, lead.next_start_in_ms) {
        ("open", Some(ms)) => (ControlError::Unavailable { retry_after: Duration::from_millis(ms) }, "breaker_open"),
        _ if lead.reason.is_empty() => (ControlError::Unready(format!("it is {}", lead.state)), "unready"),
        _ => (ControlError::Unready(lead.reason.clone()), "unready"),
    }
}

#[async_trait]
impl PoolControl for PoolManager {
    async fn node(&self) -> Result<NodeSnapshot, ControlError> {
        let inventory = self.inventory();
        let told = self.inner.ledgered.borrow().clone();
        Ok(NodeSnapshot {
            simulated: inventory.simulated,
            driver: inventory.driver,
            devices: inventory
                .devices
                .into_iter()
                .map(|mut d| {
                    let ours = told.promised.get(&d.uuid).copied().unwrap_or(0);
                    d.vram_foreign = d.vram_foreign.max(told.foreign.get(&d.uuid).copied().unwrap_or(0));
                    (d, ours)
                })
                .collect(),
            problem: inventory.problem,
            events_lost: self.events_lost(),
        })
    }

    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError> {
        Ok(self.inner.pools.values().map(|h| self.picture(h)).collect())
    }

    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError> {
        Ok(self.picture(self.handle(id)?))
    }

    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError> {
        let handle = self.handle(id)?;
        let mut facts = handle.facts.clone();
        // Late or not, the newest picture is the answer.
        let _ = tokio::time::timeout(wait, facts.wait_for(|f| f.snapshot.snapshot > after)).await;
        Ok(self.picture(handle))
    }

    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Preload).await
    }

    async fn drain(&self, id: &PoolId, options: DrainOptions) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Drain(options)).await
    }

    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Resume).await
    }

    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Stop).await
    }

    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError> {
        self.wish(id, Wish::ResetBreaker).await.map(|_| ())
    }

    async fn unfence(&self, device: &str) -> Result<(), ControlError> {
        let (answer, answered) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the daemon is stopping".into());
        let command = StewardCommand::Unfence { device: device.to_owned(), answer };
        self.inner.steward.send(command).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    async fn operations(&self) -> Result<Vec<Operation>, ControlError> {
        let mut all: Vec<Operation> = self
            .inner
            .pools
            .values()
            .flat_map(|h| h.facts.borrow().operations.iter().cloned().collect::<Vec<_>>())
            .map(|o| self.with_leases(o))
            .collect();
        all.sort_by_key(|o| std::cmp::Reverse(o.started_at));
        Ok(all)
    }

    async fn operation(&self, id: &str) -> Result<Operation, ControlError> {
        self.find_operation(id).map(|(_, o)| self.with_leases(o))
    }

    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError> {
        let (mut facts, _) = self.find_operation(id)?;
        let done =
            |f: &PoolFacts| f.operations.iter().find(|o| o.id == id).is_none_or(|o| o.state != OperationState::Running);
        let _ = tokio::time::timeout(wait, facts.wait_for(done)).await;
        self.operation(id).await
    }

    async fn lease(&self, id: &PoolId, ttl: Duration) -> Result<Lease, ControlError> {
        let (key, guard) = match self.allocate_lease(id) {
            Ok(granted) => granted,
            Err(e) => {
                let handle = self.handle(id)?;
                let rests = handle.facts.borrow().snapshot.replicas.iter().all(|r| r.state == "idle");
                if handle.spec.activation == Activation::OnDemand && matches!(e, ControlError::Unready(_)) && rests {
                    self.wish(id, Wish::Demand).await?;
                    return Err(ControlError::Unready("it is starting because it was asked for".into()));
                }
                return Err(e);
            }
        };
        let snapshot = self.pool(id).await?;
        let replica = snapshot.replicas.iter().find(|r| r.id == key.replica);
        let n = self.inner.leases.fetch_add(1, Ordering::Relaxed);
        let lease = Lease {
            id: format!("lease-{id}-{:08x}-{n}", self.inner.seed & 0xffff_ffff),
            pool_id: id.clone(),
            replica_id: key.replica,
            generation: replica.map_or(Generation(0), |r| r.generation),
            endpoint: replica.and_then(|r| r.endpoint.clone()).unwrap_or_default(),
            expires_at: self.inner.clock.wall() + ttl,
        };
        self.inner
            .desk
            .try_send(DeskCommand::Keep { id: lease.id.clone(), guard, ttl })
            .map_err(|_| ControlError::Saturated)?;
        Ok(lease)
    }

    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError> {
        let spec = match what {
            PlanRequest::Pool(id) => (*self.handle(&id)?.spec).clone(),
            PlanRequest::Spec(spec) => *spec,
        };
        // What the pool holds already is there for it.
        let (devices, promised) = self.devices_without(Some(&spec.id));
        let ports = &self.inner.ports;
        let from = Surroundings {
            models: &*ports.models,
            provisioner: &*ports.provisioner,
            ledger: Some(&*ports.ledger),
            devices: &devices,
            promised: &promised,
        };
        planning::report(&spec, from).await
    }

    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError> {
        if let Some(pool) = &request.pool {
            self.handle(pool)?;
        }
        let (devices, promised) = self.devices_without(None);
        let pools = self.inner.pools.values().map(|h| (&*h.spec, self.picture(h)));
        planning::placements(pools, &devices, &promised, request)
    }

    async fn release(&self, lease_id: &str) -> Result<(), ControlError> {
        let (known, answer) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the daemon is stopping".into());
        self.inner.desk.send(DeskCommand::Release { id: lease_id.to_owned(), known }).await.map_err(|_| stopping())?;
        // Releasing twice is fine, and so is releasing what expired.
        answer.await.map(|_| ()).map_err(|_| stopping())
    }
}
