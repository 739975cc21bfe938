//! The simulated node: devices, ports, engines and a state directory, with a record of the truth. It outlives the daemon:
//! every life of one is a runtime of its own, and what is under way here goes on in the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use fastrand::Rng;
use pool_domain::charges::Said;
use pool_domain::failure::Exit;
use pool_domain::plan::EngineMemory;
use pool_domain::{DeviceHealth, DeviceSnapshot, Failure, PoolId, ReplicaKey};
use pool_services::ports::{Holder, Residency};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use super::Plant;
use super::ledger::Facts;
use super::schedule::SimPool;
use super::script::{Held, Script};
use super::truth::{Entry, Launch, What};
use crate::FakeGpus;

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
pub(super) struct Engine {
    pub(super) launch: Launch,
    pub(super) addr: SocketAddr,
    pub(super) nonce: String,
    pub(super) script: Script,
    pub(super) began: Duration,
    pub(super) ended: bool,
    /// KILL was sent and had no effect.
    pub(super) doomed: bool,
    /// Nothing exists of it any more, whatever the host tells.
    pub(super) left: bool,
    /// Its memory is free again.
    pub(super) returned: bool,
    /// Requests that it works on.
    pub(super) requests: u16,
    pub(super) exit: watch::Sender<Option<Failure>>,
    pub(super) gone: watch::Sender<bool>,
}

/// What is under way in the world, whoever looks.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// The main process ends.
    End(usize, Failure),
    /// Its end is to be seen.
    Seen(usize, Failure),
    /// Its memory is free.
    Returned(usize),
}

/// A disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Disk {
    /// It takes nothing.
    pub refuses: bool,
    /// How long a write takes.
    pub takes: Duration,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) rng: Rng,
    pools: BTreeMap<PoolId, SimPool>,
    pub(super) scripts: BTreeMap<PoolId, Script>,
    pub(super) engines: Vec<Engine>,
    pub(super) devices: Vec<SimDevice>,
    pub(super) taken_ports: BTreeSet<u16>,
    /// Nobody can say who holds memory.
    blind: bool,
    /// What strangers hold, as it was last written down.
    foreign: Vec<(String, u64)>,
    pub(super) nonces: u64,
    pub(super) disk: Disk,
    pub(super) facts: Facts,
    /// As they were before a write that nobody has been told of: a loss of power may take it back.
    pub(super) unsynced: Option<Facts>,
    /// Why models cannot be had, and how long one takes.
    pub(super) models: (Option<Failure>, Duration),
    /// The daemon is killed at so many calls from now.
    fuse: Option<u32>,
    /// A person ends by hand what the daemon would end and cannot.
    pub(super) helped: bool,
    pending: BTreeMap<u64, (Duration, Event)>,
    next: u64,
    /// When this boot of the machine was, and when this life began: in the world's time and in the runtime's.
    booted: Duration,
    pub(super) boot: u32,
    base: Duration,
    origin: Option<Instant>,
    log: Vec<Entry>,
}

/// The node.
#[derive(Debug)]
pub struct World {
    pub(super) me: Weak<World>,
    inner: Mutex<Inner>,
    provable: bool,
    /// What others use is told by the driver.
    tells_foreign: bool,
    /// Engines have cgroups of their own, so that what is not as recorded can be ended.
    pub(super) cgroups: bool,
    pub(super) plant: Plant,
    /// Writes take turns.
    pub(super) turn: Semaphore,
    /// The daemon is to die now.
    pub blown: Notify,
    /// GPUs.
    pub gpus: Arc<FakeGpus>,
}

