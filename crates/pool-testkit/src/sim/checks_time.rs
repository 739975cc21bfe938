//! The invariants about time: deadlines, holds, pauses between starts, and that nothing runs in circles.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::{PoolId, ReplicaKey};

use super::checks::{Invariant, View, spec_of};
use super::schedule::Schedule;
use super::truth::{Down, Entry, Process, Scene, Verb, What};

/// After the deadline of a forced drain, everything is to be gone within this.
const AFTER_DEADLINE: Duration = Duration::from_secs(2);

/// After a forced drain's deadline and two seconds nothing of the pool is left, but what cannot be killed; and no slot
/// is granted once it was answered.
#[derive(Debug, Default)]
pub struct DrainsEnd {
    due: BTreeMap<PoolId, (Duration, Duration)>,
    closed: BTreeMap<PoolId, Duration>,
}

impl Invariant for DrainsEnd {
    fn name(&self) -> &'static str {
        "drains_end"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Asked(pool, Verb::Force(_), true) => {
                self.closed.entry(pool.clone()).or_insert(entry.at);
            }
            // Counted from the wish: writing it down is no part of it.
            What::Asking(pool, Verb::Force(deadline)) => {
                let due = entry.at.saturating_add(*deadline).saturating_add(AFTER_DEADLINE);
                let kept = self.due.entry(pool.clone()).or_insert((entry.at, due));
                kept.1 = kept.1.min(due);
            }
            // A pool that is being removed has its own time.
            What::Asked(pool, Verb::Force(_), false) => {
                self.due.remove(pool);
            }
            // One that is given up leaves its engine serving.
            What::Asked(pool, Verb::Abort(_), true) => {
                self.due.remove(pool);
                self.closed.remove(pool);
            }
            What::Asking(pool, verb) if verb.lifts_hold() => {
                self.due.remove(pool);
                self.closed.remove(pool);
            }
            // What was not written down in time no later daemon can know.
            What::Down(how) => {
                let known = |asked: &Duration| *how != Down::Stopped && scene.written(*asked, entry.at);
                self.due.retain(|_, (asked, _)| known(asked));
                self.closed.retain(|_, asked| known(asked));
            }
            What::Wiped => {
                self.due.clear();
                self.closed.clear();
            }
            // Its engines are left as they are.
            What::Leaving => self.due.clear(),
            // While no daemon ran, nobody could see to it.
            What::Started(_) => {
                self.due.values_mut().for_each(|(_, due)| *due = (*due).max(entry.at + AFTER_DEADLINE));
            }
            What::Granted(pool, pid) if self.closed.contains_key(pool) => {
                return Err(format!("a slot of {pool} was granted on process {pid} after its drain was answered"));
            }
            _ => {}
        }
        Ok(())
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for (pool, (asked, due)) in &self.due {
            let left = |p: &&Process| {
                let Some(known) = p.known else { return false };
                let by = (*due).max(known + AFTER_DEADLINE);
                // Who cannot be told from a stranger is not ended.
                let reached = !p.disowned && (!p.forged || view.schedule.cgroups) && !p.launch.unkillable;
                p.launch.key.pool == *pool && reached && view.now > by
            };
            if let Some(p) = view.scene.alive().find(left) {
                let late = view.now - *due;
                return Err(format!("a drain asked for at {asked:?} is {late:?} late: {p:?}"));
            }
            if view.now > *due && view.leases.iter().any(|l| l.key.pool == *pool && l.valid) {
                return Err(format!("a lease outlives the drain asked for at {asked:?}"));
            }
        }
        Ok(())
    }
}

/// A pool that was stopped starts nothing until it is preloaded or resumed, whoever asks for a lease, also by a later daemon.
#[derive(Debug, Default)]
pub struct HeldStaysDown {
    since: BTreeMap<PoolId, Duration>,
    /// Those of which a later daemon knows.
    durable: BTreeSet<PoolId>,
}

