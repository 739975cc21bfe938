//! What the steward says of devices beyond what their driver does.

use std::collections::BTreeMap;

use pool_domain::{DeviceHealth, DeviceSnapshot, PoolId};
use tokio::sync::oneshot;

use crate::control::ControlError;

/// Devices that admit nothing new, and why, by UUID.
pub(crate) type Conditions = BTreeMap<String, DeviceHealth>;

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

/// The device as it stands; what its own driver has against it weighs more.
pub(crate) fn overlay(device: &mut DeviceSnapshot, conditions: &Conditions) {
    if let Some(health) = conditions.get(&device.uuid).filter(|_| device.health.admits()) {
        device.health = health.clone();
    }
}
