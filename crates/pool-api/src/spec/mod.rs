//! A pool as it is written: the `[[pool]]` table of the config file, and the same as JSON.

mod check;
mod text;

use pool_domain::rollout::Strategy;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use check::{Defaults, SpecError};
pub use text::{DevicesText, DurationText, EngineText, MaskText, ModelText, PoolIdText, SizeText, SplitText, VramText};

/// What an engine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadText {
    /// Text.
    Generate,
    /// Vectors.
    Embed,
    /// Scores.
    Rerank,
}

/// When engines start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationText {
    /// With the daemon.
    Preload,
    /// When somebody asks.
    OnDemand,
}

/// What happens to leases that outlive a drain's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnDeadlineText {
    /// They are revoked and the engine is stopped.
    Force,
    /// The drain is given up and the engine serves on.
    Abort,
}

/// How a reload replaces an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum StrategyText {
    /// The best that fits.
    Auto,
    /// Stop the old, start the new.
    InPlace,
    /// Start the new, stop the old.
    Overlap,
    /// Replica by replica.
    Rolling,
}

macro_rules! tables {
    ($($(#[$doc:meta])* $ty:ident { $($(#[$fdoc:meta])* $field:ident: $fty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $ty {
            $(
                $(#[$fdoc])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub $field: Option<$fty>,
            )*
        }
    )*};
}

tables! {
    /// `[pool.backoff]`: delays between starts.
    BackoffTable {
        /// First delay; default `"1s"`.
        initial: DurationText,
        /// Longest delay; default `"60s"`.
        max: DurationText,
        /// Growth per failure; default 2.
        factor: f64,
        /// Share of a delay that is random, 0 to 1; default 0.5.
        jitter: f64,
        /// Time Ready after which failures are forgotten; default `"10m"`.
        reset_after: DurationText,
    }
    /// `[pool.breaker]`: when restarting stops.
    BreakerTable {
        /// Failed starts in a row that open it; default 5.
        failed_starts: u32,
        /// Crashes soon after Ready that open it; default 3.
        early_crashes: u32,
        /// First pause; default `"30s"`.
        open_for: DurationText,
        /// Longest pause; default `"5m"`.
        max_open_for: DurationText,
        /// Time Ready that closes it; default `"60s"`.
        close_after: DurationText,
    }
    /// `[pool.health]`: how an engine is watched.
    HealthTable {
        /// Longest time without progress while it starts; default `"5m"`.
        startup_stall: DurationText,
        /// Longest start in all; default `"30m"`.
        startup_max: DurationText,
        /// Time between checks; default `"10s"`.
        interval: DurationText,
        /// Longest time for one check; default `"5s"`.
        timeout: DurationText,
        /// Misses in a row that end it, at least 2; default 3.
        failures: u32,
        /// Longest time a busy engine may show no progress while it may read a prompt, where its kind does not tell how
        /// far; default `"5m"`. Everything else that stands still is ended by `failures` misses.
        busy_stall: DurationText,
        /// Whether an idle engine is asked for one token each `interval`; default true. With `false` an idle engine that
        /// hangs is found only by the next request.
        canary: bool,
    }
    /// `[pool.drain]`: how a drain goes unless it says otherwise.
    DrainTable {
        /// Time for leases to end; default `"30s"`.
        deadline: DurationText,
        /// What happens then; default `"force"`.
        on_deadline: OnDeadlineText,
        /// Time between TERM and KILL; default `"30s"`.
        stop_grace: DurationText,
    }
    /// `[pool.reload]`: how a reload goes unless it says otherwise.
    ReloadTable {
        /// How engines are replaced; default `"auto"`.
        strategy: StrategyText,
        /// Time for the whole of it; default `"15m"`.
        deadline: DurationText,
        /// What happens then; default `"abort"`: the old engines serve on. With `"force"` leases end then, and the new
        /// engines have `startup_max` each.
        on_deadline: OnDeadlineText,
        /// Time after it in which a failure of the new engines brings the old ones back, at most a day; default `"60s"`,
        /// `"0s"` is none.
        probation: DurationText,
    }
    /// `[pool.isolation]`: what an engine is kept from.
    IsolationTable {
        /// Who its engines run as, without any capability: a user name or a uid, with the groups that the machine gives that
        /// user (`video` and `render` for /dev/dri), or `"uid:gid"` for that one group. Needs root, or CAP_SETUID,
        /// CAP_SETGID, CAP_KILL and CAP_SYS_PTRACE; default: as the daemon.
        run_as: String,
        /// Most of the host's memory that an engine may use, without swap; the kernel ends one that needs more. At least
        /// 16 MiB; default: no limit.
        memory_max: SizeText,
        /// Most files that an engine may have open; default 65536, or the daemon's own hard limit if that is less.
        nofile: u64,
    }
}

/// One `[[pool]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// Its name.
    pub id: PoolIdText,
    /// What it serves.
    pub model: ModelText,
    /// A name from `[engines]`, or `stub`; default `"llama.cpp"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineText>,
    /// Further arguments for the engine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Engine version it must be; empty for any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// What it is for; default `"generate"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadText>,
    /// Devices; default `"auto"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<DevicesText>,
    /// How many engines, 1 to 64; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u16>,
    /// When they start; the default is the profile's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation: Option<ActivationText>,
    /// Time without requests after which an on-demand pool stops; without it, never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_ttl: Option<DurationText>,
    /// Never evicted for another pool, and not stopped for `idle_ttl`; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Context in tokens over all slots; default the largest that fits, at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// Concurrent requests per engine; default 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u16>,
    /// Types of the K and V caches: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl; default `["f16", "f16"]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_type: Option<[String; 2]>,
    /// Bytes per device; default `"auto"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram: Option<VramText>,
    /// How layers are spread over the devices: `"off"`, `"auto"` (as evenly as whole layers allow, on as few devices as
    /// do) or ratios such as `"3,1"`; default `"off"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_split: Option<SplitText>,
    /// Other names for the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Delays between starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<BackoffTable>,
    /// When restarting stops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaker: Option<BreakerTable>,
    /// How an engine is watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthTable>,
    /// How a drain goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainTable>,
    /// How a reload goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reload: Option<ReloadTable>,
    /// What an engine may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<IsolationTable>,
}

impl From<StrategyText> for Strategy {
    fn from(s: StrategyText) -> Self {
        match s {
            StrategyText::Auto => Self::Auto,
            StrategyText::InPlace => Self::InPlace,
            StrategyText::Overlap => Self::Overlap,
            StrategyText::Rolling => Self::Rolling,
        }
    }
}

impl From<Strategy> for StrategyText {
    fn from(s: Strategy) -> Self {
        match s {
            Strategy::Auto => Self::Auto,
            Strategy::InPlace => Self::InPlace,
            Strategy::Overlap => Self::Overlap,
            Strategy::Rolling => Self::Rolling,
        }
    }
}

impl From<OnDeadlineText> for pool_domain::lifecycle::OnDeadline {
    fn from(o: OnDeadlineText) -> Self {
        match o {
            OnDeadlineText::Force => Self::Force,
            OnDeadlineText::Abort => Self::Abort,
        }
    }
}

impl From<pool_domain::lifecycle::OnDeadline> for OnDeadlineText {
    fn from(o: pool_domain::lifecycle::OnDeadline) -> Self {
        match o {
            pool_domain::lifecycle::OnDeadline::Force => Self::Force,
            pool_domain::lifecycle::OnDeadline::Abort => Self::Abort,
        }
    }
}
