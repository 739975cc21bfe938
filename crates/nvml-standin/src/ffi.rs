//! What is exported: the calls that nvml-wrapper makes for gpu-nvml. Whatever is not here, it does not find, and takes
//! for a driver that is too old for it.
#![expect(unsafe_code, reason = "a C library's face: its names are exported, and results go through pointers")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_ulonglong};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use nvml_wrapper_sys::bindings as sys;
use nvml_wrapper_sys::bindings::field_id;
use sys::{nvmlDevice_t, nvmlEventSet_t, nvmlReturn_t};

use crate::out::{Code, fixed, put, put_list, put_text, text};
use crate::world::{self, Target, World, call};
use crate::{DRIVER_VERSION, NAME_PREFIX};

const NOT_SUPPORTED: Code = sys::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: Code = sys::nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
/// All instances.
const WHOLE: u32 = u32::MAX;

fn device(handle: nvmlDevice_t) -> usize {
    handle.addr()
}

/// What is unset in the script is not supported.
fn known<T>(value: Option<T>) -> Result<T, Code> {
    value.ok_or(NOT_SUPPORTED)
}

/// Defines calls of one device: the call's name is that of the function.
macro_rules! of_device {
    ($($(#[$doc:meta])* $name:ident($handle:ident, $target:ident $(, $arg:ident: $ty:ty)*) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($handle: nvmlDevice_t $(, $arg: $ty)*) -> nvmlReturn_t {
            call(stringify!($name), Some(device($handle)), |world| {
                let $target = world.target(device($handle))?;
                $body
            })
        }
    )*};
}

/// Where this library was loaded from.
fn loaded_from() -> PathBuf {
    // SAFETY: zero is a value of every field of it.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address is of a function of this library, and `info` may be written.
    let found = unsafe { libc::dladdr(nvmlInit_v2 as *const libc::c_void, &raw mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return PathBuf::new();
    }
    // SAFETY: dladdr gives text with its end that lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    PathBuf::from(OsStr::from_bytes(name.to_bytes()))
}

/// Begins.
#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    world::open("nvmlInit_v2", &loaded_from())
}

/// Ends.
#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    world::close()
}

/// The version of the driver, which says what this is.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) -> nvmlReturn_t {
    // SAFETY: the caller's pointer, by NVML's contract.
    call("nvmlSystemGetDriverVersion", None, |_| unsafe { put_text(version, length, DRIVER_VERSION) })
}

/// CUDA's version.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) -> nvmlReturn_t {
    call("nvmlSystemGetCudaDriverVersion_v2", None, |world| {
        let cuda = known(world.script.cuda)?;
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(version, cuda) }
    })
}

/// How many GPUs there are.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> nvmlReturn_t {
    call("nvmlDeviceGetCount_v2", None, |world| {
        let there = u32::try_from(world.present().count()).unwrap_or(u32::MAX);
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(count, there) }
    })
}

/// The GPU at a place.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, handle: *mut nvmlDevice_t) -> nvmlReturn_t {
    let place = index as usize + 1;
    call("nvmlDeviceGetHandleByIndex_v2", Some(place), |world| {
        world.target(place).map_err(|_| crate::out::INVALID)?;
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(handle, std::ptr::without_provenance_mut(place)) }
    })
}

/// The GPU of a UUID.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, handle: *mut nvmlDevice_t) -> nvmlReturn_t {
    // SAFETY: the caller's text, by NVML's contract.
    let uuid = match unsafe { text(uuid) } {
        Ok(uuid) => uuid,
        Err(code) => return code,
    };
    call("nvmlDeviceGetHandleByUUID", None, |world| {
        let place = world.handle(&uuid).ok_or(NOT_FOUND)?;
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(handle, std::ptr::without_provenance_mut(place)) }
    })
}

