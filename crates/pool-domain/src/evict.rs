//! Which idle replicas give way so that a start fits.

use std::fmt;
use std::time::Duration;

use crate::device::DeviceSnapshot;
use crate::mask::{DeviceMask, ResolvedMask};
use crate::reserve::{self, Refusal};
use crate::{ReplicaKey, Tick};

/// A replica that holds a reservation, as far as eviction needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Which.
    pub key: ReplicaKey,
    /// Bytes promised to it, by UUID of the device.
    pub holds: Vec<(String, u64)>,
    /// Since when it is Ready; `None` if it is not.
    pub ready_since: Option<Tick>,
    /// End of its last lease, or when it became Ready.
    pub last_used: Tick,
    /// Leases held, and requests that wait for one.
    pub busy: u32,
    /// Its pool starts on demand. One that is preloaded stays.
    pub on_demand: bool,
    /// Its pool is pinned.
    pub pinned: bool,
    /// An operation or another plan has it in hand, or a person holds its pool.
    pub held: bool,
}

impl Resident {
    /// Bytes that have to be loaded again after an eviction, on all its devices.
    fn bytes(&self) -> u64 {
        self.holds.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn on(&self, uuid: &str) -> u64 {
        self.holds.iter().filter(|(u, _)| u == uuid).fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    fn kept(&self, policy: &EvictionPolicy, now: Tick) -> Option<WhyKept> {
        if self.pinned {
            return Some(WhyKept::Pinned);
        }
        if !self.on_demand {
            return Some(WhyKept::Preload);
        }
        if self.held {
            return Some(WhyKept::Held);
        }
        if self.busy > 0 {
            return Some(WhyKept::Busy);
        }
        let Some(since) = self.ready_since else { return Some(WhyKept::NotReady) };
        let until = since + policy.min_ready_time;
        (now < until).then_some(WhyKept::TooYoung { until })
    }
}

/// Why a replica does not give way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhyKept {
    /// Its pool is pinned.
    Pinned,
    /// It is preloaded, not started on demand.
    Preload,
    /// Something else has it in hand, or a person holds its pool.
    Held,
    /// It serves, or someone waits for it.
    Busy,
    /// It is not Ready, so it may just have been asked for, or is going anyway.
    NotReady,
    /// It became Ready a moment ago.
    TooYoung {
        /// From then on it may give way.
        until: Tick,
    },
    /// It holds nothing where something is missing, or not enough of it.
    NoHelp,
}

impl fmt::Display for WhyKept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "its pool is pinned",
            Self::Preload => "it is preloaded",
            Self::Held => "its pool is held or in the hand of an operation",
            Self::Busy => "it is busy",
            Self::NotReady => "it is not ready",
            Self::TooYoung { .. } => "it became ready only a moment ago",
            Self::NoHelp => "it would not free enough where memory is missing",
        })
    }
}

/// How eager eviction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvictionPolicy {
    /// A replica that became Ready less than this ago stays: two pools that take turns must not load all the time.
    pub min_ready_time: Duration,
}

impl Default for EvictionPolicy {
    fn default() -> Self {
        Self { min_ready_time: Duration::from_secs(60) }
    }
}

/// Who gives way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvictionPlan {
    /// The replicas to drain, least recently used first; none if the start fits as it is.
    pub evict: Vec<ReplicaKey>,
    /// Where the start fits then.
    pub devices: ResolvedMask,
    /// Bytes that are moved out.
    pub bytes: u64,
}

/// Why no eviction helps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoEviction {
    /// Memory is not what is missing.
    Refused(Refusal),
    /// What may give way is too little.
    TooLittle {
        /// What is missing, in words.
        detail: String,
        /// Every replica that holds memory, and why it stays.
        kept: Vec<(ReplicaKey, WhyKept)>,
        /// When a plan becomes possible if nothing but time changes.
        possible_at: Option<Tick>,
    },
}

/// What is to be started.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// On which devices.
    pub mask: &'a DeviceMask,
    /// Bytes on each, as for [`reserve::place_each`].
    pub bytes: &'a [u64],
}

