//! From what an engine needs and what the node has to what would be started where; and, where nothing can be, to what
//! would help.

use std::cmp::Reverse;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::device::{DeviceHealth, DeviceSnapshot};
use crate::estimate::{Correction, DeviceEstimate, KvType, LlamaCppSettings, MemoryEstimate, Overheads, llama_cpp};
use crate::mask::{DeviceMask, ResolvedMask};
use crate::model::ModelProfile;
use crate::reserve::{Refusal, available, gib, place_each, usable};
use crate::split::{SplitDevice, SplitInput, SplitPlan, SplitRatios, largest_context};

mod shortage;

/// Context an engine gets when nobody says: the largest that fits, at most this.
pub const DEFAULT_CONTEXT: u64 = 8192;
/// Contexts are tried in steps of this many tokens, to which llama.cpp pads.
const CONTEXT_STEP: u64 = 256;

/// How an engine's memory is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineMemory {
    /// By llama.cpp's formulas.
    LlamaCpp(LlamaCppSettings),
    /// It takes what it is told to, like the stub: so many bytes on each device.
    Fixed(u64),
    /// Not: the pool has to say.
    Unknown,
}

/// Whether an engine is spread over its devices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Split {
    /// By nobody but the engine itself.
    #[default]
    Off,
    /// As evenly as whole layers allow.
    Auto,
    /// By ratios, as written.
    Ratios(String),
}

/// What a start needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    /// The model, where its header could be read.
    pub profile: Option<Arc<ModelProfile>>,
    /// How the engine's memory is known.
    pub memory: EngineMemory,
    /// Bytes on each device as somebody said; it wins over every estimate.
    pub vram: Option<u64>,
    /// How it is spread.
    pub split: Split,
    /// What was seen of the same engine before.
    pub learnt: Option<Correction>,
}

impl Demand {
    /// What was learnt where the engine ran out of memory, and has not become ready since.
    #[must_use]
    pub fn ran_out(&self) -> Option<Correction> {
        self.learnt.filter(|learnt| learnt.short > 0)
    }
}

/// One device of a fit. Sizes are bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The device.
    pub uuid: String,
    /// Its index.
    pub index: u32,
    /// Its layers; all of them, where the engine alone knows.
    pub layers: Range<usize>,
    /// Whether it has the output layer.
    pub output: bool,
    /// What is expected there; zeros where nothing is estimated.
    pub estimate: DeviceEstimate,
    /// What is promised there.
    pub promised: u64,
    /// What could be promised before.
    pub room: u64,
}

impl Row {
    /// What can still be promised after.
    #[must_use]
    pub fn free_after(&self) -> u64 {
        self.room.saturating_sub(self.promised)
    }
}

/// A start that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The devices, in order.
    pub devices: ResolvedMask,
    /// Each of them.
    pub rows: Vec<Row>,
    /// llama.cpp's `--tensor-split`, where the planner decides.
    pub tensor_split: Option<String>,
    /// Context in tokens over all slots, where the planner knows or decides.
    pub context: Option<u64>,
    /// The host's memory.
    pub host: DeviceEstimate,
    /// Whether a learnt figure stood in for the estimate.
    pub learnt: bool,
}

impl Fit {
    /// Bytes to promise on each device, in order.
    #[must_use]
    pub fn bytes(&self) -> Vec<u64> {
        self.rows.iter().map(|r| r.promised).collect()
    }

    /// Bytes that are free to it on all its devices together.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.rows.iter().fold(0, |sum, r| sum.saturating_add(r.room))
    }
}

