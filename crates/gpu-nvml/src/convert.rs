//! From what NVML says to what the services know. Nothing here calls NVML.

use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError as Raw;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use pool_domain::device::MigSlice;
use pool_domain::{DeviceDetails, DeviceHealth, DeviceSnapshot, Verdict};
use pool_services::ports::Holder;

/// Memory of a device in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) free: u64,
    pub(crate) used: u64,
    pub(crate) reserved: u64,
}

/// What was asked of one device. What it does not support is `None`.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) uuid: String,
    pub(crate) name: Option<String>,
    pub(crate) bus_id: Option<String>,
    pub(crate) compute_capability: Option<(i32, i32)>,
    pub(crate) numa_node: Option<u32>,
    pub(crate) memory: Result<Memory, Raw>,
    pub(crate) utilisation: Option<u32>,
    pub(crate) mig: Option<MigSlice>,
    pub(crate) mig_parent: bool,
    pub(crate) details: DeviceDetails,
}

/// A device from its reading. Its index is its place in the list and set later.
pub(crate) fn snapshot(reading: Reading) -> DeviceSnapshot {
    let (memory, health) = match reading.memory {
        Ok(memory) => (memory, DeviceHealth::Ok),
        Err(error) => (Memory::default(), health(&error)),
    };
    DeviceSnapshot {
        verdict: verdict(&health),
        details: reading.details,
        uuid: reading.uuid,
        index: 0,
        name: reading.name.unwrap_or_else(|| "NVIDIA GPU".to_owned()),
        pci_bus_id: reading.bus_id.as_deref().map(bus_id),
        compute_capability: reading
            .compute_capability
            .and_then(|(a, b)| Some((a.try_into().ok()?, b.try_into().ok()?))),
        // NVML writes "none" as all ones.
        numa_node: reading.numa_node.filter(|&node| node != u32::MAX),
        vram_total: memory.total,
        vram_free: memory.free,
        vram_used: memory.used,
        vram_reserved: memory.reserved,
        vram_foreign: 0,
        utilisation: reading.utilisation,
        health,
        mig: reading.mig,
        mig_parent: reading.mig_parent,
    }
}

/// What an error about a device means for it.
pub(crate) fn health(error: &Raw) -> DeviceHealth {
    let why = error.to_string();
    match error {
        Raw::GpuLost | Raw::IrqIssue => DeviceHealth::Lost(why),
        Raw::ResetRequired => DeviceHealth::Fenced(format!("the driver says: {why}")),
        Raw::NotSupported | Raw::FunctionNotFound | Raw::FailedToLoadSymbol(_) => {
            DeviceHealth::Unknown("the driver does not tell how much memory it has".to_owned())
        }
        _ => DeviceHealth::Unknown(why),
    }
}

/// What has to be done about a device that the driver cannot use.
fn verdict(health: &DeviceHealth) -> Verdict {
    match health {
        DeviceHealth::Lost(_) => Verdict::RebootNode,
        DeviceHealth::Fenced(_) => Verdict::ResetDevice,
        _ => Verdict::None,
    }
}

/// What is left of a device of which every question fails, and of its slices.
pub(crate) fn failed(before: &[DeviceSnapshot], uuid: &str, error: &Raw) -> Vec<DeviceSnapshot> {
    let of_it = |d: &&DeviceSnapshot| d.uuid == uuid || d.mig.as_ref().is_some_and(|m| m.parent == uuid);
    before.iter().filter(of_it).map(|d| with_health(d, health(error))).collect()
}

/// A GPU that is counted and has not said who it is.
#[derive(Debug)]
pub(crate) struct Silent {
    /// Its place as NVML counts.
    pub(crate) index: u32,
    /// As NVML writes it, if it told that at least.
    pub(crate) bus_id: Option<String>,
    /// What its error means for it.
    pub(crate) health: DeviceHealth,
}