/// The replicas that must give way for a start, and no more than these. Of all sets of replicas that may give way and
/// suffice, it is one whose most recently used member was used longest ago, and of these one with the fewest bytes;
/// with `auto`, over all devices. Each frees what it was promised: the accounting is that of [`reserve::available`],
/// with foreign use as it is now.
///
/// # Errors
/// Says who stays and why, and when it could be.
pub fn plan_eviction(
    start: Start<'_>,
    devices: &[DeviceSnapshot],
    promised: impl Fn(&str) -> u64,
    residents: &[Resident],
    policy: &EvictionPolicy,
    now: Tick,
) -> Result<EvictionPlan, NoEviction> {
    let detail = match reserve::place_each(start.mask, start.bytes, devices, &promised) {
        Ok(devices) => return Ok(EvictionPlan { evict: Vec::new(), devices, bytes: 0 }),
        Err(Refusal::Vram(detail)) => detail,
        Err(other) => return Err(NoEviction::Refused(other)),
    };
    let wanted = reserve::candidates(start.mask, start.bytes, devices).map_err(NoEviction::Refused)?;
    // With auto each device is a place of its own, else all of them together are one.
    let places: Vec<&[(&DeviceSnapshot, u64)]> =
        if *start.mask == DeviceMask::Auto { wanted.chunks(1).collect() } else { vec![&wanted] };
    let mut idle: Vec<&Resident> = residents.iter().filter(|r| r.kept(policy, now).is_none()).collect();
    idle.sort_by(|a, b| (a.last_used, &a.key).cmp(&(b.last_used, &b.key)));
    let best = places
        .iter()
        .filter_map(|place| {
            let victims = victims(&missing(place, &promised), &idle)?;
            let bytes = victims.iter().fold(0u64, |sum, r| sum.saturating_add(r.bytes()));
            Some((victims.iter().map(|r| r.last_used).max(), bytes, *place, victims))
        })
        .min_by(|a, b| (a.0, a.1, a.2[0].0.index).cmp(&(b.0, b.1, b.2[0].0.index)));
    match best {
        Some((_, bytes, place, victims)) => Ok(EvictionPlan {
            evict: victims.iter().map(|r| r.key.clone()).collect(),
            devices: ResolvedMask { uuids: place.iter().map(|(d, _)| d.uuid.clone()).collect() },
            bytes,
        }),
        None => {
            let kept = residents.iter().map(|r| (r.key.clone(), r.kept(policy, now).unwrap_or(WhyKept::NoHelp)));
            let possible = |at: &Tick| {
                let idle: Vec<&Resident> = residents.iter().filter(|r| r.kept(policy, *at).is_none()).collect();
                places.iter().any(|place| suffice(&missing(place, &promised), &idle))
            };
            let mut times: Vec<Tick> = residents.iter().filter_map(|r| until(r.kept(policy, now))).collect();
            times.sort_unstable();
            Err(NoEviction::TooLittle { detail, kept: kept.collect(), possible_at: times.into_iter().find(possible) })
        }
    }
}

fn until(kept: Option<WhyKept>) -> Option<Tick> {
    if let Some(WhyKept::TooYoung { until }) = kept { Some(until) } else { None }
}

/// Bytes missing, by device; only where some are.
type Missing<'a> = Vec<(&'a str, u64)>;

fn missing<'a>(place: &[(&'a DeviceSnapshot, u64)], promised: &impl Fn(&str) -> u64) -> Missing<'a> {
    let short = |(d, bytes): &(&'a DeviceSnapshot, u64)| {
        let short = i128::from(*bytes) - reserve::left(d, promised(&d.uuid));
        (*bytes > 0 && short > 0).then(|| (d.uuid.as_str(), u64::try_from(short).unwrap_or(u64::MAX)))
    };
    place.iter().filter_map(short).collect()
}

fn suffice(missing: &Missing<'_>, residents: &[&Resident]) -> bool {
    missing.iter().all(|(uuid, short)| residents.iter().fold(0u64, |sum, r| sum.saturating_add(r.on(uuid))) >= *short)
}

