//! The behaviours that operators and clients rely on, as features in `tests/features`: each is run against the real daemon
//! with stub engines. A test here is a feature; a step that nobody wrote fails it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::needless_pass_by_value, reason = "what a step captures is handed over by value")]

#[path = "../support/mod.rs"]
mod support;

mod clients;
mod given;
mod operator;
mod pools;
mod site;

use std::path::Path;

use cucumber::World as _;
use cucumber::writer::Stats as _;

use site::Site;

const FEATURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/features");

/// Runs the feature of this name.
fn run(name: &str) {
    let file = Path::new(FEATURES).join(name).with_extension("feature");
    // One at a time: a scenario has a daemon of its own.
    let scenarios = Site::cucumber().with_default_cli().max_concurrent_scenarios(1).fail_on_skipped();
    let scenarios = scenarios.after(|_, _, _, _, site| {
        Box::pin(async {
            if let Some(site) = site {
                site.end();
            }
        })
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let told = runtime.block_on(scenarios.run(file));
    assert!(!told.execution_has_failed(), "{name}: see above");
    assert!(told.passed_steps() > 0 && told.skipped_steps() == 0, "{name}: there are steps that did not run");
}

#[test]
fn drain() {
    run("drain");
}

#[test]
fn failures() {
    run("failures");
}

#[test]
fn leases() {
    run("leases");
}

#[test]
fn on_demand() {
    run("on_demand");
}

#[test]
fn placement() {
    run("placement");
}

#[test]
fn reload() {
    run("reload");
}

#[test]
fn replicas() {
    run("replicas");
}

#[test]
fn every_feature_is_run() {
    let features = Path::new(FEATURES).read_dir().unwrap().map(|f| f.unwrap().path());
    for feature in features {
        let call = format!("run({:?})", feature.file_stem().unwrap());
        assert!(include_str!("main.rs").contains(&call), "no test runs {}", feature.display());
    }
}