// SAFETY of every body: the caller's pointers, by NVML's contract.
of_device! {
    /// Its UUID.
    nvmlDeviceGetUUID(handle, target, uuid: *mut c_char, length: c_uint) {
        // SAFETY: as above.
        unsafe { put_text(uuid, length, target.uuid()) }
    }
    /// Its name, which says what it is.
    nvmlDeviceGetName(handle, target, name: *mut c_char, length: c_uint) {
        let shown = match target {
            Target::Gpu(gpu) => format!("{NAME_PREFIX}{}", gpu.name),
            Target::Slice(gpu, slice) => format!("{NAME_PREFIX}{} MIG {}", gpu.name, slice.profile),
        };
        // SAFETY: as above.
        unsafe { put_text(name, length, &shown) }
    }
    /// Where it is on the bus.
    nvmlDeviceGetPciInfo_v3(handle, target, pci: *mut sys::nvmlPciInfo_t) {
        // SAFETY: as above.
        unsafe { put(pci, bus(&target.whole()?.pci_bus_id)) }
    }
    /// Its compute capability.
    nvmlDeviceGetCudaComputeCapability(handle, target, major: *mut c_int, minor: *mut c_int) {
        let text = known(target.gpu().compute_capability.as_deref())?;
        let (a, b) = text.split_once('.').unwrap_or((text, "0"));
        // SAFETY: as above.
        unsafe {
            put(major, a.parse().map_err(|_| NOT_SUPPORTED)?)?;
            put(minor, b.parse().map_err(|_| NOT_SUPPORTED)?)
        }
    }
    /// Its NUMA node.
    nvmlDeviceGetNumaNodeId(handle, target, node: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(node, known(target.gpu().numa_node)?) }
    }
    /// How busy it is.
    nvmlDeviceGetUtilizationRates(handle, target, rates: *mut sys::nvmlUtilization_t) {
        let gpu = known(target.whole()?.utilisation)?;
        // SAFETY: as above.
        unsafe { put(rates, sys::nvmlUtilization_t { gpu, memory: gpu / 2 }) }
    }
    /// Whether it is split.
    nvmlDeviceGetMigMode(handle, target, current: *mut c_uint, pending: *mut c_uint) {
        let on = u32::from(!target.whole()?.mig.is_empty());
        // SAFETY: as above.
        unsafe {
            put(current, on)?;
            put(pending, on)
        }
    }
    /// How many places for slices it has.
    nvmlDeviceGetMaxMigDeviceCount(handle, target, count: *mut c_uint) {
        let split = !target.whole()?.mig.is_empty();
        // SAFETY: as above.
        unsafe { put(count, if split { 7 } else { 0 }) }
    }
    /// The GPU that a slice is of.
    nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle, target, parent: *mut nvmlDevice_t) {
        target.slice()?;
        let gpu = world::gpu_of_slice(device(handle)).ok_or(crate::out::INVALID)?;
        // SAFETY: as above.
        unsafe { put(parent, std::ptr::without_provenance_mut(gpu)) }
    }
    /// The GPU instance of a slice.
    nvmlDeviceGetGpuInstanceId(handle, target, id: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(id, target.slice()?.1.gi) }
    }
    /// The compute instance of a slice.
    nvmlDeviceGetComputeInstanceId(handle, target, id: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(id, target.slice()?.1.ci) }
    }
    /// Whether it corrects errors of its memory.
    nvmlDeviceGetEccMode(handle, target, current: *mut sys::nvmlEnableState_t, pending: *mut sys::nvmlEnableState_t) {
        known(target.whole()?.ecc)?;
        // SAFETY: as above.
        unsafe {
            put(current, 1)?;
            put(pending, 1)
        }
    }
    /// Errors of its memory.
    nvmlDeviceGetTotalEccErrors(handle, target, kind: sys::nvmlMemoryErrorType_t, _counter: sys::nvmlEccCounterType_t, count: *mut c_ulonglong) {
        let (corrected, not) = known(target.whole()?.ecc)?;
        let of_kind = if kind == sys::nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_CORRECTED { corrected } else { not };
        // SAFETY: as above.
        unsafe { put(count, of_kind) }
    }
    /// Whether the driver keeps it initialised.
    nvmlDeviceGetPersistenceMode(handle, target, mode: *mut sys::nvmlEnableState_t) {
        // SAFETY: as above.
        unsafe { put(mode, u32::from(known(target.whole()?.persistence)?)) }
    }
    /// How warm it is.
    nvmlDeviceGetTemperature(handle, target, _sensor: sys::nvmlTemperatureSensors_t, degrees: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(degrees, known(target.whole()?.temperature)?) }
    }
    /// What it draws.
    nvmlDeviceGetPowerUsage(handle, target, milliwatts: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(milliwatts, known(target.whole()?.power)?.0) }
    }
    /// What it may draw.
    nvmlDeviceGetEnforcedPowerLimit(handle, target, milliwatts: *mut c_uint) {
        // SAFETY: as above.
        unsafe { put(milliwatts, known(target.whole()?.power)?.1) }
    }
    /// What it has drawn.
    nvmlDeviceGetTotalEnergyConsumption(handle, target, millijoules: *mut c_ulonglong) {
        // SAFETY: as above.
        unsafe { put(millijoules, known(target.whole()?.energy)?) }
    }
    /// A clock.
    nvmlDeviceGetClockInfo(handle, target, kind: sys::nvmlClockType_t, megahertz: *mut c_uint) {
        let (sm, memory) = known(target.whole()?.clocks)?;
        let clock = if kind == sys::nvmlClockType_enum_NVML_CLOCK_MEM { memory } else { sm };
        // SAFETY: as above.
        unsafe { put(megahertz, clock) }
    }
    /// What limits its clocks.
    nvmlDeviceGetCurrentClocksThrottleReasons(handle, target, bits: *mut c_ulonglong) {
        // SAFETY: as above.
        unsafe { put(bits, known(target.whole()?.clock_limits)?) }
    }
    /// What happens to it that can be told.
    nvmlDeviceGetSupportedEventTypes(handle, target, kinds: *mut c_ulonglong) {
        target.whole()?;
        // SAFETY: as above.
        unsafe { put(kinds, u64::from(sys::nvmlEventTypeAll)) }
    }
    /// Whether a link is up.
    nvmlDeviceGetNvLinkState(handle, target, link: c_uint, state: *mut sys::nvmlEnableState_t) {
        let links = &target.whole()?.nvlink;
        if links.is_empty() {
            return Err(NOT_SUPPORTED);
        }
        links.get(link as usize).ok_or(crate::out::INVALID)?;
        // SAFETY: as above.
        unsafe { put(state, 1) }
    }
    /// Numbers of its fields.
    nvmlDeviceGetFieldValues(handle, target, count: c_int, values: *mut sys::nvmlFieldValue_t) {
        let gpu = target.whole()?;
        if values.is_null() {
            return Err(crate::out::INVALID);
        }
        // SAFETY: not null, so by contract as many as `count` says may be read and written.
        let values = unsafe { std::slice::from_raw_parts_mut(values, usize::try_from(count).unwrap_or(0)) };
        for value in values {
            let number = match value.fieldId {
                field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION => gpu.recovery_action,
                field_id::NVML_FI_DEV_REMAPPED_PENDING => gpu.remap_pending.map(u32::from),
                field_id::NVML_FI_DEV_REMAPPED_FAILURE => gpu.remap_failed.map(u32::from),
                _ => None,
            };
            value.nvmlReturn = number.map_or(NOT_SUPPORTED, |_| sys::nvmlReturn_enum_NVML_SUCCESS);
            value.valueType = sys::nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT;
            value.value.uiVal = number.unwrap_or(0);
        }
        Ok(())
    }
}

