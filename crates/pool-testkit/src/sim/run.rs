//! Carries a schedule out on paused time, and looks whether everything stays true.
//!
//! Every life of the daemon is a runtime of its own. To kill it is to drop that runtime: whatever its tasks awaited never
//! comes. World, checks and clients live on.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pool_domain::lifecycle::OnDeadline;
use pool_domain::reserve::available;
use pool_domain::{DeviceHealth, DeviceMask, Failure, FailureClass, PoolId, ReplicaKey};
use pool_services::admission::SlotGuard;
use pool_services::planted::Bug;
use pool_services::{
    Activation, ControlError, Declared, DrainOptions, LeaseRequest, NodeSnapshot, OperationState, PoolControl,
    PoolManager, PoolSnapshot, PoolSpec, ReloadRequest, ReplicaSnapshot, Source,
};
use tokio::sync::Notify;

use super::checks::{self, Held, Invariant, View};
use super::reloads;
use super::schedule::{Act, Schedule, SimPool, health};
use super::truth::{Down, Entry, Scene, Verb, What};
use super::world::{Disk, World};
use super::{Outcome, Plant, Violation};

/// How long anything may take in the end, beyond what a pool's own numbers allow.
const SLACK: Duration = Duration::from_secs(60);
/// How long a daemon may take to end in order.
const SHUTDOWN: Duration = Duration::from_secs(120);

/// Who looks, at what, and what was found.
#[derive(Debug)]
struct Watch {
    world: Arc<World>,
    schedule: Schedule,
    found: Notify,
    inner: Mutex<Inner>,
}

/// Somebody who uses a slot, also when the daemon that granted it is gone.
#[derive(Debug)]
struct Client {
    key: ReplicaKey,
    pid: u32,
    guard: Option<SlotGuard>,
}

#[derive(Debug)]
struct Inner {
    invariants: Vec<Box<dyn Invariant>>,
    scene: Scene,
    seen: usize,
    life: u32,
    violation: Option<Violation>,
    clients: Vec<Client>,
    /// When a reload of a pool was last seen under way.
    reloads: Vec<(PoolId, Duration)>,
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
        let operations = m.operations().await.unwrap_or_default();
        {
            let inner = &mut *self.lock();
            reloads::follow(&self.world, &self.schedule, &inner.scene, &operations, &mut inner.reloads);
        }
        self.judge(Some((&pools, &node)));
    }

    /// Takes in what happened, and what is to be seen, if there is a manager.
    fn judge(&self, seen_now: Option<(&[PoolSnapshot], &NodeSnapshot)>) {
        let Inner { invariants, scene, seen, life, violation, clients, .. } = &mut *self.lock();
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
        let now = self.world.now();
        if let Some((pools, node)) = seen_now.filter(|_| !scene.leaving) {
            let held = |c: &Client| {
                let valid = c.guard.as_ref()?.valid();
                Some(Held { key: c.key.clone(), pid: c.pid, valid })
            };
            let leases: Vec<Held> = clients.iter().filter_map(held).collect();
            let handoffs = self.world.handoffs();
            let (schedule, leases, handoffs) = (&self.schedule, &*leases, &*handoffs);
            let view = View { now, life: *life, schedule, scene, pools, node, leases, handoffs };
            for i in invariants.iter_mut() {
                verdict = verdict.and(i.look(&view).map_err(|e| (i.name(), e)));
            }
        }
        if let Err((invariant, detail)) = verdict {
            *violation = Some(Violation { invariant, detail, at: now });
            self.found.notify_one();
        }
    }
}

/// Looks at every picture that a pool publishes.
fn follow(watch: &Arc<Watch>, m: &PoolManager, id: &PoolId) {
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
    });
}

struct Runner {
    world: Arc<World>,
    watch: Arc<Watch>,
    schedule: Schedule,
    plant: Plant,
    manager: Option<PoolManager>,
    /// Steps taken.
    at: usize,
    /// Daemons so far.
    lives: u32,
    /// How far the end has come, which is not to be begun twice.
    calm: bool,
    /// Whether each pool is to run in the end, where that is plain.
    wanted: BTreeMap<PoolId, Option<bool>>,
}

impl Runner {
    fn pool(&self, at: usize) -> (PoolId, PoolSpec) {
        let spec = &self.schedule.pools[at % self.schedule.pools.len()].spec;
        (spec.id.clone(), spec.clone())
    }