/// Finds devices for a start.
///
/// # Errors
/// Says whether waiting may help: it does if the start would fit on devices that are well and that nobody else uses. One
/// that ran out of memory waits for more than it had then.
pub fn fit(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    let why = match fit_now(demand, mask, devices, promised) {
        Ok(fit) => return shortage::unless_it_ran_out(demand, fit),
        Err(Refusal::Mask(e)) => return Err(Refusal::Mask(e)),
        Err(Refusal::Devices(why)) => return Err(Refusal::Devices(why)),
        Err(Refusal::Vram(why) | Refusal::NeverFits(why)) => why,
    };
    let Ok(empty) = at_best(demand, mask, devices) else { return Err(Refusal::NeverFits(why)) };
    let lacks = |row: &Row| {
        let device = devices.iter().find(|d| d.uuid == row.uuid)?;
        let left = available(device, promised(&row.uuid));
        let text = || format!("GPU {} has {} left of the {} needed", row.index, gib(left), gib(row.promised));
        (left < row.promised).then(text)
    };
    Err(Refusal::Vram(empty.rows.iter().find_map(lacks).unwrap_or(why)))
}

/// What a start would get on devices that are well and that nobody uses.
///
/// # Errors
/// When it would not fit even then.
pub fn at_best(demand: &Demand, mask: &DeviceMask, devices: &[DeviceSnapshot]) -> Result<Fit, Refusal> {
    fit_now(demand, mask, &unused(devices), &|_| 0)
}

/// The devices as they are when they are well and nobody uses them.
fn unused(devices: &[DeviceSnapshot]) -> Vec<DeviceSnapshot> {
    let unused = |d: &DeviceSnapshot| DeviceSnapshot {
        vram_used: 0,
        vram_foreign: 0,
        vram_free: usable(d),
        health: DeviceHealth::Ok,
        ..d.clone()
    };
    devices.iter().map(unused).collect()
}

fn fit_now(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    let EngineMemory::LlamaCpp(settings) = &demand.memory else { return as_told(demand, mask, devices, promised) };
    let Some(profile) = &demand.profile else { return as_told(demand, mask, devices, promised) };
    if settings.context != 0 {
        return fit_context(demand, profile, settings, mask, devices, promised);
    }
    let with =
        |context| fit_context(demand, profile, &LlamaCppSettings { context, ..*settings }, mask, devices, promised);
    let most = DEFAULT_CONTEXT.min(profile.context_length.max(CONTEXT_STEP));
    with(most).or_else(|refusal| {
        let context = largest_context(|c| with(c).is_ok(), most, CONTEXT_STEP).ok_or(refusal)?;
        with(context)
    })
}

/// Without an estimate: what somebody said, on each device.
fn as_told(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    if demand.split != Split::Off {
        return Err(Refusal::NeverFits("`tensor_split` needs an engine and a model whose layers are known".into()));
    }
    let bytes = match (demand.vram, demand.memory) {
        (Some(bytes), _) => bytes,
        (None, EngineMemory::Fixed(bytes)) => bytes,
        (None, _) => {
            return Err(Refusal::NeverFits("the memory of this model on this engine is not known: set `vram`".into()));
        }
    };
    let placed = place_each(mask, &[bytes], devices, promised)?;
    let rows = rows_of(&placed, devices, promised, |_| (0..0, false, DeviceEstimate::default(), bytes));
    Ok(Fit { devices: placed, rows, tensor_split: None, context: None, host: DeviceEstimate::default(), learnt: false })
}

fn fit_context(
    demand: &Demand,
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    let alone = || on_one(demand, profile, settings, mask, devices, promised);
    match &demand.split {
        Split::Off => alone(),
        Split::Ratios(_) => over(demand, profile, settings, mask, devices, promised),
        Split::Auto if *mask != DeviceMask::Auto => over(demand, profile, settings, mask, devices, promised),
        // As few devices as possible: one, then those with the most room.
        Split::Auto => alone().or_else(|refusal| {
            let whole = |d: &&DeviceSnapshot| !d.mig_parent && d.mig.is_none() && d.health.admits();
            let (mut roomy, mut last): (Vec<&DeviceSnapshot>, _) = (devices.iter().filter(whole).collect(), refusal);
            roomy.sort_by_key(|d| (Reverse(available(d, promised(&d.uuid))), d.index));
            for count in 2..=roomy.len().min(crate::split::MAX_DEVICES) {
                let mut some: Vec<&DeviceSnapshot> = roomy[..count].to_vec();
                some.sort_by_key(|d| d.index);
                let list = some.iter().map(|d| d.uuid.as_str()).collect::<Vec<_>>().join(",");
                let Ok(mask) = DeviceMask::parse(&list) else { continue };
                match over(demand, profile, settings, &mask, devices, promised) {
                    Ok(fit) => return Ok(fit),
                    Err(refusal) => last = refusal,
                }
            }
            Err(last)
        }),
    }
}

