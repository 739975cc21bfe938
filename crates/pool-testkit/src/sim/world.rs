//! The simulated node: devices, ports and engines, with a record of the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::failure::Exit;
use pool_domain::plan::EngineMemory;
use pool_domain::{DeviceSnapshot, Failure, FailureClass, PoolId, ReplicaKey};
use pool_services::ports::{
    Endpoint, EngineHost, EngineProbe, EngineProvisioner, EngineRecord, Holder, Identity, Listener, NotAdmitted,
    NotAdopted, PrepareRequest, PreparedEngine, Residency, RunningEngine, StateLedger, Up,
};
use pool_services::spec::PoolSpec;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Plant;
use super::script::{Held, Script};
use super::truth::{Entry, Launch, What};
use crate::{FakeGpus, FakeLedger, FakeModels};

/// The first pid; far from 0 so that nothing is right by accident.
const FIRST_PID: u32 = 1_000;

/// One device as it really is.
#[derive(Debug, Clone)]
pub struct SimDevice {
    /// As a probe shows it, but for what is used.
    pub shown: DeviceSnapshot,
    /// Whether it is on the bus.
    pub present: bool,
    /// Bytes that strangers hold.
    pub foreign: u64,
}

#[derive(Debug)]
struct Engine {
    launch: Launch,
    addr: SocketAddr,
    nonce: String,
    script: Script,
    began: Instant,
    ended: bool,
    /// KILL was sent and had no effect.
    doomed: bool,
    /// Nothing exists of it any more, whatever the host tells.
    left: bool,
    exit: watch::Sender<Option<Failure>>,
    gone: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Inner {
    healthy: BTreeMap<PoolId, Script>,
    scripts: BTreeMap<PoolId, Script>,
    memory: BTreeMap<PoolId, EngineMemory>,
    engines: Vec<Engine>,
    devices: Vec<SimDevice>,
    taken_ports: BTreeSet<u16>,
    /// Nobody can say who holds memory.
    blind: bool,
    nonces: u64,
    log: Vec<Entry>,
}

/// The node. Its engine ports are faked here, the others by the fakes of this crate.
#[derive(Debug)]
pub struct World {
    me: Weak<World>,
    inner: Mutex<Inner>,
    began: Instant,
    provable: bool,
    plant: Plant,
    /// GPUs.
    pub gpus: Arc<FakeGpus>,
    /// Models.
    pub models: Arc<FakeModels>,
    /// Durable facts.
    pub ledger: Arc<FakeLedger>,
}

impl World {
    /// A node with these devices. `provable`: who holds memory can be asked.
    #[must_use]
    pub fn new(devices: Vec<SimDevice>, provable: bool, plant: Plant) -> Arc<Self> {
        let world = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            inner: Mutex::new(Inner { devices, ..Inner::default() }),
            began: Instant::now(),
            provable,
            plant,
            gpus: Arc::new(FakeGpus::with(Vec::new())),
            models: Arc::default(),
            ledger: Arc::default(),
        });
        world.tell_gpus(&world.lock());
        world
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a pool whose engines behave like this while they are well.
    pub fn add_pool(&self, id: &PoolId, well: &Script, memory: EngineMemory) {
        let mut inner = self.lock();
        inner.healthy.insert(id.clone(), well.clone());
        inner.scripts.insert(id.clone(), well.clone());
        inner.memory.insert(id.clone(), memory);
    }

    /// Time since the node was switched on.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Writes down what happens.
    pub fn record(&self, what: What) {
        self.put(&mut self.lock(), what);
    }

    fn put(&self, inner: &mut Inner, what: What) {
        inner.log.push(Entry { at: self.began.elapsed(), what });
    }

    /// What was written down from this entry on.
    #[must_use]
    pub fn log_from(&self, from: usize) -> Vec<Entry> {
        self.lock().log.get(from..).unwrap_or_default().to_vec()
    }

