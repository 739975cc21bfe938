//! Whether a pool may be declared or changed, before anything is done for it.

use pool_domain::PoolId;

use crate::control::{ControlError, Operation, ReloadRequest};
use crate::declared::Source;
use crate::ports::EngineProvisioner;
use crate::roster::{PoolHandle, Table};
use crate::spec::PoolSpec;

/// Another form of a pool, for its conductor.
#[derive(Debug)]
pub(crate) enum Change {
    /// This one.
    To(Box<Reload>),
    /// What it was before.
    Back,
}

/// What a pool is to become.
#[derive(Debug)]
pub(crate) struct Reload {
    pub(crate) request: ReloadRequest,
    /// Who declares it from then on, where that changes.
    pub(crate) source: Option<Source>,
}

/// Asks the conductor of a pool for a change.
pub(crate) async fn begin(handle: &PoolHandle, change: Change) -> Result<Operation, ControlError> {
    if let Change::To(reload) = &change {
        let Reload { request, source } = &**reload;
        matching(request.if_match, handle.roster().standing.revision)?;
        tracing::debug!(source = source.as_ref().map(Source::code), "a reload is asked for");
    }
    Err(ControlError::Conflict("reload is not built yet".into()))
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
