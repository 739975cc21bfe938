//! The invariant about what a reload may do to those who use a pool.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::PoolId;

use super::checks::{Invariant, spec_of};
use super::schedule::Schedule;
use super::truth::{Entry, Scene, Verb, What};

/// An engine that a reload replaces keeps its leases until they end, or for as long as the pool's drain or the reload may
/// take; for as long as nothing but the reload is the matter.
#[derive(Debug, Default)]
pub struct ReloadsCutNoLease {
    /// When each pool was asked for a reload, and the shortest deadline since; whatever else happens to it ends this.
    asked: BTreeMap<PoolId, (Duration, Duration)>,
    /// Pools that are being drained, or were.
    drained: BTreeSet<PoolId>,
}

impl ReloadsCutNoLease {
    /// The longest that a reload may take, where no shorter one was said.
    fn allowed(schedule: &Schedule, pool: &PoolId) -> Duration {
        spec_of(schedule, pool).map_or(Duration::ZERO, |s| s.drain_deadline.min(s.reload.deadline))
    }
}

impl Invariant for ReloadsCutNoLease {
    fn name(&self) -> &'static str {
        "reloads_cut_no_lease"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, schedule: &Schedule) -> Result<(), String> {
        match &entry.what {
            What::ReloadBy(pool, deadline) => {
                let fresh = (entry.at, Self::allowed(schedule, pool));
                let healthy = ![None, Some(pool.clone())].iter().any(|whose| scene.ill.contains(whose));
                let undisturbed = healthy && !scene.reloading.contains(pool) && !self.drained.contains(pool);
                if undisturbed {
                    self.asked.insert(pool.clone(), fresh);
                }
                if let Some((_, allowed)) = self.asked.get_mut(pool) {
                    *allowed = (*allowed).min(*deadline);
                }
            }
            What::Asking(pool, verb) if !matches!(verb, Verb::Demand | Verb::Reload) => {
                self.asked.remove(pool);
                if verb.lifts_hold() {
                    self.drained.remove(pool);
                } else if verb.ends() {
                    self.drained.insert(pool.clone());
                }
            }
            What::Ill(Some(pool)) => {
                self.asked.remove(pool);
            }
            What::Ill(None) | What::Down(_) | What::Leaving | What::Wiped => self.asked.clear(),
            What::Term(pid) | What::Kill(pid) => {
                let Some(p) = scene.processes.get(pid) else { return Ok(()) };
                let Some((asked, allowed)) = self.asked.get(&p.launch.key.pool) else { return Ok(()) };
                // What the driver said of its device ends it whatever else is under way.
                let accused = p.launch.devices.iter().any(|(uuid, _)| scene.accused.may_end(uuid, entry.at));
                let first = p.signalled == Some(entry.at) && p.at < *asked && p.ended.is_none() && !accused;
                if first && p.requests > 0 && entry.at < *asked + *allowed {
                    let after = entry.at - *asked;
                    return Err(format!(
                        "process {pid} was ended {after:?} after a reload was asked for, with {} requests and {allowed:?} for them",
                        p.requests
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
