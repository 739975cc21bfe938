//! Replacing what a pool runs, as a plan: a list of steps, each of which can be undone until the new is committed.
//!
//! [`plan`] makes it, [`Rollout`] says what comes next. Whoever carries it out tells how each step went. Every rollout
//! ends in the new, or in the old as it was; only if undoing fails it ends in neither, and then it says both reasons.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::lifecycle::Policy;
use crate::{ReplicaId, Tick};

/// For a disk to take that a commit is undone, before the rest of the way back is gone.
const TO_STRIKE_OUT: Duration = Duration::from_secs(10);

/// How a pool is to be reloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// The gentlest that the memory allows.
    #[default]
    Auto,
    /// Drain, stop, start, prove: nobody serves meanwhile.
    InPlace,
    /// New replicas beside the old ones, which leave once the new have proved that they serve.
    Overlap,
    /// In place, replica by replica.
    Rolling,
}

impl Strategy {
    /// As one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::InPlace => "in_place",
            Self::Overlap => "overlap",
            Self::Rolling => "rolling",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The new model is there, the engine can run it, and its memory is planned. Touches nothing.
    Verify,
    /// Drain and stop these. Undone: those that ran run again.
    Stop(Vec<ReplicaId>),
    /// What these are made from at their next start. Undone: the old again.
    Change(Vec<ReplicaId>),
    /// New replicas, each with its place in the spec; they serve nobody yet. Undone: they are no more.
    Add(Vec<(ReplicaId, u16)>),
    /// Start these and wait until they have proved that they serve. Undone: they are stopped.
    Start(Vec<ReplicaId>),
    /// The new spec is the pool's, also after a restart. From here on nothing is undone.
    Commit,
    /// From one instant to the next these serve and those do not.
    Flip {
        /// Who serves from now on.
        to: Vec<ReplicaId>,
        /// Who does not.
        from: Vec<ReplicaId>,
    },
    /// Drain these, and they are no more.
    Retire(Vec<ReplicaId>),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |ids: &[ReplicaId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Self::Verify => f.write_str("looking whether the new one can run"),
            Self::Stop(ids) => write!(f, "draining {}", list(ids)),
            Self::Change(_) => f.write_str("changing the spec"),
            Self::Add(_) => f.write_str("adding replicas"),
            Self::Start(ids) => write!(f, "starting {}", list(ids)),
            Self::Commit => f.write_str("writing it down"),
            Self::Flip { .. } => f.write_str("flipping"),
            Self::Retire(ids) => write!(f, "draining {}", list(ids)),
        }
    }
}

impl Step {
    /// How long undoing it may take, where that takes time at all: a stop and, one after the other, as many starts. `policy`
    /// is that of those it is about.
    #[must_use]
    pub fn time_to_undo(&self, policy: &Policy) -> Option<Duration> {
        match self {
            Self::Stop(ids) | Self::Start(ids) => {
                Some(policy.stop.grace + policy.stop.prove + time_to_start(policy, ids.len()))
            }
            Self::Commit => Some(TO_STRIKE_OUT),
            Self::Verify | Self::Change(_) | Self::Add(_) | Self::Flip { .. } | Self::Retire(_) => None,
        }
    }
}

/// How long so many starts may take, one after the other.
#[must_use]
pub fn time_to_start(policy: &Policy, starts: usize) -> Duration {
    policy.start.max.saturating_mul(u32::try_from(starts).unwrap_or(u32::MAX))
}

/// Time after a commit in which a failure of the new brings back the old.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probation {
    /// Its end.
    pub until: Tick,
    /// How often each of the new replicas had been restarted when it began.
    pub restarts: BTreeMap<ReplicaId, u64>,
}

impl Probation {
    /// Whether a replica that has been restarted so often by now has failed since. Of one that is not of the new nothing
    /// is known.
    #[must_use]
    pub fn fails(&self, id: ReplicaId, restarts: u64) -> bool {
        self.restarts.get(&id).is_some_and(|before| restarts > *before)
    }
}

/// A replica of the pool before the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incumbent {
    /// Which.
    pub id: ReplicaId,
    /// Its place in the spec.
    pub place: u16,
}