/// Before what stands for the UUID of a GPU that has not told its own.
const NAMELESS: &str = "GPU-unknown-";

/// Whether it stands for a GPU that has not said who it is.
pub(crate) fn is_nameless(device: &DeviceSnapshot) -> bool {
    device.uuid.starts_with(NAMELESS)
}

/// What stands for the GPUs that have not said who they are, so that no other gets their numbers. One that was known before
/// and is not among those of `now` is one of them already.
pub(crate) fn nameless(before: &[DeviceSnapshot], now: &[DeviceSnapshot], silent: Vec<Silent>) -> Vec<DeviceSnapshot> {
    let here = |uuid: &str| now.iter().any(|d| d.uuid == uuid);
    let mut missed: Vec<_> =
        before.iter().filter(|d| d.mig.is_none() && !is_nameless(d) && !here(&d.uuid)).map(|d| &d.pci_bus_id).collect();
    let (told, not): (Vec<_>, Vec<_>) = silent.into_iter().partition(|s| s.bus_id.is_some());
    // Those that tell where they are come first: the others may be any.
    let unexplained = told.into_iter().chain(not).filter(|s| {
        let bus = s.bus_id.as_deref().map(bus_id);
        let same = missed.iter().position(|id| bus.is_none() || **id == bus);
        same.map(|at| missed.remove(at)).is_none()
    });
    let stands_for = |s: Silent| {
        let bus = s.bus_id.as_deref().map(bus_id);
        let place = bus.unwrap_or_else(|| s.index.to_string());
        let whole = snapshot(Reading {
            uuid: format!("{NAMELESS}{place}"),
            name: Some("GPU that does not answer".to_owned()),
            bus_id: s.bus_id,
            compute_capability: None,
            numa_node: None,
            memory: Ok(Memory::default()),
            utilisation: None,
            mig: None,
            mig_parent: false,
            details: DeviceDetails::default(),
        });
        DeviceSnapshot { index: s.index, ..with_health(&whole, s.health) }
    };
    unexplained.map(stands_for).collect()
}

/// What is said of a node with such GPUs.
pub(crate) fn unread(nameless: &[DeviceSnapshot]) -> Option<String> {
    let mut why: Vec<&str> = nameless.iter().map(|d| d.health.reason()).collect();
    why.sort_unstable();
    why.dedup();
    let count = nameless.len();
    (count > 0).then(|| format!("{count} of the GPUs that the driver counts cannot be used: {}", why.join("; ")))
}

/// NVML writes eight domain digits and capitals, everybody else four and none.
pub(crate) fn bus_id(nvml: &str) -> String {
    let lower = nvml.to_ascii_lowercase();
    match lower.split_once(':') {
        Some((domain, rest)) if domain.len() == 8 && domain.starts_with("0000") => format!("{}:{rest}", &domain[4..]),
        _ => lower,
    }
}

/// The profile of a slice from its name, such as `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
pub(crate) fn profile(name: &str) -> String {
    name.rsplit_once(" MIG ").map_or("unknown", |(_, profile)| profile).to_owned()
}

/// Puts devices in PCI bus order and numbers them; slices follow their GPU and share its number.
pub(crate) fn number(devices: Vec<DeviceSnapshot>) -> Vec<DeviceSnapshot> {
    let (mut gpus, mut slices): (Vec<_>, Vec<_>) = devices.into_iter().partition(|d| d.mig.is_none());
    gpus.sort_by(|a, b| a.pci_bus_id.cmp(&b.pci_bus_id));
    // Of one that tells nothing at all, only its place among the others is known.
    let (mut placeless, mut gpus): (Vec<_>, Vec<_>) =
        gpus.into_iter().partition(|d| is_nameless(d) && d.pci_bus_id.is_none());
    placeless.sort_by_key(|d| d.index);
    for gpu in placeless {
        gpus.insert(gpus.len().min(gpu.index as usize), gpu);
    }
    slices.sort_by_key(|d| d.mig.as_ref().map(|m| m.index));
    let mut all = Vec::with_capacity(gpus.len() + slices.len());
    for (index, gpu) in (0_u32..).zip(gpus) {
        let of_this = |d: &DeviceSnapshot| d.mig.as_ref().is_some_and(|m| m.parent == gpu.uuid);
        let (mine, others): (Vec<_>, Vec<_>) = slices.into_iter().partition(of_this);
        slices = others;
        all.push(DeviceSnapshot { index, ..gpu });
        all.extend(mine.into_iter().map(|slice| DeviceSnapshot { index, ..slice }));
    }
    all
}

