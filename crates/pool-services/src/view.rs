//! The node's devices as they stand, for whoever plans.

use std::collections::BTreeMap;

use pool_domain::{DeviceSnapshot, PoolId};
use tokio::sync::watch;

use crate::conditions::{self, Conditions};
use crate::ports::Inventory;
use crate::steward::Ledgered;

/// What the GPU port and the steward tell.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) ledgered: watch::Receiver<Ledgered>,
    pub(crate) conditions: watch::Receiver<Conditions>,
}

impl View {
    /// The devices as they stand now.
    pub(crate) fn inventory(&self) -> Inventory {
        let mut inventory = self.inventory.borrow().clone();
        let conditions = self.conditions.borrow();
        inventory.devices.iter_mut().for_each(|d| conditions::overlay(d, &conditions));
        inventory
    }

    /// The devices as they are, with who else uses them; and what is promised on them, but for one pool.
    pub(crate) fn devices_without(&self, pool: Option<&PoolId>) -> (Vec<DeviceSnapshot>, BTreeMap<String, u64>) {
        let (inventory, mut told) = (self.inventory(), self.ledgered.borrow().clone());
        let mut devices = inventory.devices;
        for device in &mut devices {
            device.vram_foreign = device.vram_foreign.max(told.foreign.get(&device.uuid).copied().unwrap_or(0));
        }
        for (_, held) in told.held.iter().filter(|(key, _)| Some(&key.pool) == pool) {
            for (uuid, bytes) in held {
                if let Some(promised) = told.promised.get_mut(uuid) {
                    *promised = promised.saturating_sub(*bytes);
                }
                if let Some(device) = devices.iter_mut().find(|d| d.uuid == *uuid) {
                    device.vram_used = device.vram_used.saturating_sub(*bytes);
                }
            }
        }
        (devices, told.promised)
    }
}
