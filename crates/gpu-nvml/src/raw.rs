//! What nvml-wrapper has no form of: which slice an event is about, and kinds of events that it has no name for.
#![expect(unsafe_code, reason = "NVML's functions are C; the wrapper drops what they say of slices")]

use std::mem;

use nvml_wrapper::error::{NvmlError as Raw, nvml_sym, nvml_try};
use nvml_wrapper::{Device, EventSet, Nvml};

/// NVML's number for "all instances".
const WHOLE: u32 = u32::MAX;

/// Something that happened.
#[derive(Debug)]
pub(crate) struct Happened {
    /// What [`key`] tells of the device.
    pub(crate) key: usize,
    /// NVML's bit of its kind.
    pub(crate) kind: u64,
    /// The XID, for an XID.
    pub(crate) data: u64,
    /// GPU and compute instance, if it is about one slice.
    pub(crate) instance: Option<(u32, u32)>,
}

/// Waits for an event, as [`EventSet::wait`] does, and keeps all that it says.
pub(crate) fn wait(nvml: &Nvml, set: &EventSet<'_>, timeout_ms: u32) -> Result<Happened, Raw> {
    let sym = nvml_sym(nvml.lib().nvmlEventSetWait_v2.as_ref())?;
    // SAFETY: a plain C struct of numbers and a handle, for which zero is a value.
    let mut data = unsafe { mem::zeroed() };
    // SAFETY: the set is of this library and alive for as long as it is borrowed; `data` may be written.
    nvml_try(unsafe { sym(set.handle(), &raw mut data, timeout_ms) })?;
    let whole = data.gpuInstanceId == WHOLE;
    let instance = (!whole).then_some((data.gpuInstanceId, data.computeInstanceId));
    Ok(Happened { key: data.device.addr(), kind: data.eventType, data: data.eventData, instance })
}

/// GPU and compute instance of a slice.
pub(crate) fn instance(slice: &Device<'_>) -> Result<(u32, u32), Raw> {
    let lib = slice.nvml().lib();
    let (gpu, compute) =
        (nvml_sym(lib.nvmlDeviceGetGpuInstanceId.as_ref())?, nvml_sym(lib.nvmlDeviceGetComputeInstanceId.as_ref())?);
    let (mut gi, mut ci) = (0, 0);
    // SAFETY: the handle is of this library, which is alive for as long as the device is borrowed; both may be written.
    unsafe {
        nvml_try(gpu(slice.handle(), &raw mut gi))?;
        nvml_try(compute(slice.handle(), &raw mut ci))?;
    }
    Ok((gi, ci))
}

/// What names a device among those of this library.
pub(crate) fn key(device: &Device<'_>) -> usize {
    // SAFETY: the handle is not used, only looked at.
    unsafe { device.handle() }.addr()
}

/// NVML's bits of the events that a device can tell of, also of those that the wrapper has no name for.
pub(crate) fn supported_events(device: &Device<'_>) -> Result<u64, Raw> {
    let sym = nvml_sym(device.nvml().lib().nvmlDeviceGetSupportedEventTypes.as_ref())?;
    let mut kinds = 0;
    // SAFETY: the handle is of this library, which is alive for as long as the device is borrowed; `kinds` may be written.
    nvml_try(unsafe { sym(device.handle(), &raw mut kinds) })?;
    Ok(kinds)
}

/// Has a set hear of a device. The set stays, also when it does not.
pub(crate) fn register(device: &Device<'_>, kinds: u64, set: &EventSet<'_>) -> Result<(), Raw> {
    let sym = nvml_sym(device.nvml().lib().nvmlDeviceRegisterEvents.as_ref())?;
    // SAFETY: handle and set are of one library, which is alive for as long as they are borrowed.
    nvml_try(unsafe { sym(device.handle(), kinds, set.handle()) })
}
