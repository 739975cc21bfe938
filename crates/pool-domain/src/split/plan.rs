//! Whole layers over devices of any size.

use std::ops::Range;

use super::balance::{Bin, partition};
use super::ratios::{self, SplitRatios, assign};
use super::{MAX_DEVICES, MAX_LAYERS, Miss, SplitError, SplitShortfall};

/// What one device offers to a split. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitDevice {
    /// Its UUID.
    pub uuid: String,
    /// What is ours to use: after reserves, promises and foreign use (see [`crate::reserve::available`]) and margin.
    pub usable: u64,
    /// What the engine takes there whatever the split: compute buffer and runtime context.
    pub fixed: u64,
}

/// What to split over which devices. Sizes are bytes.
#[derive(Debug, Clone, Copy)]
pub struct SplitInput<'a> {
    /// One load for each repeating layer: its weights and its KV cache, which llama.cpp keeps on the same device.
    pub layers: &'a [u64],
    /// How much of each layer's load is KV cache; empty if that is not known.
    pub kv: &'a [u64],
    /// The output layer.
    pub output: u64,
    /// The devices in the mask's order, which is the order of the layers.
    pub devices: &'a [SplitDevice],
}

/// The share of one device. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceShare {
    /// The device.
    pub uuid: String,
    /// Its repeating layers; empty if it has none.
    pub layers: Range<usize>,
    /// Whether it has the output layer.
    pub output: bool,
    /// Its layers, KV cache and the output layer if it has that.
    pub load: u64,
    /// KV cache within `load`.
    pub kv: u64,
    /// Taken there whatever the split.
    pub fixed: u64,
    /// What it offers.
    pub usable: u64,
}

impl DeviceShare {
    /// All that the engine takes there. A device without layers still gets the runtime's context.
    #[must_use]
    pub fn needed(&self) -> u64 {
        self.fixed.saturating_add(self.load)
    }

    /// What stays free, or how much is missing.
    ///
    /// # Errors
    /// With the bytes that are missing.
    pub fn free_after(&self) -> Result<u64, u64> {
        self.usable.checked_sub(self.needed()).ok_or_else(|| self.needed() - self.usable)
    }
}

/// How large the KV cache can grow. The context is one for all devices, so the device whose room is used up first
/// (mostly the smallest) caps what every other may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvCap {
    /// The device that caps, as its place in the mask.
    pub device: usize,
    /// Most KV cache on each device, in bytes: its own KV cache, scaled by the capping device's room over its own.
    pub most: Vec<u64>,
}

/// Which layers go where, and the ratios that make llama.cpp do so with all layers on devices.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitPlan {
    shares: Vec<DeviceShare>,
    ratios: Vec<f32>,
    /// As the engine gets them: scaled, they might move a layer that lies on a threshold.
    given: Vec<f32>,
    layers: usize,
}

impl SplitPlan {
    /// The split with the lowest possible load of the worst device, relative to what it offers, among those that keep
    /// layers whole, in the devices' order, and the output layer with the last layer; of several such splits the most
    /// even one. A device may get none. That the ratios have the engine do the same is verified here. Whether it fits
    /// is for [`SplitPlan::validate`] to say.
    ///
    /// # Errors
    /// When there is nothing to split or too much to count.
    pub fn compute(input: &SplitInput<'_>) -> Result<Self, SplitError> {
        check(input)?;
        let n = input.layers.len();
        let mut prefix = Vec::with_capacity(n + 1);
        let mut sum = 0;
        prefix.push(sum);
        for load in input.layers {
            sum += load; // checked above
            prefix.push(sum);
        }
        prefix[n] += input.output;
        let bins: Vec<Bin> = input.devices.iter().map(|d| Bin { usable: d.usable, fixed: d.fixed }).collect();
        let ends = partition(&prefix, &bins);
        let plan = Self::of_ratios(input, &ratios_for(&ends, n))?;
        let same =
            plan.shares.iter().zip(&ends).all(|(share, end)| share.layers.is_empty() || share.layers.end == *end);
        let together = plan.shares.iter().any(|s| s.output && s.layers.end == n && !s.layers.is_empty());
        // Read back from the text, as the engine does.
        let read = SplitRatios::parse(&plan.tensor_split(), input.devices.len())?;
        if same && together && read.as_slice() == plan.given {
            return Ok(plan);
        }
        Err(SplitError::NotExpressible)
    }

    /// What llama.cpp does with ratios that a user gave.
    ///
    /// # Errors
    /// When there is nothing to split or too much to count.
    pub fn from_ratios(input: &SplitInput<'_>, ratios: &SplitRatios) -> Result<Self, SplitError> {
        check(input)?;
        if ratios.as_slice().len() != input.devices.len() {
            return Err(SplitError::Loads("the split has not as many entries as the mask has devices"));
        }
        Self::of_ratios(input, ratios.as_slice())
    }

