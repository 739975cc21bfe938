//! The seeded simulation of whole nodes: see `pool_testkit::sim`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use pool_testkit::sim::truth::{Scene, What};
use pool_testkit::sim::{Plant, Schedule, run, soak};

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// `SIM_SEED=17 cargo nextest run -p pool-services sim::` runs one seed alone.
#[test]
fn two_thousand_seeds_break_no_promise() {
    let seeds = match std::env::var("SIM_SEED") {
        Ok(one) => one.parse().unwrap()..one.parse::<u64>().unwrap() + 1,
        Err(_) => 0..2_000,
    };
    let report = soak(seeds, threads(), Plant::None, 1, &|_| {});
    if let Some(failed) = report.failed.first() {
        panic!("{failed}");
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..30 {
        let (a, b) = (run(Schedule::of(seed), Plant::None), run(Schedule::of(seed), Plant::None));
        assert_eq!(a.log, b.log, "seed {seed}");
        assert_eq!((a.violation, a.lasted), (b.violation, b.lasted), "seed {seed}");
    }
}

/// Each is found within 200 seeds, by the promise that it breaks, and what is left of the schedule shows it again.
#[test]
fn every_planted_bug_is_found_within_200_seeds_and_shrunk() {
    for plant in Plant::ALL {
        let report = soak(0..200, threads(), plant, 1, &|_| {});
        let found = report.failed.first().unwrap_or_else(|| panic!("{plant:?} is not found"));
        assert!(found.shrunk.steps.len() <= found.steps, "{found}");
        let again = run(found.shrunk.clone(), plant).violation.map(|v| v.invariant);
        assert_eq!(again, Some(found.violation.invariant), "{plant:?}: {found}");
        assert!(found.to_string().contains(&format!("seed {}", found.seed)));
        assert_eq!(run(found.shrunk.clone(), Plant::None).violation, None, "{plant:?} is not what was found: {found}");
        println!(
            "{plant:?}: {} after {} seeds, {} of {} steps",
            found.violation.invariant,
            report.ran,
            found.shrunk.steps.len(),
            found.steps
        );
    }
}

/// Otherwise the invariants about them would hold for want of anything to look at.
#[test]
fn the_schedules_have_engines_that_give_way_and_come_back() {
    let (mut gave_way, mut started_again) = (0, 0);
    for seed in 0..200 {
        let (mut scene, mut gone) = (Scene::default(), Vec::new());
        for entry in run(Schedule::of(seed), Plant::None).log {
            match &entry.what {
                What::Term(pid) if scene.processes.get(pid).is_some_and(|p| p.blameless && p.ended.is_none()) => {
                    gave_way += 1;
                    gone.push(scene.processes[pid].launch.key.clone());
                }
                What::Launched(launch) if gone.contains(&launch.key) => started_again += 1,
                _ => {}
            }
            scene.saw(&entry);
        }
    }
    assert!(gave_way > 15 && started_again > 8, "{gave_way} {started_again}");
}
