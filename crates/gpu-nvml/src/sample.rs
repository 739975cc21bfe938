//! The questions put to NVML.

use std::collections::BTreeMap;
use std::fs;

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError as Raw;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id;
use nvml_wrapper::{Device, Nvml};
use pool_domain::device::{DeviceProcess, Ecc, MigSlice, Peer, Remap};
use pool_domain::{DeviceDetails, DeviceHealth, DeviceSnapshot};
use pool_services::ports::{Holder, Inventory, Residency};

use crate::convert::{self, Memory, Reading, Silent};
use crate::error::NvmlError;
use crate::watcher::{About, Pulse};
use crate::{peers, raw};

/// What of a GPU does not change while the driver is loaded.
#[derive(Debug, Clone, Default)]
struct Fixed {
    name: Option<String>,
    bus_id: Option<String>,
    compute_capability: Option<(i32, i32)>,
    numa_node: Option<u32>,
}

/// Asks, and keeps what need not be asked again. Handles are never kept: those of slices go stale, and may mean another one.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    fixed: BTreeMap<String, Fixed>,
    /// UUIDs by NVML's index, as they were found last.
    order: Vec<Option<String>>,
    peers: BTreeMap<String, Vec<Peer>>,
    versions: Option<(Option<String>, Option<String>)>,
    /// The GPUs are other ones than they were.
    changed: bool,
    /// Why a place was left out when the devices were looked at last.
    left_out: Option<NvmlError>,
}

/// A GPU as it was found.
struct Found<'nvml> {
    device: Device<'nvml>,
    uuid: String,
}

/// What is at NVML's places.
#[derive(Default)]
struct Places<'nvml> {
    /// GPUs that answer.
    found: Vec<Found<'nvml>>,
    /// Those that did before, by UUID.
    failed: Vec<(String, Raw)>,
    /// Those that may never have said who they are.
    silent: Vec<Silent>,
}

impl Sampler {
    /// Whether the GPUs are other ones than when this was asked last.
    pub(crate) fn changed(&self) -> bool {
        self.changed
    }

    /// The UUIDs that were found last.
    pub(crate) fn known(&self) -> impl Iterator<Item = &str> {
        self.order.iter().flatten().map(String::as_str)
    }

    /// Why there is none, if there is none.
    pub(crate) fn why_none(&self) -> NvmlError {
        self.left_out.clone().unwrap_or(NvmlError::NoDevice)
    }

    /// The inventory of now, given the devices known so far.
    pub(crate) fn inventory(
        &mut self,
        nvml: &Nvml,
        before: &[DeviceSnapshot],
        pulse: &Pulse<'_>,
    ) -> Result<Inventory, NvmlError> {
        let Places { found, failed, silent } = self.find(nvml, pulse)?;
        let mut now = Vec::new();
        for gpu in &found {
            pulse.calls(About::Device(gpu.uuid.clone()));
            self.read_gpu(gpu, &mut now)?;
        }
        // One that failed as a whole is there, as far as anybody knows.
        for (uuid, error) in failed {
            now.extend(convert::failed(before, &uuid, &error));
        }
        let nameless = convert::nameless(before, &now, silent);
        let problem = convert::unread(&nameless);
        now.extend(nameless);
        let devices = convert::number(convert::keep_lost(before, now));
        let (driver, cuda) = self.versions.get_or_insert_with(|| versions(nvml)).clone();
        let problem = if devices.is_empty() { Some(self.why_none().to_string()) } else { problem };
        Ok(Inventory { simulated: false, driver, cuda, devices, problem })
    }

    /// Every process with a compute context.
    pub(crate) fn residency(&mut self, nvml: &Nvml, pulse: &Pulse<'_>) -> Residency {
        match self.holders(nvml, pulse) {
            // The driver may tell pids of the host, or ours, or nobody's, according to its version.
            Ok((holders, whole)) if whole && sees_host_pids() => Residency::Provable(holders),
            Ok((holders, _)) => Residency::Partial(holders),
            Err(raw) => Residency::Unknown(NvmlError::from(raw).to_string()),
        }
    }

