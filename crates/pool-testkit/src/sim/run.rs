//! Carries a schedule out on paused time, and looks whether everything stays true.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pool_domain::lifecycle::OnDeadline;
use pool_domain::reserve::available;
use pool_domain::{
    DeviceHealth, DeviceMask, Failure, FailureClass, KvShape, LayerProfile, ModelFormat, ModelProfile, PoolId,
    ReplicaKey,
};
use pool_services::admission::SlotGuard;
use pool_services::{
    Activation, ControlError, DrainOptions, LeaseRequest, NodeSnapshot, OperationState, PoolControl, PoolManager,
    PoolSnapshot, PoolSpec,
};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::checks::{self, Held, Invariant, View};
use super::schedule::{Act, Schedule, SimPool, health};
use super::truth::{Entry, Scene, Verb, What};
use super::world::World;
use super::{Outcome, Plant, Violation};

/// How long anything may take in the end, beyond what a pool's own numbers allow.
const SLACK: Duration = Duration::from_secs(60);

/// Who looks, at what, and what was found.
#[derive(Debug)]
struct Watch {
    world: Arc<World>,
    schedule: Schedule,
    found: Notify,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    invariants: Vec<Box<dyn Invariant>>,
    scene: Scene,
    seen: usize,
    life: u32,
    violation: Option<Violation>,
    guards: Vec<(ReplicaKey, u32, SlotGuard)>,
}

impl Watch {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong(&self, invariant: &'static str, detail: String) {
        let at = self.world.now();
        self.lock().violation.get_or_insert(Violation { invariant, detail, at });
        self.found.notify_one();
    }

    async fn look(&self, m: &PoolManager) {
        let (Ok(pools), Ok(node)) = (m.pools().await, m.node().await) else { return };
        self.judge(&pools, &node);
    }

    fn judge(&self, pools: &[PoolSnapshot], node: &NodeSnapshot) {
        let Inner { invariants, scene, seen, life, violation, guards } = &mut *self.lock();
        if violation.is_some() {
            return;
        }
        let mut verdict = Ok(());
        for entry in self.world.log_from(*seen) {
            scene.saw(&entry);
            *seen += 1;
            for i in invariants.iter_mut() {
                verdict = verdict.and(i.saw(&entry, scene, &self.schedule).map_err(|e| (i.name(), e)));
            }
        }
        let leases: Vec<Held> =
            guards.iter().map(|(key, pid, g)| Held { key: key.clone(), pid: *pid, valid: g.valid() }).collect();
        let now = self.world.now();
        let view = View { now, life: *life, schedule: &self.schedule, scene, pools, node, leases: &leases };
        for i in invariants.iter_mut() {
            verdict = verdict.and(i.look(&view).map_err(|e| (i.name(), e)));
        }
        if let Err((invariant, detail)) = verdict {
            *violation = Some(Violation { invariant, detail, at: now });
            self.found.notify_one();
        }
    }
}

/// Looks at every picture that a pool publishes.
fn follow(watch: &Arc<Watch>, m: &PoolManager, id: &PoolId) -> JoinHandle<()> {
    let (watch, m, id) = (Arc::clone(watch), m.clone(), id.clone());
    tokio::spawn(async move {
        let mut seen = 0;
        while let Ok(pool) = m.wait_pool(&id, seen, Duration::from_secs(36_000)).await {
            if pool.snapshot == seen {
                return; // a manager that has ended says nothing new, and says so at once
            }
            seen = pool.snapshot;
            watch.look(&m).await;
        }
    })
}

struct Runner {
    world: Arc<World>,
    watch: Arc<Watch>,
    schedule: Schedule,
    plant: Plant,
    manager: PoolManager,
    followers: Vec<JoinHandle<()>>,
    /// Facts cannot be written now.
    unwritable: bool,
    /// Whether each pool is to run in the end, where that is plain.
    wanted: BTreeMap<PoolId, Option<bool>>,
}

