//! From inner values to wire values.

use std::time::{SystemTime, UNIX_EPOCH};

use pool_services::ports::Staging;
use pool_services::snapshot::LastError;
use pool_services::{NodeSnapshot, Operation, OperationState, PoolSnapshot, ReplicaSnapshot};

use super::{
    BackoffView, HealthView, LastErrorView, NodeView, OperationView, PerfView, PoolView, ReplicaHealthView,
    ReplicaView, StagingView,
};

pub(super) fn time(t: SystemTime) -> String {
    // humantime refuses to format times before 1970; nothing here is older.
    humantime::format_rfc3339_millis(t.max(UNIX_EPOCH)).to_string()
}

fn unix_ms(t: SystemTime) -> u64 {
    t.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl From<&LastError> for LastErrorView {
    fn from(e: &LastError) -> Self {
        Self { class: e.class.code().into(), detail: e.detail.clone(), at: time(e.at) }
    }
}

impl From<&Staging> for StagingView {
    fn from(s: &Staging) -> Self {
        Self {
            step: s.step.code().into(),
            done_bytes: s.done,
            total_bytes: s.total,
            bytes_per_s: s.rate,
            left_ms: s.left().map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

impl From<&ReplicaSnapshot> for ReplicaView {
    fn from(r: &ReplicaSnapshot) -> Self {
        Self {
            replica_id: r.id.to_string(),
            generation: r.generation.0,
            state: r.state.into(),
            reason: r.reason.clone(),
            reason_code: r.reason_code.into(),
            live: r.live,
            ready: r.ready,
            draining: r.draining,
            endpoint: r.endpoint.clone(),
            pid: r.pid,
            device_mask: r.device_mask.clone(),
            engine_version: r.engine_version.clone(),
            slots_total: r.slots_total,
            active_leases: r.active_leases,
            restart_count: r.restart_count,
            breaker: r.breaker.into(),
            backoff: BackoffView { failures: r.backoff_failures, next_start_in_ms: r.next_start_in_ms },
            proof: r.proof.into(),
            perf: PerfView { first_token_ms: r.first_unit_ms },
            last_error: r.last_error.as_ref().map(Into::into),
            consecutive_failures: r.consecutive_failures,
            last_check_at: r.last_check_at.map(time),
            vram_reserved_bytes: r.vram_reserved,
            context: r.context,
            staging: r.staging.as_ref().map(Into::into),
            loaded_percent: r.loaded_percent,
        }
    }
}

fn uuids(p: &PoolSnapshot) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for entry in p.replicas.iter().flat_map(|r| r.device_mask.split(',')) {
        if (entry.starts_with("GPU-") || entry.starts_with("MIG-")) && !found.iter().any(|f| f == entry) {
            found.push(entry.to_owned());
        }
    }
    found
}

impl From<&PoolSnapshot> for PoolView {
    fn from(p: &PoolSnapshot) -> Self {
        let lead = p.lead().map(ReplicaView::from);
        let ready = || p.replicas.iter().filter(|r| r.ready && !r.draining);
        Self {
            pool_id: p.pool_id.to_string(),
            snapshot: p.snapshot,
            revision: p.revision,
            source: p.source.into(),
            engine: p.engine.clone(),
            engine_version: lead.as_ref().map(|l| l.engine_version.clone()).unwrap_or_default(),
            model_id: p.model_id.clone(),
            model: p.model.clone(),
            aliases: p.aliases.clone(),
            workload: p.workload.into(),
            device_mask: lead.as_ref().map(|l| l.device_mask.clone()).unwrap_or_default(),
            devices: uuids(p),
            vram_total_bytes: None,
            vram_free_bytes: None,
            compute_capability: None,
            slots_total: ready().map(|r| r.slots_total).sum(),
            slots_free: ready().map(|r| r.slots_total.saturating_sub(r.active_leases)).sum(),
            active_leases: p.replicas.iter().map(|r| r.active_leases).sum(),
            leases_waiting: p.leases_waiting,
            live: p.live(),
            ready: p.ready(),
            ready_replicas: p.ready_replicas(),
            draining: p.draining(),
            hold: p.hold,
            state: lead.as_ref().map(|l| l.state.clone()).unwrap_or_default(),
            reason: lead.as_ref().map(|l| l.reason.clone()).unwrap_or_default(),
            last_error: p.last_error().map(Into::into),
            last_heartbeat_ms: p.replicas.iter().filter_map(|r| r.last_check_at).max().map(unix_ms),
            restart_count: p.replicas.iter().map(|r| r.restart_count).sum(),
            breaker: lead.as_ref().map(|l| l.breaker.clone()).unwrap_or_default(),
            backoff: lead.as_ref().map_or(BackoffView { failures: 0, next_start_in_ms: None }, |l| l.backoff.clone()),
            proof: lead.as_ref().map(|l| l.proof.clone()).unwrap_or_default(),
            perf: lead.map_or(PerfView { first_token_ms: None }, |l| l.perf),
            replicas: p.replicas.iter().map(Into::into).collect(),
        }
    }
}

impl PoolView {
    /// With what the node's devices say of those that it is on.
    #[must_use]
    pub fn on(mut self, node: &NodeSnapshot) -> Self {
        let mine: Vec<_> = node.devices.iter().map(|(d, _)| d).filter(|d| self.devices.contains(&d.uuid)).collect();
        if !mine.is_empty() {
            self.vram_total_bytes = Some(mine.iter().map(|d| d.vram_total).sum());
            self.vram_free_bytes = Some(mine.iter().map(|d| d.vram_free).sum());
            let least = mine.iter().filter_map(|d| d.compute_capability).min();
            self.compute_capability = least.map(|(a, b)| format!("{a}.{b}"));
        }
        self
    }
}

impl From<&PoolSnapshot> for HealthView {
    fn from(p: &PoolSnapshot) -> Self {
        let lead = p.lead();
        Self {
            live: p.live(),
            ready: p.ready(),
            ready_replicas: p.ready_replicas(),
            draining: p.draining(),
            state: lead.map(|l| l.state.to_owned()).unwrap_or_default(),
            reason: lead.map(|l| l.reason.clone()).unwrap_or_default(),
            last_error: p.last_error().map(Into::into),
            last_check_at: lead.and_then(|l| l.last_check_at).map(time),
            consecutive_failures: lead.map_or(0, |l| l.consecutive_failures),
            replicas: p
                .replicas
                .iter()
                .map(|r| ReplicaHealthView {
                    replica_id: r.id.to_string(),
                    live: r.live,
                    ready: r.ready,
                    draining: r.draining,
                    state: r.state.into(),
                    reason: r.reason.clone(),
                    last_check_at: r.last_check_at.map(time),
                    consecutive_failures: r.consecutive_failures,
                })
                .collect(),
        }
    }
}

impl NodeView {
    /// The view of a node.
    #[must_use]
    pub fn new(node: &NodeSnapshot, version: &str, profile: &str) -> Self {
        Self {
            version: version.to_owned(),
            profile: profile.to_owned(),
            simulated: node.simulated,
            driver: node.driver.clone(),
            cuda: node.cuda.clone(),
            problem: node.problem.clone(),
            devices: node.devices.iter().map(Into::into).collect(),
            xids: node.xids.iter().map(Into::into).collect(),
        }
    }
}

impl From<&Operation> for OperationView {
    fn from(o: &Operation) -> Self {
        let (state, outcome, problem) = match &o.state {
            OperationState::Running => ("running", None, None),
            OperationState::Succeeded(outcome) => ("succeeded", Some(outcome.clone()), None),
            OperationState::Failed(reason) => ("failed", None, Some(reason.clone())),
        };
        Self {
            operation_id: o.id.clone(),
            verb: o.verb.clone(),
            pool_id: o.pool_id.to_string(),
            state: state.into(),
            progress: o.progress.clone(),
            leases_left: o.left.map(|left| left.leases),
            time_left_ms: o.left.map(|left| u64::try_from(left.time.as_millis()).unwrap_or(u64::MAX)),
            outcome,
            problem,
            started_at: time(o.started_at),
        }
    }
}