fn unknown(error: &impl fmt::Display) -> Refusal {
    Refusal::NeverFits(error.to_string())
}

/// Everything on each device of the mask, since the engine may put it there.
fn on_one(
    demand: &Demand,
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    let whole = llama_cpp::estimate_single(profile, settings, Overheads::default());
    let (estimate, host) = match (whole, demand.vram) {
        (Ok(e), _) => (e.devices.first().copied().unwrap_or_default(), e.host),
        (Err(_), Some(_)) => Default::default(),
        (Err(e), None) => return Err(unknown(&e)),
    };
    let learnt = demand.learnt.filter(|l| l.is_measured() && demand.vram.is_none()).map(|l| l.apply(&estimate));
    let bytes = demand.vram.or(learnt).unwrap_or_else(|| estimate.total());
    let placed = place_each(mask, &[bytes], devices, promised)?;
    let layers = profile.layers.len();
    let rows = rows_of(&placed, devices, promised, |_| (0..layers, true, estimate, bytes));
    let context = Some(settings.context);
    Ok(Fit { devices: placed, rows, tensor_split: None, context, host, learnt: learnt.is_some() })
}

/// Spread over all devices of the mask.
fn over(
    demand: &Demand,
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Result<Fit, Refusal> {
    if settings.gpu_layers.is_some_and(|n| usize::try_from(n).is_ok_and(|n| n <= profile.layers.len())) {
        let why = "`tensor_split` spreads all layers: leave out the argument that keeps some off the devices";
        return Err(Refusal::NeverFits(why.into()));
    }
    let resolved = mask.validate_against_discovered(devices).map_err(Refusal::Mask)?;
    let chosen: Vec<&DeviceSnapshot> =
        resolved.uuids.iter().filter_map(|u| devices.iter().find(|d| d.uuid == *u)).collect();
    let whole = llama_cpp::estimate_single(profile, settings, Overheads::default()).map_err(|e| unknown(&e))?;
    let one = whole.devices.first().copied().unwrap_or_default();
    // What a device takes whatever its share; the part that grows with the share is small beside it.
    let fixed = one.compute.saturating_add(one.runtime).saturating_add(Overheads::default().margin_min);
    let layers = llama_cpp::layer_loads(profile, settings).map_err(|e| unknown(&e))?;
    let output = llama_cpp::output_load(profile);
    let offer =
        |d: &&DeviceSnapshot| SplitDevice { uuid: d.uuid.clone(), usable: available(d, promised(&d.uuid)), fixed };
    let offers: Vec<SplitDevice> = chosen.iter().map(offer).collect();
    let input = SplitInput { layers: &layers, kv: &[], output, devices: &offers };
    let plan = match &demand.split {
        Split::Ratios(text) => {
            let ratios = SplitRatios::parse(text, offers.len()).map_err(|e| unknown(&e))?;
            SplitPlan::from_ratios(&input, &ratios)
        }
        Split::Off | Split::Auto => SplitPlan::compute(&input),
    }
    .map_err(|e| unknown(&e))?;
    let estimate = estimate_of(profile, settings, &plan)?;
    let rows = rows_of(&resolved, devices, promised, |at| {
        let expected = estimate.devices.get(at).copied().unwrap_or_default();
        let (layers, output) = plan.shares().get(at).map(|s| (s.layers.clone(), s.output)).unwrap_or_default();
        // The engine opens a context also where it puts no layer.
        let least = Overheads::default().runtime;
        (layers, output, expected, demand.vram.unwrap_or_else(|| expected.total().max(least)))
    });
    let tensor_split = Some(plan.tensor_split());
    let context = Some(settings.context);
    let fit = Fit { devices: resolved.clone(), rows, tensor_split, context, host: estimate.host, learnt: false };
    place_each(mask_of(&resolved).as_ref().unwrap_or(mask), &fit.bytes(), devices, promised)?;
    Ok(fit)
}

fn mask_of(resolved: &ResolvedMask) -> Option<DeviceMask> {
    DeviceMask::parse(&resolved.uuids.join(",")).ok()
}

fn estimate_of(
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    plan: &SplitPlan,
) -> Result<MemoryEstimate, Refusal> {
    let at = |layer: usize| plan.shares().iter().position(|s| s.layers.contains(&layer)).unwrap_or(0);
    let assignment: Vec<usize> = (0..profile.layers.len()).map(at).collect();
    let output = plan.shares().iter().position(|s| s.output).unwrap_or(0);
    llama_cpp::estimate(profile, settings, &assignment, output, Overheads::default()).map_err(|e| unknown(&e))
}

fn rows_of(
    placed: &ResolvedMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
    row: impl Fn(usize) -> (Range<usize>, bool, DeviceEstimate, u64),
) -> Vec<Row> {
    let known = placed.uuids.iter().enumerate().filter_map(|(i, u)| Some((i, devices.iter().find(|d| d.uuid == *u)?)));
    known
        .map(|(i, d)| {
            let (layers, output, estimate, bytes) = row(i);
            let room = available(d, promised(&d.uuid));
            Row { uuid: d.uuid.clone(), index: d.index, layers, output, estimate, promised: bytes, room }
        })
        .collect()
}

/// What would change the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// This context fits, or this much larger one would.
    Context {
        /// Tokens over all slots.
        tokens: u64,
    },
    /// Smaller numbers in the KV cache.
    KvType {
        /// For keys and values.
        kv: KvType,
        /// Tokens over all slots that fit then.
        tokens: u64,
    },
    /// Whole layers on several devices.
    Split {
        /// How many.
        devices: usize,
        /// Tokens over all slots that fit then.
        tokens: u64,
    },
    /// A smaller file of the same model, such as another quantisation.
    Smaller {
        /// Bytes of weights that would fit at the least context.
        weights: u64,
        /// On how many devices.
        devices: usize,
    },
    /// Nothing but room: other engines or programs hold it.
    Free {
        /// Bytes that would have to come free.
        bytes: u64,
        /// On the device with this index.
        index: u32,
    },
    /// Another device has the room.
    Elsewhere {
        /// Its index.
        index: u32,
    },
    /// Nothing that this device has.
    Larger {
        /// Bytes that are too little.
        bytes: u64,
    },
    /// It takes what it wants of what there is: less of it to do.
    Less,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Context { tokens } => write!(f, "context = {tokens} fits"),
            Self::KvType { kv, tokens } => {
                write!(f, "kv_type = [\"{kv}\", \"{kv}\"] (flash attention on) fits with context = {tokens}")
            }
            Self::Split { devices, tokens } => {
                write!(f, "tensor_split = \"auto\" over {devices} devices fits with context = {tokens}")
            }
            Self::Smaller { weights, devices } => {
                let on = if *devices == 1 { "one GPU".to_owned() } else { format!("{devices} GPUs together") };
                write!(f, "weights of at most {} would fit on {on}: take a smaller quantisation", gib(*weights))
            }
            Self::Free { bytes, index } => write!(f, "{} more free memory on GPU {index} is needed", gib(*bytes)),
            Self::Elsewhere { index } => write!(f, "devices = \"{index}\" has more room"),
            Self::Larger { bytes } => write!(f, "a GPU that leaves it more than {} would be needed", gib(*bytes)),
            Self::Less => f.write_str("a smaller `context` or fewer `slots` may fit"),
        }
    }
}

