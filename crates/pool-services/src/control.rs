//! The verbs. `PoolManager` implements them in process, `pool-api`'s client over HTTP.

use std::fmt;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use pool_domain::lifecycle::OnDeadline;
use pool_domain::rollout::Strategy;
use pool_domain::{DeviceMask, Holder, PoolId, ReplicaKey};
use thiserror::Error;

use crate::declared::Declared;
pub use crate::lease::{Lease, LeaseRequest};
use crate::planning::{Placed, PlanReport};
use crate::snapshot::{NodeSnapshot, PoolSnapshot};
use crate::spec::PoolSpec;

/// Why a verb was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// No such pool.
    #[error("there is no pool `{0}`")]
    PoolNotFound(String),
    /// No such operation.
    #[error("there is no operation `{0}`")]
    OperationNotFound(String),
    /// No such lease.
    #[error("there is no lease `{0}`")]
    LeaseNotFound(String),
    /// No such device.
    #[error("there is no device `{0}`")]
    DeviceNotFound(String),
    /// It is declared in the config file, and is changed there.
    #[error("the pool `{0}` is declared in the config file")]
    PoolInFile(String),
    /// It contradicts what is going on.
    #[error("{0}")]
    Conflict(String),
    /// Every slot is taken.
    #[error("every slot of the pool is taken")]
    Saturated {
        /// Until one is likely free.
        retry_after: Duration,
    },
    /// Nothing is ready.
    #[error("the pool is not ready: {why}")]
    Unready {
        /// Why.
        why: String,
        /// Until its next start, where one is planned.
        retry_after: Option<Duration>,
    },
    /// It is being drained or held.
    #[error("the pool is drained")]
    Draining,
    /// The breaker is open.
    #[error("the pool's engine keeps failing; the next start is tried in {retry_after:?}")]
    Unavailable {
        /// Until half-open.
        retry_after: Duration,
    },
    /// It waits for GPU memory that others hold.
    #[error("{detail}")]
    InsufficientVram {
        /// What is missing, and who stays and why.
        detail: String,
        /// Until it may be possible, where that is known.
        retry_after: Option<Duration>,
    },
    /// The daemon is stopping or the far side did not answer.
    #[error("{0}")]
    Unreachable(String),
    /// Refused for what is asked for, with a code of the API.
    #[error("{detail}")]
    Refused {
        /// Its code.
        code: String,
        /// Its words.
        detail: String,
    },
}

impl ControlError {
    /// Nothing is ready, and when it will be is not known.
    pub fn unready(why: impl Into<String>) -> Self {
        Self::Unready { why: why.into(), retry_after: None }
    }
}

/// How to drain. Unset means what the pool's spec says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DrainOptions {
    /// Time for leases.
    pub deadline: Option<Duration>,
    /// What happens then.
    pub on_deadline: Option<OnDeadline>,
}

/// Another form of a pool, and how to get there. Unset means what the pool has, or what its spec says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ReloadRequest {
    /// What it is to be, with its document.
    pub declared: Option<(PoolSpec, String)>,
    /// The revision that this was made from; another one is a conflict.
    pub if_match: Option<u64>,
    /// How engines are replaced.
    pub strategy: Option<Strategy>,
    /// Time for the whole of it.
    pub deadline: Option<Duration>,
    /// What happens then.
    pub on_deadline: Option<OnDeadline>,
}

/// How an operation stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OperationState {
    /// Under way.
    Running,
    /// Done; with its outcome as one word.
    Succeeded(String),
    /// Not done; with the reason.
    Failed(String),
}

/// What a drain still waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainLeft {
    /// Leases that are held.
    pub leases: u32,
    /// Until leases are revoked, or the drain is given up.
    pub time: Duration,
}

/// Something that takes a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Its name.
    pub id: String,
    /// `preload`, `drain`, `resume`, `stop`, `declare`, `remove`, `reload`, `rollback`.
    pub verb: String,
    /// The pool.
    pub pool_id: PoolId,
    /// Where it stands.
    pub state: OperationState,
    /// How far it is, in words.
    pub progress: String,
    /// While something of the pool is being drained.
    pub left: Option<DrainLeft>,
    /// When it began.
    pub started_at: SystemTime,
}

