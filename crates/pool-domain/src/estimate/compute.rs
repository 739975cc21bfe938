//! llama.cpp's compute buffers: what intermediate results of a graph take at the moment when most of them are alive.
//!
//! The engine lays a graph's tensors out by when they are last used (`ggml-alloc.c`), so the buffer is as large as the
//! fullest moment. Which moment that is depends on the shape; the candidates here were read off the graphs
//! (`src/models`, `llama-graph.cpp`) and measured on the shapes of `docs/estimates.md`, each with its vocabulary and
//! with hardly any, which shows the layers alone.

use super::llama_cpp::{Outputs, Plan};
use super::{DeviceEstimate, KvType};
use crate::model::{KvShape, LayerProfile, ModelProfile};

/// Copies of the inputs that pipelining over several devices keeps (`GGML_SCHED_MAX_COPIES`).
const PIPELINE_COPIES: u64 = 4;
/// Hidden states alive while a layer computes, the embedded tokens among them.
const HIDDEN_ALIVE: u64 = 5;
/// Hidden states that a recurrent layer works on: projections, convolution, result (Mamba 10, Mamba-2 10.8 of twice the
/// width).
const STATE_SPACE: u64 = 11;
/// The same for RWKV, whose token shift mixes six states.
const TOKEN_SHIFT: u64 = 15;

/// Adds the compute buffers to devices and host.
///
/// Layers of a device share one buffer, the output's is that of its device. Inputs lie with the host and once more on
/// each device; over several devices they are pipelined, in four copies (`llama_context`: only when all layers are on
/// devices and keys and values too).
pub(super) fn add(
    plan: &Plan<'_>,
    first: usize,
    layers: &[usize],
    output: usize,
    devices: &mut [DeviceEstimate],
    host: &mut DeviceEstimate,
) {
    let graph = Graph::new(plan);
    let mut peaks: Vec<Option<Peak>> = vec![None; devices.len()];
    let mut host_peak = Peak { layers: graph.hidden(HIDDEN_ALIVE), output: 0 };
    for (il, (layer, device)) in plan.profile.layers.iter().zip(layers).enumerate() {
        let bytes = graph.layer(layer);
        let peak = match peaks.get_mut(*device) {
            Some(slot) if il >= first => slot.get_or_insert_default(),
            _ => &mut host_peak,
        };
        peak.layers = peak.layers.max(bytes);
    }
    let with_output = match peaks.get_mut(output) {
        Some(slot) if first <= layers.len() => slot.get_or_insert_default(),
        _ => &mut host_peak,
    };
    with_output.layers = with_output.layers.max(graph.hidden(HIDDEN_ALIVE));
    with_output.output = graph.logits();

    let used = peaks.iter().flatten().count();
    let copies = if used > 1 && first == 0 && plan.settings.kv_offload { PIPELINE_COPIES } else { 1 };
    for (device, peak) in devices.iter_mut().zip(peaks) {
        device.compute = peak.map_or(0, |peak| graph.buffer(peak, copies));
    }
    host.compute = graph.buffer(host_peak, 1);
}

/// The fullest moments of the part of a graph that one device computes.
#[derive(Debug, Clone, Copy, Default)]
struct Peak {
    /// Within a layer.
    layers: u64,
    /// Of the logits, beside the hidden states.
    output: u64,
}

/// What all parts of a graph have in common.
struct Graph<'a> {
    plan: &'a Plan<'a>,
    /// Bytes of the masks.
    masks: u64,
    /// Bytes of the places where transposed values are written.
    places: u64,
    /// Bytes and width of the layer with most bytes: in a model with experts, one that has them.
    largest_layer: (u64, u64),
}

impl<'a> Graph<'a> {
    fn new(plan: &'a Plan<'a>) -> Self {
        let caches = caches(plan.profile);
        let mask = |cache: &KvShape| mask(plan, cache.window);
        let tokens = plan.context.tokens;
        let widest = |window| {
            let of = |l: &LayerProfile| l.kv.filter(|k| k.window == window).map_or(0, width_of_values);
            plan.profile.layers.iter().map(of).max().unwrap_or(0)
        };
        // Without flash attention values are stored transposed, each number at a place of its own, told as an i64
        // (`llama_kv_cache::build_input_v_idxs`).
        let places = |cache: &KvShape| match plan.flash {
            true => 0,
            false => widest(cache.window).saturating_mul(tokens).saturating_mul(8),
        };
        let largest_layer = plan.profile.layers.iter().max_by_key(|l| l.bytes);
        Self {
            plan,
            masks: caches.iter().map(mask).fold(0, u64::saturating_add),
            places: caches.iter().map(places).fold(0, u64::saturating_add),
            largest_layer: largest_layer.map_or((0, 0), |l| (l.bytes, l.feed_forward_length)),
        }
    }

    /// Bytes of `n` hidden states of all tokens.
    fn hidden(&self, n: u64) -> u64 {
        self.rows(self.plan.profile.embedding_length).saturating_mul(n)
    }

