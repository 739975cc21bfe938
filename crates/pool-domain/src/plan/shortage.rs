//! A start that ran out of memory: where it is tried again, and what would fit instead.

use super::{Demand, Fit, Remedy, fit, fit_now};
use crate::device::DeviceSnapshot;
use crate::estimate::WORTH_A_TRY;
use crate::mask::DeviceMask;
use crate::reserve::{Refusal, gib, usable};

/// The fit, where more is free than was too little.
pub(super) fn unless_it_ran_out(demand: &Demand, fit: Fit) -> Result<Fit, Refusal> {
    match demand.ran_out() {
        Some(learnt) if !learnt.may_try(fit.room()) => Err(Refusal::Vram(format!(
            "its engine ran out of GPU memory where {} were free to it, and {} are now",
            gib(learnt.short),
            gib(fit.room())
        ))),
        _ => Ok(fit),
    }
}

/// Bytes beyond what is promised that such an engine is known to need, on all its devices together.
pub(super) fn lack(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> u64 {
    let Some(learnt) = demand.ran_out() else { return 0 };
    // What was learnt by running out is a part of what is lacking.
    let estimated = Demand { learnt: None, ..demand.clone() };
    let asked = fit_now(&estimated, mask, devices, promised).map_or(0, |fit| fit.bytes().iter().sum());
    learnt.short.saturating_add(WORTH_A_TRY).saturating_sub(asked)
}

/// Whether it leaves so much free.
pub(super) fn spares(fit: &Fit, bytes: u64) -> bool {
    fit.room().saturating_sub(fit.bytes().iter().sum()) >= bytes
}

/// What would help one that ran out, besides other settings whose memory is known.
pub(super) fn remedies(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Vec<Remedy> {
    let Some(learnt) = demand.ran_out() else { return Vec::new() };
    let Ok(now) = fit_now(demand, mask, devices, promised) else { return Vec::new() };
    if learnt.may_try(now.room()) {
        return Vec::new();
    }
    let mut found = Vec::new();
    if let [row] = now.rows.as_slice() {
        let elsewhere = fit(demand, &DeviceMask::Auto, devices, promised).ok();
        let other = elsewhere.and_then(|fit| fit.rows.first().map(|r| r.index)).filter(|index| *index != row.index);
        found.extend(other.map(|index| Remedy::Elsewhere { index }));
        let needed = learnt.short.saturating_add(WORTH_A_TRY);
        let whole = devices.iter().find(|d| d.uuid == row.uuid).map_or(0, usable);
        found.push(if needed > whole {
            Remedy::Larger { bytes: learnt.short }
        } else {
            Remedy::Free { bytes: needed - row.room, index: row.index }
        });
    }
    if demand.vram.is_some() || demand.profile.is_none() {
        found.push(Remedy::Less);
    }
    found
}