async fn manager(world: &Arc<World>, schedule: &Schedule, plant: Plant, life: u32) -> Option<PoolManager> {
    let builder = PoolManager::builder()
        .gpu(Arc::clone(&world.gpus) as _)
        .models(Arc::clone(&world.models) as _)
        .provisioner(Arc::clone(world) as _)
        .host(Arc::clone(world) as _)
        .probe(Arc::clone(world) as _)
        .ledger(Arc::clone(&world.ledger) as _)
        .engine_ports(schedule.ports.clone())
        .pools(schedule.pools.iter().map(|p| p.spec.clone()).collect())
        .min_ready_time(schedule.min_ready_time)
        .seed(schedule.seed ^ u64::from(life));
    let builder = if plant == Plant::IgnoreGenerations { builder.ignore_generations() } else { builder };
    // Nobody reads the events: what does not fit is counted and lost.
    builder.start().await.ok().map(|(m, _)| m)
}

impl Runner {
    fn pool(&self, at: usize) -> (PoolId, &PoolSpec) {
        let spec = &self.schedule.pools[at % self.schedule.pools.len()].spec;
        (spec.id.clone(), spec)
    }

    async fn ask<T>(
        &self,
        id: &PoolId,
        verb: Verb,
        question: impl Future<Output = Result<T, ControlError>>,
    ) -> Option<T> {
        self.world.record(What::Asking(id.clone(), verb));
        let answer = question.await;
        self.world.record(What::Asked(id.clone(), verb, answer.is_ok()));
        answer.ok()
    }

    async fn begin(&mut self, life: u32) {
        self.world.record(What::Started(life));
        self.watch.lock().life = life;
        for f in self.followers.drain(..) {
            f.abort();
        }
        for SimPool { spec, .. } in &self.schedule.pools {
            self.followers.push(follow(&self.watch, &self.manager, &spec.id));
        }
    }

    /// Ends the manager in order; says what is left where nothing should be.
    async fn shut_down(&mut self) {
        let ids: Vec<PoolId> = self.schedule.pools.iter().map(|p| p.spec.id.clone()).collect();
        for id in &ids {
            self.world.record(What::Asking(id.clone(), Verb::Shutdown));
        }
        let in_time = self.manager.shutdown(Duration::from_secs(120)).await;
        for id in &ids {
            self.world.record(What::Asked(id.clone(), Verb::Shutdown, in_time));
        }
        self.watch.look(&self.manager).await;
        let fenced = self.pictures().await.iter().any(|p| p.replicas.iter().any(|r| r.state == "fenced"));
        let left = self.watch.lock().scene.alive().find(|p| in_time || !p.launch.unkillable).cloned();
        if !in_time && !fenced {
            self.watch.wrong("shutdown_ends", "it did not end within its deadline".into());
        } else if let Some(p) = left {
            self.watch.wrong("shutdown_ends", format!("it ended with in_time = {in_time}, and there is {p:?}"));
        }
    }

    async fn pictures(&self) -> Vec<PoolSnapshot> {
        self.manager.pools().await.unwrap_or_default()
    }

