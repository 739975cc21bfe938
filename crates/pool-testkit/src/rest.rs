//! GPUs, models and durable facts that exist in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::charges::Said;
use pool_domain::echo::Source;
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::{OnDeadline, Past, Policy};
use pool_domain::perf::{Perf, PerfKey, Speeds};
use pool_domain::plan::Split;
use pool_domain::{
    DeviceHealth, DeviceMask, DeviceSnapshot, Failure, FailureClass, Generation, ModelProfile, ModelRef, PoolId,
    ReplicaKey, Tick,
};
use pool_services::ports::{
    AgainstDevices, EngineRecord, GpuProbe, Handoff, Incident, Incidents, Inventory, LedgerError, ModelStore, Presence,
    Reach, Residency, ResolvedModel, Staging, StagingStep, StagingTold, StateLedger, StoredPool,
};
use pool_services::snapshot::LastError;
use pool_services::spec::{Activation, PoolSpec, Workload};
use tokio::sync::watch;
use tokio::time::Instant;

/// A healthy GPU with `vram` bytes.
#[must_use]
pub fn gpu(index: u32, vram: u64) -> DeviceSnapshot {
    DeviceSnapshot {
        uuid: format!("GPU-51000000-0000-4000-8000-{index:012}"),
        index,
        name: "Fake GPU".into(),
        pci_bus_id: None,
        compute_capability: Some((8, 9)),
        numa_node: None,
        vram_total: vram,
        vram_free: vram,
        vram_used: 0,
        vram_reserved: 0,
        vram_foreign: 0,
        utilisation: None,
        health: DeviceHealth::Ok,
        mig: None,
        mig_parent: false,
        verdict: Default::default(),
        details: Default::default(),
    }
}

/// A pool of one replica of `stub:tiny` that starts with the manager.
///
/// # Panics
/// When `id` is no pool id.
#[must_use]
pub fn spec(id: &str) -> PoolSpec {
    PoolSpec {
        id: id.parse().expect("a pool id"),
        model: ModelRef::Stub("tiny".into()),
        engine: "stub".parse().expect("an engine name"),
        args: Vec::new(),
        version: String::new(),
        workload: Workload::Generate,
        devices: vec![DeviceMask::Auto],
        replicas: 1,
        activation: Activation::Preload,
        idle_ttl: None,
        pin: false,
        context: None,
        slots: 4,
        kv_type: Default::default(),
        tensor_split: Split::Off,
        vram: Some(1 << 30),
        aliases: Vec::new(),
        policy: Policy::default(),
        isolation: Default::default(),
        drain_deadline: Duration::from_secs(30),
        on_deadline: OnDeadline::Force,
        reload: Default::default(),
    }
}

/// GPUs whose inventory a test sets.
#[derive(Debug)]
pub struct FakeGpus {
    inventory: watch::Sender<Inventory>,
    incidents: watch::Sender<Incidents>,
    residency: Mutex<Residency>,
}

impl FakeGpus {
    /// With these devices.
    #[must_use]
    pub fn with(devices: Vec<DeviceSnapshot>) -> Self {
        let inventory = Inventory { simulated: true, devices, ..Inventory::default() };
        Self {
            inventory: watch::Sender::new(inventory),
            incidents: watch::Sender::default(),
            residency: Mutex::new(Residency::Simulated(Vec::new())),
        }
    }

    /// Changes the inventory.
    pub fn change(&self, f: impl FnOnce(&mut Inventory)) {
        self.inventory.send_modify(f);
    }

    /// Has the driver say something of a device.
    pub fn say(&self, device: &str, said: Said) {
        self.say_by(device, said, Source::Driver);
    }

    /// The same of one of those who may say it.
    pub fn say_by(&self, device: &str, said: Said, source: Source) {
        self.incidents.send_modify(|all| {
            all.push(Incident { device: device.to_owned(), reach: Reach::Device, said, pid: None, source });
        });
    }

    /// What it said is told to nobody who comes later.
    pub fn forget_incidents(&self) {
        self.incidents.send_modify(|all| *all = Incidents::default());
    }

