//! The invariants about time: deadlines, holds, pauses between starts, and that nothing runs in circles.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::{PoolId, ReplicaKey};

use super::checks::{Invariant, View, lifts_hold, spec_of};
use super::schedule::Schedule;
use super::truth::{Entry, Process, Scene, Verb, What};

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
    fn saw(&mut self, entry: &Entry, _: &Scene, _: &Schedule) -> Result<(), String> {
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
            // One that is given up leaves its engine serving.
            What::Asked(pool, Verb::Abort(_), true) => {
                self.due.remove(pool);
                self.closed.remove(pool);
            }
            What::Asking(pool, verb) if lifts_hold(*verb) => {
                self.due.remove(pool);
                self.closed.remove(pool);
            }
            What::Started(_) => {
                self.due.clear();
                self.closed.clear();
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
                let by = (*due).max(p.at + AFTER_DEADLINE);
                p.launch.key.pool == *pool && !p.launch.unkillable && view.now > by
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

/// A pool that was stopped starts nothing until it is preloaded or resumed, whoever asks for a lease.
#[derive(Debug, Default)]
pub struct HeldStaysDown {
    since: BTreeMap<PoolId, Duration>,
    /// Stopped while that could not be written down: a later manager cannot know.
    unwritten: BTreeSet<PoolId>,
    broken: bool,
    writable_since: Duration,
}

impl Invariant for HeldStaysDown {
    fn name(&self) -> &'static str {
        "held_stays_down"
    }
    fn saw(&mut self, entry: &Entry, _: &Scene, _: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Asked(pool, Verb::Force(_), true) => {
                self.since.entry(pool.clone()).or_insert(entry.at);
                if self.broken {
                    self.unwritten.insert(pool.clone());
                }
            }
            // A drain that is given up leaves its engine serving, and so restarted.
            What::Asked(pool, Verb::Abort(_), _) => {
                self.since.remove(pool);
            }
            What::Asking(pool, verb) if lifts_hold(*verb) => {
                self.since.remove(pool);
            }
            What::Writable(yes) => {
                self.broken = !yes;
                if *yes {
                    // Tried again every two seconds.
                    self.writable_since = entry.at;
                }
            }
            What::Started(_) => {
                let written = !self.broken && entry.at > self.writable_since + Duration::from_secs(4);
                for pool in std::mem::take(&mut self.unwritten).into_iter().filter(|_| !written) {
                    self.since.remove(&pool);
                }
            }
            What::Launching(key, _) => {
                // One that was decided in the same moment may still come.
                if let Some(since) = self.since.get(&key.pool).filter(|since| **since < entry.at) {
                    return Err(format!("{key:?} is launched though it was stopped at {since:?}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// After an engine ended by itself the next start waits at least the backoff's shortest pause.
#[derive(Debug, Default)]
pub struct BackoffHolds {
    failures: BTreeMap<ReplicaKey, (u32, Duration)>,
}

impl Invariant for BackoffHolds {
    fn name(&self) -> &'static str {
        "backoff_holds"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            // A person may know better than a count.
            What::Asking(pool, _) => self.failures.retain(|key, _| key.pool != *pool),
            What::Started(_) => self.failures.clear(),
            What::Ended(pid) => {
                let Some(p) = scene.processes.get(pid).filter(|p| p.signalled.is_none() && !p.launch.foreign_listener)
                else {
                    return Ok(());
                };
                let Some(spec) = spec_of(schedule, &p.launch.key.pool) else { return Ok(()) };
                let served = p.worked.map_or(Duration::ZERO, |since| entry.at.saturating_sub(since));
                if served + p.launch.exit_lag + Duration::from_secs(1) >= spec.policy.backoff.reset_after() {
                    self.failures.remove(&p.launch.key);
                } else {
                    let count = self.failures.get(&p.launch.key).map_or(0, |(n, _)| n + 1);
                    self.failures.insert(p.launch.key.clone(), (count, entry.at));
                }
            }
            What::Launching(key, _) => {
                let (Some((n, at)), Some(spec)) = (self.failures.get(key), spec_of(schedule, &key.pool)) else {
                    return Ok(());
                };
                let least = spec.policy.backoff.bounds(*n, 1.0).0;
                if entry.at < *at + least {
                    let after = entry.at - *at;
                    return Err(format!("{key:?} is launched {after:?} after failure {n}, sooner than {least:?}"));
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
        let What::Launching(key, _) = &entry.what else { return Ok(()) };
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