/// Adds the GPUs that were there before and are not listed now: a GPU can leave the bus without a word. A slice that is
/// not listed was taken apart and is forgotten, unless its GPU is gone with it.
pub(crate) fn keep_lost(before: &[DeviceSnapshot], mut now: Vec<DeviceSnapshot>) -> Vec<DeviceSnapshot> {
    let missing = |uuid: &str| !now.iter().any(|d| d.uuid == uuid);
    let lost: Vec<DeviceSnapshot> = before
        .iter()
        .filter(|d| !is_nameless(d) && missing(&d.uuid) && d.mig.as_ref().is_none_or(|m| missing(&m.parent)))
        .map(|d| with_health(d, DeviceHealth::Lost("the driver no longer lists it".to_owned())))
        .collect();
    now.extend(lost);
    // A device without a memory reading keeps the size it had.
    for device in now.iter_mut().filter(|d| d.vram_total == 0) {
        if let Some(old) = before.iter().find(|old| old.uuid == device.uuid) {
            device.vram_total = old.vram_total;
            device.vram_used = old.vram_used;
            device.vram_reserved = old.vram_reserved;
        }
    }
    now
}

/// Every device in one state, except that a lost one stays lost. Nothing of it counts as free.
pub(crate) fn all_unknown(devices: &[DeviceSnapshot], why: &str) -> Vec<DeviceSnapshot> {
    devices
        .iter()
        .map(|d| match d.health {
            DeviceHealth::Lost(_) => d.clone(),
            _ => with_health(d, DeviceHealth::Unknown(why.to_owned())),
        })
        .collect()
}

/// One device, and its slices, of which no answer comes; whatever is known of the others is old.
pub(crate) fn one_silent(devices: &[DeviceSnapshot], uuid: &str, why: &str, others: &str) -> Vec<DeviceSnapshot> {
    let stale = all_unknown(devices, &format!("what is known of it is old: {others}"));
    let of_it = |d: &DeviceSnapshot| d.uuid == uuid || d.mig.as_ref().is_some_and(|m| m.parent == uuid);
    let lost = |d: &DeviceSnapshot| matches!(d.health, DeviceHealth::Lost(_));
    let one = |d: DeviceSnapshot| {
        if of_it(&d) && !lost(&d) { with_health(&d, DeviceHealth::Unknown(why.to_owned())) } else { d }
    };
    stale.into_iter().map(one).collect()
}

/// Nothing of it counts as free, and nothing it told is told again.
fn with_health(device: &DeviceSnapshot, health: DeviceHealth) -> DeviceSnapshot {
    let details = DeviceDetails {
        instance: device.details.instance,
        peers: device.details.peers.clone(),
        ..DeviceDetails::default()
    };
    let verdict = verdict(&health);
    DeviceSnapshot { health, verdict, details, vram_free: 0, utilisation: None, ..device.clone() }
}

