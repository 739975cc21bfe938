//! The steward of the node: the only writer of what pools share, reservations and ports. Replicas publish what they
//! want; it answers each with a grant, a whole mask or nothing, or with a denial that says why.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::charges::Standing;
use pool_domain::evict::EvictionPolicy;
use pool_domain::lifecycle::{State, Wait};
use pool_domain::mask::MaskError;
use pool_domain::plan::fit;
use pool_domain::reserve::Refusal;
use pool_domain::suspicion::{Accusation, SuspicionPolicy, Suspicions};
use pool_domain::xid::XidTable;
use pool_domain::{DeviceHealth, DeviceSnapshot, Failure, FailureClass, Generation, ReplicaKey, ResolvedMask};
use tokio::sync::{Notify, mpsc, watch};

use crate::boot::Closed;
use crate::clock::Clock;
use crate::conditions::{Condition, Conditions, StewardCommand, left_by};
use crate::control::ControlError;
use crate::devices::{self, Casebook};
use crate::driver::{Accused, Denied, DriverCommand, Grant, Want};
use crate::events::{EventKind, EventSink};
use crate::eviction::Line;
use crate::ports::{AgainstDevices, EngineHost, EngineRecord, Incidents, Inventory, Phase};
use crate::roster::{Seat, Table};
use crate::shortage;

/// Waiting replicas are looked at again after this long even if nothing was heard: ports and disks recover silently.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What one replica holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reservation {
    pub(crate) generation: Generation,
    pub(crate) devices: ResolvedMask,
    /// On each of them.
    pub(crate) bytes: Vec<u64>,
    port: Option<u16>,
}

impl Reservation {
    fn on(&self, uuid: &str) -> Option<u64> {
        self.devices.uuids.iter().position(|u| u == uuid).and_then(|at| self.bytes.get(at).copied())
    }

    pub(crate) fn pairs(&self) -> Vec<(String, u64)> {
        self.devices.uuids.iter().cloned().zip(self.bytes.iter().copied()).collect()
    }
}

/// What replicas hold, and where each was last.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) held: BTreeMap<ReplicaKey, Reservation>,
    pub(crate) homes: BTreeMap<ReplicaKey, Reservation>,
    /// Who waits for memory or for a turn, and what is kept for whom.
    pub(crate) line: Line,
    /// Engines that an earlier daemon was ending, and that were not gone when it went: fenced until they are.
    ending: BTreeMap<ReplicaKey, Generation>,
    /// What others use of each device.
    foreign: BTreeMap<String, u64>,
    /// The least that was free to each start that ran out of memory, while it waits.
    pub(crate) lowest: BTreeMap<ReplicaKey, u64>,
    suspicions: Suspicions,
    /// The newest accusation that was heard of each replica, and of each device its last accuser.
    heard: BTreeMap<ReplicaKey, Accused>,
    accusers: BTreeMap<String, (ReplicaKey, Generation)>,
    /// What the driver has against devices.
    pub(crate) cases: Casebook,
}

impl Book {
    /// Notes whom a device was last accused for.
    pub(crate) fn accuse_for(&mut self, device: &str, key: &ReplicaKey, generation: Generation) {
        self.accusers.insert(device.to_owned(), (key.clone(), generation));
    }
}

/// Bytes promised by us on each device, by UUID.
pub(crate) type Promised = BTreeMap<String, u64>;

/// What the node's memory is used for, as the steward sees it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Ledgered {
    /// By us, on each device.
    pub(crate) promised: Promised,
    /// By others, on each device.
    pub(crate) foreign: BTreeMap<String, u64>,
    /// By each replica: device and bytes.
    pub(crate) held: BTreeMap<ReplicaKey, Vec<(String, u64)>>,
    /// Processes of our engines.
    pub(crate) pids: BTreeSet<u32>,
}

