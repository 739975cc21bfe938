//! What the threads publish. Each value is replaced under the channel's own lock, which nobody holds during a call.

use std::sync::Arc;

use pool_services::ports::{Incident, Incidents, Inventory};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::Opening;

/// The channels of one [`crate::NvmlGpus`].
#[derive(Debug, Clone)]
pub(crate) struct Shared(Arc<Channels>);

#[derive(Debug)]
struct Channels {
    inventory: watch::Sender<Inventory>,
    incidents: watch::Sender<Incidents>,
    opening: watch::Sender<Opening>,
}

impl Default for Shared {
    fn default() -> Self {
        Self(Arc::new(Channels {
            inventory: watch::Sender::new(Inventory {
                problem: Some("the NVIDIA driver library is being opened".to_owned()),
                ..Inventory::default()
            }),
            incidents: watch::Sender::default(),
            opening: watch::Sender::new(Opening::Trying(None)),
        }))
    }
}

impl Shared {
    pub(crate) fn inventory(&self) -> watch::Receiver<Inventory> {
        self.0.inventory.subscribe()
    }

    pub(crate) fn incidents(&self) -> watch::Receiver<Incidents> {
        self.0.incidents.subscribe()
    }

    pub(crate) fn opening(&self) -> watch::Receiver<Opening> {
        self.0.opening.subscribe()
    }

    pub(crate) fn set_opening(&self, now: Opening) {
        self.0.opening.send_if_modified(|opening| {
            // One that was open once is not opened for the first time again.
            let changed = *opening != Opening::Done && *opening != now;
            if changed {
                *opening = now;
            }
            changed
        });
    }

    /// The inventory as it was published last.
    pub(crate) fn last(&self) -> Inventory {
        self.0.inventory.borrow().clone()
    }

    /// Replaces the inventory and tells those who look, if anything of it is new; tells the log of a new problem once.
    pub(crate) fn publish(&self, next: impl FnOnce(&Inventory) -> Inventory) {
        self.0.inventory.send_if_modified(|current| {
            let next = next(current);
            match (&current.problem, &next.problem) {
                (before, Some(problem)) if before.as_ref() != Some(problem) => {
                    warn!(problem, "the GPUs cannot be read");
                }
                (Some(_), None) => info!("the GPUs can be read"),
                _ => {}
            }
            let changed = *current != next;
            *current = next;
            changed
        });
    }

    /// Tells of something that the driver said.
    pub(crate) fn tell(&self, incident: Incident) {
        self.0.incidents.send_modify(|all| all.push(incident));
    }
}