    fn sim(&self, at: usize) -> SimPool {
        self.schedule.pools[at % self.schedule.pools.len()].clone()
    }

    fn ids(&self) -> Vec<PoolId> {
        self.schedule.pools.iter().map(|p| p.spec.id.clone()).collect()
    }

    /// The daemon, which is started if there is none.
    async fn up(&mut self) -> PoolManager {
        if let Some(m) = &self.manager {
            return m.clone();
        }
        self.world.reopen();
        self.world.record(What::Started(self.lives));
        let world = &self.world;
        let mut builder = PoolManager::builder()
            .gpu(Arc::clone(&world.gpus) as _)
            .models(Arc::clone(world) as _)
            .provisioner(Arc::clone(world) as _)
            .host(Arc::clone(world) as _)
            .probe(Arc::clone(world) as _)
            .ledger(Arc::clone(world) as _)
            .engine_ports(self.schedule.ports.clone())
            .declared(reloads::pools(&self.schedule, world))
            .min_ready_time(self.schedule.min_ready_time)
            .boot_ms(u64::try_from(world.uptime().as_millis()).unwrap_or(u64::MAX))
            .seed(self.schedule.seed ^ u64::from(self.lives));
        let bug = match self.plant {
            Plant::IgnoreGenerations => Some(Bug::IgnoreGenerations),
            Plant::NeverClose => Some(Bug::NeverClose),
            Plant::NeverRevoke => Some(Bug::NeverRevoke),
            Plant::CommitsUnwritten => Some(Bug::CommitsUnwritten),
            Plant::CutsLeases => Some(Bug::CutsLeases),
            _ => None,
        };
        if let Some(bug) = bug {
            builder = builder.bug(bug);
        }
        // Nobody reads the events: what does not fit is counted and lost.
        let Ok((manager, _)) = builder.start().await else {
            self.watch.wrong("starts", "no manager could be built".into());
            return std::future::pending().await;
        };
        self.lives += 1;
        self.watch.lock().life = self.lives;
        self.manager = Some(manager.clone());
        for id in self.ids() {
            follow(&self.watch, &manager, &id);
        }
        for pool in manager.pools().await.unwrap_or_default() {
            let Some(spec) = checks::spec_of(&self.schedule, &pool.pool_id) else { continue };
            // A drain that may be given up may leave it running; one on demand may have been found so.
            let asked = self.wanted.get(&pool.pool_id).copied().flatten();
            let asked = asked.filter(|run| *run || !self.watch.lock().scene.may_give_up(&pool.pool_id));
            let wanted = match (spec.activation, pool.hold) {
                (Activation::Preload, false) => Some(true),
                (_, true) if spec.on_deadline == OnDeadline::Force => asked.filter(|run| !run),
                _ => None,
            };
            self.wanted.insert(pool.pool_id, wanted);
        }
        manager
    }