pub(crate) struct Steward {
    pub(crate) table: watch::Receiver<Table>,
    /// Every replica of the table; made anew before each round.
    pub(crate) wards: Vec<Seat>,
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) incidents: watch::Receiver<Incidents>,
    /// What follows from what the driver says; unset: nothing.
    pub(crate) xids: Option<XidTable>,
    pub(crate) host: Arc<dyn EngineHost>,
    pub(crate) listen: IpAddr,
    pub(crate) ports: RangeInclusive<u16>,
    pub(crate) bell: Arc<Notify>,
    pub(crate) told: watch::Sender<Ledgered>,
    pub(crate) commands: mpsc::Receiver<StewardCommand>,
    pub(crate) conditions: watch::Sender<Conditions>,
    pub(crate) clock: Clock,
    pub(crate) events: EventSink,
    pub(crate) eviction: EvictionPolicy,
    /// What replicas hold from before this daemon.
    pub(crate) found: Vec<EngineRecord>,
    /// Devices on which something of earlier engines may be left.
    pub(crate) closed: watch::Receiver<Closed>,
    /// What is held against devices, and is kept; at first that of before this daemon.
    pub(crate) remembered: watch::Sender<AgainstDevices>,
}

impl Steward {
    /// Runs until every driver is gone, and nobody can ask for anything any more.
    pub(crate) async fn run(mut self) {
        // Before anything else is granted.
        let held = reservations(&self.found);
        let ending = self.found.iter().filter(|r| r.phase == Phase::Stopping);
        let ending = ending.map(|r| (r.key.clone(), r.generation)).collect();
        let AgainstDevices { suspicions, charges } = self.remembered.borrow().clone();
        let cases = Casebook::resume(charges);
        let mut book = Book { homes: held.clone(), held, ending, suspicions, cases, ..Book::default() };
        let mut next_port = *self.ports.start();
        let mut look_again = tokio::time::interval(LOOK_AGAIN);
        let (mut inventory_lives, mut incidents_live, mut commanded) = (true, true, true);
        self.wards = self.every_replica();
        while commanded || self.wards.iter().any(|w| w.commands.upgrade().is_some()) {
            let retry = tokio::select! {
                biased;
                () = self.bell.notified() => false,
                changed = self.inventory.changed(), if inventory_lives => { inventory_lives = changed.is_ok(); false }
                told = self.incidents.changed(), if incidents_live => { incidents_live = told.is_ok(); false }
                _ = look_again.tick() => true,
                command = self.commands.recv(), if commanded => {
                    match command {
                        Some(command) => self.carry_out(command, &mut book).await,
                        None => commanded = false,
                    }
                    false
                }
            };
            let inventory = self.inventory.borrow_and_update().clone();
            self.wards = self.every_replica();
            self.free(&mut book);
            self.see_taken(&inventory, &mut book);
            self.see_foreign(&inventory, &mut book);
            self.judge(&mut book);
            self.attend(&inventory, &mut book).await;
            self.tend(&mut book);
            self.see_room(&inventory, &mut book);
            self.unblock(&inventory, &mut book, next_port, retry).await;
            // Devices for whose turn somebody is next.
            let mut spoken_for = BTreeSet::new();
            for i in self.in_order(&book) {
                let Some(want) = self.wards[i].published.borrow().wants.clone() else { continue };
                if book.held.get(&self.wards[i].key).is_some_and(|r| r.generation == want.generation) {
                    continue; // answered; the driver has not published that yet
                }
                let key = self.wards[i].key.clone();
                let answer = self.decide(&key, &want, &inventory, &book, &mut next_port);
                let command = match answer {
                    Ok(grant) if !self.has_turn(&grant.devices, &book, &mut spoken_for) => {
                        // One after the other: what a starting engine takes is not seen before it is there.
                        // It fits; its memory stays its own until the one that loads there is done.
                        book.line.keep(&key, grant.pairs(), self.clock.now());
                        continue;
                    }
                    Ok(grant) => {
                        book.line.leave(&key);
                        let (devices, port) = (grant.devices.clone(), grant.listen.map(|l| l.port()));
                        let held =
                            Reservation { generation: want.generation, devices, bytes: grant.bytes.clone(), port };
                        book.homes.insert(key.clone(), held.clone());
                        book.held.insert(key, held);
                        DriverCommand::Grant(grant)
                    }
                    Err(Denied::Wait(Wait::Vram { detail, .. })) => {
                        let wait = self.room_for(&self.wards[i], &want, &detail, &inventory, &mut book);
                        DriverCommand::Deny(want.generation, Denied::Wait(wait))
                    }
                    Err(denied) => {
                        book.line.leave(&key);
                        DriverCommand::Deny(want.generation, denied)
                    }
                };
                // The driver never waits for the steward, so this cannot deadlock.
                self.wards[i].tell(command).await;
            }
            self.told.send_replace(Ledgered {
                promised: promised(&book.held),
                foreign: book.foreign.clone(),
                held: by_device(&book.held),
                pids: self.wards.iter().flat_map(|w| w.published.borrow().pids.clone()).collect(),
            });
            self.remembered.send_if_modified(|s| {
                let changed = s.suspicions != book.suspicions || s.charges != *book.cases.held();
                if changed {
                    *s = AgainstDevices { suspicions: book.suspicions.clone(), charges: book.cases.held().clone() };
                }
                changed
            });
            let conditions = self.conditions(&inventory, &book);
            self.tell_health(&inventory, &conditions, &mut book.cases);
            self.conditions.send_if_modified(|c| {
                let changed = *c != conditions;
                *c = conditions;
                changed
            });
        }
    }

