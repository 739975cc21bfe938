//! What the outside sees: numbered pictures of the state.

use std::time::SystemTime;

use pool_domain::{DeviceSnapshot, FailureClass, Generation, PoolId, ReplicaId};

use crate::ports::Staging;

/// A failure with its display time.
#[derive(Debug, Clone, PartialEq)]
pub struct LastError {
    /// Class.
    pub class: FailureClass,
    /// Words.
    pub detail: String,
    /// When.
    pub at: SystemTime,
}

/// One replica.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaSnapshot {
    /// Which.
    pub id: ReplicaId,
    /// Current start attempt.
    pub generation: Generation,
    /// State as one word.
    pub state: &'static str,
    /// Reason as one word, empty where there is none.
    pub reason_code: &'static str,
    /// Reason in words.
    pub reason: String,
    /// A process of this generation exists.
    pub live: bool,
    /// It proved that it serves.
    pub ready: bool,
    /// It is being drained.
    pub draining: bool,
    /// Where it is reached, while it runs.
    pub endpoint: Option<String>,
    /// Its main process.
    pub pid: Option<u32>,
    /// Its devices.
    pub device_mask: String,
    /// Engine version.
    pub engine_version: String,
    /// Slots.
    pub slots_total: u32,
    /// Leases held.
    pub active_leases: u32,
    /// Starts after a failure.
    pub restart_count: u64,
    /// `closed`, `open`, `half_open`.
    pub breaker: &'static str,
    /// Failures the backoff counts.
    pub backoff_failures: u32,
    /// Until the next start, where one is planned, in milliseconds.
    pub next_start_in_ms: Option<u64>,
    /// `vram`, `vram_delta`, `simulated`, `served`, empty without a proof.
    pub proof: &'static str,
    /// Milliseconds of the first unit of work.
    pub first_unit_ms: Option<u64>,
    /// Last failure.
    pub last_error: Option<LastError>,
    /// Failed checks in a row.
    pub consecutive_failures: u32,
    /// Last check.
    pub last_check_at: Option<SystemTime>,
    /// Bytes reserved on its devices together.
    pub vram_reserved: u64,
    /// Context in tokens over all slots, where it is known.
    pub context: Option<u64>,
    /// How far its model has come, while that is being made present.
    pub staging: Option<Staging>,
    /// Percent of its model that the engine has loaded, while it loads and where it tells.
    pub loaded_percent: Option<u8>,
}

impl ReplicaSnapshot {
    /// One that never ran.
    #[must_use]
    pub fn idle(id: ReplicaId) -> Self {
        Self {
            id,
            generation: Generation(0),
            state: "idle",
            reason_code: "",
            reason: String::new(),
            live: false,
            ready: false,
            draining: false,
            endpoint: None,
            pid: None,
            device_mask: String::new(),
            engine_version: String::new(),
            slots_total: 0,
            active_leases: 0,
            restart_count: 0,
            breaker: "closed",
            backoff_failures: 0,
            next_start_in_ms: None,
            proof: "",
            first_unit_ms: None,
            last_error: None,
            consecutive_failures: 0,
            last_check_at: None,
            vram_reserved: 0,
            context: None,
            staging: None,
            loaded_percent: None,
        }
    }
}

/// Leases that somebody in this process took as guards, since the pool is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuardCounts {
    /// Granted.
    pub granted: u64,
    /// Refused because every slot was taken, or somebody waited.
    pub saturated: u64,
    /// Refused because no replica was Ready.
    pub closed: u64,
}

/// One pool.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSnapshot {
    /// Which.
    pub pool_id: PoolId,
    /// Number of this picture.
    pub snapshot: u64,
    /// Revision of the spec.
    pub revision: u64,
    /// Who declared it: `file` or `api`.
    pub source: &'static str,
    /// Engine name.
    pub engine: String,
    /// Model reference.
    pub model: String,
    /// Short model name.
    pub model_id: String,
    /// Other names.
    pub aliases: Vec<String>,
    /// What it is for: `generate`, `embed`, `rerank`.
    pub workload: &'static str,
    /// Demand does not wake it.
    pub hold: bool,
    /// Those who wait for a slot.
    pub leases_waiting: u32,
    /// Leases within the daemon's own process, which are counted and not told as events.
    pub guards: GuardCounts,
    /// Its replicas.
    pub replicas: Vec<ReplicaSnapshot>,
}

impl PoolSnapshot {
    /// At least one process exists.
    #[must_use]
    pub fn live(&self) -> bool {
        self.replicas.iter().any(|r| r.live)
    }
    /// At least one replica is Ready.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.replicas.iter().any(|r| r.ready)
    }
    /// How many replicas are.
    #[must_use]
    pub fn ready_replicas(&self) -> u32 {
        self.replicas.iter().map(|r| u32::from(r.ready)).sum()
    }
    /// At least one replica is being drained.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.replicas.iter().any(|r| r.draining)
    }
    /// The replica that speaks for the pool: the first Ready one, else the first.
    #[must_use]
    pub fn lead(&self) -> Option<&ReplicaSnapshot> {
        self.replicas.iter().find(|r| r.ready).or_else(|| self.replicas.first())
    }
    /// The newest failure of any replica.
    #[must_use]
    pub fn last_error(&self) -> Option<&LastError> {
        self.replicas.iter().filter_map(|r| r.last_error.as_ref()).max_by_key(|e| e.at)
    }
}

/// How often the driver reported an XID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XidCount {
    /// UUID of the GPU or slice.
    pub device: String,
    /// Its number.
    pub xid: u64,
    /// How often since the daemon started.
    pub count: u64,
}

/// The node.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NodeSnapshot {
    /// Whether the devices exist only in a file.
    pub simulated: bool,
    /// Driver version.
    pub driver: Option<String>,
    /// CUDA version of the driver.
    pub cuda: Option<String>,
    /// Devices, each with the bytes reserved by us.
    pub devices: Vec<(DeviceSnapshot, u64)>,
    /// XIDs that the driver reported.
    pub xids: Vec<XidCount>,
    /// Why there are no devices, or why this is old.
    pub problem: Option<String>,
    /// Events that are missing in log and metrics, because they came faster than they could be told.
    pub events_lost: u64,
}
