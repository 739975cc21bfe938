//! llama.cpp's memory. Every formula names the place in llama.cpp b11434 that it follows; facts only, no code.

use super::{DeviceEstimate, EstimateError, KvType, MemoryEstimate, Overheads, compute};
use crate::model::{LayerProfile, ModelProfile};

/// Whether attention runs fused, without a score matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum FlashAttention {
    /// The engine decides: on wherever the device can, which is every NVIDIA GPU it supports.
    #[default]
    Auto,
    /// On.
    On,
    /// Off; a quantised V cache is then refused.
    Off,
}

impl FlashAttention {
    /// Whether it runs.
    #[must_use]
    pub fn runs(self) -> bool {
        self != Self::Off
    }
}

/// For how many tokens of a batch results are wanted, which sizes the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Outputs {
    /// One for each slot: llama-server generating without speculation (`server_output_limits`).
    #[default]
    Slots,
    /// Every token of a batch: embeddings, reranking, `llama-fit-params`.
    Batch,
}

/// The settings that decide about memory, with llama-server's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LlamaCppSettings {
    /// `--ctx-size`: tokens of all slots together; 0 takes what the model was trained for.
    pub context: u64,
    /// `--parallel`: sequences at once.
    pub slots: u32,
    /// `--cache-type-k`.
    pub kv_type_k: KvType,
    /// `--cache-type-v`.
    pub kv_type_v: KvType,
    /// `--flash-attn`.
    pub flash_attention: FlashAttention,
    /// `--batch-size`: tokens handed in at once.
    pub batch: u32,
    /// `--ubatch-size`: tokens computed at once.
    pub ubatch: u32,
    /// `--kv-unified`: one cache for all slots; only when `--parallel` is not given, llama-server sets it by itself.
    pub kv_unified: bool,
    /// `--n-gpu-layers`: layers on devices, counted from the end with the output as the last; `None` is all.
    pub gpu_layers: Option<u32>,
    /// `--swa-full`: layers with a window keep the whole context.
    pub swa_full: bool,
    /// `--kv-offload`: keys and values lie with their layer; else in the host's memory.
    pub kv_offload: bool,
    /// What the logits are wanted for.
    pub outputs: Outputs,
}

impl Default for LlamaCppSettings {
    fn default() -> Self {
        Self {
            context: 0,
            slots: 1,
            kv_type_k: KvType::F16,
            kv_type_v: KvType::F16,
            flash_attention: FlashAttention::Auto,
            batch: 2048,
            ubatch: 512,
            kv_unified: false,
            gpu_layers: None,
            swa_full: false,
            kv_offload: true,
            outputs: Outputs::Slots,
        }
    }
}

/// Sequences at once (`LLAMA_MAX_SEQ`).
const MAX_SLOTS: u32 = 256;

/// Architectures for which llama.cpp keeps what no header tells: compressed caches, a second model's cache, an encoder's
/// results (`llama_model::create_memory`).
const NOT_ESTIMATED: &[&str] =
    &["clip", "deepseek4", "dflash", "eagle3", "gemma4-assistant", "qwen4exp", "t5", "t5encoder"];

/// Architectures without a cache: encoders and diffusion models (`llama_model::create_memory`).
const WITHOUT_CACHE: &[&str] = &[
    "bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "eurobert",
    "wavtokenizer-dec",
    "modern-bert",
    "gemma-embedding",
    "dream",
    "llada",
    "llada-moe",
    "rnd1",
    "clef",
];

/// Architectures that `cargo xtask estimates` compares with the real engine.
const COMPARED: &[&str] = &[
    "deci",
    "deepseek2",
    "falcon-h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "granitehybrid",
    "jamba",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "nemotron_h",
    "openelm",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "qwen3next",
    "rwkv7",
];

/// The context as the engine lays it out.
///
/// Source: the constructor of `llama_context`: the total is padded to 256; with caches of their own each sequence gets
/// its part, padded to 256 again, and the total follows from that. A unified cache is one stream of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextLayout {
    /// Cells a sequence's cache has.
    pub cells: u64,
    /// Caches side by side.
    pub streams: u64,
    /// Tokens computed at once.
    pub tokens: u64,
    /// Tokens computed at once as set, which sizes the caches of windows.
    pub ubatch: u64,
    /// Sequences.
    pub slots: u64,
}

impl ContextLayout {
    pub(super) fn new(profile: &ModelProfile, s: &LlamaCppSettings) -> Self {
        let slots = u64::from(s.slots.max(1));
        let wanted = if s.context == 0 { profile.context_length } else { s.context };
        let padded = pad(wanted.max(1), 256);
        let (cells, streams) = if s.kv_unified { (padded, 1) } else { (pad((padded / slots).max(1), 256), slots) };
        let batch = u64::from(s.batch.max(1)).min(wanted.max(1));
        let ubatch = if s.ubatch == 0 { batch } else { batch.min(u64::from(s.ubatch)) };
        let tokens = pad(ubatch.min(cells.saturating_mul(streams)), slots);
        Self { cells, streams, tokens, ubatch, slots }
    }

