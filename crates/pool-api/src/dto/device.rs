//! Devices on the wire, in both directions.

use pool_domain::device::{DeviceProcess, Ecc, MigSlice, Peer, Remap};
use pool_domain::{DeviceDetails, DeviceHealth, DeviceSnapshot, Verdict};
use pool_services::snapshot::XidCount;
use serde::{Deserialize, Serialize};

use super::DtoError;
use super::from_wire::{capability, wrong};

dtos! {
    /// Where a MIG slice belongs.
    MigView {
        /// UUID of the GPU.
        parent: String,
        /// For example `1g.12gb`.
        profile: String,
        /// Place on the parent.
        index: u32,
    }
    /// One GPU or MIG slice.
    DeviceView {
        /// `GPU-…` or `MIG-…`.
        uuid: String,
        /// Position in PCI bus order.
        index: u32,
        /// Product name.
        name: String,
        /// PCI bus id, where known.
        pci_bus_id: Option<String>,
        /// CUDA compute capability such as `8.9`, where known.
        compute_capability: Option<String>,
        /// NUMA node, where known.
        numa_node: Option<u32>,
        /// All memory.
        vram_total_bytes: u64,
        /// Free as the driver says.
        vram_free_bytes: u64,
        /// Used as the driver says.
        vram_used_bytes: u64,
        /// Reserved for our engines.
        vram_reserved_bytes: u64,
        /// Kept by driver and firmware.
        vram_driver_bytes: u64,
        /// Held by processes that are not ours.
        vram_foreign_bytes: u64,
        /// Compute utilisation in percent, where known.
        utilisation_percent: Option<u32>,
        /// `ok`, `suspect`, `draining`, `fenced`, `lost` or `unknown`.
        health: String,
        /// Why, where it is not `ok`.
        health_detail: String,
        /// For a MIG slice: where it belongs.
        mig: Option<MigView>,
        /// A GPU split into slices.
        mig_parent: bool,
        /// What somebody has to do: `none`, `restart_app`, `reset_device`, `reboot_node` or `replace`.
        #[serde(default)]
        verdict: String,
        /// The same for people, empty for `none`.
        #[serde(default)]
        advice: String,
        /// What only some drivers and devices tell.
        #[serde(default)]
        details: DetailsView,
    }

    /// Errors of a device's memory since the driver was loaded.
    EccView {
        /// That were corrected.
        corrected: u64,
        /// That were not.
        uncorrected: u64,
    }
    /// Spare rows of a device's memory.
    RemapView {
        /// Some wait for a reset to take the place of bad ones.
        pending: bool,
        /// None was left for a bad one.
        failed: bool,
    }
    /// Another GPU of the node, as a GPU reaches it.
    PeerView {
        /// Its UUID.
        uuid: String,
        /// What lies between: `internal`, `single_switch`, `switches`, `host_bridge`, `numa_node` or `system`.
        path: Option<String>,
        /// Whether the two reach each other's memory.
        p2p: Option<bool>,
        /// NVLinks between them that are up.
        nvlinks: u32,
    }
    /// A process that holds memory on a device.
    ProcessView {
        /// Its pid, as the driver tells it.
        pid: u32,
        /// Its name, where it can be looked up.
        name: Option<String>,
        /// Bytes.
        vram_bytes: u64,
        /// Whether it is of one of our engines.
        ours: bool,
    }
    /// An XID that the driver reported.
    XidView {
        /// UUID of the GPU or slice.
        device: String,
        /// Its number.
        xid: u64,
        /// How often.
        count: u64,
    }
}

/// What only some drivers and devices tell. What is missing is not told.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(default)]
pub struct DetailsView {
    /// Errors of its memory.
    pub ecc: Option<EccView>,
    /// Its spare rows.
    pub remap: Option<RemapView>,
    /// What the driver says has to be done, as it numbers that: 0 is nothing.
    pub recovery_action: Option<u32>,
    /// Whether the driver keeps it initialised while nobody uses it.
    pub persistence: Option<bool>,
    /// Degrees Celsius.
    pub temperature_celsius: Option<u32>,
    /// Milliwatts drawn.
    pub power_milliwatts: Option<u32>,
    /// Milliwatts that may be drawn.
    pub power_limit_milliwatts: Option<u32>,
    /// Millijoules drawn since the driver was loaded.
    pub energy_millijoules: Option<u64>,
    /// Clock of the multiprocessors.
    pub sm_clock_mhz: Option<u32>,
    /// Clock of the memory.
    pub memory_clock_mhz: Option<u32>,
    /// Share of time in which memory was read or written.
    pub memory_utilisation_percent: Option<u32>,
    /// What limits its clocks now.
    pub clock_limits: Option<Vec<String>>,
    /// Retries on its bus since the driver was loaded.
    pub pcie_replays: Option<u64>,
    /// Set: errors that the driver reports of it are not heard, and why.
    pub unheard: Option<String>,
    /// The other GPUs of the node.
    pub peers: Vec<PeerView>,
    /// Of a slice: its GPU instance.
    pub gpu_instance: Option<u32>,
    /// Of a slice: its compute instance.
    pub compute_instance: Option<u32>,
    /// Who holds memory on it.
    pub processes: Vec<ProcessView>,
}