/// Those of the idle ones, least recently used first, that give way; `None` if all of them are too little.
fn victims<'a>(missing: &Missing<'_>, idle: &[&'a Resident]) -> Option<Vec<&'a Resident>> {
    let helps = |r: &&&'a Resident| missing.iter().any(|(uuid, _)| r.on(uuid) > 0);
    let helping: Vec<&Resident> = idle.iter().filter(helps).copied().collect();
    let count = (0..=helping.len()).find(|count| suffice(missing, &helping[..*count]))?;
    // and whoever was used no later than the last of these
    let as_old = |r: &&Resident| count > 0 && r.last_used <= helping[count - 1].last_used;
    let count = helping.iter().take_while(|r| as_old(r)).count();
    Some(Search::fewest_bytes(missing, &helping[..count]))
}

/// The search for the fewest bytes among at most a few dozen replicas: branch and bound, with a bound on its work.
struct Search<'a, 'm> {
    /// Those to choose from, the largest first, with what each frees by device that misses something.
    from: Vec<(&'a Resident, Vec<u64>)>,
    /// What `from[i..]` frees together, by such device.
    after: Vec<Vec<u64>>,
    best: Vec<usize>,
    best_bytes: u64,
    steps_left: u32,
    missing: &'m Missing<'m>,
}

impl<'a> Search<'a, '_> {
    /// Steps until it takes the best found so far, which is a few milliseconds.
    const STEPS: u32 = 50_000;

    fn fewest_bytes(missing: &Missing<'_>, enough: &[&'a Resident]) -> Vec<&'a Resident> {
        let gains = |r: &&'a Resident| (*r, missing.iter().map(|(uuid, _)| r.on(uuid)).collect::<Vec<_>>());
        let mut from: Vec<_> = enough.iter().map(gains).collect();
        from.sort_by(|(a, _), (b, _)| (b.bytes(), &a.key).cmp(&(a.bytes(), &b.key)));
        let mut after = vec![vec![0u64; missing.len()]; from.len() + 1];
        for i in (0..from.len()).rev() {
            after[i] = after[i + 1].iter().zip(&from[i].1).map(|(sum, gain)| sum.saturating_add(*gain)).collect();
        }
        let short = missing.iter().map(|(_, short)| *short).collect();
        let mut search =
            Search { from, after, best: Vec::new(), best_bytes: u64::MAX, steps_left: Self::STEPS, missing };
        search.best = search.without_idlers((0..search.from.len()).collect());
        search.best_bytes = search.bytes(&search.best);
        search.descend(0, &mut Vec::new(), 0, short);
        let found = search.without_idlers(search.best.clone());
        let mut victims: Vec<&Resident> = found.iter().map(|i| search.from[*i].0).collect();
        victims.sort_by(|a, b| (a.last_used, &a.key).cmp(&(b.last_used, &b.key)));
        victims
    }

    fn bytes(&self, chosen: &[usize]) -> u64 {
        chosen.iter().fold(0, |sum, i| sum.saturating_add(self.from[*i].0.bytes()))
    }

    /// Leaves out, largest first, whoever is not needed.
    fn without_idlers(&self, mut chosen: Vec<usize>) -> Vec<usize> {
        chosen.sort_unstable();
        for i in chosen.clone() {
            let rest: Vec<&Resident> = chosen.iter().filter(|c| **c != i).map(|c| self.from[*c].0).collect();
            if suffice(self.missing, &rest) {
                chosen.retain(|c| *c != i);
            }
        }
        chosen
    }

    fn descend(&mut self, i: usize, chosen: &mut Vec<usize>, bytes: u64, short: Vec<u64>) {
        if short.iter().all(|s| *s == 0) {
            if bytes < self.best_bytes {
                (self.best, self.best_bytes) = (chosen.clone(), bytes);
            }
            return;
        }
        let hopeless = short.iter().zip(&self.after[i]).any(|(short, sum)| short > sum);
        // Whatever is still missing somewhere is moved at least.
        let at_least = bytes.saturating_add(short.iter().copied().max().unwrap_or(0));
        if hopeless || at_least >= self.best_bytes || self.steps_left == 0 {
            return;
        }
        self.steps_left -= 1;
        let with = short.iter().zip(&self.from[i].1).map(|(short, gain)| short.saturating_sub(*gain)).collect();
        chosen.push(i);
        let more = bytes.saturating_add(self.from[i].0.bytes());
        self.descend(i + 1, chosen, more, with);
        chosen.pop();
        self.descend(i + 1, chosen, bytes, short);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ReplicaId;
    use crate::device::test_gpu;

    const NOW: Tick = Tick(1_000_000);

    fn gpu(index: u32, total: u64) -> DeviceSnapshot {
        DeviceSnapshot { vram_total: total, ..test_gpu(index) }
    }

    fn uuid(index: u32) -> String {
        test_gpu(index).uuid
    }

    /// Idle, on demand, used so long ago.
    fn resident(replica: u16, ago: u64, holds: &[(u32, u64)]) -> Resident {
        Resident {
            key: ReplicaKey { pool: "p".parse().unwrap(), replica: ReplicaId(replica) },
            holds: holds.iter().map(|(device, bytes)| (uuid(*device), *bytes)).collect(),
            ready_since: Some(Tick(0)),
            last_used: NOW - Duration::from_millis(ago),
            busy: 0,
            on_demand: true,
            pinned: false,
            held: false,
        }
    }

    fn promised(residents: &[Resident]) -> impl Fn(&str) -> u64 {
        move |u| residents.iter().map(|r| r.on(u)).sum()
    }

    fn plan(
        mask: &str,
        bytes: &[u64],
        devices: &[DeviceSnapshot],
        rs: &[Resident],
    ) -> Result<EvictionPlan, NoEviction> {
        let mask = mask.parse().unwrap();
        plan_eviction(Start { mask: &mask, bytes }, devices, promised(rs), rs, &EvictionPolicy::default(), NOW)
    }

    fn evicted(result: Result<EvictionPlan, NoEviction>) -> Vec<u16> {
        result.unwrap().evict.iter().map(|k| k.replica.0).collect()
    }

    #[test]
    fn the_least_recently_used_go_and_no_more_than_needed() {
        let devices = [gpu(0, 100)];
        let rs = [resident(0, 10, &[(0, 30)]), resident(1, 20, &[(0, 30)]), resident(2, 30, &[(0, 30)])];
        assert_eq!(evicted(plan("0", &[10], &devices, &rs)), [] as [u16; 0]);
        assert_eq!(evicted(plan("0", &[40], &devices, &rs)), [2]);
        assert_eq!(evicted(plan("0", &[41], &devices, &rs)), [2, 1]);
        assert_eq!(evicted(plan("0", &[100], &devices, &rs)), [2, 1, 0]);
        // Up to replica 0 all have to be looked at, and then the two others need not go.
        let rs = [resident(0, 10, &[(0, 60)]), resident(1, 20, &[(0, 15)]), resident(2, 30, &[(0, 15)])];
        assert_eq!(evicted(plan("0", &[70], &devices, &rs)), [0]);
        assert_eq!(plan("0", &[70], &devices, &rs).unwrap().bytes, 60);
    }

    #[test]
    fn auto_takes_the_device_whose_replicas_were_used_longest_ago() {
        let devices = [gpu(0, 100), gpu(1, 100)];
        let rs = [resident(0, 10, &[(0, 90)]), resident(1, 20, &[(1, 95)])];
        let found = plan("auto", &[50], &devices, &rs).unwrap();
        assert_eq!((found.devices.uuids.as_slice(), found.bytes), ([uuid(1)].as_slice(), 95));
        assert_eq!(evicted(plan("0", &[50], &devices, &rs)), [0]);
        assert_eq!(evicted(plan("all", &[50], &devices, &rs)), [1, 0]);
        assert_eq!(evicted(plan("0,1", &[50, 5], &devices, &rs)), [0]);
    }

    #[test]
    fn who_stays_says_why_and_time_alone_may_help() {
        let devices = [gpu(0, 100)];
        let stays = |change: fn(&mut Resident)| {
            let mut r = resident(0, 10, &[(0, 90)]);
            change(&mut r);
            let Err(NoEviction::TooLittle { kept, possible_at, detail }) = plan("0", &[50], &devices, &[r]) else {
                panic!("it went")
            };
            assert!(detail.contains("GPU 0") && !kept[0].1.to_string().is_empty());
            (kept[0].1, possible_at)
        };
        assert_eq!(stays(|r| r.pinned = true), (WhyKept::Pinned, None));
        assert_eq!(stays(|r| r.on_demand = false), (WhyKept::Preload, None));
        assert_eq!(stays(|r| r.held = true), (WhyKept::Held, None));
        assert_eq!(stays(|r| r.busy = 1), (WhyKept::Busy, None));
        assert_eq!(stays(|r| r.ready_since = None), (WhyKept::NotReady, None));
        let until = Tick(1_059_000);
        assert_eq!(stays(|r| r.ready_since = Some(Tick(999_000))), (WhyKept::TooYoung { until }, Some(until)));
        // what strangers hold is not ours to evict
        let taken = [DeviceSnapshot { vram_foreign: 60, vram_used: 65, ..gpu(0, 100) }];
        let Err(NoEviction::TooLittle { kept, .. }) = plan("0", &[50], &taken, &[resident(0, 10, &[(0, 5)])]) else {
            panic!("it went")
        };
        assert_eq!(kept[0].1, WhyKept::NoHelp);
    }

    #[test]
    fn what_eviction_cannot_help_is_passed_on() {
        let rs = [resident(0, 10, &[(0, 90)])];
        assert!(matches!(plan("0", &[200], &[gpu(0, 100)], &rs), Err(NoEviction::Refused(Refusal::NeverFits(_)))));
        assert!(matches!(plan("1", &[1], &[gpu(0, 100)], &rs), Err(NoEviction::Refused(Refusal::Mask(_)))));
    }

    fn residents() -> impl Strategy<Value = Vec<Resident>> {
        let one = (0u64..5, 0u64..60, 0u64..60, 0u8..8);
        prop::collection::vec(one, 0..9).prop_map(|given| {
            let resident = |(i, (ago, first, second, kind)): (usize, (u64, u64, u64, u8))| Resident {
                pinned: kind == 0,
                busy: u32::from(kind == 1),
                ..resident(u16::try_from(i).unwrap(), ago, &[(0, first), (1, second)])
            };
            given.into_iter().enumerate().map(resident).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_plan_makes_room_is_minimal_and_the_best_of_all(rs in residents(), first in 0u64..200, second in 0u64..200) {
            let devices = [gpu(0, 200), gpu(1, 200)];
            let fits = |gone: &[ReplicaKey]| {
                let left: Vec<Resident> = rs.iter().filter(|r| !gone.contains(&r.key)).cloned().collect();
                let mask = DeviceMask::All;
                reserve::place_each(&mask, &[first, second], &devices, promised(&left)).is_ok()
            };
            let may: Vec<&Resident> = rs.iter().filter(|r| !r.pinned && r.busy == 0).collect();
            let cost = |set: &[&Resident]| (set.iter().map(|r| r.last_used).max(), set.iter().map(|r| r.bytes()).sum::<u64>());
            let keys = |set: &[&Resident]| set.iter().map(|r| r.key.clone()).collect::<Vec<_>>();
            let subsets = (0..1u32 << may.len()).map(|bits| {
                (0..may.len()).filter(|i| bits >> i & 1 == 1).map(|i| may[i]).collect::<Vec<_>>()
            });
            let best = subsets.filter(|set| fits(&keys(set))).map(|set| cost(&set)).min();
            match plan("all", &[first, second], &devices, &rs) {
                Ok(plan) => {
                    prop_assert!(fits(&plan.evict));
                    for i in 0..plan.evict.len() {
                        let mut fewer = plan.evict.clone();
                        fewer.remove(i);
                        prop_assert!(!fits(&fewer));
                    }
                    let set: Vec<&Resident> = rs.iter().filter(|r| plan.evict.contains(&r.key)).collect();
                    prop_assert!(set.iter().all(|r| !r.pinned && r.busy == 0));
                    prop_assert_eq!(plan.bytes, cost(&set).1);
                    prop_assert_eq!(Some(cost(&set)), best);
                }
                Err(NoEviction::TooLittle { kept, .. }) => {
                    prop_assert_eq!(best, None);
                    prop_assert_eq!(kept.len(), rs.len());
                }
                Err(other) => prop_assert!(false, "{:?}", other),
            }
        }
    }

    #[test]
    fn many_alike_are_decided_in_bounded_work() {
        let devices = [gpu(0, 64_000)];
        let rs: Vec<Resident> = (0..60).map(|i| resident(i, 5, &[(0, 1000 + u64::from(i) * 7 % 13)])).collect();
        let free = 64_000 - rs.iter().map(Resident::bytes).sum::<u64>();
        let found = plan("0", &[free + 30_001], &devices, &rs).unwrap();
        assert!((30_001..31_050).contains(&found.bytes), "{}", found.bytes);
    }
}
