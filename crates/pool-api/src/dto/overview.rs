//! The node at a glance, for those who decide where to send work, when to scale, and what to scrape.

use std::collections::{BTreeMap, BTreeSet};

use pool_services::{PoolSnapshot, ReplicaSnapshot};
use serde::{Deserialize, Serialize};

/// An engine that pools may name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct EngineView {
    /// The name that pools give.
    pub name: String,
    /// `llama.cpp`, `vllm`, `stub`.
    pub kind: String,
    /// `binary` or `external`.
    pub mode: String,
    /// Versions that run here at present.
    #[serde(default)]
    pub versions: Vec<String>,
}

/// What one pool can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct CapabilityView {
    /// The pool.
    pub pool_id: String,
    /// Its engine.
    pub engine: String,
    /// Its model's short name.
    pub model_id: String,
    /// Other names of the model.
    pub aliases: Vec<String>,
    /// `generate`, `embed` or `rerank`.
    pub workload: String,
    /// How its weights are stored, as the model's name tells it.
    pub quantization: Option<String>,
    /// Context in tokens over all slots, where it is known.
    pub context: Option<u64>,
    /// Requests that its ready replicas take at once.
    pub slots_total: u32,
    /// It serves now.
    pub ready: bool,
}

/// What the node can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct CapabilitiesView {
    /// Version of this API.
    pub api_version: String,
    /// Version of the daemon.
    pub version: String,
    /// Engines that pools may name.
    pub engines: Vec<EngineView>,
    /// Workloads of its pools.
    pub workloads: Vec<String>,
    /// Models of its pools.
    pub models: Vec<String>,
    /// Quantizations of its pools' models, as their names tell them.
    pub quantizations: Vec<String>,
    /// The largest context of a pool in tokens, where one is known.
    pub max_context: Option<u64>,
    /// Requests that its ready pools take at once.
    pub slots_total: u32,
    /// Its pools.
    pub pools: Vec<CapabilityView>,
}

/// How a model's weights are stored, where its name says so, as names of model files do: `q4_k_m`, `f16`, `awq`.
fn quantization(model_id: &str) -> Option<String> {
    let lower = model_id.to_ascii_lowercase();
    let known = |part: &str| {
        let of_gguf = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
        let named = ["f16", "bf16", "f32", "fp8", "fp16", "int4", "int8", "awq", "gptq", "mxfp4", "nvfp4"];
        named.contains(&part)
            || part.strip_prefix('q').is_some_and(of_gguf)
            || part.strip_prefix("iq").is_some_and(of_gguf)
            || part.strip_prefix("tq").is_some_and(of_gguf)
    };
    lower.split(['-', '.', ' ']).rev().find(|part| known(part)).map(str::to_owned)
}

fn slots(p: &PoolSnapshot) -> u32 {
    p.replicas.iter().filter(|r| r.ready && !r.draining).map(|r| r.slots_total).sum()
}

impl CapabilitiesView {
    /// What a node with these engines and pools can do.
    #[must_use]
    pub fn new(version: &str, mut engines: Vec<EngineView>, pools: &[PoolSnapshot]) -> Self {
        let pool = |p: &PoolSnapshot| CapabilityView {
            pool_id: p.pool_id.to_string(),
            engine: p.engine.clone(),
            model_id: p.model_id.clone(),
            aliases: p.aliases.clone(),
            workload: p.workload.to_owned(),
            quantization: quantization(&p.model_id),
            context: p.replicas.iter().filter_map(|r| r.context).max(),
            slots_total: slots(p),
            ready: p.ready(),
        };
        let pools: Vec<CapabilityView> = {
            for engine in &mut engines {
                let of = pools.iter().filter(|p| p.engine == engine.name).flat_map(|p| &p.replicas);
                let versions: BTreeSet<_> = of.map(|r| r.engine_version.clone()).filter(|v| !v.is_empty()).collect();
                engine.versions = versions.into_iter().collect();
            }
            pools.iter().map(pool).collect()
        };
        let set = |each: fn(&CapabilityView) -> Option<String>| {
            pools.iter().filter_map(each).collect::<BTreeSet<_>>().into_iter().collect()
        };
        Self {
            api_version: "v1".into(),
            version: version.to_owned(),
            workloads: set(|p| Some(p.workload.clone())),
            models: set(|p| Some(p.model_id.clone())),
            quantizations: set(|p| p.quantization.clone()),
            max_context: pools.iter().filter_map(|p| p.context).max(),
            slots_total: pools.iter().map(|p| p.slots_total).sum(),
            engines,
            pools,
        }
    }
}

/// The numbers that a scaler of one pool looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct LoadView {
    /// Requests that wait for a slot.
    pub waiting: u32,
    /// Slots that are taken.
    pub active: u32,
    /// The two together: what slots would be needed for.
    pub demand: u32,
    /// Slots of ready replicas.
    pub slots_total: u32,
    /// Slots that are taken, of a hundred; 100 where there is demand and no slot.
    pub utilisation_percent: u32,
    /// Replicas that are ready.
    pub ready_replicas: u32,
    /// Requests that ready engines say they work on, whoever sent them.
    #[serde(default)]
    pub engine_running: u32,
    /// Requests that wait within ready engines.
    #[serde(default)]
    pub engine_waiting: u32,
    /// How much of its KV cache the fullest engine has taken, of a hundred; unset where none tells.
    #[serde(default)]
    pub kv_used_percent: Option<u32>,
}

