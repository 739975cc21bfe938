//! Which devices an engine may see.

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
    /// A GPU that is split into slices cannot be used whole.
    #[error("`{entry}` is split into MIG slices: name one of its slices")]
    MigParent {
        /// The entry.
        entry: String,
    },
}

const MAX_RANGE: u32 = 255;

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
        let ok = is_uuid(uuid) && index(gi).is_some() && index(ci).is_some() && parts.next().is_none();
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

impl DeviceMask {
    /// Reads a mask.
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
            let refs = entry_refs(entry).ok_or_else(|| MaskError::Malformed { entry: entry.to_owned() })?;
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

    /// Resolves the mask to full UUIDs, the stable form.
    ///
    /// # Errors
    /// When an entry is not on this node, names the same device as another, or is a GPU split into slices.
    pub fn validate_against_discovered(&self, devices: &[DeviceSnapshot]) -> Result<ResolvedMask, MaskError> {
        let usable = || devices.iter().filter(|d| !d.mig_parent);
        let list = match self {
            Self::Auto | Self::All => return Ok(ResolvedMask { uuids: usable().map(|d| d.uuid.clone()).collect() }),
            Self::List(list) => list,
        };
        let mut uuids: Vec<String> = Vec::with_capacity(list.len());
        for r in list {
            let entry = r.to_string();
            let found = devices.iter().find(|d| r.names(d)).ok_or_else(|| MaskError::Absent {
                entry: entry.clone(),
                present: match devices.len() {
                    0 => "no device".to_owned(),
                    _ => devices.iter().map(|d| format!("{} ({})", d.index, d.uuid)).collect::<Vec<_>>().join(", "),
                },
            })?;
            if found.mig_parent {
                return Err(MaskError::MigParent { entry });
            }
            if uuids.contains(&found.uuid) {
                return Err(MaskError::Duplicate { entry });
            }
            uuids.push(found.uuid.clone());
        }
        Ok(ResolvedMask { uuids })
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
            Self::PciBusId(p) => {
                d.mig.is_none() && d.pci_bus_id.as_deref().and_then(pci).is_some_and(|have| have == *p)
            }
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
    /// The value for `CUDA_VISIBLE_DEVICES`: full UUIDs, never a prefix, so that CUDA has nothing to cut. Use it with
    /// `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    #[must_use]
    pub fn to_cuda_visible_devices(&self) -> String {
        self.uuids.join(",")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::{DeviceHealth, MigSlice};

    fn gpu(index: u32) -> DeviceSnapshot {
        DeviceSnapshot {
            uuid: format!("GPU-51000000-0000-4000-8000-00000000000{index}"),
            index,
            name: "test".into(),
            pci_bus_id: Some(
                format!("0000000{index}:01:00.0")
                    .replacen(&format!("0000000{index}"), "00000000", 1)
                    .replace(":01:", &format!(":0{}:", index + 1)),
            ),
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

    #[test]
    fn wrong_masks_say_which_entry_and_what_would_be_right() {
        for (text, part) in [
            ("", "empty"),
            ("0,0", "`0` stands twice"),
            ("-1", "`-1` names no device"),
            ("GPU-nope", "`GPU-nope` names no device"),
            ("0,,1", "`` names no device"),
            ("3-1", "`3-1`"),
            ("0-9999", "`0-9999`"),
            ("0,0-2", "`0-2` stands twice"),
            ("GPU-51000000", "`GPU-51000000`"),
            ("0:0,1", "mixes"),
            ("0:0,0:1", "second MIG"),
            ("none", "`none`"),
            ("0x1", "`0x1`"),
        ] {
            let e = DeviceMask::parse(text).unwrap_err().to_string();
            assert!(e.contains(part), "{text}: {e}");
        }
    }

    #[test]
    fn resolves_every_way_of_writing() {
        let slice = DeviceSnapshot {
            uuid: "MIG-51000000-0000-4000-8000-0000000000aa".into(),
            mig: Some(MigSlice { parent: gpu(2).uuid, profile: "1g.12gb".into(), index: 1 }),
            ..gpu(2)
        };
        let devices = [gpu(0), gpu(1), DeviceSnapshot { mig_parent: true, ..gpu(2) }, slice.clone()];
        let resolve = |t: &str| DeviceMask::parse(t).unwrap().validate_against_discovered(&devices).map(|m| m.uuids);
        assert_eq!(resolve("1,0"), Ok(vec![gpu(1).uuid, gpu(0).uuid]));
        assert_eq!(resolve("0-1"), Ok(vec![gpu(0).uuid, gpu(1).uuid]));
        assert_eq!(resolve("0000:02:00.0"), Ok(vec![gpu(1).uuid]));
        assert_eq!(resolve("02:00.0"), Ok(vec![gpu(1).uuid]));
        assert_eq!(resolve(&gpu(0).uuid.to_uppercase()), Ok(vec![gpu(0).uuid]));
        assert_eq!(resolve("2:1"), Ok(vec![slice.uuid.clone()]));
        assert!(matches!(resolve("7"), Err(MaskError::Absent { .. })));
        assert!(matches!(resolve("2"), Err(MaskError::MigParent { .. })));
        assert!(matches!(resolve(&format!("0,{}", gpu(0).uuid)), Err(MaskError::Duplicate { .. })));
    }

    proptest! {
        #[test]
        fn round_trips_and_never_panics(text in "[-0-9a-fA-FGPUMIg:.,/ ]{0,80}") {
            if let Ok(m) = DeviceMask::parse(&text) {
                prop_assert_eq!(DeviceMask::parse(&m.to_string()), Ok(m));
            }
        }

        #[test]
        fn a_resolved_mask_is_never_cut(n in 1usize..4, pick in prop::collection::vec(0u32..4, 1..4)) {
            let devices: Vec<_> = (0..n as u32).map(gpu).collect();
            let text = pick.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            if let Ok(r) = DeviceMask::parse(&text).and_then(|m| m.validate_against_discovered(&devices)) {
                prop_assert_eq!(r.to_cuda_visible_devices().split(',').count(), pick.len());
            }
        }
    }
}
