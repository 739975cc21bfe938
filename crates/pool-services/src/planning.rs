//! What would be started where, without starting anything.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use pool_domain::estimate::DeviceEstimate;
use pool_domain::plan::{Demand, EngineMemory, Fit, Row, Split, fit, remedies};
use pool_domain::rank::{self, Candidate, Standing};
use pool_domain::reserve::{Refusal, available};
use pool_domain::{DeviceMask, DeviceSnapshot, ReplicaKey};

use crate::control::{ControlError, PlacementRequest};
use crate::driver::correction_key;
use crate::ports::{EngineProvisioner, ModelStore, NotAdmitted, PrepareRequest, Presence, ResolvedModel, StateLedger};
use crate::snapshot::PoolSnapshot;
use crate::spec::PoolSpec;

/// The answer to "what would be started where".
#[derive(Debug, Clone, PartialEq)]
pub struct PlanReport {
    /// Whether it could start now.
    pub fits: bool,
    /// If not: whether it could once others give memory or devices back.
    pub waiting_helps: bool,
    /// Why not; empty if it fits.
    pub reason: String,
    /// One entry a device.
    pub rows: Vec<Row>,
    /// How it would be spread, as the engine takes it.
    pub tensor_split: Option<String>,
    /// Context in tokens over all slots, where it is known.
    pub context: Option<u64>,
    /// The host's memory.
    pub host: DeviceEstimate,
    /// Whether the figures are what such an engine took before.
    pub learnt: bool,
    /// What would fit instead, or how far it could go.
    pub remedies: Vec<String>,
    /// The engine's arguments as they would be passed, before those that the pool gives itself; model files by name alone.
    /// Empty if the engine cannot be run.
    pub args: Vec<String>,
    /// Why the engine cannot be run here; empty if it can.
    pub engine_problem: String,
}

impl PlanReport {
    /// What can be said before the model is here.
    fn before_the_model(spec: &PoolSpec) -> Self {
        Self {
            fits: false,
            waiting_helps: true,
            reason: "the model is not here yet: what it needs is known once it is fetched".into(),
            rows: Vec::new(),
            tensor_split: None,
            context: spec.context.map(u64::from),
            host: DeviceEstimate::default(),
            learnt: false,
            remedies: Vec::new(),
            args: Vec::new(),
            engine_problem: String::new(),
        }
    }
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The models.
    pub models: &'a dyn ModelStore,
    /// The engines.
    pub provisioner: &'a dyn EngineProvisioner,
    /// Durable facts, where there are any.
    pub ledger: Option<&'a dyn StateLedger>,
    /// The devices.
    pub devices: &'a [DeviceSnapshot],
    /// Bytes promised on each, by UUID.
    pub promised: &'a BTreeMap<String, u64>,
}

fn refused(code: &str, detail: impl Into<String>) -> ControlError {
    ControlError::Refused { code: code.into(), detail: detail.into() }
}

/// What a start of this model needs. A header that cannot be read is no obstacle where somebody said what it needs.
pub(crate) async fn demand(
    models: &dyn ModelStore,
    provisioner: &dyn EngineProvisioner,
    ledger: Option<&dyn StateLedger>,
    spec: &PoolSpec,
    model: &ResolvedModel,
) -> Result<Demand, pool_domain::Failure> {
    let memory = provisioner.memory(spec);
    let profile = match memory {
        EngineMemory::LlamaCpp(_) => match models.profile(model).await {
            Ok(profile) => profile.map(Arc::new),
            Err(_) if spec.vram.is_some() && spec.tensor_split == Split::Off => None,
            Err(failure) => return Err(failure),
        },
        EngineMemory::Fixed(_) | EngineMemory::Unknown => None,
    };
    let mut demand = Demand { profile, memory, vram: spec.vram, split: spec.tensor_split.clone(), learnt: None };
    if let Some(ledger) = ledger {
        demand.learnt = ledger.learnt(&spec.id, &correction_key(spec, &demand)).await;
    }
    Ok(demand)
}

/// Whether there is such an engine, and whether it may be given the spec's arguments.
pub(crate) fn admitted(spec: &PoolSpec, provisioner: &dyn EngineProvisioner) -> Result<(), ControlError> {
    provisioner.admits(spec).map_err(not_admitted)
}