impl LoadView {
    fn counting(waiting: u32, active: u32, slots_total: u32, ready_replicas: u32) -> Self {
        let demand = waiting + active;
        let utilisation_percent = match (demand, slots_total) {
            (0, _) => 0,
            (_, 0) => 100,
            _ => (active * 100).div_ceil(slots_total),
        };
        Self { waiting, active, demand, slots_total, utilisation_percent, ready_replicas, ..Self::default() }
    }

    /// With what ready engines say.
    fn told(self, engines: impl Iterator<Item = (u32, u32, Option<u32>)>) -> Self {
        engines.fold(self, |l, (running, waiting, kv)| Self {
            engine_running: l.engine_running.saturating_add(running),
            engine_waiting: l.engine_waiting.saturating_add(waiting),
            kv_used_percent: l.kv_used_percent.max(kv),
            ..l
        })
    }
}

/// Requests that run and that wait, and the share of the KV cache that is taken, of a hundred.
fn told(r: &ReplicaSnapshot) -> (u32, u32, Option<u32>) {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let percent = |share: f64| (share * 100.0).ceil() as u32;
    (r.meters.running.unwrap_or(0), r.meters.waiting.unwrap_or(0), r.meters.kv_used.map(percent))
}

/// Numbers for autoscalers, such as KEDA's metrics-api with `valueLocation: pools.chat.demand`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct AutoscaleView {
    /// Every pool together.
    pub total: LoadView,
    /// Each pool.
    pub pools: BTreeMap<String, LoadView>,
}

impl From<&[PoolSnapshot]> for AutoscaleView {
    fn from(pools: &[PoolSnapshot]) -> Self {
        let of = |p: &PoolSnapshot| {
            let active = p.replicas.iter().map(|r| r.active_leases).sum();
            let ready = p.replicas.iter().filter(|r| r.ready);
            LoadView::counting(p.leases_waiting, active, slots(p), p.ready_replicas()).told(ready.map(told))
        };
        let pools: BTreeMap<String, LoadView> = pools.iter().map(|p| (p.pool_id.to_string(), of(p))).collect();
        let sum = |each: fn(&LoadView) -> u32| pools.values().map(each).sum();
        let total = LoadView::counting(
            sum(|l| l.waiting),
            sum(|l| l.active),
            sum(|l| l.slots_total),
            sum(|l| l.ready_replicas),
        );
        let total = total.told(pools.values().map(|l| (l.engine_running, l.engine_waiting, l.kv_used_percent)));
        Self { total, pools }
    }
}

/// Targets with the same labels, as Prometheus's http_sd wants them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct TargetsView {
    /// `host:port`
    pub targets: Vec<String>,
    /// Labels of each.
    pub labels: BTreeMap<String, String>,
}

/// The engines that can be scraped.
#[must_use]
pub fn targets(pools: &[PoolSnapshot]) -> Vec<TargetsView> {
    let target = |p: &PoolSnapshot, r: &ReplicaSnapshot| {
        let host = r.endpoint.as_deref()?.strip_prefix("http://")?.to_owned();
        let labels = [
            ("__metrics_path__", "/metrics".to_owned()),
            ("pool_id", p.pool_id.to_string()),
            ("replica_id", r.id.to_string()),
            ("engine", p.engine.clone()),
            ("engine_version", r.engine_version.clone()),
            ("model_id", p.model_id.clone()),
        ];
        let labels = labels.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Some(TargetsView { targets: vec![host], labels })
    };
    pools.iter().flat_map(|p| p.replicas.iter().filter(|r| r.ready).filter_map(move |r| target(p, r))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_how_weights_are_stored() {
        for (name, told) in [
            ("qwen2.5-7b-instruct-q4_k_m", Some("q4_k_m")),
            ("Qwen2.5-7B-Q8_0", Some("q8_0")),
            ("llama-3-IQ4_XS", Some("iq4_xs")),
            ("model.F16", Some("f16")),
            ("Llama-3-8B-AWQ", Some("awq")),
            ("qwen2", None),
            ("tiny", None),
            ("", None),
        ] {
            assert_eq!(quantization(name).as_deref(), told, "{name}");
        }
    }

    #[test]
    fn load_has_a_number_also_without_slots() {
        assert_eq!(LoadView::counting(0, 0, 0, 0).utilisation_percent, 0);
        assert_eq!(LoadView::counting(1, 0, 0, 0).utilisation_percent, 100);
        assert_eq!(
            LoadView::counting(5, 1, 3, 1),
            LoadView {
                waiting: 5,
                active: 1,
                demand: 6,
                slots_total: 3,
                utilisation_percent: 34,
                ready_replicas: 1,
                ..LoadView::default()
            }
        );
    }

    #[test]
    fn what_engines_say_is_summed_up_and_the_fullest_cache_counts() {
        let told = LoadView::default().told([(1, 2, Some(30)), (3, 0, None), (0, 1, Some(71))].into_iter());
        assert_eq!((told.engine_running, told.engine_waiting, told.kv_used_percent), (4, 3, Some(71)));
    }
}
