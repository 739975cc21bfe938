//! llama.cpp's compute buffers.

use super::llama_cpp::{Outputs, Plan};
use super::{DeviceEstimate, KvType};
use crate::model::LayerProfile;

/// Adds the compute buffers to devices and host.
pub(super) fn add(
    plan: &Plan<'_>,
    first: usize,
    layers: &[usize],
    output: usize,
    devices: &mut [DeviceEstimate],
    host: &mut DeviceEstimate,
) {
    let mut peaks = vec![0u64; devices.len()];
    let mut host_peak = 0u64;
    for (il, (layer, device)) in plan.profile.layers.iter().zip(layers).enumerate() {
        let peak = layer_peak(plan, layer);
        match peaks.get_mut(*device).filter(|_| il >= first) {
            Some(slot) => *slot = (*slot).max(peak),
            None => host_peak = host_peak.max(peak),
        }
    }
    if first > layers.len() {
        host_peak = host_peak.max(output_peak(plan));
    } else if let Some(slot) = peaks.get_mut(output) {
        *slot = (*slot).max(output_peak(plan));
    }
    for (device, peak) in devices.iter_mut().zip(peaks) {
        if device.weights > 0 || device.kv > 0 {
            device.compute = peak.saturating_add(inputs(plan));
        }
    }
    host.compute = host_peak.saturating_add(inputs(plan));
}

/// Bytes of the inputs: the masks and the embedded tokens.
fn inputs(plan: &Plan<'_>) -> u64 {
    let (c, s) = (&plan.context, plan.settings);
    let cell = if s.flash_attention.runs() { 2 } else { 4 };
    let mut windows: Vec<Option<u64>> = plan.profile.layers.iter().filter_map(|l| l.kv).map(|k| k.window).collect();
    windows.sort_unstable();
    windows.dedup();
    let per_stream = c.tokens / c.streams.max(1);
    let masks = windows.into_iter().fold(0u64, |sum, window| {
        let cells = c.cells_of(window, s).saturating_mul(c.streams);
        sum.saturating_add(cells.saturating_mul(per_stream).saturating_mul(cell))
    });
    masks.saturating_add(f32s(plan.profile.embedding_length, c.tokens))
}

/// Bytes of `rows` rows of `width` numbers in f32.
fn f32s(width: u64, rows: u64) -> u64 {
    KvType::F32.bytes(width.saturating_mul(rows))
}

/// Bytes that one layer's intermediate results take at their most.
fn layer_peak(plan: &Plan<'_>, layer: &LayerProfile) -> u64 {
    let (c, p) = (&plan.context, plan.profile);
    let experts = u64::from(if p.experts > 0 { p.experts_used.max(1) } else { 1 });
    let feed_forward = f32s(layer.feed_forward_length.saturating_mul(experts).saturating_mul(2), c.tokens);
    let hidden = f32s(p.embedding_length.saturating_mul(2), c.tokens);
    let scores = match layer.kv {
        Some(shape) if !plan.settings.flash_attention.runs() => {
            f32s(c.cells_of(shape.window, plan.settings).saturating_mul(u64::from(layer.heads)), c.tokens)
        }
        _ => 0,
    };
    feed_forward.max(scores).saturating_add(hidden)
}

/// Bytes of the logits and what they are made from.
fn output_peak(plan: &Plan<'_>) -> u64 {
    let rows = match plan.settings.outputs {
        Outputs::Slots => plan.context.slots.min(plan.context.tokens),
        Outputs::Batch => plan.context.tokens,
    };
    f32s(plan.profile.vocabulary.saturating_add(plan.profile.embedding_length), rows)
}
