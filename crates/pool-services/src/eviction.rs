//! The steward's line: who waits for memory or for a turn to load, in order; what is kept for whom; and who gives way.
//! Whether anybody does is decided by [`pool_domain::room`]; here the plan is shown, commanded and watched.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::evict::Resident;
use pool_domain::lifecycle::{State, Wait};
use pool_domain::plan::{Demand, Fit, fit};
use pool_domain::room::{NoRoom, Room, make_room};
use pool_domain::{DeviceMask, DeviceSnapshot, Generation, PoolId, ReplicaKey, ResolvedMask, Tick};
use tokio::sync::oneshot;

use crate::conductor::{ConductorCommand, Wish};
use crate::control::{Operation, OperationState};
use crate::driver::Want;
use crate::events::EventKind;
use crate::ports::Inventory;
use crate::roster::{PoolHandle, Seat};
use crate::shortage;
use crate::spec::Activation;
use crate::steward::{Book, Promised, Steward, promised_but_to};

/// A victim that is Ready and unused this long after it was told to go was not told, or did not listen.
const HEARD_WITHIN: Duration = Duration::from_secs(5);
/// All that gives way is gone, or never will be, within this.
const GONE_WITHIN: Duration = Duration::from_secs(30);
/// What is kept for one that rests, because it was told to come back, is kept this long.
const BACK_WITHIN: Duration = Duration::from_secs(5);

/// Who waits, in the order of their coming.
#[derive(Debug, Default)]
pub(crate) struct Line {
    places: Vec<Place>,
    /// Who gave way to a start that is not Ready yet.
    gave_way: BTreeMap<ReplicaKey, Vec<ReplicaKey>>,
}

#[derive(Debug)]
struct Place {
    key: ReplicaKey,
    claim: Option<Claim>,
}

/// What is kept for one start.
#[derive(Debug)]
struct Claim {
    /// Bytes by device.
    kept: Vec<(String, u64)>,
    /// Who has to go first.
    victims: Vec<(ReplicaKey, Generation)>,
    at: Tick,
    words: String,
}

/// How far an eviction has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Going,
    /// Somebody was used after all, or cannot go.
    Lapsed,
}

impl Line {
    fn position(&self, key: &ReplicaKey) -> usize {
        self.places.iter().position(|p| p.key == *key).unwrap_or(usize::MAX)
    }

    fn place(&mut self, key: &ReplicaKey) -> &mut Place {
        let at = self.places.iter().position(|p| p.key == *key).unwrap_or_else(|| {
            self.places.push(Place { key: key.clone(), claim: None });
            self.places.len() - 1
        });
        &mut self.places[at]
    }

    fn claim(&self, key: &ReplicaKey) -> Option<&Claim> {
        self.places.iter().find(|p| p.key == *key)?.claim.as_ref()
    }

    /// It fits now: nobody else gets this.
    pub(crate) fn keep(&mut self, key: &ReplicaKey, kept: Vec<(String, u64)>, at: Tick) {
        self.place(key).claim = Some(Claim { kept, victims: Vec::new(), at, words: String::new() });
    }

    pub(crate) fn leave(&mut self, key: &ReplicaKey) {
        self.places.retain(|p| p.key != *key);
    }

    pub(crate) fn add_kept_for_others(&self, key: &ReplicaKey, sum: &mut Promised) {
        let others = self.places.iter().filter(|p| p.key != *key).filter_map(|p| p.claim.as_ref());
        for (uuid, bytes) in others.flat_map(|c| &c.kept) {
            let on = sum.entry(uuid.clone()).or_default();
            *on = on.saturating_add(*bytes);
        }
    }

    fn goes_already(&self, key: &ReplicaKey) -> bool {
        self.places.iter().filter_map(|p| p.claim.as_ref()).any(|c| c.victims.iter().any(|(v, _)| v == key))
    }
}

/// Whether it loads now.
fn loads(state: &State) -> bool {
    matches!(state, State::Preparing { .. } | State::Starting { .. } | State::Warming { .. })
}

/// When it was last used, if it is Ready: the end of its last lease, or when it became so.
pub(crate) fn last_used(seat_unused_for: Option<Duration>, ready_since: Tick, now: Tick) -> Tick {
    seat_unused_for.map_or(ready_since, |unused| ready_since.max(now - unused))
}

impl Steward {
    fn pool(&self, id: &PoolId) -> Option<PoolHandle> {
        self.table.borrow().get(id).cloned()
    }

    fn reloads(&self, id: &PoolId) -> bool {
        let runs =
            |o: &Operation| o.state == OperationState::Running && matches!(o.verb.as_str(), "reload" | "rollback");
        self.pool(id).is_some_and(|pool| pool.facts.borrow().operations.iter().any(runs))
    }

    fn ward(&self, key: &ReplicaKey) -> Option<&Seat> {
        self.wards.iter().find(|w| w.key == *key)
    }

