//! How the GPUs of a node reach each other. Asked once for each set of GPUs: with eight of them it is hundreds of calls.

use std::collections::BTreeMap;

use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus, TopologyLevel};
use nvml_wrapper::error::NvmlError as Raw;
use nvml_wrapper::{Device, Nvml};
use pool_domain::device::Peer;

use crate::convert::bus_id;
use crate::watcher::{About, Pulse};

/// No GPU has more links.
const LINKS: u32 = 18;

/// The others of each GPU, by UUID. What is not told is left out.
pub(crate) fn matrix(nvml: &Nvml, pulse: &Pulse<'_>, gpus: &[(&Device<'_>, &str)]) -> BTreeMap<String, Vec<Peer>> {
    if gpus.len() < 2 {
        return BTreeMap::new();
    }
    let about = |uuid: &str| pulse.calls(About::Device(uuid.to_owned()));
    let bus = |(device, uuid): &(&Device<'_>, &str)| {
        about(uuid);
        device.pci_info().ok().map(|p| bus_id(&p.bus_id))
    };
    let buses: Vec<Option<String>> = gpus.iter().map(bus).collect();
    let of = |(at, (device, uuid)): (usize, &(&Device<'_>, &str))| {
        about(uuid);
        let linked = links(device);
        let peer = |(other_at, (other, other_uuid)): (usize, &(&Device<'_>, &str))| {
            let bus = buses.get(other_at).cloned().flatten();
            (other_at != at).then(|| Peer {
                uuid: (*other_uuid).to_owned(),
                path: nvml.topology_common_ancestor(device, other).ok().map(|level| word(&level).to_owned()),
                p2p: device.p2p_status(other, P2pCapabilitiesIndex::Read).ok().map(|s| s == P2pStatus::Ok),
                nvlinks: bus.map_or(0, |bus| u32::try_from(linked.iter().filter(|l| **l == bus).count()).unwrap_or(0)),
            })
        };
        ((*uuid).to_owned(), gpus.iter().enumerate().filter_map(peer).collect())
    };
    gpus.iter().enumerate().map(of).collect()
}

/// What is at the other end of each link that is up.
fn links(device: &Device<'_>) -> Vec<String> {
    let mut ends = Vec::new();
    for link in 0..LINKS {
        let link = device.link_wrapper_for(link);
        match link.is_active() {
            Ok(true) => ends.extend(link.remote_pci_info().ok().map(|p| bus_id(&p.bus_id))),
            Ok(false) => {}
            // The first that is not there is the last.
            Err(Raw::InvalidArg | Raw::NotSupported | Raw::FailedToLoadSymbol(_)) => break,
            Err(_) => {}
        }
    }
    ends
}

fn word(level: &TopologyLevel) -> &'static str {
    match level {
        TopologyLevel::Internal => "internal",
        TopologyLevel::Single => "single_switch",
        TopologyLevel::Multiple => "switches",
        TopologyLevel::HostBridge => "host_bridge",
        TopologyLevel::Node => "numa_node",
        TopologyLevel::System => "system",
    }
}
