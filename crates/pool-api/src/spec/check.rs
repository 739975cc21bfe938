//! From the written pool to the checked one. What this version does not do is refused, never ignored.

use std::time::Duration;

use pool_domain::estimate::KvType;
use pool_domain::isolation::{Isolation, RunAsError};
use pool_domain::lifecycle::{HealthPolicy, OnDeadline, Policy, StartPolicy, StopPolicy};
use pool_domain::plan::Split;
use pool_domain::split::{MAX_DEVICES, SplitRatios};
use pool_domain::{BackoffPolicy, BreakerPolicy, DeviceMask, EngineName, ModelRef};
use pool_services::{Activation, ReloadPolicy, Workload};
use thiserror::Error;

use super::{
    ActivationText, BackoffTable, BreakerTable, DevicesText, DrainTable, DurationText, HealthTable, IsolationTable,
    MaskText, PoolSpec, ReloadTable, SizeText, SplitText, VramText, WorkloadText,
};

/// What a pool gets from its surroundings when it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Defaults {
    /// When engines start.
    pub activation: Activation,
}

impl Default for Defaults {
    /// Those of a person's machine.
    fn default() -> Self {
        Self { activation: Activation::OnDemand }
    }
}

/// A pool that is well formed but cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {message}")]
pub struct SpecError {
    /// The key, with its table: `breaker.open_for`.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub message: String,
}

fn wrong<T>(field: &'static str, message: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError { field, message: message.into() })
}

fn time(text: Option<DurationText>, default: Duration) -> Duration {
    text.map_or(default, DurationText::into_value)
}

fn some_time(field: &'static str, text: Option<DurationText>, default: Duration) -> Result<Duration, SpecError> {
    let value = time(text, default);
    if value.is_zero() { wrong(field, "must be longer than zero") } else { Ok(value) }
}

/// What the admission word can count.
const MAX_SLOTS: u16 = 32_767;
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

impl PoolSpec {
    /// The checked pool.
    ///
    /// # Errors
    /// When values contradict each other, can never take effect, or ask for what this version does not do.
    pub fn check(self, defaults: &Defaults) -> Result<pool_services::PoolSpec, SpecError> {
        let engine = match self.engine {
            Some(e) => e.into_value(),
            None => default_engine()?,
        };
        let model = self.model.into_value();
        if matches!(model, ModelRef::Stub(_)) && engine.as_str() == "llama.cpp" {
            return wrong("model", "only a stub engine serves a stub: model: write engine = \"stub\"");
        }
        if let Some(arg) = self.args.iter().find(|arg| arg.chars().any(char::is_control)) {
            return wrong("args", format!("{arg:?} holds a control character"));
        }
        let replicas = self.replicas.unwrap_or(1);
        if !(1..=64).contains(&replicas) {
            return wrong("replicas", format!("{replicas} is outside 1 to 64"));
        }
        let slots = self.slots.unwrap_or(4);
        if !(1..=MAX_SLOTS).contains(&slots) {
            return wrong("slots", format!("{slots} is outside 1 to {MAX_SLOTS}"));
        }
        if self.context == Some(0) {
            return wrong("context", "must be at least 1: leave it out for the engine's own default");
        }
        for (i, alias) in self.aliases.iter().enumerate() {
            if alias.is_empty() || alias.len() > 256 || alias.chars().any(char::is_control) {
                return wrong("aliases", format!("{alias:?} is no name: write 1 to 256 printable characters"));
            }
            if self.aliases[..i].contains(alias) {
                return wrong("aliases", format!("`{alias}` stands twice"));
            }
        }
        let drain = self.drain.unwrap_or_default();
        let policy = Policy {
            backoff: backoff(self.backoff.unwrap_or_default())?,
            breaker: breaker(self.breaker.unwrap_or_default())?,
            stop: stop(&drain),
            ..health(self.health.unwrap_or_default())?
        };
        Ok(pool_services::PoolSpec {
            id: self.id.into_value(),
            model,
            engine,
            args: self.args,
            version: self.version,
            workload: match self.workload.unwrap_or(WorkloadText::Generate) {
                WorkloadText::Generate => Workload::Generate,
                WorkloadText::Embed => Workload::Embed,
                WorkloadText::Rerank => Workload::Rerank,
            },
            devices: masks(self.devices, replicas)?,
            replicas,
            idle_ttl: self.idle_ttl.map(|ttl| some_time("idle_ttl", Some(ttl), SECOND)).transpose()?,
            pin: self.pin.unwrap_or(false),
            activation: match self.activation {
                Some(ActivationText::Preload) => Activation::Preload,
                Some(ActivationText::OnDemand) => Activation::OnDemand,
                None => defaults.activation,
            },
            context: self.context,
            slots,
            kv_type: kv_types(self.kv_type.as_ref())?,
            tensor_split: split(self.tensor_split)?,
            vram: self.vram.and_then(VramText::into_value),
            aliases: self.aliases,
            policy,
            isolation: isolation(self.isolation.unwrap_or_default())?,
            on_deadline: drain.on_deadline.map_or(OnDeadline::Force, OnDeadline::from),
            drain_deadline: time(drain.deadline, DRAIN_DEADLINE),
            reload: reload(self.reload.unwrap_or_default())?,
        })
    }
}

fn kv_types(given: Option<&[String; 2]>) -> Result<(KvType, KvType), SpecError> {
    let parse = |text: &String| text.parse::<KvType>().or_else(|e| wrong("kv_type", e.to_string()));
    given.map_or(Ok(Default::default()), |[k, v]| Ok((parse(k)?, parse(v)?)))
}