    /// Places of wards in the order in which they are served: preloaded pools, then who waits longest.
    pub(crate) fn in_order(&self, book: &Book) -> Vec<usize> {
        let table = self.table.borrow();
        let rank = |i: &usize| {
            let key = &self.wards[*i].key;
            let later = table.get(&key.pool).is_some_and(|h| h.roster.borrow().spec.activation != Activation::Preload);
            (later, book.line.position(key), *i)
        };
        let mut order: Vec<usize> = (0..self.wards.len()).collect();
        order.sort_by_cached_key(rank);
        order
    }

    /// Whether nobody loads on any of these devices, nor is next to.
    pub(crate) fn has_turn(&self, devices: &ResolvedMask, book: &Book, spoken_for: &mut BTreeSet<String>) -> bool {
        let taken = |uuid: &String| {
            spoken_for.contains(uuid)
                || self.wards.iter().any(|w| {
                    let on = |r: &crate::steward::Reservation| r.devices.uuids.contains(uuid);
                    book.held.get(&w.key).is_some_and(on) && loads(&w.published.borrow().state)
                })
        };
        let free = !devices.uuids.iter().any(taken);
        if !free {
            spoken_for.extend(devices.uuids.iter().cloned());
        }
        free
    }

    /// Replicas of one pool that may be anywhere go to devices of their own, while there are such.
    pub(crate) fn beside_its_siblings(
        &self,
        key: &ReplicaKey,
        want: &Want,
        demand: &Demand,
        usable: &[DeviceSnapshot],
        promised: &dyn Fn(&str) -> u64,
        book: &Book,
    ) -> Option<Fit> {
        let sibling = |other: &&ReplicaKey| other.pool == key.pool && **other != *key;
        let taken: BTreeSet<&String> = book
            .held
            .iter()
            .filter(|(other, _)| sibling(other))
            .flat_map(|(_, r)| &r.devices.uuids)
            .chain(
                book.line
                    .places
                    .iter()
                    .filter(|p| sibling(&&p.key))
                    .filter_map(|p| p.claim.as_ref())
                    .flat_map(|c| c.kept.iter().map(|(uuid, _)| uuid)),
            )
            .collect();
        if want.mask != DeviceMask::Auto || taken.is_empty() {
            return None;
        }
        let own: Vec<DeviceSnapshot> = usable.iter().filter(|d| !taken.contains(&d.uuid)).cloned().collect();
        fit(demand, &want.mask, &own, promised).ok()
    }

    /// Forgets who waits no more, and brings back who gave way for nothing.
    pub(crate) fn tend(&self, book: &mut Book) {
        let now = self.clock.now();
        let states: BTreeMap<&ReplicaKey, State> =
            self.wards.iter().map(|w| (&w.key, w.published.borrow().state.clone())).collect();
        // An engine that a reload has stopped makes room for the next of its own pool, or comes back itself.
        let reloading = |key: &ReplicaKey| !book.held.contains_key(key) && self.reloads(&key.pool);
        let swapped: Vec<(ReplicaKey, Vec<(String, u64)>)> = book
            .homes
            .iter()
            .filter(|(key, _)| reloading(key))
            .map(|(key, home)| (key.clone(), home.pairs()))
            .collect();
        let line = &mut book.line;
        line.places.retain(|p| match states.get(&p.key) {
            Some(_) if swapped.iter().any(|(key, _)| *key == p.key) => true,
            Some(State::Staging { .. } | State::Preparing { .. } | State::Waiting { why: Wait::Vram { .. }, .. }) => {
                true
            }
            Some(State::Idle) => p.claim.as_ref().is_some_and(|c| c.victims.is_empty() && now < c.at + BACK_WITHIN),
            _ => false,
        });
        for (key, home) in swapped {
            if line.claim(&key).is_none() {
                line.keep(&key, home, now);
            }
        }
        let mut failed = Vec::new();
        line.gave_way.retain(|starter, _| match states.get(starter) {
            Some(State::Ready { .. } | State::Suspect { .. } | State::Draining { .. }) => false,
            None
            | Some(
                State::Idle
                | State::Failed { .. }
                | State::Fenced { .. }
                | State::Waiting { why: Wait::Backoff { .. } | Wait::Breaker { .. }, .. },
            ) => {
                failed.push(starter.clone());
                true
            }
            Some(_) => true,
        });
        for starter in failed {
            self.bring_back(&starter, book);
        }
    }

    fn bring_back(&self, starter: &ReplicaKey, book: &mut Book) {
        for victim in book.line.gave_way.remove(starter).unwrap_or_default() {
            let (Some(ward), Some(pool)) = (self.ward(&victim), self.pool(&victim.pool)) else { continue };
            if command(&pool, Wish::ComeBack(victim.replica)) {
                let generation = ward.published.borrow().snapshot.generation;
                self.events.send(&victim, generation, EventKind::BroughtBack);
                if let Some(home) = book.homes.get(&victim).filter(|_| !book.held.contains_key(&victim)) {
                    book.line.keep(&victim, home.pairs(), self.clock.now());
                }
            }
        }
    }

