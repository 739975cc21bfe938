use proptest::prelude::*;

use super::*;
use crate::device::{Ecc, Remap, test_gpu};

const A: &str = "GPU-51000000-0000-4000-8000-000000000000";

fn policy() -> ChargePolicy {
    ChargePolicy::default()
}

fn at(secs: u64) -> Tick {
    Tick(secs * 1_000)
}

fn well() -> DeviceSnapshot {
    test_gpu(0)
}

fn lost() -> DeviceSnapshot {
    DeviceSnapshot { health: DeviceHealth::Lost("gone".into()), ..well() }
}

fn judged(action: u32) -> DeviceSnapshot {
    let mut device = well();
    device.details.recovery_action = Some(action);
    device
}

fn rows(pending: bool, failed: bool) -> DeviceSnapshot {
    let mut device = well();
    device.details.remap = Some(Remap { pending, failed });
    device
}

fn errors(uncorrected: u64) -> DeviceSnapshot {
    let mut device = well();
    device.details.ecc = Some(Ecc { corrected: 0, uncorrected });
    device
}

fn accused(xid: u64) -> Charges {
    let mut charges = Charges::default();
    charges.see(&[well()], &XidTable::default(), at(0), &policy());
    charges.hear(A, Said::Xid(xid), &XidTable::default(), at(0), &policy());
    charges
}

fn stands(charges: &Charges, device: &DeviceSnapshot) -> Option<(Fate, Verdict)> {
    charges.standing(device).map(|s| (s.fate, s.verdict))
}

#[test]
fn what_follows_from_an_xid() {
    for (xid, expected) in [
        (79, Some((Fate::End, Verdict::RebootNode))),
        (119, Some((Fate::Drain, Verdict::ResetDevice))),
        (48, Some((Fate::Drain, Verdict::ResetDevice))),
        (12_345, Some((Fate::Stay, Verdict::None))),
        (94, None),
        (13, None),
        (63, None),
    ] {
        assert_eq!(stands(&accused(xid), &well()), expected, "{xid}");
    }
    assert!(accused(79).standing(&well()).unwrap().why.contains("fallen off the bus"));
}

#[test]
fn an_unknown_one_is_forgotten_after_a_time_without_another() {
    let mut charges = accused(54);
    assert!(charges.see(&[well()], &XidTable::default(), at(119), &policy()).is_empty());
    charges.hear(A, Said::Xid(54), &XidTable::default(), at(119), &policy());
    assert!(charges.see(&[well()], &XidTable::default(), at(238), &policy()).is_empty());
    assert_eq!(charges.see(&[well()], &XidTable::default(), at(239), &policy()), [A]);
    assert_eq!(charges.standing(&well()), None);
}

#[test]
fn one_that_needs_a_reset_is_used_again_a_probation_after_something_shows_that_it_was() {
    // Nothing shows it.
    let mut charges = accused(119);
    assert!(charges.see(&[well()], &XidTable::default(), at(1_000_000), &policy()).is_empty());
    assert_eq!(stands(&charges, &well()), Some((Fate::Drain, Verdict::ResetDevice)));
    // It was gone and is back.
    charges.see(&[lost()], &XidTable::default(), at(1_000_001), &policy());
    charges.see(&[well()], &XidTable::default(), at(1_000_010), &policy());
    assert_eq!(stands(&charges, &well()), Some((Fate::Drain, Verdict::None)));
    assert!(charges.standing(&well()).unwrap().why.contains("probation"));
    assert!(charges.see(&[well()], &XidTable::default(), at(1_000_069), &policy()).is_empty());
    assert_eq!(charges.see(&[well()], &XidTable::default(), at(1_000_070), &policy()), [A]);

    // The driver had a verdict of its own, and has none any more.
    let mut charges = accused(95);
    charges.see(&[judged(1)], &XidTable::default(), at(5), &policy());
    charges.see(&[judged(0)], &XidTable::default(), at(10), &policy());
    assert_eq!(charges.see(&[judged(0)], &XidTable::default(), at(70), &policy()), [A]);

    // Its count of errors began anew.
    let mut charges = Charges::default();
    charges.see(&[errors(3)], &XidTable::default(), at(0), &policy());
    charges.hear(A, Said::DoubleBitEcc, &XidTable::default(), at(0), &policy());
    charges.see(&[errors(3)], &XidTable::default(), at(1), &policy());
    charges.see(&[errors(0)], &XidTable::default(), at(2), &policy());
    assert_eq!(charges.see(&[errors(0)], &XidTable::default(), at(62), &policy()), [A]);
}

#[test]
fn a_probation_begins_anew_when_it_is_not_well() {
    let mut charges = accused(79);
    charges.see(&[], &XidTable::default(), at(1), &policy());
    charges.see(&[well()], &XidTable::default(), at(10), &policy());
    charges.see(&[lost()], &XidTable::default(), at(20), &policy());
    charges.see(&[well()], &XidTable::default(), at(30), &policy());
    assert!(charges.see(&[well()], &XidTable::default(), at(89), &policy()).is_empty());
    assert_eq!(charges.see(&[well()], &XidTable::default(), at(90), &policy()), [A]);
}

#[test]
fn a_driver_that_has_nothing_to_say_for_long_is_believed() {
    let mut charges = accused(109);
    charges.see(&[judged(0)], &XidTable::default(), at(599), &policy());
    assert_eq!(charges.next_end(), None);
    charges.see(&[judged(0)], &XidTable::default(), at(600), &policy());
    assert_eq!(charges.see(&[judged(0)], &XidTable::default(), at(660), &policy()), [A]);
}