    /// Changes how engines of a pool behave.
    pub fn sicken(&self, pool: &PoolId, change: impl FnOnce(&mut Script)) {
        let mut inner = self.lock();
        self.put(&mut inner, What::Ill(Some(pool.clone())));
        if let Some(script) = inner.scripts.get_mut(pool) {
            change(script);
        }
        self.tell_gpus(&inner);
    }

    /// Engines of a pool behave again. What could not be killed can be now, and strangers leave its ports.
    pub fn heal(&self, pool: &PoolId) {
        let mut inner = self.lock();
        let well = inner.healthy.get(pool).cloned();
        if let (Some(script), Some(well)) = (inner.scripts.get_mut(pool), well) {
            *script = well;
        }
        self.put(&mut inner, What::Well(Some(pool.clone())));
        let stuck: Vec<usize> =
            (0..inner.engines.len()).filter(|i| inner.engines[*i].launch.key.pool == *pool).collect();
        for at in stuck {
            inner.engines[at].script.unkillable = false;
            if inner.engines[at].doomed {
                self.end(&mut inner, at, Failure::crash(Exit::Signal(9)));
                self.go(&mut inner, at);
            }
        }
        self.tell_gpus(&inner);
    }

    /// Ends the main processes of a pool, as somebody else's KILL would.
    pub fn crash(&self, pool: &PoolId) {
        let mut inner = self.lock();
        self.put(&mut inner, What::Ill(Some(pool.clone())));
        let of_pool: Vec<usize> =
            (0..inner.engines.len()).filter(|i| inner.engines[*i].launch.key.pool == *pool).collect();
        for at in of_pool {
            self.end(&mut inner, at, Failure::crash(Exit::Signal(9)));
        }
        let cured = inner.scripts.get(pool) == inner.healthy.get(pool);
        if cured {
            self.put(&mut inner, What::Well(Some(pool.clone())));
        }
    }

    /// Changes a device.
    pub fn device(&self, at: usize, change: impl FnOnce(&mut SimDevice)) {
        let mut inner = self.lock();
        if !inner.devices.is_empty() {
            let at = at % inner.devices.len();
            change(&mut inner.devices[at]);
        }
        self.judge_devices(&mut inner);
    }

    /// Changes every device.
    pub fn each_device(&self, mut change: impl FnMut(&mut SimDevice)) {
        let mut inner = self.lock();
        inner.devices.iter_mut().for_each(&mut change);
        self.judge_devices(&mut inner);
    }

    /// The devices as they really are.
    #[must_use]
    pub fn devices(&self) -> Vec<SimDevice> {
        self.lock().devices.clone()
    }

    /// Whether nobody can say who holds memory.
    pub fn blind(&self, blind: bool) {
        let mut inner = self.lock();
        inner.blind = blind;
        self.judge_devices(&mut inner);
    }

    /// Engines may be ended for what is wrong with the devices.
    fn judge_devices(&self, inner: &mut Inner) {
        let ill = inner.blind || inner.devices.iter().any(|d| !d.present || !d.shown.health.admits());
        self.put(inner, if ill { What::Ill(None) } else { What::Well(None) });
        self.tell_gpus(inner);
    }

    /// Strangers listen on these ports.
    pub fn take_ports(&self, ports: impl IntoIterator<Item = u16>) {
        self.lock().taken_ports = ports.into_iter().collect();
    }

    /// The newest process of a replica of which something may exist.
    #[must_use]
    pub fn process_of(&self, key: &ReplicaKey) -> Option<u32> {
        self.lock().engines.iter().rev().find(|e| e.launch.key == *key).map(|e| e.launch.pid)
    }