    /// Who holds memory, and whether every device told. A lost one holds nobody's.
    fn holders(&mut self, nvml: &Nvml, pulse: &Pulse<'_>) -> Result<(Vec<Holder>, bool), Raw> {
        let Places { found, failed, silent } = self.find(nvml, pulse)?;
        let lost = |s: &Silent| matches!(s.health, DeviceHealth::Lost(_));
        let (mut holders, mut whole) = (Vec::new(), failed.is_empty() && silent.iter().all(lost));
        for gpu in &found {
            pulse.calls(About::Device(gpu.uuid.clone()));
            match holders_on(gpu) {
                Ok(found) => holders.extend(found),
                Err(error) if of_the_driver(&error) => return Err(error),
                Err(Raw::GpuLost) => {}
                Err(_) => whole = false,
            }
        }
        Ok((holders, whole))
    }

    /// The GPUs that answer, and their UUIDs.
    pub(crate) fn gpus<'nvml>(
        &mut self,
        nvml: &'nvml Nvml,
        pulse: &Pulse<'_>,
    ) -> Result<Vec<(Device<'nvml>, String)>, Raw> {
        let places = self.find(nvml, pulse)?;
        self.changed = false;
        Ok(places.found.into_iter().map(|f| (f.device, f.uuid)).collect())
    }

    /// Looks at every place that NVML counts.
    fn find<'nvml>(&mut self, nvml: &'nvml Nvml, pulse: &Pulse<'_>) -> Result<Places<'nvml>, Raw> {
        pulse.calls(About::Driver);
        let count = nvml.device_count()?;
        let (mut places, mut order) = (Places::default(), Vec::new());
        let (mut kept_from_us, mut unusable) = (None, None);
        for index in 0..count {
            let known = self.order.get(index as usize).cloned().flatten();
            pulse.calls(known.clone().map_or(About::Driver, About::Device));
            let (bus_id, error) = match at(nvml, index) {
                Ok(found) => {
                    order.push(Some(found.uuid.clone()));
                    places.found.push(found);
                    continue;
                }
                Err(failed) => failed,
            };
            match error {
                error if of_the_driver(&error) => return Err(error),
                // Counted, but kept from us (another container's), or gone while it was asked.
                Raw::NoPermission | Raw::OperatingSystem | Raw::NotFound | Raw::InvalidArg => {
                    kept_from_us = Some(NvmlError::from(error));
                    order.push(None);
                }
                error => {
                    unusable = Some(NvmlError::Unusable { count, why: error.to_string() });
                    // One that fell off the bus may come back as another.
                    let known = known.filter(|_| !matches!(error, Raw::GpuLost));
                    match &known {
                        Some(uuid) => places.failed.push((uuid.clone(), error)),
                        None => places.silent.push(Silent { index, bus_id, health: convert::health(&error) }),
                    }
                    order.push(known);
                }
            }
        }
        self.left_out = unusable.or(kept_from_us);
        if order != self.order {
            self.order = order;
            self.changed = true;
            self.peers = peers::matrix(
                nvml,
                pulse,
                &places.found.iter().map(|f| (&f.device, f.uuid.as_str())).collect::<Vec<_>>(),
            );
        }
        Ok(places)
    }

    fn read_gpu(&mut self, gpu: &Found<'_>, now: &mut Vec<DeviceSnapshot>) -> Result<(), Raw> {
        let (device, split) = (&gpu.device, mig_enabled(&gpu.device));
        let fixed = self.fixed.entry(gpu.uuid.clone()).or_insert_with(|| fixed(device)).clone();
        let reading = Reading {
            uuid: gpu.uuid.clone(),
            name: fixed.name.clone(),
            bus_id: fixed.bus_id,
            compute_capability: fixed.compute_capability,
            numa_node: fixed.numa_node,
            memory: memory(device)?,
            utilisation: device.utilization_rates().ok().map(|u| u.gpu),
            mig: None,
            mig_parent: split,
            details: DeviceDetails {
                peers: self.peers.get(&gpu.uuid).cloned().unwrap_or_default(),
                ..details(device, !split)
            },
        };
        now.push(convert::snapshot(reading));
        if !split {
            return Ok(());
        }
        for (slice, uuid, place) in slices(device)? {
            let name = slice.name().ok();
            let profile = convert::profile(name.as_deref().unwrap_or_default());
            now.push(convert::snapshot(Reading {
                uuid,
                name,
                // A slice has neither a bus id nor a utilisation of its own.
                bus_id: None,
                compute_capability: fixed.compute_capability,
                numa_node: fixed.numa_node,
                memory: memory(&slice)?,
                utilisation: None,
                mig: Some(MigSlice { parent: gpu.uuid.clone(), profile, index: place }),
                mig_parent: false,
                details: DeviceDetails {
                    instance: raw::instance(&slice).ok(),
                    processes: processes(&slice),
                    ..DeviceDetails::default()
                },
            }));
        }
        Ok(())
    }
}