    async fn carry_out(&self, command: StewardCommand, book: &mut Book) {
        let (device, answer) = match command {
            StewardCommand::Unfence { device, answer } => (device, answer),
            StewardCommand::Ping { answer } => {
                let _ = answer.send(());
                return;
            }
        };
        let named = pool_domain::mask::named(&device, &self.inventory.borrow().devices).map(|d| d.uuid.clone());
        // One that is gone from the bus can be named by its UUID still, while something is held there.
        let uuid = named.or_else(|| book.held.values().any(|r| r.on(&device).is_some()).then(|| device.clone()));
        let result = match uuid {
            Some(uuid) => {
                for (ward, _) in self.fenced(book).filter(|(_, held)| held.on(&uuid).is_some()) {
                    ward.tell(DriverCommand::Unfence).await;
                }
                let on = |held: &Reservation| held.on(&uuid).is_some();
                book.ending.retain(|key, _| !book.held.get(key).is_some_and(on));
                // Whoever says so has looked at the device.
                let (suspected, charged) = (book.suspicions.acquit(&uuid), book.cases.acquit(&uuid));
                if suspected || charged {
                    self.readmit(book, uuid);
                }
                Ok(())
            }
            None => Err(ControlError::DeviceNotFound(device)),
        };
        // Who asked may be gone.
        let _ = answer.send(result);
    }

    fn every_replica(&self) -> Vec<Seat> {
        let table = Arc::clone(&self.table.borrow());
        table.values().flat_map(|pool| pool.roster().seats.clone()).collect()
    }

