//! Verbs carried out to their end, under the names the project began with: over any [`PoolControl`], in process or remote.

use std::time::Duration;

use pool_domain::PoolId;
use pool_domain::lifecycle::OnDeadline;

use crate::control::{ControlError, DrainOptions, Operation, OperationState, PoolControl, ReloadRequest};

/// Longest single wait for an operation; waits follow each other until it is over.
const LOOK: Duration = Duration::from_secs(60);

/// A drain of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainRequest {
    /// Which pool.
    pub pool: PoolId,
    /// How.
    pub options: DrainOptions,
}

impl DrainRequest {
    /// Leases have until then, and are revoked at the deadline.
    #[must_use]
    pub fn new(pool: PoolId, deadline: Duration) -> Self {
        let options = DrainOptions { deadline: Some(deadline), on_deadline: Some(OnDeadline::Force) };
        Self { pool, options }
    }
}

/// How a drain ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DrainOutcome {
    /// Nothing of it runs, and the pool is held.
    Drained,
    /// It was given up, called off, or could not be proved.
    NotDrained(String),
}

/// How a reload ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReloadOutcome {
    /// The new form serves.
    Reloaded,
    /// It was of that form already.
    Unchanged,
    /// The pool is as it was, or the reason says what became of it.
    NotReloaded(String),
}

/// How a preload ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreloadOutcome {
    /// Every replica proved that it serves.
    Ready,
    /// One did not; its pool tells the last error.
    NotReady(String),
}

/// How an operation ended, once it has.
async fn end(operation: Operation, control: &dyn PoolControl) -> Result<Result<String, String>, ControlError> {
    let mut operation = operation;
    loop {
        match operation.state {
            OperationState::Succeeded(outcome) => return Ok(Ok(outcome)),
            OperationState::Failed(why) => return Ok(Err(why)),
            OperationState::Running => operation = control.wait_operation(&operation.id, LOOK).await?,
        }
    }
}

/// Drains a pool and waits until nothing of it runs.
///
/// # Errors
/// When the drain was refused, or nobody can say what became of it.
pub async fn execute_drain(request: &DrainRequest, control: &dyn PoolControl) -> Result<DrainOutcome, ControlError> {
    let begun = control.drain(&request.pool, request.options).await?;
    Ok(end(begun, control).await?.map_or_else(DrainOutcome::NotDrained, |_| DrainOutcome::Drained))
}

/// Gives a pool another form and waits until the new one serves, or the old one as it was.
///
/// # Errors
/// When the reload was refused, or nobody can say what became of it.
pub async fn execute_reload(
    pool: &PoolId,
    request: ReloadRequest,
    control: &dyn PoolControl,
) -> Result<ReloadOutcome, ControlError> {
    let begun = control.reload(pool, request).await?;
    Ok(match end(begun, control).await? {
        Ok(outcome) if outcome == UNCHANGED => ReloadOutcome::Unchanged,
        Ok(_) => ReloadOutcome::Reloaded,
        Err(why) => ReloadOutcome::NotReloaded(why),
    })
}

/// What a reload says that had nothing to do.
pub(crate) const UNCHANGED: &str = "unchanged";

impl PreloadOutcome {
    /// Starts every replica of a pool and waits until all have proved that they serve, or one cannot.
    ///
    /// # Errors
    /// When the preload was refused, or nobody can say what became of it.
    pub async fn execute(pool: &PoolId, control: &dyn PoolControl) -> Result<Self, ControlError> {
        let begun = control.preload(pool).await?;
        Ok(end(begun, control).await?.map_or_else(Self::NotReady, |_| Self::Ready))
    }
}