/// The GPU at a place, or its bus id, if it tells that, and what it fails with.
fn at(nvml: &Nvml, index: u32) -> Result<Found<'_>, (Option<String>, Raw)> {
    let device = nvml.device_by_index(index).map_err(|error| (None, error))?;
    match device.uuid() {
        Ok(uuid) => Ok(Found { device, uuid }),
        Err(error) => Err((device.pci_info().ok().map(|p| p.bus_id), error)),
    }
}

/// The processes of a split GPU are told slice by slice.
fn holders_on(gpu: &Found<'_>) -> Result<Vec<Holder>, Raw> {
    let of = |device: &Device<'_>, uuid: &str| -> Result<Vec<Holder>, Raw> {
        Ok(device.running_compute_processes()?.iter().map(|p| convert::holder(uuid, p)).collect())
    };
    if !mig_enabled(&gpu.device) {
        return of(&gpu.device, &gpu.uuid);
    }
    let mut holders = Vec::new();
    for (slice, uuid, _) in slices(&gpu.device)? {
        holders.extend(of(&slice, &uuid)?);
    }
    Ok(holders)
}

/// Errors that are not of one device.
fn of_the_driver(error: &Raw) -> bool {
    matches!(error, Raw::DriverNotLoaded | Raw::LibRmVersionMismatch | Raw::Uninitialized | Raw::LibraryNotFound)
}

fn versions(nvml: &Nvml) -> (Option<String>, Option<String>) {
    let cuda = nvml.sys_cuda_driver_version().ok();
    (nvml.sys_driver_version().ok(), cuda.map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)))
}

fn fixed(device: &Device<'_>) -> Fixed {
    Fixed {
        name: device.name().ok(),
        bus_id: device.pci_info().ok().map(|p| p.bus_id),
        compute_capability: device.cuda_compute_capability().ok().map(|c| (c.major, c.minor)),
        numa_node: device.numa_node_id().ok(),
    }
}

fn memory(device: &Device<'_>) -> Result<Result<Memory, Raw>, Raw> {
    match device.memory_info() {
        Err(error) if of_the_driver(&error) => Err(error),
        told => Ok(told.map(|m| Memory { total: m.total, free: m.free, used: m.used, reserved: m.reserved })),
    }
}

