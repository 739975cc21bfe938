//! Which devices an engine may see.

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::DeviceSnapshot;

/// One device as a person may write it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceRef {
    /// Place in PCI bus order.
    Index(u32),
    /// Full `GPU-…` UUID.
    Gpu(String),
    /// Full `MIG-…` UUID, also the legacy `MIG-GPU-…/gi/ci`.
    Mig(String),
    /// MIG slice by parent index and place, `0:1`.
    MigIndex(u32, u32),
    /// PCI bus id, `dddd:bb:dd.f`, lower case.
    PciBusId(String),
}

/// A parsed mask. Order is kept: it is the order of a split.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceMask {
    /// The planner chooses one device.
    Auto,
    /// Every device of the node.
    All,
    /// Exactly these.
    List(Vec<DeviceRef>),
}

/// Why a mask is no mask. Every variant names the entry and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MaskError {
    /// Nothing was given.
    #[error("the device mask is empty: write \"auto\", \"all\", indices (\"0,1\" or \"0-3\") or UUIDs")]
    Empty,
    /// `auto` or `all` beside other entries.
    #[error("`{entry}` stands alone or not at all: leave it out, or leave out the rest")]
    NotAlone {
        /// The entry.
        entry: String,
    },
    /// An index below 0.
    #[error("`{entry}` names no device: indices start at 0, a negative one is none")]
    Negative {
        /// The entry.
        entry: String,
    },
    /// The beginning of a UUID. CUDA takes it; here it could come to name another device when one is added.
    #[error("`{entry}` is cut short: write the full UUID, such as {form}")]
    Prefix {
        /// The entry.
        entry: String,
        /// What a full one looks like.
        form: &'static str,
    },
    /// More devices than any node has.
    #[error("the device mask goes on after `{entry}`: at most {MAX_DEVICES} devices")]
    TooMany {
        /// The first entry that is too many.
        entry: String,
    },
    /// An entry of no known form.
    #[error(
        "`{entry}` names no device: write an index from 0, a range like 0-3, a full GPU-… or MIG-… UUID, 0:1, or a PCI bus id"
    )]
    Malformed {
        /// The entry.
        entry: String,
    },
    /// The same device twice.
    #[error("`{entry}` stands twice in the device mask: name each device once")]
    Duplicate {
        /// The entry.
        entry: String,
    },
    /// The same device written in two ways.
    #[error("`{entry}` is the same device as `{first}`: name each device once")]
    SameDevice {
        /// The later entry.
        entry: String,
        /// The earlier one.
        first: String,
    },
    /// Whole GPUs and slices together.
    #[error("`{entry}` mixes MIG slices with whole GPUs: an engine gets either one slice or whole GPUs")]
    Mixed {
        /// The entry.
        entry: String,
    },
    /// More than one slice. CUDA shows an engine at most one.
    #[error("`{entry}` is a second MIG slice: CUDA gives an engine at most one")]
    SecondMig {
        /// The entry.
        entry: String,
    },
    /// Not on this node.
    #[error("`{entry}` is not on this node: it has {present}")]
    Absent {
        /// The entry.
        entry: String,
        /// What there is.
        present: String,
    },
    /// The engine takes ordinals only, and which ordinal CUDA gives is not certain.
    #[error("{why}, so `{uuid}` has no certain ordinal: use an engine that takes UUIDs")]
    NoOrdinal {
        /// The device.
        uuid: String,
        /// What makes it uncertain.
        why: &'static str,
    },
    /// A GPU that is split into slices cannot be used whole.
    #[error("`{entry}` is split into MIG slices: name one of its slices")]
    MigParent {
        /// The entry.
        entry: String,
    },
}

/// Most devices of a mask.
pub const MAX_DEVICES: usize = 256;

const MAX_RANGE: u32 = 255;

const GPU_FORM: &str = "GPU-01234567-89ab-cdef-0123-456789abcdef";
const MIG_FORM: &str = "MIG-01234567-89ab-cdef-0123-456789abcdef";