/// Whether the pool may name its model.
pub(crate) fn permitted(spec: &PoolSpec, models: &dyn ModelStore) -> Result<(), ControlError> {
    models.permits(&spec.model).map_err(|why| refused("MODEL_REF_DENIED", why))
}

/// Why it is not, with its code.
pub(crate) fn not_admitted(why: NotAdmitted) -> ControlError {
    match why {
        NotAdmitted::Engine(why) => refused("ENGINE_UNKNOWN", why),
        NotAdmitted::Argument(why) => refused("ARG_DENIED", why),
    }
}

/// Plans one engine of the spec on the mask of its first replica.
///
/// # Errors
/// When the model, the mask or the split cannot be; that it does not fit is an answer.
pub async fn report(spec: &PoolSpec, from: Surroundings<'_>) -> Result<PlanReport, ControlError> {
    admitted(spec, from.provisioner)?;
    let invalid = |failure: pool_domain::Failure| refused("MODEL_REF_INVALID", failure.detail);
    permitted(spec, from.models)?;
    let model = match from.models.look(&spec.model).await.map_err(invalid)? {
        Presence::Here(model) => model,
        Presence::Remote => return Ok(PlanReport::before_the_model(spec)),
    };
    let demand = demand(from.models, from.provisioner, from.ledger, spec, &model).await.map_err(invalid)?;
    let mask = spec.mask_of(0);
    let valid = |mask: &DeviceMask| {
        mask.validate_against_discovered(from.devices).map_err(|e| refused("MASK_INVALID", e.to_string()))
    };
    let resolved = valid(mask)?;
    for replica in 1..spec.replicas {
        valid(spec.mask_of(replica))?;
    }
    if let Split::Ratios(text) = &demand.split {
        pool_domain::split::SplitRatios::parse(text, resolved.uuids.len())
            .map_err(|e| refused("SPLIT_INVALID", e.to_string()))?;
    }
    let promised = |uuid: &str| from.promised.get(uuid).copied().unwrap_or(0);
    let helps = remedies(&demand, mask, from.devices, &promised).iter().map(ToString::to_string).collect();
    match fit_all(spec, &demand, from.devices, from.promised) {
        Ok(fit) => {
            let (args, engine_problem) = args(spec, &model, &fit, from.provisioner).await;
            Ok(PlanReport {
                fits: true,
                waiting_helps: false,
                reason: String::new(),
                rows: fit.rows,
                tensor_split: fit.tensor_split,
                context: fit.context,
                host: fit.host,
                learnt: fit.learnt,
                remedies: helps,
                args,
                engine_problem,
            })
        }
        Err(refusal) => {
            let (waiting_helps, reason) = match refusal {
                Refusal::Mask(e) => return Err(refused("MASK_INVALID", e.to_string())),
                Refusal::NeverFits(why) => (false, why),
                Refusal::Devices(why) | Refusal::Vram(why) => (true, why),
            };
            Ok(PlanReport {
                fits: false,
                waiting_helps,
                reason,
                rows: Vec::new(),
                tensor_split: None,
                context: spec.context.map(u64::from),
                host: DeviceEstimate::default(),
                learnt: false,
                remedies: helps,
                args: Vec::new(),
                engine_problem: String::new(),
            })
        }
    }
}

/// One engine after the other, as the steward would grant them; the first one is shown.
fn fit_all(
    spec: &PoolSpec,
    demand: &Demand,
    devices: &[DeviceSnapshot],
    promised: &BTreeMap<String, u64>,
) -> Result<Fit, Refusal> {
    let (mut promised, mut first) = (promised.clone(), None);
    for replica in 0..spec.replicas.max(1) {
        let of = |why: String| if replica == 0 { why } else { format!("replica r{replica}: {why}") };
        let now = fit(demand, spec.mask_of(replica), devices, &|uuid| promised.get(uuid).copied().unwrap_or(0));
        let fit = now.map_err(|refusal| match refusal {
            Refusal::Vram(why) => Refusal::Vram(of(why)),
            Refusal::NeverFits(why) => Refusal::NeverFits(of(why)),
            other => other,
        })?;
        for row in &fit.rows {
            let sum = promised.entry(row.uuid.clone()).or_default();
            *sum = sum.saturating_add(row.promised);
        }
        first = first.or(Some(fit));
    }
    first.ok_or_else(|| Refusal::NeverFits("a pool has at least one replica".into()))
}

