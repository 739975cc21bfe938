//! Looks whether the memory of an engine that ended has come back. What it means, `pool_domain::returned` decides.

use std::time::Duration;

use pool_domain::returned::{self, Back, Had, Now};

use crate::ports::{EngineRecord, GpuProbe, Holder, Residency};

/// Between two looks.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What an engine had, by device.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Held {
    pub(crate) devices: Vec<(String, Had)>,
    /// Its processes, as far as they are known.
    pub(crate) pids: Vec<u32>,
}

impl Held {
    /// As it was written down before the launch.
    pub(crate) fn of(record: &EngineRecord) -> Self {
        let unlisted = |at: usize| record.unlisted.as_ref().and_then(|all| all.get(at).copied());
        let devices = record.devices.uuids.iter().zip(&record.bytes).enumerate();
        let had = |(at, (uuid, bytes)): (usize, (&String, &u64))| {
            (uuid.clone(), Had { bytes: *bytes, unlisted: unlisted(at), used: None })
        };
        Self { devices: devices.map(had).collect(), pids: Vec::new() }
    }

    /// Notes what is used while it lives.
    pub(crate) fn see(&mut self, gpu: &dyn GpuProbe) {
        let inventory = gpu.inventory();
        let inventory = inventory.borrow();
        for (uuid, had) in &mut self.devices {
            had.used = inventory.devices.iter().find(|d| d.uuid == *uuid).map(|d| d.vram_used);
        }
    }

    pub(crate) async fn is_back(&self, gpu: &dyn GpuProbe) -> Back {
        if self.devices.is_empty() {
            return Back::Yes;
        }
        let residency = gpu.residency().await;
        let (holders, provable) = match &residency {
            Residency::Provable(holders) | Residency::Partial(holders) => (&holders[..], true),
            Residency::Simulated(holders) => (&holders[..], false),
            Residency::Unknown(_) => (&[][..], false),
        };
        let inventory = gpu.inventory();
        let inventory = inventory.borrow();
        let each = self.devices.iter().map(|(uuid, had)| {
            let now = Now {
                device: inventory.devices.iter().find(|d| d.uuid == *uuid),
                listed: provable.then(|| listed(holders, uuid)),
                own: holders.iter().any(|h| h.uuid == *uuid && self.pids.contains(&h.pid)),
            };
            returned::returned(had, &now)
        });
        each.max().unwrap_or(Back::Yes)
    }

    /// Resolves once it has come back. May never.
    pub(crate) async fn back(&self, gpu: &dyn GpuProbe) {
        while self.is_back(gpu).await != Back::Yes {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// By how much more is used on each of these devices than before a launch of which nobody is listed.
pub(crate) fn growth(gpu: &dyn GpuProbe, holders: &[Holder], record: &EngineRecord) -> Vec<Option<u64>> {
    let inventory = gpu.inventory();
    let inventory = inventory.borrow();
    let on = |(at, uuid): (usize, &String)| {
        let before = record.unlisted.as_ref()?.get(at)?;
        let device = inventory.devices.iter().find(|d| d.uuid == *uuid)?;
        Some(returned::unlisted(device, listed(holders, uuid)).saturating_sub(*before))
    };
    record.devices.uuids.iter().enumerate().map(on).collect()
}

fn listed(holders: &[Holder], uuid: &str) -> u64 {
    holders.iter().filter(|h| h.uuid == uuid).map(|h| h.bytes).fold(0, u64::saturating_add)
}

/// What nobody is listed for on each of these devices; `None` where not everybody is listed.
pub(crate) async fn unlisted(gpu: &dyn GpuProbe, devices: &[String]) -> Option<Vec<u64>> {
    let (Residency::Provable(holders) | Residency::Partial(holders)) = gpu.residency().await else { return None };
    let inventory = gpu.inventory();
    let inventory = inventory.borrow();
    let on = |uuid: &String| {
        let device = inventory.devices.iter().find(|d| d.uuid == *uuid)?;
        Some(returned::unlisted(device, listed(&holders, uuid)))
    };
    devices.iter().map(on).collect()
}
