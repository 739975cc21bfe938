//! From wire values to inner values, for the client.

use std::time::{Duration, SystemTime};

use pool_domain::lifecycle::State;
use pool_domain::{FailureClass, Generation, PoolId, ReplicaId};
use pool_services::ports::{Staging, StagingStep};
use pool_services::snapshot::LastError;
use pool_services::{DrainLeft, NodeSnapshot, Operation, OperationState, PoolSnapshot, ReplicaSnapshot};
use thiserror::Error;

use super::{LastErrorView, NodeView, OperationView, PoolView, ReplicaView, StagingView};

/// An answer that is well formed but means nothing here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {message}")]
pub struct DtoError {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

pub(super) fn wrong(field: &'static str, text: &str) -> DtoError {
    DtoError { field, message: format!("`{text}` is unknown here") }
}

pub(super) fn time(field: &'static str, text: &str) -> Result<SystemTime, DtoError> {
    humantime::parse_rfc3339(text).map_err(|_| DtoError { field, message: format!("`{text}` is no RFC 3339 time") })
}

pub(super) fn pool_id(text: &str) -> Result<PoolId, DtoError> {
    text.parse().map_err(|_| wrong("pool_id", text))
}

pub(super) fn replica_id(text: &str) -> Result<ReplicaId, DtoError> {
    text.strip_prefix('r').and_then(|n| n.parse().ok()).map(ReplicaId).ok_or_else(|| wrong("replica_id", text))
}

/// The word as this program knows it; a newer daemon's words become `unknown`.
fn word(text: &str, known: &[&[&'static str]]) -> &'static str {
    if text.is_empty() {
        return "";
    }
    known.iter().flat_map(|k| k.iter()).find(|k| **k == text).copied().unwrap_or("unknown")
}

const REASONS: &[&str] = &["backoff", "breaker", "devices", "vram", "hold", "fenced", "draining", "stopping"];
const BREAKERS: &[&str] = &["closed", "open", "half_open"];
const PROOFS: &[&str] = &["vram", "simulated", "served"];
const WORKLOADS: &[&str] = &["generate", "embed", "rerank"];
const SOURCES: &[&str] = &["file", "api"];

fn class(text: &str) -> Result<FailureClass, DtoError> {
    FailureClass::from_code(text).ok_or_else(|| wrong("last_error.class", text))
}

impl TryFrom<LastErrorView> for LastError {
    type Error = DtoError;
    fn try_from(e: LastErrorView) -> Result<Self, DtoError> {
        Ok(Self { class: class(&e.class)?, detail: e.detail, at: time("last_error.at", &e.at)? })
    }
}

impl From<StagingView> for Staging {
    fn from(s: StagingView) -> Self {
        let step = match s.step.as_str() {
            "waiting" => StagingStep::Waiting,
            "verifying" => StagingStep::Verifying,
            _ => StagingStep::Fetching,
        };
        Self { step, done: s.done_bytes, total: s.total_bytes, rate: s.bytes_per_s }
    }
}

impl TryFrom<ReplicaView> for ReplicaSnapshot {
    type Error = DtoError;
    fn try_from(r: ReplicaView) -> Result<Self, DtoError> {
        Ok(Self {
            id: replica_id(&r.replica_id)?,
            generation: Generation(r.generation),
            state: word(&r.state, &[&State::CODES]),
            reason_code: word(&r.reason_code, &[REASONS, &FailureClass::CODES, &State::CODES]),
            reason: r.reason,
            live: r.live,
            ready: r.ready,
            draining: r.draining,
            endpoint: r.endpoint,
            pid: r.pid,
            device_mask: r.device_mask,
            engine_version: r.engine_version,
            slots_total: r.slots_total,
            active_leases: r.active_leases,
            restart_count: r.restart_count,
            breaker: word(&r.breaker, &[BREAKERS]),
            backoff_failures: r.backoff.failures,
            next_start_in_ms: r.backoff.next_start_in_ms,
            proof: word(&r.proof, &[PROOFS]),
            first_unit_ms: r.perf.first_token_ms,
            last_error: r.last_error.map(TryInto::try_into).transpose()?,
            consecutive_failures: r.consecutive_failures,
            last_check_at: r.last_check_at.map(|t| time("last_check_at", &t)).transpose()?,
            vram_reserved: r.vram_reserved_bytes,
            context: r.context,
            staging: r.staging.map(Into::into),
            loaded_percent: r.loaded_percent,
        })
    }
}

impl TryFrom<PoolView> for PoolSnapshot {
    type Error = DtoError;
    fn try_from(p: PoolView) -> Result<Self, DtoError> {
        Ok(Self {
            pool_id: pool_id(&p.pool_id)?,
            snapshot: p.snapshot,
            revision: p.revision,
            source: word(&p.source, &[SOURCES]),
            engine: p.engine,
            model: p.model,
            model_id: p.model_id,
            aliases: p.aliases,
            workload: word(&p.workload, &[WORKLOADS]),
            hold: p.hold,
            leases_waiting: p.leases_waiting,
            // Nobody takes guards of another process.
            guards: Default::default(),
            replicas: p.replicas.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

pub(super) fn capability(text: &str) -> Result<(u32, u32), DtoError> {
    text.split_once('.')
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .ok_or_else(|| wrong("compute_capability", text))
}

impl TryFrom<NodeView> for NodeSnapshot {
    type Error = DtoError;
    fn try_from(n: NodeView) -> Result<Self, DtoError> {
        Ok(Self {
            simulated: n.simulated,
            driver: n.driver,
            cuda: n.cuda,
            devices: n.devices.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            xids: n.xids.into_iter().map(Into::into).collect(),
            problem: n.problem,
            // Only the metrics tell.
            events_lost: 0,
        })
    }
}

impl TryFrom<OperationView> for Operation {
    type Error = DtoError;
    fn try_from(o: OperationView) -> Result<Self, DtoError> {
        let state = match o.state.as_str() {
            "running" => OperationState::Running,
            "succeeded" => OperationState::Succeeded(o.outcome.unwrap_or_default()),
            "failed" => OperationState::Failed(o.problem.unwrap_or_default()),
            other => return Err(wrong("state", other)),
        };
        Ok(Self {
            id: o.operation_id,
            verb: o.verb,
            pool_id: pool_id(&o.pool_id)?,
            state,
            progress: o.progress,
            left: o
                .leases_left
                .zip(o.time_left_ms)
                .map(|(leases, ms)| DrainLeft { leases, time: Duration::from_millis(ms) }),
            started_at: time("started_at", &o.started_at)?,
        })
    }
}
