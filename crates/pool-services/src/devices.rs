//! What the steward does about devices of which the driver says something. What follows, `pool_domain::charges` decides; here
//! it is heard, commanded and told.

use std::collections::BTreeMap;

use pool_domain::charges::{Charge, ChargePolicy, Charges, Fate, Said, Standing};
use pool_domain::echo::Echoes;
use pool_domain::lifecycle::State;
use pool_domain::xid::{self, XidAction};
use pool_domain::{DeviceHealth, DeviceSnapshot, Failure, FailureClass, Generation, ReplicaKey, Verdict};

use crate::conditions::{Conditions, stands};
use crate::driver::DriverCommand;
use crate::events::EventKind;
use crate::ports::{Incident, Inventory, Reach};
use crate::roster::Seat;
use crate::snapshot::XidCount;
use crate::steward::{Book, Steward};

/// What is held against devices, and what was done about it.
#[derive(Debug, Default)]
pub(crate) struct Casebook {
    charges: Charges,
    echoes: Echoes,
    /// Incidents that were heard.
    heard: u64,
    /// XIDs by device and number.
    xids: BTreeMap<(String, u64), u64>,
    /// What each replica was told last.
    told: BTreeMap<ReplicaKey, (Generation, Fate)>,
    /// How each device stood when that was told last, if it was not well.
    unwell: BTreeMap<String, (&'static str, Verdict)>,
}

impl Casebook {
    /// With what was held against devices when the daemon before this one ended.
    pub(crate) fn resume(charges: BTreeMap<String, Charge>) -> Self {
        Self { charges: Charges::resume(charges), ..Self::default() }
    }

    /// What the driver said once, by UUID.
    pub(crate) fn held(&self) -> &BTreeMap<String, Charge> {
        self.charges.held()
    }

    /// How often each XID was reported.
    pub(crate) fn xids(&self) -> Vec<XidCount> {
        let count = |((device, xid), count): (&(String, u64), &u64)| XidCount {
            device: device.clone(),
            xid: *xid,
            count: *count,
        };
        self.xids.iter().map(count).collect()
    }

    /// A person says that it is well. Says whether anything was held against it.
    pub(crate) fn acquit(&mut self, device: &str) -> bool {
        self.charges.acquit(device)
    }

    /// How a device stands; a slice no better than its GPU.
    pub(crate) fn standing(&self, device: &DeviceSnapshot, devices: &[DeviceSnapshot]) -> Option<Standing> {
        let gpu = device.mig.as_ref().and_then(|m| devices.iter().find(|d| d.uuid == m.parent));
        let of_both = [Some(device), gpu].into_iter().flatten().filter_map(|d| self.charges.standing(d));
        of_both.max_by_key(|s| (s.fate, s.verdict))
    }
}

/// The same as a state of the device. `used`: an engine of ours is still there.
pub(crate) fn shown(standing: &Standing, used: bool) -> DeviceHealth {
    let why = standing.why.clone();
    match (standing.fate, used) {
        (Fate::Stay, _) => DeviceHealth::Suspect(why),
        (Fate::Drain, true) => DeviceHealth::Draining(why),
        (Fate::Drain, false) => DeviceHealth::Fenced(why),
        (Fate::End, _) => DeviceHealth::Lost(why),
    }
}

/// Whether an engine is there, or is about to be.
fn runs(seat: &Seat) -> bool {
    matches!(
        seat.published.borrow().state,
        State::Starting { .. }
            | State::Warming { .. }
            | State::Ready { .. }
            | State::Suspect { .. }
            | State::Draining { .. }
            | State::Adopting { .. }
    )
}

/// Whether an engine was there before this moment, and serves.
fn serves(seat: &Seat) -> bool {
    runs(seat) && !matches!(seat.published.borrow().state, State::Starting { .. } | State::Warming { .. })
}

impl Steward {
    /// Hears what the driver said, sees what it says now, and has the engines that are concerned ended.
    pub(crate) async fn attend(&mut self, inventory: &Inventory, book: &mut Book) {
        let policy = ChargePolicy::default();
        let now = self.clock.now();
        let (new, heard) = self.incidents.borrow_and_update().after(book.cases.heard);
        book.cases.heard = heard;
        for incident in new {
            self.hear(&incident, inventory, book, &policy).await;
        }
        // While nobody can say which devices there are, none has been away.
        let can_say = inventory.problem.is_none() || !inventory.devices.is_empty();
        if let Some(table) = self.xids.as_ref().filter(|_| can_say) {
            for uuid in book.cases.charges.see(&inventory.devices, table, now, &policy) {
                self.readmit(book, uuid);
            }
        }
        for at in 0..self.wards.len() {
            self.see_to(at, inventory, book, &policy).await;
        }
        let here: Vec<&ReplicaKey> = self.wards.iter().map(|w| &w.key).collect();
        book.cases.told.retain(|key, _| here.contains(&key));
    }

    /// Tells of the devices that are otherwise than they were.
    pub(crate) fn tell_health(&self, inventory: &Inventory, conditions: &Conditions, cases: &mut Casebook) {
        for device in &inventory.devices {
            let (health, verdict) = stands(device, conditions);
            let now = (*health != DeviceHealth::Ok || verdict != Verdict::None).then(|| (health.code(), verdict));
            if cases.unwell.get(&device.uuid).copied() == now {
                continue;
            }
            match now {
                Some(now) => cases.unwell.insert(device.uuid.clone(), now),
                None => cases.unwell.remove(&device.uuid),
            };
            self.events.send_of_node(EventKind::DeviceHealthChanged {
                device: device.uuid.clone(),
                health: health.code(),
                reason: health.reason().to_owned(),
                verdict,
            });
        }
        // A slice that was taken apart, and what stood for a GPU that says by now who it is.
        cases.unwell.retain(|uuid, _| inventory.devices.iter().any(|d| d.uuid == *uuid));
    }