    /// The daemon is gone. Its clients do not know yet.
    fn down(&mut self, how: Down) {
        self.world.record(What::Down(how));
        self.manager = None;
        self.watch.lock().clients.iter_mut().for_each(|c| c.guard = None);
        self.watch.judge(None);
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

    /// Ends the manager in order; says what is left where nothing should be.
    async fn shut_down(&self, manager: &PoolManager) {
        let ids = self.ids();
        for id in &ids {
            self.world.record(What::Asking(id.clone(), Verb::Shutdown));
        }
        let in_time = manager.shutdown(SHUTDOWN).await;
        for id in &ids {
            self.world.record(What::Asked(id.clone(), Verb::Shutdown, in_time));
        }
        self.watch.look(manager).await;
        let fenced = pictures(manager).await.iter().any(|p| p.replicas.iter().any(|r| r.state == "fenced"));
        let known = |p: &&super::truth::Process| !p.disowned && (in_time || !p.launch.unkillable);
        let left = self.watch.lock().scene.alive().find(known).cloned();
        // An engine that belongs to no replica any more is Fenced nowhere: its devices stay closed.
        let stands = |p: &super::truth::Process| p.launch.unkillable || p.forged && !self.schedule.cgroups;
        // Nor can memory be proved that nobody tells of; or be told from what a stranger took while it came back.
        let stands = {
            let scene = &self.watch.lock().scene;
            scene.alive().any(stands) || scene.ill.contains(&None)
        };
        if !in_time && !fenced && !stands && !self.world.has_strangers() {
            self.watch.wrong("shutdown_ends", "it did not end within its deadline".into());
        } else if let Some(p) = left.filter(|_| in_time) {
            self.watch.wrong("shutdown_ends", format!("it ended in time, and there is {p:?}"));
        }
    }

    /// One act. `Break` when the daemon is gone, and its runtime with it.
    async fn act(&mut self, act: &Act) -> ControlFlow<()> {
        let world = Arc::clone(&self.world);
        match *act {
            Act::Preload(at) => {
                let (id, m) = (self.pool(at).0, self.up().await);
                let done = self.ask(&id, Verb::Preload, m.preload(&id)).await;
                self.wanted.insert(id, done.map(|_| true));
            }
            Act::Drain(at, deadline, on_deadline) => {
                let ((id, spec), m) = (self.pool(at), self.up().await);
                let takes = deadline.unwrap_or(spec.drain_deadline);
                let force = on_deadline.unwrap_or(spec.on_deadline) == OnDeadline::Force;
                let verb = if force { Verb::Force(takes) } else { Verb::Abort(takes) };
                self.wanted.insert(id.clone(), force.then_some(false));
                self.ask(&id, verb, m.drain(&id, DrainOptions { deadline, on_deadline })).await;
            }
            Act::Resume(at) => {
                let ((id, spec), m) = (self.pool(at), self.up().await);
                let wanted = (spec.activation == Activation::Preload).then_some(true);
                let done = self.ask(&id, Verb::Resume, m.resume(&id)).await;
                self.wanted.insert(id, done.and(wanted));
            }
            Act::Stop(at) => {
                let (id, m) = (self.pool(at).0, self.up().await);
                self.wanted.insert(id.clone(), Some(false));
                self.ask(&id, Verb::Force(Duration::ZERO), m.stop(&id)).await;
            }
            Act::Bounce(at) => {
                let (id, m) = (self.pool(at).0, self.up().await);
                self.wanted.insert(id.clone(), Some(false));
                self.ask(&id, Verb::Force(Duration::ZERO), m.stop(&id)).await;
                let done = self.ask(&id, Verb::Preload, m.preload(&id)).await;
                self.wanted.insert(id, done.map(|_| true));
            }
            Act::Reload(at, form, strategy, deadline) => {
                let (pool, m) = (self.sim(at), self.up().await);
                let id = pool.spec.id.clone();
                let request = ReloadRequest {
                    declared: Some((pool.form(form), form.to_string())),
                    strategy: Some(strategy),
                    deadline: Some(deadline),
                    ..ReloadRequest::default()
                };
                world.record(What::ReloadBy(id.clone(), deadline));
                self.ask(&id, Verb::Reload, m.reload(&id, request)).await;
            }
            Act::Rollback(at) => {
                let (pool, m) = (self.sim(at), self.up().await);
                world.record(What::ReloadBy(pool.spec.id.clone(), pool.spec.reload.deadline));
                self.ask(&pool.spec.id, Verb::Reload, m.rollback(&pool.spec.id)).await;
            }
            Act::Put(at, form) => {
                let (pool, m) = (self.sim(at), self.up().await);
                let id = pool.spec.id.clone();
                let declared = Declared { spec: pool.form(form), document: form.to_string(), source: Source::Api };
                let there = m.pool(&id).await.is_ok();
                if there {
                    world.record(What::ReloadBy(id.clone(), pool.spec.reload.deadline));
                    self.ask(&id, Verb::Reload, m.declare(declared, None)).await;
                } else if self.ask(&id, Verb::Declare, m.declare(declared, None)).await.is_some() {
                    self.wanted.insert(id.clone(), None);
                    follow(&self.watch, &m, &id);
                }
            }
            Act::Delete(at) => {
                let (pool, m) = (self.sim(at), self.up().await);
                if pool.api {
                    self.wanted.insert(pool.spec.id.clone(), None);
                    self.ask(&pool.spec.id, Verb::Remove, m.remove(&pool.spec.id, None)).await;
                }
            }
            Act::Reset(at) => {
                let (id, m) = (self.pool(at).0, self.up().await);
                self.ask(&id, Verb::Reset, m.reset_breaker(&id)).await;
            }
            Act::Unfence(at) => {
                let (uuid, m) = (world.uuid(at), self.up().await);
                world.record(What::Unfenced(uuid.clone()));
                // A device that is not there cannot be named.
                let _ = m.unfence(&uuid).await;
            }
            Act::Take(at, n) => {
                let (id, m) = (self.pool(at).0, self.up().await);
                for _ in 0..n {
                    if let Ok((key, guard)) = m.allocate_lease(&id) {
                        let pid = world.process_of(&key).unwrap_or(0);
                        world.request(&id, pid, true);
                        self.watch.lock().clients.push(Client { key, pid, guard: Some(guard) });
                    }
                }
            }
            Act::Release(n) => self.release(n),
            Act::Ask(at, ttl) => {
                let ((id, spec), m) = (self.pool(at), self.up().await);
                let demand = spec.activation == Activation::OnDemand;
                if demand && !pictures(&m).await.iter().any(|p| p.pool_id == id && p.hold) {
                    let plain = self.wanted.get(&id).copied().flatten();
                    self.wanted.insert(id.clone(), plain.filter(|w| *w));
                }
                self.ask(&id, Verb::Demand, m.lease(&id, LeaseRequest::lasting(ttl))).await;
            }
            Act::Restart => {
                let m = self.up().await;
                self.shut_down(&m).await;
                self.down(Down::Stopped);
                return ControlFlow::Break(());
            }
            Act::Leave => {
                let m = self.up().await;
                world.record(What::Leaving);
                if !m.leave(SHUTDOWN).await {
                    self.watch.wrong("shutdown_ends", "it could not leave its engines in time".into());
                }
                self.down(Down::Left);
                return ControlFlow::Break(());
            }
            Act::Kill | Act::Reboot | Act::Wipe => {
                self.down(Down::Killed);
                match act {
                    Act::Reboot => world.reboot(),
                    Act::Wipe => world.wipe(),
                    _ => {}
                }
                return ControlFlow::Break(());
            }
            Act::Fuse(calls) => world.light(calls),
            Act::Tamper(at) => world.tamper(&self.pool(at).0),
            Act::Sicken(at, seed) => {
                let id = self.pool(at).0;
                let rng = &mut fastrand::Rng::with_seed(seed);
                let mut what = Vec::new();
                world.sicken(&id, |s| what.extend((0..rng.u32(1..=3)).map(|_| s.sicken(rng))));
                world.record(What::Step(format!("{id} has {}", what.join(", "))));
            }
            Act::Hang(at) => world.sicken(&self.pool(at).0, |s| s.hangs = true),
            Act::Litter(at) => world.sicken(&self.pool(at).0, |s| s.leaves_child = true),
            Act::Heal(at) => world.heal(&self.pool(at).0),
            Act::Crash(at) => world.crash(&self.pool(at).0),
            Act::Health(at, n) => world.device(Some(at), |d| d.shown.health = health(n)),
            Act::Xid(at, xid) => {
                // Nobody hears what is said while there is no daemon.
                self.up().await;
                world.say(at, xid);
            }
            Act::Present(at, present) => world.device(Some(at), |d| d.present = present),
            Act::Foreign(at, gib) => world.device(Some(at), |d| d.foreign = gib << 30),
            Act::Ports(n) => world.take_ports(self.schedule.ports.clone().take(usize::from(n))),
            Act::Blind(blind) => world.blind(blind),
            Act::LedgerBroken(broken) => world.disk(|d| d.refuses = broken),
            Act::LedgerSlow(takes) => world.disk(|d| d.takes = takes),
            Act::Models(n) => world.models(|m| {
                m.0 = match n {
                    0 => None,
                    1 => Some(Failure::new(FailureClass::Health, "the network is down")),
                    _ => Some(Failure::new(FailureClass::Artifact, "the model file is missing")),
                }
            }),
            Act::ModelsSlow(takes) => world.models(|m| m.1 = takes),
            Act::Wait => {}
        }
        ControlFlow::Continue(())
    }

    /// Every `n`-th client is done.
    fn release(&self, n: usize) {
        let mut at = 0;
        let done: Vec<Client> = {
            let mut inner = self.watch.lock();
            let (stay, go): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.clients).into_iter().partition(|_| {
                at += 1;
                at % n != 0
            });
            inner.clients = stay;
            go
        };
        for c in done {
            // The request first: a slot that is free again has nobody in it.
            self.world.request(&c.key.pool, c.pid, false);
        }
    }