    /// Sets who holds memory.
    pub fn set_residency(&self, residency: Residency) {
        *self.residency.lock().unwrap_or_else(PoisonError::into_inner) = residency;
    }
}

#[async_trait]
impl GpuProbe for FakeGpus {
    fn inventory(&self) -> watch::Receiver<Inventory> {
        self.inventory.subscribe()
    }
    fn incidents(&self) -> watch::Receiver<Incidents> {
        self.incidents.subscribe()
    }
    async fn residency(&self) -> Residency {
        self.residency.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Models that are present, or fail as told.
#[derive(Debug, Default)]
pub struct FakeModels {
    failure: Mutex<Option<Failure>>,
    profile: Mutex<Option<ModelProfile>>,
    takes: Mutex<Duration>,
    missing: Mutex<BTreeSet<String>>,
    /// Steps of a fetch, and the time of each.
    fetch: Mutex<Option<(u64, Duration)>>,
    fetched: Mutex<BTreeSet<String>>,
    /// Fetches under way.
    fetching: AtomicUsize,
}

impl FakeModels {
    /// Every model has to be fetched from now on: so many bytes, one by one, each in this time.
    pub fn set_fetch(&self, bytes: u64, each: Duration) {
        *self.fetch.lock().unwrap_or_else(PoisonError::into_inner) = Some((bytes, each));
    }

    /// Fetches under way.
    pub fn fetching(&self) -> usize {
        self.fetching.load(Ordering::SeqCst)
    }

    fn has_to_be_fetched(&self, model: &ModelRef) -> Option<(u64, Duration)> {
        let fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner).contains(&model.model_id());
        self.fetch.lock().unwrap_or_else(PoisonError::into_inner).filter(|_| !fetched)
    }

    /// The model of this id is not to be had from now on.
    pub fn missing(&self, id: &str) {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
    }

    /// What every model's header says from now on.
    pub fn set_profile(&self, profile: ModelProfile) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(profile);
    }

    /// How long later requests take.
    pub fn set_slow(&self, takes: Duration) {
        *self.takes.lock().unwrap_or_else(PoisonError::into_inner) = takes;
    }

    /// Every later request fails with this, or succeeds again.
    pub fn fail(&self, failure: Option<Failure>) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }
}

/// Counts itself, also when it is dropped in the middle.
struct UnderWay<'a>(&'a AtomicUsize);