/// What to plan.
#[derive(Debug, Clone, PartialEq)]
pub enum PlanRequest {
    /// A pool that exists.
    Pool(PoolId),
    /// One that could.
    Spec(Box<PoolSpec>),
}

/// What a request needs of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PlacementRequest {
    /// Only this pool.
    pub pool: Option<PoolId>,
    /// A model by id or alias.
    pub model: Option<String>,
    /// Tokens, prompt and answer together.
    pub context: Option<u64>,
    /// Only on these devices.
    pub devices: Option<DeviceMask>,
    /// A hint: this one goes first if it can serve at all.
    pub prefer_replica: Option<ReplicaKey>,
}

/// Everything that can be asked of a node.
#[async_trait]
pub trait PoolControl: fmt::Debug + Send + Sync {
    /// The node and its devices.
    async fn node(&self) -> Result<NodeSnapshot, ControlError>;
    /// Every pool.
    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError>;
    /// One pool.
    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError>;
    /// One pool, once its picture is newer than `after` or the time is over.
    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError>;
    /// Start every replica and lift the hold.
    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError>;
    /// Refuse new leases, wait, stop; leaves a hold.
    async fn drain(&self, id: &PoolId, options: DrainOptions) -> Result<Operation, ControlError>;
    /// Give up a running drain or lift the hold.
    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError>;
    /// A drain with deadline 0 and force.
    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError>;
    /// Make a pool, or give one that was declared over the API another form. `if_match` is the revision it has to have.
    async fn declare(&self, declared: Declared, if_match: Option<u64>) -> Result<Operation, ControlError>;
    /// Drain a pool of the API and forget it. It is there until nothing of it is left.
    async fn remove(&self, id: &PoolId, if_match: Option<u64>) -> Result<Operation, ControlError>;
    /// Give a pool another form: the new one serves in the end, or the old one as it was.
    async fn reload(&self, id: &PoolId, request: ReloadRequest) -> Result<Operation, ControlError>;
    /// Go back to what the pool was before its last reload.
    async fn rollback(&self, id: &PoolId) -> Result<Operation, ControlError>;
    /// The revision of a pool's spec, and the pool in its wire form.
    async fn document(&self, id: &PoolId) -> Result<(u64, String), ControlError>;
    /// Forget failures and close the breaker.
    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError>;
    /// Believe a person that nothing of an engine is left on this device, named as in a mask: whatever is fenced there
    /// goes on. One that is not fenced stays as it is.
    async fn unfence(&self, device: &str) -> Result<(), ControlError>;
    /// Recent operations, newest first.
    async fn operations(&self) -> Result<Vec<Operation>, ControlError>;
    /// One operation.
    async fn operation(&self, id: &str) -> Result<Operation, ControlError>;
    /// One operation, once it is done or the time is over.
    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError>;
    /// Take a slot, or wait for one; a pool at rest that starts on demand is started. Dropping the future gives up the place.
    async fn lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError>;
    /// Let a lease go on from now for `ttl`, or for as long as before. One that an earlier daemon granted goes on, too, if
    /// its engine still serves and there is a slot.
    async fn renew(&self, lease_id: &str, ttl: Option<Duration>) -> Result<Lease, ControlError> {
        self.renew_for(lease_id, ttl, Holder::default()).await
    }
    /// The same; a lease of before a restart of the daemon, which does not know whose it was, goes on as this holder's.
    async fn renew_for(&self, lease_id: &str, ttl: Option<Duration>, holder: Holder) -> Result<Lease, ControlError>;
    /// Every lease that is held, but for guards within the process.
    async fn leases(&self) -> Result<Vec<Lease>, ControlError>;
    /// What would be started where for this pool, or for one like it; starts nothing.
    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError>;
    /// Every replica, the best for the request first, each with its reason.
    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError>;
    /// Give a slot back; releasing what is over is fine, what never was is `LeaseNotFound`.
    async fn release(&self, lease_id: &str) -> Result<(), ControlError>;
}
