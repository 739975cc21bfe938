//! What a decision costs: one life of a replica through the transition function, and one backoff delay.
//!
//! `cargo bench -p pool-domain`
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and criterion generates items")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use pool_domain::failure::Exit;
use pool_domain::lifecycle::{Command, Event, Fact, Policy, Proof, Replica, State};
use pool_domain::{Backoff, BackoffPolicy, Draw, Failure, Generation, Tick};

/// Start, Ready, a crash, and the wait before the next start: one event per transition.
const EVENTS: u64 = 9;

/// Returns the replica at the end and the number of actions asked for.
fn cycle(policy: &Policy) -> (Replica, usize) {
    let mut replica = Replica::new(Generation(0));
    let (mut now, mut actions, mut events) = (Tick(0), 0, 0);
    let mut step = |replica: &mut Replica, event: Event| {
        now = now + Duration::from_millis(10);
        events += 1;
        actions += black_box(replica.step(black_box(event), now, Draw::new(0.5), policy)).len();
    };
    step(&mut replica, Event::Command(Command::Start));
    let proof = Proof { residency: "simulated", model: "m".to_owned(), slots: 4, first_unit_ms: 1 };
    for fact in [
        Fact::Staged,
        Fact::Prepared,
        Fact::Launched,
        Fact::Serving,
        Fact::Proved(proof),
        Fact::Healthy,
        Fact::Exited(Failure::crash(Exit::Code(1))),
        Fact::Gone,
    ] {
        let generation = replica.generation;
        step(&mut replica, Event::Engine(generation, fact));
    }
    assert_eq!(events, EVENTS);
    (replica, actions)
}

fn lifecycle(c: &mut Criterion) {
    let policy = Policy::default();
    // What is measured is what it says: the cycle ends in the wait for the backoff delay.
    let (end, actions) = cycle(&policy);
    assert!(matches!(end.state, State::Waiting { .. }) && actions > 0, "{end:?}");
    c.bench_function("lifecycle/start-ready-crash-backoff (9 events)", |b| b.iter(|| cycle(black_box(&policy))));
}

fn backoff(c: &mut Criterion) {
    let policy = BackoffPolicy::default();
    for failures in [0, 5, 1000] {
        c.bench_function(&format!("backoff/next_delay after {failures}"), |b| {
            b.iter(|| {
                let mut backoff = Backoff::resume(black_box(failures));
                backoff.next_delay(black_box(&policy), black_box(1.0), Draw::new(black_box(0.5)))
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = lifecycle, backoff
}
criterion_main!(benches);
