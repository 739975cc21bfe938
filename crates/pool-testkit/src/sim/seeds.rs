//! Many seeds on all cores, and what is left of a schedule that fails.

use std::fmt;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{Outcome, Plant, Schedule, Violation, run};

/// Lines of the record that are shown before a violation.
const SHOWN: usize = 400;

/// A seed that fails, and the shortest schedule found that still does.
#[derive(Debug, Clone)]
pub struct Failed {
    /// The seed.
    pub seed: u64,
    /// What was wrong.
    pub violation: Violation,
    /// What is left of its schedule.
    pub shrunk: Schedule,
    /// How long it was.
    pub steps: usize,
    /// The run of what is left.
    pub outcome: Outcome,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} breaks {}", self.seed, self.violation)?;
        writeln!(f, "{} of its {} steps still do:", self.shrunk.steps.len(), self.steps)?;
        write!(f, "{}", self.shrunk)?;
        let from = self.outcome.log.len().saturating_sub(SHOWN);
        for entry in &self.outcome.log[from..] {
            writeln!(f, "{entry}")?;
        }
        match &self.outcome.violation {
            Some(v) => writeln!(f, "=> {v}"),
            None => Ok(()),
        }
    }
}

/// Leaves out steps for as long as the same invariant is broken.
#[must_use]
pub fn shrink(schedule: &Schedule, plant: Plant, violation: &Violation) -> (Schedule, Outcome) {
    let mut best = schedule.clone();
    let mut outcome = run(best.clone(), plant);
    let fails = |o: &Outcome| o.violation.as_ref().is_some_and(|v| v.invariant == violation.invariant);
    let mut size = best.steps.len().max(1);
    while size > 0 {
        let mut from = 0;
        while from < best.steps.len() {
            let mut shorter = best.clone();
            shorter.steps.drain(from..(from + size).min(best.steps.len()));
            let tried = run(shorter.clone(), plant);
            if fails(&tried) {
                (best, outcome) = (shorter, tried);
            } else {
                from += size;
            }
        }
        size /= 2;
    }
    (best, outcome)
}

/// What came of many seeds.
#[derive(Debug, Default)]
pub struct Report {
    /// Seeds that ran.
    pub ran: u64,
    /// Simulated time, all of them together.
    pub simulated: Duration,
    /// Processes that were launched.
    pub launches: u64,
    /// Those that failed, by seed; a few at most.
    pub failed: Vec<Failed>,
}

/// Runs these seeds on `threads` threads until `stop_after` have failed; `told` hears how many ran, now and then.
pub fn soak(seeds: Range<u64>, threads: usize, plant: Plant, stop_after: usize, told: &(dyn Fn(u64) + Sync)) -> Report {
    let (next, stop) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let report = Mutex::new(Report::default());
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let schedule = Schedule::of(seed);
                    let outcome = run(schedule.clone(), plant);
                    let failed = outcome.violation.as_ref().map(|violation| {
                        let (shrunk, outcome) = shrink(&schedule, plant, violation);
                        Failed { seed, violation: violation.clone(), shrunk, steps: schedule.steps.len(), outcome }
                    });
                    let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
                    report.ran += 1;
                    report.simulated += outcome.lasted;
                    let launched = |e: &&super::truth::Entry| matches!(e.what, super::truth::What::Launched(_));
                    report.launches += outcome.log.iter().filter(launched).count() as u64;
                    report.failed.extend(failed);
                    if report.failed.len() >= stop_after {
                        stop.store(true, Ordering::Relaxed);
                    }
                    let ran = report.ran;
                    drop(report);
                    told(ran);
                }
            });
        }
    });
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.failed.sort_by_key(|f| f.seed);
    report
}
