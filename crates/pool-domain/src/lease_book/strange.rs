//! Slots of engines that outlived a run of the daemon: leases are not durable, so who holds them is not known.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Action, At, Limits, Mark};
use crate::liveness::Signals;
use crate::{Generation, ReplicaId, Tick};

/// Slots that count as taken.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Taken {
    generation: Generation,
    slots: u16,
    /// Before this the engine's word does not count: its clients may be between two requests.
    believe_from: Tick,
    /// Requests, by slot and task, that it has worked on whenever it was believed.
    lasting: Option<BTreeSet<(u32, u64)>>,
    /// No lease of the earlier run lasts longer.
    until: Tick,
}

/// What is left of earlier runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Strangers {
    taken: BTreeMap<ReplicaId, Taken>,
    /// Leases of earlier runs that were heard of and are over: a slot is not given back twice for them.
    over: VecDeque<Mark>,
}

impl Strangers {
    pub(super) fn adopted(&mut self, at: At, slots: u16, limits: &Limits, now: Tick) {
        let taken = Taken {
            generation: at.generation,
            slots,
            believe_from: now + limits.grace,
            lasting: None,
            until: now + limits.max_ttl,
        };
        self.taken.insert(at.replica, taken);
    }

    /// Slots of this generation that count as taken.
    pub(super) fn slots(&self, at: At) -> u16 {
        self.taken.get(&at.replica).filter(|t| t.generation == at.generation).map_or(0, |t| t.slots)
    }

    /// All of them.
    pub(super) fn total(&self) -> u32 {
        self.taken.values().map(|t| u32::from(t.slots)).sum()
    }

    /// As many may be in use as there are requests that may be older than every lease of this run. That a lease is held
    /// does not say that any of them is its own: its client may be between two requests.
    pub(super) fn busy(&mut self, at: At, work: &Signals, now: Tick) -> Option<Action> {
        let taken = self.taken.get_mut(&at.replica)?;
        if taken.generation != at.generation || now < taken.believe_from {
            return None;
        }
        let mut lasting: BTreeSet<_> = work.slots.iter().map(|s| (s.slot, s.task)).collect();
        // What it does not tell apart may be old.
        let unnamed = work.running.saturating_sub(u32::try_from(lasting.len()).unwrap_or(u32::MAX));
        if let Some(before) = &taken.lasting {
            lasting.retain(|request| before.contains(request));
        }
        let old = u32::try_from(lasting.len()).unwrap_or(u32::MAX).saturating_add(unnamed);
        taken.lasting = Some(lasting);
        self.keep(at, u16::try_from(old).unwrap_or(u16::MAX))
    }

    /// Keeps at most this many.
    fn keep(&mut self, at: At, slots: u16) -> Option<Action> {
        let taken = self.taken.get_mut(&at.replica)?;
        let freed = taken.slots.saturating_sub(slots);
        taken.slots -= freed;
        if taken.slots == 0 {
            self.taken.remove(&at.replica);
        }
        (freed > 0).then_some(Action::Freed { at, slots: freed })
    }

    /// One of them has found its owner, or is given back. Says whether there was one.
    pub(super) fn take(&mut self, at: At) -> bool {
        let slots = self.slots(at);
        if slots > 0 {
            self.keep(at, slots - 1);
        }
        slots > 0
    }

    /// Its engine is gone, and every slot with it.
    pub(super) fn revoked(&mut self, at: At) {
        self.taken.retain(|replica, t| *replica != at.replica || t.generation > at.generation);
    }

    pub(super) fn expire(&mut self, now: Tick) -> Vec<Action> {
        let due: Vec<At> = self
            .taken
            .iter()
            .filter(|(_, t)| t.until <= now)
            .map(|(&replica, t)| At { replica, generation: t.generation })
            .collect();
        due.into_iter().filter_map(|at| self.keep(at, 0)).collect()
    }

    pub(super) fn next(&self) -> Option<Tick> {
        self.taken.values().map(|t| t.until).min()
    }

    pub(super) fn is_over(&self, lease: Mark) -> bool {
        self.over.contains(&lease)
    }

    pub(super) fn note_over(&mut self, lease: Mark, limits: &Limits) {
        if !self.is_over(lease) {
            self.over.push_back(lease);
        }
        while self.over.len() > limits.remembered {
            self.over.pop_front();
        }
    }
}