fn is_uuid(s: &str) -> bool {
    let groups: Vec<&str> = s.split('-').collect();
    groups.iter().map(|g| g.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|g| g.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn index(s: &str) -> Option<u32> {
    (!s.is_empty() && s.len() <= 4 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten()
}

fn pci(s: &str) -> Option<String> {
    let (rest, function) = s.split_once('.')?;
    let parts: Vec<&str> = rest.split(':').collect();
    let hex = |p: &str, lens: &[usize]| lens.contains(&p.len()) && p.bytes().all(|b| b.is_ascii_hexdigit());
    let (domain, bus, dev) = match parts.as_slice() {
        [b, d] => ("0000", *b, *d),
        [dom, b, d] => (*dom, *b, *d),
        _ => return None,
    };
    // NVML writes eight domain digits, lspci four.
    let domain = if domain.len() == 8 { domain.strip_prefix("0000")? } else { domain };
    (hex(domain, &[4]) && hex(bus, &[2]) && hex(dev, &[2]) && hex(function, &[1]))
        .then(|| format!("{domain}:{bus}:{dev}.{function}").to_ascii_lowercase())
}

fn entry_refs(entry: &str) -> Option<Vec<DeviceRef>> {
    if let Some(i) = index(entry) {
        return Some(vec![DeviceRef::Index(i)]);
    }
    if let Some((a, b)) = entry.split_once('-').and_then(|(a, b)| Some((index(a)?, index(b)?))) {
        return (a <= b && b - a <= MAX_RANGE).then(|| (a..=b).map(DeviceRef::Index).collect());
    }
    if let Some(u) = entry.strip_prefix("GPU-") {
        return is_uuid(u).then(|| vec![DeviceRef::Gpu(format!("GPU-{}", u.to_ascii_lowercase()))]);
    }
    if let Some(u) = entry.strip_prefix("MIG-GPU-") {
        let mut parts = u.split('/');
        let (uuid, gi, ci) = (parts.next()?, parts.next()?, parts.next()?);
        let (gi, ci) = (index(gi)?, index(ci)?);
        let ok = is_uuid(uuid) && parts.next().is_none();
        return ok.then(|| vec![DeviceRef::Mig(format!("MIG-GPU-{}/{gi}/{ci}", uuid.to_ascii_lowercase()))]);
    }
    if let Some(u) = entry.strip_prefix("MIG-") {
        return is_uuid(u).then(|| vec![DeviceRef::Mig(format!("MIG-{}", u.to_ascii_lowercase()))]);
    }
    if let Some((a, b)) = entry.split_once(':').and_then(|(a, b)| Some((index(a)?, index(b)?))) {
        return Some(vec![DeviceRef::MigIndex(a, b)]);
    }
    pci(entry).map(|p| vec![DeviceRef::PciBusId(p)])
}

/// Why an entry of no known form is none.
fn unknown(entry: &str) -> MaskError {
    let text = || entry.chars().take(80).collect::<String>();
    let number = |s: &str| s.starts_with(|c: char| c.is_ascii_digit());
    let short = |start: &str| {
        let rest = entry.strip_prefix(start)?;
        (rest.len() < 36 && rest.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')).then_some(())
    };
    match entry {
        "auto" | "all" => MaskError::NotAlone { entry: text() },
        _ if entry.strip_prefix('-').is_some_and(number) => MaskError::Negative { entry: text() },
        _ if short("GPU-").is_some() => MaskError::Prefix { entry: text(), form: GPU_FORM },
        _ if short("MIG-GPU-").is_some() || short("MIG-").is_some() => {
            MaskError::Prefix { entry: text(), form: MIG_FORM }
        }
        _ => MaskError::Malformed { entry: text() },
    }
}

impl DeviceMask {
    /// Reads a mask: `auto`, `all`, or a list of indices, ranges, full UUIDs, `parent:slice` and PCI bus ids.
    ///
    /// # Errors
    /// When it is empty, malformed, names a device twice, or mixes slices and GPUs.
    pub fn parse(text: &str) -> Result<Self, MaskError> {
        match text.trim() {
            "" => return Err(MaskError::Empty),
            "auto" => return Ok(Self::Auto),
            "all" => return Ok(Self::All),
            _ => {}
        }
        let mut list: Vec<DeviceRef> = Vec::new();
        for entry in text.split(',').map(str::trim) {
            let refs = entry_refs(entry).ok_or_else(|| unknown(entry))?;
            if list.len() + refs.len() > MAX_DEVICES {
                return Err(MaskError::TooMany { entry: entry.to_owned() });
            }
            for r in refs {
                if list.contains(&r) {
                    return Err(MaskError::Duplicate { entry: entry.to_owned() });
                }
                if r.is_mig() && list.first().is_some_and(DeviceRef::is_mig) {
                    return Err(MaskError::SecondMig { entry: entry.to_owned() });
                }
                if list.first().is_some_and(|f| f.is_mig() != r.is_mig()) {
                    return Err(MaskError::Mixed { entry: entry.to_owned() });
                }
                list.push(r);
            }
        }
        Ok(Self::List(list))
    }

    /// Resolves the mask to full UUIDs, the stable form. `auto` gives every device there is to choose from.
    ///
    /// # Errors
    /// When an entry is not on this node, names the same device as another, or is a GPU split into slices, and when
    /// `all` would be more than one slice, or slices and GPUs.
    pub fn validate_against_discovered(&self, devices: &[DeviceSnapshot]) -> Result<ResolvedMask, MaskError> {
        let usable = || devices.iter().filter(|d| !d.mig_parent);
        let list = match self {
            Self::Auto => return Ok(ResolvedMask { uuids: usable().map(|d| d.uuid.clone()).collect() }),
            Self::All => {
                let (entry, slices) = ("all".to_owned(), usable().filter(|d| d.mig.is_some()).count());
                return match (slices, usable().count() - slices) {
                    (0, _) | (1, 0) => Ok(ResolvedMask { uuids: usable().map(|d| d.uuid.clone()).collect() }),
                    (_, 0) => Err(MaskError::SecondMig { entry }),
                    _ => Err(MaskError::Mixed { entry }),
                };
            }
            Self::List(list) => list,
        };
        let mut uuids: Vec<String> = Vec::with_capacity(list.len());
        for r in list {
            let entry = r.to_string();
            let Some(found) = devices.iter().find(|d| r.names(d)) else {
                return Err(MaskError::Absent { entry, present: present(devices) });
            };
            if found.mig_parent {
                return Err(MaskError::MigParent { entry });
            }
            if let Some(first) = uuids.iter().position(|u| *u == found.uuid) {
                return Err(MaskError::SameDevice { entry, first: list[first].to_string() });
            }
            uuids.push(found.uuid.clone());
        }
        Ok(ResolvedMask { uuids })
    }
}

/// What can be named, for an error.
fn present(devices: &[DeviceSnapshot]) -> String {
    let one = |d: &DeviceSnapshot| match &d.mig {
        Some(slice) => format!("{}:{} ({})", d.index, slice.index, d.uuid),
        None => format!("{} ({})", d.index, d.uuid),
    };
    if devices.is_empty() { "no device".to_owned() } else { devices.iter().map(one).collect::<Vec<_>>().join(", ") }
}

/// The device that a person means, written in any of the ways of a mask.
#[must_use]
pub fn named<'a>(text: &str, devices: &'a [DeviceSnapshot]) -> Option<&'a DeviceSnapshot> {
    match DeviceMask::parse(text) {
        Ok(DeviceMask::List(list)) if list.len() == 1 => devices.iter().find(|d| list[0].names(d)),
        _ => None,
    }
}

impl DeviceRef {
    fn is_mig(&self) -> bool {
        matches!(self, Self::Mig(_) | Self::MigIndex(..))
    }

    fn names(&self, d: &DeviceSnapshot) -> bool {
        match self {
            Self::Index(i) => d.mig.is_none() && d.index == *i,
            Self::Gpu(u) | Self::Mig(u) => d.uuid.eq_ignore_ascii_case(u),
            Self::MigIndex(g, i) => d.mig.as_ref().is_some_and(|m| d.index == *g && m.index == *i),
            Self::PciBusId(p) => d.mig.is_none() && bus(d).is_some_and(|have| have == *p),
        }
    }
}

impl fmt::Display for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(i) => write!(f, "{i}"),
            Self::Gpu(u) | Self::Mig(u) | Self::PciBusId(u) => f.write_str(u),
            Self::MigIndex(g, i) => write!(f, "{g}:{i}"),
        }
    }
}

