//! What must be true whatever happens. Later promises add theirs to [`all`].

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use pool_domain::{Generation, PoolId, ReplicaKey};
use pool_services::ports::Handoff;
use pool_services::{NodeSnapshot, PoolSnapshot, ReplicaSnapshot};

use super::schedule::Schedule;
use super::truth::{Entry, Launch, Process, Scene, What};

/// A slot held in process.
#[derive(Debug, Clone)]
pub struct Held {
    /// Of which replica.
    pub key: ReplicaKey,
    /// Its process when it was granted.
    pub pid: u32,
    /// Whether it still holds.
    pub valid: bool,
}

/// What can be seen of the node at one moment.
#[derive(Debug)]
pub struct View<'a> {
    /// Since the node was switched on.
    pub now: Duration,
    /// Which manager this is, counted from 0.
    pub life: u32,
    /// The plan of the whole run.
    pub schedule: &'a Schedule,
    /// What exists.
    pub scene: &'a Scene,
    /// What the pools show.
    pub pools: &'a [PoolSnapshot],
    /// What the node shows.
    pub node: &'a NodeSnapshot,
    /// Slots held in process.
    pub leases: &'a [Held],
    /// What consumers are told.
    pub handoffs: &'a [Handoff],
}

/// Something that must be true. What it finds wrong is the error.
pub trait Invariant: fmt::Debug + Send {
    /// Its name.
    fn name(&self) -> &'static str;
    /// Told of everything that really happens, in order; `scene` has taken it in already.
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        let _ = (entry, scene, schedule);
        Ok(())
    }
    /// Told of what can be seen, after every step and every published change.
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        let _ = view;
        Ok(())
    }
}

/// Every invariant.
#[must_use]
pub fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(OneGeneration),
        Box::new(GenerationsGrow::default()),
        Box::new(ReadyIsProved),
        Box::new(MemoryIsThere::default()),
        Box::new(Slots),
        Box::new(LeasesStand),
        Box::new(super::checks_time::DrainsEnd::default()),
        Box::new(super::checks_time::HeldStaysDown::default()),
        Box::new(super::checks_time::BackoffHolds::default()),
        Box::new(super::checks_time::BreakerHolds::default()),
        Box::new(super::checks_time::NoBusyLoop::default()),
        Box::new(super::checks_life::FencesHold::default()),
        Box::new(super::checks_life::HangsAreFound::default()),
        Box::new(super::checks_life::HandoffsAreTrue),
        Box::new(super::checks_reload::ReloadsCutNoLease::default()),
        Box::new(super::accused::NothingStartsOnTheAccused),
        Box::new(NothingForNothing),
        Box::new(SnapshotsGrow::default()),
    ]
}

/// The spec of a pool.
#[must_use]
pub fn spec_of<'a>(schedule: &'a Schedule, id: &PoolId) -> Option<&'a pool_services::PoolSpec> {
    schedule.pools.iter().map(|p| &p.spec).find(|s| s.id == *id)
}

/// Whether its engines may be stopped because nobody uses them.
#[must_use]
pub fn yields(spec: &pool_services::PoolSpec) -> bool {
    spec.activation == pool_services::Activation::OnDemand && !spec.pin
}