    async fn act(&mut self, act: &Act) {
        let world = Arc::clone(&self.world);
        match *act {
            Act::Preload(at) => {
                let id = self.pool(at).0;
                self.ask(&id, Verb::Preload, self.manager.preload(&id)).await;
                self.wanted.insert(id, Some(true));
            }
            Act::Drain(at, deadline, on_deadline) => {
                let (id, spec) = self.pool(at);
                let takes = deadline.unwrap_or(spec.drain_deadline);
                let force = on_deadline.unwrap_or(spec.on_deadline) == OnDeadline::Force;
                let verb = if force { Verb::Force(takes) } else { Verb::Abort(takes) };
                self.ask(&id, verb, self.manager.drain(&id, DrainOptions { deadline, on_deadline })).await;
                self.wanted.insert(id, force.then_some(false));
            }
            Act::Resume(at) => {
                let (id, spec) = self.pool(at);
                let wanted = (spec.activation == Activation::Preload).then_some(true);
                self.ask(&id, Verb::Resume, self.manager.resume(&id)).await;
                self.wanted.insert(id, wanted);
            }
            Act::Stop(at) => {
                let id = self.pool(at).0;
                self.ask(&id, Verb::Force(Duration::ZERO), self.manager.stop(&id)).await;
                self.wanted.insert(id, Some(false));
            }
            Act::Bounce(at) => {
                let id = self.pool(at).0;
                self.ask(&id, Verb::Force(Duration::ZERO), self.manager.stop(&id)).await;
                self.ask(&id, Verb::Preload, self.manager.preload(&id)).await;
                self.wanted.insert(id, Some(true));
            }
            Act::Reset(at) => {
                let id = self.pool(at).0;
                self.ask(&id, Verb::Reset, self.manager.reset_breaker(&id)).await;
            }
            Act::Take(at, n) => {
                let id = self.pool(at).0;
                for _ in 0..n {
                    if let Ok((key, guard)) = self.manager.allocate_lease(&id) {
                        let pid = world.process_of(&key).unwrap_or(0);
                        world.record(What::Granted(id.clone(), pid));
                        self.watch.lock().guards.push((key, pid, guard));
                    }
                }
            }
            Act::Release(n) => {
                let mut at = 0;
                self.watch.lock().guards.retain(|_| {
                    at += 1;
                    at % n != 0
                });
            }
            Act::Ask(at, ttl) => {
                let (id, spec) = self.pool(at);
                let demand = spec.activation == Activation::OnDemand;
                if demand && !self.pictures().await.iter().any(|p| p.pool_id == id && p.hold) {
                    let plain = self.wanted.get(&id).copied().flatten();
                    self.wanted.insert(id.clone(), plain.filter(|w| *w));
                }
                self.ask(&id, Verb::Demand, self.manager.lease(&id, LeaseRequest::lasting(ttl))).await;
            }
            Act::Restart => self.restart().await,
            Act::Sicken(at, seed) => {
                let id = self.pool(at).0;
                let rng = &mut fastrand::Rng::with_seed(seed);
                let mut what = Vec::new();
                world.sicken(&id, |s| what.extend((0..rng.u32(1..=3)).map(|_| s.sicken(rng))));
                world.record(What::Step(format!("{id} has {}", what.join(", "))));
            }
            Act::Heal(at) => world.heal(&self.pool(at).0),
            Act::Crash(at) => world.crash(&self.pool(at).0),
            Act::Health(at, n) => world.device(at, |d| d.shown.health = health(n)),
            Act::Present(at, present) => world.device(at, |d| d.present = present),
            Act::Foreign(at, gib) => world.device(at, |d| d.foreign = gib << 30),
            Act::Ports(n) => world.take_ports(self.schedule.ports.clone().take(usize::from(n))),
            Act::Blind(blind) => world.blind(blind),
            Act::LedgerBroken(broken) => {
                world.record(What::Writable(!broken));
                world.ledger.set_broken(broken);
                self.unwritable = broken;
            }
            Act::LedgerSlow(takes) => world.ledger.set_slow(takes),
            Act::Models(n) => world.models.fail(match n {
                0 => None,
                1 => Some(Failure::new(FailureClass::Health, "the network is down")),
                _ => Some(Failure::new(FailureClass::Artifact, "the model file is missing")),
            }),
            Act::ModelsSlow(takes) => world.models.set_slow(takes),
            Act::Wait => {}
        }
    }

    async fn restart(&mut self) {
        self.shut_down().await;
        // What could not be killed keeps the next manager from its devices; no port can tell it so yet.
        for SimPool { spec, .. } in &self.schedule.pools {
            self.world.heal(&spec.id);
        }
        self.world.ledger.reopen();
        let life = self.watch.lock().life + 1;
        let Some(next) = manager(&self.world, &self.schedule, self.plant, life).await else { return };
        self.manager = next;
        self.begin(life).await;
        for pool in self.pictures().await {
            let spec = checks::spec_of(&self.schedule, &pool.pool_id);
            let wanted = spec.is_some_and(|s| s.activation == Activation::Preload) && !pool.hold;
            // An engine whose end could not be written down has crashed, for all that the next manager knows.
            self.wanted.insert(pool.pool_id, if self.unwritable && !wanted { None } else { Some(wanted) });
        }
    }