impl Invariant for HeldStaysDown {
    fn name(&self) -> &'static str {
        "held_stays_down"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Asked(pool, Verb::Force(_), true) => {
                let since = self.since.entry(pool.clone()).or_insert(entry.at);
                // With the answer it is on the disk, if that took it.
                if scene.disk_well() {
                    *since = (*since).min(entry.at);
                    self.durable.insert(pool.clone());
                }
            }
            // A drain that is given up leaves its engine serving, and so restarted.
            What::Asked(pool, Verb::Abort(_), _) => self.lift(pool),
            What::Asking(pool, verb) if verb.lifts_hold() => self.lift(pool),
            What::Down(_) => {
                self.since.retain(|pool, since| self.durable.contains(pool) || scene.written(*since, entry.at));
                self.durable.extend(self.since.keys().cloned());
            }
            What::Wiped => {
                self.since.clear();
                self.durable.clear();
            }
            What::Launching { key, .. } => {
                // One that was decided in the same moment may still come.
                if let Some(since) = self.since.get(&key.pool).filter(|since| **since < entry.at) {
                    return Err(format!("{key} is launched though it was stopped at {since:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl HeldStaysDown {
    fn lift(&mut self, pool: &PoolId) {
        self.since.remove(pool);
        self.durable.remove(pool);
    }
}

/// What is held against a replica, as far as it can be seen from outside.
#[derive(Debug, Clone, Default)]
struct Failures {
    count: u32,
    at: Duration,
    /// When the last one could be seen.
    seen: Duration,
    /// As it was before the last one, which may be unknown to a later daemon.
    before: Option<Box<Failures>>,
}

impl Failures {
    fn and(self, p: &Process, at: Duration) -> Self {
        let before = Self { before: None, ..self.clone() };
        Self { count: self.count + 1, at, seen: at + p.launch.exit_lag, before: Some(Box::new(before)) }
    }

    /// What a later daemon knows at least. What ended while none ran it finds out when it starts.
    fn known(self, scene: &Scene, now: Duration) -> Self {
        if self.count == 0 || scene.written(self.seen, now) {
            self
        } else {
            self.before.map_or_else(Self::default, |b| *b)
        }
    }
}

/// A process that ended by itself, for no reason that another rule excuses.
fn fell<'a>(what: &What, scene: &'a Scene) -> Option<&'a Process> {
    let What::Ended(pid) = what else { return None };
    let fell = |p: &&Process| {
        p.signalled.is_none() && p.told.is_none() && !p.disowned && !p.forged && !p.launch.foreign_listener
    };
    scene.processes.get(pid).filter(fell)
}

/// After an engine ended by itself the next start waits at least the backoff's shortest pause.
#[derive(Debug, Default)]
pub struct BackoffHolds {
    failures: BTreeMap<ReplicaKey, Failures>,
}

impl Invariant for BackoffHolds {
    fn name(&self) -> &'static str {
        "backoff_holds"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            // What was not seen before the daemon was told to end is no failure.
            What::Asking(pool, Verb::Shutdown) => {
                for (_, f) in self.failures.iter_mut().filter(|(key, f)| key.pool == *pool && f.seen >= entry.at) {
                    *f = std::mem::take(f).before.map_or_else(Failures::default, |b| *b);
                }
            }
            // A person may know better than a count.
            What::Asking(pool, verb) if !matches!(verb, Verb::Demand) => {
                self.failures.retain(|key, _| key.pool != *pool);
            }
            // What is held against one form of a pool is not held against another.
            What::Tampered(pool) | What::Reloading(pool, _) => self.failures.retain(|key, _| key.pool != *pool),
            What::Wiped => self.failures.clear(),
            What::Down(_) => keep_known(&mut self.failures, scene, entry.at),
            what @ What::Ended(_) => {
                let Some(p) = fell(what, scene).filter(|p| !scene.reloading.contains(&p.launch.key.pool)) else {
                    return Ok(());
                };
                let Some(spec) = spec_of(schedule, &p.launch.key.pool) else { return Ok(()) };
                let served = p.worked.map_or(Duration::ZERO, |since| entry.at.saturating_sub(since));
                // Of what ends while no daemon runs the next one hears late: it counts as longer Ready.
                let away = if scene.down.is_some() { LONGEST_AWAY } else { Duration::ZERO };
                if served + p.launch.exit_lag + away + Duration::from_secs(1) >= spec.policy.backoff.reset_after() {
                    self.failures.remove(&p.launch.key);
                } else {
                    let before = self.failures.remove(&p.launch.key).unwrap_or_default();
                    self.failures.insert(p.launch.key.clone(), before.and(p, entry.at));
                }
            }
            What::Launching { key, .. } => {
                let (Some(f), Some(spec)) = (self.failures.get(key), spec_of(schedule, &key.pool)) else {
                    return Ok(());
                };
                let Some(n) = f.count.checked_sub(1) else { return Ok(()) };
                let least = spec.policy.backoff.bounds(n, 1.0).0;
                if entry.at < f.at + least {
                    let after = entry.at - f.at;
                    return Err(format!("{key} is launched {after:?} after failure {n}, sooner than {least:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Longer than the daemon is ever away in one piece.
const LONGEST_AWAY: Duration = Duration::from_secs(3_600);

/// A daemon goes: what it had no time to write down is lost.
fn keep_known(failures: &mut BTreeMap<ReplicaKey, Failures>, scene: &Scene, now: Duration) {
    for f in failures.values_mut() {
        *f = std::mem::take(f).known(scene, now);
    }
}

/// After as many failed starts or early crashes in a row as the pool says, nothing is started for as long as it says.
#[derive(Debug, Default)]
pub struct BreakerHolds {
    starts: BTreeMap<ReplicaKey, Failures>,
    crashes: BTreeMap<ReplicaKey, Failures>,
    /// When each process did its first work while somebody could say where its memory was: before, it was not Ready.
    proved: BTreeMap<u32, Duration>,
}

impl BreakerHolds {
    fn forget(&mut self, pool: &PoolId) {
        self.starts.retain(|key, _| key.pool != *pool);
        self.crashes.retain(|key, _| key.pool != *pool);
    }
}

impl Invariant for BreakerHolds {
    fn name(&self) -> &'static str {
        "breaker_holds"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            // Whatever a person does, the count begins anew; so does it at an end that is nobody's fault.
            What::Asking(pool, verb) if !matches!(verb, Verb::Demand) => self.forget(pool),
            What::Tampered(pool) | What::Reloading(pool, _) => self.forget(pool),
            What::Wiped => (self.starts, self.crashes) = Default::default(),
            What::Down(_) => {
                keep_known(&mut self.starts, scene, entry.at);
                keep_known(&mut self.crashes, scene, entry.at);
            }
            // Ready, perhaps.
            What::Worked(pid) => {
                if !scene.ill.contains(&None) {
                    self.proved.entry(*pid).or_insert(entry.at);
                }
                if let Some(p) = scene.processes.get(pid) {
                    self.starts.remove(&p.launch.key);
                }
            }
            What::Ended(pid) => {
                let Some(p) = scene.processes.get(pid) else { return Ok(()) };
                let (key, worked) = (p.launch.key.clone(), p.worked);
                let Some(spec) = spec_of(schedule, &key.pool) else { return Ok(()) };
                let excused = scene.reloading.contains(&key.pool) || scene.down.is_some();
                if fell(&entry.what, scene).is_none() || excused {
                    self.starts.remove(&key);
                    self.crashes.remove(&key);
                    return Ok(());
                }
                // Whether what worked for a moment had become Ready cannot be seen from here.
                let early = |since: Duration| {
                    let served = entry.at.saturating_sub(since);
                    let ready = served > Duration::from_secs(2) && since >= scene.up;
                    let late = spec.policy.breaker.close_after().min(spec.policy.backoff.reset_after());
                    ready && served + p.launch.exit_lag + Duration::from_secs(1) < late
                };
                match worked {
                    None => {
                        let before = self.starts.remove(&key).unwrap_or_default();
                        self.starts.insert(key, before.and(p, entry.at));
                    }
                    Some(_) if self.proved.get(pid).is_some_and(|since| early(*since)) => {
                        self.starts.remove(&key);
                        let before = self.crashes.remove(&key).unwrap_or_default();
                        self.crashes.insert(key, before.and(p, entry.at));
                    }
                    Some(_) => {
                        self.starts.remove(&key);
                        self.crashes.remove(&key);
                    }
                }
            }
            What::Launching { key, .. } => {
                let Some(spec) = spec_of(schedule, &key.pool) else { return Ok(()) };
                let b = &spec.policy.breaker;
                for (what, all, limit) in
                    [("starts", &self.starts, b.failed_starts()), ("crashes", &self.crashes, b.early_crashes())]
                {
                    let Some(f) = all.get(key).filter(|f| f.count >= limit) else { continue };
                    if entry.at < f.at + b.open_for() {
                        let after = entry.at - f.at;
                        return Err(format!("{key} is launched {after:?} after failure {} of its {what}", f.count));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Snapshots of a pool in one second; commands of a person are few.
const SNAPSHOTS: u64 = 250;
/// Launches of a replica in one second.
const LAUNCHES: usize = 12;

/// Nothing runs in circles.
#[derive(Debug, Default)]
pub struct NoBusyLoop {
    life: u32,
    seconds: BTreeMap<PoolId, (Duration, u64)>,
    launches: BTreeMap<ReplicaKey, Vec<Duration>>,
}

impl Invariant for NoBusyLoop {
    fn name(&self) -> &'static str {
        "no_busy_loop"
    }
    fn saw(&mut self, entry: &Entry, _: &Scene, _: &Schedule) -> Result<(), String> {
        let What::Launching { key, .. } = &entry.what else { return Ok(()) };
        let recent = self.launches.entry(key.clone()).or_default();
        recent.retain(|at| *at + Duration::from_secs(1) > entry.at);
        recent.push(entry.at);
        if recent.len() > LAUNCHES { Err(format!("{key:?}: {} launches in a second", recent.len())) } else { Ok(()) }
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        if self.life != view.life {
            (self.life, self.seconds) = (view.life, BTreeMap::new());
        }
        for pool in view.pools {
            let window = self.seconds.entry(pool.pool_id.clone()).or_insert((view.now, pool.snapshot));
            if view.now > window.0 + Duration::from_secs(1) {
                *window = (view.now, pool.snapshot);
            }
            let made = pool.snapshot.saturating_sub(window.1);
            if made > SNAPSHOTS {
                return Err(format!("{}: {made} snapshots in a second", pool.pool_id));
            }
        }
        Ok(())
    }
}