/// At most one generation of a replica has a process, and it was durable before it was launched. What a person disowned,
/// or what is on no record any more, is kept apart by locks alone.
#[derive(Debug)]
struct OneGeneration;
impl Invariant for OneGeneration {
    fn name(&self) -> &'static str {
        "one_generation"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Launched(Launch { pid, durable: false, .. }) => {
                Err(format!("process {pid} was launched before it was written down"))
            }
            What::Refused(key, generation) => match scene.alive().find(|p| p.launch.key == *key && !p.disowned) {
                Some(old) => {
                    let (old, new) = (old.launch.pid, generation.0);
                    Err(format!("generation {new} of {key} was to be launched while process {old} exists"))
                }
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

/// A generation is never used twice, also across restarts of the manager, for as long as there is a state directory.
#[derive(Debug, Default)]
struct GenerationsGrow(BTreeMap<ReplicaKey, Generation>);
impl Invariant for GenerationsGrow {
    fn name(&self) -> &'static str {
        "generations_grow"
    }
    fn saw(&mut self, entry: &Entry, _: &Scene, _: &Schedule) -> Result<(), String> {
        let (key, generation) = match &entry.what {
            What::Launching { key, generation, .. } => (key, generation),
            What::Wiped => {
                self.0.clear();
                return Ok(());
            }
            _ => return Ok(()),
        };
        match self.0.insert(key.clone(), *generation) {
            Some(before) if before >= *generation => Err(format!("{key} went from {before:?} to {generation:?}")),
            _ => Ok(()),
        }
    }
}

/// How long a death may go unseen.
const SEEN_WITHIN: Duration = Duration::from_millis(50);

/// Its end was seen, or should have been.
fn known_dead(p: &Process, now: Duration) -> bool {
    p.ended.is_some_and(|at| now > at + p.launch.exit_lag + SEEN_WITHIN)
}

/// To this daemon, or to an earlier one if it may be so busy that it cannot be asked.
fn proved(p: &Process, up: Duration) -> bool {
    let since = |at: Duration| at >= up;
    let busy = p.launch.busy != Some(0) || p.requests > 0 || p.busy_until.is_some_and(since);
    p.identified && (p.worked_last.is_some_and(since) || p.worked.is_some() && busy)
}

/// Nothing is called Ready that did not name its model and do one unit of work in this generation, or that is dead.
#[derive(Debug)]
struct ReadyIsProved;
impl Invariant for ReadyIsProved {
    fn name(&self) -> &'static str {
        "ready_is_proved"
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for pool in view.pools {
            for r in pool.replicas.iter().filter(|r| r.ready || r.live) {
                let key = ReplicaKey { pool: pool.pool_id.clone(), replica: r.id };
                let of = |p: &&Process| p.launch.key == key && p.launch.generation == r.generation;
                let what = if r.ready { "ready" } else { "live" };
                let Some(p) = view.scene.processes.values().rev().find(of) else {
                    return Err(format!("{key:?} is {what} in generation {} without a process", r.generation.0));
                };
                if r.ready && !proved(p, view.scene.up) {
                    return Err(format!("{key:?} is ready, but process {} proved nothing", p.launch.pid));
                }
                if r.ready && known_dead(p, view.now) {
                    return Err(format!("{key:?} is ready, but process {} is dead: {p:?}", p.launch.pid));
                }
            }
        }
        Ok(())
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        let What::Granted(pool, pid) = &entry.what else { return Ok(()) };
        match scene.processes.get(pid) {
            Some(p)
                if proved(p, scene.up) && p.signalled.is_none_or(|at| at <= scene.up) && !known_dead(p, entry.at) =>
            {
                Ok(())
            }
            other => Err(format!("a slot of {pool} was granted on {other:?}")),
        }
    }
}

/// Between a grant and the launch, however slow the disk.
pub(super) const PREPARED_WITHIN: Duration = Duration::from_secs(30);

/// Neither what is promised nor what was promised to living engines is ever more than a device has, nor more than others
/// leave of it to a start.
#[derive(Debug, Default)]
struct MemoryIsThere {
    /// What strangers hold, and since when.
    foreign: BTreeMap<String, (u64, Duration)>,
}
impl Invariant for MemoryIsThere {
    fn name(&self) -> &'static str {
        "memory_is_there"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Foreign(of) => {
                let moved = |(uuid, bytes): &(String, u64)| self.foreign.get(uuid).is_none_or(|(b, _)| b != bytes);
                for (uuid, bytes) in of.iter().filter(|o| moved(o)).cloned().collect::<Vec<_>>() {
                    self.foreign.insert(uuid, (bytes, entry.at));
                }
            }
            What::Launching { key, devices, .. } => {
                for (uuid, bytes) in devices {
                    let Some(d) = schedule.devices.iter().map(|d| &d.shown).find(|d| d.uuid == *uuid) else { continue };
                    // Strangers who came while it was being prepared could not be known.
                    let settled = |at: &Duration| entry.at > *at + PREPARED_WITHIN;
                    let foreign = self.foreign.get(uuid).filter(|(_, at)| settled(at)).map_or(0, |(bytes, _)| *bytes);
                    let others = scene.alive().filter(|p| !p.disowned && p.launch.key != *key);
                    let ours: u64 = others.filter_map(|p| p.launch.on(uuid)).sum();
                    let usable = d.vram_total - d.vram_reserved;
                    if ours + foreign + bytes > usable {
                        return Err(format!(
                            "{key} gets {bytes} of {usable} bytes on {uuid}, {ours} are promised and {foreign} taken by others"
                        ));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for (d, promised) in &view.node.devices {
            let usable = d.vram_total.saturating_sub(d.vram_reserved);
            if *promised > usable {
                return Err(format!("device {} has {usable} bytes, {promised} are promised", d.index));
            }
        }
        Ok(())
    }
}

/// Never more leases than slots, nor more requests on an engine that says how busy it is, those of before a restart counted.
#[derive(Debug)]
struct Slots;
impl Invariant for Slots {
    fn name(&self) -> &'static str {
        "slots"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        let What::Granted(pool, pid) = &entry.what else { return Ok(()) };
        let slots = spec_of(schedule, pool).map_or(0, |s| u32::from(s.slots));
        match scene.processes.get(pid) {
            Some(p) if p.launch.busy.is_some() && p.requests > slots => {
                Err(format!("{} requests run on process {pid} of {pool}, which has {slots} slots", p.requests))
            }
            _ => Ok(()),
        }
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for pool in view.pools {
            let slots = spec_of(view.schedule, &pool.pool_id).map_or(0, |s| usize::from(s.slots));
            for r in &pool.replicas {
                let mine = |l: &&Held| l.key.pool == pool.pool_id && l.key.replica == r.id && l.valid;
                let held = view.leases.iter().filter(mine).count();
                let shown = usize::try_from(r.active_leases).unwrap_or(usize::MAX);
                if held > shown || shown > slots {
                    return Err(format!("{} {:?}: {held} held, {shown} shown, {slots} slots", pool.pool_id, r.id));
                }
            }
        }
        Ok(())
    }
}

/// A lease stands until its engine ends or is ended.
#[derive(Debug)]
struct LeasesStand;
impl Invariant for LeasesStand {
    fn name(&self) -> &'static str {
        "leases_stand"
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for lease in view.leases {
            let Some(p) = view.scene.processes.get(&lease.pid) else { continue };
            if !lease.valid && p.ended.is_none() && p.signalled.is_none() {
                return Err(format!("a lease on process {} was taken back, which serves on", lease.pid));
            }
            // Nothing but an eviction or idleness can have ended it.
            if !lease.valid && p.blameless && p.signalled.is_some() {
                return Err(format!(
                    "a lease on process {} was cut off, whose pool did not ask for its end",
                    lease.pid
                ));
            }
            if lease.valid && known_dead(p, view.now) {
                return Err(format!("a lease on process {} stands, which is dead", lease.pid));
            }
        }
        Ok(())
    }
}

