//! Which devices a start gets, and whether their memory suffices.

use std::cmp::Reverse;

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
    u64::try_from(left(device, promised)).unwrap_or(0)
}

/// The same below zero too, where foreign use has eaten into what was promised.
pub(crate) fn left(device: &DeviceSnapshot, promised: u64) -> i128 {
    let foreign = device.vram_foreign.max(device.vram_used.saturating_sub(promised));
    i128::from(usable(device)) - i128::from(promised) - i128::from(foreign)
}

/// Bytes that can ever be promised on a device.
pub(crate) fn usable(device: &DeviceSnapshot) -> u64 {
    device.vram_total.saturating_sub(device.vram_reserved)
}

/// Chooses devices for a start that needs `bytes` on each: the mask whole or not at all; `auto` takes the one device
/// with the most memory left among those that are large enough.
///
/// # Errors
/// Says whether waiting may help.
pub fn place(
    mask: &DeviceMask,
    bytes: u64,
    devices: &[DeviceSnapshot],
    promised: impl Fn(&str) -> u64,
) -> Result<ResolvedMask, Refusal> {
    place_each(mask, &[bytes], devices, promised)
}

/// Chooses devices for a start that needs different bytes on each, as a split does: one number for each device in the
/// mask's order, or one number for all of them.
///
/// # Errors
/// Says whether waiting may help. It never does where the numbers are not as many as the devices: `auto` is one device.
pub fn place_each(
    mask: &DeviceMask,
    bytes: &[u64],
    devices: &[DeviceSnapshot],
    promised: impl Fn(&str) -> u64,
) -> Result<ResolvedMask, Refusal> {
    let mut chosen = candidates(mask, bytes, devices)?;
    if *mask == DeviceMask::Auto {
        // None of them is ill; the first of those with the most room.
        chosen.sort_by_key(|(d, _)| (Reverse(available(d, promised(&d.uuid))), d.index));
        chosen.truncate(1);
    }
    for (d, bytes) in &chosen {
        let left = available(d, promised(&d.uuid));
        if left < *bytes {
            return Err(Refusal::Vram(format!("GPU {} has {} left of the {} needed", d.index, gib(left), gib(*bytes))));
        }
    }
    Ok(ResolvedMask { uuids: chosen.iter().map(|(d, _)| d.uuid.clone()).collect() })
}

/// The devices a start may get and what it needs there, all of them well and large enough: with `auto` one of them,
/// else all of them.
pub(crate) fn candidates<'a>(
    mask: &DeviceMask,
    bytes: &[u64],
    devices: &'a [DeviceSnapshot],
) -> Result<Vec<(&'a DeviceSnapshot, u64)>, Refusal> {
    let resolved = mask.validate_against_discovered(devices).map_err(Refusal::Mask)?;
    let known = resolved.uuids.iter().filter_map(|u| devices.iter().find(|d| d.uuid == *u));
    let auto = *mask == DeviceMask::Auto;
    let mut found: Vec<(&DeviceSnapshot, u64)> = match bytes {
        [all] => known.map(|d| (d, *all)).collect(),
        each if !auto && each.len() == resolved.uuids.len() => known.zip(each.iter().copied()).collect(),
        each => {
            let there = if auto { 1 } else { resolved.uuids.len() };
            return Err(Refusal::NeverFits(format!("a split over {} devices on a mask of {there}", each.len())));
        }
    };
    if found.is_empty() {
        return Err(Refusal::Devices("the node has no usable GPU".into()));
    }
    if auto {
        found.retain(|(d, bytes)| usable(d) >= *bytes);
        if found.is_empty() {
            let bytes = bytes.iter().copied().max().unwrap_or(0);
            return Err(Refusal::NeverFits(format!("no GPU of this node is as large as {}", gib(bytes))));
        }
        found.retain(|(d, _)| d.health.admits());
        if found.is_empty() {
            return Err(Refusal::Devices("no GPU of this node that is large enough is well".into()));
        }
    }
    for (d, bytes) in &found {
        if !d.health.admits() {
            return Err(Refusal::Devices(format!("GPU {} is {}", d.index, d.health)));
        }
        if usable(d) < *bytes {
            return Err(Refusal::NeverFits(format!("{} is more than GPU {} has", gib(*bytes), d.index)));
        }
    }
    Ok(found)
}

