//! What the library plays.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// The name in a table of errors, or of a call that blocks, that stands for every call.
pub const EVERY_CALL: &str = "*";

/// Codes of NVML by the name of the call that returns them; [`EVERY_CALL`] names all.
pub type Errors = BTreeMap<String, u32>;

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Script {
    /// CUDA's version as NVML counts, for example 13000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuda: Option<i32>,
    /// Where engines leave their claims; by default `claims` beside the script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claims: Option<PathBuf>,
    /// Memory is seen to be used this long after it was claimed.
    pub taken_after_ms: u64,
    /// Memory is seen to be used this long after its claim ended; its process is listed no more.
    pub free_after_ms: u64,
    /// Whether processes are listed at all. In a container of its own the driver lists none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hides_processes: bool,
    /// Calls that fail, whatever the device.
    pub errors: Errors,
    /// The devices as NVML counts them, which need not be the order on the bus.
    pub device: Vec<Device>,
    /// What happens, each once for every set of events that hears it.
    pub event: Vec<Event>,
    /// Calls that do not return for a time.
    pub block: Vec<Block>,
}

/// A GPU. What is unset is not supported.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    /// `GPU-…`
    pub uuid: String,
    /// Without the prefix that says what it is.
    pub name: String,
    /// As NVML writes it: eight digits of the domain.
    pub pci_bus_id: String,
    /// All memory.
    pub vram: Size,
    /// Of that, the driver's.
    pub reserved: Size,
    /// Used by nobody who is listed.
    pub unlisted: Size,
    /// For example `9.0`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute_capability: Option<String>,
    /// NUMA node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utilisation: Option<u32>,
    /// Degrees Celsius.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<u32>,
    /// Milliwatts, used and at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub power: Option<(u32, u32)>,
    /// Millijoules since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub energy: Option<u64>,
    /// Megahertz of the multiprocessors and of the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clocks: Option<(u32, u32)>,
    /// NVML's bits of what limits them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_limits: Option<u64>,
    /// Whether the driver keeps it initialised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistence: Option<bool>,
    /// Set: it has ECC; errors that were corrected and that were not, since the driver was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ecc: Option<(u64, u64)>,
    /// Rows that wait for a reset to be remapped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remap_pending: Option<bool>,
    /// Rows that could not be remapped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remap_failed: Option<bool>,
    /// What the driver says has to be done, as a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_action: Option<u32>,
    /// UUIDs of the devices at the other end of its NVLinks, link by link.
    pub nvlink: Vec<String>,
    /// It is on the bus no more, and nothing was said of it.
    pub gone: bool,
    /// Processes of others.
    pub process: Vec<Process>,
    /// Its slices, each at its place; it is split if there are any.
    pub mig: Vec<Slice>,
    /// Its calls that fail.
    pub errors: Errors,
}

/// A process that holds memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its memory.
    pub used: Size,
}

/// A MIG slice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// `MIG-…`
    pub uuid: String,
    /// For example `1g.12gb`.
    pub profile: String,
    /// Its memory.
    pub vram: Size,
    /// Its place on the GPU, which leaves holes.
    pub place: u32,
    /// GPU instance.
    pub gi: u32,
    /// Compute instance.
    #[serde(default)]
    pub ci: u32,
}

/// Something that happens.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Event {
    /// Tells it from others like it.
    pub id: u32,
    /// The GPU.
    pub device: String,
    /// NVML's bit of its kind; an XID if nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<u64>,
    /// The XID, or what else goes with it.
    pub data: u64,
    /// GPU and compute instance, if it is of one slice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<(u32, u32)>,
    /// Not before the script was played for this long.
    pub after_ms: u64,
}

/// A call that does not return.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Its name, or [`EVERY_CALL`].
    pub call: String,
    /// Of one device only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// For as long as this file is there, to which the name of each call that hangs is added.
    pub while_file: PathBuf,
}

/// Bytes, written with a unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

impl Size {
    /// So many GiB.
    #[must_use]
    pub fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        ByteSize::from_str(&text).map(|size| Self(size.0)).map_err(|e| format!("`{text}` is no size: {e}"))
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        format!("{} B", size.0)
    }
}

impl Script {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it, with its line.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The GPU of a UUID, to be changed.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn gpu(&mut self, uuid: &str) -> &mut Device {
        #[expect(clippy::expect_used, reason = "for tests")]
        self.device.iter_mut().find(|d| d.uuid == uuid).expect("a device of this UUID")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut script = Script::parse(include_str!("../topologies/h100-seven-slices.toml")).unwrap();
        script.block.push(Block { call: "x".into(), device: None, while_file: "/y".into() });
        script.event.push(Event { id: 1, device: "GPU".into(), instance: Some((1, 0)), ..Event::default() });
        script.device[0].errors.insert(EVERY_CALL.into(), 15);
        assert_eq!(Script::parse(&toml::to_string(&script).unwrap()).unwrap(), script);
    }

    #[test]
    fn every_topology_is_one() {
        for (name, text, gpus) in TOPOLOGIES {
            assert_eq!(Script::parse(text).unwrap_or_else(|e| panic!("{name}: {e}")).device.len(), gpus, "{name}");
        }
    }

    const TOPOLOGIES: [(&str, &str, usize); 4] = [
        ("h100-seven-slices", include_str!("../topologies/h100-seven-slices.toml"), 1),
        ("mixed-24-12", include_str!("../topologies/mixed-24-12.toml"), 2),
        ("eight-nvlink", include_str!("../topologies/eight-nvlink.toml"), 8),
        ("one-lost", include_str!("../topologies/one-lost.toml"), 2),
    ];
}
