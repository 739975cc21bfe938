//! The facade: composes drivers, conductors and the steward over the ports, and is the verbs.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::lifecycle::Replica;
use pool_domain::{DeviceSnapshot, Generation, PoolId, ReplicaId, ReplicaKey};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, Refused, SlotGuard};
use crate::boot::{self, Boot};
use crate::clock::Clock;
use crate::conditions::{self, Conditions, StewardCommand};
use crate::conductor::{Conductor, ConductorCommand, PoolFacts, Wish};
use crate::control::{
    ControlError, DrainOptions, Lease, Operation, OperationState, PlacementRequest, PlanRequest, PoolControl,
};
use crate::driver::{Driver, DriverParts, Found, Memory, Ports, at_rest};
use crate::events::{Event, EventKind, EventSink};
use crate::lease_desk::{self, DeskCommand};
use crate::planning::{self, Placed, PlanReport, Surroundings};
use crate::ports::{EngineHost, EngineProbe, EngineProvisioner, GpuProbe, Inventory, ModelStore, StateLedger};
use crate::snapshot::{NodeSnapshot, PoolSnapshot};
use crate::spec::{Activation, PoolSpec};
use crate::steward::{Ledgered, Steward, Ward, told_of};

/// Commands that may wait for a task; more are refused.
const QUEUE: usize = 32;
/// Leases the desk may be asked for at once.
const DESK_QUEUE: usize = 1024;
/// What a killed engine gets to be gone before the daemon is.
const LAST_CALL: Duration = Duration::from_secs(2);

/// Why no manager could be built.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A port has no adapter.
    #[error("no adapter was given for {0}")]
    Missing(&'static str),
    /// Two pools of one name.
    #[error("there are two pools named `{0}`")]
    DuplicatePool(PoolId),
}

/// Gathers what a manager is made of.
#[derive(Debug)]
pub struct Builder {
    gpu: Option<Arc<dyn GpuProbe>>,
    models: Option<Arc<dyn ModelStore>>,
    provisioner: Option<Arc<dyn EngineProvisioner>>,
    host: Option<Arc<dyn EngineHost>>,
    probe: Option<Arc<dyn EngineProbe>>,
    ledger: Option<Arc<dyn StateLedger>>,
    listen: IpAddr,
    ports: RangeInclusive<u16>,
    pools: Vec<PoolSpec>,
    seed: u64,
    boot_ms: u64,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $ty:ty;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: Arc<$ty>) -> Self {
            self.$name = Some($name);
            self
        }
    )*};
}

impl Builder {
    setters! {
        /// The GPUs.
        gpu: dyn GpuProbe;
        /// The models.
        models: dyn ModelStore;
        /// The engine plans.
        provisioner: dyn EngineProvisioner;
        /// The engine processes.
        host: dyn EngineHost;
        /// The engine answers.
        probe: dyn EngineProbe;
        /// The durable facts.
        ledger: dyn StateLedger;
    }

    /// Ports engines may listen on.
    #[must_use]
    pub fn engine_ports(mut self, ports: RangeInclusive<u16>) -> Self {
        self.ports = ports;
        self
    }

    /// Address engines listen on.
    #[must_use]
    pub fn engine_listen(mut self, addr: IpAddr) -> Self {
        self.listen = addr;
        self
    }

    /// The pools.
    #[must_use]
    pub fn pools(mut self, pools: Vec<PoolSpec>) -> Self {
        self.pools = pools;
        self
    }

    /// Seed of every random draw.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Milliseconds of boot time at which the clock starts.
    #[must_use]
    pub fn boot_ms(mut self, ms: u64) -> Self {
        self.boot_ms = ms;
        self
    }