    /// What a start that does not fit waits for; and whoever may give way is told to, in the order of the line.
    pub(crate) fn room_for(
        &self,
        ward: &Seat,
        want: &Want,
        missing: &str,
        inventory: &Inventory,
        book: &mut Book,
    ) -> Wait {
        let (key, now) = (&ward.key, self.clock.now());
        let with = |words: &str| if words.is_empty() { missing.to_owned() } else { format!("{missing}; {words}") };
        if let Some(claim) = book.line.claim(key).filter(|c| !c.victims.is_empty())
            && self.progress(&claim.victims, claim.at, book) == Progress::Going
        {
            return Wait::Vram { detail: with(&claim.words), possible_at: None };
        }
        book.line.place(key).claim = None;
        let promised = promised_but_to(key, book);
        let usable = self.devices_for(key, inventory, book, &promised);
        let promised = |u: &str| promised.get(u).copied().unwrap_or(0);
        let residents = self.residents(key, book, now);
        let demand = shortage::as_seen(key, want, &book.lowest);
        let planned = make_room(&demand, &want.mask, &usable, &promised, &residents, &self.eviction, now);
        match planned.and_then(|room| self.evict(key, want.generation, room, book, now)) {
            Ok(words) => Wait::Vram { detail: with(&words), possible_at: None },
            Err(NoRoom { detail, possible_at }) => {
                // Whoever went already, went for nothing.
                self.bring_back(key, book);
                Wait::Vram { detail: with(&detail), possible_at }
            }
        }
    }

    /// Shows the plan and commands it.
    fn evict(
        &self,
        key: &ReplicaKey,
        generation: Generation,
        room: Room,
        book: &mut Book,
        now: Tick,
    ) -> Result<String, NoRoom> {
        let mut victims = Vec::new();
        for victim in &room.evict {
            let generation = book.held.get(victim).map_or(Generation(0), |r| r.generation);
            if self.pool(&victim.pool).is_some_and(|pool| command(&pool, Wish::GiveWay(victim.replica))) {
                self.events.send(victim, generation, EventKind::Evicted { by: key.pool.to_string() });
                victims.push((victim.clone(), generation));
            }
        }
        let (words, pools) = (room.words(), room.pools().into_iter().map(str::to_owned).collect());
        if victims.is_empty() {
            return Err(NoRoom { detail: String::new(), possible_at: None });
        }
        self.events.send(key, generation, EventKind::EvictionPlanned { plan: words.clone(), pools });
        let gave_way = book.line.gave_way.entry(key.clone()).or_default();
        for (victim, _) in &victims {
            if !gave_way.contains(victim) {
                gave_way.push(victim.clone());
            }
        }
        book.line.place(key).claim = Some(Claim { kept: room.kept, victims, at: now, words: words.clone() });
        Ok(words)
    }

    fn progress(&self, victims: &[(ReplicaKey, Generation)], since: Tick, book: &Book) -> Progress {
        let now = self.clock.now();
        let lapsed = |(key, generation): &(ReplicaKey, Generation)| {
            let Some(ward) = self.ward(key) else { return false };
            if book.held.get(key).is_none_or(|r| r.generation != *generation) {
                return false; // gone
            }
            match &ward.published.borrow().state {
                State::Ready { since: ready_since, .. } => {
                    let used = last_used(ward.admission.unused_for(), *ready_since, now);
                    ward.admission.in_use() > 0 || used > since || now >= since + HEARD_WITHIN
                }
                State::Draining { .. } | State::Stopping { .. } => false,
                State::Fenced { .. } => true,
                _ => now >= since + HEARD_WITHIN,
            }
        };
        if now >= since + GONE_WITHIN || victims.iter().any(lapsed) { Progress::Lapsed } else { Progress::Going }
    }

    /// Who holds memory, as far as the start of `key` is concerned.
    fn residents(&self, key: &ReplicaKey, book: &Book, now: Tick) -> Vec<Resident> {
        let resident = |ward: &Seat| {
            let held = book.held.get(&ward.key)?;
            let pool = self.pool(&ward.key.pool)?;
            let spec = pool.spec();
            let ready_since = match ward.published.borrow().state {
                State::Ready { since, .. } => Some(since),
                _ => None,
            };
            let in_hand = {
                let facts = pool.facts.borrow();
                let runs = |o: &Operation| {
                    o.state == OperationState::Running && !matches!(o.verb.as_str(), "preload" | "declare")
                };
                facts.snapshot.hold || facts.operations.iter().any(runs)
            };
            // Replicas of one pool do not take turns.
            let sibling = ward.key.pool == key.pool;
            Some(Resident {
                key: ward.key.clone(),
                holds: held.pairs(),
                ready_since,
                last_used: ready_since.map_or(now, |since| last_used(ward.admission.unused_for(), since, now)),
                busy: u32::from(ward.admission.in_use()).saturating_add(pool.desk.waiting()),
                on_demand: spec.activation == Activation::OnDemand,
                pinned: spec.pin,
                held: in_hand || sibling || !ward.serves || book.line.goes_already(&ward.key),
            })
        };
        self.wards.iter().filter_map(resident).collect()
    }
}

/// Nobody waits for the answer: what becomes of it is seen in what the pool publishes.
fn command(pool: &PoolHandle, wish: Wish) -> bool {
    let (answer, _) = oneshot::channel();
    pool.commands.try_send(ConductorCommand { wish, answer }).is_ok()
}
