use proptest::prelude::*;

use super::*;
use crate::device::{MigSlice, test_gpu as gpu};
use crate::dice::Dice;

fn slice(index: u32, uuid: &str) -> DeviceSnapshot {
    let mig = Some(MigSlice { parent: gpu(2).uuid, profile: "1g.12gb".into(), index });
    DeviceSnapshot { uuid: uuid.into(), mig, pci_bus_id: None, ..gpu(2) }
}

/// Two whole GPUs, one in MIG mode and its two slices, one of them with a name of the older form.
fn node() -> [DeviceSnapshot; 5] {
    let old = "MIG-GPU-51000000-0000-4000-8000-000000000002/3/0";
    let parent = DeviceSnapshot { mig_parent: true, ..gpu(2) };
    [gpu(0), gpu(1), parent, slice(0, old), slice(1, "MIG-51000000-0000-4000-8000-0000000000aa")]
}

#[test]
fn one_device_is_named_in_any_way() {
    let devices = [crate::device::test_gpu(0), crate::device::test_gpu(1)];
    let index = |text: &str| named(text, &devices).map(|d| d.index);
    let bus = devices[1].pci_bus_id.clone().unwrap();
    for text in ["1", &devices[1].uuid, &bus] {
        assert_eq!(index(text), Some(1), "{text}");
    }
    for text in ["", "auto", "all", "0,1", "2", "-1", "GPU-51000000"] {
        assert_eq!(index(text), None, "{text}");
    }
}

#[test]
fn wrong_masks_say_which_entry_and_what_would_be_right() {
    for (text, part) in [
        ("", "empty"),
        ("0,0", "`0` stands twice"),
        ("-1", "`-1` names no device: indices start at 0"),
        ("0,-2", "`-2` names no device: indices start at 0"),
        ("GPU-nope", "`GPU-nope` names no device"),
        ("gpu0", "`gpu0` names no device"),
        ("MIG-GPU-51000000-0000-4000-8000-000000000002/3", "names no device"),
        ("0,all", "`all` stands alone"),
        ("auto,1", "`auto` stands alone"),
        ("0-255,256", "goes on after `256`"),
        ("0,,1", "`` names no device"),
        ("3-1", "`3-1`"),
        ("0-9999", "`0-9999`"),
        ("0,0-2", "`0-2` stands twice"),
        ("GPU-51000000", "`GPU-51000000` is cut short: write the full UUID"),
        ("MIG-5100", "`MIG-5100` is cut short: write the full UUID"),
        ("0:1,0:1", "`0:1` stands twice"),
        ("MIG-GPU-51000000-0000-4000-8000-000000000002/3/0,0:1", "second MIG"),
        ("0,MIG-51000000-0000-4000-8000-0000000000aa", "mixes"),
        ("0:0,1", "mixes"),
        ("0:0,0:1", "second MIG"),
        ("none", "`none`"),
        ("0x1", "`0x1`"),
    ] {
        let e = DeviceMask::parse(text).unwrap_err().to_string();
        assert!(e.contains(part), "{text}: {e}");
    }
}

#[test]
fn resolves_every_way_of_writing() {
    let devices = node();
    let [first, second, _, old, new] = &devices;
    let resolve = |t: &str| DeviceMask::parse(t).unwrap().validate_against_discovered(&devices).map(|m| m.uuids);
    let is = |text: &str, expected: &[&DeviceSnapshot]| {
        assert_eq!(resolve(text), Ok(expected.iter().map(|d| d.uuid.clone()).collect::<Vec<_>>()), "{text}");
    };
    is("1,0", &[second, first]);
    is("0-1", &[first, second]);
    is("0000:02:00.0", &[second]);
    is("00000000:02:00.0,0000:01:00.0", &[second, first]);
    is("02:00.0", &[second]);
    is(&first.uuid.to_uppercase(), &[first]);
    is("2:1", &[new]);
    is("2:0", &[old]);
    is("MIG-GPU-51000000-0000-4000-8000-000000000002/03/0", &[old]);
    is(&new.uuid.to_uppercase(), &[new]);
    is("auto", &[first, second, old, new]);
    assert!(matches!(resolve("2"), Err(MaskError::MigParent { .. })));
    assert!(matches!(resolve("all"), Err(MaskError::Mixed { .. })));
    let slices = DeviceMask::All.validate_against_discovered(&devices[2..]);
    assert!(matches!(slices, Err(MaskError::SecondMig { .. })));
    assert_eq!(DeviceMask::All.validate_against_discovered(&devices[..2]).unwrap().uuids.len(), 2);
    assert_eq!(DeviceMask::All.validate_against_discovered(&devices[4..]).unwrap().uuids, [new.uuid.as_str()]);
}