    /// Bytes of `width` numbers for each token.
    fn rows(&self, width: u64) -> u64 {
        f32s(width, self.plan.context.tokens)
    }

    /// The buffer of a device. Where a mask is larger than the logits the engine puts them in its place, once it is free;
    /// they are counted all the same, so that a longer context never seems to need less.
    fn buffer(&self, peak: Peak, copies: u64) -> u64 {
        let inputs = self.masks.saturating_add(self.places);
        let repeated = inputs.saturating_add(self.hidden(1)).saturating_mul(copies - 1);
        let output = peak.output.saturating_add(self.hidden(HIDDEN_ALIVE));
        peak.layers.max(output).saturating_add(inputs).saturating_add(repeated)
    }

    /// Bytes of the logits (`llama_context::sched_reserve`: as many as results can be asked for in one batch).
    fn logits(&self) -> u64 {
        let context = &self.plan.context;
        let rows = match self.plan.settings.outputs {
            Outputs::Slots => context.slots.min(context.tokens),
            Outputs::Batch => context.tokens,
        };
        f32s(self.plan.profile.vocabulary, rows)
    }

    /// The fullest moment of one layer.
    fn layer(&self, layer: &LayerProfile) -> u64 {
        let rwkv = self.plan.profile.architecture.contains("rwkv");
        let state = match layer.recurrent_bytes {
            0 => 0,
            _ if rwkv => self.hidden(TOKEN_SHIFT),
            _ => self.hidden(STATE_SPACE),
        };
        self.hidden(HIDDEN_ALIVE).saturating_add(self.feed_forward(layer).max(self.attention(layer)).max(state))
    }

    /// Gate, input and product of both; with experts, the product of each one used, and what comes out of it, which goes
    /// where gate and input were if it fits (`llm_graph_context::build_ffn`, `build_moe_ffn`).
    fn feed_forward(&self, layer: &LayerProfile) -> u64 {
        let (width, profile) = (layer.feed_forward_length, self.plan.profile);
        if !self.has_experts(layer) {
            return self.rows(width).saturating_mul(3);
        }
        let used = u64::from(profile.experts_used.max(1));
        let inner = self.rows(width.saturating_mul(used));
        let outer = self.rows(profile.embedding_length.saturating_mul(used));
        let beside = if outer > inner.saturating_mul(2) { outer } else { 0 };
        inner.saturating_mul(3).saturating_add(beside)
    }

    /// Whether a layer has experts: models mix such layers with dense ones. One with experts has many times the bytes.
    fn has_experts(&self, layer: &LayerProfile) -> bool {
        let (bytes, width) = self.largest_layer;
        let product = |bytes: u64, width: u64| u128::from(bytes) * u128::from(width);
        let twice = product(layer.bytes, width).saturating_mul(2);
        self.plan.profile.experts > 0 && twice >= product(bytes, layer.feed_forward_length)
    }

    /// Queries and their result; the scores of all cells, unless attention is fused (`llm_graph_context::build_attn_mha`).
    fn attention(&self, layer: &LayerProfile) -> u64 {
        let Some(shape) = layer.kv else { return 0 };
        let context = &self.plan.context;
        let heads = u64::from(layer.heads);
        let queries = self.rows(heads.saturating_mul(u64::from(shape.key_length)));
        let mla = shape.value_length == 0;
        if self.plan.flash {
            // With MLA queries are also kept apart, compressed, and as results.
            return if mla { queries.saturating_mul(7) / 2 } else { queries };
        }
        let cells = context.cells_of(shape.window, self.plan.settings);
        let scores = self.rows(cells.saturating_mul(heads));
        // Keys serve as values there, and are turned for it.
        let turned =
            if mla { cells.saturating_mul(context.streams).saturating_mul(u64::from(shape.key_length)) } else { 0 };
        let queries = if queries > self.hidden(1) { queries.saturating_mul(2) } else { queries };
        scores.saturating_add(queries).saturating_add(turned.saturating_mul(2))
    }
}

/// One entry for each cache: layers with a window and layers without have one each.
fn caches(profile: &ModelProfile) -> Vec<KvShape> {
    let mut caches: Vec<KvShape> = Vec::new();
    for kv in profile.layers.iter().filter_map(|l| l.kv) {
        if caches.iter().all(|c| c.window != kv.window) {
            caches.push(kv);
        }
    }
    caches
}

/// Bytes of a cache's mask: for each token of a stream and each cell f16 with flash attention, f32 without
/// (`build_attn_inp_kq_mask`).
fn mask(plan: &Plan<'_>, window: Option<u64>) -> u64 {
    let context = &plan.context;
    let number = if plan.flash { 2 } else { 4 };
    context.cells_of(window, plan.settings).saturating_mul(context.tokens).saturating_mul(number)
}

fn width_of_values(kv: KvShape) -> u64 {
    u64::from(kv.heads_kv).saturating_mul(u64::from(kv.value_length))
}

/// Bytes of `rows` rows of `width` numbers in f32.
fn f32s(width: u64, rows: u64) -> u64 {
    KvType::F32.bytes(width.saturating_mul(rows))
}
