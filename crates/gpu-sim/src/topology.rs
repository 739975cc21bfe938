//! The topology file.

use std::collections::BTreeSet;

use bytesize::ByteSize;
use pool_domain::device::MigSlice;
use pool_domain::mask::DeviceRef;
use pool_domain::{DeviceHealth, DeviceMask, DeviceSnapshot};
use serde::Deserialize;
use thiserror::Error;
use toml::Spanned;

/// Why a text is no topology.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// Not TOML, an unknown key, or a value that cannot be; the text shows the line.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// Each value can be, but not together.
    #[error("line {line}: {problem}")]
    Invalid {
        /// Counted from 1.
        line: usize,
        /// What does not fit.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: Vec<Device>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    name: String,
    uuid: Spanned<GpuUuid>,
    vram: Vram,
    compute_capability: Option<Capability>,
    pci_bus_id: Option<Spanned<PciBusId>>,
    numa_node: Option<u32>,
    #[serde(default)]
    mig: Vec<Slice>,
    foreign_used: Option<Spanned<Size>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slice {
    profile: Spanned<Profile>,
    uuid: Spanned<MigUuid>,
    vram: Option<Vram>,
}

/// Values that are checked while the file is read, so that the error shows where they stand.
macro_rules! values {
    ($($name:ident($ty:ty) = $parse:expr;)*) => {$(
        #[derive(Deserialize)]
        #[serde(try_from = "String")]
        struct $name($ty);

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                let parse: fn(&str) -> Result<$ty, String> = $parse;
                parse(&text).map(Self)
            }
        }
    )*};
}

values! {
    GpuUuid(String) = |text| match single(text) {
        Some(DeviceRef::Gpu(uuid)) => Ok(uuid),
        _ => Err(format!("`{text}` is no GPU UUID: write GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")),
    };
    MigUuid(String) = |text| match single(text) {
        Some(DeviceRef::Mig(uuid)) => Ok(uuid),
        _ => Err(format!("`{text}` is no MIG UUID: write MIG-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")),
    };
    PciBusId(String) = |text| match single(text) {
        Some(DeviceRef::PciBusId(id)) => Ok(id),
        _ => Err(format!("`{text}` is no PCI bus id: write dddd:bb:dd.f")),
    };
    Size(u64) = size;
    Vram(u64) = |text| match size(text)? {
        0 => Err("a device has more than no memory".to_owned()),
        bytes => Ok(bytes),
    };
    Capability((u32, u32)) = |text| {
        let number = |part: &str| part.parse::<u8>().map(u32::from).ok();
        text.split_once('.')
            .and_then(|(major, minor)| Some((number(major)?, number(minor)?)))
            .ok_or_else(|| format!("`{text}` is no compute capability: write for example \"8.9\""))
    };
    Profile((String, u64)) = |text| match profile_bytes(text) {
        Some(bytes) if bytes > 0 => Ok((text.to_owned(), bytes)),
        _ => Err(format!("`{text}` is no MIG profile: write for example \"1g.12gb\"")),
    };
}

fn single(text: &str) -> Option<DeviceRef> {
    match DeviceMask::parse(text) {
        Ok(DeviceMask::List(mut list)) if list.len() == 1 => list.pop(),
        _ => None,
    }
}

fn size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.0)
        .map_err(|_| format!("`{text}` is no size: write for example \"24 GiB\""))
}

/// Memory of a slice by its profile, `1g.12gb` or `1g.12gb+me`. NVIDIA's "gb" are GiB.
fn profile_bytes(profile: &str) -> Option<u64> {
    let (compute, memory) = profile.split_once('.')?;
    let memory = memory.split_once('+').map_or(memory, |(memory, _)| memory);
    compute.strip_suffix('g')?.parse::<u8>().ok()?;
    memory.strip_suffix("gb")?.parse::<u16>().ok().map(|gib| ByteSize::gib(gib.into()).0)
}

/// Reads a topology. The memory in use is what the file calls foreign. Devices stand in PCI bus order as written.
pub(crate) fn parse(text: &str) -> Result<Vec<DeviceSnapshot>, TopologyError> {
    let file: File = toml::from_str(text)?;
    let line = |at: usize| text.bytes().take(at).filter(|&b| b == b'\n').count() + 1;
    let invalid = |at: usize, problem: String| TopologyError::Invalid { line: line(at), problem };
    let (mut uuids, mut buses) = (BTreeSet::new(), BTreeSet::new());
    let mut unique = |uuid: &str, at: usize| match uuids.insert(uuid.to_owned()) {
        true => Ok(()),
        false => Err(invalid(at, format!("UUID {uuid} was used above"))),
    };
    let mut devices = Vec::new();
    for (index, d) in (0_u32..).zip(file.device) {
        let at = d.uuid.span().start;
        let uuid = d.uuid.into_inner().0;
        unique(&uuid, at)?;
        let pci_bus_id = match d.pci_bus_id {
            Some(id) => {
                let at = id.span().start;
                let id = id.into_inner().0;
                if !buses.insert(id.clone()) {
                    return Err(invalid(at, format!("PCI bus id {id} was used above")));
                }
                Some(id)
            }
            None => None,
        };
        let foreign = match d.foreign_used {
            Some(used) if used.get_ref().0 > d.vram.0 => {
                return Err(invalid(used.span().start, "more foreign memory than the device has".to_owned()));
            }
            Some(used) => used.into_inner().0,
            None => 0,
        };
        let parent = DeviceSnapshot {
            uuid,
            index,
            name: d.name,
            pci_bus_id,
            compute_capability: d.compute_capability.map(|c| c.0),
            numa_node: d.numa_node,
            vram_total: d.vram.0,
            vram_free: d.vram.0 - foreign,
            vram_used: foreign,
            vram_reserved: 0,
            vram_foreign: foreign,
            utilisation: None,
            health: DeviceHealth::Ok,
            mig: None,
            mig_parent: !d.mig.is_empty(),
            verdict: Default::default(),
            details: Default::default(),
        };
        devices.push(parent.clone());
        let mut left = parent.vram_total;
        for (place, s) in (0_u32..).zip(d.mig) {
            let (slice_at, profile_at) = (s.uuid.span().start, s.profile.span().start);
            let uuid = s.uuid.into_inner().0;
            unique(&uuid, slice_at)?;
            let (profile, by_profile) = s.profile.into_inner().0;
            let vram = s.vram.map_or(by_profile, |v| v.0);
            left = left
                .checked_sub(vram)
                .ok_or_else(|| invalid(profile_at, "the slices have more memory than their GPU".to_owned()))?;
            devices.push(DeviceSnapshot {
                uuid,
                name: format!("{} MIG {profile}", parent.name),
                vram_total: vram,
                vram_free: vram,
                vram_used: 0,
                vram_foreign: 0,
                mig: Some(MigSlice { parent: parent.uuid.clone(), profile, index: place }),
                mig_parent: false,
                ..parent.clone()
            });
        }
    }
    Ok(devices)
}
