//! What a driver is told, and what it tells.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pool_domain::lifecycle::{Command, Fact, Proof, State, Wait};
use pool_domain::meters::Reading;
use pool_domain::plan::Demand;
use pool_domain::{DeviceMask, Failure, Generation, ResolvedMask};

use crate::api_key::ApiKey;
use crate::ports::{EngineRecord, PreparedEngine, ResolvedModel, RunningEngine, Staging};
use crate::snapshot::ReplicaSnapshot;
use crate::spec::PoolSpec;

/// What a start needs from the node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Want {
    pub(crate) generation: Generation,
    pub(crate) mask: DeviceMask,
    /// Where it was, and is to be again if that can be.
    pub(crate) home: Option<ResolvedMask>,
    pub(crate) demand: Arc<Demand>,
    /// An engine run by somebody else needs neither devices nor a port.
    pub(crate) external: bool,
}

/// What the steward gave.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grant {
    pub(crate) generation: Generation,
    pub(crate) devices: ResolvedMask,
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Bytes on each device, in order.
    pub(crate) bytes: Vec<u64>,
    /// What was free to it on all of them together; unset where nobody knows any more.
    pub(crate) room: Option<u64>,
    pub(crate) tensor_split: Option<String>,
    pub(crate) context: Option<u64>,
}

impl Grant {
    /// Bytes by device.
    pub(crate) fn pairs(&self) -> Vec<(String, u64)> {
        self.devices.uuids.iter().cloned().zip(self.bytes.iter().copied()).collect()
    }
}

/// Commands from above.
#[derive(Debug)]
pub(crate) enum DriverCommand {
    Verb(Command),
    Grant(Grant),
    Deny(Generation, Denied),
    /// It waits on, for this.
    Waits(Generation, Wait),
    /// Stop if nobody uses it.
    GiveWay,
    /// What it waited for may be there.
    Unblock,
    /// Its devices failed it: whatever this generation runs is ended at once.
    Condemn(Generation, Failure),
    /// Its devices are to be left: what this generation serves may end, for a short time, and then it looks for others.
    Evacuate(Generation),
    /// A person says that nothing of the engine is left.
    Unfence,
    /// Nothing is to be tried again by itself.
    GiveUp(Failure),
    /// What the next start makes the engine from.
    Respec(Arc<PoolSpec>),
    /// Where the next starts are to be, until there is another spec.
    GoHome(ResolvedMask),
    /// The daemon ends and its engines live on: leave everything as it is.
    Leave,
}

/// Why the steward gave nothing.
#[derive(Debug)]
pub(crate) enum Denied {
    Wait(Wait),
    Never(Failure),
}

/// What conductor and steward see of a replica.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Published {
    pub(crate) snapshot: ReplicaSnapshot,
    /// What its engine wants to hear: for those who get a slot, and not part of the picture that everybody sees.
    pub(crate) api_key: Option<ApiKey>,
    pub(crate) state: State,
    pub(crate) wants: Option<Want>,
    /// What it wanted when it was told to wait.
    pub(crate) blocked: Option<Want>,
    /// What it was seen to hold, by device, as far as that is known.
    pub(crate) taken: BTreeMap<String, u64>,
    /// Its processes, as far as they are known.
    pub(crate) pids: BTreeSet<u32>,
    /// When the next start is due, where one is planned.
    pub(crate) next_start: Option<pool_domain::Tick>,
    pub(crate) accused: Option<Accused>,
    /// Verbs taken in so far: what is older than a verb is no answer to it.
    pub(crate) verbs: u64,
}

/// The newest failure that throws suspicion on the devices it met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accused {
    pub(crate) generation: Generation,
    pub(crate) class: &'static str,
    pub(crate) at: pool_domain::Tick,
}

/// Memory that an engine was seen to hold.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    /// Bytes by device, as far as that is known.
    pub(crate) on: BTreeMap<String, u64>,
    pub(crate) pids: Vec<u32>,
}

/// Results of work, told to the driver.
#[derive(Debug)]
pub(crate) enum Report {
    Fact(Fact),
    Staging(Staging),
    /// Percent of its model that the engine says it has loaded.
    Loaded(u8),
    Staged(ResolvedModel, Arc<Demand>),
    Proved(Proof, Holds),
    /// The driver does not answer, for this reason.
    Unprovable(String),
    Preflighted,
    Prepared(Box<(PreparedEngine, EngineRecord)>),
    Launched(Arc<dyn RunningEngine>),
    /// What it publishes in numbers, and what of the same was seen of its answers.
    Read {
        told: Reading,
        seen: Reading,
    },
    Checked(Fact),
}
