//! Many seeds of the simulation on all cores; `cargo xtask soak` builds and runs it.
#![allow(clippy::print_stdout, reason = "its output is for people")]

use std::process::ExitCode;

use pool_testkit::sim::{Plant, soak};
use tokio::time::Instant;

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let (Some(Ok(count)), Some(Ok(from))) = (numbers.next(), numbers.next()) else {
        println!("usage: soak SEEDS FROM");
        return ExitCode::from(64);
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let began = Instant::now();
    let told = |ran: u64| {
        if ran.is_multiple_of(5_000) {
            println!("{ran} seeds after {:.0} s", began.elapsed().as_secs_f64());
        }
    };
    let report = soak(from..from.saturating_add(count), threads, Plant::None, 5, &told);
    for failed in &report.failed {
        println!("{failed}");
    }
    println!(
        "{} seeds from {from} on {threads} threads in {:.1} s: {} violations; {} processes launched, {:.1} days simulated",
        report.ran,
        began.elapsed().as_secs_f64(),
        report.failed.len(),
        report.launches,
        report.simulated.as_secs_f64() / 86_400.0,
    );
    if report.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
