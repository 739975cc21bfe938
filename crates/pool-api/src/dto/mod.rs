//! What the API answers and what it takes. Times are RFC 3339, lengths `_ms`, sizes bytes.

mod declare;
mod events;
mod from_wire;
mod leases;
mod models;
mod overview;
mod plan;
mod problem;
mod to_wire;

use serde::{Deserialize, Serialize};

use crate::spec::OnDeadlineText;

pub use declare::{ConfigReloadView, Keys, PoolChangeView, ReloadBody, SpecView, declared, keys, merge, patch};
pub use device::{DetailsView, DeviceView, EccView, MigView, PeerView, ProcessView, RemapView, XidView};
#[cfg(feature = "server")]
pub use events::EventFrame;
pub use events::EventView;
pub use from_wire::DtoError;
pub use leases::{EndpointView, LeaseBody, LeaseView, RenewBody};
pub use models::{ModelView, ModelsView};
pub use overview::{AutoscaleView, CapabilitiesView, CapabilityView, EngineView, LoadView, TargetsView, targets};
pub use plan::{
    EstimateView, PlacementBody, PlacementView, PlanBody, PlanRowView, PlanView, spec_problem, spec_request,
};
pub use problem::{Code, Problem};

macro_rules! dtos {
    ($($(#[$doc:meta])* $ty:ident { $($(#[$fdoc:meta])* $field:ident: $fty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
        pub struct $ty {
            $($(#[$fdoc])* pub $field: $fty,)*
        }
    )*};
}

// After the macro that it uses.
mod device;

dtos! {
    /// A failure and when it was.
    LastErrorView {
        /// Class as one word.
        class: String,
        /// What happened.
        detail: String,
        /// When.
        at: String,
    }
    /// How far a model has come that is being made present.
    StagingView {
        /// `waiting` (somebody else fetches it), `fetching` or `verifying`.
        step: String,
        /// Bytes done of all files together.
        done_bytes: u64,
        /// Bytes of all files together, where that is known.
        total_bytes: Option<u64>,
        /// Bytes a second, of late.
        bytes_per_s: u64,
        /// Time left at this rate, where that can be said.
        left_ms: Option<u64>,
    }
    /// How far the backoff is.
    BackoffView {
        /// Failures it counts.
        failures: u32,
        /// Until the next start, where one is planned.
        next_start_in_ms: Option<u64>,
    }
    /// What was measured.
    PerfView {
        /// Time of the first token of the proof.
        first_token_ms: Option<u64>,
    }
    /// One replica.
    ReplicaView {
        /// `r0`, `r1`, …
        replica_id: String,
        /// Current start attempt.
        generation: u64,
        /// State as one word.
        state: String,
        /// Reason in words.
        reason: String,
        /// Reason as one word, empty where there is none.
        reason_code: String,
        /// A process of this generation exists.
        live: bool,
        /// It proved that it serves.
        ready: bool,
        /// It is being drained.
        draining: bool,
        /// Where it is reached, while it runs.
        endpoint: Option<String>,
        /// Its main process.
        pid: Option<u32>,
        /// Its devices.
        device_mask: String,
        /// Engine version.
        engine_version: String,
        /// Requests it takes at once.
        slots_total: u32,
        /// Leases held.
        active_leases: u32,
        /// Starts after a failure.
        restart_count: u64,
        /// `closed`, `open` or `half_open`.
        breaker: String,
        /// How far the backoff is.
        backoff: BackoffView,
        /// `vram`, `vram_delta`, `simulated`, `served`; empty without a proof.
        proof: String,
        /// What was measured.
        perf: PerfView,
        /// Last failure.
        last_error: Option<LastErrorView>,
        /// Failed checks in a row.
        consecutive_failures: u32,
        /// Last check.
        last_check_at: Option<String>,
        /// Bytes reserved on each of its devices.
        vram_reserved_bytes: u64,
        /// Context in tokens over all slots, where it is known.
        context: Option<u64>,
        /// How far its model has come, while that is being made present.
        staging: Option<StagingView>,
        /// Percent of its model that the engine has loaded, while it loads and where it tells.
        loaded_percent: Option<u8>,
    }
    /// One pool. Where a value belongs to a replica, it is that of the one that speaks for the pool: the first Ready
    /// one, else the first.
    PoolView {
        /// Its name.
        pool_id: String,
        /// Number of this picture; it grows with every change.
        snapshot: u64,
        /// Revision of the spec.
        revision: u64,
        /// Where the spec comes from: `file` or `api`.
        source: String,
        /// Engine name.
        engine: String,
        /// Engine version, empty before it is known.
        engine_version: String,
        /// Short model name.
        model_id: String,
        /// Model reference.
        model: String,
        /// Other names of the model.
        aliases: Vec<String>,
        /// What it is for: `generate`, `embed` or `rerank`.
        workload: String,
        /// Mask of the replica that speaks for the pool.
        device_mask: String,
        /// UUIDs of every device in a resolved mask.
        devices: Vec<String>,
        /// All memory of these devices together; nothing while it is on none.
        vram_total_bytes: Option<u64>,
        /// Of it, free as the driver says.
        vram_free_bytes: Option<u64>,
        /// The least compute capability of these devices, where known.
        compute_capability: Option<String>,
        /// Requests its Ready replicas take at once.
        slots_total: u32,
        /// Of these, free.
        slots_free: u32,
        /// Leases held.
        active_leases: u32,
        /// Those who wait for a slot.
        leases_waiting: u32,
        /// At least one process exists.
        live: bool,
        /// At least one replica is Ready.
        ready: bool,
        /// How many replicas are ready, of those in `replicas`.
        ready_replicas: u32,
        /// At least one replica is being drained.
        draining: bool,
        /// Demand does not wake it.
        hold: bool,
        /// State as one word.
        state: String,
        /// Reason in words.
        reason: String,
        /// Newest failure of any replica.
        last_error: Option<LastErrorView>,
        /// Newest check of any replica, milliseconds since 1970.
        last_heartbeat_ms: Option<u64>,
        /// Starts after a failure, over all replicas.
        restart_count: u64,
        /// `closed`, `open` or `half_open`.
        breaker: String,
        /// How far the backoff is.
        backoff: BackoffView,
        /// `vram`, `vram_delta`, `simulated`, `served`; empty without a proof.
        proof: String,
        /// What was measured.
        perf: PerfView,
        /// Its replicas.
        replicas: Vec<ReplicaView>,
    }
    /// The health of one replica.
    ReplicaHealthView {
        /// `r0`, `r1`, …
        replica_id: String,
        /// A process exists.
        live: bool,
        /// It proved that it serves.
        ready: bool,
        /// It is being drained.
        draining: bool,
        /// State as one word.
        state: String,
        /// Reason in words.
        reason: String,
        /// Last check.
        last_check_at: Option<String>,
        /// Failed checks in a row.
        consecutive_failures: u32,
    }
    /// The health of one pool.
    HealthView {
        /// At least one process exists.
        live: bool,
        /// At least one replica is Ready.
        ready: bool,
        /// How many replicas are ready, of those in `replicas`.
        ready_replicas: u32,
        /// At least one replica is being drained.
        draining: bool,
        /// State as one word.
        state: String,
        /// Reason in words.
        reason: String,
        /// Newest failure of any replica.
        last_error: Option<LastErrorView>,
        /// Last check of the replica that speaks for the pool.
        last_check_at: Option<String>,
        /// Its failed checks in a row.
        consecutive_failures: u32,
        /// Its replicas.
        replicas: Vec<ReplicaHealthView>,
    }
    /// The node.
    NodeView {
        /// Version of the daemon.
        version: String,
        /// `home` or `cloud`.
        profile: String,
        /// The devices exist only in a file.
        simulated: bool,
        /// Driver version.
        driver: Option<String>,
        /// CUDA version of the driver.
        #[serde(default)]
        cuda: Option<String>,
        /// Why there are no devices, or why this is old.
        problem: Option<String>,
        /// Devices.
        devices: Vec<DeviceView>,
        /// XIDs that the driver reported since the daemon started.
        #[serde(default)]
        xids: Vec<XidView>,
    }
    /// Something that takes a while.
    OperationView {
        /// Its name.
        operation_id: String,
        /// `preload`, `drain`, `resume`, `stop`, `declare`, `remove`, `reload` or `rollback`.
        verb: String,
        /// The pool.
        pool_id: String,
        /// `running`, `succeeded` or `failed`.
        state: String,
        /// How far it is, in words.
        progress: String,
        /// Leases that a drain still waits for.
        leases_left: Option<u32>,
        /// Until they are revoked, or the drain is given up.
        time_left_ms: Option<u64>,
        /// How it ended, where it succeeded.
        outcome: Option<String>,
        /// Why it failed, where it did.
        problem: Option<String>,
        /// When it began.
        started_at: String,
    }
}

/// Body of `drain`. What is left out is as the pool's spec says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DrainBody {
    /// Time for leases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// What happens then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_deadline: Option<OnDeadlineText>,
}

/// Body of a verb that takes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmptyBody {}