    /// Starts every task. Pools with `activation = preload` and without a hold start their engines.
    ///
    /// # Errors
    /// When an adapter is missing or two pools share a name; nothing was started then.
    pub async fn start(self) -> Result<(PoolManager, mpsc::Receiver<Event>), BuildError> {
        fn need<T>(what: &'static str, adapter: Option<T>) -> Result<T, BuildError> {
            adapter.ok_or(BuildError::Missing(what))
        }
        let ports = Ports {
            gpu: need("the GPUs", self.gpu)?,
            models: need("the models", self.models)?,
            provisioner: need("the engine plans", self.provisioner)?,
            host: need("the engine processes", self.host)?,
            probe: need("the engine answers", self.probe)?,
            ledger: need("the durable facts", self.ledger)?,
        };
        for (i, p) in self.pools.iter().enumerate() {
            if self.pools[..i].iter().any(|q| q.id == p.id) {
                return Err(BuildError::DuplicatePool(p.id.clone()));
            }
        }
        let clock = Clock::starting_at(self.boot_ms);
        let (events, events_rx) = EventSink::channel();
        let (bell, broken) = (Arc::new(Notify::new()), CancellationToken::new());
        let (mut pools, mut wards, memories) = (BTreeMap::new(), Vec::new(), TaskTracker::new());
        let Boot { mut found, closed } = boot::look(&ports, &self.pools, &bell).await;
        let records: Vec<_> = found.values().map(|f| f.record.clone()).collect();
        let last_call = CancellationToken::new();
        for spec in self.pools {
            let spec = Arc::new(spec);
            let node = NodeParts {
                ports: &ports,
                clock,
                seed: self.seed,
                events: &events,
                bell: &bell,
                memories: &memories,
                broken: &broken,
                last_call: &last_call,
            };
            let handle = spawn_pool(&spec, node, &mut found, &mut wards).await;
            pools.insert(spec.id.clone(), handle);
        }
        let (told, ledgered) = watch::channel(told_of(&records));
        let (conditions_tx, conditions) = watch::channel(Conditions::new());
        let (steward_commands, commands) = mpsc::channel(QUEUE);
        let steward = Steward {
            wards,
            inventory: ports.gpu.inventory(),
            host: Arc::clone(&ports.host),
            listen: self.listen,
            ports: self.ports,
            bell,
            told,
            commands,
            conditions: conditions_tx,
            clock,
            events: events.clone(),
            found: records,
            closed,
        };
        watched(&broken, "steward", steward.run());
        let (desk, desk_rx) = mpsc::channel(DESK_QUEUE);
        tokio::spawn(lease_desk::run(desk_rx));
        let inventory = ports.gpu.inventory();
        let inner = Inner {
            pools,
            inventory,
            ledgered,
            conditions,
            steward: steward_commands,
            desk,
            clock,
            events,
            seed: self.seed,
            broken,
            leases: AtomicU64::new(0),
            memories,
            ports,
            last_call,
        };
        Ok((PoolManager { inner: Arc::new(inner) }, events_rx))
    }
}

/// What every pool of a node shares.
#[derive(Clone, Copy)]
struct NodeParts<'a> {
    ports: &'a Ports,
    clock: Clock,
    seed: u64,
    events: &'a EventSink,
    /// Rung for the steward.
    bell: &'a Arc<Notify>,
    memories: &'a TaskTracker,
    /// Cancelled by a bug.
    broken: &'a CancellationToken,
    last_call: &'a CancellationToken,
}

/// Runs a task whose panic must not pass unnoticed.
fn watched(broken: &CancellationToken, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    let broken = broken.clone();
    tokio::spawn(async move {
        if tokio::spawn(task).await.is_err_and(|e| e.is_panic()) {
            tracing::error!(task = name, "a task met a bug: nothing is started any more");
            broken.cancel();
        }
    });
}