    /// What a probe would see of the devices and of who holds memory.
    fn tell_gpus(&self, inner: &Inner) {
        let alive = |e: &&Engine| !e.left;
        let mut holders = Vec::new();
        for e in inner.engines.iter().filter(alive) {
            let held = inner.scripts.get(&e.launch.key.pool).map_or(Held::There, |s| s.held);
            let elsewhere = inner.devices.iter().map(|d| &d.shown.uuid).find(|u| !e.launch.devices.contains(u));
            let holds: Vec<&String> = match held {
                Held::There => e.launch.devices.iter().collect(),
                Held::Nowhere => Vec::new(),
                Held::Elsewhere => e.launch.devices.iter().chain(elsewhere).collect(),
            };
            holders.extend(holds.into_iter().map(|uuid| Holder {
                uuid: uuid.clone(),
                pid: e.launch.pid,
                bytes: e.launch.bytes.max(1),
            }));
        }
        let present = inner.devices.iter().filter(|d| d.present);
        let devices: Vec<DeviceSnapshot> = present
            .map(|d| {
                let ours: u64 = holders.iter().filter(|h| h.uuid == d.shown.uuid).map(|h| h.bytes).sum();
                let total = d.shown.vram_total;
                let used = ours.saturating_add(d.foreign).min(total);
                DeviceSnapshot { vram_used: used, vram_free: total - used, vram_foreign: d.foreign, ..d.shown.clone() }
            })
            .collect();
        self.gpus.set_residency(match (inner.blind, self.provable) {
            (true, _) => Residency::Unknown("the driver does not answer".into()),
            (false, true) => Residency::Provable(holders),
            (false, false) => Residency::Simulated(holders),
        });
        self.gpus.change(|i| i.devices = devices);
    }

    /// The main process ends.
    fn end(&self, inner: &mut Inner, at: usize, failure: Failure) {
        let engine = &mut inner.engines[at];
        if std::mem::replace(&mut engine.ended, true) {
            return;
        }
        let (pid, leaves_child) = (engine.launch.pid, engine.script.leaves_child);
        let (exit, lag) = (engine.exit.clone(), engine.script.exit_lag);
        tokio::spawn(async move {
            tokio::time::sleep(lag).await;
            exit.send_replace(Some(failure));
        });
        self.put(inner, What::Ended(pid));
        if self.plant == Plant::GoneTooEarly {
            inner.engines[at].gone.send_replace(true);
        }
        if !leaves_child {
            self.go(inner, at);
        }
    }

    /// Nothing is left.
    fn go(&self, inner: &mut Inner, at: usize) {
        let pid = inner.engines[at].launch.pid;
        if !std::mem::replace(&mut inner.engines[at].left, true) {
            inner.engines[at].gone.send_replace(true);
            self.put(inner, What::Gone(pid));
            self.tell_gpus(inner);
        }
    }

    fn later(&self, after: Duration, at: usize, failure: Failure) {
        let me = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            if let Some(world) = me.upgrade() {
                world.end(&mut world.lock(), at, failure);
            }
        });
    }

    /// The engine that listens at an address, and how its pool behaves now.
    fn at(&self, addr: SocketAddr) -> Option<(usize, Script)> {
        let inner = self.lock();
        let at = inner.engines.iter().rposition(|e| e.addr == addr && !e.ended)?;
        let script = inner.scripts.get(&inner.engines[at].launch.key.pool)?.clone();
        Some((at, script))
    }

    fn script_of(&self, pool: &PoolId) -> Option<Script> {
        self.lock().scripts.get(pool).cloned()
    }
}

#[derive(Debug)]
struct Handle {
    world: Arc<World>,
    at: usize,
    pid: u32,
}

impl Handle {
    fn with<T>(&self, look: impl FnOnce(&Engine) -> T) -> T {
        look(&self.world.lock().engines[self.at])
    }
}

