//! Starts that ran out of memory, as the steward sees them: whether more is free than was, and what would fit instead.

use std::borrow::Cow;
use std::collections::BTreeMap;

use pool_domain::lifecycle::State;
use pool_domain::plan::{Demand, fit, remedies};
use pool_domain::{DeviceMask, DeviceSnapshot, ReplicaKey};

use crate::driver::Want;
use crate::ports::Inventory;
use crate::steward::{Book, Steward, promised_but_to};

impl Steward {
    /// Notes the least that was free to each start that ran out of memory and waits: what is more than that came free since.
    pub(crate) fn see_room(&self, inventory: &Inventory, book: &mut Book) {
        let mut lowest = BTreeMap::new();
        for ward in &self.wards {
            let published = ward.published.borrow();
            let blocked = || published.blocked.as_ref().filter(|_| matches!(published.state, State::Waiting { .. }));
            let before = book.lowest.get(&ward.key).copied();
            let Some(want) = published.wants.as_ref().or_else(blocked) else {
                // It was told that it may try, and has not asked yet.
                let asks = matches!(published.state, State::Staging { .. } | State::Preparing { .. });
                lowest.extend(before.filter(|_| asks).map(|before| (ward.key.clone(), before)));
                continue;
            };
            let Some(learnt) = want.demand.ran_out() else { continue };
            let promised = promised_but_to(&ward.key, book);
            let usable = self.devices_for(&ward.key, inventory, book, &promised);
            let promised = |uuid: &str| promised.get(uuid).copied().unwrap_or(0);
            let anywhere = Demand { learnt: Some(learnt.since(0)), ..(*want.demand).clone() };
            let room = fit(&anywhere, &want.mask, &usable, &promised).map_or(0, |fit| fit.room());
            lowest.insert(ward.key.clone(), room.min(before.unwrap_or(u64::MAX)));
        }
        book.lowest = lowest;
    }
}

/// What a start needs, with that.
pub(crate) fn as_seen<'a>(key: &ReplicaKey, want: &'a Want, lowest: &BTreeMap<ReplicaKey, u64>) -> Cow<'a, Demand> {
    match (want.demand.ran_out(), lowest.get(key)) {
        (Some(learnt), Some(lowest)) if *lowest < learnt.short => {
            Cow::Owned(Demand { learnt: Some(learnt.since(*lowest)), ..(*want.demand).clone() })
        }
        _ => Cow::Borrowed(&want.demand),
    }
}

/// Why it waits, with what would fit instead.
pub(crate) fn told(
    why: String,
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> String {
    if demand.ran_out().is_none() {
        return why;
    }
    let helps = remedies(demand, mask, devices, promised);
    std::iter::once(why).chain(helps.iter().map(ToString::to_string)).collect::<Vec<_>>().join("; ")
}