impl<'a> UnderWay<'a> {
    fn of(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl ModelStore for FakeModels {
    fn permits(&self, _: &ModelRef) -> Result<(), String> {
        Ok(())
    }
    async fn look(&self, model: &ModelRef) -> Result<Presence, Failure> {
        if self.has_to_be_fetched(model).is_some() {
            return Ok(Presence::Remote);
        }
        let (untold, _) = watch::channel(None);
        self.ensure_present(model, &untold).await.map(Presence::Here)
    }
    async fn ensure_present(&self, model: &ModelRef, told: &StagingTold) -> Result<ResolvedModel, Failure> {
        if let Some((bytes, each)) = self.has_to_be_fetched(model) {
            let _under_way = UnderWay::of(&self.fetching);
            for done in 0..=bytes {
                let rate = if done == 0 { 0 } else { 2 };
                let staging = Staging { step: StagingStep::Fetching, done, total: Some(bytes), rate };
                told.send_replace(Some(staging));
                slowly(each).await;
            }
            self.fetched.lock().unwrap_or_else(PoisonError::into_inner).insert(model.model_id());
        }
        let takes = *self.takes.lock().unwrap_or_else(PoisonError::into_inner);
        slowly(takes).await;
        if self.missing.lock().unwrap_or_else(PoisonError::into_inner).contains(&model.model_id()) {
            return Err(Failure::new(FailureClass::Artifact, "there is no such model"));
        }
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(f) => Err(f),
            None => Ok(ResolvedModel { id: model.model_id(), local_path: None, bytes: 0 }),
        }
    }
    async fn profile(&self, _: &ResolvedModel) -> Result<Option<ModelProfile>, Failure> {
        Ok(self.profile.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Not even a turn of the timer where nothing is to be waited for.
async fn slowly(takes: Duration) {
    if !takes.is_zero() {
        tokio::time::sleep(takes).await;
    }
}

#[derive(Debug, Default)]
struct Facts {
    generations: BTreeMap<ReplicaKey, Generation>,
    pasts: BTreeMap<ReplicaKey, Past>,
    last_errors: BTreeMap<ReplicaKey, LastError>,
    against_devices: AgainstDevices,
    past_writes: u64,
    held: BTreeSet<PoolId>,
    handoffs: BTreeMap<ReplicaKey, Handoff>,
    records: BTreeMap<ReplicaKey, EngineRecord>,
    learnt: BTreeMap<(PoolId, CorrectionKey), Correction>,
    speeds: BTreeMap<PoolId, Speeds>,
    stored: BTreeMap<PoolId, StoredPool>,
    broken: bool,
    lies: bool,
    refuses_pools: bool,
    lies_about_pools: bool,
    hangs_pools: bool,
    takes: Duration,
}

/// Durable facts in memory; can be told to refuse writes.
#[derive(Debug, Default)]
pub struct FakeLedger {
    facts: Mutex<Facts>,
    booted: OnceLock<Instant>,
}

impl FakeLedger {
    fn facts(&self) -> std::sync::MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the machine was started: at the first question.
    pub fn booted(&self) -> Instant {
        *self.booted.get_or_init(Instant::now)
    }

    /// What a reboot takes with it: nothing is held against a device that was reset.
    pub fn forget_devices(&self) {
        self.facts().against_devices = AgainstDevices::default();
    }

    /// Whether later writes fail, as on a full disk.
    pub fn set_broken(&self, broken: bool) {
        self.facts().broken = broken;
    }

    /// Whether writes that fail are there all the same, as after an `fsync` that failed.
    pub fn set_lying(&self, lies: bool) {
        self.facts().lies = lies;
    }

    /// Whether later writes of what pools are to be fail.
    pub fn refuse_pools(&self, refuse: bool) {
        self.facts().refuses_pools = refuse;
    }

    /// Whether later writes of what pools are to be fail and are there all the same.
    pub fn lie_about_pools(&self, lie: bool) {
        self.facts().lies_about_pools = lie;
    }

    /// Whether later writes of what pools are to be hang until this is lifted.
    pub fn hang_pools(&self, hang: bool) {
        self.facts().hangs_pools = hang;
    }

    async fn hangs(&self) {
        while self.facts().hangs_pools {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// What is written down of what a pool is to be.
    #[must_use]
    pub fn stored(&self, pool: &PoolId) -> Option<StoredPool> {
        self.facts().stored.get(pool).cloned()
    }

    /// Changes what is on record, as somebody with an editor might.
    pub fn tamper(&self, change: impl FnOnce(&mut BTreeMap<ReplicaKey, EngineRecord>)) {
        change(&mut self.facts().records);
    }

    /// How long later writes take, as on a slow disk.
    pub fn set_slow(&self, takes: Duration) {
        self.facts().takes = takes;
    }

    async fn slowly(&self) {
        let takes = self.facts().takes;
        slowly(takes).await;
    }

    /// A daemon takes the directory over: no handoff of an earlier one stands.
    pub fn reopen(&self) {
        self.facts().handoffs.clear();
    }

    /// The handoffs that stand.
    #[must_use]
    pub fn handoffs(&self) -> Vec<Handoff> {
        self.facts().handoffs.values().cloned().collect()
    }

    /// How often the past of a replica was written.
    #[must_use]
    pub fn past_writes(&self) -> u64 {
        self.facts().past_writes
    }

    fn or_a_lie(&self) -> Result<(), LedgerError> {
        match self.facts().lies_about_pools {
            true => Err(LedgerError { what: "the pool", source: std::io::ErrorKind::Other.into() }),
            false => Ok(()),
        }
    }

    fn write(&self, f: impl FnOnce(&mut Facts)) -> Result<(), LedgerError> {
        let mut facts = self.facts();
        if facts.broken {
            if facts.lies {
                f(&mut facts);
            }
            return Err(LedgerError { what: "a fact", source: std::io::ErrorKind::StorageFull.into() });
        }
        f(&mut facts);
        Ok(())
    }
}

#[async_trait]
impl StateLedger for FakeLedger {
    async fn last_generation(&self, key: &ReplicaKey) -> Generation {
        self.facts().generations.get(key).copied().unwrap_or_default()
    }
    async fn intend(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.generations.insert(key.clone(), generation);
        })
    }
    async fn past(&self, key: &ReplicaKey, _: Tick) -> Past {
        self.facts().pasts.get(key).copied().unwrap_or_default()
    }
    async fn last_error(&self, key: &ReplicaKey) -> Option<LastError> {
        self.facts().last_errors.get(key).cloned()
    }
    async fn against_devices(&self) -> AgainstDevices {
        self.facts().against_devices.clone()
    }
    async fn note_against_devices(&self, held: &AgainstDevices) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| f.against_devices.clone_from(held))
    }
    async fn note_past(
        &self,
        key: &ReplicaKey,
        past: Past,
        last_error: Option<&LastError>,
        _: Tick,
    ) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.pasts.insert(key.clone(), past);
            f.last_errors.extend(last_error.map(|e| (key.clone(), e.clone())));
            f.past_writes += 1;
        })
    }
    async fn held(&self, pool: &PoolId) -> bool {
        self.facts().held.contains(pool)
    }
    async fn set_hold(&self, pool: &PoolId, held: bool) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            if held {
                f.held.insert(pool.clone());
            } else {
                f.held.remove(pool);
            }
        })
    }
    async fn record(&self, record: &EngineRecord) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.records.insert(record.key.clone(), record.clone());
        })
    }
    async fn forget(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| f.records.retain(|k, r| k != key || r.generation > generation))
    }
    async fn recorded(&self) -> Vec<EngineRecord> {
        self.facts().records.values().cloned().collect()
    }
    async fn publish_handoff(&self, handoff: &Handoff) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.handoffs.insert(handoff.key.clone(), handoff.clone());
        })
    }
    async fn withdraw_handoff(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.handoffs.retain(|k, h| k != key || h.generation > generation);
        })
    }
    async fn learnt(&self, pool: &PoolId, key: &CorrectionKey) -> Option<Correction> {
        self.facts().learnt.get(&(pool.clone(), key.clone())).copied()
    }
    async fn learn(&self, pool: &PoolId, key: &CorrectionKey, correction: Correction) -> Result<(), LedgerError> {
        self.facts().learnt.insert((pool.clone(), key.clone()), correction);
        Ok(())
    }
    async fn speeds(&self, pool: &PoolId) -> Speeds {
        self.facts().speeds.get(pool).cloned().unwrap_or_default()
    }
    async fn note_speed(&self, pool: &PoolId, key: &PerfKey, perf: Perf) -> Result<(), LedgerError> {
        self.facts().speeds.entry(pool.clone()).or_default().keep(key.clone(), perf);
        Ok(())
    }
    async fn stored_pools(&self) -> Vec<StoredPool> {
        self.facts().stored.values().cloned().collect()
    }
    async fn store_pool(&self, pool: &StoredPool) -> Result<(), LedgerError> {
        self.slowly().await;
        self.hangs().await;
        if self.facts().refuses_pools {
            return Err(LedgerError { what: "the pool", source: std::io::ErrorKind::StorageFull.into() });
        }
        self.write(|f| {
            f.stored.insert(pool.pool.clone(), pool.clone());
        })?;
        self.or_a_lie()
    }
    async fn drop_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        self.slowly().await;
        self.hangs().await;
        self.write(|f| {
            f.stored.remove(pool);
        })?;
        self.or_a_lie()
    }
    async fn forget_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        self.slowly().await;
        self.write(|f| {
            f.held.remove(pool);
            f.pasts.retain(|key, _| key.pool != *pool);
            f.learnt.retain(|(of, _), _| of != pool);
            f.speeds.remove(pool);
        })
    }
}