/// The steps by which a pool comes to run `places` replicas of a new spec. With `asleep` nothing runs, nor is to run:
/// then nothing is started. [`Strategy::Auto`] is taken for in place: who knows the memory decides before. `left`: of
/// these, which serve no more, something may still be there, so that nobody new takes their names.
#[must_use]
pub fn plan(strategy: Strategy, old: &[Incumbent], left: &[ReplicaId], places: u16, asleep: bool) -> Vec<Step> {
    let ids = |of: &[Incumbent]| of.iter().map(|i| i.id).collect::<Vec<_>>();
    let (stay, leave): (Vec<Incumbent>, Vec<Incumbent>) = old.iter().partition(|i| i.place < places);
    let mut unused = (0..u16::MAX).map(ReplicaId).filter(|id| old.iter().all(|i| i.id != *id) && !left.contains(id));
    let mut newcomers = |places: &mut dyn Iterator<Item = u16>| -> Vec<(ReplicaId, u16)> {
        places.map_while(|place| Some((unused.next()?, place))).collect()
    };
    let mut steps = vec![Step::Verify];
    if strategy == Strategy::Overlap && !asleep {
        let new = newcomers(&mut (0..places));
        let to: Vec<ReplicaId> = new.iter().map(|(id, _)| *id).collect();
        steps.extend([Step::Add(new), Step::Start(to.clone()), Step::Commit]);
        steps.push(Step::Flip { to, from: ids(old) });
        steps.push(Step::Retire(ids(old)));
        return steps;
    }
    let mut free = (0..places).filter(|place| old.iter().all(|i| i.place != *place));
    let new = newcomers(&mut free);
    let added: Vec<ReplicaId> = new.iter().map(|(id, _)| *id).collect();
    if !new.is_empty() {
        steps.push(Step::Add(new));
    }
    let turns: Vec<Vec<ReplicaId>> = match strategy {
        Strategy::Rolling => stay.iter().map(|i| vec![i.id]).collect(),
        _ => vec![ids(&stay)],
    };
    for turn in turns.into_iter().filter(|turn| !turn.is_empty()) {
        if asleep {
            steps.push(Step::Change(turn));
        } else {
            steps.extend([Step::Stop(turn.clone()), Step::Change(turn.clone()), Step::Start(turn)]);
        }
    }
    if !added.is_empty() && !asleep {
        steps.push(Step::Start(added.clone()));
    }
    steps.push(Step::Commit);
    if !added.is_empty() || !leave.is_empty() {
        steps.push(Step::Flip { to: added, from: ids(&leave) });
    }
    if !leave.is_empty() {
        steps.push(Step::Retire(ids(&leave)));
    }
    steps
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The new serves.
    New,
    /// The old serves as before.
    Old {
        /// Why not the new.
        why: String,
    },
    /// Neither: the new failed, and so did the way back.
    Broken {
        /// Why not the new.
        why: String,
        /// Why not the old either.
        undo: String,
    },
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next<'a> {
    /// Carry this out.
    Do(&'a Step),
    /// Undo this; it may have been carried out in part, or not at all.
    Undo(&'a Step),
    /// Nothing.
    End(&'a Outcome),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Forward,
    /// `undo`: the first thing that could not be undone. The rest is, as far as it can be.
    Back {
        why: String,
        undo: Option<String>,
    },
    Ended(Outcome),
}

/// A plan that is being carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    steps: Vec<Step>,
    at: usize,
    way: Way,
}

impl Rollout {
    /// At its first step.
    #[must_use]
    pub fn new(steps: Vec<Step>) -> Self {
        let way = if steps.is_empty() { Way::Ended(Outcome::New) } else { Way::Forward };
        Self { steps, at: 0, way }
    }

    /// What comes next. The same until the end of it is told.
    #[must_use]
    pub fn next(&self) -> Next<'_> {
        match &self.way {
            Way::Ended(outcome) => Next::End(outcome),
            Way::Forward => Next::Do(&self.steps[self.at]),
            Way::Back { .. } => Next::Undo(&self.steps[self.at]),
        }
    }

    /// Whether the new spec is the pool's already.
    #[must_use]
    pub fn committed(&self) -> bool {
        let commit = self.steps.iter().position(|step| *step == Step::Commit);
        match self.way {
            Way::Forward => commit.is_some_and(|commit| self.at > commit),
            Way::Ended(Outcome::New) => true,
            _ => false,
        }
    }

    /// What next said is done.
    pub fn done(&mut self) {
        match &self.way {
            Way::Forward if self.at + 1 < self.steps.len() => self.at += 1,
            Way::Forward => self.way = Way::Ended(Outcome::New),
            Way::Back { .. } if self.at > 0 => self.at -= 1,
            Way::Back { why, undo } => {
                let why = why.clone();
                self.way = Way::Ended(match undo.clone() {
                    None => Outcome::Old { why },
                    Some(undo) => Outcome::Broken { why, undo },
                });
            }
            Way::Ended(_) => {}
        }
    }

    /// What next said cannot be done. Once the new is committed nothing goes back: the rest is done as far as it can be.
    /// What cannot be undone does not keep the rest from being undone.
    pub fn failed(&mut self, reason: String) {
        let committed = self.committed();
        match &mut self.way {
            Way::Forward if committed => self.done(),
            Way::Forward => self.way = Way::Back { why: reason, undo: None },
            Way::Back { undo, .. } => {
                undo.get_or_insert(reason);
                self.done();
            }
            Way::Ended(_) => {}
        }
    }

    /// It is not wanted any more: goes back if it still can. The step that is under way is undone first.
    pub fn give_up(&mut self, reason: &str) {
        if self.way == Way::Forward && !self.committed() {
            self.way = Way::Back { why: reason.to_owned(), undo: None };
        }
    }

    /// How far it is, in words.
    #[must_use]
    pub fn progress(&self) -> String {
        match &self.way {
            Way::Forward => format!("step {} of {}: {}", self.at + 1, self.steps.len(), self.steps[self.at]),
            Way::Back { why, .. } => format!("going back because {why}: undoing step {}", self.at + 1),
            Way::Ended(_) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests;