    /// Faults stop and engines behave.
    fn calm(&self) {
        let world = &self.world;
        world.help();
        for SimPool { spec, .. } in &self.schedule.pools {
            world.heal(&spec.id);
        }
        world.blind(false);
        world.disk(|d| *d = Disk::default());
        world.models(|m| *m = (None, Duration::ZERO));
        world.take_ports([]);
        world.device(None, |d| (d.present, d.foreign, d.shown.health) = (true, 0, DeviceHealth::Ok));
        self.release(1);
    }

    /// A person resets the devices that the driver complained of.
    async fn reset_devices(&self) {
        let accused: Vec<String> = self.watch.lock().scene.accused.to_reset().map(str::to_owned).collect();
        if !accused.is_empty() {
            self.world.take_out(&accused, true);
            tokio::time::sleep(Duration::from_secs(3)).await;
            self.world.take_out(&accused, false);
        }
    }

    /// The longest that a pool's own numbers allow before it is Ready, with good engines.
    fn patience(&self) -> Duration {
        let of = |p: &SimPool| {
            let n = &p.spec.policy;
            // One start that was begun badly, the longest pause, one good start; a check that sees what was missed.
            let checks = (n.health.interval + n.health.timeout) * n.health.failures;
            let reload = p.spec.reload.deadline * 2 + p.spec.reload.probation;
            // A reload that is forced, and its undo, have the time of a start for each replica.
            let starts = 1 + 2 * u32::from(p.spec.replicas);
            reload
                + n.start.max * starts
                + Duration::from_secs(300)
                + n.backoff.max()
                + checks
                + n.stop.grace
                + n.stop.prove
        };
        self.schedule.pools.iter().map(of).max().unwrap_or_default() + SLACK
    }

