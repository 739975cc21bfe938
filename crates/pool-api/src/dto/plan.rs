//! Plans and placements on the wire.

use pool_domain::estimate::DeviceEstimate;
use pool_domain::plan::{Row, Split};
use pool_domain::{DeviceMask, PoolId, ReplicaId, ReplicaKey};
use pool_services::control::{PlacementRequest, PlanRequest};
use pool_services::{Activation, Placed, PlanReport};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::DtoError;
use super::problem::{Code, Problem};
use crate::spec::{Defaults, PoolSpec, SpecError};

macro_rules! bodies {
    ($($(#[$doc:meta])* $ty:ident { $($(#[$fdoc:meta])* $field:ident: $fty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
        #[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
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

bodies! {
    /// What to plan: a pool that exists, or keys of one that could.
    PlanBody {
        /// A pool that exists; nothing else is given then.
        pool: String,
        /// A model, as in `[[pool]]`.
        model: String,
        /// An engine; default `llama.cpp`.
        engine: String,
        /// Further arguments.
        args: Vec<String>,
        /// Devices; default `auto`.
        devices: String,
        /// Context in tokens over all slots; default the largest that fits, at most 8192.
        context: u32,
        /// Concurrent requests; default 4.
        slots: u16,
        /// Types of the K and V caches.
        kv_type: [String; 2],
        /// Bytes on each device, such as `24 GiB`, or `auto`.
        vram: String,
        /// `off`, `auto`, or ratios such as `"3,1"` or `[3, 1]`.
        tensor_split: Value,
        /// `generate`, `embed` or `rerank`; default `generate`.
        workload: String,
    }
    /// What a request needs of a replica.
    PlacementBody {
        /// A model by id or alias.
        model: String,
        /// Only this pool.
        pool: String,
        /// Tokens, prompt and answer together.
        context: u64,
        /// Only on these devices, each as in a mask.
        devices: Vec<String>,
        /// A hint, as `pool/r0`.
        prefer_replica: String,
    }
}

impl From<PlanRequest> for PlanBody {
    fn from(what: PlanRequest) -> Self {
        match what {
            PlanRequest::Pool(id) => Self { pool: Some(id.to_string()), ..Self::default() },
            PlanRequest::Spec(spec) => Self {
                pool: None,
                model: Some(spec.model.to_string()),
                engine: Some(spec.engine.to_string()),
                args: Some(spec.args.clone()),
                devices: Some(spec.mask_of(0).to_string()),
                context: spec.context,
                slots: Some(spec.slots),
                kv_type: Some([spec.kv_type.0.to_string(), spec.kv_type.1.to_string()]),
                vram: spec.vram.map(|bytes| format!("{bytes} B")),
                workload: Some(spec.workload.code().to_owned()),
                tensor_split: Some(Value::from(match spec.tensor_split {
                    Split::Off => "off".to_owned(),
                    Split::Auto => "auto".to_owned(),
                    Split::Ratios(ratios) => ratios,
                })),
            },
        }
    }
}

/// A refused key of a pool, with the code that fits it.
#[must_use]
pub fn spec_problem(e: &SpecError) -> Problem {
    let code = match e.field {
        "tensor_split" => Code::SplitInvalid,
        "devices" => Code::MaskInvalid,
        "model" => Code::ModelRefInvalid,
        "engine" => Code::EngineUnknown,
        _ => Code::InvalidParams,
    };
    let mut problem = Problem::new(code, e.to_string());
    problem.hint = code.hint().map(str::to_owned);
    problem
}

impl PlanBody {
    /// What is asked for.
    ///
    /// # Errors
    /// With the code of the key that cannot be.
    #[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
    pub fn request(self) -> Result<PlanRequest, Problem> {
        let invalid = |detail: String| Problem::new(Code::InvalidParams, detail);
        if let Some(pool) = &self.pool {
            if self != (Self { pool: Some(pool.clone()), ..Self::default() }) {
                return Err(invalid("with `pool` nothing else can be given".into()));
            }
            return pool.parse().map(PlanRequest::Pool).map_err(|e: pool_domain::id::IdError| invalid(e.to_string()));
        }
        if self.model.is_none() {
            return Err(invalid("a plan needs `pool` or `model`".into()));
        }
        if let Some(devices) = &self.devices {
            DeviceMask::parse(devices).map_err(|e| Problem::new(Code::MaskInvalid, e.to_string()))?;
        }
        let mut keys = match serde_json::to_value(&self) {
            Ok(Value::Object(keys)) => keys,
            _ => Map::new(),
        };
        keys.insert("id".into(), Value::from("plan"));
        let spec: PoolSpec = serde_json::from_value(Value::Object(keys)).map_err(|e| invalid(e.to_string()))?;
        spec_request(spec)
    }
}

/// A whole pool as a thing to plan.
///
/// # Errors
/// With the code of the key that cannot be.
#[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
pub fn spec_request(spec: PoolSpec) -> Result<PlanRequest, Problem> {
    let checked = spec.check(&Defaults { activation: Activation::OnDemand }).map_err(|e| spec_problem(&e))?;
    Ok(PlanRequest::Spec(Box::new(checked)))
}

/// Sizes of one place, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct EstimateView {
    /// Tensors of the model.
    pub weights_bytes: u64,
    /// Keys, values and recurrent states.
    pub kv_bytes: u64,
    /// Intermediate results.
    pub compute_bytes: u64,
    /// What the runtime takes.
    pub runtime_bytes: u64,
    /// Kept free because an estimate is one.
    pub margin_bytes: u64,
}

/// One device of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct PlanRowView {
    /// The device.
    pub uuid: String,
    /// Its index.
    pub index: u32,
    /// Its first layer.
    pub layers_from: usize,
    /// The layer after its last.
    pub layers_to: usize,
    /// Whether it has the output layer.
    pub output: bool,
    /// What is expected there.
    pub estimate: EstimateView,
    /// What would be promised there.
    pub promised_bytes: u64,
    /// What can be promised there now.
    pub room_bytes: u64,
    /// What could be promised there after.
    pub free_after_bytes: u64,
}

/// What would be started where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct PlanView {
    /// Whether it could start now.
    pub fits: bool,
    /// If not: whether it could once others give memory or devices back.
    pub waiting_helps: bool,
    /// Why not; empty if it fits.
    pub reason: String,
    /// One entry a device.
    pub devices: Vec<PlanRowView>,
    /// How it would be spread.
    pub tensor_split: Option<String>,
    /// Context in tokens over all slots.
    pub context: Option<u64>,
    /// The host's memory.
    pub host: EstimateView,
    /// Whether the figures are what such an engine took before.
    pub learnt: bool,
    /// What would fit instead, or how far it could go.
    pub remedies: Vec<String>,
    /// The engine's arguments as they would be passed.
    pub args: Vec<String>,
    /// Why the engine cannot be run here; empty if it can.
    pub engine_problem: String,
}

impl From<DeviceEstimate> for EstimateView {
    fn from(e: DeviceEstimate) -> Self {
        Self {
            weights_bytes: e.weights,
            kv_bytes: e.kv,
            compute_bytes: e.compute,
            runtime_bytes: e.runtime,
            margin_bytes: e.margin,
        }
    }
}

impl From<EstimateView> for DeviceEstimate {
    fn from(e: EstimateView) -> Self {
        Self {
            weights: e.weights_bytes,
            kv: e.kv_bytes,
            compute: e.compute_bytes,
            runtime: e.runtime_bytes,
            margin: e.margin_bytes,
        }
    }
}

impl From<PlanReport> for PlanView {
    fn from(p: PlanReport) -> Self {
        let row = |r: Row| PlanRowView {
            free_after_bytes: r.free_after(),
            uuid: r.uuid,
            index: r.index,
            layers_from: r.layers.start,
            layers_to: r.layers.end,
            output: r.output,
            estimate: r.estimate.into(),
            promised_bytes: r.promised,
            room_bytes: r.room,
        };
        Self {
            fits: p.fits,
            waiting_helps: p.waiting_helps,
            reason: p.reason,
            devices: p.rows.into_iter().map(row).collect(),
            tensor_split: p.tensor_split,
            context: p.context,
            host: p.host.into(),
            learnt: p.learnt,
            remedies: p.remedies,
            args: p.args,
            engine_problem: p.engine_problem,
        }
    }
}

impl From<PlanView> for PlanReport {
    fn from(p: PlanView) -> Self {
        let row = |r: PlanRowView| Row {
            uuid: r.uuid,
            index: r.index,
            layers: r.layers_from..r.layers_to,
            output: r.output,
            estimate: r.estimate.into(),
            promised: r.promised_bytes,
            room: r.room_bytes,
        };
        Self {
            fits: p.fits,
            waiting_helps: p.waiting_helps,
            reason: p.reason,
            rows: p.devices.into_iter().map(row).collect(),
            tensor_split: p.tensor_split,
            context: p.context,
            host: p.host.into(),
            learnt: p.learnt,
            remedies: p.remedies,
            args: p.args,
            engine_problem: p.engine_problem,
        }
    }
}

fn key(text: &str) -> Option<ReplicaKey> {
    let (pool, replica) = text.rsplit_once('/')?;
    let replica = replica.strip_prefix('r')?.parse().ok()?;
    Some(ReplicaKey { pool: pool.parse().ok()?, replica: ReplicaId(replica) })
}

impl PlacementBody {
    /// What is asked for.
    ///
    /// # Errors
    /// When a name is none.
    #[expect(clippy::result_large_err, reason = "an error that becomes an answer at once")]
    pub fn request(self) -> Result<PlacementRequest, Problem> {
        let invalid = |detail: String| Problem::new(Code::InvalidParams, detail);
        let pool = self.pool.map(|p| p.parse::<PoolId>()).transpose().map_err(|e| invalid(e.to_string()))?;
        let prefer = |text: String| {
            key(&text).ok_or_else(|| invalid(format!("`{text}` is no replica: write it as \"pool/r0\"")))
        };
        let mask = |devices: Vec<String>| {
            DeviceMask::parse(&devices.join(",")).map_err(|e| Problem::new(Code::MaskInvalid, e.to_string()))
        };
        Ok(PlacementRequest {
            pool,
            model: self.model,
            context: self.context,
            devices: self.devices.map(mask).transpose()?,
            prefer_replica: self.prefer_replica.map(prefer).transpose()?,
        })
    }
}

impl From<PlacementRequest> for PlacementBody {
    fn from(r: PlacementRequest) -> Self {
        Self {
            model: r.model,
            pool: r.pool.map(|p| p.to_string()),
            context: r.context,
            devices: r.devices.map(|mask| vec![mask.to_string()]),
            prefer_replica: r.prefer_replica.map(|k| format!("{}/{}", k.pool, k.replica)),
        }
    }
}

/// A replica with the reason why it serves a request or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct PlacementView {
    /// The pool.
    pub pool_id: String,
    /// The replica.
    pub replica_id: String,
    /// Whether it can serve.
    pub serves: bool,
    /// Why, or why not, in words.
    pub reason: String,
    /// Why not, as one word; empty if it serves.
    pub reason_code: String,
    /// Bytes free on the one of its devices that has the least.
    pub vram_free_bytes: u64,
    /// Leases held.
    pub active_leases: u32,
    /// Requests it takes at once.
    pub slots_total: u32,
}

impl From<Placed> for PlacementView {
    fn from(p: Placed) -> Self {
        Self {
            pool_id: p.key.pool.to_string(),
            replica_id: p.key.replica.to_string(),
            serves: p.serves,
            reason: p.reason,
            reason_code: p.reason_code,
            vram_free_bytes: p.vram_free,
            active_leases: p.leases,
            slots_total: p.slots,
        }
    }
}

impl TryFrom<PlacementView> for Placed {
    type Error = DtoError;
    fn try_from(p: PlacementView) -> Result<Self, DtoError> {
        let text = format!("{}/{}", p.pool_id, p.replica_id);
        Ok(Self {
            key: key(&text)
                .ok_or_else(|| DtoError { field: "replica_id", message: format!("`{text}` is no replica") })?,
            serves: p.serves,
            reason: p.reason,
            reason_code: p.reason_code,
            vram_free: p.vram_free_bytes,
            leases: p.active_leases,
            slots: p.slots_total,
        })
    }
}
