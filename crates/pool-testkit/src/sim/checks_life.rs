//! The invariants about what outlives a daemon: fences, records, handoffs; and that a hang is found.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::{PoolId, ReplicaKey};

use super::checks::{Invariant, View, spec_of};
use super::schedule::Schedule;
use super::truth::{Entry, Process, Scene, What};

/// A device on which something of an engine may be left that should be gone admits no newcomer, also not by a later daemon.
#[derive(Debug, Default)]
pub struct FencesHold {
    /// Who was where already.
    homes: BTreeSet<(ReplicaKey, String)>,
    killed: BTreeMap<u32, Duration>,
}

impl Invariant for FencesHold {
    fn name(&self) -> &'static str {
        "fences_hold"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Kill(pid) => {
                self.killed.entry(*pid).or_insert(entry.at);
            }
            What::Down(_) => self.killed.retain(|_, at| scene.written(*at, entry.at)),
            What::Launching { key, devices, .. } => {
                // Unproved for longer than the proof may take, and known to be so.
                let fenced = |p: &&Process| {
                    let prove = spec_of(schedule, &p.launch.key.pool).map_or(Duration::ZERO, |s| s.policy.stop.prove);
                    let since = self.killed.get(&p.launch.pid);
                    let long = since.is_some_and(|at| entry.at > *at + prove + Duration::from_secs(1));
                    long && !p.disowned && p.launch.key != *key
                };
                for p in scene.alive().filter(fenced) {
                    let new = |uuid: &&String| !self.homes.contains(&(key.clone(), (*uuid).clone()));
                    let on = |uuid: &&String| devices.iter().any(|(u, _)| u == *uuid);
                    if let Some(uuid) = p.launch.devices.iter().map(|(u, _)| u).filter(on).find(new) {
                        return Err(format!("{key} is new on {uuid}, where {p:?} may be left"));
                    }
                }
                self.homes.extend(devices.iter().map(|(uuid, _)| (key.clone(), uuid.clone())));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Between the end of the checks that find a hang and the signal.
const SIGNAL: Duration = Duration::from_secs(1);

/// An idle engine that answers health checks and does not decode is found after as many checks as the pool says.
#[derive(Debug, Default)]
pub struct HangsAreFound {
    hanging: BTreeMap<PoolId, Duration>,
    /// Since when each process is Ready, idle and unasked for anything else.
    idle: BTreeMap<u32, Duration>,
}

impl Invariant for HangsAreFound {
    fn name(&self) -> &'static str {
        "hangs_are_found"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::Hangs(pool, true) => {
                self.hanging.entry(pool.clone()).or_insert(entry.at);
            }
            What::Hangs(pool, false) => {
                self.hanging.remove(pool);
            }
            What::Granted(_, pid) | What::Released(pid) => {
                self.idle.remove(pid);
            }
            What::Asking(pool, _) => {
                self.idle.retain(|pid, _| scene.processes.get(pid).is_none_or(|p| p.launch.key.pool != *pool));
            }
            What::Down(_) => self.idle.clear(),
            _ => {}
        }
        Ok(())
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for pool in view.pools {
            let Some(spec) = spec_of(view.schedule, &pool.pool_id) else { continue };
            for r in &pool.replicas {
                let key = ReplicaKey { pool: pool.pool_id.clone(), replica: r.id };
                let of = |p: &&Process| p.launch.key == key && p.launch.generation == r.generation;
                let Some(p) = view.scene.processes.values().rev().find(of) else { continue };
                let idle = r.active_leases == 0 && p.requests == 0 && p.launch.busy == Some(0) && p.signalled.is_none();
                if !idle || !matches!(r.state, "ready" | "suspect") || p.ended.is_some() {
                    self.idle.remove(&p.launch.pid);
                    continue;
                }
                let since = *self.idle.entry(p.launch.pid).or_insert(view.now);
                let Some(hangs) = self.hanging.get(&pool.pool_id) else { continue };
                let h = &spec.policy.health;
                let found_by = since.max(*hangs) + (h.interval + h.timeout) * (h.failures + 1) + SIGNAL;
                if view.now > found_by {
                    return Err(format!("{key} hangs since {hangs:?}, idle since {since:?}, and is {}", r.state));
                }
            }
        }
        Ok(())
    }
}

/// Between the end of an engine and the end of its handoff, on a disk that is well.
const WITHDRAWN: Duration = Duration::from_secs(5);

/// A handoff names an engine that serves, or did until just now.
#[derive(Debug)]
pub struct HandoffsAreTrue;

impl Invariant for HandoffsAreTrue {
    fn name(&self) -> &'static str {
        "handoffs_are_true"
    }
    fn look(&mut self, view: &View<'_>) -> Result<(), String> {
        for handoff in view.handoffs {
            let of = |p: &&Process| p.launch.key == handoff.key && p.launch.generation == handoff.generation;
            let Some(p) = view.scene.processes.values().rev().find(of) else {
                return Err(format!("{} has a handoff of an engine that never was: {handoff:?}", handoff.key));
            };
            // A signal of an earlier daemon that wrote nothing down is unknown to this one.
            let up = view.scene.up;
            let over = p.signalled.filter(|at| *at > up).or(p.ended.map(|at| at + p.launch.exit_lag));
            if over.is_some_and(|at| view.now > at + WITHDRAWN && view.scene.written(at, view.now)) {
                return Err(format!("{} has a handoff, and its process {} is over", handoff.key, p.launch.pid));
            }
        }
        Ok(())
    }
}
