//! What the steward says of devices beyond what their driver does.

use std::collections::BTreeMap;

use pool_domain::{DeviceHealth, DeviceSnapshot, PoolId, Verdict};
use tokio::sync::oneshot;

use crate::control::ControlError;
use crate::snapshot::XidCount;

/// What the steward knows of devices beyond their driver's inventory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Conditions {
    /// Those that admit nothing new, by UUID.
    pub(crate) devices: BTreeMap<String, Condition>,
    /// XIDs that were reported.
    pub(crate) xids: Vec<XidCount>,
}

/// Why a device admits nothing new, and what has to be done about it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Condition {
    pub(crate) health: DeviceHealth,
    pub(crate) verdict: Verdict,
}

impl Condition {
    /// Without anything to be done.
    pub(crate) fn of(health: DeviceHealth) -> Self {
        Self { health, verdict: Verdict::None }
    }
}

/// What is wanted of the steward.
#[derive(Debug)]
pub(crate) enum StewardCommand {
    /// To believe that nothing of an engine is left on a device.
    Unfence { device: String, answer: oneshot::Sender<Result<(), ControlError>> },
    /// To know that it still goes round.
    Ping { answer: oneshot::Sender<()> },
}

/// Why a device is fenced, as the end of a sentence.
pub(crate) fn left_by(pool: &PoolId) -> String {
    format!("something of an engine of the pool `{pool}` may be left there")
}

/// How a device stands; what its own driver has against it weighs more.
pub(crate) fn stands<'a>(device: &'a DeviceSnapshot, conditions: &'a Conditions) -> (&'a DeviceHealth, Verdict) {
    match conditions.devices.get(&device.uuid) {
        Some(condition) => {
            let health = if device.health.admits() { &condition.health } else { &device.health };
            (health, device.verdict.max(condition.verdict))
        }
        None => (&device.health, device.verdict),
    }
}

/// The device as it stands.
pub(crate) fn overlay(device: &mut DeviceSnapshot, conditions: &Conditions) {
    let (health, verdict) = stands(device, conditions);
    (device.health, device.verdict) = (health.clone(), verdict);
}