#[allow(clippy::cast_precision_loss, reason = "shown with one decimal")]
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::{DeviceHealth, test_gpu};
    use crate::dice::Dice;

    fn gpu(index: u32, total: u64, used: u64) -> DeviceSnapshot {
        DeviceSnapshot { vram_total: total, vram_free: total - used, vram_used: used, ..test_gpu(index) }
    }

    #[test]
    fn auto_takes_the_roomiest_and_says_when_nothing_ever_fits() {
        let devices = [gpu(0, 100, 50), gpu(1, 80, 0)];
        let uuids = |r: Result<ResolvedMask, Refusal>| r.map(|m| m.uuids);
        assert_eq!(uuids(place(&DeviceMask::Auto, 60, &devices, |_| 0)), Ok(vec![devices[1].uuid.clone()]));
        assert!(matches!(place(&DeviceMask::Auto, 101, &devices, |_| 0), Err(Refusal::NeverFits(_))));
        // It would fit on the first, which has less left now than the second, on which it never will.
        assert!(matches!(place(&DeviceMask::Auto, 90, &devices, |_| 0), Err(Refusal::Vram(_))));
        let sick = [DeviceSnapshot { health: DeviceHealth::Fenced("test".into()), ..gpu(0, 100, 0) }];
        assert!(matches!(place(&DeviceMask::Auto, 1, &sick, |_| 0), Err(Refusal::Devices(_))));
        assert!(matches!(place(&DeviceMask::All, 1, &sick, |_| 0), Err(Refusal::Devices(_))));
        // One that is well and too small does not make it hopeless.
        let mixed = [gpu(1, 50, 0), sick[0].clone()];
        assert!(matches!(place(&DeviceMask::Auto, 80, &mixed, |_| 0), Err(Refusal::Devices(_))));
        assert!(matches!(place(&DeviceMask::All, 1, &[], |_| 0), Err(Refusal::Devices(_))));
    }

    #[test]
    fn a_split_needs_its_own_bytes_on_each_device_and_gets_all_or_nothing() {
        let devices = [gpu(0, 100, 0), gpu(1, 50, 0)];
        let mask: DeviceMask = "1,0".parse().unwrap();
        let placed = place_each(&mask, &[40, 90], &devices, |_| 0).unwrap();
        assert_eq!(placed.uuids, [devices[1].uuid.clone(), devices[0].uuid.clone()]);
        assert!(matches!(place_each(&mask, &[90, 40], &devices, |_| 0), Err(Refusal::NeverFits(_))));
        assert!(matches!(place_each(&mask, &[40, 90], &devices, |_| 20), Err(Refusal::Vram(_))));
        assert!(matches!(place_each(&mask, &[1, 1, 1], &devices, |_| 0), Err(Refusal::NeverFits(_))));
        assert!(matches!(place_each(&mask, &[], &devices, |_| 0), Err(Refusal::NeverFits(_))));
        assert!(matches!(place_each(&DeviceMask::Auto, &[1, 1], &devices, |_| 0), Err(Refusal::NeverFits(_))));
    }

    #[test]
    fn what_strangers_hold_is_not_promised() {
        let device = DeviceSnapshot { vram_reserved: 5, vram_foreign: 30, ..gpu(0, 100, 60) };
        assert_eq!(available(&device, 0), 35); // used beyond what is promised is not ours
        assert_eq!(available(&device, 30), 35);
        assert_eq!(available(&device, 50), 15); // known foreign use counts whole though ours has not come yet
        assert_eq!(available(&device, 90), 0);
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

    /// A million histories of reservations, releases, engines that take more or less than they reserved, and strangers
    /// that come and go, on two devices: what is promised is never more than what is usable, and at the moment of a
    /// promise not more than what strangers leave.
    #[test]
    fn a_million_histories_never_promise_what_is_not_there() {
        let masks: Vec<DeviceMask> = ["auto", "all", "0", "1,0"].iter().map(|m| m.parse().unwrap()).collect();
        let (mut dice, mut granted) = (Dice(11), 0u64);
        let mut devices = [gpu(0, 0, 0), gpu(1, 0, 0)];
        for _ in 0..1_000_000 {
            for d in &mut devices {
                (d.vram_total, d.vram_reserved) = (dice.below(100), dice.below(10));
                (d.vram_used, d.vram_foreign) = (0, 0);
            }
            // what each holds: by device, reserved and really used
            let mut book: Vec<[(u64, u64); 2]> = Vec::new();
            for _ in 0..1 + dice.below(6) {
                let of = |book: &[[(u64, u64); 2]], at: usize| {
                    book.iter().fold((0, 0), |sum, r| (sum.0 + r[at].0, sum.1 + r[at].1))
                };
                let at = usize::try_from(dice.below(2)).unwrap();
                match dice.below(5) {
                    0 if !book.is_empty() => drop(book.swap_remove(usize::try_from(dice.next()).unwrap() % book.len())),
                    1 => devices[at].vram_foreign = dice.below(120),
                    2 => book.iter_mut().for_each(|r| r[at].1 = dice.below(r[at].0 + r[at].0 / 4 + 1)),
                    _ => {
                        for (at, d) in devices.iter_mut().enumerate() {
                            d.vram_used = d.vram_foreign + of(&book, at).1;
                        }
                        let mask = dice.pick(&masks);
                        let each = [dice.below(60), dice.below(60)];
                        let bytes = if *mask == masks[3] { &each[..] } else { &each[..1] };
                        let promised = |u: &str| of(&book, usize::from(u == devices[1].uuid)).0;
                        let Ok(placed) = place_each(mask, bytes, &devices, promised) else { continue };
                        let mut entry = [(0, 0); 2];
                        for (i, uuid) in placed.uuids.iter().enumerate() {
                            entry[usize::from(*uuid == devices[1].uuid)].0 = bytes[i.min(bytes.len() - 1)];
                        }
                        book.push(entry);
                        granted += 1;
                        for (at, d) in devices.iter().enumerate().filter(|(at, _)| entry[*at].0 > 0) {
                            assert!(of(&book, at).0 + d.vram_foreign <= usable(d), "{d:?} {book:?}");
                        }
                    }
                }
                for (at, d) in devices.iter().enumerate() {
                    assert!(of(&book, at).0 <= usable(d), "{d:?} {book:?}");
                }
            }
        }
        assert!(granted > 100_000, "{granted}");
    }
}
