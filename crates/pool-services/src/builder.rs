//! Puts a manager together: drivers, conductors and the steward over the ports.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::PoolId;
use pool_domain::evict::EvictionPolicy;
use pool_domain::lease_book::Limits;
use pool_domain::xid::XidTable;
use thiserror::Error;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::boot::{self, Boot};
use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::conditions::Conditions;
use crate::declared::Restored;
use crate::driver::Ports;
use crate::events::{Event, EventSink};
use crate::manager::{Inner, PoolManager};
use crate::node::{Node, QUEUE};
use crate::ports::{AgainstDevices, EngineHost, EngineProbe, EngineProvisioner, GpuProbe, ModelStore, StateLedger};
use crate::spec::PoolSpec;
use crate::steward::{Ledgered, Steward, told_of};
use crate::view::View;

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
    pools: Vec<Restored>,
    seed: u64,
    eviction: EvictionPolicy,
    boot_ms: u64,
    max_lease_ttl: Duration,
    xids: Option<XidTable>,
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
            eviction: EvictionPolicy::default(),
            boot_ms: 0,
            max_lease_ttl: Limits::default().max_ttl,
            xids: Some(XidTable::default()),
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

    /// The pools, where nobody declares any over an API.
    #[must_use]
    pub fn pools(self, pools: Vec<PoolSpec>) -> Self {
        self.declared(pools.into_iter().map(Into::into).collect())
    }

    /// The pools, with their history.
    #[must_use]
    pub fn declared(mut self, pools: Vec<Restored>) -> Self {
        self.pools = pools;
        self
    }

    /// Seed of every random draw.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How long a replica that became Ready neither stops unused nor gives way to others.
    #[must_use]
    pub fn min_ready_time(mut self, time: Duration) -> Self {
        self.eviction.min_ready_time = time;
        self
    }

    /// Milliseconds of boot time at which the clock starts.
    #[must_use]
    pub fn boot_ms(mut self, ms: u64) -> Self {
        self.boot_ms = ms;
        self
    }

    /// Longest a lease can be asked for.
    #[must_use]
    pub fn max_lease_ttl(mut self, ttl: Duration) -> Self {
        self.max_lease_ttl = ttl;
        self
    }

    /// What follows from errors that the driver reports of devices; `None`: they are counted, and nothing follows.
    #[must_use]
    pub fn xids(mut self, table: Option<XidTable>) -> Self {
        self.xids = table;
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
            let id = &p.declared.spec.id;
            if self.pools[..i].iter().any(|q| q.declared.spec.id == *id) {
                return Err(BuildError::DuplicatePool(id.clone()));
            }
        }
        let clock = Clock::starting_at(self.boot_ms);
        let (events, events_rx) = EventSink::channel();
        let (told, ledgered) = watch::channel(Ledgered::default());
        let (conditions_tx, conditions) = watch::channel(Conditions::default());
        let view = View { inventory: ports.gpu.inventory(), ledgered, conditions };
        let mut node = Node {
            ports: ports.clone(),
            view: view.clone(),
            clock,
            seed: self.seed,
            min_ready_time: self.eviction.min_ready_time,
            events: events.clone(),
            bell: Arc::new(Notify::new()),
            memories: TaskTracker::new(),
            broken: CancellationToken::new(),
            last_call: CancellationToken::new(),
            max_lease_ttl: self.max_lease_ttl,
            hurry: Arc::default(),
        };
        let Boot { mut found, places, closed, strays } = boot::look(&node, &self.pools).await;
        node.hurry = Arc::clone(&strays.of_pools);
        let records: Vec<_> = found.values().filter(|f| !f.gone).map(|f| f.record.clone()).collect();
        let mut pools = BTreeMap::new();
        for pool in self.pools {
            let id = pool.declared.spec.id.clone();
            let places = places.get(&id).cloned().unwrap_or_default();
            pools.insert(id, node.pool(pool, &places, &mut found).await);
        }
        let (table_tx, table) = watch::channel(Arc::new(pools));
        told.send_replace(told_of(&records));
        let (steward_commands, commands) = mpsc::channel(QUEUE);
        let against_devices = ports.ledger.against_devices().await;
        let steward = Steward {
            table: table.clone(),
            wards: Vec::new(),
            inventory: ports.gpu.inventory(),
            incidents: ports.gpu.incidents(),
            xids: self.xids,
            host: Arc::clone(&ports.host),
            listen: self.listen,
            ports: self.ports,
            bell: Arc::clone(&node.bell),
            told,
            commands,
            conditions: conditions_tx,
            clock,
            events: events.clone(),
            eviction: self.eviction,
            found: records,
            closed,
            remembered: keep_against_devices(against_devices, Arc::clone(&ports.ledger)),
        };
        node.watched("steward", steward.run());
        let (catalog, orders) = mpsc::channel(QUEUE);
        let (departed_tx, departed) = watch::channel(VecDeque::new());
        let catalog_task = Catalog {
            node: node.clone(),
            table: table_tx,
            orders,
            departed: departed_tx,
            leaving: BTreeSet::new(),
            births: 0,
        };
        node.watched("catalog", catalog_task.run());
        let inner = Inner {
            table,
            catalog,
            departed,
            view,
            steward: steward_commands,
            clock,
            events,
            max_lease_ttl: self.max_lease_ttl,
            broken: node.broken,
            memories: node.memories,
            ports,
            last_call: node.last_call,
            strays,
        };
        Ok((PoolManager { inner: Arc::new(inner) }, events_rx))
    }
}

/// Keeps what is held against devices, which is `so_far` until the steward says more. An orderly end does not wait for it:
/// ending engines holds nothing against a device, and what failures did was written when they happened.
fn keep_against_devices(so_far: AgainstDevices, ledger: Arc<dyn StateLedger>) -> watch::Sender<AgainstDevices> {
    let (tx, told) = watch::channel(so_far);
    tokio::spawn(async move {
        let write = |newest: AgainstDevices| {
            let ledger = Arc::clone(&ledger);
            async move { ledger.note_against_devices(&newest).await }
        };
        crate::remember::keep(told, write, |error| {
            tracing::error!(%error, "what is held against devices will not survive a restart of the daemon");
        })
        .await;
    });
    tx
}