    async fn hear(&self, incident: &Incident, inventory: &Inventory, book: &mut Book, policy: &ChargePolicy) {
        let Incident { device, reach, said, pid, source } = incident;
        let xid = said.number();
        // One of them may know of which slice it is.
        let slice = inventory.devices.iter().find(|d| d.uuid == *device).and_then(|d| d.mig.as_ref());
        let gpu = slice.map_or(device, |m| &m.parent);
        if !book.cases.echoes.is_news(gpu, xid, *source, self.clock.now()) {
            return;
        }
        if let Said::Xid(number) = said {
            *book.cases.xids.entry((device.clone(), *number)).or_default() += 1;
        }
        let Some(table) = &self.xids else {
            tracing::warn!(device, xid, "the driver reports an error, and nothing is done about errors");
            return;
        };
        let action = match (book.cases.charges.hear(device, *said, table, self.clock.now(), policy), reach) {
            // Whose engine it was nobody can say: the others' did nothing.
            (XidAction::RestartEngine, Reach::UnknownSlice) => XidAction::Ignore,
            (action, _) => action,
        };
        let verdict = xid::verdict(xid, action);
        tracing::warn!(
            device,
            xid,
            action = action.code(),
            verdict = verdict.code(),
            pid,
            "the driver reports an error"
        );
        let concerned: Vec<(Seat, Generation)> = self.on(device, inventory, book);
        let kind = EventKind::DeviceIncident { device: device.clone(), xid, action, verdict };
        if concerned.is_empty() {
            self.events.send_of_node(kind.clone());
        }
        for (seat, generation) in &concerned {
            self.events.send(&seat.key, *generation, kind.clone());
            book.accuse_for(device, &seat.key, *generation);
        }
        if action == XidAction::RestartEngine {
            let detail = format!("the driver reported XID {xid} ({})", xid::meaning(xid));
            // One that has proved nothing yet may be the next already, after one that ended because of the error.
            for (seat, generation) in concerned.into_iter().filter(|(seat, _)| serves(seat)) {
                let failure = Failure::new(FailureClass::DriverError, detail.clone());
                seat.tell(DriverCommand::Condemn(generation, failure)).await;
            }
        }
    }

    /// The replicas that hold something of a device, or of a slice of it.
    fn on(&self, device: &str, inventory: &Inventory, book: &Book) -> Vec<(Seat, Generation)> {
        let of_it = |uuid: &String| {
            let slice = || inventory.devices.iter().find(|d| d.uuid == *uuid).and_then(|d| d.mig.as_ref());
            uuid == device || slice().is_some_and(|m| m.parent == device)
        };
        let holds = |seat: &&Seat| book.held.get(&seat.key).is_some_and(|held| held.devices.uuids.iter().any(of_it));
        let generation = |seat: &Seat| seat.published.borrow().snapshot.generation;
        self.wards.iter().filter(holds).map(|seat| (seat.clone(), generation(seat))).collect()
    }

    /// Has an engine ended whose devices are to be left, or are gone.
    async fn see_to(&self, at: usize, inventory: &Inventory, book: &mut Book, policy: &ChargePolicy) {
        let seat = &self.wards[at];
        let Some(held) = book.held.get(&seat.key) else { return };
        let (generation, uuids) = (held.generation, held.devices.uuids.clone());
        let worst = uuids.iter().filter_map(|uuid| self.fate(uuid, inventory, book, policy)).max_by_key(|s| s.fate);
        let Some(standing) = worst.filter(|s| s.fate != Fate::Stay && runs(seat)) else { return };
        if seat.published.borrow().snapshot.generation != generation {
            return;
        }
        let told = book.cases.told.get(&seat.key);
        if told.is_some_and(|(to, fate)| *to == generation && *fate >= standing.fate) {
            return;
        }
        book.cases.told.insert(seat.key.clone(), (generation, standing.fate));
        let command = match standing.fate {
            Fate::End => DriverCommand::Condemn(generation, Failure::new(FailureClass::GpuLost, standing.why)),
            Fate::Stay | Fate::Drain => DriverCommand::Evacuate(generation),
        };
        seat.tell(command).await;
    }

    fn fate(&self, uuid: &str, inventory: &Inventory, book: &mut Book, policy: &ChargePolicy) -> Option<Standing> {
        let now = self.clock.now();
        let end = |why: String| Standing { fate: Fate::End, why, verdict: Verdict::None };
        let device = inventory.devices.iter().find(|d| d.uuid == uuid);
        // While nobody can say which devices there are, none is missed.
        let can_say = inventory.problem.is_none() && !inventory.devices.is_empty();
        let there = device.map_or(!can_say, |d| !matches!(d.health, DeviceHealth::Lost(_)));
        if book.cases.charges.gone(uuid, there, now, policy) {
            return Some(end(match device {
                Some(lost) => format!("its GPU is lost: {}", lost.health.reason()),
                None => "its device is not there any more".to_owned(),
            }));
        }
        self.xids.as_ref()?;
        book.cases.standing(device?, &inventory.devices)
    }
}
