//! Whether an engine holds its memory on exactly its devices, from who is said to hold memory.

use std::collections::BTreeMap;

use crate::estimate::learnt::LEARNT_MARGIN;
use crate::reserve::gib;
use crate::{Failure, FailureClass};

/// Where the bytes come from that an engine was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Of an estimate that learns from what was taken: the next one is another.
    Learns,
    /// Somebody said so, or nothing is learnt of such an engine: the next start would be promised the same.
    Stands,
}

/// How much the list of holders is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// Whoever is not on it holds nothing.
    Whole,
    /// Some are under names that mean nothing here, or not on it at all, as in a container: who is found is there; of who is
    /// not found the device's memory has to tell.
    Partial,
    /// Devices that exist only in a file.
    Simulated,
}

/// One of an engine's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// Its UUID.
    pub uuid: &'a str,
    /// Bytes it was promised there.
    pub promised: u64,
    /// By how much more is used than before its launch of which nobody is listed; unset where nobody looked before.
    pub grew: Option<u64>,
}

/// What an engine proved of its memory, as one word.
///
/// # Errors
/// `cpu_fallback` where it holds none on a device it was given, `mask_breach` where it holds some elsewhere; never where that
/// cannot be known. `driver_error` where nobody can say.
pub fn judge(listing: Listing, places: &[Place<'_>], holds: &[&str]) -> Result<&'static str, Failure> {
    let listed = |p: &Place<'_>| holds.contains(&p.uuid);
    let elsewhere = holds.iter().find(|uuid| !places.iter().any(|p| p.uuid == **uuid));
    let breach = |uuid: &str| {
        Failure::new(FailureClass::MaskBreach, format!("it holds memory on {uuid}, which it was not given"))
    };
    let fallback = || Failure::new(FailureClass::CpuFallback, "it holds no memory on a GPU it was given");
    match (listing, elsewhere) {
        (Listing::Whole | Listing::Simulated, Some(uuid)) => Err(breach(uuid)),
        (Listing::Simulated, None) => Ok("simulated"),
        (Listing::Whole, None) if places.iter().all(listed) => Ok("vram"),
        (Listing::Whole, None) => Err(fallback()),
        (Listing::Partial, _) if places.iter().all(listed) => Ok("vram"),
        (Listing::Partial, _) => {
            let unlisted: Vec<&Place<'_>> = places.iter().filter(|p| !listed(p)).collect();
            if unlisted.iter().any(|p| p.grew.is_none()) {
                let why = "the driver lists processes of another namespace, and how much was used before is not known";
                return Err(Failure::new(FailureClass::DriverError, why));
            }
            if unlisted.iter().all(|p| p.grew.is_some_and(|grew| grew >= least(p.promised))) {
                return Ok("vram_delta");
            }
            // A pid of another namespace may be the same by chance: only where its own devices are empty does it count.
            Err(elsewhere.map_or_else(fallback, |uuid| breach(uuid)))
        }
    }
}

/// What an engine takes at the least where it works at all: a context of CUDA alone is more. Others may end meanwhile, so it
/// is no more than an eighth of what it was promised.
fn least(promised: u64) -> u64 {
    (promised / 8).clamp(1, 64 << 20)
}

/// By how much an engine may hold more than it was promised: the larger of 512 MiB and a twentieth, as the margin of an
/// estimate, which is what figures for the same engine vary by. A promise by an estimate has that margin in it already; one
/// in the config is often the bare figure that somebody read off.
fn slack(promised: u64) -> u64 {
    (promised / 20).max(LEARNT_MARGIN)
}

/// Whether what it holds, by device, is within its plan of bytes by device.
///
/// # Errors
/// On the device where it holds the most beyond: `vram_oom` where the next start is promised more, `config` where only a
/// person can say more.
pub fn within_plan(plan: Plan, promised: &[(String, u64)], holds: &BTreeMap<String, u64>) -> Result<(), Failure> {
    let beyond = promised.iter().filter_map(|(uuid, promised)| {
        let held = *holds.get(uuid)?;
        let over = held.checked_sub(promised.saturating_add(slack(*promised)))?;
        (over > 0).then_some((over, uuid, held, *promised))
    });
    let Some((_, uuid, held, promised)) = beyond.max() else { return Ok(()) };
    let (class, rest) = match plan {
        Plan::Learns => {
            (FailureClass::VramOom, "the estimate was too small, and the next start is promised what it took")
        }
        Plan::Stands => {
            (FailureClass::Config, "set `vram` to what it takes, or have it take less (a smaller `context`)")
        }
    };
    Err(Failure::new(class, format!("it holds {} on {uuid}, and its plan says {}: {rest}", gib(held), gib(promised))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_may_be_exceeded_by_what_figures_vary_by_and_no_more() {
        let promised = |each: [u64; 2]| ["a", "b"].map(str::to_owned).into_iter().zip(each).collect::<Vec<_>>();
        let holds = |each: [u64; 2]| promised(each).into_iter().collect::<BTreeMap<_, _>>();
        let class = |plan, had, has| within_plan(plan, &promised(had), &holds(has)).map_err(|f| f.class.code());
        let small = [2 * GIB, 4 * GIB];
        assert_eq!(class(Plan::Stands, small, [2 * GIB + LEARNT_MARGIN, GIB]), Ok(()));
        assert_eq!(class(Plan::Stands, small, [2 * GIB + LEARNT_MARGIN + 1, GIB]), Err("config"));
        assert_eq!(class(Plan::Learns, small, [GIB, 5 * GIB]), Err("vram_oom"));
        // A twentieth of 40 GiB is more than 512 MiB.
        assert_eq!(class(Plan::Stands, [40 * GIB, 0], [42 * GIB, 0]), Ok(()));
        assert_eq!(class(Plan::Stands, [40 * GIB, 0], [42 * GIB + 1, 0]), Err("config"));
        // Of whom nobody is listed nothing is known.
        assert_eq!(within_plan(Plan::Stands, &promised(small), &BTreeMap::new()), Ok(()));
        let told = within_plan(Plan::Stands, &promised(small), &holds([9 * GIB, 0])).unwrap_err().detail;
        assert!(told.starts_with("it holds 9.0 GiB on a, and its plan says 2.0 GiB: set `vram`"), "{told}");
    }

    const GIB: u64 = 1 << 30;

    fn place(uuid: &str, grew: Option<u64>) -> Place<'_> {
        Place { uuid, promised: 4 * GIB, grew }
    }

    fn class(listing: Listing, places: &[Place<'_>], holds: &[&str]) -> Result<&'static str, &'static str> {
        judge(listing, places, holds).map_err(|f| f.class.code())
    }

    #[test]
    fn a_whole_list_proves_both_ways() {
        let on = [place("a", None), place("b", None)];
        assert_eq!(class(Listing::Whole, &on, &["a", "b"]), Ok("vram"));
        assert_eq!(class(Listing::Whole, &on, &["a"]), Err("cpu_fallback"));
        assert_eq!(class(Listing::Whole, &on, &[]), Err("cpu_fallback"));
        assert_eq!(class(Listing::Whole, &on, &["a", "b", "c"]), Err("mask_breach"));
    }

    #[test]
    fn a_simulated_one_proves_no_absence() {
        assert_eq!(class(Listing::Simulated, &[place("a", None)], &[]), Ok("simulated"));
        assert_eq!(class(Listing::Simulated, &[place("a", None)], &["c"]), Err("mask_breach"));
    }

    #[test]
    fn in_a_container_the_memory_tells_of_who_is_not_found() {
        let on = |grew| [place("a", grew)];
        assert_eq!(class(Listing::Partial, &on(None), &["a"]), Ok("vram"));
        assert_eq!(class(Listing::Partial, &on(Some(4 * GIB)), &[]), Ok("vram_delta"));
        assert_eq!(class(Listing::Partial, &on(Some(0)), &[]), Err("cpu_fallback"));
        assert_eq!(class(Listing::Partial, &on(Some(1 << 20)), &[]), Err("cpu_fallback"));
        // The same pid by chance on another device, or it went there.
        assert_eq!(class(Listing::Partial, &on(Some(4 * GIB)), &["c"]), Ok("vram_delta"));
        assert_eq!(class(Listing::Partial, &on(Some(0)), &["c"]), Err("mask_breach"));
        assert_eq!(class(Listing::Partial, &on(None), &[]), Err("driver_error"));
        let two = [place("a", Some(4 * GIB)), place("b", Some(0))];
        assert_eq!(class(Listing::Partial, &two, &[]), Err("cpu_fallback"));
    }
}
