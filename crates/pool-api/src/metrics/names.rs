//! Every metric's name, once.

/// What `docs/metrics.md` says of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricDoc {
    /// Full name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
}

const REPLICA: &[&str] = &["pool_id", "replica_id"];
const POOL: &[&str] = &["pool_id"];
/// The GPU or slice, the profile of a slice, and the pool whose engines have it to themselves; the latter two may be empty.
const DEVICE: &[&str] = &["gpu_uuid", "mig", "pool_id"];

macro_rules! metrics {
    ($($const:ident = $name:literal, $kind:literal, $labels:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $const: MetricDoc =
                MetricDoc { name: concat!("pool_managerd_", $name), kind: $kind, help: $help, labels: $labels };
        )*
        /// Every metric.
        pub const ALL: &[MetricDoc] = &[$($const,)*];
    };
}

metrics! {
    STATE_TRANSITIONS = "state_transitions_total", "counter", &["pool_id", "replica_id", "from", "to"],
        "State changes of a replica";
    READINESS_TRANSITIONS = "readiness_transitions_total", "counter", &["pool_id", "replica_id", "ready"],
        "Times a replica became ready or stopped being ready";
    STARTS = "engine_starts_total", "counter", REPLICA, "Engine processes launched";
    RESTARTS = "engine_restarts_total", "counter", REPLICA, "Starts after a failure";
    EVICTIONS = "evictions_total", "counter", REPLICA, "Times an idle engine was told to give way to another pool";
    IDLE_STOPS = "idle_stops_total", "counter", REPLICA, "Times an engine was stopped because nobody used it";
    EXITS = "engine_failures_total", "counter", &["pool_id", "replica_id", "class"], "Engine failures by class";
    MODEL_BYTES = "model_fetched_bytes_total", "counter", REPLICA, "Bytes of models that were fetched for a start";
    BREAKER_OPENS = "breaker_opens_total", "counter", REPLICA, "Times a circuit breaker opened";
    DRAINS = "drains_total", "counter", &["pool_id", "replica_id", "outcome"], "Drains that ended, by outcome";
    LEASES_GRANTED = "leases_granted_total", "counter", REPLICA, "Leases granted over the API";
    RELOADS = "reloads_total", "counter", &["pool_id", "replica_id", "outcome"],
        "Reloads that ended: in the new spec, in the old one as it was, or in neither";
    LEASES_REFUSED = "leases_refused_total", "counter", &["pool_id", "replica_id", "reason"],
        "Leases refused over the API, by reason";
    LEASES_QUEUED = "leases_queued_total", "counter", REPLICA, "Leases that had to be waited for";
    GUARDS_GRANTED = "guards_granted_total", "counter", POOL,
        "Leases granted within the daemon's process, which are counted and not told one by one";
    GUARDS_REFUSED = "guards_refused_total", "counter", &["pool_id", "reason"],
        "The same refused: every slot was taken (saturated), or no replica was ready (closed)";
    LEASES_ENDED = "leases_ended_total", "counter", &["pool_id", "replica_id", "how"],
        "Leases that ended: released, expired or revoked with their engine; guards within the process are not counted";
    LEASES_RENEWED = "leases_renewed_total", "counter", REPLICA, "Renewals of leases";
    START_DURATION = "engine_start_duration_seconds", "histogram", REPLICA,
        "Time from the start attempt to the proof that the engine serves";
    DRAIN_DURATION = "drain_duration_seconds", "histogram", &["pool_id", "replica_id", "outcome"],
        "Time a drain took";
    GATEWAY_REQUESTS = "gateway_requests_total", "counter", &["pool_id", "tenant_id", "outcome"],
        "Requests that the gateway sent to an engine: done, cancelled by their client, or broken off by the engine";
    GATEWAY_REFUSED = "gateway_refused_total", "counter", &["tenant_id", "code"],
        "Requests that the gateway answered itself, by the code of the answer";
    GATEWAY_WAIT = "gateway_wait_seconds", "histogram", POOL, "Time a request waited for a slot";
    GATEWAY_FIRST_BYTE = "gateway_first_byte_seconds", "histogram", POOL,
        "Time from the request until the engine began to answer";
    GATEWAY_FIRST_TOKEN = "gateway_first_token_seconds", "histogram", POOL,
        "Time from the request until the first part of an answer that streams";
    GATEWAY_DECODE = "gateway_decode_seconds", "histogram", POOL,
        "Time from the first token of an answer to its last, as the engine tells or as a stream shows";
    GATEWAY_TOKEN = "gateway_token_latency_seconds", "histogram", POOL,
        "Mean time from one token of an answer to the next, where the engine tells how many there are";
    GATEWAY_TOKENS = "gateway_tokens_total", "counter", &["pool_id", "tenant_id", "direction"],
        "Tokens of requests (in) and answers (out), where the engine tells them in its answer";
    GATEWAY_DURATION = "gateway_duration_seconds", "histogram", POOL, "Time from the request to the end of its answer";
    GATEWAY_BYTES = "gateway_answer_bytes_total", "counter", POOL, "Bytes of answers that came from engines";
    POOL_READY = "pool_ready", "gauge", POOL, "1 when at least one replica is ready";
    POOL_LIVE = "pool_live", "gauge", POOL, "1 when at least one process exists";
    POOL_READY_REPLICAS = "pool_ready_replicas", "gauge", POOL, "Replicas that are ready";
    POOL_REPLICAS = "pool_replicas", "gauge", POOL, "Replicas that there are";
    POOL_HOLD = "pool_hold", "gauge", POOL, "1 when demand does not wake the pool";
    REPLICA_STATE = "replica_state", "gauge", &["pool_id", "replica_id", "state"],
        "1 for the state a replica is in, 0 for the others";
    BREAKER_STATE = "breaker_state", "gauge", &["pool_id", "replica_id", "state"],
        "1 for the state a circuit breaker is in, 0 for the others";
    REPLICA_RESTARTS = "replica_restarts", "gauge", REPLICA,
        "Starts after a failure, over restarts of the daemon";
    BACKOFF_FAILURES = "backoff_failures", "gauge", REPLICA, "Failures the backoff counts";
    HEALTH_FAILURES = "consecutive_health_failures", "gauge", REPLICA, "Failed health checks in a row";
    LEASES_WAITING = "leases_waiting", "gauge", POOL, "Those who wait for a slot";
    LEASES_ACTIVE = "leases_active", "gauge", REPLICA, "Leases held";
    SLOTS = "slots", "gauge", REPLICA, "Requests an engine takes at once";
    ENGINE_RUNNING = "engine_requests_running", "gauge", REPLICA, "Requests that an engine says it works on";
    ENGINE_WAITING = "engine_requests_waiting", "gauge", REPLICA, "Requests that an engine says wait within it";
    ENGINE_KV = "engine_kv_cache_usage_ratio", "gauge", REPLICA, "Share of an engine's KV cache that is taken, 0 to 1";
    ENGINE_PROMPT_TOKENS = "engine_prompt_tokens_total", "counter", REPLICA,
        "Prompt tokens that engines say they read, the daemon's own questions included; over restarts of engines";
    ENGINE_GENERATED_TOKENS = "engine_generated_tokens_total", "counter", REPLICA,
        "Tokens that engines say they generated, the daemon's own questions included; over restarts of engines";
    ENGINE_FIRST_TOKEN_SECONDS = "engine_first_token_seconds_total", "counter", REPLICA,
        "Time that requests waited for their first token, as engines say; over engine_first_tokens_total it is the mean";
    ENGINE_FIRST_TOKENS = "engine_first_tokens_total", "counter", REPLICA, "Requests that got a first token, as engines say";
    ENGINE_DECODE_SECONDS = "engine_decode_seconds_total", "counter", REPLICA,
        "Time between tokens of requests, as engines say; over engine_decoded_tokens_total it is the mean";
    ENGINE_DECODED_TOKENS = "engine_decoded_tokens_total", "counter", REPLICA,
        "Tokens that took engine_decode_seconds_total";
    PERF_TOKENS = "perf_tokens_per_second", "gauge", REPLICA,
        "Tokens a second of one request: at first a guess from the proof, then a mean in which what is newer counts for more";
    PERF_FIRST_TOKEN = "perf_first_token_seconds", "gauge", REPLICA, "Time until the first token of an answer, likewise";
    GPU_TOTAL = "gpu_memory_total_bytes", "gauge", DEVICE, "GPU memory";
    GPU_FREE = "gpu_memory_free_bytes", "gauge", DEVICE, "GPU memory that is free as the driver says";
    GPU_USED = "gpu_memory_used_bytes", "gauge", DEVICE, "GPU memory that is used as the driver says";
    GPU_RESERVED = "gpu_memory_reserved_bytes", "gauge", DEVICE, "GPU memory reserved for engines of this daemon";
    GPU_FOREIGN = "gpu_memory_foreign_bytes", "gauge", DEVICE, "GPU memory held by processes of others";
    GPU_UTILISATION = "gpu_utilisation_ratio", "gauge", DEVICE, "Compute utilisation, 0 to 1";
    GPU_DRIVER = "gpu_memory_driver_bytes", "gauge", DEVICE, "GPU memory kept by driver and firmware";
    GPU_MEMORY_UTILISATION = "gpu_memory_utilisation_ratio", "gauge", DEVICE,
        "Share of time in which GPU memory was read or written, 0 to 1";
    GPU_TEMPERATURE = "gpu_temperature_celsius", "gauge", DEVICE, "Temperature of a GPU";
    GPU_POWER = "gpu_power_watts", "gauge", DEVICE, "Power that a GPU draws";
    GPU_POWER_LIMIT = "gpu_power_limit_watts", "gauge", DEVICE, "Power that a GPU may draw";
    GPU_ENERGY = "gpu_energy_joules_total", "counter", DEVICE, "Energy that a GPU drew since its driver was loaded";
    GPU_SM_CLOCK = "gpu_sm_clock_hertz", "gauge", DEVICE, "Clock of the multiprocessors";
    GPU_MEMORY_CLOCK = "gpu_memory_clock_hertz", "gauge", DEVICE, "Clock of the memory";
    GPU_CLOCK_LIMITED = "gpu_clock_limited", "gauge", &["gpu_uuid", "mig", "pool_id", "reason"],
        "1 for what limits the clocks of a GPU now";
    GPU_ECC = "gpu_ecc_errors_total", "counter", &["gpu_uuid", "mig", "pool_id", "kind"],
        "Errors of a GPU's memory since its driver was loaded: corrected or uncorrected";
    GPU_REMAP_PENDING = "gpu_remap_pending", "gauge", DEVICE, "1 while rows of a GPU's memory wait for a reset to be remapped";
    GPU_REMAP_FAILED = "gpu_remap_failed", "gauge", DEVICE, "1 when rows of a GPU's memory could not be remapped";
    GPU_PCIE_REPLAYS = "gpu_pcie_replays_total", "counter", DEVICE, "Retries on a GPU's bus since its driver was loaded";
    GPU_NVLINKS = "gpu_nvlinks", "gauge", DEVICE, "NVLinks of a GPU to others of the node that are up";
    GPU_XIDS = "gpu_xids_total", "counter", &["gpu_uuid", "xid"], "XIDs that the driver reported since the daemon started";
    GPU_HEALTH = "gpu_health", "gauge", &["gpu_uuid", "mig", "pool_id", "health"],
        "1 for the health a GPU is in, 0 for the others; only on one that is ok does anything new start";
    GPU_VERDICT = "gpu_verdict", "gauge", &["gpu_uuid", "mig", "pool_id", "verdict"],
        "1 for what somebody has to do about a GPU, 0 for the others";
    SIMULATED = "simulated", "gauge", &[], "1 when the devices exist only in a file";
    EVENTS_LOST = "events_lost_total", "counter", &[],
        "Events that came too fast to be told; counters and logs lack them";
}