/// The slice at a place of a GPU.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    handle: nvmlDevice_t,
    index: c_uint,
    slice: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetMigDeviceHandleByIndex", Some(device(handle)), |world| {
        let found = world.slice_handle(device(handle), index)?;
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(slice, std::ptr::without_provenance_mut(found)) }
    })
}

/// Its memory.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    handle: nvmlDevice_t,
    memory: *mut sys::nvmlMemory_v2_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetMemoryInfo_v2", Some(device(handle)), |world| {
        let used = world.used(device(handle))?;
        let (total, reserved) = match world.target(device(handle))? {
            Target::Gpu(gpu) => (gpu.vram.0, gpu.reserved.0),
            Target::Slice(_, slice) => (slice.vram.0, 0),
        };
        let free = total.saturating_sub(reserved).saturating_sub(used);
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(memory, sys::nvmlMemory_v2_t { version: 2 << 24 | 40, total, reserved, free, used }) }
    })
}

/// Processes that compute on it.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: nvmlDevice_t,
    count: *mut c_uint,
    infos: *mut sys::nvmlProcessInfo_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetComputeRunningProcesses_v3", Some(device(handle)), |world| {
        let instance = match world.target(device(handle))? {
            Target::Gpu(_) => (WHOLE, WHOLE),
            Target::Slice(_, slice) => (slice.gi, slice.ci),
        };
        let info = |(pid, bytes): &(u32, u64)| sys::nvmlProcessInfo_t {
            pid: *pid,
            usedGpuMemory: *bytes,
            gpuInstanceId: instance.0,
            computeInstanceId: instance.1,
        };
        let all: Vec<_> = world.processes(device(handle))?.iter().map(info).collect();
        // SAFETY: the caller's pointers, by NVML's contract.
        unsafe { put_list(count, infos, &all) }
    })
}

