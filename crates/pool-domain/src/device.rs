//! What is known of a GPU or MIG slice.

use std::fmt;

/// Whether a device may be used, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceHealth {
    /// Usable.
    Ok,
    /// Engines on it run on; nothing new starts.
    Suspect(String),
    /// Something of a stopped engine may still hold it; nothing new is admitted.
    Fenced(String),
    /// Gone from the bus.
    Lost(String),
    /// The driver does not answer about it.
    Unknown(String),
}

impl DeviceHealth {
    /// Every code, for tables and metrics.
    pub const CODES: [&'static str; 5] = ["ok", "suspect", "fenced", "lost", "unknown"];

    /// Whether a new engine may start on it.
    #[must_use]
    pub fn admits(&self) -> bool {
        matches!(self, Self::Ok)
    }

    /// The state as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Suspect(_) => "suspect",
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
            Self::Suspect(r) | Self::Fenced(r) | Self::Lost(r) | Self::Unknown(r) => write!(f, "{}: {r}", self.code()),
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
    }
}
