//! The book itself.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::strange::Strangers;
use super::{Action, Ask, At, End, Event, Held, Key, Limits, Mark, Refusal, Ticket};
use crate::{Generation, ReplicaId, Tick};

/// Leases of which the length is remembered.
const RECENT: usize = 64;
/// Bounds of what a refused client is told to wait.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);

/// What an idempotency key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stands {
    Waiting(Ticket),
    Held(Mark),
    /// Until it is forgotten.
    Over(Tick),
}

/// What must be the same for a key to mean the same lease.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    ttl: Option<Duration>,
    holder: super::Holder,
    prefer: Option<ReplicaId>,
}

impl Wish {
    fn of(ask: &Ask) -> Self {
        Self { ttl: ask.ttl, holder: ask.holder.clone(), prefer: ask.prefer }
    }
}

/// The leases of one pool: who waits, who holds, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseBook {
    run: u64,
    limits: Limits,
    waiting: VecDeque<Ask>,
    held: BTreeMap<Mark, Held>,
    keys: BTreeMap<Key, (Wish, Stands)>,
    /// Keys of leases that are over, the oldest first.
    old_keys: VecDeque<(Tick, Key)>,
    strangers: Strangers,
    /// Where the last lease of a session was, the oldest first in the second.
    sessions: BTreeMap<Arc<str>, ReplicaId>,
    session_order: VecDeque<Arc<str>>,
    recent: VecDeque<Duration>,
    /// The newest wish of this run that was granted.
    newest: Option<Ticket>,
}

impl LeaseBook {
    /// An empty book. `run` is never used twice.
    #[must_use]
    pub fn new(run: u64, limits: Limits) -> Self {
        Self {
            run,
            limits,
            waiting: VecDeque::new(),
            held: BTreeMap::new(),
            keys: BTreeMap::new(),
            old_keys: VecDeque::new(),
            strangers: Strangers::default(),
            sessions: BTreeMap::new(),
            session_order: VecDeque::new(),
            recent: VecDeque::new(),
            newest: None,
        }
    }

    /// Wishes that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Where the first that waits would like its slot; nothing when nobody waits.
    #[must_use]
    pub fn first(&self) -> Option<Option<ReplicaId>> {
        let ask = self.waiting.front()?;
        let session = || self.sessions.get(ask.holder.session_id.as_ref()?).copied();
        Some(ask.prefer.or_else(session))
    }

    /// A lease that is held.
    #[must_use]
    pub fn held(&self, lease: Mark) -> Option<&Held> {
        self.held.get(&lease)
    }

    /// Every lease that is held.
    pub fn all(&self) -> impl Iterator<Item = &Held> {
        self.held.values()
    }

    /// Slots of this generation that count as taken because an earlier run may have leased them.
    #[must_use]
    pub fn strange(&self, at: At) -> u16 {
        self.strangers.slots(at)
    }