#[test]
fn what_the_driver_says_holds_for_as_long_as_it_says_so() {
    let charges = Charges::default();
    for (device, expected) in [
        (judged(0), None),
        (judged(1), Some((Fate::Drain, Verdict::ResetDevice))),
        (judged(2), Some((Fate::End, Verdict::RebootNode))),
        (judged(3), Some((Fate::Stay, Verdict::ResetDevice))),
        (judged(4), Some((Fate::Drain, Verdict::ResetDevice))),
        (judged(77), Some((Fate::Stay, Verdict::ResetDevice))),
        (rows(false, false), None),
        (rows(true, false), Some((Fate::Stay, Verdict::ResetDevice))),
        (rows(false, true), Some((Fate::Drain, Verdict::Replace))),
        (rows(true, true), Some((Fate::Drain, Verdict::Replace))),
    ] {
        assert_eq!(stands(&charges, &device), expected, "{device:?}");
    }
}

#[test]
fn errors_that_were_there_before_are_no_news_and_further_ones_are() {
    let mut charges = Charges::default();
    charges.see(&[errors(7)], &XidTable::default(), at(0), &policy());
    assert_eq!(charges.standing(&errors(7)), None);
    charges.see(&[errors(8)], &XidTable::default(), at(1), &policy());
    assert_eq!(stands(&charges, &errors(8)), Some((Fate::Drain, Verdict::ResetDevice)));
}

#[test]
fn the_worse_of_two_stands_and_a_person_may_acquit_it() {
    let mut charges = accused(119);
    charges.hear(A, Said::Xid(54), &XidTable::default(), at(1), &policy());
    assert_eq!(stands(&charges, &well()), Some((Fate::Drain, Verdict::ResetDevice)));
    charges.hear(A, Said::Xid(79), &XidTable::default(), at(2), &policy());
    assert_eq!(stands(&charges, &well()), Some((Fate::End, Verdict::RebootNode)));
    assert!(charges.acquit(A) && !charges.acquit(A));
    assert_eq!(charges.standing(&well()), None);
}

#[test]
fn one_that_is_not_listed_is_gone_after_a_second_look() {
    let mut charges = Charges::default();
    assert!(!charges.gone(A, false, at(0), &policy()));
    assert!(!charges.gone(A, true, at(1), &policy()));
    assert!(!charges.gone(A, false, at(2), &policy()));
    assert!(charges.gone(A, false, at(4), &policy()));
}

#[test]
fn a_device_whose_driver_says_that_it_has_to_be_reset_is_drained() {
    let fenced = DeviceSnapshot { health: DeviceHealth::Fenced("reset it".into()), ..well() };
    assert_eq!(stands(&Charges::default(), &fenced), Some((Fate::Drain, Verdict::ResetDevice)));
}

#[test]
fn an_accusation_on_probation_begins_it_anew_even_if_it_is_a_lighter_one() {
    let mut charges = accused(119);
    charges.see(&[lost()], &XidTable::default(), at(1), &policy());
    charges.see(&[well()], &XidTable::default(), at(2), &policy());
    charges.hear(A, Said::Xid(12_345), &XidTable::default(), at(52), &policy());
    assert!(charges.see(&[well()], &XidTable::default(), at(62), &policy()).is_empty());
    assert!(charges.see(&[well()], &XidTable::default(), at(171), &policy()).is_empty());
    assert_eq!(charges.see(&[well()], &XidTable::default(), at(172), &policy()), [A]);
}

proptest! {
    /// Whatever was said and seen before: nobody uses a device sooner than a probation after the last accusation.
    #[test]
    fn an_accusation_is_never_forgotten_within_a_probation(
        said in prop::collection::vec((prop::sample::select(vec![54_u64, 79, 119]), 0u8..3, 0u64..90), 1..20),
    ) {
        let (mut charges, mut now, mut last) = (Charges::default(), 0, 0);
        for (xid, sight, pause) in said {
            now += pause;
            let seen = match sight { 0 => well(), 1 => lost(), _ => judged(1) };
            let again = charges.see(&[seen], &XidTable::default(), at(now), &policy());
            prop_assert!(again.is_empty() || now - last >= 60, "{} {}", last, now);
            charges.hear(A, Said::Xid(xid), &XidTable::default(), at(now), &policy());
            last = now;
        }
        charges.see(&[well()], &XidTable::default(), at(now + 59), &policy());
        prop_assert!(charges.standing(&well()).is_some());
    }

    /// Whatever is said and seen: once it was gone and is back and well, and nothing more is said, it is used again.
    #[test]
    fn nothing_is_held_against_a_device_for_ever(said in prop::collection::vec((0u64..200, 0u8..4), 0..50)) {
        let mut charges = Charges::default();
        let mut now = 0;
        for (xid, sight) in said {
            now += 1;
            charges.hear(A, Said::Xid(xid), &XidTable::default(), at(now), &policy());
            let seen = [well(), lost(), judged(1), errors(xid)];
            charges.see(&seen[sight as usize..=sight as usize], &XidTable::default(), at(now), &policy());
        }
        charges.see(&[], &XidTable::default(), at(now + 1), &policy());
        charges.see(&[well()], &XidTable::default(), at(now + 2), &policy());
        charges.see(&[well()], &XidTable::default(), at(now + 200), &policy());
        prop_assert_eq!(charges.standing(&well()), None);
    }
}