impl World {
    /// A node as the schedule has it.
    #[must_use]
    pub fn new(schedule: &super::Schedule, plant: Plant) -> Arc<Self> {
        let pools: BTreeMap<PoolId, SimPool> = schedule.pools.iter().map(|p| (p.spec.id.clone(), p.clone())).collect();
        let inner = Inner {
            rng: Rng::with_seed(schedule.seed ^ 0x5157_u64),
            scripts: pools.iter().map(|(id, p)| (id.clone(), p.well.clone())).collect(),
            pools,
            engines: Vec::new(),
            devices: schedule.devices.clone(),
            taken_ports: BTreeSet::new(),
            blind: false,
            foreign: Vec::new(),
            nonces: 0,
            disk: Disk::default(),
            facts: Facts::of(schedule),
            unsynced: None,
            models: (None, Duration::ZERO),
            fuse: None,
            helped: false,
            pending: BTreeMap::new(),
            next: 0,
            booted: Duration::ZERO,
            boot: 0,
            base: Duration::ZERO,
            origin: None,
            log: Vec::new(),
        };
        let world = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            inner: Mutex::new(inner),
            provable: schedule.provable,
            tells_foreign: schedule.tells_foreign,
            cgroups: schedule.cgroups,
            plant,
            turn: Semaphore::new(1),
            blown: Notify::new(),
            gpus: Arc::new(FakeGpus::with(Vec::new())),
        });
        world.tell_gpus(&mut world.lock());
        world
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A life begins, in a runtime of its own: what is under way goes on in it.
    pub fn enter(&self) {
        // What was said to an earlier daemon is not said again.
        self.gpus.forget_incidents();
        let mut inner = self.lock();
        inner.origin = Some(Instant::now());
        let under_way: Vec<(u64, Duration)> = inner.pending.iter().map(|(id, (due, _))| (*id, *due)).collect();
        for (id, due) in under_way {
            self.watch_for(due.saturating_sub(inner.base), id);
        }
    }

    /// It ends; its runtime still stands.
    pub fn leave(&self) {
        let mut inner = self.lock();
        inner.base = inner.now();
        inner.origin = None;
        inner.fuse = None;
    }

    /// Time since the node was first switched on.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.lock().now()
    }

    /// Time since this boot.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        let inner = self.lock();
        inner.now().saturating_sub(inner.booted)
    }

    /// Writes down what happens.
    pub fn record(&self, what: What) {
        self.put(&mut self.lock(), what);
    }

    pub(super) fn put(&self, inner: &mut Inner, what: What) {
        let at = inner.now();
        inner.log.push(Entry { at, what });
    }

    /// From now on somebody ends by hand what the daemon cannot.
    pub fn help(&self) {
        self.lock().helped = true;
    }

    /// What was written down from this entry on.
    #[must_use]
    pub fn log_from(&self, from: usize) -> Vec<Entry> {
        self.lock().log.get(from..).unwrap_or_default().to_vec()
    }

    /// The daemon dies at the `calls`-th call of a port from now on.
    pub fn light(&self, calls: u32) {
        self.lock().fuse = Some(calls);
    }

    /// Every call of a port that takes time passes here, where the daemon may die.
    pub(super) async fn call(&self) {
        let blown = {
            let mut inner = self.lock();
            let left = inner.fuse.map(|n| n.saturating_sub(1));
            inner.fuse = left.filter(|n| *n > 0);
            left == Some(0)
        };
        if blown {
            self.blown.notify_one();
            std::future::pending::<()>().await;
        }
    }

    pub(super) fn after(&self, inner: &mut Inner, after: Duration, event: Event) {
        let (id, due) = (inner.next, inner.now() + after);
        inner.next += 1;
        inner.pending.insert(id, (due, event));
        self.watch_for(after, id);
    }

    fn watch_for(&self, after: Duration, id: u64) {
        let me = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let Some(world) = me.upgrade() else { return };
            let mut inner = world.lock();
            match inner.pending.remove(&id).map(|(_, event)| event) {
                Some(Event::End(at, failure)) => world.end(&mut inner, at, failure),
                Some(Event::Seen(at, failure)) => {
                    inner.engines[at].exit.send_replace(Some(failure));
                }
                Some(Event::Returned(at)) => {
                    inner.engines[at].returned = true;
                    world.tell_gpus(&mut inner);
                }
                None => {}
            }
        });
    }

    /// Changes how engines of a pool behave.
    pub fn sicken(&self, pool: &PoolId, change: impl FnOnce(&mut Script)) {
        let mut inner = self.lock();
        self.put(&mut inner, What::Ill(Some(pool.clone())));
        if let Some(script) = inner.scripts.get_mut(pool) {
            change(script);
        }
        self.tell_hang(&mut inner, pool);
        self.tell_gpus(&mut inner);
    }

    fn tell_hang(&self, inner: &mut Inner, pool: &PoolId) {
        let hangs = inner.scripts.get(pool).is_some_and(|s| s.hangs);
        self.put(inner, What::Hangs(pool.clone(), hangs));
    }

    /// Engines of a pool behave again. What could not be killed can be now, and strangers leave its ports.
    pub fn heal(&self, pool: &PoolId) {
        let mut inner = self.lock();
        let well = inner.pools.get(pool).map(|p| p.well.clone());
        if let (Some(script), Some(well)) = (inner.scripts.get_mut(pool), well) {
            *script = well;
        }
        self.tell_hang(&mut inner, pool);
        self.put(&mut inner, What::Well(Some(pool.clone())));
        for at in inner.of(pool) {
            inner.engines[at].script.unkillable = false;
            if inner.engines[at].doomed {
                self.end(&mut inner, at, Failure::crash(Exit::Signal(9)));
                self.go(&mut inner, at);
            }
        }
        self.tell_gpus(&mut inner);
    }

    /// Ends the main processes of a pool, as somebody else's KILL would.
    pub fn crash(&self, pool: &PoolId) {
        let mut inner = self.lock();
        self.put(&mut inner, What::Ill(Some(pool.clone())));
        for at in inner.of(pool) {
            self.end(&mut inner, at, Failure::crash(Exit::Signal(9)));
        }
        if inner.pools.get(pool).map(|p| &p.well) == inner.scripts.get(pool) {
            self.put(&mut inner, What::Well(Some(pool.clone())));
        }
    }

    /// The machine loses its power, and what was not synced may be lost with it.
    pub fn reboot(&self) {
        let mut inner = self.lock();
        self.put(&mut inner, What::Rebooted);
        for e in inner.engines.iter_mut().filter(|e| !e.left) {
            (e.ended, e.left, e.returned, e.requests) = (true, true, true, 0);
            e.gone.send_replace(true);
        }
        inner.pending.clear();
        (inner.booted, inner.boot) = (inner.now(), inner.boot + 1);
        inner.facts.stored.values_mut().for_each(|s| s.probation = None);
        if let Some(before) = inner.unsynced.take()
            && inner.rng.bool()
        {
            inner.facts = before;
        }
        self.tell_gpus(&mut inner);
    }

    /// Somebody deletes the state directory.
    pub fn wipe(&self) {
        let mut inner = self.lock();
        (inner.facts, inner.unsynced) = (Facts::default(), None);
        self.put(&mut inner, What::Wiped);
    }

    /// Somebody writes other names into the records of a pool's engines.
    pub fn tamper(&self, pool: &PoolId) {
        let mut inner = self.lock();
        for record in inner.facts.records.values_mut().filter(|r| r.key.pool == *pool) {
            record.nonce.push_str("-forged");
        }
        self.put(&mut inner, What::Tampered(pool.clone()));
    }

    /// Changes a device, or with none each of them.
    pub fn device(&self, at: Option<usize>, mut change: impl FnMut(&mut SimDevice)) {
        let mut inner = self.lock();
        let count = inner.devices.len().max(1);
        let chosen = |n: usize| at.is_none_or(|at| at % count == n);
        inner.devices.iter_mut().enumerate().filter(|(n, _)| chosen(*n)).for_each(|(_, d)| change(d));
        self.judge_devices(&mut inner);
    }

    /// Whether strangers hold memory of a device.
    #[must_use]
    pub fn has_strangers(&self) -> bool {
        self.lock().devices.iter().any(|d| d.foreign > 0)
    }

    /// The name of a device.
    #[must_use]
    pub fn uuid(&self, at: usize) -> String {
        let inner = self.lock();
        inner.devices.get(at % inner.devices.len().max(1)).map(|d| d.shown.uuid.clone()).unwrap_or_default()
    }

    /// Whether nobody can say who holds memory.
    pub fn blind(&self, blind: bool) {
        let mut inner = self.lock();
        inner.blind = blind;
        self.judge_devices(&mut inner);
    }

    /// Engines may be ended for what is wrong with the devices.
    fn judge_devices(&self, inner: &mut Inner) {
        let stand = |d: &SimDevice| What::Device {
            uuid: d.shown.uuid.clone(),
            well: d.present && d.shown.health.admits(),
            away: !d.present || matches!(d.shown.health, DeviceHealth::Lost(_)),
        };
        let stand: Vec<What> = inner.devices.iter().map(stand).collect();
        stand.into_iter().for_each(|what| self.put(inner, what));
        let ill = inner.blind || inner.devices.iter().any(|d| !d.present || !d.shown.health.admits());
        self.put(inner, if ill { What::Ill(None) } else { What::Well(None) });
        self.tell_gpus(inner);
    }

    /// The driver reports an XID of a device.
    pub fn say(&self, at: usize, xid: u64) {
        let uuid = self.uuid(at);
        self.record(What::Said(uuid.clone(), xid));
        self.gpus.say(&uuid, Said::Xid(xid));
    }

    /// Somebody takes these devices from the bus to reset them, or puts them back.
    pub fn take_out(&self, uuids: &[String], out: bool) {
        self.device(None, |d| d.present = !(out && uuids.contains(&d.shown.uuid)));
    }

    /// Strangers listen on these ports.
    pub fn take_ports(&self, ports: impl IntoIterator<Item = u16>) {
        self.lock().taken_ports = ports.into_iter().collect();
    }

    /// How the disk is.
    pub fn disk(&self, change: impl FnOnce(&mut Disk)) {
        let mut inner = self.lock();
        change(&mut inner.disk);
        let well = inner.disk == Disk::default();
        self.put(&mut inner, What::DiskWell(well));
    }

    /// Whether models can be had, and how long one takes.
    pub fn models(&self, change: impl FnOnce(&mut (Option<Failure>, Duration))) {
        change(&mut self.lock().models);
    }

    /// The newest process of a replica of which something may exist.
    #[must_use]
    pub fn process_of(&self, key: &ReplicaKey) -> Option<u32> {
        self.lock().engines.iter().rev().find(|e| e.launch.key == *key).map(|e| e.launch.pid)
    }

    /// A client begins to use a slot of a process, or is done with it.
    pub fn request(&self, pool: &PoolId, pid: u32, begins: bool) {
        let mut inner = self.lock();
        if let Some(e) = inner.engines.iter_mut().find(|e| e.launch.pid == pid && !e.ended) {
            e.requests = if begins { e.requests + 1 } else { e.requests.saturating_sub(1) };
        }
        self.put(&mut inner, if begins { What::Granted(pool.clone(), pid) } else { What::Released(pid) });
    }

    /// What a probe would see of the devices and of who holds memory.
    pub(super) fn tell_gpus(&self, inner: &mut Inner) {
        let (mut holders, mut late) = (Vec::new(), BTreeMap::<&str, u64>::new());
        for e in inner.engines.iter().filter(|e| !e.returned) {
            let held = inner.scripts.get(&e.launch.key.pool).map_or(Held::There, |s| s.held);
            let elsewhere = inner.devices.iter().map(|d| &d.shown.uuid).find(|u| e.launch.on(u).is_none());
            let there = e.launch.devices.iter().map(|(uuid, bytes)| (uuid, *bytes));
            let holds: Vec<(&String, u64)> = match held {
                Held::There => there.collect(),
                Held::Nowhere => Vec::new(),
                Held::Elsewhere => there.chain(elsewhere.map(|u| (u, 1))).collect(),
            };
            for (uuid, bytes) in holds {
                if e.left {
                    *late.entry(uuid).or_default() += bytes;
                } else {
                    holders.push(Holder { uuid: uuid.clone(), pid: e.launch.pid, bytes: bytes.max(1) });
                }
            }
        }
        let present = inner.devices.iter().filter(|d| d.present);
        let devices: Vec<DeviceSnapshot> = present
            .map(|d| {
                let ours: u64 = holders.iter().filter(|h| h.uuid == d.shown.uuid).map(|h| h.bytes).sum();
                let foreign = d.foreign + late.get(d.shown.uuid.as_str()).copied().unwrap_or(0);
                let total = d.shown.vram_total << u64::from(self.plant == Plant::MemoryTwice);
                let used = ours.saturating_add(foreign).min(total);
                let told = if self.tells_foreign { foreign } else { 0 };
                DeviceSnapshot {
                    vram_total: total,
                    vram_used: used,
                    vram_free: total - used,
                    vram_foreign: told,
                    ..d.shown.clone()
                }
            })
            .collect();
        self.gpus.set_residency(match (inner.blind, self.provable) {
            (true, _) => Residency::Unknown("the driver does not answer".into()),
            (false, true) => Residency::Provable(holders),
            (false, false) => Residency::Simulated(holders),
        });
        self.gpus.change(|i| i.devices = devices);
        let foreign: Vec<(String, u64)> = inner.devices.iter().map(|d| (d.shown.uuid.clone(), d.foreign)).collect();
        if self.tells_foreign && foreign != inner.foreign {
            inner.foreign.clone_from(&foreign);
            self.put(inner, What::Foreign(foreign));
        }
    }

    /// The main process ends.
    pub(super) fn end(&self, inner: &mut Inner, at: usize, failure: Failure) {
        let engine = &mut inner.engines[at];
        if std::mem::replace(&mut engine.ended, true) {
            return;
        }
        engine.requests = 0;
        let (pid, leaves_child) = (engine.launch.pid, engine.script.leaves_child);
        let lag = if self.plant == Plant::DeathsUnseen { Duration::from_secs(20) } else { engine.script.exit_lag };
        self.after(inner, lag, Event::Seen(at, failure));
        self.put(inner, What::Ended(pid));
        if self.plant == Plant::GoneTooEarly {
            inner.engines[at].gone.send_replace(true);
        }
        if !leaves_child {
            self.go(inner, at);
        }
    }

    /// Nothing is left.
    pub(super) fn go(&self, inner: &mut Inner, at: usize) {
        let (pid, lag) = (inner.engines[at].launch.pid, inner.engines[at].script.memory_lag);
        if !std::mem::replace(&mut inner.engines[at].left, true) {
            inner.engines[at].gone.send_replace(true);
            self.put(inner, What::Gone(pid));
            if lag.is_zero() {
                inner.engines[at].returned = true;
            } else {
                self.after(inner, lag, Event::Returned(at));
            }
            self.tell_gpus(inner);
        }
    }

    /// The engine that listens at an address, and how its pool behaves now.
    pub(super) fn at(&self, addr: SocketAddr) -> Option<(usize, Script)> {
        let inner = self.lock();
        let at = inner.engines.iter().rposition(|e| e.addr == addr && !e.ended)?;
        let script = inner.scripts.get(&inner.engines[at].launch.key.pool)?.clone();
        Some((at, script))
    }

    pub(super) fn script_of(&self, pool: &PoolId) -> Option<Script> {
        self.lock().scripts.get(pool).cloned()
    }

    pub(super) fn memory_of(&self, pool: &PoolId) -> EngineMemory {
        self.lock().pools.get(pool).map_or(EngineMemory::Fixed(0), |p| p.memory)
    }

    pub(super) fn slots_of(&self, pool: &PoolId) -> u16 {
        self.lock().pools.get(pool).map_or(0, |p| p.spec.slots)
    }
}

impl Inner {
    pub(super) fn now(&self) -> Duration {
        self.base + self.origin.map_or(Duration::ZERO, |o| o.elapsed())
    }

    pub(super) fn booted(&self) -> Duration {
        self.booted
    }

    fn of(&self, pool: &PoolId) -> Vec<usize> {
        (0..self.engines.len()).filter(|i| self.engines[*i].launch.key.pool == *pool).collect()
    }
}
