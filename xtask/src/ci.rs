//! `cargo xtask ci`: everything CI runs, one after the other, to the end.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::{charts, codegen, deny, faults, process, tests_run, tidy, trace};

type Step = (&'static str, fn() -> Result<()>);

const STEPS: &[Step] = &[
    ("fmt", || process::run(&mut process::cargo(["fmt", "--all", "--check"]))),
    ("clippy", || {
        process::run(&mut process::cargo(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
    }),
    ("doc", || {
        let mut doc = process::cargo(["doc", "--no-deps", "--workspace"]);
        process::run(doc.env("RUSTDOCFLAGS", "--deny warnings"))
    }),
    ("codegen", || codegen::run(true)),
    ("charts", || charts::run(true)),
    ("tidy", tidy::run),
    ("trace", || trace::run(None)),
    ("deny", deny::run),
    ("test", || tests_run::run(&[])),
    // From the report of the tests just run.
    ("faults", || faults::run(true)),
];

/// Runs all steps; fails at the end if any failed.
pub(crate) fn run() -> Result<()> {
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for (name, step) in STEPS {
        println!("\n=== {name}");
        let start = Instant::now();
        let result = step();
        let seconds = start.elapsed().as_secs_f32();
        if let Err(error) = &result {
            eprintln!("error: {error}");
            failed.push(*name);
        }
        rows.push(format!("{name:<10} {:<7} {seconds:>8.1} s", if result.is_ok() { "ok" } else { "FAILED" }));
    }
    println!("\n=== summary\n{}", rows.join("\n"));
    if failed.is_empty() { Ok(()) } else { Err(Error::Check(format!("failed: {}", failed.join(", ")))) }
}
