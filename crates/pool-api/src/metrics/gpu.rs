//! Gauges of the devices. A driver that does not tell has no series.

use pool_domain::{DeviceHealth, DeviceSnapshot, Verdict};
use pool_services::{NodeSnapshot, PoolSnapshot};

use super::names::{self, MetricDoc};
use super::{Labels, Scrape, flag, number};

/// A device with the pool whose engines have it to themselves.
type Owned<'a> = (&'a DeviceSnapshot, u64, String);

/// The pool whose engines alone hold memory on a device, empty where there is none or more than one.
fn owner(device: &DeviceSnapshot, pools: &[PoolSnapshot]) -> String {
    let on = |p: &&PoolSnapshot| {
        p.replicas.iter().any(|r| r.vram_reserved > 0 && r.device_mask.split(',').any(|uuid| uuid == device.uuid))
    };
    let mut of = pools.iter().filter(on);
    match (of.next(), of.next()) {
        (Some(one), None) => one.pool_id.to_string(),
        _ => String::new(),
    }
}

fn labels((d, _, owner): &Owned<'_>) -> Labels {
    let profile = d.mig.as_ref().map_or_else(String::new, |m| m.profile.clone());
    vec![("gpu_uuid", d.uuid.clone()), ("mig", profile), ("pool_id", owner.clone())]
}

fn and(o: &Owned<'_>, name: &'static str, value: &str) -> Labels {
    [labels(o), vec![(name, value.to_owned())]].concat()
}

pub(super) fn scrape(s: &mut Scrape, pools: &[PoolSnapshot], node: &NodeSnapshot) {
    let devices: Vec<Owned<'_>> = node.devices.iter().map(|(d, ours)| (d, *ours, owner(d, pools))).collect();
    let mut gauge = |doc: MetricDoc, read: &dyn Fn(&Owned<'_>) -> Option<f64>| {
        s.gauge(doc, &devices, |o| read(o).map(|value| (labels(o), value)).into_iter().collect());
    };
    let percent = |p: Option<u32>| p.map(|p| f64::from(p) / 100.0);
    let watts = |milli: Option<u32>| milli.map(|m| f64::from(m) / 1e3);
    let hertz = |mega: Option<u32>| mega.map(|m| f64::from(m) * 1e6);
    gauge(names::GPU_TOTAL, &|(d, ..)| Some(number(d.vram_total)));
    // While nobody can say, none being free would only look like an answer.
    gauge(names::GPU_FREE, &|(d, ..)| (!matches!(d.health, DeviceHealth::Unknown(_))).then(|| number(d.vram_free)));
    gauge(names::GPU_USED, &|(d, ..)| Some(number(d.vram_used)));
    gauge(names::GPU_RESERVED, &|(_, ours, _)| Some(number(*ours)));
    gauge(names::GPU_FOREIGN, &|(d, ..)| Some(number(d.vram_foreign)));
    gauge(names::GPU_DRIVER, &|(d, ..)| Some(number(d.vram_reserved)));
    gauge(names::GPU_UTILISATION, &|(d, ..)| percent(d.utilisation));
    gauge(names::GPU_MEMORY_UTILISATION, &|(d, ..)| percent(d.details.memory_utilisation));
    gauge(names::GPU_TEMPERATURE, &|(d, ..)| d.details.temperature.map(f64::from));
    gauge(names::GPU_POWER, &|(d, ..)| watts(d.details.power));
    gauge(names::GPU_POWER_LIMIT, &|(d, ..)| watts(d.details.power_limit));
    gauge(names::GPU_SM_CLOCK, &|(d, ..)| hertz(d.details.sm_clock));
    gauge(names::GPU_MEMORY_CLOCK, &|(d, ..)| hertz(d.details.memory_clock));
    gauge(names::GPU_REMAP_PENDING, &|(d, ..)| d.details.remap.map(|r| flag(r.pending)));
    gauge(names::GPU_REMAP_FAILED, &|(d, ..)| d.details.remap.map(|r| flag(r.failed)));
    gauge(names::GPU_NVLINKS, &|(d, ..)| {
        let peers = &d.details.peers;
        (!peers.is_empty()).then(|| peers.iter().map(|p| f64::from(p.nvlinks)).sum())
    });
    s.counter(names::GPU_ENERGY, &devices, |o| {
        o.0.details.energy.map(|milli| (labels(o), milli / 1_000)).into_iter().collect()
    });
    s.counter(names::GPU_PCIE_REPLAYS, &devices, |o| {
        o.0.details.pcie_replays.map(|n| (labels(o), n)).into_iter().collect()
    });
    s.counter(names::GPU_ECC, &devices, |o| match o.0.details.ecc {
        Some(ecc) => {
            vec![(and(o, "kind", "corrected"), ecc.corrected), (and(o, "kind", "uncorrected"), ecc.uncorrected)]
        }
        None => Vec::new(),
    });
    s.gauge(names::GPU_CLOCK_LIMITED, &devices, |o| {
        o.0.details.clock_limits.iter().flatten().map(|reason| (and(o, "reason", reason), 1.0)).collect()
    });
    s.gauge(names::GPU_HEALTH, &devices, |o| {
        let now = o.0.health.code();
        DeviceHealth::CODES.iter().map(|code| (and(o, "health", code), flag(*code == now))).collect()
    });
    s.gauge(names::GPU_VERDICT, &devices, |o| {
        Verdict::ALL.iter().map(|v| (and(o, "verdict", v.code()), flag(*v == o.0.verdict))).collect()
    });
    s.counter(names::GPU_XIDS, &node.xids, |x| {
        vec![(vec![("gpu_uuid", x.device.clone()), ("xid", x.xid.to_string())], x.count)]
    });
}