/// Who holds memory on a device. One whose bytes the driver does not tell still holds it.
pub(crate) fn holder(uuid: &str, process: &ProcessInfo) -> Holder {
    let bytes = match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => bytes,
        UsedGpuMemory::Unavailable => 0,
    };
    Holder { uuid: uuid.to_owned(), pid: process.pid, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(uuid: &str, bus: &str) -> Reading {
        Reading {
            uuid: uuid.into(),
            name: Some("NVIDIA H100".into()),
            bus_id: Some(bus.into()),
            compute_capability: Some((9, 0)),
            numa_node: Some(u32::MAX),
            memory: Ok(Memory { total: 100, free: 60, used: 30, reserved: 10 }),
            utilisation: Some(7),
            mig: None,
            mig_parent: false,
            details: DeviceDetails::default(),
        }
    }

    fn slice(uuid: &str, parent: &str, index: u32) -> DeviceSnapshot {
        let mig = Some(MigSlice { parent: parent.into(), profile: "1g.12gb".into(), index });
        snapshot(Reading { mig, ..reading(uuid, "00000000:41:00.0") })
    }

    fn uuids(devices: &[DeviceSnapshot]) -> Vec<(&str, u32)> {
        devices.iter().map(|d| (d.uuid.as_str(), d.index)).collect()
    }

    #[test]
    fn a_whole_reading() {
        let d = snapshot(reading("GPU-a", "00000000:C1:00.0"));
        assert_eq!(d.pci_bus_id.as_deref(), Some("0000:c1:00.0"));
        assert_eq!((d.compute_capability, d.numa_node, d.utilisation), (Some((9, 0)), None, Some(7)));
        assert_eq!((d.vram_total, d.vram_free, d.vram_used, d.vram_reserved), (100, 60, 30, 10));
        assert_eq!(d.health, DeviceHealth::Ok);
    }

    #[test]
    fn what_is_missing_is_none_and_memory_decides_about_health() {
        let bare = |error| {
            snapshot(Reading {
                name: None,
                bus_id: None,
                compute_capability: None,
                numa_node: None,
                utilisation: None,
                memory: Err(error),
                ..reading("GPU-a", "")
            })
        };
        let d = bare(Raw::NotSupported);
        assert_eq!((d.name.as_str(), d.pci_bus_id, d.compute_capability), ("NVIDIA GPU", None, None));
        for (error, code) in [
            (Raw::NotSupported, "unknown"),
            (Raw::Unknown, "unknown"),
            (Raw::Timeout, "unknown"),
            (Raw::GpuLost, "lost"),
            (Raw::IrqIssue, "lost"),
            (Raw::ResetRequired, "fenced"),
        ] {
            let d = bare(error);
            assert_eq!(d.health.code(), code);
            assert!(!d.health.admits());
        }
    }

    #[test]
    fn bus_ids_and_profiles() {
        assert_eq!(bus_id("00000000:65:00.0"), "0000:65:00.0");
        assert_eq!(bus_id("0000:65:00.0"), "0000:65:00.0");
        assert_eq!(bus_id("00010000:65:00.0"), "00010000:65:00.0");
        assert_eq!(profile("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), "1g.5gb");
        assert_eq!(profile("NVIDIA H100"), "unknown");
    }

    #[test]
    fn numbers_follow_the_bus_and_slices_their_gpu() {
        let all = number(vec![
            slice("MIG-1", "GPU-b", 1),
            snapshot(reading("GPU-b", "00000000:C1:00.0")),
            slice("MIG-0", "GPU-b", 0),
            snapshot(reading("GPU-a", "00000000:41:00.0")),
        ]);
        assert_eq!(uuids(&all), [("GPU-a", 0), ("GPU-b", 1), ("MIG-0", 1), ("MIG-1", 1)]);
    }

    #[test]
    fn a_gpu_that_is_listed_no_more_is_lost_with_its_slices() {
        let a = snapshot(reading("GPU-a", "00000000:41:00.0"));
        let b = snapshot(reading("GPU-b", "00000000:C1:00.0"));
        let before = [a.clone(), b.clone(), slice("MIG-a", "GPU-a", 0), slice("MIG-b", "GPU-b", 0)];
        let now = keep_lost(&before, vec![b.clone()]);
        let lost: Vec<_> = now.iter().filter(|d| d.health.code() == "lost").map(|d| d.uuid.as_str()).collect();
        assert_eq!(lost, ["GPU-a", "MIG-a"]);
        assert!(!now.iter().any(|d| d.uuid == "MIG-b"), "taken apart, not lost");
        assert_eq!(now.iter().find(|d| d.uuid == "GPU-a").map(|d| (d.vram_total, d.vram_free)), Some((100, 0)));
        // It is back.
        assert_eq!(keep_lost(&now, vec![a.clone(), b.clone()]), [a, b]);
    }

    #[test]
    fn one_that_never_said_who_it_is_keeps_its_number_and_one_that_was_known_is_not_counted_twice() {
        let (a, c) = (snapshot(reading("GPU-a", "00000000:41:00.0")), snapshot(reading("GPU-c", "00000000:C1:00.0")));
        let silent = |index, bus: Option<&str>| Silent {
            index,
            bus_id: bus.map(str::to_owned),
            health: DeviceHealth::Lost("off the bus".into()),
        };
        let all = |before: &[DeviceSnapshot], now: Vec<DeviceSnapshot>, silent| {
            let nameless = nameless(before, &now, silent);
            let problem = unread(&nameless);
            (number(keep_lost(before, now.into_iter().chain(nameless).collect())), problem)
        };
        let (first, problem) = all(&[], vec![c.clone()], vec![silent(0, None), silent(2, Some("00000000:E1:00.0"))]);
        assert_eq!(uuids(&first), [("GPU-unknown-0", 0), ("GPU-c", 1), ("GPU-unknown-0000:e1:00.0", 2)]);
        assert!(problem.unwrap().starts_with("2 of the GPUs"));
        assert_eq!((first[0].verdict, first[0].vram_free), (Verdict::RebootNode, 0));
        // Now it says who it is.
        let (known, problem) = all(&first, vec![a.clone(), c.clone()], Vec::new());
        assert_eq!((uuids(&known), problem), (vec![("GPU-a", 0), ("GPU-c", 1)], None));
        // And is silent again: it is missed by its name.
        let (missed, problem) = all(&known, vec![c], vec![silent(0, None)]);
        assert_eq!((uuids(&missed), problem), (vec![("GPU-a", 0), ("GPU-c", 1)], None));
        assert_eq!(missed[0].health.code(), "lost");
    }

    #[test]
    fn a_failed_reading_keeps_the_size_but_leaves_nothing_free() {
        let before = [snapshot(reading("GPU-a", "00000000:41:00.0"))];
        let failed = snapshot(Reading { memory: Err(Raw::Unknown), ..reading("GPU-a", "00000000:41:00.0") });
        let now = keep_lost(&before, vec![failed]);
        assert_eq!((now[0].vram_total, now[0].vram_used, now[0].vram_free), (100, 30, 0));
    }

    #[test]
    fn a_silent_driver_admits_nothing() {
        let devices =
            [snapshot(reading("GPU-a", "")), snapshot(Reading { memory: Err(Raw::GpuLost), ..reading("GPU-b", "") })];
        let now = all_unknown(&devices, "silent");
        assert_eq!(now.iter().map(|d| d.health.code()).collect::<Vec<_>>(), ["unknown", "lost"]);
        assert_eq!(now[0].vram_free, 0);
    }

    #[test]
    fn holders() {
        let process =
            |used_gpu_memory| ProcessInfo { pid: 4, used_gpu_memory, gpu_instance_id: None, compute_instance_id: None };
        let expected = |bytes| Holder { uuid: "GPU-a".into(), pid: 4, bytes };
        assert_eq!(holder("GPU-a", &process(UsedGpuMemory::Used(9))), expected(9));
        assert_eq!(holder("GPU-a", &process(UsedGpuMemory::Unavailable)), expected(0));
    }
}