/// How near two GPUs are.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTopologyCommonAncestor(
    one: nvmlDevice_t,
    other: nvmlDevice_t,
    level: *mut sys::nvmlGpuTopologyLevel_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetTopologyCommonAncestor", Some(device(one)), |world| {
        let (a, b) = (world.target(device(one))?.whole()?, world.target(device(other))?.whole()?);
        let nearness = match (a.uuid == b.uuid, a.numa_node == b.numa_node) {
            (true, _) => sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_INTERNAL,
            (_, true) => sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE,
            _ => sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM,
        };
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(level, nearness) }
    })
}

/// Whether two GPUs reach each other's memory.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetP2PStatus(
    one: nvmlDevice_t,
    other: nvmlDevice_t,
    _capability: sys::nvmlGpuP2PCapsIndex_t,
    status: *mut sys::nvmlGpuP2PStatus_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetP2PStatus", Some(device(one)), |world| {
        let (a, b) = (world.target(device(one))?.whole()?, world.target(device(other))?.whole()?);
        let linked = a.nvlink.contains(&b.uuid);
        let code = if linked {
            sys::nvmlGpuP2PStatus_enum_NVML_P2P_STATUS_OK
        } else {
            sys::nvmlGpuP2PStatus_enum_NVML_P2P_STATUS_NOT_SUPPORTED
        };
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(status, code) }
    })
}

/// What is at the other end of a link.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    handle: nvmlDevice_t,
    link: c_uint,
    pci: *mut sys::nvmlPciInfo_t,
) -> nvmlReturn_t {
    call("nvmlDeviceGetNvLinkRemotePciInfo_v2", Some(device(handle)), |world| {
        let uuid = world.target(device(handle))?.whole()?.nvlink.get(link as usize).ok_or(NOT_SUPPORTED)?;
        let remote = world.script.device.iter().find(|d| d.uuid == *uuid).ok_or(NOT_FOUND)?;
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(pci, bus(&remote.pci_bus_id)) }
    })
}

/// A set of events.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetCreate(set: *mut nvmlEventSet_t) -> nvmlReturn_t {
    call("nvmlEventSetCreate", None, |world: &mut World| {
        let made = world.new_set();
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(set, std::ptr::without_provenance_mut(made)) }
    })
}

/// Has a set hear of a GPU.
#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceRegisterEvents(handle: nvmlDevice_t, kinds: c_ulonglong, set: nvmlEventSet_t) -> nvmlReturn_t {
    call("nvmlDeviceRegisterEvents", Some(device(handle)), |world| world.hear(set.addr(), device(handle), kinds))
}

/// Waits for an event.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetWait_v2(
    set: nvmlEventSet_t,
    data: *mut sys::nvmlEventData_t,
    timeout: c_uint,
) -> nvmlReturn_t {
    let waited = world::wait("nvmlEventSetWait_v2", set.addr(), Duration::from_millis(timeout.into()));
    let written = waited.and_then(|(handle, event)| {
        let (gpu, compute) = event.instance.unwrap_or((WHOLE, WHOLE));
        let happened = sys::nvmlEventData_t {
            device: std::ptr::without_provenance_mut(handle),
            eventType: world::kind(&event),
            eventData: event.data,
            gpuInstanceId: gpu,
            computeInstanceId: compute,
        };
        // SAFETY: the caller's pointer, by NVML's contract.
        unsafe { put(data, happened) }
    });
    written.err().unwrap_or(sys::nvmlReturn_enum_NVML_SUCCESS)
}

/// Ends a set.
#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetFree(set: nvmlEventSet_t) -> nvmlReturn_t {
    call("nvmlEventSetFree", None, |world| world.end_set(set.addr()))
}

fn bus(id: &str) -> sys::nvmlPciInfo_t {
    let number = |part: Option<&str>| part.and_then(|p| u32::from_str_radix(p, 16).ok()).unwrap_or(0);
    let mut parts = id.split([':', '.']);
    sys::nvmlPciInfo_t {
        busIdLegacy: fixed(id.get(4..).unwrap_or(id)),
        domain: number(parts.next()),
        bus: number(parts.next()),
        device: number(parts.next()),
        pciDeviceId: 0,
        pciSubSystemId: 0,
        busId: fixed(id),
    }
}
