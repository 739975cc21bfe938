//! The steward of the node: the only writer of what pools share, reservations and ports. Replicas publish what they
//! want; it answers each with a grant, a whole mask or nothing, or with a denial that says why.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lifecycle::{State, Wait};
use pool_domain::plan::fit;
use pool_domain::reserve::Refusal;
use pool_domain::{DeviceHealth, DeviceSnapshot, Failure, FailureClass, Generation, ReplicaKey, ResolvedMask};
use tokio::sync::{Notify, mpsc, watch};

use crate::driver::{Denied, DriverCommand, Grant, Published, Want};
use crate::ports::{EngineHost, Inventory};

/// Waiting replicas are looked at again after this long even if nothing was heard: ports and disks recover silently.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What one replica holds.
#[derive(Debug, Clone, PartialEq)]
struct Reservation {
    generation: Generation,
    devices: ResolvedMask,
    /// On each of them.
    bytes: Vec<u64>,
    port: Option<u16>,
}

impl Reservation {
    fn on(&self, uuid: &str) -> Option<u64> {
        self.devices.uuids.iter().position(|u| u == uuid).and_then(|at| self.bytes.get(at).copied())
    }
}

/// One replica as the steward sees it.
pub(crate) struct Ward {
    pub(crate) key: ReplicaKey,
    pub(crate) published: watch::Receiver<Published>,
    pub(crate) commands: mpsc::WeakSender<DriverCommand>,
}

impl Ward {
    async fn tell(&self, command: DriverCommand) {
        if let Some(commands) = self.commands.upgrade() {
            let _ = commands.send(command).await;
        }
    }
}

/// What replicas hold, and where each was last.
#[derive(Debug, Default)]
struct Book {
    held: BTreeMap<ReplicaKey, Reservation>,
    homes: BTreeMap<ReplicaKey, Reservation>,
}

/// Bytes promised by us on each device, by UUID.
pub(crate) type Promised = BTreeMap<String, u64>;

pub(crate) struct Steward {
    pub(crate) wards: Vec<Ward>,
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) host: Arc<dyn EngineHost>,
    pub(crate) listen: IpAddr,
    pub(crate) ports: RangeInclusive<u16>,
    pub(crate) bell: Arc<Notify>,
    pub(crate) promised: watch::Sender<Promised>,
}

impl Steward {
    /// Runs until every driver is gone.
    pub(crate) async fn run(mut self) {
        let mut book = Book::default();
        let mut next_port = *self.ports.start();
        let mut look_again = tokio::time::interval(LOOK_AGAIN);
        let mut inventory_lives = true;
        while self.wards.is_empty() || self.wards.iter().any(|w| w.commands.upgrade().is_some()) {
            let retry = tokio::select! {
                biased;
                () = self.bell.notified() => false,
                changed = self.inventory.changed(), if inventory_lives => { inventory_lives = changed.is_ok(); false }
                _ = look_again.tick() => true,
            };
            let inventory = self.inventory.borrow_and_update().clone();
            self.free(&mut book);
            self.unblock(&inventory, &book, next_port, retry).await;
            for i in 0..self.wards.len() {
                let Some(want) = self.wards[i].published.borrow().wants.clone() else { continue };
                if book.held.get(&self.wards[i].key).is_some_and(|r| r.generation == want.generation) {
                    continue; // answered; the driver has not published that yet
                }
                let key = self.wards[i].key.clone();
                let answer = self.decide(&key, &want, &inventory, &book, &mut next_port);
                let command = match answer {
                    Ok(grant) => {
                        let (devices, port) = (grant.devices.clone(), grant.listen.map(|l| l.port()));
                        let held =
                            Reservation { generation: want.generation, devices, bytes: grant.bytes.clone(), port };
                        book.homes.insert(key.clone(), held.clone());
                        book.held.insert(key, held);
                        DriverCommand::Grant(grant)
                    }
                    Err(denied) => DriverCommand::Deny(want.generation, denied),
                };
                // The driver never waits for the steward, so this cannot deadlock.
                self.wards[i].tell(command).await;
            }
            self.promised.send_replace(promised(&book.held));
        }
    }

    /// Takes back what nobody holds any more.
    fn free(&self, book: &mut Book) {
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
    async fn unblock(&self, inventory: &Inventory, book: &Book, next_port: u16, retry: bool) {
        for ward in &self.wards {
            let published = ward.published.borrow().clone();
            if !matches!(published.state, State::Waiting { why: Wait::Devices { .. } | Wait::Vram { .. }, .. }) {
                continue;
            }
            let wake = match &published.blocked {
                Some(want) => {
                    let answer = self.decide(&ward.key, want, inventory, book, &mut { next_port });
                    !matches!(answer, Err(Denied::Wait(_)))
                }
                None => retry,
            };
            if wake {
                ward.tell(DriverCommand::Unblock).await;
            }
        }
    }

    /// The devices as this replica may use them. One on which something of another engine may be left admits no newcomer;
    /// who was there before may come back within what it had.
    fn devices_for(
        &self,
        key: &ReplicaKey,
        inventory: &Inventory,
        book: &Book,
        promised: &Promised,
    ) -> Vec<DeviceSnapshot> {
        let fenced: Vec<&String> = self
            .wards
            .iter()
            .filter(|ward| ward.key != *key && matches!(ward.published.borrow().state, State::Fenced { .. }))
            .filter_map(|ward| book.held.get(&ward.key))
            .flat_map(|held| &held.devices.uuids)
            .collect();
        let home = book.homes.get(key);
        let mut devices = inventory.devices.clone();
        for device in devices.iter_mut().filter(|d| d.health.admits() && fenced.contains(&&d.uuid)) {
            match home.and_then(|home| home.on(&device.uuid)) {
                Some(had) => {
                    let ours = promised.get(&device.uuid).copied().unwrap_or(0).saturating_add(had);
                    let rest = device.vram_total.saturating_sub(device.vram_reserved).saturating_sub(ours);
                    device.vram_foreign = device.vram_foreign.max(rest);
                }
                None => {
                    device.health = DeviceHealth::Fenced("something of another engine may be left there".into());
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
                tensor_split: None,
                context: None,
            });
        }
        if inventory.devices.is_empty() {
            let detail = inventory.problem.clone().unwrap_or_else(|| "the node has no GPU".into());
            return Err(Denied::Wait(Wait::Devices { detail }));
        }
        let promised = promised(&book.held);
        let usable = self.devices_for(key, inventory, book, &promised);
        let fit =
            fit(&want.demand, &want.mask, &usable, &|u| promised.get(u).copied().unwrap_or(0)).map_err(
                |r| match r {
                    Refusal::Mask(e) => Denied::Never(Failure::new(FailureClass::Config, e.to_string())),
                    Refusal::NeverFits(detail) => Denied::Never(Failure::new(FailureClass::Config, detail)),
                    Refusal::Devices(detail) => Denied::Wait(Wait::Devices { detail }),
                    Refusal::Vram(detail) => Denied::Wait(Wait::Vram { detail }),
                },
            )?;
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

fn promised(book: &BTreeMap<ReplicaKey, Reservation>) -> Promised {
    let mut sum = Promised::new();
    for r in book.values() {
        for (uuid, bytes) in r.devices.uuids.iter().zip(&r.bytes) {
            *sum.entry(uuid.clone()).or_default() += bytes;
        }
    }
    sum
}
