//! How a start that does not fit gets its memory: which idle replicas give way, and what is kept for it then.

use crate::device::DeviceSnapshot;
use crate::estimate::WORTH_A_TRY;
use crate::evict::{EvictionPolicy, NoEviction, Resident, Start, WhyKept, plan_eviction};
use crate::mask::DeviceMask;
use crate::plan::{Demand, at_best};
use crate::reserve::{Refusal, gib};
use crate::{ReplicaKey, Tick};

/// Names in a sentence; more are counted.
const NAMED: usize = 3;

/// A start that fits once some have given way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Who gives way, least recently used first. Never empty.
    pub evict: Vec<ReplicaKey>,
    /// What is kept for the start: bytes on each device, by UUID.
    pub kept: Vec<(String, u64)>,
    /// Bytes that are moved out.
    pub bytes: u64,
}

/// Why a start waits for memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoRoom {
    /// Who stays and why, in words; empty where memory is not in the hands of replicas.
    pub detail: String,
    /// When a plan becomes possible if nothing but time changes.
    pub possible_at: Option<Tick>,
}

/// Plans an eviction for a start that does not fit now: with what it would get on devices that nobody uses.
///
/// # Errors
/// Says who stays and why, and when it could be.
pub fn make_room(
    demand: &Demand,
    mask: &DeviceMask,
    devices: &[DeviceSnapshot],
    promised: &dyn Fn(&str) -> u64,
    residents: &[Resident],
    policy: &EvictionPolicy,
    now: Tick,
) -> Result<Room, NoRoom> {
    let hopeless = || NoRoom { detail: String::new(), possible_at: None };
    let fit = at_best(demand, mask, devices).map_err(|_| hopeless())?;
    let mut bytes = fit.bytes();
    // One that ran out gets no further with what it had then.
    if let ([needed], Some(learnt)) = (bytes.as_mut_slice(), demand.ran_out()) {
        *needed = (*needed).max(learnt.short.saturating_add(WORTH_A_TRY));
    }
    let spread = *mask == DeviceMask::Auto && bytes.len() > 1;
    let list = fit.devices.uuids.join(",");
    let mask = if spread { DeviceMask::parse(&list).map_err(|_| hopeless())? } else { mask.clone() };
    match plan_eviction(Start { mask: &mask, bytes: &bytes }, devices, promised, residents, policy, now) {
        Ok(plan) if !plan.evict.is_empty() => {
            let each = |at: usize| bytes.get(at).or(bytes.last()).copied().unwrap_or(0);
            let kept = plan.devices.uuids.iter().enumerate().map(|(at, uuid)| (uuid.clone(), each(at)));
            Ok(Room { evict: plan.evict, kept: kept.collect(), bytes: plan.bytes })
        }
        // It fits by this count and does not by another: nobody has to go for that.
        Ok(_) | Err(NoEviction::Refused(Refusal::Devices(_) | Refusal::Mask(_) | Refusal::NeverFits(_))) => {
            Err(hopeless())
        }
        Err(NoEviction::Refused(Refusal::Vram(detail))) => Err(NoRoom { detail, possible_at: None }),
        Err(NoEviction::TooLittle { kept, possible_at, .. }) => Err(NoRoom { detail: stays(&kept), possible_at }),
    }
}

/// Who stays and why. Who would be of no help is not worth a word.
fn stays(kept: &[(ReplicaKey, WhyKept)]) -> String {
    let of_use: Vec<_> = kept.iter().filter(|(_, why)| *why != WhyKept::NoHelp).collect();
    let mut words: Vec<String> =
        of_use.iter().take(NAMED).map(|(key, why)| format!("`{}` stays: {why}", key.pool)).collect();
    words.dedup();
    if of_use.len() > NAMED {
        words.push(format!("so do {} more", of_use.len() - NAMED));
    }
    words.join("; ")
}

impl Room {
    /// The pools that give way, each once.
    #[must_use]
    pub fn pools(&self) -> Vec<&str> {
        let mut pools: Vec<&str> = self.evict.iter().map(|key| key.pool.as_str()).collect();
        pools.dedup();
        pools
    }

    /// The plan in words.
    #[must_use]
    pub fn words(&self) -> String {
        let pools = self.pools();
        let named: Vec<String> = pools.iter().take(NAMED).map(|pool| format!("`{pool}`")).collect();
        let more = pools.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more} gives way, idle, with {}", named.join(", "), gib(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ReplicaId;
    use crate::device::test_gpu;
    use crate::plan::{EngineMemory, Split};

