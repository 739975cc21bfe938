use std::collections::{BTreeSet, VecDeque};

use super::*;
use crate::dice::Dice;
use crate::liveness::SlotWork;

const RUN: u64 = 7;
const SECOND: Duration = Duration::from_secs(1);

fn at(generation: u64) -> At {
    At { replica: ReplicaId(0), generation: Generation(generation) }
}

fn ask(ticket: u64, ttl: u64, until: Tick) -> Ask {
    let (ticket, ttl) = (Ticket(ticket), Some(Duration::from_secs(ttl)));
    Ask { ticket, ttl, until, holder: Holder::default(), prefer: None, key: None }
}

fn mark(ticket: u64) -> Mark {
    Mark { run: RUN, ticket: Ticket(ticket) }
}

fn foreign(ticket: u64) -> Mark {
    Mark { run: RUN + 1, ticket: Ticket(ticket) }
}

fn book() -> LeaseBook {
    LeaseBook::new(RUN, Limits::default())
}

/// Asks and has a slot at once.
fn granted(book: &mut LeaseBook, ask: Ask, now: Tick) -> Mark {
    let lease = Mark { run: RUN, ticket: ask.ticket };
    let _ = book.step(Event::Ask(ask), now);
    let actions = book.step(Event::Slot(at(1)), now);
    assert!(matches!(&actions[..], [Action::Granted { lease: Some(l), .. }] if *l == lease), "{actions:?}");
    lease
}

fn release(lease: Mark) -> Event {
    Event::Release { lease, at: at(1), current: Some(Generation(1)) }
}

fn renew(lease: Mark, ttl: Option<Duration>) -> Event {
    Event::Renew { lease, at: at(1), current: Some(Generation(1)), ttl, holder: Holder::default() }
}