async fn args(
    spec: &PoolSpec,
    model: &ResolvedModel,
    fit: &Fit,
    provisioner: &dyn EngineProvisioner,
) -> (Vec<String>, String) {
    let request = PrepareRequest {
        spec: spec.clone(),
        model: model.clone(),
        devices: fit.devices.clone(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        tensor_split: fit.tensor_split.clone(),
        context: fit.context,
    };
    match provisioner.prepare(&request).await {
        Ok(prepared) => {
            let path = model.local_path.as_ref().map(|p| p.display().to_string()).unwrap_or_default();
            let name = model.local_path.as_ref().and_then(|p| p.file_name()).unwrap_or_default();
            let shown = |arg: String| if arg == path { name.to_string_lossy().into_owned() } else { arg };
            // Those of the pool itself come last; whoever may see them has them.
            let ours = prepared.args.len().saturating_sub(spec.args.len());
            (prepared.args.into_iter().take(ours).map(shown).collect(), String::new())
        }
        Err(failure) => (Vec::new(), failure.detail),
    }
}

/// A replica with the reason why it serves a request or not, the best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Which.
    pub key: ReplicaKey,
    /// Whether it can serve.
    pub serves: bool,
    /// Why, in words.
    pub reason: String,
    /// Why not, as one word; empty if it serves.
    pub reason_code: String,
    /// Bytes free on the one of its devices that has the least.
    pub vram_free: u64,
    /// Leases held.
    pub leases: u32,
    /// Requests it takes at once.
    pub slots: u32,
}

/// Ranks the replicas of pools for a request.
pub(crate) fn placements<'a>(
    pools: impl Iterator<Item = (&'a PoolSpec, PoolSnapshot)>,
    devices: &[DeviceSnapshot],
    promised: &BTreeMap<String, u64>,
    request: PlacementRequest,
) -> Result<Vec<Placed>, ControlError> {
    let wanted = request.devices.map(|mask| mask.validate_against_discovered(devices)).transpose();
    let wanted = wanted.map_err(|e| refused("MASK_INVALID", e.to_string()))?;
    let mut candidates = Vec::new();
    for (spec, pool) in pools {
        for replica in &pool.replicas {
            let mut uuids: Vec<String> =
                replica.device_mask.split(',').filter(|u| !u.is_empty()).map(str::to_owned).collect();
            let free = |u: &String| {
                let device = devices.iter().find(|d| d.uuid == *u)?;
                Some(available(device, promised.get(u).copied().unwrap_or(0)))
            };
            let vram_free = uuids.iter().filter_map(free).min().unwrap_or(0);
            // One that rests has no device yet: that it rests is what speaks against it.
            if let (true, false, Some(wanted)) = (uuids.is_empty(), replica.ready, &wanted) {
                uuids.clone_from(&wanted.uuids);
            }
            let models = [pool.model_id.clone(), pool.model.clone()].into_iter().chain(pool.aliases.iter().cloned());
            candidates.push(Candidate {
                key: ReplicaKey { pool: pool.pool_id.clone(), replica: replica.id },
                standing: match (replica.ready, replica.draining) {
                    (true, _) => Standing::Ready,
                    (false, true) => Standing::Draining,
                    (false, false) => Standing::NotReady(replica.state),
                },
                models: models.collect(),
                vram_free,
                devices: uuids,
                leases: replica.active_leases,
                slots: replica.slots_total,
                // A request has its slot's part of the whole.
                context: replica.context.or(spec.context.map(u64::from)).map(|c| c / u64::from(spec.slots.max(1))),
            });
        }
    }
    let request = rank::Request {
        pool: request.pool,
        model: request.model,
        context: request.context,
        devices: wanted,
        prefer_replica: request.prefer_replica,
    };
    Ok(placed(&candidates, &request))
}

/// Ranks candidates.
fn placed(candidates: &[Candidate], request: &rank::Request) -> Vec<Placed> {
    let told = |r: rank::Ranked<'_>| Placed {
        key: r.candidate.key.clone(),
        serves: r.verdict.serves(),
        reason: r.verdict.to_string(),
        reason_code: match r.verdict {
            rank::Verdict::Refused(why) => why.code().to_owned(),
            rank::Verdict::Serves { .. } => String::new(),
        },
        vram_free: r.candidate.vram_free,
        leases: r.candidate.leases,
        slots: r.candidate.slots,
    };
    rank::rank(candidates, request).into_iter().map(told).collect()
}
