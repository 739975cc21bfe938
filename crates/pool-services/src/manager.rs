//! The facade: composes drivers, conductors and the steward over the ports, and is the verbs.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::{Generation, PoolId, ReplicaId, ReplicaKey, rank};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::admission::{Admission, Refused, SlotGuard};
use crate::clock::Clock;
use crate::conductor::{Conductor, ConductorCommand, PoolFacts, Wish};
use crate::control::{ControlError, DrainOptions, Lease, Operation, OperationState, PlanRequest, PoolControl};
use crate::driver::{Driver, DriverParts, Ports, at_rest};
use crate::events::{Event, EventKind, EventSink};
use crate::hold::Hold;
use crate::lease_desk::{self, DeskCommand};
use crate::planning::{self, Placed, PlanReport, Surroundings};
use crate::ports::{EngineHost, EngineProbe, EngineProvisioner, GpuProbe, Inventory, ModelStore, StateLedger};
use crate::snapshot::{NodeSnapshot, PoolSnapshot};
use crate::spec::{Activation, PoolSpec};
use crate::steward::{Promised, Steward, Ward};

/// Commands that may wait for a task; more are refused.
const QUEUE: usize = 32;
/// Leases the desk may be asked for at once.
const DESK_QUEUE: usize = 1024;

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
    #[cfg(feature = "planted-bugs")]
    ignore_generations: bool,
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

    /// A bug on purpose: drivers take facts of old generations for those of the current one.
    #[cfg(feature = "planted-bugs")]
    #[must_use]
    pub fn ignore_generations(mut self) -> Self {
        self.ignore_generations = true;
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
            #[cfg(feature = "planted-bugs")]
            ignore_generations: self.ignore_generations,
        };
        for (i, p) in self.pools.iter().enumerate() {
            if self.pools[..i].iter().any(|q| q.id == p.id) {
                return Err(BuildError::DuplicatePool(p.id.clone()));
            }
        }
        let clock = Clock::starting_at(self.boot_ms);
        let (events, events_rx) = EventSink::channel();
        let node_bell = Arc::new(Notify::new());
        let (mut pools, mut wards) = (BTreeMap::new(), Vec::new());
        for spec in self.pools {
            let spec = Arc::new(spec);
            let handle = spawn_pool(&spec, &ports, clock, self.seed, &events, &node_bell, &mut wards).await;
            pools.insert(spec.id.clone(), handle);
        }
        let (promised_tx, promised) = watch::channel(Promised::new());
        let steward = Steward {
            wards,
            inventory: ports.gpu.inventory(),
            host: Arc::clone(&ports.host),
            listen: self.listen,
            ports: self.ports,
            bell: node_bell,
            promised: promised_tx,
        };
        tokio::spawn(steward.run());
        let (desk, desk_rx) = mpsc::channel(DESK_QUEUE);
        tokio::spawn(lease_desk::run(desk_rx));
        let inventory = ports.gpu.inventory();
        let inner = Inner {
            pools,
            inventory,
            promised,
            desk,
            clock,
            events,
            seed: self.seed,
            leases: AtomicU64::new(0),
            ports,
        };
        Ok((PoolManager { inner: Arc::new(inner) }, events_rx))
    }
}

