//! Who belongs to a pool now, and which pools there are: lists that change while the daemon runs, each written by one task
//! and read by all.

use std::collections::BTreeMap;
use std::sync::Arc;

use pool_domain::{PoolId, ReplicaKey};
use tokio::sync::{mpsc, watch};

use crate::admission::Admission;
use crate::conductor::{ConductorCommand, PoolFacts};
use crate::declared::Standing;
use crate::driver::{DriverCommand, Published};
use crate::lease_desk::Desk;
use crate::spec::PoolSpec;

/// A replica, as others than its conductor see it.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(crate) key: ReplicaKey,
    pub(crate) published: watch::Receiver<Published>,
    /// Weak: a driver ends with its conductor.
    pub(crate) commands: mpsc::WeakSender<DriverCommand>,
    pub(crate) admission: Arc<Admission>,
    /// Whether leases of the pool may be granted here. Not for one that is to be proved first, or that leaves.
    pub(crate) serves: bool,
}

impl Seat {
    /// Commands its driver, which never waits for anybody above it, so this cannot deadlock.
    pub(crate) async fn tell(&self, command: DriverCommand) {
        if let Some(commands) = self.commands.upgrade() {
            let _ended = commands.send(command).await;
        }
    }
}

/// A pool's replicas, and what they are to be.
#[derive(Debug, Clone)]
pub(crate) struct Roster {
    pub(crate) spec: Arc<PoolSpec>,
    /// How that came about.
    pub(crate) standing: Arc<Standing>,
    pub(crate) seats: Vec<Seat>,
}

impl Roster {
    pub(crate) fn serving(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().filter(|s| s.serves)
    }
}

/// What others have of a pool.
#[derive(Debug, Clone)]
pub(crate) struct PoolHandle {
    pub(crate) commands: mpsc::Sender<ConductorCommand>,
    pub(crate) facts: watch::Receiver<PoolFacts>,
    pub(crate) roster: watch::Receiver<Arc<Roster>>,
    pub(crate) desk: Desk,
}

impl PoolHandle {
    pub(crate) fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.roster.borrow())
    }

    pub(crate) fn spec(&self) -> Arc<PoolSpec> {
        Arc::clone(&self.roster.borrow().spec)
    }
}

/// Every pool. Written by the catalog.
pub(crate) type Table = Arc<BTreeMap<PoolId, PoolHandle>>;