    fn of_ratios(input: &SplitInput<'_>, ratios: &[f32]) -> Result<Self, SplitError> {
        let n = input.layers.len();
        let places = assign(ratios, n, n + 1)?;
        let share = |(at, device): (usize, &SplitDevice)| {
            // Places never fall, so the layers of a device are a range.
            let start = places[..n].partition_point(|p| *p < Some(at));
            let end = places[..n].partition_point(|p| *p <= Some(at));
            let output = places[n] == Some(at);
            let sum = |loads: &[u64]| loads.get(start..end).unwrap_or_default().iter().sum::<u64>();
            DeviceShare {
                uuid: device.uuid.clone(),
                layers: start..end,
                output,
                load: sum(input.layers) + if output { input.output } else { 0 },
                kv: sum(input.kv),
                fixed: device.fixed,
                usable: device.usable,
            }
        };
        let shares = input.devices.iter().enumerate().map(share).collect();
        let sum: f64 = ratios.iter().copied().map(f64::from).sum();
        let normal = |r: &f32| narrow(f64::from(*r) / sum);
        Ok(Self { shares, ratios: ratios.iter().map(normal).collect(), given: ratios.to_vec(), layers: n })
    }

    /// The share of each device, in the mask's order.
    #[must_use]
    pub fn shares(&self) -> &[DeviceShare] {
        &self.shares
    }

    /// One ratio for each device; they sum to 1.
    #[must_use]
    pub fn ratios(&self) -> &[f32] {
        &self.ratios
    }

    /// The value of llama.cpp's `--tensor-split`.
    #[must_use]
    pub fn tensor_split(&self) -> String {
        ratios::text(&self.given)
    }

    /// The value of llama.cpp's `-ngl` with which the plan holds: every layer and the output layer.
    #[must_use]
    pub fn gpu_layers(&self) -> usize {
        self.layers + 1
    }

    /// Proves that every device holds its share, and so that its KV cache is within what the device that fills up first
    /// leaves to all ([`SplitPlan::kv_cap`]).
    ///
    /// # Errors
    /// With the bytes that are missing, by device.
    pub fn validate(&self) -> Result<(), SplitShortfall> {
        let too_small = |(device, s): (usize, &DeviceShare)| {
            (s.needed() > s.usable).then(|| Miss { device, uuid: s.uuid.clone(), needed: s.needed(), usable: s.usable })
        };
        let misses: Vec<Miss> = self.shares.iter().enumerate().filter_map(too_small).collect();
        if misses.is_empty() {
            Ok(())
        } else {
            Err(SplitShortfall { misses, capped_by: self.kv_cap().map(|c| c.device) })
        }
    }

    /// How large the KV cache can grow on each device; `None` if no device keeps any, or nobody said which part it is.
    #[must_use]
    pub fn kv_cap(&self) -> Option<KvCap> {
        let room = |s: &DeviceShare| s.usable.saturating_sub(s.needed() - s.kv);
        // The least room relative to what is there: compared as fractions.
        let cross = |a: &DeviceShare, b: &DeviceShare| u128::from(room(a)) * u128::from(b.kv);
        let keeping = self.shares.iter().enumerate().filter(|(_, s)| s.kv > 0);
        let (device, tightest) = keeping.min_by(|(_, a), (_, b)| cross(a, b).cmp(&cross(b, a)))?;
        let scaled = |s: &DeviceShare| {
            u64::try_from(u128::from(s.kv) * u128::from(room(tightest)) / u128::from(tightest.kv)).unwrap_or(u64::MAX)
        };
        Some(KvCap { device, most: self.shares.iter().map(scaled).collect() })
    }
}

fn check(input: &SplitInput<'_>) -> Result<(), SplitError> {
    let (layers, devices) = (input.layers.len(), input.devices.len());
    if devices == 0 {
        return Err(SplitError::Empty);
    }
    if devices > MAX_DEVICES {
        return Err(SplitError::TooManyDevices { devices });
    }
    if layers == 0 || layers > MAX_LAYERS {
        return Err(SplitError::Layers { layers });
    }
    if !input.kv.is_empty() && (input.kv.len() != layers || input.kv.iter().zip(input.layers).any(|(kv, l)| kv > l)) {
        return Err(SplitError::Loads("the KV cache is not given as a part of each layer"));
    }
    let sum = input.layers.iter().try_fold(input.output, |sum, load| sum.checked_add(*load));
    sum.map(|_| ()).ok_or(SplitError::Loads("the layers together are larger than can be counted"))
}

/// Ratios with every threshold in the middle between two layers, so that no rounding can move one. Where nothing is
/// before or after a threshold it is 0 or 1 exactly.
fn ratios_for(ends: &[usize], layers: usize) -> Vec<f32> {
    let count = |c: usize| f64::from(u32::try_from(c).unwrap_or(u32::MAX));
    let threshold = |end: usize| match end {
        0 => 0.0,
        end if end == layers => 1.0,
        end => (count(end) - 0.5) / count(layers + 1),
    };
    let mut before = 0.0;
    let ratio = |end: &usize| {
        let at = threshold(*end);
        narrow(at - std::mem::replace(&mut before, at))
    };
    ends.iter().map(ratio).collect()
}

#[allow(clippy::cast_possible_truncation, reason = "the engine's arithmetic is f32")]
fn narrow(ratio: f64) -> f32 {
    ratio as f32
}