    /// Cells of a layer's cache in one stream.
    ///
    /// Source: `llama_kv_cache_iswa`: a window's cache holds the window (of every sequence, where they share one
    /// stream) and a batch, padded to 256, and never more than the whole.
    #[must_use]
    pub fn cells_of(&self, window: Option<u64>, s: &LlamaCppSettings) -> u64 {
        match window {
            Some(window) if !s.swa_full => {
                let sequences = if s.kv_unified { self.slots } else { 1 };
                pad(self.cells.min(window.saturating_mul(sequences).saturating_add(self.ubatch)), 256)
            }
            _ => self.cells,
        }
    }

    /// Tokens of the whole context, over all slots.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.cells.saturating_mul(self.streams)
    }
}

fn pad(n: u64, to: u64) -> u64 {
    n.div_ceil(to.max(1)).saturating_mul(to.max(1))
}

/// What is derived once and used for every layer.
pub(super) struct Plan<'a> {
    pub(super) profile: &'a ModelProfile,
    pub(super) settings: &'a LlamaCppSettings,
    pub(super) context: ContextLayout,
    /// Whether attention runs fused.
    pub(super) flash: bool,
    has_cache: bool,
    /// Widest value of all layers: without flash attention every layer's V is padded to it.
    widest_value: u64,
    /// No layer keeps a state: then one cache has an entry for every layer, even for one without heads.
    attention_only: bool,
}

impl<'a> Plan<'a> {
    pub(super) fn new(profile: &'a ModelProfile, settings: &'a LlamaCppSettings) -> Result<Self, EstimateError> {
        let architecture = profile.architecture.as_str();
        if NOT_ESTIMATED.contains(&architecture) {
            return Err(EstimateError::Architecture(architecture.to_owned()));
        }
        if profile.layers.is_empty() {
            return Err(EstimateError::Shape("how many layers it has"));
        }
        if profile.embedding_length == 0 {
            return Err(EstimateError::Shape("how wide its hidden state is"));
        }
        if settings.context == 0 && profile.context_length == 0 {
            return Err(EstimateError::Shape("for which context it was trained, and none is set"));
        }
        // The engine turns it off for this architecture, whatever is asked for (`llama_init_from_model`).
        let flash = settings.flash_attention.runs() && architecture != "grok";
        check(profile, settings, flash)?;
        let has_cache = !WITHOUT_CACHE.contains(&architecture);
        let widest_value = profile.layers.iter().map(value_width).max().unwrap_or(0);
        let attention_only = profile.layers.iter().all(|l| l.recurrent_bytes == 0);
        let context = ContextLayout::new(profile, settings);
        Ok(Self { profile, settings, context, flash, has_cache, widest_value, attention_only })
    }

    /// Bytes of one layer's keys and values, and of its recurrent state.
    ///
    /// Source: `llama_kv_cache`: cells × streams of a key row and a value row; with MLA only the key; without flash
    /// attention a value row is as wide as the widest of all layers, also in a layer without heads.
    /// `llama_memory_recurrent`: one state a sequence.
    pub(super) fn kv(&self, layer: &LayerProfile) -> u64 {
        let recurrent = layer.recurrent_bytes.saturating_mul(self.context.slots);
        if !self.has_cache {
            return recurrent;
        }
        let flash = self.flash;
        // What shares another layer's keys has heads of its own; what the engine does not read has no bytes.
        let padding = !flash && self.attention_only && layer.heads == 0 && layer.bytes > 0;
        let (key, value, window) = match layer.kv {
            Some(shape) => (width(shape.heads_kv, shape.key_length), value_width(layer), shape.window),
            None if padding => (0, self.widest_value, None),
            None => return recurrent,
        };
        let value = if flash || value == 0 { value } else { self.widest_value };
        let row = self.settings.kv_type_k.bytes(key).saturating_add(self.settings.kv_type_v.bytes(value));
        let cells = self.context.cells_of(window, self.settings).saturating_mul(self.context.streams);
        cells.saturating_mul(row).saturating_add(recurrent)
    }

    /// The first layer on a device; the output counts as the one after the last.
    ///
    /// Source: `llama_model_base::load_tensors`: layers from `n_layer + 1 − n_gpu_layers` on.
    fn first_on_device(&self) -> usize {
        let all = self.profile.layers.len().saturating_add(1);
        let wanted = self.settings.gpu_layers.map_or(all, |n| usize::try_from(n).unwrap_or(usize::MAX));
        all.saturating_sub(wanted)
    }
}

