//! The questions put to NVML.

use std::fs;

use nvml_wrapper::error::NvmlError as Raw;
use nvml_wrapper::{Device, Nvml};
use pool_domain::DeviceSnapshot;
use pool_domain::device::MigSlice;
use pool_services::ports::{Inventory, Residency};

use crate::convert::{self, Memory, Reading};
use crate::error::NvmlError;

/// The inventory of now, given the devices known so far. An error of the driver as a whole makes all of them unknown.
pub(crate) fn inventory(nvml: &Nvml, before: &[DeviceSnapshot]) -> Inventory {
    let driver = nvml.sys_driver_version().ok();
    match devices(nvml) {
        Ok(now) => {
            let devices = convert::number(convert::keep_lost(before, now));
            let problem = devices.is_empty().then(|| NvmlError::NoDevice.to_string());
            Inventory { simulated: false, driver, devices, problem }
        }
        Err(raw) => {
            let why = NvmlError::from(raw).to_string();
            Inventory { simulated: false, driver, devices: convert::all_unknown(before, &why), problem: Some(why) }
        }
    }
}

fn devices(nvml: &Nvml) -> Result<Vec<DeviceSnapshot>, Raw> {
    let mut found = Vec::new();
    for_each_device(nvml, |device, uuid, slice| {
        // A slice has neither a bus id nor a utilisation of its own.
        let own = slice.is_none();
        let reading = Reading {
            name: device.name().ok(),
            bus_id: own.then(|| device.pci_info().ok()).flatten().map(|p| p.bus_id),
            compute_capability: device.cuda_compute_capability().ok().map(|c| (c.major, c.minor)),
            numa_node: device.numa_node_id().ok(),
            memory: device.memory_info().map(|m| Memory {
                total: m.total,
                free: m.free,
                used: m.used,
                reserved: m.reserved,
            }),
            utilisation: own.then(|| device.utilization_rates().ok()).flatten().map(|u| u.gpu),
            mig_parent: own && mig_enabled(device),
            mig: slice,
            uuid,
        };
        found.push(convert::snapshot(reading));
        Ok(())
    })?;
    Ok(found)
}

/// Every process with a compute context, if the answer is a proof.
pub(crate) fn residency(nvml: &Nvml) -> Residency {
    if !sees_host_pids() {
        return Residency::Unknown(
            "this process has a pid namespace of its own, but the driver tells pids of the host: run with the host's \
             (Kubernetes: hostPID: true; containers: --pid=host)"
                .to_owned(),
        );
    }
    let mut holders = Vec::new();
    let asked = for_each_device(nvml, |device, uuid, _| {
        // The processes of a split GPU are told slice by slice.
        if !mig_enabled(device) {
            holders.extend(device.running_compute_processes()?.iter().map(|p| convert::holder(&uuid, p)));
        }
        Ok(())
    });
    match asked {
        Ok(()) => Residency::Provable(holders),
        Err(raw) => Residency::Unknown(NvmlError::from(raw).to_string()),
    }
}

/// Visits every GPU and every slice. Handles are looked up anew each time, since those of slices go stale.
fn for_each_device(
    nvml: &Nvml,
    mut visit: impl FnMut(&Device<'_>, String, Option<MigSlice>) -> Result<(), Raw>,
) -> Result<(), Raw> {
    for index in 0..nvml.device_count()? {
        let (device, uuid) = match nvml.device_by_index(index).and_then(|d| d.uuid().map(|uuid| (d, uuid))) {
            Ok(found) => found,
            // Counted, but kept from us (another container's), or gone: it is missed by its UUID.
            Err(Raw::NoPermission | Raw::OperatingSystem | Raw::GpuLost | Raw::NotFound | Raw::InvalidArg) => continue,
            Err(raw) => return Err(raw),
        };
        visit(&device, uuid.clone(), None)?;
        if !mig_enabled(&device) {
            continue;
        }
        for place in 0..device.mig_device_count()? {
            let (slice, slice_uuid) = match device.mig_device_by_index(place).and_then(|d| d.uuid().map(|u| (d, u))) {
                Ok(found) => found,
                // Places may be empty.
                Err(Raw::NotFound | Raw::InvalidArg) => continue,
                Err(raw) => return Err(raw),
            };
            let profile = convert::profile(&slice.name().unwrap_or_default());
            visit(&slice, slice_uuid, Some(MigSlice { parent: uuid.clone(), profile, index: place }))?;
        }
    }
    Ok(())
}

fn mig_enabled(device: &Device<'_>) -> bool {
    device.mig_mode().is_ok_and(|mode| mode.current == 1)
}

/// Whether our pids are those of the host, which are the ones NVML tells: the first pid namespace has a fixed number.
fn sees_host_pids() -> bool {
    fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == "pid:[4026531836]")
}