#[test]
fn one_device_in_two_ways_of_writing_is_named_with_both() {
    for (text, part) in [
        (format!("0,{}", gpu(0).uuid), format!("`{}` is the same device as `0`", gpu(0).uuid)),
        (format!("{},1", gpu(1).uuid), format!("`1` is the same device as `{}`", gpu(1).uuid)),
        ("1,0,02:00.0".to_owned(), "`0000:02:00.0` is the same device as `1`".to_owned()),
    ] {
        let e = DeviceMask::parse(&text).unwrap().validate_against_discovered(&node()).unwrap_err();
        assert!(e.to_string().contains(&part), "{text}: {e}");
    }
    let e = DeviceMask::parse("7").unwrap().validate_against_discovered(&node()).unwrap_err().to_string();
    assert!(e.contains("`7` is not on this node: it has 0 (GPU-") && e.contains("2:1 (MIG-"), "{e}");
    assert!(
        DeviceMask::parse("0").unwrap().validate_against_discovered(&[]).unwrap_err().to_string().contains("no device")
    );
}

#[test]
fn the_environment_names_devices_so_that_cuda_has_nothing_to_guess() {
    let devices = &node()[..2];
    let mask = DeviceMask::parse("1,0").unwrap().validate_against_discovered(devices).unwrap();
    let uuids = format!("{},{}", gpu(1).uuid, gpu(0).uuid);
    let order = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned());
    assert_eq!(mask.cuda_environment(), [order.clone(), ("CUDA_VISIBLE_DEVICES", uuids)]);
    let ordinals = mask.cuda_environment_of_ordinals(devices).unwrap();
    assert_eq!(ordinals, [order, ("CUDA_VISIBLE_DEVICES", "1,0".to_owned())]);
}

#[test]
fn ordinals_are_places_on_the_bus_and_never_guessed() {
    let on = |index: u32, bus: Option<&str>| DeviceSnapshot { pci_bus_id: bus.map(str::to_owned), ..gpu(index) };
    let mask = |d: &[DeviceSnapshot]| ResolvedMask { uuids: d.iter().map(|d| d.uuid.clone()).collect() };
    let swapped = [on(0, Some("00000000:C1:00.0")), on(1, Some("0000:0a:00.0")), on(2, Some("0000:0A:01.0"))];
    assert_eq!(mask(&swapped).to_ordinals(&swapped), Ok(vec![2, 0, 1]));
    let unknown = [on(1, Some("0000:01:00.0")), on(0, None)];
    assert_eq!(mask(&unknown).to_ordinals(&unknown), Ok(vec![1, 0]));
    let e = |m: &[DeviceSnapshot]| mask(m).to_ordinals(&node()).unwrap_err().to_string();
    assert!(e(&node()[4..]).contains("CUDA numbers no MIG slices"));
    assert!(e(&node()[..1]).contains("in MIG mode"));
    assert!(e(&[gpu(9)]).contains("is not on this node"));
}

proptest! {
    #[test]
    fn round_trips_and_never_panics(text in "[-0-9a-fA-FGPUMIg:.,/ ]{0,80}") {
        if let Ok(m) = DeviceMask::parse(&text) {
            prop_assert_eq!(DeviceMask::parse(&m.to_string()), Ok(m));
        }
    }
}

/// A million masks, most of them nearly right: no panic, what parses is written back as itself, what resolves has
/// every device that was named, once, in full and in order, and reads back as itself.
#[test]
fn a_million_masks_are_never_cut_short() {
    let (whole, node) = (node()[..2].to_vec(), node().to_vec());
    let mut parts: Vec<String> = node.iter().map(|d| d.uuid.clone()).collect();
    parts.extend(node.iter().filter_map(|d| d.pci_bus_id.clone()));
    let more = ["0", "1", "2", "3", "0-1", "1-0", "2:0", "2:1", "01:00.0", "-1", "", " 0", "all", "auto", "GPU-51"];
    parts.extend(more.map(str::to_owned));
    let (mut dice, mut resolved) = (Dice(5), 0);
    for _ in 0..1_000_000u32 {
        let mut text = String::new();
        let mut named = 0;
        for i in 0..1 + dice.below(3) {
            let part = dice.pick(&parts);
            named += if part == "0-1" { 2 } else { 1 };
            text.push_str(if i == 0 { "" } else { "," });
            text.push_str(part);
        }
        if dice.below(8) == 0 {
            // a byte of all that masks are made of, anywhere; every part is ASCII
            let at = usize::try_from(dice.below(text.len() as u64 + 1)).unwrap();
            text.insert(at, char::from(*dice.pick(b"-0123456789abcdefGPUMI:.,/ \0")));
            named = 0;
        }
        let Ok(mask) = DeviceMask::parse(&text) else { continue };
        assert_eq!(DeviceMask::parse(&mask.to_string()).as_ref(), Ok(&mask), "{text}");
        let devices = if dice.below(2) == 0 { &whole } else { &node };
        let Ok(found) = mask.validate_against_discovered(devices) else { continue };
        if !matches!(mask, DeviceMask::List(_)) {
            continue;
        }
        resolved += 1;
        assert!(named == 0 || found.uuids.len() == named, "{text}: {found:?}");
        let visible = found.to_cuda_visible_devices();
        let again = DeviceMask::parse(&visible).unwrap().validate_against_discovered(devices);
        assert_eq!(again.as_ref(), Ok(&found), "{text}");
        if let Ok(ordinals) = found.to_ordinals(devices) {
            assert_eq!(ordinals.len(), found.uuids.len());
        }
    }
    assert!(resolved > 50_000, "{resolved}");
}