impl From<&(DeviceSnapshot, u64)> for DeviceView {
    fn from((d, reserved): &(DeviceSnapshot, u64)) -> Self {
        Self {
            uuid: d.uuid.clone(),
            index: d.index,
            name: d.name.clone(),
            pci_bus_id: d.pci_bus_id.clone(),
            compute_capability: d.compute_capability.map(|(a, b)| format!("{a}.{b}")),
            numa_node: d.numa_node,
            vram_total_bytes: d.vram_total,
            vram_free_bytes: d.vram_free,
            vram_used_bytes: d.vram_used,
            vram_reserved_bytes: *reserved,
            vram_driver_bytes: d.vram_reserved,
            vram_foreign_bytes: d.vram_foreign,
            utilisation_percent: d.utilisation,
            health: d.health.code().into(),
            health_detail: d.health.reason().into(),
            mig: d.mig.as_ref().map(|m| MigView {
                parent: m.parent.clone(),
                profile: m.profile.clone(),
                index: m.index,
            }),
            mig_parent: d.mig_parent,
            verdict: d.verdict.code().into(),
            advice: d.verdict.advice().into(),
            details: DetailsView::from(&d.details),
        }
    }
}

impl TryFrom<DeviceView> for (DeviceSnapshot, u64) {
    type Error = DtoError;
    fn try_from(d: DeviceView) -> Result<Self, DtoError> {
        let health = match d.health.as_str() {
            "ok" => DeviceHealth::Ok,
            "suspect" => DeviceHealth::Suspect(d.health_detail),
            "draining" => DeviceHealth::Draining(d.health_detail),
            "fenced" => DeviceHealth::Fenced(d.health_detail),
            "lost" => DeviceHealth::Lost(d.health_detail),
            _ => DeviceHealth::Unknown(d.health_detail),
        };
        let verdict = match d.verdict.as_str() {
            // Of a daemon that does not tell.
            "" => Verdict::None,
            code => Verdict::from_code(code).ok_or_else(|| wrong("verdict", code))?,
        };
        let device = DeviceSnapshot {
            uuid: d.uuid,
            index: d.index,
            name: d.name,
            pci_bus_id: d.pci_bus_id,
            compute_capability: d.compute_capability.as_deref().map(capability).transpose()?,
            numa_node: d.numa_node,
            vram_total: d.vram_total_bytes,
            vram_free: d.vram_free_bytes,
            vram_used: d.vram_used_bytes,
            vram_reserved: d.vram_driver_bytes,
            vram_foreign: d.vram_foreign_bytes,
            utilisation: d.utilisation_percent,
            health,
            mig: d.mig.map(|m| MigSlice { parent: m.parent, profile: m.profile, index: m.index }),
            mig_parent: d.mig_parent,
            verdict,
            details: d.details.into(),
        };
        Ok((device, d.vram_reserved_bytes))
    }
}

impl From<&DeviceDetails> for DetailsView {
    fn from(d: &DeviceDetails) -> Self {
        Self {
            ecc: d.ecc.map(|e| EccView { corrected: e.corrected, uncorrected: e.uncorrected }),
            remap: d.remap.map(|r| RemapView { pending: r.pending, failed: r.failed }),
            recovery_action: d.recovery_action,
            persistence: d.persistence,
            temperature_celsius: d.temperature,
            power_milliwatts: d.power,
            power_limit_milliwatts: d.power_limit,
            energy_millijoules: d.energy,
            sm_clock_mhz: d.sm_clock,
            memory_clock_mhz: d.memory_clock,
            memory_utilisation_percent: d.memory_utilisation,
            clock_limits: d.clock_limits.clone(),
            pcie_replays: d.pcie_replays,
            unheard: d.unheard.clone(),
            peers: d.peers.iter().map(Into::into).collect(),
            gpu_instance: d.instance.map(|(gi, _)| gi),
            compute_instance: d.instance.map(|(_, ci)| ci),
            processes: d.processes.iter().map(Into::into).collect(),
        }
    }
}

impl From<DetailsView> for DeviceDetails {
    fn from(d: DetailsView) -> Self {
        Self {
            ecc: d.ecc.map(|e| Ecc { corrected: e.corrected, uncorrected: e.uncorrected }),
            remap: d.remap.map(|r| Remap { pending: r.pending, failed: r.failed }),
            recovery_action: d.recovery_action,
            persistence: d.persistence,
            temperature: d.temperature_celsius,
            power: d.power_milliwatts,
            power_limit: d.power_limit_milliwatts,
            energy: d.energy_millijoules,
            sm_clock: d.sm_clock_mhz,
            memory_clock: d.memory_clock_mhz,
            memory_utilisation: d.memory_utilisation_percent,
            clock_limits: d.clock_limits,
            pcie_replays: d.pcie_replays,
            unheard: d.unheard,
            peers: d.peers.into_iter().map(Into::into).collect(),
            instance: d.gpu_instance.zip(d.compute_instance),
            processes: d.processes.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<&Peer> for PeerView {
    fn from(p: &Peer) -> Self {
        Self { uuid: p.uuid.clone(), path: p.path.clone(), p2p: p.p2p, nvlinks: p.nvlinks }
    }
}

impl From<PeerView> for Peer {
    fn from(p: PeerView) -> Self {
        Self { uuid: p.uuid, path: p.path, p2p: p.p2p, nvlinks: p.nvlinks }
    }
}

impl From<&DeviceProcess> for ProcessView {
    fn from(p: &DeviceProcess) -> Self {
        Self { pid: p.pid, name: p.name.clone(), vram_bytes: p.bytes, ours: p.ours }
    }
}

impl From<ProcessView> for DeviceProcess {
    fn from(p: ProcessView) -> Self {
        Self { pid: p.pid, name: p.name, bytes: p.vram_bytes, ours: p.ours }
    }
}

impl From<&XidCount> for XidView {
    fn from(x: &XidCount) -> Self {
        Self { device: x.device.clone(), xid: x.xid, count: x.count }
    }
}

impl From<XidView> for XidCount {
    fn from(x: XidView) -> Self {
        Self { device: x.device, xid: x.xid, count: x.count }
    }
}