    /// Whether this replica waits because its memory is really not there.
    fn waits_rightly(&self, spec: &PoolSpec, node: &NodeSnapshot) -> bool {
        // Which place a replica has is not shown.
        (0..spec.replicas).any(|place| self.place_is_short(spec, place, node))
    }

    fn place_is_short(&self, spec: &PoolSpec, replica: u16, node: &NodeSnapshot) -> bool {
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
    async fn unrest(&self, m: &PoolManager) -> Option<String> {
        let node = m.node().await.unwrap_or_default();
        let mut waiting = Vec::new();
        let evacuated = self.watch.lock().scene.accused.to_reset().next().is_some();
        for pool in pictures(m).await {
            let Some(spec) = checks::spec_of(&self.schedule, &pool.pool_id) else { continue };
            let wanted = self.wanted.get(&pool.pool_id).copied().flatten();
            for r in &pool.replicas {
                let waits = r.state == "waiting" && self.waits_rightly(spec, &node);
                if waits {
                    waiting.push(pool.pool_id.clone());
                }
                // One that left an accused device comes back when somebody asks for it.
                let left = evacuated && spec.activation == Activation::OnDemand;
                let yields = (checks::yields(spec) || left) && r.state == "idle";
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
        let running = m
            .operations()
            .await
            .unwrap_or_default()
            .into_iter()
            .find(|o| o.state == OperationState::Running && !(o.verb == "preload" && waiting.contains(&o.pool_id)));
        running.map(|o| format!("operation {} of {} is still running: {}", o.verb, o.pool_id, o.progress))
    }

    async fn settle(&self, m: &PoolManager, what: &'static str) {
        let end = self.world.now() + self.patience();
        let mut nap = Duration::from_millis(200);
        while let Some(why) = self.unrest(m).await {
            // An engine that says so is believed for as long as nothing changes. That they behave now, a person knows.
            for pool in pictures(m).await.iter().filter(|p| p.replicas.iter().any(ran_out)) {
                self.ask(&pool.pool_id, Verb::Reset, m.reset_breaker(&pool.pool_id)).await;
            }
            if self.world.now() > end {
                self.watch.wrong(what, why);
                return;
            }
            tokio::time::sleep(nap).await;
            nap = (nap * 2).min(Duration::from_secs(10));
        }
    }

    /// Every pool is in one form. What an earlier daemon left of another has the time of a drain to go.
    async fn old_or_new(&self, m: &PoolManager) {
        let end = self.world.now() + Duration::from_secs(40);
        loop {
            let scene = self.watch.lock().scene.clone();
            let Some(why) = reloads::mixed(m, &self.schedule, &self.world, &scene).await else { return };
            if self.world.now() > end {
                return self.watch.wrong("old_or_new", why);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.look().await;
        }
    }

    /// What is left of this life. `Break` when the schedule is done.
    async fn live(&mut self) -> ControlFlow<()> {
        if self.at == 0 {
            self.up().await;
        }
        while let Some(step) = self.schedule.steps.get(self.at).cloned() {
            self.at += 1;
            self.world.record(What::Step(format!("{:?}", step.act)));
            let gone = self.act(&step.act).await.is_break();
            self.look().await;
            if gone {
                // What passes until the next step is a part of the next life.
                self.schedule.steps.insert(self.at, super::schedule::Step { act: Act::Wait, then: step.then });
                return ControlFlow::Continue(());
            }
            tokio::time::sleep(step.then).await;
            self.look().await;
        }
        if !std::mem::replace(&mut self.calm, true) {
            self.world.record(What::Step("calm".into()));
        }
        self.calm();
        let m = self.up().await;
        self.reset_devices().await;
        self.settle(&m, "settles").await;
        for id in self.ids() {
            self.ask(&id, Verb::Preload, m.preload(&id)).await;
            self.wanted.insert(id, Some(true));
        }
        self.settle(&m, "becomes_ready").await;
        self.old_or_new(&m).await;
        self.watch.look(&m).await;
        for pool in pictures(&m).await {
            if let Some(r) = pool.replicas.iter().find(|r| r.state == "failed") {
                self.watch.wrong("becomes_ready", format!("{} failed with good engines: {}", pool.pool_id, r.reason));
            }
        }
        // What could not be proved while a device was ill is looked for again soon, and not at once.
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.shut_down(&m).await;
        let handoffs = self.world.handoffs();
        if !handoffs.is_empty() {
            self.watch.wrong("handoffs_end", format!("{handoffs:?}"));
        }
        ControlFlow::Break(())
    }

    async fn look(&self) {
        match &self.manager {
            Some(m) => self.watch.look(m).await,
            None => self.watch.judge(None),
        }
    }

    /// One life, to its end, which may come at any moment. `Break` when there is to be no other.
    async fn life(&mut self) -> ControlFlow<()> {
        let (world, watch) = (Arc::clone(&self.world), Arc::clone(&self.watch));
        world.enter();
        let next = tokio::select! {
            biased;
            () = watch.found.notified() => ControlFlow::Break(()),
            () = world.blown.notified() => {
                self.down(Down::Killed);
                ControlFlow::Continue(())
            }
            next = self.live() => next,
        };
        world.leave();
        next
    }
}

fn ran_out(replica: &ReplicaSnapshot) -> bool {
    replica.reason_code == "vram" && replica.reason.contains("ran out of GPU memory")
}

async fn pictures(m: &PoolManager) -> Vec<PoolSnapshot> {
    m.pools().await.unwrap_or_default()
}

/// Runs a schedule.
///
/// # Panics
/// When no runtime can be built.
#[must_use]
pub fn run(schedule: Schedule, plant: Plant) -> Outcome {
    let world = World::new(&schedule, plant);
    let inner = Inner {
        invariants: checks::all(),
        scene: Scene::default(),
        seen: 0,
        life: 0,
        violation: None,
        clients: Vec::new(),
        reloads: Vec::new(),
    };
    let (found, inner) = (Notify::new(), Mutex::new(inner));
    let watch = Arc::new(Watch { world: Arc::clone(&world), schedule: schedule.clone(), found, inner });
    let mut runner = Runner {
        world: Arc::clone(&world),
        watch: Arc::clone(&watch),
        schedule,
        plant,
        manager: None,
        at: 0,
        lives: 0,
        calm: false,
        wanted: BTreeMap::new(),
    };
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without input and output needs nothing");
        if runtime.block_on(runner.life()).is_break() {
            break;
        }
    }
    let log: Vec<Entry> = world.log_from(0);
    let violation = watch.lock().violation.take();
    Outcome { violation, log, lasted: world.now() }
}
