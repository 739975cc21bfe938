//! The lease desk of a pool: the only writer of its lease book. It holds the guards of leases that cross a wire, and
//! hands slots to those who wait, in their order. One task a pool: what a pool's clients do costs no other pool anything,
//! and it comes and goes with the pool.

mod handle;
mod outlook;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pool_domain::lease_book::{Action, Ask, At, End, Event, LeaseBook, LeaseId, Limits, Mark, Refusal, Ticket};
use pool_domain::{Generation, Holder, ReplicaId, ReplicaKey, Tick};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::admission::{Admission, Refused, SlotGuard};
use crate::api_key::ApiKey;
use crate::clock::Clock;
use crate::conductor::{ConductorCommand, PoolFacts, Wish};
use crate::control::ControlError;
use crate::driver::Published;
use crate::events::{EventKind, EventSink};
use crate::lease::{DEFAULT_TTL, Lease, LeaseRequest, MAX_WAIT};
use crate::roster::Roster;
use crate::snapshot::PoolSnapshot;
use crate::spec::Activation;
use crate::tally::Tally;

use handle::{DeskCommand, Granted, Guarded};
use outlook::{Outlook, start_failed};

pub(crate) use handle::{Desk, at};
pub(crate) use outlook::refusal;

/// Questions a desk may be asked at once; more wait for their turn to ask.
const DESK_QUEUE: usize = 1024;

/// A desk that nobody sits at yet: others may know it before the pool is complete.
#[derive(Debug)]
pub(crate) struct EmptyDesk {
    pub(crate) desk: Desk,
    commands: mpsc::Receiver<DeskCommand>,
}

/// What a desk is about.
pub(crate) struct DeskParts {
    pub(crate) roster: watch::Receiver<Arc<Roster>>,
    pub(crate) facts: watch::Receiver<PoolFacts>,
    /// Weak: the pool ends although somebody waits for it.
    pub(crate) conductor: mpsc::WeakSender<ConductorCommand>,
    pub(crate) clock: Clock,
    pub(crate) events: EventSink,
    pub(crate) seed: u64,
    pub(crate) limits: Limits,
}

impl EmptyDesk {
    pub(crate) fn new() -> Self {
        let (tx, commands) = mpsc::channel(DESK_QUEUE);
        let (bell, gone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let desk = Desk { commands: tx, bell, gone, waiting: Arc::default(), tally: Arc::default() };
        Self { desk, commands }
    }

    /// Works until nobody can ask it any more.
    pub(crate) async fn run(self, parts: DeskParts) {
        let Self { desk: Desk { bell, gone, waiting, tally, .. }, commands } = self;
        let mut hasher = DefaultHasher::new();
        (parts.seed, parts.clock.now()).hash(&mut hasher);
        let seen = parts.facts.borrow().snapshot.clone();
        let clerk = Clerk {
            book: LeaseBook::new(hasher.finish(), parts.limits),
            seen,
            reloading: false,
            p: parts,
            asked: BTreeMap::new(),
            kept: BTreeMap::new(),
            strange: BTreeMap::new(),
            in_hand: None,
            tickets: 0,
            demanded: false,
            waiting,
            tally,
        };
        clerk.run(commands, &bell, &gone).await;
    }
}

/// Who waits for an answer.
enum Asker {
    Lease(oneshot::Sender<Granted<Lease>>),
    Guard(oneshot::Sender<Granted<Guarded>>),
}

impl Asker {
    fn gone(&self) -> bool {
        match self {
            Self::Lease(answer) => answer.is_closed(),
            Self::Guard(answer) => answer.is_closed(),
        }
    }

