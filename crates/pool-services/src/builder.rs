//! Puts a manager together: drivers, conductors and the steward over the ports.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use pool_domain::lifecycle::Replica;
use pool_domain::{PoolId, ReplicaId, ReplicaKey};
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::boot::{self, Boot};
use crate::clock::Clock;
use crate::conditions::Conditions;
use crate::conductor::{Conductor, PoolFacts};
use crate::driver::{Driver, DriverParts, Found, Memory, Ports, at_rest};
use crate::events::{Event, EventSink};
use crate::hold::Hold;
use crate::lease_desk;
use crate::ports::{EngineHost, EngineProbe, EngineProvisioner, GpuProbe, ModelStore, StateLedger};
use crate::snapshot::PoolSnapshot;
use crate::spec::PoolSpec;
use crate::steward::{Steward, Ward, told_of};

use crate::manager::{Inner, PoolHandle, PoolManager};

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
    bug: Option<crate::planted::Bug>,
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
    pub(crate) fn new() -> Self {
        Self {
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
            bug: None,
        }
    }

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

    /// A bug on purpose.
    #[cfg(feature = "planted-bugs")]
    #[must_use]
    pub fn bug(mut self, bug: crate::planted::Bug) -> Self {
        self.bug = Some(bug);
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
            bug: self.bug,
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
        let records: Vec<_> = found.values().filter(|f| !f.gone).map(|f| f.record.clone()).collect();
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
        left: false,
    };
    watched(node.broken, "conductor", conductor.run());
    PoolHandle { spec: Arc::clone(spec), commands, facts: facts_rx, admissions }
}