    /// Faults stop and engines behave.
    fn calm(&self) {
        let world = &self.world;
        for SimPool { spec, .. } in &self.schedule.pools {
            world.heal(&spec.id);
        }
        world.blind(false);
        world.record(What::Writable(true));
        world.ledger.set_broken(false);
        world.ledger.set_slow(Duration::ZERO);
        world.models.fail(None);
        world.models.set_slow(Duration::ZERO);
        world.take_ports([]);
        world.each_device(|d| (d.present, d.foreign, d.shown.health) = (true, 0, DeviceHealth::Ok));
    }

    /// The longest that a pool's own numbers allow before it is Ready, with good engines.
    fn patience(&self) -> Duration {
        let of = |p: &SimPool| {
            let n = &p.spec.policy;
            // One start that was begun badly, the longest pause, one good start; a check that sees what was missed.
            let checks = (n.health.interval + n.health.timeout) * n.health.failures;
            n.start.max + Duration::from_secs(300) + n.backoff.max() + checks + n.stop.grace + n.stop.prove
        };
        self.schedule.pools.iter().map(of).max().unwrap_or_default() + SLACK
    }

    /// Whether this replica waits because its memory is really not there.
    fn waits_rightly(&self, spec: &PoolSpec, replica: u16, node: &NodeSnapshot) -> bool {
        let Some(bytes) = spec.vram else { return false };
        let left = |uuid: &String| {
            node.devices.iter().find(|(d, _)| d.uuid == *uuid).map_or(0, |(d, ours)| available(d, *ours))
        };
        let devices: Vec<_> = node.devices.iter().map(|(d, _)| d.clone()).collect();
        let mask = spec.mask_of(replica);
        let Ok(resolved) = mask.validate_against_discovered(&devices) else { return true };
        let mut short = resolved.uuids.iter().map(|u| left(u) < bytes);
        if *mask == DeviceMask::Auto { short.all(|s| s) } else { short.any(|s| s) }
    }

    /// Why the node does not rest as it should: a pool that should run is not Ready, or something is under way.
    async fn unrest(&self) -> Option<String> {
        let node = self.manager.node().await.unwrap_or_default();
        let mut waiting = Vec::new();
        for pool in self.pictures().await {
            let Some(spec) = checks::spec_of(&self.schedule, &pool.pool_id) else { continue };
            let wanted = self.wanted.get(&pool.pool_id).copied().flatten();
            for r in &pool.replicas {
                let waits = r.state == "waiting" && self.waits_rightly(spec, r.id.0, &node);
                if waits {
                    waiting.push(pool.pool_id.clone());
                }
                let yields = checks::yields(spec) && r.state == "idle";
                let rests = match wanted {
                    Some(true) => r.ready || r.state == "failed" || waits || yields,
                    Some(false) => matches!(r.state, "idle" | "failed"),
                    None => r.ready || matches!(r.state, "idle" | "failed") || waits,
                };
                if !rests {
                    let what = format!("{} {} {}", r.state, r.reason_code, r.reason);
                    return Some(format!("{} {:?} (to run: {wanted:?}) is {what}", pool.pool_id, r.id));
                }
            }
        }
        let running = self
            .manager
            .operations()
            .await
            .unwrap_or_default()
            .into_iter()
            .find(|o| o.state == OperationState::Running && !(o.verb == "preload" && waiting.contains(&o.pool_id)));
        running.map(|o| format!("operation {} of {} is still running: {}", o.verb, o.pool_id, o.progress))
    }

    async fn settle(&self, what: &'static str) {
        let end = self.world.now() + self.patience();
        let mut nap = Duration::from_millis(200);
        while let Some(why) = self.unrest().await {
            if self.world.now() > end {
                self.watch.wrong(what, why);
                return;
            }
            tokio::time::sleep(nap).await;
            nap = (nap * 2).min(Duration::from_secs(10));
        }
    }