async fn spawn_pool(
    spec: &Arc<PoolSpec>,
    ports: &Ports,
    clock: Clock,
    seed: u64,
    events: &EventSink,
    node_bell: &Arc<Notify>,
    wards: &mut Vec<Ward>,
) -> PoolHandle {
    let bell = Arc::new(Notify::new());
    let (mut drivers, mut replicas, mut admissions) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..spec.replicas {
        let key = ReplicaKey { pool: spec.id.clone(), replica: ReplicaId(n) };
        let generation = ports.ledger.last_generation(&key).await;
        let (tx, commands) = mpsc::channel(QUEUE);
        let (published, seen) = watch::channel(at_rest(&key, generation));
        let admission = Arc::new(Admission::default());
        let mut hasher = DefaultHasher::new();
        (seed, &key).hash(&mut hasher);
        let driver = Driver::new(DriverParts {
            key: key.clone(),
            spec: Arc::clone(spec),
            ports: ports.clone(),
            clock,
            seed: hasher.finish(),
            admission: Arc::clone(&admission),
            commands,
            published,
            bells: [Arc::clone(&bell), Arc::clone(node_bell)],
            events: events.clone(),
            generation,
        });
        tokio::spawn(driver.run());
        wards.push(Ward { key: key.clone(), published: seen.clone(), commands: tx.downgrade() });
        drivers.push(tx);
        replicas.push(seen);
        admissions.push((key, admission));
    }
    let hold = ports.ledger.held(&spec.id).await;
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
        clock,
        drivers,
        replicas,
        bell,
        commands: commands_rx,
        facts,
        run_id: format!("{:08x}", seed & 0xffff_ffff),
        hold: Hold::found(spec.id.clone(), Arc::clone(&ports.ledger), hold),
        verbs: 0,
        ending: false,
    };
    tokio::spawn(conductor.run());
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
    promised: watch::Receiver<Promised>,
    desk: mpsc::Sender<DeskCommand>,
    clock: Clock,
    events: EventSink,
    seed: u64,
    leases: AtomicU64,
    /// Also held because the ledger is what keeps other daemons out.
    ports: Ports,
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
            #[cfg(feature = "planted-bugs")]
            ignore_generations: false,
        }
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

    /// Stops every engine and waits until nothing is left, at most `deadline`. Says whether that is so: what is Fenced is
    /// not waited for, and may be left.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        for (id, handle) in &self.inner.pools {
            // Not `stop`: that would leave a hold behind.
            let (answer, _) = oneshot::channel();
            let wish = Wish::Shutdown;
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
        };
        let in_time = tokio::time::timeout(deadline, all_rest).await.is_ok();
        let fenced = |handle: &PoolHandle| handle.facts.borrow().snapshot.replicas.iter().any(|r| r.state == "fenced");
        in_time && !self.inner.pools.values().any(fenced)
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
        let inventory = self.inner.inventory.borrow().clone();
        let promised = self.inner.promised.borrow().clone();
        Ok(NodeSnapshot {
            simulated: inventory.simulated,
            driver: inventory.driver,
            devices: inventory
                .devices
                .into_iter()
                .map(|d| {
                    let ours = promised.get(&d.uuid).copied().unwrap_or(0);
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
        let (inventory, promised) = (self.inner.inventory.borrow().clone(), self.inner.promised.borrow().clone());
        let ports = &self.inner.ports;
        let from = Surroundings {
            models: &*ports.models,
            provisioner: &*ports.provisioner,
            ledger: Some(&*ports.ledger),
            devices: &inventory.devices,
            promised: &promised,
        };
        planning::report(&spec, from).await
    }

    async fn placements(&self, request: rank::Request) -> Result<Vec<Placed>, ControlError> {
        let (inventory, promised) = (self.inner.inventory.borrow().clone(), self.inner.promised.borrow().clone());
        let pools = self.inner.pools.values().map(|h| (&*h.spec, self.picture(h)));
        let promised = |uuid: &str| promised.get(uuid).copied().unwrap_or(0);
        let candidates = planning::candidates(pools, &inventory.devices, &promised);
        Ok(planning::placed(&candidates, &request))
    }

    async fn release(&self, lease_id: &str) -> Result<(), ControlError> {
        let (known, answer) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the daemon is stopping".into());
        self.inner.desk.send(DeskCommand::Release { id: lease_id.to_owned(), known }).await.map_err(|_| stopping())?;
        // Releasing twice is fine, and so is releasing what expired.
        answer.await.map(|_| ()).map_err(|_| stopping())
    }
}
