//! What is known of a GPU or MIG slice.

use std::fmt;

/// Whether a device may be used, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceHealth {
    /// Usable.
    Ok,
    /// Engines on it run on; nothing new starts.
    Suspect(String),
    /// Engines on it are being ended in order, and nothing new starts: it has to be reset.
    Draining(String),
    /// Something of a stopped engine may still hold it, or it waits to be reset; nothing new is admitted.
    Fenced(String),
    /// Gone from the bus.
    Lost(String),
    /// The driver does not answer about it.
    Unknown(String),
}

impl DeviceHealth {
    /// Every code, for tables and metrics.
    pub const CODES: [&'static str; 6] = ["ok", "suspect", "draining", "fenced", "lost", "unknown"];

    /// Whether a new engine may start on it.
    #[must_use]
    pub fn admits(&self) -> bool {
        matches!(self, Self::Ok)
    }

    /// Why it may not be used, empty where it may.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Ok => "",
            Self::Suspect(r) | Self::Draining(r) | Self::Fenced(r) | Self::Lost(r) | Self::Unknown(r) => r,
        }
    }

    /// The state as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Suspect(_) => "suspect",
            Self::Draining(_) => "draining",
            Self::Fenced(_) => "fenced",
            Self::Lost(_) => "lost",
            Self::Unknown(_) => "unknown",
        }
    }
}

impl fmt::Display for DeviceHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            other => write!(f, "{}: {}", other.code(), other.reason()),
        }
    }
}

/// One GPU or MIG slice at one moment. Sizes are bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceSnapshot {
    /// `GPU-…` or `MIG-…`; the one stable name.
    pub uuid: String,
    /// Position in PCI bus order. A MIG slice has its parent's.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// `dddd:bb:dd.f`, where known.
    pub pci_bus_id: Option<String>,
    /// CUDA compute capability, major and minor, where known.
    pub compute_capability: Option<(u32, u32)>,
    /// NUMA node, where known.
    pub numa_node: Option<u32>,
    /// All memory.
    pub vram_total: u64,
    /// Free as the driver says.
    pub vram_free: u64,
    /// Used as the driver says.
    pub vram_used: u64,
    /// Kept by driver and firmware.
    pub vram_reserved: u64,
    /// Held by processes that are not ours.
    pub vram_foreign: u64,
    /// Compute utilisation in percent, where known.
    pub utilisation: Option<u32>,
    /// Health.
    pub health: DeviceHealth,
    /// For a MIG slice: its parent's UUID, its profile and its place on the parent.
    pub mig: Option<MigSlice>,
    /// Whether this is a GPU split into slices, which then cannot be used whole.
    pub mig_parent: bool,
    /// What somebody has to do about it.
    pub verdict: Verdict,
    /// What only some drivers tell.
    pub details: DeviceDetails,
}

/// What has to be done about a device, in the words that node operators' tools use. Nobody here does more than restart
/// engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing.
    #[default]
    None,
    /// What runs there has to start again.
    RestartApp,
    /// The device has to be reset.
    ResetDevice,
    /// The node has to be rebooted.
    RebootNode,
    /// The device has to be replaced.
    Replace,
}

impl Verdict {
    /// Every verdict, for tables and metrics.
    pub const ALL: [Self; 5] = [Self::None, Self::RestartApp, Self::ResetDevice, Self::RebootNode, Self::Replace];

    /// The verdict as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::RestartApp => "restart_app",
            Self::ResetDevice => "reset_device",
            Self::RebootNode => "reboot_node",
            Self::Replace => "replace",
        }
    }

    /// The verdict that a word names.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.code() == code)
    }

    /// The same for people; empty where nothing is to be done.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::None => "",
            Self::RestartApp => "what runs there has to start again",
            Self::ResetDevice => "reset it (nvidia-smi --gpu-reset), or reboot the node",
            Self::RebootNode => "reboot the node",
            Self::Replace => "have it replaced",
        }
    }
}

/// What only some drivers and devices tell. Unset is not told.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DeviceDetails {
    /// Errors of its memory since the driver was loaded; unset also where it has no ECC or it is off.
    pub ecc: Option<Ecc>,
    /// The state of its spare rows.
    pub remap: Option<Remap>,
    /// What the driver says has to be done, as it numbers that: 0 is nothing.
    pub recovery_action: Option<u32>,
    /// Whether the driver keeps it initialised while nobody uses it.
    pub persistence: Option<bool>,
    /// Degrees Celsius.
    pub temperature: Option<u32>,
    /// Milliwatts drawn.
    pub power: Option<u32>,
    /// Milliwatts that may be drawn.
    pub power_limit: Option<u32>,
    /// Millijoules since the driver was loaded.
    pub energy: Option<u64>,
    /// Megahertz of the multiprocessors.
    pub sm_clock: Option<u32>,
    /// Megahertz of the memory.
    pub memory_clock: Option<u32>,
    /// Share of time in percent in which memory was read or written.
    pub memory_utilisation: Option<u32>,
    /// What limits its clocks now, as one word each.
    pub clock_limits: Option<Vec<String>>,
    /// Retries on its bus since the driver was loaded.
    pub pcie_replays: Option<u64>,
    /// Set: errors that the driver reports of it are not heard, and why.
    pub unheard: Option<String>,
    /// The other GPUs of the node, as this one reaches them.
    pub peers: Vec<Peer>,
    /// GPU instance and compute instance of a slice.
    pub instance: Option<(u32, u32)>,
    /// Who holds memory on it.
    pub processes: Vec<DeviceProcess>,
}

/// Errors of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ecc {
    /// That were corrected.
    pub corrected: u64,
    /// That were not.
    pub uncorrected: u64,
}

/// Spare rows of a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remap {
    /// Some wait for a reset to take the place of bad ones.
    pub pending: bool,
    /// None was left for a bad one.
    pub failed: bool,
}

/// Another GPU of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its UUID.
    pub uuid: String,
    /// What lies between: `internal`, `single_switch`, `switches`, `host_bridge`, `numa_node`, `system`.
    pub path: Option<String>,
    /// Whether the two reach each other's memory.
    pub p2p: Option<bool>,
    /// NVLinks between them that are up.
    pub nvlinks: u32,
}

/// A process that holds memory on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceProcess {
    /// Its pid, as the driver tells it.
    pub pid: u32,
    /// Its name, where it can be looked up.
    pub name: Option<String>,
    /// Bytes.
    pub bytes: u64,
    /// Whether it is of one of our engines.
    pub ours: bool,
}

/// Where a MIG slice belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigSlice {
    /// UUID of the GPU.
    pub parent: String,
    /// For example `1g.12gb`.
    pub profile: String,
    /// Place on the parent, as in `0:1`.
    pub index: u32,
}

/// A whole GPU for tests, the `index`-th on its bus.
#[cfg(test)]
pub(crate) fn test_gpu(index: u32) -> DeviceSnapshot {
    DeviceSnapshot {
        uuid: format!("GPU-51000000-0000-4000-8000-{index:012x}"),
        index,
        name: "test".into(),
        pci_bus_id: Some(format!("00000000:{:02x}:00.0", index + 1)),
        compute_capability: None,
        numa_node: None,
        vram_total: 1,
        vram_free: 1,
        vram_used: 0,
        vram_reserved: 0,
        vram_foreign: 0,
        utilisation: None,
        health: DeviceHealth::Ok,
        mig: None,
        mig_parent: false,
        verdict: Verdict::None,
        details: DeviceDetails::default(),
    }
}