    fn refuse(self, why: ControlError) {
        // Who is gone meanwhile needs no answer.
        match self {
            Self::Lease(answer) => drop(answer.send(Err(why))),
            Self::Guard(answer) => drop(answer.send(Err(why))),
        }
    }
}

/// The guard of a lease, and where its client is sent.
struct Kept {
    guard: SlotGuard,
    endpoint: String,
    api_key: Option<ApiKey>,
    engine_version: String,
    device_mask: String,
}

struct Clerk {
    p: DeskParts,
    book: LeaseBook,
    /// The picture that was looked at last.
    seen: PoolSnapshot,
    /// Whether a reload was under way in it.
    reloading: bool,
    asked: BTreeMap<Ticket, Vec<Asker>>,
    kept: BTreeMap<Mark, Kept>,
    strange: BTreeMap<ReplicaId, Vec<SlotGuard>>,
    /// A slot on its way into the book.
    in_hand: Option<SlotGuard>,
    tickets: u64,
    /// What rests was asked to start since it does.
    demanded: bool,
    waiting: Arc<AtomicU32>,
    tally: Arc<Tally>,
}

impl Clerk {
    async fn run(mut self, mut commands: mpsc::Receiver<DeskCommand>, bell: &Notify, gone: &Notify) {
        let (mut facts, mut roster) = (self.p.facts.clone(), self.p.roster.clone());
        let (mut told, mut changing) = (true, true);
        loop {
            tokio::select! {
                biased;
                () = self.p.clock.sleep_until(self.book.next_deadline()) => {}
                changed = facts.changed(), if told => {
                    told = changed.is_ok();
                    self.look(told);
                }
                changed = roster.changed(), if changing => changing = changed.is_ok(),
                () = bell.notified() => self.prune(),
                () = gone.notified() => self.sweep(),
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
            }
            self.settle();
        }
    }

    fn command(&mut self, command: DeskCommand) {
        match command {
            DeskCommand::Lease { request, answer } => {
                let LeaseRequest { ttl, wait, holder, prefer, key } = request;
                let until = self.now() + wait.min(MAX_WAIT);
                self.ask(Asker::Lease(answer), |ticket| Ask { ticket, ttl: Some(ttl), until, holder, prefer, key });
            }
            DeskCommand::Guard { wait, holder, answer } => {
                let until = self.now() + wait.min(MAX_WAIT);
                self.ask(Asker::Guard(answer), |ticket| Ask {
                    ticket,
                    ttl: None,
                    until,
                    holder,
                    prefer: None,
                    key: None,
                });
            }
            DeskCommand::Renew { id, ttl, holder, answer } => drop(answer.send(self.renew(&id, ttl, holder))),
            DeskCommand::Release { id, answer } => {
                let at = At { replica: id.replica, generation: id.generation };
                let event = Event::Release { lease: id.mark, at, current: self.current(id.replica) };
                let unknown = self.step(event).contains(&Left::Unknown);
                let result = if unknown { Err(ControlError::LeaseNotFound(id.to_string())) } else { Ok(()) };
                let _ = answer.send(result);
            }
            DeskCommand::List { answer } => {
                let all = self.book.all().filter_map(|h| self.lease(h.lease)).collect();
                let _ = answer.send(all);
            }
            DeskCommand::Adopted { at, guards } => {
                let slots = u16::try_from(guards.len()).unwrap_or(u16::MAX);
                self.strange.insert(at.replica, guards);
                self.step(Event::Adopted { at, slots });
                self.prune();
            }
            DeskCommand::Busy { at, work, left } => {
                self.prune();
                // Who does not say how busy it is may be busy.
                if let Some(work) = work {
                    self.step(Event::Busy { at, work });
                }
                let _ = left.send(self.book.strange(at));
            }
        }
    }

    fn ask(&mut self, asker: Asker, ask: impl FnOnce(Ticket) -> Ask) {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.asked.insert(ticket, vec![asker]);
        let ask = ask(ticket);
        let holder = ask.holder.clone();
        let left = self.step(Event::Ask(ask));
        self.settle();
        if let Some(Left::Queued(position)) = left.first()
            && self.asked.contains_key(&ticket)
        {
            self.tell(None, EventKind::LeaseQueued { position: *position, holder });
        }
    }

    fn renew(&mut self, id: &LeaseId, ttl: Option<std::time::Duration>, holder: Holder) -> Granted<Lease> {
        let at = At { replica: id.replica, generation: id.generation };
        // What is not in the book says nothing of how long it lasted.
        let ttl = if self.book.held(id.mark).is_some() { ttl } else { ttl.or(Some(DEFAULT_TTL)) };
        let current = self.current(id.replica);
        let left = self.step(Event::Renew { lease: id.mark, at, current, ttl, holder: holder.clone() });
        if left.contains(&Left::NeedsSlot)
            && let Some(guard) = self.admission(id.replica).and_then(|a| a.acquire().ok())
            && guard.is_of(id.generation)
        {
            self.in_hand = Some(guard);
            self.step(Event::Reclaim { lease: id.mark, at, ttl: ttl.unwrap_or(DEFAULT_TTL), holder });
        }
        let lease = self.lease(id.mark).ok_or_else(|| ControlError::LeaseNotFound(id.to_string()))?;
        self.tell(Some(at), EventKind::LeaseRenewed { holder: lease.holder.clone() });
        Ok(lease)
    }

    fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.p.roster.borrow())
    }

    fn now(&self) -> Tick {
        self.p.clock.now()
    }

    fn admission(&self, replica: ReplicaId) -> Option<Arc<Admission>> {
        let roster = self.roster();
        roster.seats.iter().find(|seat| seat.key.replica == replica).map(|seat| Arc::clone(&seat.admission))
    }

    fn current(&self, replica: ReplicaId) -> Option<Generation> {
        self.p.facts.borrow().snapshot.replicas.iter().find(|r| r.id == replica).map(|r| r.generation)
    }

    /// The pool has another picture, or none any more.
    fn look(&mut self, told: bool) {
        let (now, reloading) = {
            let facts = self.p.facts.borrow();
            (facts.snapshot.clone(), facts.reloading)
        };
        // In a reload the old one comes back.
        if !reloading && start_failed(&self.seen, &now) {
            self.step(Event::Dismiss);
        }
        self.seen = now;
        // Nobody wakes a pool that is being reloaded, so it is asked again afterwards.
        self.demanded &= (reloading || !self.reloading) && self.some_rest();
        self.reloading = reloading;
        if !told {
            // Its conductor has ended, and with it the pool.
            self.seen.replicas.clear();
            self.step(Event::Dismiss);
        }
        self.prune();
    }

    /// Leases whose engine is gone are over.
    fn prune(&mut self) {
        let of_leases = self.kept.iter().filter(|(_, k)| !k.guard.valid());
        let mut gone: Vec<At> = of_leases.filter_map(|(mark, _)| Some(self.book.held(*mark)?.at)).collect();
        let strange = std::mem::take(&mut self.strange);
        for (replica, guards) in strange {
            if guards.iter().all(SlotGuard::valid) {
                self.strange.insert(replica, guards);
            } else {
                // They are of the generation that the book knows of, or it knows of a newer one.
                gone.extend(self.current(replica).map(|generation| At { replica, generation }));
            }
        }
        for at in gone {
            self.step(Event::Revoked(at));
        }
    }

    /// Those who are gone leave the queue.
    fn sweep(&mut self) {
        for askers in self.asked.values_mut() {
            askers.retain(|a| !a.gone());
        }
        let gone: Vec<Ticket> = self.asked.iter().filter(|(_, a)| a.is_empty()).map(|(t, _)| *t).collect();
        for ticket in gone {
            self.asked.remove(&ticket);
            self.step(Event::Leave(ticket));
        }
    }

    /// Serves who can be served, and lets nobody wait for nothing.
    fn settle(&mut self) {
        if self.book.waiting() > 0 {
            self.set_awaited(true);
            self.serve();
            self.look_ahead();
        }
        if self.book.next_deadline().is_some_and(|due| due <= self.now()) {
            self.step(Event::Timer);
            self.serve();
        }
        self.set_awaited(self.book.waiting() > 0);
        self.waiting.store(u32::try_from(self.book.waiting()).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    fn set_awaited(&self, awaited: bool) {
        for seat in &self.roster().seats {
            seat.admission.set_awaited(awaited);
        }
    }

    fn serve(&mut self) {
        while let Some(hint) = self.book.first() {
            let Some((at, guard)) = self.take_slot(hint) else { return };
            self.in_hand = Some(guard);
            self.step(Event::Slot(at));
        }
    }

    /// Where the hint says, else where most is free; only where it is known how the engine is reached.
    fn take_slot(&self, hint: Option<ReplicaId>) -> Option<(At, SlotGuard)> {
        let (facts, roster) = (self.p.facts.borrow(), self.roster());
        let ready = |key: &ReplicaKey| facts.snapshot.replicas.iter().find(|r| r.id == key.replica && r.ready);
        let mut best: Vec<_> = roster
            .serving()
            .filter_map(|seat| Some((at(&seat.key, ready(&seat.key)?.generation), &seat.admission)))
            .filter(|(at, a)| a.is_of(at.generation) && a.free() > 0)
            .collect();
        best.sort_by_key(|(at, a)| (Some(at.replica) != hint, std::cmp::Reverse(a.free()), at.replica));
        best.into_iter()
            .filter_map(|(at, a)| Some((at, a.acquire_for_first().ok()?)))
            .find(|(at, guard)| guard.is_of(at.generation))
    }

    fn outlook(&self) -> Outlook {
        Outlook::of(&self.seen, self.reloading)
    }

    fn look_ahead(&mut self) {
        if self.book.waiting() == 0 {
            return;
        }
        match self.outlook() {
            Outlook::Hopeless => {
                self.step(Event::Dismiss);
            }
            Outlook::Serves | Outlook::Coming | Outlook::Rests => self.demand(),
        }
    }

    /// Asks for what rests: the pool, or those of its replicas that gave way to another.
    fn demand(&mut self) {
        if self.demanded || self.reloading || !self.some_rest() || self.roster().spec.activation != Activation::OnDemand
        {
            return;
        }
        if let Some(conductor) = self.p.conductor.upgrade() {
            let (answer, _) = oneshot::channel();
            // A full queue is tried again when anything changes.
            self.demanded = conductor.try_send(ConductorCommand { wish: Wish::Demand, answer }).is_ok();
        }
    }

    fn some_rest(&self) -> bool {
        let serves = |id| self.roster().serving().any(|seat| seat.key.replica == id);
        self.seen.replicas.iter().any(|r| r.state == "idle" && serves(r.id))
    }

    /// Feeds the book and does what it says; what is left is for the caller.
    fn step(&mut self, event: Event) -> Vec<Left> {
        let now = self.now();
        let actions = self.book.step(event, now);
        actions.into_iter().filter_map(|a| self.act(a, now)).collect()
    }

    fn act(&mut self, action: Action, now: Tick) -> Option<Left> {
        match action {
            Action::Queued { position, .. } => return Some(Left::Queued(position)),
            Action::Joined { ticket, to } => {
                let joining = self.asked.remove(&ticket).unwrap_or_default();
                self.asked.entry(to).or_default().extend(joining);
            }
            Action::Granted { ticket, at, lease, holder } => self.granted(ticket, at, lease, holder),
            Action::Same { ticket, lease } => {
                let answer = self.lease(lease).ok_or_else(|| ControlError::LeaseNotFound(String::new()));
                for asker in self.asked.remove(&ticket).unwrap_or_default() {
                    if let Asker::Lease(a) = asker {
                        let _ = a.send(answer.clone());
                    }
                }
            }
            Action::Refused { ticket, why, holder } => {
                let (error, reason) = self.refusal(why, now);
                let askers = self.asked.remove(&ticket).unwrap_or_default();
                if askers.iter().any(|asker| matches!(asker, Asker::Guard(_))) {
                    let saturated = matches!(error, ControlError::Saturated { .. });
                    self.tally.refused(if saturated { Refused::Saturated } else { Refused::Closed });
                } else {
                    self.tell(None, EventKind::LeaseRefused { reason, holder });
                }
                for asker in askers {
                    asker.refuse(error.clone());
                }
            }
            Action::Unwanted(_) => self.in_hand = None,
            Action::Ended { held, how } => {
                self.kept.remove(&held.lease);
                let (holder, after) = (held.holder, now.since(held.since));
                let kind = match how {
                    End::Released => EventKind::LeaseReleased { holder, after },
                    End::Expired => EventKind::LeaseExpired { holder, after },
                    End::Revoked => EventKind::LeaseRevoked { holder, after },
                };
                self.tell(Some(held.at), kind);
            }
            Action::Recognised(lease) => {
                let at = self.book.held(lease)?.at;
                let strange = || self.strange.get_mut(&at.replica)?.pop();
                if let Some(guard) = self.in_hand.take().or_else(strange) {
                    self.keep(lease, at.replica, guard);
                }
            }
            Action::NeedsSlot => return Some(Left::NeedsSlot),
            Action::Freed { at, slots } => {
                let guards = self.strange.get_mut(&at.replica)?;
                guards.truncate(guards.len().saturating_sub(usize::from(slots)));
            }
            Action::Unknown => return Some(Left::Unknown),
            Action::Renewed(_) | Action::Over => {}
        }
        None
    }

    fn granted(&mut self, ticket: Ticket, at: At, lease: Option<Mark>, holder: Holder) {
        let Some(guard) = self.in_hand.take() else { return };
        let askers = self.asked.remove(&ticket).unwrap_or_default();
        let mut taken = false;
        match lease {
            None => {
                let key = ReplicaKey { pool: self.roster().spec.id.clone(), replica: at.replica };
                if let Some(Asker::Guard(answer)) = askers.into_iter().next() {
                    // From who is gone the guard comes back, and is dropped.
                    if answer.send(Ok((key, guard))).is_ok() {
                        self.tally.granted();
                    }
                }
            }
            Some(mark) => {
                self.keep(mark, at.replica, guard);
                if let Some(lease) = self.lease(mark) {
                    for asker in askers {
                        if let Asker::Lease(answer) = asker {
                            taken |= answer.send(Ok(lease.clone())).is_ok();
                        }
                    }
                }
                // Who is gone and has a key comes back for it.
                if !taken && self.book.held(mark).is_some_and(|h| !h.has_key()) {
                    self.step(Event::Release { lease: mark, at, current: Some(at.generation) });
                }
            }
        }
        if taken {
            self.tell(Some(at), EventKind::LeaseGranted { holder });
        }
    }

    fn keep(&mut self, lease: Mark, replica: ReplicaId, guard: SlotGuard) {
        let facts = self.p.facts.borrow();
        let shown = facts.snapshot.replicas.iter().find(|r| r.id == replica);
        // Of the same engine as the rest.
        let is_shown = |p: &Published| shown.is_some_and(|r| r.generation == p.snapshot.generation);
        let roster = self.roster();
        let seat = roster.seats.iter().find(|seat| seat.key.replica == replica).map(|seat| seat.published.borrow());
        let kept = Kept {
            api_key: seat.filter(|p| is_shown(p)).and_then(|p| p.api_key.clone()),
            guard,
            endpoint: shown.and_then(|r| r.endpoint.clone()).unwrap_or_default(),
            engine_version: shown.map(|r| r.engine_version.clone()).unwrap_or_default(),
            device_mask: shown.map(|r| r.device_mask.clone()).unwrap_or_default(),
        };
        self.kept.insert(lease, kept);
    }

    fn lease(&self, mark: Mark) -> Option<Lease> {
        let (held, kept) = (self.book.held(mark)?, self.kept.get(&mark)?);
        let At { replica, generation } = held.at;
        let pool = self.roster().spec.id.clone();
        let id = LeaseId { pool: pool.clone(), replica, generation, mark };
        Some(Lease {
            id: id.to_string(),
            pool_id: pool,
            replica_id: replica,
            generation,
            endpoint: kept.endpoint.clone(),
            api_key: kept.api_key.clone(),
            engine: self.roster().spec.engine.to_string(),
            engine_version: kept.engine_version.clone(),
            device_mask: kept.device_mask.clone(),
            slot: held.slot,
            holder: held.holder.clone(),
            expires_at: self.p.clock.wall() + held.until.since(self.now()),
        })
    }

    fn refusal(&self, why: Refusal, now: Tick) -> (ControlError, &'static str) {
        match why {
            Refusal::OtherWish => {
                let why = "the idempotency key was used for another wish: a new wish needs a new key";
                (ControlError::Conflict(why.into()), "conflict")
            }
            Refusal::KeyIsOver => {
                let why = "the lease of this idempotency key is over: a new lease needs a new key";
                (ControlError::Conflict(why.into()), "conflict")
            }
            Refusal::Full | Refusal::Late | Refusal::Dismissed => match self.outlook() {
                _ if self.seen.replicas.is_empty() => {
                    (ControlError::Unreachable("the daemon is stopping".into()), "stopping")
                }
                Outlook::Rests if self.demanded => {
                    (ControlError::unready("it is starting because it was asked for"), "unready")
                }
                Outlook::Serves if why != Refusal::Dismissed => refusal(&self.seen, Some(self.retry_after(now))),
                _ => refusal(&self.at_present(now), None),
            },
        }
    }

    fn retry_after(&self, now: Tick) -> std::time::Duration {
        let taken = self.roster().serving().map(|seat| u32::from(seat.admission.in_use())).sum();
        self.book.retry_after(taken, now)
    }

    /// The picture with the times that are left.
    fn at_present(&self, now: Tick) -> PoolSnapshot {
        let facts = self.p.facts.borrow();
        facts.at(now)
    }

    fn tell(&self, at: Option<At>, kind: EventKind) {
        let pool = self.roster().spec.id.clone();
        let at = at.unwrap_or_else(|| {
            let lead = self.seen.lead();
            At {
                replica: lead.map_or(ReplicaId(0), |r| r.id),
                generation: lead.map_or(Generation(0), |r| r.generation),
            }
        });
        self.p.events.send(&ReplicaKey { pool, replica: at.replica }, at.generation, kind);
    }
}

/// What the caller of a step has to see to.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Queued(usize),
    NeedsSlot,
    Unknown,
}