/// No engine is ended to which nothing happened: no fault of its own, no command to its pool. But one that starts on demand
/// and is not pinned may be, once it has been Ready for long enough: because nobody uses it, or another needs its memory.
/// That it is idle then, [`LeasesStand`] sees.
#[derive(Debug)]
struct NothingForNothing;
impl Invariant for NothingForNothing {
    fn name(&self) -> &'static str {
        "nothing_for_nothing"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        let (What::Term(pid) | What::Kill(pid)) = &entry.what else { return Ok(()) };
        let of_age = |p: &Process| {
            let spec = spec_of(schedule, &p.launch.key.pool).filter(|spec| yields(spec));
            let asked = p.signalled.unwrap_or(entry.at);
            spec.is_some() && p.worked.is_some_and(|since| asked >= since + schedule.min_ready_time)
        };
        match scene.processes.get(pid) {
            None => Err(format!("process {pid} was signalled, which never existed")),
            Some(p) if p.blameless && p.ended.is_none() && of_age(p) => Ok(()),
            Some(p) if p.blameless && p.ended.is_none() => Err(format!("process {pid} was ended for nothing: {p:?}")),
            Some(_) => Ok(()),
        }
    }
}

/// The numbers of snapshots grow with every change.
#[derive(Debug, Default)]
struct SnapshotsGrow(u32, BTreeMap<PoolId, PoolSnapshot>);
impl Invariant for SnapshotsGrow {
    fn name(&self) -> &'static str {
        "snapshots_grow"
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        if self.0 != view.life {
            (self.0, self.1) = (view.life, BTreeMap::new());
        }
        // One that is declared anew counts anew.
        self.1.retain(|id, _| view.pools.iter().any(|p| p.pool_id == *id));
        for pool in view.pools {
            let Some(before) = self.1.insert(pool.pool_id.clone(), pool.clone()) else { continue };
            let states = |p: &PoolSnapshot| p.replicas.iter().map(|r| (r.state, r.generation)).collect::<Vec<_>>();
            let same = before.hold == pool.hold && states(&before) == states(pool);
            if before.snapshot > pool.snapshot || (before.snapshot == pool.snapshot && !same) {
                return Err(format!("{}: {} then {}", pool.pool_id, before.snapshot, pool.snapshot));
            }
            let older =
                |r: &ReplicaSnapshot| before.replicas.iter().any(|b| b.id == r.id && b.generation > r.generation);
            if pool.replicas.iter().any(older) {
                return Err(format!("{}: a generation went back", pool.pool_id));
            }
        }
        Ok(())
    }
}