    /// Replicas of which something may be left, with what they hold.
    fn fenced<'a>(&'a self, book: &'a Book) -> impl Iterator<Item = (&'a Seat, &'a Reservation)> {
        self.wards
            .iter()
            .filter(|ward| {
                let published = ward.published.borrow();
                match &published.state {
                    State::Fenced { .. } => true,
                    State::Adopting { .. } | State::Stopping { .. } => {
                        book.ending.get(&ward.key) == Some(&published.snapshot.generation)
                    }
                    _ => false,
                }
            })
            .filter_map(|ward| Some((ward, book.held.get(&ward.key)?)))
    }

    fn conditions(&self, inventory: &Inventory, book: &Book) -> Conditions {
        let mut found = BTreeMap::new();
        for (ward, held) in self.fenced(book) {
            for uuid in &held.devices.uuids {
                found
                    .entry(uuid.clone())
                    .or_insert_with(|| Condition::of(DeviceHealth::Fenced(left_by(&ward.key.pool))));
            }
        }
        for uuid in self.closed.borrow().iter() {
            let why = || DeviceHealth::Fenced("something of an earlier engine may be left there".into());
            found.entry(uuid.clone()).or_insert_with(|| Condition::of(why()));
        }
        for device in &inventory.devices {
            let Some(standing) = self.standing(device, inventory, book) else { continue };
            let used = book.held.values().any(|held| held.on(&device.uuid).is_some());
            let health = devices::shown(&standing, used);
            let condition = found.entry(device.uuid.clone()).or_insert_with(|| Condition::of(health));
            condition.verdict = standing.verdict;
        }
        for (uuid, why) in book.suspicions.suspects() {
            found.entry(uuid.to_owned()).or_insert(Condition::of(DeviceHealth::Suspect(why)));
        }
        Conditions { devices: found, xids: book.cases.xids() }
    }

    fn standing(&self, device: &DeviceSnapshot, inventory: &Inventory, book: &Book) -> Option<Standing> {
        self.xids.as_ref()?;
        book.cases.standing(device, &inventory.devices)
    }

    /// Hears what failures say of devices, and readmits those whose probation is over.
    fn judge(&self, book: &mut Book) {
        let policy = SuspicionPolicy::default();
        for ward in &self.wards {
            let Some(accused) = ward.published.borrow().accused else { continue };
            if book.heard.insert(ward.key.clone(), accused) == Some(accused) {
                continue;
            }
            // Where it was when it failed; who failed before it had devices accuses none.
            let Some(home) = book.homes.get(&ward.key).filter(|r| r.generation == accused.generation) else { continue };
            for uuid in &home.devices.uuids {
                let by = Accusation { pool: ward.key.pool.clone(), class: accused.class, at: accused.at };
                if book.suspicions.accuse(uuid, by, &policy) {
                    book.accusers.insert(uuid.clone(), (ward.key.clone(), accused.generation));
                    let kind = EventKind::DeviceSuspected { device: uuid.clone() };
                    self.events.send(&ward.key, accused.generation, kind);
                }
            }
        }
        for uuid in book.suspicions.readmit(self.clock.now(), &policy) {
            self.readmit(book, uuid);
        }
    }

    pub(crate) fn readmit(&self, book: &mut Book, uuid: String) {
        let accused_for = book.accusers.remove(&uuid);
        let kind = EventKind::DeviceReadmitted { device: uuid };
        match accused_for {
            Some((key, generation)) => self.events.send(&key, generation, kind),
            None => self.events.send_of_node(kind),
        }
    }

    /// Takes back what nobody holds any more.
    fn free(&self, book: &mut Book) {
        // A replica leaves its roster only when nothing of it is left.
        let here: BTreeSet<&ReplicaKey> = self.wards.iter().map(|w| &w.key).collect();
        book.held.retain(|key, _| here.contains(key));
        book.homes.retain(|key, _| here.contains(key));
        for ward in &self.wards {
            let published = ward.published.borrow();
            if let Some(r) = book.held.get(&ward.key) {
                let newer = published.snapshot.generation > r.generation;
                if newer || (published.snapshot.generation == r.generation && !published.state.holds_reservation()) {
                    book.held.remove(&ward.key);
                }
            }
        }
    }

    /// Wakes those that wait, if what they wait for is there now; who waits for something else is woken at a `retry`.
    async fn unblock(&self, inventory: &Inventory, book: &mut Book, next_port: u16, retry: bool) {
        for i in self.in_order(book) {
            let ward = &self.wards[i];
            let published = ward.published.borrow().clone();
            let State::Waiting { why: why @ (Wait::Devices { .. } | Wait::Vram { .. }), .. } = &published.state else {
                continue;
            };
            let Some(want) = &published.blocked else {
                if retry {
                    ward.tell(DriverCommand::Unblock).await;
                }
                continue;
            };
            let wait = match self.decide(&ward.key, want, inventory, book, &mut { next_port }) {
                Ok(grant) => {
                    // Until it has taken it, nobody else gets it.
                    book.line.keep(&ward.key, grant.pairs(), self.clock.now());
                    ward.tell(DriverCommand::Unblock).await;
                    continue;
                }
                Err(Denied::Never(_)) => {
                    ward.tell(DriverCommand::Unblock).await;
                    continue;
                }
                Err(Denied::Wait(Wait::Vram { detail, .. })) => self.room_for(ward, want, &detail, inventory, book),
                Err(Denied::Wait(other)) => other,
            };
            if wait != *why {
                ward.tell(DriverCommand::Waits(want.generation, wait)).await;
            }
        }
    }

    /// An engine that takes more than it was promised holds that much: nobody else is promised it as long as it lives.
    fn see_taken(&self, inventory: &Inventory, book: &mut Book) {
        for ward in &self.wards {
            let published = ward.published.borrow();
            let Some(held) = book.held.get_mut(&ward.key).filter(|r| r.generation == published.snapshot.generation)
            else {
                continue;
            };
            for (uuid, bytes) in held.devices.uuids.iter().zip(&mut held.bytes) {
                let device = inventory.devices.iter().find(|d| d.uuid == *uuid);
                *bytes = (*bytes).max(device.and_then(|d| published.takes(d)).unwrap_or(0));
            }
        }
    }

    /// Where the driver does not tell who uses what, others use what is used beyond ours. That is known only while none of
    /// ours comes or goes there: a promise that is not used yet would hide as much of theirs. Then the last figure stands.
    fn see_foreign(&self, inventory: &Inventory, book: &mut Book) {
        for device in &inventory.devices {
            let (mut ours, mut quiet) = (0u64, true);
            for ward in &self.wards {
                let Some(promised) = book.held.get(&ward.key).and_then(|held| held.on(&device.uuid)) else { continue };
                let published = ward.published.borrow();
                quiet &=
                    matches!(published.state, State::Ready { .. } | State::Suspect { .. } | State::Draining { .. });
                ours = ours.saturating_add(published.takes(device).unwrap_or(promised));
            }
            if quiet {
                book.foreign.insert(device.uuid.clone(), device.vram_used.saturating_sub(ours));
            }
        }
        book.foreign.retain(|uuid, _| inventory.devices.iter().any(|d| d.uuid == *uuid));
    }

    /// The devices as this replica may use them. One on which something of another engine may be left admits no newcomer;
    /// who was there before may come back within what it had.
    pub(crate) fn devices_for(
        &self,
        key: &ReplicaKey,
        inventory: &Inventory,
        book: &Book,
        promised: &Promised,
    ) -> Vec<DeviceSnapshot> {
        let mut fenced: BTreeMap<&str, &Seat> = BTreeMap::new();
        for (ward, held) in self.fenced(book).filter(|(ward, _)| ward.key != *key) {
            fenced.extend(held.devices.uuids.iter().map(|uuid| (uuid.as_str(), ward)));
        }
        let home = book.homes.get(key);
        let mut devices = inventory.devices.clone();
        for device in &mut devices {
            device.vram_foreign = device.vram_foreign.max(book.foreign.get(&device.uuid).copied().unwrap_or(0));
            if let Some(standing) = self.standing(device, inventory, book).filter(|_| device.health.admits()) {
                device.health = devices::shown(&standing, false);
            }
        }
        for (uuid, why) in book.suspicions.suspects() {
            for device in devices.iter_mut().filter(|d| d.uuid == uuid && d.health.admits()) {
                device.health = DeviceHealth::Suspect(why.clone());
            }
        }
        let closed = self.closed.borrow();
        for device in devices.iter_mut().filter(|d| d.health.admits() && closed.contains(&d.uuid)) {
            if home.and_then(|home| home.on(&device.uuid)).is_none() {
                device.health = DeviceHealth::Fenced("something of an earlier engine may be left there".into());
            }
        }
        for device in devices.iter_mut().filter(|d| d.health.admits()) {
            let Some(by) = fenced.get(device.uuid.as_str()) else { continue };
            match home.and_then(|home| home.on(&device.uuid)) {
                Some(had) => {
                    let ours = promised.get(&device.uuid).copied().unwrap_or(0).saturating_add(had);
                    let rest = device.vram_total.saturating_sub(device.vram_reserved).saturating_sub(ours);
                    device.vram_foreign = device.vram_foreign.max(rest);
                }
                None => {
                    device.health = DeviceHealth::Fenced(left_by(&by.key.pool));
                }
            }
        }
        devices
    }

    fn decide(
        &self,
        key: &ReplicaKey,
        want: &Want,
        inventory: &Inventory,
        book: &Book,
        next_port: &mut u16,
    ) -> Result<Grant, Denied> {
        let generation = want.generation;
        if want.external {
            let devices = ResolvedMask::default();
            return Ok(Grant {
                generation,
                devices,
                listen: None,
                bytes: Vec::new(),
                room: None,
                tensor_split: None,
                context: None,
            });
        }
        if inventory.devices.is_empty() {
            let detail = inventory.problem.clone().unwrap_or_else(|| "the node has no GPU".into());
            return Err(Denied::Wait(Wait::Devices { detail }));
        }
        let promised = promised_but_to(key, book);
        let usable = self.devices_for(key, inventory, book, &promised);
        let promised = |u: &str| promised.get(u).copied().unwrap_or(0);
        let demand = shortage::as_seen(key, want, &book.lowest);
        let at_home = || {
            let home = want.home.as_ref()?;
            let own: Vec<_> = usable.iter().filter(|d| home.uuids.contains(&d.uuid)).cloned().collect();
            fit(&demand, &want.mask, &own, &promised).ok()
        };
        let fit = at_home()
            .or_else(|| self.beside_its_siblings(key, want, &demand, &usable, &promised, book))
            .map_or_else(|| fit(&demand, &want.mask, &usable, &promised), Ok);
        let fit = fit.map_err(|r| match r {
            // It may yet come: at boot drivers and slices are not all there at once.
            Refusal::Mask(e @ MaskError::Absent { .. }) => Denied::Wait(Wait::Devices { detail: e.to_string() }),
            Refusal::Mask(e) => Denied::Never(Failure::new(FailureClass::Config, e.to_string())),
            Refusal::NeverFits(detail) => Denied::Never(Failure::new(FailureClass::Config, detail)),
            Refusal::Devices(detail) => Denied::Wait(Wait::Devices { detail }),
            Refusal::Vram(why) => {
                let detail = shortage::told(why, &demand, &want.mask, &usable, &promised);
                Denied::Wait(Wait::Vram { detail, possible_at: None })
            }
        })?;
        let taken: Vec<u16> = book.held.values().filter_map(|r| r.port).collect();
        let count = u32::from(*self.ports.end() - *self.ports.start()) + 1;
        for _ in 0..count {
            let port = *next_port;
            *next_port = if port >= *self.ports.end() { *self.ports.start() } else { port + 1 };
            let addr = SocketAddr::new(self.listen, port);
            if !taken.contains(&port) && self.host.port_free(addr) {
                return Ok(Grant {
                    generation,
                    bytes: fit.bytes(),
                    room: Some(fit.room()),
                    devices: fit.devices,
                    listen: Some(addr),
                    tensor_split: fit.tensor_split,
                    context: fit.context,
                });
            }
        }
        let detail = format!("every port of engine_ports {}-{} is taken", self.ports.start(), self.ports.end());
        Err(Denied::Wait(Wait::Devices { detail }))
    }
}