    async fn go(&mut self) {
        self.begin(0).await;
        for step in std::mem::take(&mut self.schedule.steps) {
            self.world.record(What::Step(format!("{:?}", step.act)));
            self.act(&step.act).await;
            self.watch.look(&self.manager).await;
            tokio::time::sleep(step.then).await;
            self.watch.look(&self.manager).await;
        }
        self.world.record(What::Step("calm".into()));
        self.calm();
        self.watch.lock().guards.clear();
        self.settle("settles").await;
        let ids: Vec<PoolId> = self.schedule.pools.iter().map(|p| p.spec.id.clone()).collect();
        for id in ids {
            self.ask(&id, Verb::Preload, self.manager.preload(&id)).await;
            self.wanted.insert(id, Some(true));
        }
        self.settle("becomes_ready").await;
        self.watch.look(&self.manager).await;
        for pool in self.pictures().await {
            if let Some(r) = pool.replicas.iter().find(|r| r.state == "failed") {
                self.watch.wrong("becomes_ready", format!("{} failed with good engines: {}", pool.pool_id, r.reason));
            }
        }
        self.shut_down().await;
        let handoffs = self.world.ledger.handoffs();
        if !handoffs.is_empty() {
            self.watch.wrong("handoffs_end", format!("{handoffs:?}"));
        }
    }
}

/// A small model, as its header would tell.
fn header() -> ModelProfile {
    let kv = KvShape { heads_kv: 8, key_length: 128, value_length: 128, window: None };
    let layer =
        LayerProfile { bytes: 300 << 20, heads: 32, kv: Some(kv), feed_forward_length: 8192, ..Default::default() };
    ModelProfile {
        format: ModelFormat::Gguf,
        architecture: "llama".into(),
        layers: vec![layer; 8],
        input_bytes: 100 << 20,
        output_bytes: 100 << 20,
        other_bytes: 0,
        tied_embeddings: false,
        embedding_bytes: 100 << 20,
        embedding_length: 4096,
        context_length: 32_768,
        vocabulary: 32_000,
        experts: 0,
        experts_used: 0,
        quantisation: "Q8_0".into(),
        tensor_bytes: 3 << 30,
        header_digest: "sha256:sim".into(),
    }
}

async fn run_paused(schedule: Schedule, plant: Plant) -> Outcome {
    let world = World::new(schedule.devices.clone(), schedule.provable, plant);
    world.models.set_profile(header());
    let mut wanted = BTreeMap::new();
    for SimPool { spec, well, memory } in &schedule.pools {
        world.add_pool(&spec.id, well, *memory);
        wanted.insert(spec.id.clone(), Some(spec.activation == Activation::Preload));
    }
    let inner = Inner {
        invariants: checks::all(),
        scene: Scene::default(),
        seen: 0,
        life: 0,
        violation: None,
        guards: Vec::new(),
    };
    let (found, inner) = (Notify::new(), Mutex::new(inner));
    let watch = Arc::new(Watch { world: Arc::clone(&world), schedule: schedule.clone(), found, inner });
    if let Some(manager) = manager(&world, &schedule, plant, 0).await {
        let (world, watch) = (Arc::clone(&world), Arc::clone(&watch));
        let followers = Vec::new();
        let unwritable = false;
        let watch_too = Arc::clone(&watch);
        let mut runner = Runner { world, watch: watch_too, schedule, plant, manager, followers, unwritable, wanted };
        tokio::select! {
            biased;
            () = watch.found.notified() => {}
            () = runner.go() => {}
        }
    } else {
        watch.wrong("starts", "no manager could be built".into());
    }
    let log: Vec<Entry> = world.log_from(0);
    let violation = watch.lock().violation.take();
    Outcome { violation, log, lasted: world.now() }
}

/// Runs a schedule in a runtime of its own.
///
/// # Panics
/// When no runtime can be built.
#[must_use]
pub fn run(schedule: Schedule, plant: Plant) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime without input and output needs nothing").block_on(run_paused(schedule, plant))
}