    const GIB: u64 = 1 << 30;

    fn gpus() -> Vec<DeviceSnapshot> {
        (0..2).map(|i| DeviceSnapshot { vram_total: 16 * GIB, ..test_gpu(i) }).collect()
    }

    fn demand(bytes: u64) -> Demand {
        let memory = EngineMemory::Unknown;
        Demand { profile: None, memory, vram: Some(bytes), split: Split::Off, learnt: None }
    }

    fn resident(pool: &str, device: u32, bytes: u64, used: u64) -> Resident {
        Resident {
            key: ReplicaKey { pool: pool.parse().unwrap(), replica: ReplicaId(0) },
            holds: vec![(test_gpu(device).uuid, bytes)],
            ready_since: Some(Tick(0)),
            last_used: Tick(used),
            busy: 0,
            on_demand: true,
            pinned: false,
            held: false,
        }
    }

    fn plan(mask: &str, bytes: u64, residents: &[Resident], min: u64) -> Result<Room, NoRoom> {
        let promised = |uuid: &str| -> u64 {
            residents.iter().flat_map(|r| &r.holds).filter(|(u, _)| u == uuid).map(|(_, bytes)| bytes).sum()
        };
        let (mask, policy) = (mask.parse().unwrap(), EvictionPolicy { min_ready_time: Duration::from_secs(min) });
        make_room(&demand(bytes), &mask, &gpus(), &promised, residents, &policy, Tick(50_000))
    }

    #[test]
    fn the_plan_says_who_goes_and_keeps_its_memory_where_it_will_fit() {
        let rs = [resident("a", 0, 12 * GIB, 5), resident("b", 1, 12 * GIB, 3)];
        let Err(young) = plan("auto", 12 * GIB, &rs, 60) else { panic!("too young to go") };
        assert_eq!(young.possible_at, Some(Tick(60_000)));
        assert_eq!(
            young.detail,
            "`a` stays: it became ready only a moment ago; `b` stays: it became ready only a moment ago"
        );
        let policy = EvictionPolicy { min_ready_time: Duration::ZERO };
        let promised = |_: &str| 12 * GIB;
        let with = |mask: &str| {
            make_room(&demand(12 * GIB), &mask.parse().unwrap(), &gpus(), &promised, &rs, &policy, Tick(50_000))
                .unwrap()
        };
        let one = with("auto");
        assert_eq!((one.pools(), one.bytes), (vec!["b"], 12 * GIB));
        assert_eq!(one.kept, [(test_gpu(1).uuid, 12 * GIB)]);
        assert_eq!(one.words(), "`b` gives way, idle, with 12.0 GiB");
        let both = with("0,1");
        assert_eq!((both.pools(), both.kept.len()), (vec!["b", "a"], 2));
    }

    #[test]
    fn one_that_ran_out_has_somebody_give_way_though_its_own_figure_would_fit() {
        let rs = [resident("a", 0, 4 * GIB, 5)];
        let learnt = crate::estimate::Correction::default().ran_out(None, 16 * GIB, Some(12 * GIB));
        let again = Demand { learnt: Some(learnt), ..demand(3 * GIB) };
        let policy = EvictionPolicy { min_ready_time: Duration::ZERO };
        let promised = |u: &str| if u == test_gpu(0).uuid { 4 * GIB } else { 0 };
        let mask = "0".parse().unwrap();
        let room = make_room(&again, &mask, &gpus(), &promised, &rs, &policy, Tick(50_000)).unwrap();
        assert_eq!((room.pools(), room.kept[0].1), (vec!["a"], 12 * GIB + WORTH_A_TRY));
        // With all of it, nobody can help.
        let all = Demand { learnt: Some(learnt.ran_out(None, 16 * GIB, Some(16 * GIB))), ..again };
        assert!(make_room(&all, &mask, &gpus(), &promised, &rs, &policy, Tick(50_000)).is_err());
    }

    #[test]
    fn who_is_of_no_help_is_not_named_and_strangers_cannot_be_moved() {
        let busy = Resident { busy: 1, ..resident("a", 0, 12 * GIB, 0) };
        let small = resident("b", 1, GIB, 0);
        let Err(none) = plan("0", 12 * GIB, &[busy, small], 0) else { panic!("nobody can go") };
        assert_eq!((none.detail.as_str(), none.possible_at), ("`a` stays: it is busy", None));
        let Err(never) = plan("0", 20 * GIB, &[], 0) else { panic!("it is larger than the device") };
        assert_eq!(never.detail, "");
    }
}