    /// When [`Event::Timer`] is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Tick> {
        let waits = self.waiting.iter().map(|a| a.until);
        let leases = self.held.values().map(|h| h.until);
        let keys = self.old_keys.front().map(|(t, _)| *t);
        waits.chain(leases).chain(keys).chain(self.strangers.next()).min()
    }

    /// When a slot is likely free for one who asks again: recent leases say how long one lasts, and `taken` of them end
    /// one after the other, for those that wait first. Without experience, the first end that is certain.
    #[must_use]
    pub fn retry_after(&self, taken: u32, now: Tick) -> Duration {
        let waiting = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        let leased = taken.saturating_sub(self.strangers.total());
        let guess = match u32::try_from(self.recent.len()) {
            Ok(n @ 1..) if leased > 0 => {
                (self.recent.iter().sum::<Duration>() / n).saturating_mul(waiting.saturating_add(1)) / leased
            }
            _ => self.held.values().map(|h| h.until.since(now)).min().unwrap_or(*RETRY.start()),
        };
        guess.clamp(*RETRY.start(), *RETRY.end())
    }

    /// What follows from an event.
    #[must_use = "actions are to be carried out"]
    pub fn step(&mut self, event: Event, now: Tick) -> Vec<Action> {
        match event {
            Event::Ask(ask) => vec![self.ask(ask)],
            Event::Slot(at) => vec![self.slot(at, now)],
            Event::Leave(ticket) => {
                self.waiting.iter().position(|a| a.ticket == ticket).map(|i| self.unqueue(i));
                Vec::new()
            }
            Event::Dismiss => {
                let all = self.waiting.len();
                (0..all).filter_map(|_| self.refuse(0, Refusal::Dismissed)).collect()
            }
            Event::Renew { lease, at, current, ttl, holder } => vec![self.renew(lease, at, current, ttl, holder, now)],
            Event::Reclaim { lease, at, ttl, holder } => {
                if self.held.contains_key(&lease) {
                    return vec![Action::Unwanted(at)];
                }
                self.hold(lease, at, ttl, holder, None, now);
                vec![Action::Recognised(lease)]
            }
            Event::Release { lease, at, current } => self.release(lease, at, current, now),
            Event::Revoked(at) => {
                self.strangers.revoked(at);
                let gone = |h: &Held| h.at.replica == at.replica && h.at.generation <= at.generation;
                let leases: Vec<Mark> = self.held.values().filter(|h| gone(h)).map(|h| h.lease).collect();
                leases.into_iter().filter_map(|l| self.end(l, End::Revoked, now)).collect()
            }
            Event::Adopted { at, slots } => {
                self.strangers.adopted(at, slots, &self.limits, now);
                Vec::new()
            }
            Event::Busy { at, work } => self.strangers.busy(at, &work, now).into_iter().collect(),
            Event::Timer => self.timer(now),
        }
    }

    fn ask(&mut self, ask: Ask) -> Action {
        let (ticket, key) = (ask.ticket, key_of(&ask));
        let refused = |why, ask: Ask| Action::Refused { ticket, why, holder: ask.holder };
        if let Some((wish, stands)) = key.as_ref().and_then(|k| self.keys.get(k)) {
            return match stands {
                _ if *wish != Wish::of(&ask) => refused(Refusal::OtherWish, ask),
                Stands::Waiting(to) => Action::Joined { ticket, to: *to },
                Stands::Held(lease) => Action::Same { ticket, lease: *lease },
                Stands::Over(_) => refused(Refusal::KeyIsOver, ask),
            };
        }
        if self.waiting.len() >= self.limits.waiting {
            return refused(Refusal::Full, ask);
        }
        if let Some(key) = key {
            self.keys.insert(key, (Wish::of(&ask), Stands::Waiting(ticket)));
        }
        self.waiting.push_back(ask);
        Action::Queued { ticket, position: self.waiting.len() - 1 }
    }

    fn slot(&mut self, at: At, now: Tick) -> Action {
        let Some(ask) = self.waiting.pop_front() else { return Action::Unwanted(at) };
        let key = key_of(&ask);
        if let Some(session) = &ask.holder.session_id {
            self.remember_session(session, at.replica);
        }
        let holder = ask.holder.clone();
        let lease = ask.ttl.map(|ttl| {
            let lease = Mark { run: self.run, ticket: ask.ticket };
            self.newest = self.newest.max(Some(ask.ticket));
            self.hold(lease, at, ttl, ask.holder, key.clone(), now);
            lease
        });
        if let Some(key) = key {
            match (lease, self.keys.get_mut(&key)) {
                (Some(lease), Some((_, stands))) => *stands = Stands::Held(lease),
                // A guard cannot be given to two.
                _ => drop(self.keys.remove(&key)),
            }
        }
        Action::Granted { ticket: ask.ticket, at, lease, holder }
    }

    fn hold(&mut self, lease: Mark, at: At, ttl: Duration, holder: super::Holder, key: Option<Key>, now: Tick) {
        let ttl = ttl.min(self.limits.max_ttl);
        let mut used: Vec<u16> = self.held.values().filter(|h| h.at.replica == at.replica).map(|h| h.slot).collect();
        used.sort_unstable();
        let slot = (0..)
            .zip(used)
            .find(|(n, u)| n != u)
            .map_or_else(|| self.held.values().filter(|h| h.at.replica == at.replica).count(), |(n, _)| usize::from(n));
        let slot = u16::try_from(slot).unwrap_or(u16::MAX);
        self.held.insert(lease, Held { lease, at, slot, holder, ttl, since: now, until: now + ttl, key });
    }

    fn renew(
        &mut self,
        lease: Mark,
        at: At,
        current: Option<Generation>,
        ttl: Option<Duration>,
        holder: super::Holder,
        now: Tick,
    ) -> Action {
        if let Some(held) = self.held.get_mut(&lease) {
            held.ttl = ttl.unwrap_or(held.ttl).min(self.limits.max_ttl);
            held.until = now + held.ttl;
            return Action::Renewed(lease);
        }
        if lease.run == self.run {
            return if self.was_ours(lease) { Action::Over } else { Action::Unknown };
        }
        match current {
            Some(g) if g == at.generation && !self.strangers.is_over(lease) => {
                if self.strangers.take(at) {
                    self.hold(lease, at, ttl.unwrap_or(self.limits.max_ttl), holder, None, now);
                    Action::Recognised(lease)
                } else {
                    Action::NeedsSlot
                }
            }
            Some(g) if at.generation <= g => Action::Over,
            _ => Action::Unknown,
        }
    }

    fn release(&mut self, lease: Mark, at: At, current: Option<Generation>, now: Tick) -> Vec<Action> {
        if let Some(ended) = self.end(lease, End::Released, now) {
            return vec![ended];
        }
        if lease.run == self.run {
            return vec![if self.was_ours(lease) { Action::Over } else { Action::Unknown }];
        }
        if current.is_none_or(|g| at.generation > g) {
            return vec![Action::Unknown];
        }
        let mut actions = vec![Action::Over];
        if !self.strangers.is_over(lease) {
            self.strangers.note_over(lease, &self.limits);
            if self.strangers.take(at) {
                actions.push(Action::Freed { at, slots: 1 });
            }
        }
        actions
    }

    /// Names are not kept for ever, but of this run's none is newer than the newest.
    fn was_ours(&self, lease: Mark) -> bool {
        Some(lease.ticket) <= self.newest
    }

    fn timer(&mut self, now: Tick) -> Vec<Action> {
        let due: Vec<Mark> = self.held.values().filter(|h| h.until <= now).map(|h| h.lease).collect();
        let mut actions: Vec<Action> = due.into_iter().filter_map(|l| self.end(l, End::Expired, now)).collect();
        actions.extend(self.strangers.expire(now));
        while let Some(late) = self.waiting.iter().position(|a| a.until <= now) {
            actions.extend(self.refuse(late, Refusal::Late));
        }
        while self.old_keys.front().is_some_and(|(t, _)| *t <= now) {
            self.forget_oldest_key();
        }
        actions
    }

    fn end(&mut self, lease: Mark, how: End, now: Tick) -> Option<Action> {
        let held = self.held.remove(&lease)?;
        if lease.run != self.run {
            self.strangers.note_over(lease, &self.limits);
        }
        if how != End::Revoked {
            self.recent.push_back(now.since(held.since));
            if self.recent.len() > RECENT {
                self.recent.pop_front();
            }
        }
        if let Some((key, (_, stands))) = held.key.as_ref().and_then(|k| Some((k, self.keys.get_mut(k)?))) {
            let until = now + self.limits.remember;
            *stands = Stands::Over(until);
            self.old_keys.push_back((until, key.clone()));
            if self.old_keys.len() > self.limits.remembered {
                self.forget_oldest_key();
            }
        }
        Some(Action::Ended { held, how })
    }

    fn forget_oldest_key(&mut self) {
        if let Some((_, key)) = self.old_keys.pop_front() {
            self.keys.remove(&key);
        }
    }

    fn unqueue(&mut self, at: usize) -> Option<Ask> {
        let ask = self.waiting.remove(at)?;
        if let Some(key) = key_of(&ask) {
            self.keys.remove(&key);
        }
        Some(ask)
    }

    fn refuse(&mut self, at: usize, why: Refusal) -> Option<Action> {
        self.unqueue(at).map(|ask| Action::Refused { ticket: ask.ticket, why, holder: ask.holder })
    }

    fn remember_session(&mut self, session: &Arc<str>, replica: ReplicaId) {
        if self.sessions.insert(Arc::clone(session), replica).is_none() {
            self.session_order.push_back(Arc::clone(session));
        }
        if self.session_order.len() > self.limits.remembered
            && let Some(oldest) = self.session_order.pop_front()
        {
            self.sessions.remove(&oldest);
        }
    }
}

fn key_of(ask: &Ask) -> Option<Key> {
    ask.key.as_ref().map(|key| (ask.holder.tenant_id.clone(), Arc::clone(key)))
}