#[test]
fn names_say_where_the_slot_is_and_come_back() {
    for pool in ["chat", "a-r0-g1-b", "x.y_z-1"] {
        let id = LeaseId {
            pool: pool.parse().unwrap(),
            replica: ReplicaId(3),
            generation: Generation(12),
            mark: Mark { run: 0xfeed, ticket: Ticket(42) },
        };
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    for bad in
        ["", "lease-", "lease-a-r0-g1-feed-1", "x-a-r0-g1-000000000000feed-1", "lease-a-r0-g+1-000000000000feed-1"]
    {
        assert_eq!(bad.parse::<LeaseId>(), Err(NoLeaseId), "{bad}");
    }
}

#[test]
fn first_come_first_served_and_who_leaves_or_is_late_loses_its_place() {
    let mut b = book();
    let far = Tick(60_000);
    for (n, until) in [(1, far), (2, Tick(500)), (3, far), (4, far)] {
        let n_before = usize::try_from(n - 1).unwrap();
        let queued = Action::Queued { ticket: Ticket(n), position: n_before };
        assert_eq!(b.step(Event::Ask(ask(n, 10, until)), Tick(0)), [queued]);
    }
    assert_eq!(b.step(Event::Leave(Ticket(3)), Tick(0)), []);
    assert_eq!(b.next_deadline(), Some(Tick(500)));
    let late = Action::Refused { ticket: Ticket(2), why: Refusal::Late, holder: Holder::default() };
    assert_eq!(b.step(Event::Timer, Tick(500)), [late]);
    for n in [1, 4] {
        let granted = Action::Granted { ticket: Ticket(n), at: at(1), lease: Some(mark(n)), holder: Holder::default() };
        assert_eq!(b.step(Event::Slot(at(1)), Tick(600)), [granted]);
    }
    assert_eq!(b.step(Event::Slot(at(1)), Tick(600)), [Action::Unwanted(at(1))]);
    assert_eq!(b.all().map(|h| h.slot).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn the_queue_is_bounded() {
    let mut b = LeaseBook::new(RUN, Limits { waiting: 1, ..Limits::default() });
    let _ = b.step(Event::Ask(ask(1, 1, Tick(9))), Tick(0));
    let refused = b.step(Event::Ask(ask(2, 1, Tick(9))), Tick(0));
    assert!(matches!(refused[..], [Action::Refused { why: Refusal::Full, .. }]));
}

#[test]
fn a_lease_expires_unless_it_is_renewed_and_ends_once() {
    let mut b = book();
    let lease = granted(&mut b, ask(1, 10, Tick(0)), Tick(0));
    assert_eq!(b.step(renew(lease, None), Tick(9_000)), [Action::Renewed(lease)]);
    assert_eq!(b.step(Event::Timer, Tick(18_999)), []);
    let ended = b.step(Event::Timer, Tick(19_000));
    assert!(matches!(ended[..], [Action::Ended { how: End::Expired, .. }]), "{ended:?}");
    assert_eq!(b.step(release(lease), Tick(19_000)), [Action::Over], "given back once");
    assert_eq!(b.step(renew(lease, None), Tick(19_000)), [Action::Over]);
    assert_eq!(b.step(release(mark(2)), Tick(19_000)), [Action::Unknown]);

    let lease = granted(&mut b, ask(3, 10, Tick(19_000)), Tick(19_000));
    assert!(matches!(b.step(release(lease), Tick(20_000))[..], [Action::Ended { how: End::Released, .. }]));
    assert_eq!(b.step(release(lease), Tick(20_000)), [Action::Over]);
    let lease = granted(&mut b, ask(4, 100_000, Tick(20_000)), Tick(20_000));
    assert_eq!(b.held(lease).unwrap().ttl, Duration::from_secs(3600), "no lease is longer than the limit");
    assert!(matches!(b.step(Event::Revoked(at(1)), Tick(20_000))[..], [Action::Ended { how: End::Revoked, .. }]));
    assert_eq!(b.step(Event::Revoked(at(1)), Tick(20_000)), []);
}

#[test]
fn the_same_key_and_wish_are_the_same_lease_while_it_waits_and_while_it_is_held() {
    let mut b = book();
    let keyed = |n, ttl| Ask { key: Some("k".into()), ..ask(n, ttl, Tick(60_000)) };
    let _ = b.step(Event::Ask(keyed(1, 10)), Tick(0));
    assert_eq!(b.step(Event::Ask(keyed(2, 10)), Tick(0)), [Action::Joined { ticket: Ticket(2), to: Ticket(1) }]);
    let other = b.step(Event::Ask(keyed(3, 11)), Tick(0));
    assert!(matches!(other[..], [Action::Refused { why: Refusal::OtherWish, .. }]));
    let tenant = Holder { tenant_id: Some("t".into()), ..Holder::default() };
    let others_key = b.step(Event::Ask(Ask { holder: tenant, ..keyed(4, 11) }), Tick(0));
    assert!(matches!(others_key[..], [Action::Queued { .. }]), "a key is its tenant's own");
    let _ = b.step(Event::Slot(at(1)), Tick(0));
    assert_eq!(b.step(Event::Ask(keyed(5, 10)), Tick(0)), [Action::Same { ticket: Ticket(5), lease: mark(1) }]);
    let _ = b.step(release(mark(1)), Tick(1_000));
    let over = b.step(Event::Ask(keyed(6, 10)), Tick(600_999));
    assert!(matches!(over[..], [Action::Refused { why: Refusal::KeyIsOver, .. }]), "{over:?}");
    let _ = b.step(Event::Timer, Tick(601_000));
    assert!(matches!(b.step(Event::Ask(keyed(7, 10)), Tick(601_000))[..], [Action::Queued { .. }]), "forgotten");
    // A wish that got nothing leaves its key free.
    let _ = b.step(Event::Dismiss, Tick(601_000));
    assert!(matches!(b.step(Event::Ask(keyed(8, 99)), Tick(601_000))[..], [Action::Queued { .. }]));
}

#[test]
fn a_session_stays_where_it_was_and_a_preference_goes_first() {
    let mut b = book();
    let holder = Holder { session_id: Some("s".into()), ..Holder::default() };
    let session = |n, prefer| Ask { holder: holder.clone(), prefer, ..ask(n, 10, Tick(0)) };
    let _ = b.step(Event::Ask(session(1, None)), Tick(0));
    assert_eq!(b.first(), Some(None));
    let _ = b.step(Event::Slot(At { replica: ReplicaId(5), generation: Generation(1) }), Tick(0));
    let _ = b.step(Event::Ask(session(2, None)), Tick(0));
    assert_eq!(b.first(), Some(Some(ReplicaId(5))));
    let _ = b.step(Event::Slot(at(1)), Tick(0));
    let _ = b.step(Event::Ask(session(3, Some(ReplicaId(2)))), Tick(0));
    assert_eq!(b.first(), Some(Some(ReplicaId(2))));
    let _ = b.step(Event::Leave(Ticket(3)), Tick(0));
    assert_eq!(b.first(), None);
}

#[test]
fn retry_after_follows_recent_leases_and_stays_within_bounds() {
    let mut b = book();
    assert_eq!(b.retry_after(0, Tick(0)), SECOND);
    let lease = granted(&mut b, ask(1, 20, Tick(0)), Tick(0));
    assert_eq!(b.retry_after(1, Tick(0)), 20 * SECOND, "without experience, the first certain end");
    let _ = b.step(release(lease), Tick(12_000));
    assert_eq!(b.retry_after(4, Tick(12_000)), 3 * SECOND, "four leases of 12 s end every 3 s");
    for n in 2..5 {
        let _ = b.step(Event::Ask(ask(n, 20, Tick(99_000))), Tick(12_000));
    }
    assert_eq!(b.retry_after(4, Tick(12_000)), 12 * SECOND, "three go first");
    assert_eq!(b.retry_after(400, Tick(12_000)), SECOND);
    let _ = b.step(Event::Dismiss, Tick(12_000));
    let lease = granted(&mut b, ask(9, 3600, Tick(12_000)), Tick(12_000));
    let _ = b.step(release(lease), Tick(3_000_000));
    assert_eq!(b.retry_after(1, Tick(3_000_000)), 60 * SECOND);
}

#[test]
fn slots_of_an_adopted_engine_are_taken_until_it_is_idle_after_the_grace_or_they_are_renewed() {
    let mut b = book();
    let _ = b.step(Event::Adopted { at: at(1), slots: 4 }, Tick(0));
    assert_eq!(b.step(Event::Busy { at: at(1), work: counted(0) }, Tick(9_999)), [], "its clients may think");
    assert_eq!(b.step(renew(foreign(1), Some(5 * SECOND)), Tick(9_999)), [Action::Recognised(foreign(1))]);
    assert_eq!(b.strange(at(1)), 3);
    let freed = |slots| [Action::Freed { at: at(1), slots }];
    assert_eq!(b.step(Event::Busy { at: at(1), work: counted(2) }, Tick(10_000)), freed(1));
    assert_eq!(b.step(Event::Busy { at: at(1), work: counted(4) }, Tick(11_000)), [], "never taken again");
    assert_eq!(b.step(release(foreign(2)), Tick(11_000)), [Action::Over, Action::Freed { at: at(1), slots: 1 }]);
    assert_eq!(b.step(release(foreign(2)), Tick(11_000)), [Action::Over], "one lease frees one slot");
    assert!(matches!(b.step(Event::Timer, Tick(15_000))[..], [Action::Ended { how: End::Expired, .. }]));
    assert_eq!(b.step(renew(foreign(1), None), Tick(15_000)), [Action::Over], "it has expired");
    assert_eq!(b.step(Event::Timer, Tick(3_600_000)), freed(1), "no lease of before lasts longer");

    assert_eq!(b.step(renew(foreign(3), None), Tick(3_600_000)), [Action::NeedsSlot]);
    let older = Event::Renew {
        lease: foreign(4),
        at: at(1),
        current: Some(Generation(2)),
        ttl: None,
        holder: Holder::default(),
    };
    assert_eq!(b.step(older, Tick(3_600_000)), [Action::Over]);
    let newer = Event::Renew {
        lease: foreign(4),
        at: at(3),
        current: Some(Generation(2)),
        ttl: None,
        holder: Holder::default(),
    };
    assert_eq!(b.step(newer, Tick(3_600_000)), [Action::Unknown]);
    assert_eq!(b.step(renew(mark(1), None), Tick(3_600_000)), [Action::Unknown], "ours, and never granted");
}

/// Work of which only the amount is told.
fn counted(running: u32) -> Signals {
    Signals { running, ..Signals::default() }
}

/// Work on these requests.
fn named(requests: &[(u32, u64)]) -> Signals {
    let slots: Vec<_> = requests.iter().map(|&(slot, task)| SlotWork { slot, task, prompt: 0, decoded: 0 }).collect();
    Signals { running: u32::try_from(slots.len()).unwrap(), slots, ..Signals::default() }
}

#[test]
fn a_slot_of_an_adopted_engine_is_taken_while_a_request_may_be_older_than_every_lease() {
    let mut b = book();
    let says = |b: &mut LeaseBook, work, s: u64| {
        let _ = b.step(Event::Busy { at: at(1), work }, Tick(s * 1_000));
        b.strange(at(1))
    };
    let _ = b.step(Event::Adopted { at: at(1), slots: 4 }, Tick(0));
    assert_eq!(says(&mut b, named(&[(0, 1)]), 9), 4);
    assert_eq!(says(&mut b, named(&[(0, 1), (1, 2)]), 10), 2);
    let _lease = granted(&mut b, ask(1, 3600, Tick(99_000)), Tick(10_000));
    assert_eq!(says(&mut b, named(&[(0, 1)]), 11), 1, "the lease has no request yet, the other one has");
    assert_eq!(says(&mut b, named(&[(0, 1), (1, 3)]), 12), 1);
    assert_eq!(says(&mut b, named(&[(0, 4), (1, 3)]), 13), 0, "as busy as before, but with other requests");

    let _ = b.step(Event::Adopted { at: at(2), slots: 4 }, Tick(0));
    let says = |b: &mut LeaseBook, work, s: u64| {
        let _ = b.step(Event::Busy { at: at(2), work }, Tick(s * 1_000));
        b.strange(at(2))
    };
    assert_eq!(says(&mut b, counted(3), 20), 3);
    assert_eq!(says(&mut b, counted(2), 21), 2);
    assert_eq!(says(&mut b, counted(4), 22), 2);
    assert_eq!(says(&mut b, counted(0), 23), 0);
}

/// A replica whose slots are counted by hand.
#[derive(Debug, Clone, Copy)]
struct Engine {
    generation: u64,
    slots: u16,
    taken: u16,
    guards: u16,
}

/// The book with everything around it.
struct World {
    book: LeaseBook,
    now: Tick,
    engines: Vec<Engine>,
    /// What must be the order of the queue.
    queue: VecDeque<Ticket>,
    /// Wishes that were not answered yet; with each what hangs on it.
    open: BTreeSet<Ticket>,
    joined: Vec<(Ticket, Ticket)>,
    leases: Vec<(Mark, At)>,
    grants: u64,
    ends: u64,
}

impl World {
    fn new(engines: u16) -> Self {
        let engine = Engine { generation: 1, slots: 3, taken: 0, guards: 0 };
        Self {
            book: LeaseBook::new(RUN, Limits { waiting: 6, remembered: 5, ..Limits::default() }),
            now: Tick(0),
            engines: vec![engine; usize::from(engines)],
            queue: VecDeque::new(),
            open: BTreeSet::new(),
            joined: Vec::new(),
            leases: Vec::new(),
            grants: 0,
            ends: 0,
        }
    }

    fn place(&self, n: usize) -> At {
        At { replica: ReplicaId(u16::try_from(n).unwrap()), generation: Generation(self.engines[n].generation) }
    }

    fn engine(&mut self, at: At) -> Option<&mut Engine> {
        self.engines.get_mut(usize::from(at.replica.0)).filter(|e| e.generation == at.generation.0)
    }

    fn give_back(&mut self, at: At, slots: u16) {
        if let Some(e) = self.engine(at) {
            assert!(e.taken >= slots, "given back what nobody had");
            e.taken -= slots;
        }
    }

    fn answered(&mut self, ticket: Ticket) {
        assert!(self.open.remove(&ticket), "{ticket:?} was answered twice");
        let (with, rest) = self.joined.drain(..).partition(|(_, to)| *to == ticket);
        self.joined = rest;
        for (ticket, _) in Vec::from_iter::<Vec<(Ticket, Ticket)>>(with) {
            self.answered(ticket);
        }
    }

    fn step(&mut self, event: Event) {
        for action in self.book.step(event, self.now) {
            match action {
                Action::Queued { ticket, position } => {
                    assert_eq!(position, self.queue.len());
                    self.queue.push_back(ticket);
                }
                Action::Joined { ticket, to } => {
                    assert!(self.queue.contains(&to));
                    self.joined.push((ticket, to));
                }
                Action::Granted { ticket, at, lease, .. } => {
                    assert_eq!(self.queue.pop_front(), Some(ticket), "first come, first served");
                    self.grants += 1;
                    match lease {
                        Some(lease) => self.leases.push((lease, at)),
                        None => self.engine(at).unwrap().guards += 1,
                    }
                    self.answered(ticket);
                }
                Action::Same { ticket, lease } => {
                    assert!(self.book.held(lease).is_some());
                    self.answered(ticket);
                }
                Action::Refused { ticket, .. } => {
                    self.queue.retain(|t| *t != ticket);
                    self.answered(ticket);
                }
                Action::Unwanted(at) => self.give_back(at, 1),
                Action::Ended { held, how } => {
                    self.ends += 1;
                    if how != End::Revoked {
                        self.give_back(held.at, 1);
                    }
                }
                Action::Freed { at, slots } => self.give_back(at, slots),
                Action::Recognised(lease) => {
                    let at = self.book.held(lease).unwrap().at;
                    self.leases.push((lease, at));
                }
                Action::Renewed(lease) => assert!(self.book.held(lease).is_some()),
                Action::NeedsSlot | Action::Over | Action::Unknown => {}
            }
        }
    }

    /// Slots that are free go to those that wait.
    fn pump(&mut self) {
        while self.book.first().is_some() {
            let Some(n) = self.engines.iter().position(|e| e.taken < e.slots) else { return };
            self.engines[n].taken += 1;
            self.step(Event::Slot(self.place(n)));
        }
    }

    fn check(&self) {
        assert_eq!(self.book.waiting(), self.queue.len());
        for (n, e) in self.engines.iter().enumerate() {
            let at = self.place(n);
            let held: Vec<&Held> = self.book.all().filter(|h| h.at.replica == at.replica).collect();
            assert!(held.iter().all(|h| h.at == at), "a lease outlived its engine");
            let known = u16::try_from(held.len()).unwrap() + e.guards + self.book.strange(at);
            assert_eq!(e.taken, known, "slots were lost, or given back twice");
            assert!(e.taken <= e.slots, "more were granted than there are");
            let numbers: BTreeSet<u16> = held.iter().map(|h| h.slot).collect();
            assert_eq!(numbers.len(), held.len(), "two leases have one slot");
            assert!(numbers.iter().all(|s| *s < e.slots));
        }
        let free = self.engines.iter().any(|e| e.taken < e.slots);
        assert!(!free || self.queue.is_empty(), "somebody waits beside a free slot");
        assert!(self.book.next_deadline().is_none_or(|d| d > self.now), "the timer is late");
        assert!((SECOND..=60 * SECOND).contains(&self.book.retry_after(3, self.now)));
    }

    fn random(&mut self, dice: &mut Dice, n: u64) {
        let some = |dice: &mut Dice, text: &str, of| Some(format!("{text}{}", dice.below(of)).as_str().into());
        let engine = usize::try_from(dice.below(self.engines.len() as u64)).unwrap();
        let at = self.place(engine);
        let (lease, its) = match self.leases.len() as u64 {
            0 => (Mark { run: RUN + dice.below(2), ticket: Ticket(dice.below(20)) }, at),
            len => self.leases[usize::try_from(len - 1 - dice.below(len.min(12))).unwrap()],
        };
        let (lease, its) = if dice.below(8) == 0 { (foreign(dice.below(40)), at) } else { (lease, its) };
        let current = self.engines.get(usize::from(its.replica.0)).map(|e| Generation(e.generation));
        match dice.below(16) {
            0..=5 => {
                let ask = Ask {
                    ticket: Ticket(n),
                    ttl: (dice.below(4) > 0).then(|| Duration::from_millis(1 + dice.below(20_000))),
                    until: self.now + Duration::from_millis(dice.below(3) * dice.below(5_000)),
                    holder: Holder {
                        session_id: if dice.below(3) == 0 { some(dice, "s", 20) } else { None },
                        ..Holder::default()
                    },
                    prefer: None,
                    key: if dice.below(3) == 0 { some(dice, "k", 6) } else { None },
                };
                // Half of those with a key ask for the same.
                let ttl = if ask.key.is_some() && n.is_multiple_of(2) { Some(SECOND) } else { ask.ttl };
                self.open.insert(ask.ticket);
                self.step(Event::Ask(Ask { ttl, ..ask }));
            }
            6..=8 => self.step(Event::Release { lease, at: its, current }),
            9 => self.step(Event::Renew { lease, at: its, current, ttl: None, holder: Holder::default() }),
            10 => {
                if let Some(&ticket) = self.queue.get(usize::try_from(dice.below(6)).unwrap()) {
                    self.queue.retain(|t| *t != ticket);
                    self.answered(ticket);
                    self.step(Event::Leave(ticket));
                }
            }
            11 if dice.below(6) == 0 => {
                // The engine ends and another one comes, or one of before is found.
                self.step(Event::Revoked(at));
                let adopted = dice.below(2) == 0;
                let e = &mut self.engines[engine];
                let generation = e.generation + 1;
                *e = Engine { generation, taken: if adopted { e.slots } else { 0 }, guards: 0, ..*e };
                if adopted {
                    let (at, slots) = (self.place(engine), self.engines[engine].slots);
                    self.step(Event::Adopted { at, slots });
                }
            }
            12 => {
                let work = counted(u32::try_from(dice.below(4)).unwrap());
                self.step(Event::Busy { at, work });
            }
            13 if dice.below(10) == 0 => self.step(Event::Dismiss),
            14 => {
                let e = &mut self.engines[engine];
                let dropped = u16::from(e.guards > 0);
                e.guards -= dropped;
                e.taken -= dropped;
            }
            _ => self.now = self.now + Duration::from_millis(dice.below(4_000)),
        }
        self.pump();
        self.step(Event::Timer);
        self.pump();
        self.check();
    }
}

#[test]
fn no_order_of_events_grants_too_much_loses_a_slot_or_skips_somebody() {
    let (mut grants, mut ends) = (0, 0);
    for seed in 0..10 {
        let (mut world, mut dice) = (World::new(1 + seed % 3), Dice(u64::from(seed)));
        for n in 0..10_000 {
            world.random(&mut dice, n);
        }
        // Whoever asked was answered, or waits.
        let waiting = world.queue.len() + world.joined.len();
        assert_eq!(world.open.len(), waiting);
        (grants, ends) = (grants + world.grants, ends + world.ends);
    }
    assert!(grants > 10_000 && ends > 5_000, "{grants} grants and {ends} ends are no test");
}