impl fmt::Display for DeviceMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All => f.write_str("all"),
            Self::List(l) => {
                for (i, r) in l.iter().enumerate() {
                    write!(f, "{}{r}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

impl FromStr for DeviceMask {
    type Err = MaskError;
    fn from_str(s: &str) -> Result<Self, MaskError> {
        Self::parse(s)
    }
}

/// A mask as full UUIDs, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ResolvedMask {
    /// Full UUIDs.
    pub uuids: Vec<String>,
}

impl ResolvedMask {
    /// The value for `CUDA_VISIBLE_DEVICES`: full UUIDs, never a prefix, so that CUDA has nothing to cut. Empty hides
    /// every device. Use it with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    #[must_use]
    pub fn to_cuda_visible_devices(&self) -> String {
        self.uuids.join(",")
    }

    /// The devices as CUDA counts them with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, for engines that read
    /// `CUDA_VISIBLE_DEVICES` as integers. `devices` is the whole node.
    ///
    /// # Errors
    /// For a device that is not there, and for slices. On a node with any GPU in MIG mode there are none at all: how
    /// CUDA counts whole GPUs beside it is not documented, and a wrong ordinal is another device.
    pub fn to_ordinals(&self, devices: &[DeviceSnapshot]) -> Result<Vec<u32>, MaskError> {
        let mut whole: Vec<&DeviceSnapshot> = devices.iter().filter(|d| d.mig.is_none()).collect();
        if whole.iter().all(|d| bus(d).is_some()) {
            whole.sort_by_key(|d| bus(d));
        } else {
            whole.sort_by_key(|d| d.index); // which is the place in PCI order too
        }
        let ordinal = |uuid: &String| {
            let no = |why| MaskError::NoOrdinal { uuid: uuid.clone(), why };
            match devices.iter().find(|d| d.uuid == *uuid) {
                None => return Err(MaskError::Absent { entry: uuid.clone(), present: present(devices) }),
                Some(d) if d.mig.is_some() => return Err(no("CUDA numbers no MIG slices")),
                Some(_) if devices.iter().any(|d| d.mig.is_some() || d.mig_parent) => {
                    return Err(no("a GPU of this node is in MIG mode"));
                }
                Some(_) => {}
            }
            let at = whole.iter().position(|d| d.uuid == *uuid).and_then(|at| u32::try_from(at).ok());
            at.ok_or_else(|| no("it is not counted"))
        };
        self.uuids.iter().map(ordinal).collect()
    }

    /// The environment that shows an engine exactly these devices in this order, whatever was inherited: without the
    /// first pair ordinals would be in order of speed.
    #[must_use]
    pub fn cuda_environment(&self) -> [(&'static str, String); 2] {
        cuda_environment(self.to_cuda_visible_devices())
    }

    /// The same for an engine that takes ordinals only.
    ///
    /// # Errors
    /// As [`ResolvedMask::to_ordinals`].
    pub fn cuda_environment_of_ordinals(
        &self,
        devices: &[DeviceSnapshot],
    ) -> Result<[(&'static str, String); 2], MaskError> {
        let ordinals = self.to_ordinals(devices)?;
        Ok(cuda_environment(ordinals.iter().map(u32::to_string).collect::<Vec<_>>().join(",")))
    }
}

fn cuda_environment(visible: String) -> [(&'static str, String); 2] {
    [("CUDA_DEVICE_ORDER", "PCI_BUS_ID".to_owned()), ("CUDA_VISIBLE_DEVICES", visible)]
}

/// The bus id in one way of writing, which also sorts as the bus does.
fn bus(device: &DeviceSnapshot) -> Option<String> {
    device.pci_bus_id.as_deref().and_then(pci)
}