/// What is not told is left out. `whole`: its processes are not told slice by slice.
fn details(device: &Device<'_>, whole: bool) -> DeviceDetails {
    let count = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
    let ecc = device.is_ecc_enabled().ok().filter(|state| state.currently_enabled).and_then(|_| {
        Some(Ecc { corrected: count(MemoryError::Corrected)?, uncorrected: count(MemoryError::Uncorrected)? })
    });
    let [pending, failed, recovery_action] = fields(
        device,
        [
            field_id::NVML_FI_DEV_REMAPPED_PENDING,
            field_id::NVML_FI_DEV_REMAPPED_FAILURE,
            field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
        ],
    );
    let remap = pending.zip(failed).map(|(pending, failed)| Remap { pending: pending != 0, failed: failed != 0 });
    DeviceDetails {
        ecc,
        remap,
        recovery_action: recovery_action.and_then(|n| n.try_into().ok()),
        persistence: device.is_in_persistent_mode().ok(),
        temperature: device.temperature(TemperatureSensor::Gpu).ok(),
        power: device.power_usage().ok(),
        power_limit: device.enforced_power_limit().ok(),
        energy: device.total_energy_consumption().ok(),
        sm_clock: device.clock_info(Clock::SM).ok(),
        memory_clock: device.clock_info(Clock::Memory).ok(),
        memory_utilisation: device.utilization_rates().ok().map(|u| u.memory),
        clock_limits: device.current_throttle_reasons().ok().map(clock_limits),
        pcie_replays: device.pcie_replay_counter().ok().map(u64::from),
        processes: if whole { processes(device) } else { Vec::new() },
        ..DeviceDetails::default()
    }
}

/// Numbers of a device that have no call of their own.
fn fields<const N: usize>(device: &Device<'_>, ids: [u32; N]) -> [Option<u64>; N] {
    let mut numbers = [None; N];
    let asked: Vec<_> = ids.iter().map(|&id| FieldId(id)).collect();
    let told = device.field_values_for(&asked).unwrap_or_default();
    for (number, sample) in numbers.iter_mut().zip(told) {
        *number = match sample.and_then(|s| s.value) {
            Ok(SampleValue::U32(n)) => Some(n.into()),
            Ok(SampleValue::U64(n)) => Some(n),
            Ok(SampleValue::I64(n)) => n.try_into().ok(),
            Ok(SampleValue::F64(_)) | Err(_) => None,
        };
    }
    numbers
}

fn clock_limits(reasons: ThrottleReasons) -> Vec<String> {
    let words = [
        (ThrottleReasons::GPU_IDLE, "idle"),
        (ThrottleReasons::APPLICATIONS_CLOCKS_SETTING, "clocks_setting"),
        (ThrottleReasons::SW_POWER_CAP, "power_cap"),
        (ThrottleReasons::HW_SLOWDOWN, "hardware_slowdown"),
        (ThrottleReasons::SYNC_BOOST, "sync_boost"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "thermal"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hardware_thermal"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power_brake"),
    ];
    words.iter().filter(|(bit, _)| reasons.contains(*bit)).map(|(_, word)| (*word).to_owned()).collect()
}

/// Who holds memory, for people: also those that draw.
fn processes(device: &Device<'_>) -> Vec<DeviceProcess> {
    let mut all = device.running_compute_processes().unwrap_or_default();
    all.extend(device.running_graphics_processes().unwrap_or_default());
    let mut told: Vec<DeviceProcess> = Vec::new();
    for process in &all {
        if told.iter().any(|p| p.pid == process.pid) {
            continue;
        }
        let bytes = convert::holder("", process).bytes;
        told.push(DeviceProcess { pid: process.pid, name: name_of(process.pid), bytes, ours: false });
    }
    told
}

/// Of another namespace's pid there is no name here, or somebody else's.
fn name_of(pid: u32) -> Option<String> {
    let name = sees_host_pids().then(|| fs::read_to_string(format!("/proc/{pid}/comm")).ok())??;
    Some(name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}

/// The slices of a GPU, each with its place. Places may be empty.
fn slices<'nvml>(gpu: &Device<'nvml>) -> Result<Vec<(Device<'nvml>, String, u32)>, Raw> {
    let mut found = Vec::new();
    for place in 0..gpu.mig_device_count()? {
        match gpu.mig_device_by_index(place).and_then(|d| d.uuid().map(|u| (d, u))) {
            Ok((slice, uuid)) => found.push((slice, uuid, place)),
            Err(error) if of_the_driver(&error) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

fn mig_enabled(device: &Device<'_>) -> bool {
    device.mig_mode().is_ok_and(|mode| mode.current == 1)
}

/// Whether our pids are those of the host: the first pid namespace has a fixed number.
fn sees_host_pids() -> bool {
    fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == "pid:[4026531836]")
}