/// How many entries there may be is known only with the devices.
fn split(given: Option<SplitText>) -> Result<Split, SpecError> {
    match given {
        None | Some(SplitText::Off) => Ok(Split::Off),
        Some(SplitText::Auto) => Ok(Split::Auto),
        Some(SplitText::Ratios(text)) => match SplitRatios::parse(&text, MAX_DEVICES) {
            Ok(_) => Ok(Split::Ratios(text)),
            Err(e) => wrong("tensor_split", e.to_string()),
        },
    }
}

fn default_engine() -> Result<EngineName, SpecError> {
    "llama.cpp".parse().or_else(|e: pool_domain::id::IdError| wrong("engine", e.to_string()))
}

fn masks(devices: Option<DevicesText>, replicas: u16) -> Result<Vec<DeviceMask>, SpecError> {
    match devices {
        None => Ok(vec![DeviceMask::Auto]),
        Some(DevicesText::One(m)) => Ok(vec![m.into_value()]),
        Some(DevicesText::PerReplica(l)) if l.len() == usize::from(replicas) => {
            Ok(l.into_iter().map(MaskText::into_value).collect())
        }
        Some(DevicesText::PerReplica(l)) => wrong(
            "devices",
            format!("the list has {} masks for {replicas} replicas: write one each, or one string for all", l.len()),
        ),
    }
}

fn backoff(t: BackoffTable) -> Result<BackoffPolicy, SpecError> {
    use pool_domain::backoff::BackoffError as E;
    BackoffPolicy::new(
        time(t.initial, SECOND),
        time(t.max, 60 * SECOND),
        t.factor.unwrap_or(2.0),
        t.jitter.unwrap_or(0.5),
        time(t.reset_after, 600 * SECOND),
    )
    .map_err(|e| {
        let field = match e {
            E::InitialZero => "backoff.initial",
            E::MaxBelowInitial { .. } => "backoff.max",
            E::Factor => "backoff.factor",
            E::Jitter => "backoff.jitter",
            E::ResetAfterZero => "backoff.reset_after",
            _ => "backoff",
        };
        SpecError { field, message: e.to_string() }
    })
}

fn breaker(t: BreakerTable) -> Result<BreakerPolicy, SpecError> {
    BreakerPolicy::new(
        t.failed_starts.unwrap_or(5),
        t.early_crashes.unwrap_or(3),
        time(t.open_for, 30 * SECOND),
        time(t.max_open_for, 300 * SECOND),
        time(t.close_after, 60 * SECOND),
    )
    .map_err(|e| SpecError { field: "breaker", message: e.to_string() })
}

fn health(t: HealthTable) -> Result<Policy, SpecError> {
    let (start, health) = (StartPolicy::default(), HealthPolicy::default());
    let start = StartPolicy {
        stall: some_time("health.startup_stall", t.startup_stall, start.stall)?,
        max: some_time("health.startup_max", t.startup_max, start.max)?,
    };
    if start.max < start.stall {
        return wrong("health.startup_max", "is shorter than startup_stall, which then could never fire");
    }
    let health = HealthPolicy {
        interval: some_time("health.interval", t.interval, health.interval)?,
        timeout: some_time("health.timeout", t.timeout, health.timeout)?,
        failures: t.failures.unwrap_or(health.failures),
        busy_stall: some_time("health.busy_stall", t.busy_stall, health.busy_stall)?,
        canary: t.canary.unwrap_or(health.canary),
    };
    if health.failures < 2 {
        return wrong("health.failures", "must be at least 2: one slow answer is no failure");
    }
    Ok(Policy { start, health, ..Policy::default() })
}

/// Less, and nothing could start.
const LEAST_MEMORY: u64 = 16 << 20;
const NOFILE: std::ops::RangeInclusive<u64> = 64..=1 << 20;

fn isolation(t: IsolationTable) -> Result<Isolation, SpecError> {
    let memory_max = t.memory_max.map(SizeText::into_value);
    if memory_max.is_some_and(|bytes| bytes < LEAST_MEMORY) {
        return wrong("isolation.memory_max", "is less than 16 MiB, in which no engine can start");
    }
    if let Some(nofile) = t.nofile.filter(|n| !NOFILE.contains(n)) {
        return wrong("isolation.nofile", format!("{nofile} is outside {} to {}", NOFILE.start(), NOFILE.end()));
    }
    let run_as = t.run_as.map(|text| text.parse().or_else(|e: RunAsError| wrong("isolation.run_as", e.to_string())));
    Ok(Isolation { run_as: run_as.transpose()?, memory_max, nofile: t.nofile })
}

fn reload(t: ReloadTable) -> Result<ReloadPolicy, SpecError> {
    let default = ReloadPolicy::default();
    let policy = ReloadPolicy {
        strategy: t.strategy.map_or(default.strategy, Into::into),
        deadline: some_time("reload.deadline", t.deadline, default.deadline)?,
        on_deadline: t.on_deadline.map_or(default.on_deadline, Into::into),
        probation: time(t.probation, default.probation),
    };
    if policy.deadline > DAY {
        return wrong("reload.deadline", "is longer than a day");
    }
    if policy.probation > DAY {
        return wrong("reload.probation", "is longer than a day");
    }
    Ok(policy)
}

fn stop(t: &DrainTable) -> StopPolicy {
    let default = StopPolicy::default();
    StopPolicy { grace: t.stop_grace.as_ref().map_or(default.grace, |g| *g.value()), ..default }
}
