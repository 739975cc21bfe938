//! Whether a pool may be declared or changed, before anything is done for it.

use std::sync::Arc;

use pool_domain::PoolId;
use tokio::sync::oneshot;

use crate::conductor::{ConductorCommand, Made, Reload, Wish};
use crate::control::{ControlError, Operation, ReloadRequest};
use crate::declared::Source;
use crate::ports::EngineProvisioner;
use crate::roster::{PoolHandle, Table};
use crate::spec::PoolSpec;

/// What a pool is to become.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) request: ReloadRequest,
    /// Who declares it from then on, where that changes.
    pub(crate) source: Option<Source>,
}

/// Asks the conductor of a pool for a change.
pub(crate) async fn begin(handle: &PoolHandle, change: Change) -> Result<Operation, ControlError> {
    let Change { request, source } = change;
    let roster = handle.roster();
    matching(request.if_match, roster.standing.revision)?;
    let to = match request.declared {
        Some((spec, document)) => Made { spec: Arc::new(spec), document },
        None => Made { spec: Arc::clone(&roster.spec), document: roster.standing.document.clone() },
    };
    let ReloadRequest { strategy, deadline, on_deadline, .. } = request;
    ask(handle, Wish::Reload(Box::new(Reload { to, source, strategy, deadline, on_deadline, back: false }))).await
}

/// Asks it for what was before its last change.
pub(crate) async fn back(handle: &PoolHandle) -> Result<Operation, ControlError> {
    ask(handle, Wish::Rollback).await
}

/// Asks it for anything.
pub(crate) async fn ask(handle: &PoolHandle, wish: Wish) -> Result<Operation, ControlError> {
    let (answer, answered) = oneshot::channel();
    let stopping = || ControlError::Unreachable("the pool is too busy or stopping".into());
    handle.commands.try_send(ConductorCommand { wish, answer }).map_err(|_| stopping())?;
    answered.await.map_err(|_| stopping())?
}

/// Refuses what was made from another revision.
pub(crate) fn matching(wanted: Option<u64>, revision: u64) -> Result<(), ControlError> {
    match wanted {
        Some(wanted) if wanted != revision => Err(ControlError::Conflict(format!(
            "the pool has revision {revision}, not {wanted}: read it again and make the change from there"
        ))),
        _ => Ok(()),
    }
}

/// Why a pool cannot stand beside the others: a name that means two pools, or an engine that would be of two. Pools of
/// one file were compared when it was read.
pub(crate) fn clash(
    table: &Table,
    leaving: impl Fn(&PoolId) -> bool,
    spec: &PoolSpec,
    source: &Source,
    provisioner: &dyn EngineProvisioner,
) -> Result<(), ControlError> {
    let same_file = |other: &Source| matches!((source, other), (Source::File { .. }, Source::File { .. }));
    for (id, handle) in table.iter().filter(|(id, _)| **id != spec.id && !leaving(id)) {
        let roster = handle.roster();
        if same_file(&roster.standing.source) {
            continue;
        }
        let endpoints = || (provisioner.external(spec), provisioner.external(&roster.spec));
        if let Some(why) = spec.clashes_with(&roster.spec, endpoints) {
            return Err(ControlError::Conflict(format!("{why}: pool `{id}` is there already")));
        }
    }
    Ok(())
}