#[async_trait]
impl RunningEngine for Handle {
    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }
    fn pids(&self) -> Vec<u32> {
        vec![self.pid]
    }
    async fn exited(&self) -> Failure {
        let mut exit = self.with(|e| e.exit.subscribe());
        let seen = exit.wait_for(Option::is_some).await.ok().and_then(|f| f.clone());
        seen.unwrap_or_else(|| Failure::crash(Exit::Unknown))
    }
    async fn gone(&self) {
        let mut gone = self.with(|e| e.gone.subscribe());
        let _ = gone.wait_for(|g| *g).await;
    }
    fn terminate(&self) {
        self.world.record(What::Term(self.pid));
        let (takes, unkillable) = self.with(|e| (e.script.term_takes, e.script.unkillable));
        if let (Some(takes), false) = (takes, unkillable) {
            self.world.later(takes, self.at, Failure::crash(Exit::Code(0)));
        }
    }
    fn kill(&self) {
        let world = &self.world;
        let mut inner = world.lock();
        world.put(&mut inner, What::Kill(self.pid));
        if inner.engines[self.at].script.unkillable {
            inner.engines[self.at].doomed = true;
        } else {
            world.end(&mut inner, self.at, Failure::crash(Exit::Signal(9)));
            world.go(&mut inner, self.at);
        }
    }
    fn progress(&self) -> u64 {
        let (progresses, began, load, ended) = self.with(|e| (e.script.progresses, e.began, e.script.load, e.ended));
        let seconds = began.elapsed().min(load.max(Duration::from_secs(1))).as_secs();
        if progresses && !ended { seconds } else { 0 }
    }
    fn listener(&self, _: SocketAddr) -> Listener {
        match self.with(|e| (e.script.foreign_listener, e.ended)) {
            (true, _) => Listener::Foreign,
            (false, true) => Listener::None,
            (false, false) => Listener::Own,
        }
    }
    fn executable(&self) -> Option<String> {
        Some("/sim/engine".into())
    }
    fn answers_at_once(&self) -> bool {
        true
    }
}

#[async_trait]
impl EngineProvisioner for World {
    async fn preflight(&self, spec: &PoolSpec) -> Result<(), Failure> {
        self.script_of(&spec.id).and_then(|s| s.preflight).map_or(Ok(()), Err)
    }
    fn external(&self, _: &PoolSpec) -> Option<SocketAddr> {
        None
    }
    fn admits(&self, _: &PoolSpec) -> Result<(), NotAdmitted> {
        Ok(())
    }
    fn memory(&self, spec: &PoolSpec) -> EngineMemory {
        self.lock().memory.get(&spec.id).copied().unwrap_or(EngineMemory::Fixed(0))
    }
    async fn prepare(&self, request: &PrepareRequest) -> Result<PreparedEngine, Failure> {
        if self.script_of(&request.spec.id).is_some_and(|s| s.port_stolen) {
            self.lock().taken_ports.insert(request.listen.port());
        }
        Ok(PreparedEngine {
            entry: Some("/sim/engine".into()),
            args: Vec::new(),
            env: Vec::new(),
            confinement: Default::default(),
            endpoint: Endpoint {
                addr: request.listen,
                kind: "sim".into(),
                model: request.model.id.clone(),
                model_path: None,
                workload: request.spec.workload,
            },
            engine_version: "1".into(),
        })
    }
}