/// What else would fit. With a start that fits: how far the context could grow.
#[must_use]
pub fn remedies(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Vec<Remedy> {
    let (EngineMemory::LlamaCpp(settings), Some(profile), None) = (&demand.memory, &demand.profile, demand.vram) else {
        return shortage::remedies(demand, mask, devices, promised);
    };
    // By how much its estimate was too low, as far as that is known.
    let lack = shortage::lack(demand, mask, devices, promised);
    let wanted = if settings.context == 0 { DEFAULT_CONTEXT.min(profile.context_length) } else { settings.context };
    let trained = profile.context_length.max(wanted);
    let tokens = |settings: LlamaCppSettings, split: &Split, mask: &DeviceMask, most: u64| {
        let fits = |context| {
            let memory = EngineMemory::LlamaCpp(LlamaCppSettings { context, ..settings });
            // What was learnt belongs to the settings that were asked for.
            let demand = Demand { memory, split: split.clone(), learnt: None, ..demand.clone() };
            fit(&demand, mask, devices, promised).is_ok_and(|fit| shortage::spares(&fit, lack))
        };
        largest_context(fits, most, CONTEXT_STEP)
    };
    let as_is = fit(demand, mask, devices, promised);
    if as_is.is_ok() {
        let most = tokens(*settings, &demand.split, mask, trained).filter(|t| *t > wanted);
        return most.map(|tokens| Remedy::Context { tokens }).into_iter().collect();
    }
    let mut found = Vec::new();
    found.extend(tokens(*settings, &demand.split, mask, wanted).map(|tokens| Remedy::Context { tokens }));
    for kv in [KvType::Q8_0, KvType::Q4_0] {
        if kv.bytes_per_32() < settings.kv_type_k.bytes_per_32().max(settings.kv_type_v.bytes_per_32()) {
            let smaller = LlamaCppSettings { kv_type_k: kv, kv_type_v: kv, ..*settings };
            found.extend(tokens(smaller, &demand.split, mask, wanted).map(|tokens| Remedy::KvType { kv, tokens }));
        }
    }
    let whole = devices.iter().filter(|d| !d.mig_parent && d.mig.is_none()).count();
    if demand.split == Split::Off && whole > 1 {
        let all = if *mask == DeviceMask::Auto { DeviceMask::All } else { mask.clone() };
        let several = all.validate_against_discovered(devices).map_or(0, |m| m.uuids.len());
        if several > 1 {
            let tokens = tokens(*settings, &Split::Auto, &all, wanted);
            found.extend(tokens.map(|tokens| Remedy::Split { devices: several, tokens }));
        }
    }
    if let Err(Refusal::Vram(_)) = as_is {
        found.extend(missing(demand, mask, devices, promised));
    }
    found.extend(shortage::remedies(demand, mask, devices, promised));
    if found.is_empty() {
        found.extend(smaller(profile, settings, mask, devices));
    }
    found
}

/// How large the weights could be on what the devices offer when nobody else uses them.
fn smaller(
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
) -> Option<Remedy> {
    let least = LlamaCppSettings { context: CONTEXT_STEP, ..*settings };
    let one = llama_cpp::estimate_single(profile, &least, Overheads::default()).ok()?.devices.first().copied()?;
    let fixed = one.compute.saturating_add(one.runtime).saturating_add(Overheads::default().margin_min);
    let all = if *mask == DeviceMask::Auto { DeviceMask::All } else { mask.clone() };
    let there = all.validate_against_discovered(devices).ok()?;
    let known = there.uuids.iter().filter_map(|u| devices.iter().find(|d| d.uuid == *u));
    let room = known.map(|d| usable(d).saturating_sub(fixed)).sum::<u64>().checked_sub(one.kv)?;
    // The margin grows with what is expected.
    let weights = room - room / 20;
    (weights > 0 && weights < one.weights).then_some(Remedy::Smaller { weights, devices: there.uuids.len() })
}

/// How much is missing on each device, when only others' memory stands in the way.
fn missing(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
) -> Vec<Remedy> {
    let Ok(fit) = fit_now(demand, mask, &unused(devices), &|_| 0) else { return Vec::new() };
    let lack = |row: &Row| {
        let device = devices.iter().find(|d| d.uuid == row.uuid)?;
        let bytes = row.promised.checked_sub(available(device, promised(&row.uuid)))?;
        (bytes > 0).then_some(Remedy::Free { bytes, index: row.index })
    };
    fit.rows.iter().filter_map(lack).collect()
}

#[cfg(test)]
mod tests;