/// Settings that the engine refuses for this model (`llama_init_from_model`).
fn check(profile: &ModelProfile, settings: &LlamaCppSettings, flash: bool) -> Result<(), EstimateError> {
    let (k, v) = (settings.kv_type_k, settings.kv_type_v);
    if settings.slots == 0 {
        return Err(EstimateError::Setting("an engine needs at least one slot"));
    }
    if settings.slots > MAX_SLOTS {
        return Err(EstimateError::Setting("an engine has at most 256 slots"));
    }
    if v.is_quantized() && !flash {
        return Err(EstimateError::Setting("a quantised V cache needs flash attention"));
    }
    let mut caches = profile.layers.iter().filter_map(|l| l.kv);
    if k != v && caches.clone().any(|kv| kv.value_length == 0) {
        return Err(EstimateError::Setting("a model with MLA needs the same type for K and V"));
    }
    let odd = |kind: KvType, length: u32| flash && kind.is_quantized() && !length.is_multiple_of(32);
    if caches.any(|kv| odd(k, kv.key_length) || odd(v, kv.value_length)) {
        return Err(EstimateError::Setting("a quantised KV cache needs heads of a multiple of 32 numbers"));
    }
    Ok(())
}

fn value_width(layer: &LayerProfile) -> u64 {
    layer.kv.map_or(0, |s| width(s.heads_kv, s.value_length))
}

fn width(heads: u32, length: u32) -> u64 {
    u64::from(heads).saturating_mul(u64::from(length))
}

/// The layout of the context that these settings give.
///
/// # Errors
/// When the model or the settings cannot be estimated.
pub fn context_layout(profile: &ModelProfile, settings: &LlamaCppSettings) -> Result<ContextLayout, EstimateError> {
    Plan::new(profile, settings).map(|p| p.context)
}

/// For each layer the bytes that go with it to its device: weights, keys and values, recurrent state.
///
/// # Errors
/// When the model or the settings cannot be estimated.
pub fn layer_loads(profile: &ModelProfile, settings: &LlamaCppSettings) -> Result<Vec<u64>, EstimateError> {
    let plan = Plan::new(profile, settings)?;
    let kv = |layer| if settings.kv_offload { plan.kv(layer) } else { layer.recurrent_bytes };
    Ok(profile.layers.iter().map(|layer| layer.bytes.saturating_add(kv(layer))).collect())
}

/// Bytes that go with the output to its device: norm, matrix, and the copy of a tied embedding.
///
/// Source: `llama_model_base::load_tensors`: the input embedding stays with the host; a tied output is a second copy of
/// it on the output's device.
#[must_use]
pub fn output_load(profile: &ModelProfile) -> u64 {
    let copy = if profile.tied_embeddings { profile.embedding_bytes } else { 0 };
    profile.output_bytes.saturating_add(copy)
}

/// Estimates what the engine takes on each of `devices` devices. `layers` says on which device each layer lies,
/// `output` where the output does; entries of layers that the settings leave to the host do not count.
///
/// # Errors
/// When the model, the settings or the assignment cannot be estimated.
pub fn estimate(
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    layers: &[usize],
    output: usize,
    overheads: Overheads,
) -> Result<MemoryEstimate, EstimateError> {
    let plan = Plan::new(profile, settings)?;
    if layers.len() != profile.layers.len() {
        return Err(EstimateError::Assignment { layers: layers.len(), expected: profile.layers.len() });
    }
    let count = layers.iter().copied().chain([output]).max().unwrap_or(0).saturating_add(1);
    if count > 1024 {
        return Err(EstimateError::Setting("no engine uses more than 1024 devices"));
    }
    let first = plan.first_on_device();
    let mut devices = vec![DeviceEstimate::default(); count];
    let mut host = DeviceEstimate {
        weights: profile.input_bytes.saturating_add(profile.other_bytes),
        ..DeviceEstimate::default()
    };
    for (il, (layer, device)) in profile.layers.iter().zip(layers).enumerate() {
        let kv = plan.kv(layer);
        let place = if il < first { &mut host } else { devices.get_mut(*device).unwrap_or(&mut host) };
        place.weights = place.weights.saturating_add(layer.bytes);
        let place = if settings.kv_offload { place } else { &mut host };
        place.kv = place.kv.saturating_add(kv);
    }
    if first > profile.layers.len() {
        host.weights = host.weights.saturating_add(profile.output_bytes);
    } else if let Some(place) = devices.get_mut(output) {
        place.weights = place.weights.saturating_add(output_load(profile));
    }
    compute::add(&plan, first, layers, output, &mut devices, &mut host);
    devices.iter_mut().for_each(|d| overheads.add_to(d));
    Ok(MemoryEstimate { devices, host, compared: COMPARED.contains(&profile.architecture.as_str()) })
}

/// As [`estimate`], with everything on one device.
///
/// # Errors
/// When the model or the settings cannot be estimated.
pub fn estimate_single(
    profile: &ModelProfile,
    settings: &LlamaCppSettings,
    overheads: Overheads,
) -> Result<MemoryEstimate, EstimateError> {
    estimate(profile, settings, &vec![0; profile.layers.len()], 0, overheads)
}
