//! Ratios as a person writes them and as llama.cpp reads them.

use std::fmt;

use super::{MAX_DEVICES, MAX_LAYERS, SplitError};

/// Above this the sum of the entries would no longer be finite in the engine's arithmetic.
const LARGEST: f32 = 1e30;

/// Ratios of a split, one for each device of a mask, in its order. At least one is above 0.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitRatios(Vec<f32>);

impl SplitRatios {
    /// Reads ratios such as `3,1` for a mask of so many devices. As in llama.cpp, `/` separates too and devices
    /// without an entry get nothing; unlike there, nothing that is no plain number is let through.
    ///
    /// # Errors
    /// Names the first wrong entry.
    pub fn parse(text: &str, devices: usize) -> Result<Self, SplitError> {
        if text.trim().is_empty() {
            return Err(SplitError::Empty);
        }
        let mut ratios = Vec::new();
        for (i, raw) in text.split([',', '/']).map(str::trim).enumerate() {
            let (place, entry) = (i + 1, || raw.chars().take(40).collect::<String>());
            if i >= devices {
                return Err(SplitError::TooMany { place, entry: entry(), devices });
            }
            let ratio: f32 = raw.parse().map_err(|_| SplitError::Malformed { place, entry: entry() })?;
            let spelt_as_zero = !raw.bytes().take_while(|b| !b.eq_ignore_ascii_case(&b'e')).any(|b| b > b'0');
            if !ratio.is_finite() || ratio > LARGEST {
                return Err(SplitError::NotFinite { place, entry: entry() });
            } else if ratio < 0.0 {
                return Err(SplitError::Negative { place, entry: entry() });
            } else if ratio < f32::MIN_POSITIVE && !spelt_as_zero {
                // std::stof throws where the number underflows
                return Err(SplitError::TooSmall { place, entry: entry() });
            }
            ratios.push(ratio + 0.0); // makes -0 a plain 0
        }
        if devices > MAX_DEVICES {
            return Err(SplitError::TooManyDevices { devices });
        }
        ratios.resize(devices, 0.0);
        if ratios.iter().all(|r| *r == 0.0) {
            return Err(SplitError::AllZero);
        }
        Ok(Self(ratios))
    }

    /// The ratios.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }
}

impl fmt::Display for SplitRatios {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(&self.0))
    }
}

/// The value for `--tensor-split`. Rust prints the shortest decimal that reads back as the same f32 and never uses an
/// exponent, so `std::stof` gets exactly the number that was verified (llama-server sets the numeric locale to "C").
pub(super) fn text(ratios: &[f32]) -> String {
    ratios.iter().map(f32::to_string).collect::<Vec<_>>().join(",")
}

/// Which part stays on the CPU when not everything is offloaded. With `-ngl` above the number of layers, which is what
/// we pass, both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// The first layers stay: llama.cpp today.
    OutputFirst,
    /// The output layer stays first: llama.cpp as of February 2025.
    LayersFirst,
}

/// [`assign_as`] for llama.cpp as it is today.
///
/// # Errors
/// As there.
pub fn assign(ratios: &[f32], layers: usize, gpu_layers: usize) -> Result<Vec<Option<usize>>, SplitError> {
    assign_as(Offload::OutputFirst, ratios, layers, gpu_layers)
}

/// Where llama.cpp puts each layer: `layers` repeating ones, then the output layer, so `layers + 1` entries; `None` is
/// the CPU.
///
/// This is the rule of `llama_model::load_tensors` in llama.cpp, in its own f32 arithmetic: with `cum[i]` the sum of
/// the ratios up to `i` divided by the sum of all, `n = min(gpu_layers, layers + 1)` and the `n` layers from `first`
/// on offloaded, layer `il` of them goes to the first device whose `cum > (il − first) / n`.
///
/// # Errors
/// For what makes that rule fail or mean something else: no ratio, all zero, negative, NaN or infinite ones, and more
/// layers than llama.cpp takes.
pub fn assign_as(
    offload: Offload,
    ratios: &[f32],
    layers: usize,
    gpu_layers: usize,
) -> Result<Vec<Option<usize>>, SplitError> {
    if ratios.is_empty() {
        return Err(SplitError::Empty);
    }
    if ratios.len() > MAX_DEVICES {
        return Err(SplitError::TooManyDevices { devices: ratios.len() });
    }
    if layers > MAX_LAYERS {
        return Err(SplitError::Layers { layers });
    }
    let mut cum = [0f32; MAX_DEVICES];
    let cum = &mut cum[..ratios.len()];
    let mut sum = 0f32;
    for (i, (at, ratio)) in cum.iter_mut().zip(ratios).enumerate() {
        if !ratio.is_finite() {
            return Err(SplitError::NotFinite { place: i + 1, entry: ratio.to_string() });
        }
        if *ratio < 0.0 {
            return Err(SplitError::Negative { place: i + 1, entry: ratio.to_string() });
        }
        sum += ratio;
        if !sum.is_finite() {
            return Err(SplitError::NotFinite { place: i + 1, entry: ratio.to_string() });
        }
        *at = sum;
    }
    if sum == 0.0 {
        return Err(SplitError::AllZero);
    }
    cum.iter_mut().for_each(|at| *at /= sum);
    let on_gpu = gpu_layers.min(layers + 1);
    let first = match offload {
        Offload::OutputFirst => layers + 1 - on_gpu,
        Offload::LayersFirst => layers - on_gpu.min(layers),
    };
    let place = |il: usize| {
        let at = il.checked_sub(first).filter(|at| *at < on_gpu)?;
        let at = small(at) / small(on_gpu);
        Some(cum.partition_point(|c| *c <= at))
    };
    Ok((0..=layers).map(place).collect())
}

/// Layer counts are below 2^24, which f32 holds exactly.
#[allow(clippy::cast_precision_loss, reason = "at most MAX_LAYERS + 1")]
fn small(count: usize) -> f32 {
    count as f32
}