async fn spawn_pool(
    spec: &Arc<PoolSpec>,
    node: NodeParts<'_>,
    found: &mut BTreeMap<ReplicaKey, Found>,
    wards: &mut Vec<Ward>,
) -> PoolHandle {
    let NodeParts { ports, clock, seed, events, memories, last_call, .. } = node;
    let bell = Arc::new(Notify::new());
    let hold = ports.ledger.held(&spec.id).await;
    let (mut drivers, mut replicas, mut admissions) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..spec.replicas {
        let key = ReplicaKey { pool: spec.id.clone(), replica: ReplicaId(n) };
        let (generation, now) = (ports.ledger.last_generation(&key).await, clock.now());
        let replica = Replica::resume(generation, ports.ledger.past(&key, now).await, now, &spec.policy);
        let memory = Memory::start(key.clone(), replica.past(), Arc::clone(&ports.ledger), clock, memories);
        let (tx, commands) = mpsc::channel(QUEUE);
        let (published, seen) = watch::channel(at_rest(&key, &replica));
        let admission = Arc::new(Admission::default());
        let mut hasher = DefaultHasher::new();
        (seed, &key).hash(&mut hasher);
        let mut driver = Driver::new(DriverParts {
            key: key.clone(),
            spec: Arc::clone(spec),
            ports: ports.clone(),
            clock,
            seed: hasher.finish(),
            admission: Arc::clone(&admission),
            commands,
            published,
            bells: [Arc::clone(&bell), Arc::clone(node.bell)],
            events: events.clone(),
            replica,
            memory,
            last_call: last_call.clone(),
        });
        if let Some(found) = found.remove(&key) {
            driver.take_over(found, hold);
        }
        watched(node.broken, "driver", driver.run());
        wards.push(Ward { key: key.clone(), published: seen.clone(), commands: tx.downgrade() });
        drivers.push(tx);
        replicas.push(seen);
        admissions.push((key, admission));
    }
    let snapshot = PoolSnapshot {
        pool_id: spec.id.clone(),
        snapshot: 1,
        revision: 1,
        engine: spec.engine.to_string(),
        model: spec.model.to_string(),
        model_id: spec.model.model_id(),
        aliases: spec.aliases.clone(),
        hold,
        replicas: replicas.iter().map(|r| r.borrow().snapshot.clone()).collect(),
    };
    let (facts, facts_rx) =
        watch::channel(PoolFacts { snapshot, operations: std::collections::VecDeque::new(), next_starts: Vec::new() });
    let (commands, commands_rx) = mpsc::channel(QUEUE);
    let conductor = Conductor {
        spec: Arc::clone(spec),
        ledger: Arc::clone(&ports.ledger),
        clock,
        drivers,
        replicas,
        bell,
        commands: commands_rx,
        facts,
        run_id: format!("{:08x}", seed & 0xffff_ffff),
        hold,
        verbs: 0,
        ending: false,
        left: false,
    };
    watched(node.broken, "conductor", conductor.run());
    PoolHandle { spec: Arc::clone(spec), commands, facts: facts_rx, admissions }
}

#[derive(Debug)]
struct PoolHandle {
    spec: Arc<PoolSpec>,
    commands: mpsc::Sender<ConductorCommand>,
    facts: watch::Receiver<PoolFacts>,
    admissions: Vec<(ReplicaKey, Arc<Admission>)>,
}

#[derive(Debug)]
struct Inner {
    pools: BTreeMap<PoolId, PoolHandle>,
    inventory: watch::Receiver<Inventory>,
    ledgered: watch::Receiver<Ledgered>,
    conditions: watch::Receiver<Conditions>,
    steward: mpsc::Sender<StewardCommand>,
    desk: mpsc::Sender<DeskCommand>,
    clock: Clock,
    events: EventSink,
    seed: u64,
    broken: CancellationToken,
    leases: AtomicU64,
    /// What still has to be written when the drivers are gone.
    memories: TaskTracker,
    /// Also held because the ledger is what keeps other daemons out.
    ports: Ports,
    /// For engines that are left when time is up.
    last_call: CancellationToken,
}

/// The pools of one node. Clones share it.
#[derive(Debug, Clone)]
pub struct PoolManager {
    inner: Arc<Inner>,
}

impl PoolManager {
    /// Begins to gather.
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            gpu: None,
            models: None,
            provisioner: None,
            host: None,
            probe: None,
            ledger: None,
            listen: IpAddr::V4(Ipv4Addr::LOCALHOST),
            ports: 42_000..=42_999,
            pools: Vec::new(),
            seed: 0,
            boot_ms: 0,
        }
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
    /// it was in time.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        // Not `stop`: that would leave a hold behind.
        let in_time = self.end(Wish::Shutdown, deadline).await;
        if !in_time {
            self.inner.last_call.cancel();
            // Nothing is waited for any more, but the signals have to be sent.
            let _ = self.end(Wish::Shutdown, LAST_CALL).await;
        }
        in_time
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