/// What engines hold that were found.
fn reservations(found: &[EngineRecord]) -> BTreeMap<ReplicaKey, Reservation> {
    let reservation = |r: &EngineRecord| Reservation {
        generation: r.generation,
        devices: r.devices.clone(),
        bytes: r.bytes.clone(),
        port: Some(r.endpoint.addr.port()),
    };
    found.iter().map(|r| (r.key.clone(), reservation(r))).collect()
}

/// What is held before the steward runs.
pub(crate) fn told_of(found: &[EngineRecord]) -> Ledgered {
    let held = reservations(found);
    Ledgered { promised: promised(&held), held: by_device(&held), ..Ledgered::default() }
}

fn by_device(held: &BTreeMap<ReplicaKey, Reservation>) -> BTreeMap<ReplicaKey, Vec<(String, u64)>> {
    held.iter().map(|(key, r)| (key.clone(), r.pairs())).collect()
}

/// What others have, or what is kept for them.
pub(crate) fn promised_but_to(key: &ReplicaKey, book: &Book) -> Promised {
    let mut sum = promised(&book.held);
    book.line.add_kept_for_others(key, &mut sum);
    sum
}

fn promised(book: &BTreeMap<ReplicaKey, Reservation>) -> Promised {
    let mut sum = Promised::new();
    for r in book.values() {
        for (uuid, bytes) in r.devices.uuids.iter().zip(&r.bytes) {
            *sum.entry(uuid.clone()).or_default() += bytes;
        }
    }
    sum
}
