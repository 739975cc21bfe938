//! Which devices a start gets, and whether their memory suffices.

use crate::device::DeviceSnapshot;
use crate::mask::{DeviceMask, MaskError, ResolvedMask};

/// Why nothing can be reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The mask cannot work on this node.
    Mask(MaskError),
    /// No usable device now.
    Devices(String),
    /// Not enough memory now.
    Vram(String),
    /// Larger than the device: waiting is pointless.
    NeverFits(String),
}

/// Bytes that can still be promised on a device: total − driver reserve − promised by us − foreign, where foreign is
/// at least what is used beyond our promises.
#[must_use]
pub fn available(device: &DeviceSnapshot, promised: u64) -> u64 {
    let foreign = device.vram_foreign.max(device.vram_used.saturating_sub(promised));
    device.vram_total.saturating_sub(device.vram_reserved).saturating_sub(promised).saturating_sub(foreign)
}

/// Chooses devices for a start that needs `bytes` on each: the mask whole or not at all; `auto` takes the one device
/// with the most memory left.
///
/// # Errors
/// Says whether waiting may help.
pub fn place(
    mask: &DeviceMask,
    bytes: u64,
    devices: &[DeviceSnapshot],
    promised: impl Fn(&str) -> u64,
) -> Result<ResolvedMask, Refusal> {
    let resolved = mask.validate_against_discovered(devices).map_err(Refusal::Mask)?;
    let mut candidates: Vec<&DeviceSnapshot> =
        resolved.uuids.iter().filter_map(|u| devices.iter().find(|d| d.uuid == *u)).collect();
    if candidates.is_empty() {
        return Err(Refusal::Devices("the node has no usable GPU".into()));
    }
    if *mask == DeviceMask::Auto {
        // A GPU that is too small is no answer, however much of it is free now.
        candidates.retain(|d| d.vram_total.saturating_sub(d.vram_reserved) >= bytes);
        if candidates.is_empty() {
            return Err(Refusal::NeverFits(format!("no GPU of this node is as large as {}", gib(bytes))));
        }
        let best = candidates
            .iter()
            .filter(|d| d.health.admits())
            .max_by_key(|d| (available(d, promised(&d.uuid)), std::cmp::Reverse(d.index)))
            .ok_or_else(|| Refusal::Devices("no GPU of this node is well".into()))?;
        candidates = vec![best];
    }
    for d in &candidates {
        if !d.health.admits() {
            return Err(Refusal::Devices(format!("GPU {} is {}", d.index, d.health)));
        }
        if d.vram_total.saturating_sub(d.vram_reserved) < bytes {
            return Err(Refusal::NeverFits(format!("{} is more than GPU {} has", gib(bytes), d.index)));
        }
        let left = available(d, promised(&d.uuid));
        if left < bytes {
            return Err(Refusal::Vram(format!("GPU {} has {} left of the {} needed", d.index, gib(left), gib(bytes))));
        }
    }
    Ok(ResolvedMask { uuids: candidates.iter().map(|d| d.uuid.clone()).collect() })
}

#[allow(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::DeviceHealth;

    fn gpu(index: u32, total: u64, used: u64) -> DeviceSnapshot {
        DeviceSnapshot {
            uuid: format!("GPU-51000000-0000-4000-8000-00000000000{index}"),
            index,
            name: "test".into(),
            pci_bus_id: None,
            compute_capability: None,
            numa_node: None,
            vram_total: total,
            vram_free: total - used,
            vram_used: used,
            vram_reserved: 0,
            vram_foreign: 0,
            utilisation: None,
            health: DeviceHealth::Ok,
            mig: None,
            mig_parent: false,
        }
    }

    #[test]
    fn auto_takes_the_roomiest_and_says_when_nothing_ever_fits() {
        let devices = [gpu(0, 100, 50), gpu(1, 80, 0)];
        let uuids = |r: Result<ResolvedMask, Refusal>| r.map(|m| m.uuids);
        assert_eq!(uuids(place(&DeviceMask::Auto, 60, &devices, |_| 0)), Ok(vec![devices[1].uuid.clone()]));
        assert!(matches!(place(&DeviceMask::Auto, 101, &devices, |_| 0), Err(Refusal::NeverFits(_))));
        // The one that is free is too small: waiting for the other helps.
        assert!(matches!(
            place(&DeviceMask::Auto, 90, &[gpu(0, 100, 50), gpu(1, 80, 0)], |_| 0),
            Err(Refusal::Vram(_))
        ));
        let sick = [DeviceSnapshot { health: DeviceHealth::Fenced("test".into()), ..gpu(0, 100, 0) }];
        assert!(matches!(place(&DeviceMask::Auto, 1, &sick, |_| 0), Err(Refusal::Devices(_))));
    }

    proptest! {
        #[test]
        fn never_promises_more_than_there_is(total in 1u64..1000, used in 0u64..1000, asks in prop::collection::vec(1u64..500, 1..20)) {
            let devices = [gpu(0, total, used.min(total))];
            let mut promised = 0;
            for ask in asks {
                if place(&DeviceMask::All, ask, &devices, |_| promised).is_ok() {
                    promised += ask;
                    prop_assert!(promised <= total);
                }
            }
        }
    }
}
