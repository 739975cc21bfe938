//! Whether the memory of an engine that ended has come back to its device.

use crate::device::{DeviceHealth, DeviceSnapshot};

/// What an engine had on one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Had {
    /// Its bytes: what it took, or what it was promised.
    pub bytes: u64,
    /// What no process was listed for before its launch; unset where nobody could say.
    pub unlisted: Option<u64>,
    /// What was used when it was last seen alive, as far as somebody looked.
    pub used: Option<u64>,
}

/// The same device now.
#[derive(Debug, Clone, Copy)]
pub struct Now<'a> {
    /// Unset: it is gone from the bus.
    pub device: Option<&'a DeviceSnapshot>,
    /// Bytes of every process that is listed; unset where nobody can say.
    pub listed: Option<u64>,
    /// Whether one of the engine's own is among them.
    pub own: bool,
}

/// Whether it came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Back {
    /// It has, or there is nothing that could be waited for.
    Yes,
    /// Nobody can say now.
    Unknown,
    /// It has not.
    No,
}

/// What is used that no process is listed for.
#[must_use]
pub fn unlisted(device: &DeviceSnapshot, listed: u64) -> u64 {
    device.vram_used.saturating_sub(listed)
}

/// It has once none of its processes is listed, and what nobody is listed for did not grow by its bytes. Half of them
/// decide: parts go first, and others whom nobody lists come and go. That they came meanwhile is also seen by a fall of
/// what is used at the moment of its end.
#[must_use]
pub fn returned(had: &Had, now: &Now<'_>) -> Back {
    let Some(device) = now.device else { return Back::Yes };
    match device.health {
        // What was there is gone with it.
        DeviceHealth::Lost(_) => return Back::Yes,
        DeviceHealth::Unknown(_) if had.unlisted.is_some() => return Back::Unknown,
        _ => {}
    }
    let (before, listed) = match (had.unlisted, now.listed) {
        _ if now.own => return Back::No,
        // It never could be proved; what is used is waited for by whoever needs it.
        (None, _) => return Back::Yes,
        (Some(_), None) => return Back::Unknown,
        (Some(before), Some(listed)) => (before, listed),
    };
    let grew = unlisted(device, listed).saturating_sub(before);
    let fell = had.used.map_or(0, |used| used.saturating_sub(device.vram_used));
    if grew <= had.bytes / 2 || fell > had.bytes / 2 { Back::Yes } else { Back::No }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::test_gpu;

    fn device(used: u64) -> DeviceSnapshot {
        DeviceSnapshot { vram_total: 1_000, vram_used: used, vram_free: 1_000 - used, ..test_gpu(0) }
    }

    /// An engine of 400 bytes on a device where the driver itself used 50.
    fn had(used: Option<u64>) -> Had {
        Had { bytes: 400, unlisted: Some(50), used }
    }

    fn is_back(had: &Had, used: u64, listed: Option<u64>, own: bool) -> bool {
        returned(had, &Now { device: Some(&device(used)), listed, own }) == Back::Yes
    }

    #[test]
    fn it_is_back_when_it_is_used_no_more_and_its_processes_are_off_the_device() {
        let had = had(Some(450));
        assert!(is_back(&had, 50, Some(0), false));
        assert!(!is_back(&had, 50, Some(0), true), "one of its processes is listed");
        assert!(!is_back(&had, 450, Some(0), false), "nobody is listed, and it is used all the same");
        assert!(!is_back(&had, 420, Some(0), false), "a part went");
        assert!(is_back(&had, 450, Some(400), false), "a neighbour that is listed took its place");
    }

    #[test]
    fn others_whom_nobody_lists_are_told_from_it_by_the_fall_at_its_end() {
        // They came while it ran: 850 in use when it was last seen.
        assert!(is_back(&had(Some(850)), 450, Some(0), false));
        assert!(!is_back(&had(Some(850)), 850, Some(0), false));
        // By a later daemon, which did not look.
        assert!(!is_back(&had(None), 450, Some(0), false));
    }

    #[test]
    fn what_cannot_be_proved_is_not_asked_for_and_what_could_is_waited_for() {
        let blind = Had { unlisted: None, ..had(None) };
        assert!(is_back(&blind, 450, None, false) && is_back(&blind, 450, Some(0), false));
        assert!(!is_back(&blind, 450, Some(400), true), "but what can be seen counts");
        assert_eq!(returned(&had(None), &Now { device: Some(&device(50)), listed: None, own: false }), Back::Unknown);
        let unknown = DeviceSnapshot { health: DeviceHealth::Unknown("driver".into()), ..device(50) };
        assert_eq!(returned(&had(None), &Now { device: Some(&unknown), listed: Some(0), own: false }), Back::Unknown);
    }

    #[test]
    fn a_device_that_is_gone_holds_nothing() {
        let lost = DeviceSnapshot { health: DeviceHealth::Lost("xid 79".into()), ..device(450) };
        for device in [None, Some(&lost)] {
            assert_eq!(returned(&had(None), &Now { device, listed: Some(0), own: false }), Back::Yes);
        }
    }
}
