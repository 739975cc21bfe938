//! The best contiguous partition of layers over devices of unequal size, exactly.

use std::cmp::Ordering;

/// What a device carries relative to what it has. Compared exactly, as fractions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    carried: u64,
    of: u64,
}

impl Load {
    const NOTHING: Self = Self { carried: 0, of: 1 };

    pub(super) fn new(carried: u64, of: u64) -> Self {
        if carried == 0 { Self::NOTHING } else { Self { carried, of } }
    }

    pub(super) fn cmp(self, other: Self) -> Ordering {
        // Nothing carried is 0/1, so that of two zero denominators both are infinite, and alike.
        let cross = |a: Self, b: Self| u128::from(a.carried) * u128::from(b.of);
        cross(self, other).cmp(&cross(other, self))
    }

    fn max(self, other: Self) -> Self {
        if self.cmp(other) == Ordering::Less { other } else { self }
    }

    /// The most a device of `usable` bytes may carry without its load being above this one.
    fn carries(self, usable: u64) -> u64 {
        let most = (u128::from(self.carried) * u128::from(usable)).checked_div(u128::from(self.of));
        most.and_then(|m| u64::try_from(m).ok()).unwrap_or(u64::MAX)
    }
}

/// One bin: what it holds in all, and what it loses as soon as it holds anything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bin {
    pub(super) usable: u64,
    pub(super) fixed: u64,
}

impl Bin {
    fn load(self, prefix: &[u64], from: usize, to: usize) -> Load {
        if from == to {
            return Load::NOTHING;
        }
        Load::new(self.fixed.saturating_add(prefix[to] - prefix[from]), self.usable)
    }
}

/// Where each bin ends (exclusive index into the items, the last is their number), such that the worst load is as low
/// as it can be, and among those partitions the loads are as even as can be. `prefix` has the sums of the items,
/// starting with 0; a bin may stay empty.
pub(super) fn partition(prefix: &[u64], bins: &[Bin]) -> Vec<usize> {
    even(prefix, bins, lowest_worst(prefix, bins))
}

/// The lowest possible worst load. With `best[k]` that of the first `k` items on the bins so far, the next bin's is
/// the minimum over `j ≤ k` of max(best[j], load of the items j..k). The first grows with j and the second falls, and
/// where they cross only moves up with k, so one pass over k with one moving j suffices.
fn lowest_worst(prefix: &[u64], bins: &[Bin]) -> Load {
    let items = prefix.len() - 1;
    let mut best: Vec<Load> = (0..=items).map(|k| bins[0].load(prefix, 0, k)).collect();
    for bin in &bins[1..] {
        let mut j = 0;
        let mut next = Vec::with_capacity(items + 1);
        for k in 0..=items {
            let worst = |j: usize| best[j].max(bin.load(prefix, j, k));
            let mut here = worst(j);
            while j < k {
                let after = worst(j + 1);
                if after.cmp(here) == Ordering::Greater {
                    break;
                }
                (j, here) = (j + 1, after);
            }
            next.push(here);
        }
        best = next;
    }
    best[items]
}

/// The most even partition with no load above `worst`: the least sum of squares of the loads. Only ends that leave the
/// other bins able to take the rest are looked at; where `worst` is tight these are few.
fn even(prefix: &[u64], bins: &[Bin], worst: Load) -> Vec<usize> {
    let (items, last) = (prefix.len() - 1, bins.len() - 1);
    // The most each bin takes of items; `None`: it must stay empty.
    let room: Vec<Option<u64>> = bins.iter().map(|b| worst.carries(b.usable).checked_sub(b.fixed)).collect();
    // Filled from the left as far as can be, bin i ends at highest[i].
    let mut highest = vec![items; bins.len()];
    let mut at = 0;
    for (end, most) in highest.iter_mut().zip(&room) {
        if let Some(most) = most {
            at += prefix[at..].partition_point(|p| p - prefix[at] <= *most) - 1;
        }
        *end = at;
    }
    // Filled from the right as far as can be, bin i + 1 begins at lowest[i], which is where bin i ends.
    let begin = |bin: usize, end: usize| match room[bin] {
        Some(most) => prefix[..=end].partition_point(|p| prefix[end] - p > most),
        None => end,
    };
    let mut lowest = vec![items; bins.len()];
    for bin in (1..bins.len()).rev() {
        lowest[bin - 1] = begin(bin, lowest[bin]);
    }
    // least[k]: the best sum with the first k items on the bins so far; came_from[bin][k]: where that bin begins then.
    let mut least = vec![f64::INFINITY; items + 1];
    least[0] = 0.0;
    let mut came_from = vec![vec![0; items + 1]; bins.len()];
    for (bin, came_from) in came_from.iter_mut().enumerate() {
        let before = if bin == 0 { 0..=0 } else { lowest[bin - 1]..=highest[bin - 1] };
        let mut next = vec![f64::INFINITY; items + 1];
        for end in lowest[bin]..=highest[bin] {
            let starts = begin(bin, end).max(*before.start())..=end.min(*before.end());
            for start in starts {
                let sum = least[start] + square(bins[bin].load(prefix, start, end));
                if sum < next[end] {
                    (next[end], came_from[end]) = (sum, start);
                }
            }
        }
        least = next;
    }
    let mut ends = vec![items; bins.len()];
    for bin in (0..last).rev() {
        ends[bin] = came_from[bin + 1][ends[bin + 1]];
    }
    ends
}

/// Of an infinite load (something on a device without memory) all are equally bad.
#[allow(clippy::cast_precision_loss, reason = "only ranks partitions that are all as good in the worst load")]
fn square(load: Load) -> f64 {
    let ratio = load.carried as f64 / load.of.max(1) as f64;
    ratio * ratio
}