#[async_trait]
impl EngineHost for World {
    fn port_free(&self, addr: SocketAddr) -> bool {
        let taken = self.lock().taken_ports.contains(&addr.port());
        !taken && self.at(addr).is_none()
    }
    fn nonce(&self) -> String {
        let mut inner = self.lock();
        inner.nonces += 1;
        format!("nonce-{}", inner.nonces)
    }
    async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure> {
        let (key, generation) = (&record.key, record.generation);
        let gone = || Failure::crash(Exit::Unknown);
        let script = self.script_of(&key.pool).ok_or_else(gone)?;
        self.record(What::Launching(key.clone(), generation));
        let durable = self.ledger.last_generation(key).await == generation;
        tokio::time::sleep(script.launch_takes).await;
        // It is born as its pool is now.
        let script = self.script_of(&key.pool).ok_or_else(gone)?;
        if let Some(failure) = script.launch {
            self.record(What::LaunchFailed(key.clone(), generation));
            return Err(failure);
        }
        let (at, pid) = {
            let mut inner = self.lock();
            let at = inner.engines.len();
            let pid = FIRST_PID + u32::try_from(at).unwrap_or(u32::MAX - FIRST_PID);
            let launch = Launch {
                pid,
                key: key.clone(),
                generation,
                devices: record.devices.uuids.clone(),
                bytes: record.bytes.iter().copied().max().unwrap_or(0),
                durable,
                foreign_listener: script.foreign_listener,
                unkillable: script.unkillable,
                exit_lag: script.exit_lag,
            };
            inner.engines.push(Engine {
                launch: launch.clone(),
                addr: engine.endpoint.addr,
                nonce: record.nonce.clone(),
                script: script.clone(),
                began: Instant::now(),
                ended: false,
                doomed: false,
                left: false,
                exit: watch::Sender::new(None),
                gone: watch::Sender::new(false),
            });
            self.put(&mut inner, What::Launched(launch));
            self.tell_gpus(&inner);
            (at, pid)
        };
        if let Some(after) = script.dies_after {
            self.later(after, at, script.death);
        }
        let world = self.me.upgrade().ok_or_else(gone)?;
        Ok(Arc::new(Handle { world, at, pid }))
    }
    async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted> {
        let found = self.lock().engines.iter().position(|e| e.nonce == record.nonce);
        match (found, self.me.upgrade()) {
            (Some(at), Some(world)) => {
                let pid = self.lock().engines[at].launch.pid;
                Ok(Arc::new(Handle { world, at, pid }))
            }
            _ => {
                let why = Failure::new(FailureClass::Crash(Exit::Unknown), "nothing was launched");
                Err(NotAdopted { why, rest: None })
            }
        }
    }
    async fn end_unknown(&self, _: &[EngineRecord], _: &[String]) -> Vec<String> {
        Vec::new()
    }
    fn device_clear(&self, _: &str) -> bool {
        true
    }
}

#[async_trait]
impl EngineProbe for World {
    async fn up(&self, endpoint: &Endpoint) -> Up {
        let Some((at, now)) = self.at(endpoint.addr) else { return Up::Refused };
        tokio::time::sleep(now.health_takes).await;
        let inner = self.lock();
        let engine = &inner.engines[at];
        let loaded = engine.began.elapsed().as_secs_f64() / engine.script.load.as_secs_f64().max(0.001);
        if engine.ended {
            Up::Refused
        } else if engine.script.foreign_listener {
            Up::Serving
        } else if engine.script.serves && loaded >= 1.0 {
            now.up()
        } else {
            Up::Loading(None)
        }
    }
    async fn identify(&self, endpoint: &Endpoint) -> Result<Identity, Failure> {
        let nobody = || Failure::new(FailureClass::WrongServer, "nobody answers");
        let (at, _) = self.at(endpoint.addr).ok_or_else(nobody)?;
        let mut inner = self.lock();
        let engine = &inner.engines[at];
        if engine.script.wrong_model {
            return Err(Failure::new(FailureClass::WrongServer, "it serves another model"));
        }
        if !engine.script.foreign_listener {
            let pid = engine.launch.pid;
            self.put(&mut inner, What::Identified(pid));
        }
        Ok(Identity { model: endpoint.model.clone(), slots: 0, version: None })
    }
    async fn work(&self, endpoint: &Endpoint) -> Result<(), Failure> {
        let lost = || Failure::new(FailureClass::Health, "the connection was lost");
        let (at, now) = self.at(endpoint.addr).ok_or_else(lost)?;
        if now.hangs {
            return std::future::pending().await;
        }
        tokio::time::sleep(now.work_takes).await;
        let mut inner = self.lock();
        let (pid, ended) = (inner.engines[at].launch.pid, inner.engines[at].ended);
        if ended {
            return Err(lost());
        }
        self.put(&mut inner, What::Worked(pid));
        Ok(())
    }
    async fn busy(&self, endpoint: &Endpoint) -> Option<u16> {
        self.at(endpoint.addr).and_then(|(_, now)| now.busy)
    }
}
