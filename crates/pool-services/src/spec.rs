//! What a pool is asked to be.

use std::net::SocketAddr;
use std::time::Duration;

use pool_domain::estimate::KvType;
use pool_domain::isolation::Isolation;
use pool_domain::lifecycle::{OnDeadline, Policy};
use pool_domain::plan::Split;
use pool_domain::rollout::Strategy;
use pool_domain::{DeviceMask, EngineName, ModelRef, PoolId};

/// What an engine is for; it decides what "prove" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Text: one token proves it.
    Generate,
    /// Vectors: one vector proves it.
    Embed,
    /// Scores: one score proves it.
    Rerank,
}

impl Workload {
    /// The workload as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Rerank => "rerank",
        }
    }
}

/// When engines start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// With the daemon.
    Preload,
    /// When somebody asks.
    OnDemand,
}

/// How a reload goes unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReloadPolicy {
    /// How engines are replaced.
    pub strategy: Strategy,
    /// Time for the whole of it.
    pub deadline: Duration,
    /// What happens then: with `Abort` the old engines serve on.
    pub on_deadline: OnDeadline,
    /// Time after it in which a failure of the new engines brings the old ones back; zero is none.
    pub probation: Duration,
}

impl Default for ReloadPolicy {
    fn default() -> Self {
        Self {
            strategy: Strategy::Auto,
            deadline: Duration::from_secs(900),
            on_deadline: OnDeadline::Abort,
            probation: Duration::from_secs(60),
        }
    }
}

/// A checked pool.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSpec {
    /// Its name.
    pub id: PoolId,
    /// What it serves.
    pub model: ModelRef,
    /// A name from the declared engines, or `stub`.
    pub engine: EngineName,
    /// Further arguments for the engine.
    pub args: Vec<String>,
    /// Engine version it must be, empty for any.
    pub version: String,
    /// What it is for.
    pub workload: Workload,
    /// Devices, one mask per replica or one for all.
    pub devices: Vec<DeviceMask>,
    /// How many engines.
    pub replicas: u16,
    /// When they start.
    pub activation: Activation,
    /// Time without requests after which an on-demand pool stops; unset = never.
    pub idle_ttl: Option<Duration>,
    /// Never stopped for want of requests, nor for another pool.
    pub pin: bool,
    /// Context in tokens over all slots; unset = the largest that fits, at most 8192, where the engine's memory is known,
    /// else the engine's own default.
    pub context: Option<u32>,
    /// Concurrent requests per engine.
    pub slots: u16,
    /// Types of the K and V caches.
    pub kv_type: (KvType, KvType),
    /// How it is spread over its devices.
    pub tensor_split: Split,
    /// Bytes per device; unset = estimated.
    pub vram: Option<u64>,
    /// Other names for the model.
    pub aliases: Vec<String>,
    /// The numbers of its lifecycle.
    pub policy: Policy,
    /// What its engines are kept from.
    pub isolation: Isolation,
    /// Default drain deadline.
    pub drain_deadline: Duration,
    /// Default end of a drain.
    pub on_deadline: OnDeadline,
    /// How a reload goes.
    pub reload: ReloadPolicy,
}

impl PoolSpec {
    /// What of it decides which engine runs with which arguments for the given replica, as text: an engine that was made
    /// from another one is not what this asks for. Numbers of the lifecycle do not count.
    #[must_use]
    pub fn fingerprint(&self, replica: u16) -> String {
        let Self { model, engine, args, version, workload, context, slots, kv_type, tensor_split, vram, .. } = self;
        let (mask, workload) = (self.mask_of(replica), workload.code());
        // Only where it says something, so that engines of a daemon that did not know it are still what is asked for.
        let isolation = match &self.isolation {
            none if *none == Isolation::default() => String::new(),
            some => format!(" {some:?}"),
        };
        format!(
            "{model} {engine} {args:?} {version:?} {workload} {mask:?} {context:?} {slots} {kv_type:?} {tensor_split:?} {vram:?}{isolation}"
        )
    }

    /// Why it cannot stand beside another pool. `endpoints` tells where the engines of the two listen that somebody else
    /// runs.
    pub fn clashes_with(
        &self,
        other: &Self,
        endpoints: impl FnOnce() -> (Option<SocketAddr>, Option<SocketAddr>),
    ) -> Option<String> {
        let named = |a: &Self, b: &Self| b.aliases.iter().any(|alias| alias == a.id.as_str()).then(|| a.id.clone());
        if let Some(name) = named(self, other).or_else(|| named(other, self)) {
            return Some(format!("`{name}` would be the name of a pool and an alias of another"));
        }
        match endpoints() {
            (Some(a), Some(b)) if a == b => Some(format!("the engine at port {} would be of two pools", a.port())),
            _ => None,
        }
    }

    /// The mask of the given replica.
    #[must_use]
    pub fn mask_of(&self, replica: u16) -> &DeviceMask {
        const AUTO: &DeviceMask = &DeviceMask::Auto;
        self.devices.get(usize::from(replica)).or_else(|| self.devices.last()).unwrap_or(AUTO)
    }
}
