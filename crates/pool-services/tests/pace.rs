//! What engines publish in numbers, and how fast they are known to be: whole nodes of fakes on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::PoolId;
use pool_domain::meters::{Reading, Spent};
use pool_domain::perf::PerfHints;
use pool_services::{Activation, PoolControl, PoolManager, PoolSnapshot, PoolSpec, Workload};
use pool_testkit::{FakeNode, spec, until};

const LONG: Duration = Duration::from_secs(36_000);
/// Longer than a round of questions, and shorter than two.
const ROUND: Duration = Duration::from_secs(11);

fn id() -> PoolId {
    "chat".parse().unwrap()
}

fn says(generated: u64, seconds: f64) -> Reading {
    Reading {
        running: Some(2),
        waiting: Some(1),
        kv_used: Some(0.5),
        generated_tokens: Some(generated),
        decode: Some(Spent { seconds, count: generated }),
        ..Reading::default()
    }
}

async fn ready(node: &FakeNode, spec: PoolSpec) -> PoolManager {
    let (m, _events) = node.manage(vec![spec]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    m
}

async fn hints(m: &PoolManager) -> PerfHints {
    m.pool(&id()).await.unwrap().replicas[0].perf
}

async fn meters(m: &PoolManager) -> Reading {
    m.pool(&id()).await.unwrap().replicas[0].meters
}

#[tokio::test(start_paused = true)]
async fn totals_outlive_the_engine_that_counted_them_and_gauges_do_not() {
    let node = FakeNode::default();
    let m = ready(&node, spec("chat")).await;
    assert_eq!(meters(&m).await, Reading::default());
    node.engines.script(|s| s.reading = says(1_000, 10.0));
    tokio::time::sleep(ROUND).await;
    let seen = meters(&m).await;
    assert_eq!((seen.running, seen.waiting, seen.kv_used), (Some(2), Some(1), Some(0.5)));
    assert_eq!(seen.generated_tokens, Some(1_000));

    node.engines.crash_all();
    let down = until(&m, &id(), |p| !p.live()).await.replicas[0].meters;
    assert_eq!((down.running, down.waiting, down.kv_used, down.generated_tokens), (None, None, None, Some(1_000)));
    node.engines.script(|s| s.reading = says(40, 0.4));
    until(&m, &id(), PoolSnapshot::ready).await;
    tokio::time::sleep(ROUND).await;
    let again = meters(&m).await;
    assert_eq!((again.generated_tokens, again.decode), (Some(1_040), Some(Spent { seconds: 10.4, count: 1_040 })));
}

#[tokio::test(start_paused = true)]
async fn a_speed_is_first_what_the_proof_took_and_then_what_was_measured() {
    let node = FakeNode::default();
    node.engines.script(|s| s.work_takes = Duration::from_millis(50));
    let m = ready(&node, spec("chat")).await;
    assert_eq!(hints(&m).await, PerfHints { tokens_per_s: Some(20.0), first_token_ms: Some(50) });
    node.engines.script(|s| s.reading = says(1_000, 10.0));
    tokio::time::sleep(ROUND).await;
    assert_eq!(hints(&m).await, PerfHints { tokens_per_s: Some(100.0), first_token_ms: Some(50) });
}

#[tokio::test(start_paused = true)]
async fn a_later_daemon_knows_the_speed_before_the_first_start() {
    let node = FakeNode::default();
    node.engines.script(|s| (s.work_takes, s.reading) = (Duration::from_millis(50), says(1_000, 10.0)));
    let m = ready(&node, spec("chat")).await;
    tokio::time::sleep(ROUND).await;
    let known = PerfHints { tokens_per_s: Some(100.0), first_token_ms: Some(50) };
    assert_eq!(hints(&m).await, known);
    assert!(m.shutdown(LONG).await);
    drop(m);

    let at_rest = PoolSpec { activation: Activation::OnDemand, ..spec("chat") };
    let (m, _events) = node.manage(vec![at_rest]).await;
    let pool = m.pool(&id()).await.unwrap();
    assert_eq!((pool.live(), pool.replicas[0].perf), (false, known));
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!(hints(&m).await, known, "the same engine, model and devices: a proof is no better");
}

#[tokio::test(start_paused = true)]
async fn the_tokens_of_an_engine_that_is_taken_over_are_not_counted_twice() {
    let node = FakeNode::default();
    node.engines.script(|s| s.reading = says(1_000, 10.0));
    let m = ready(&node, spec("chat")).await;
    tokio::time::sleep(ROUND).await;
    assert!(m.leave(LONG).await);
    drop(m);
    let m = ready(&node, spec("chat")).await;
    assert_eq!(hints(&m).await.tokens_per_s, Some(100.0), "and its speed is known");
    tokio::time::sleep(ROUND).await;
    assert_eq!(meters(&m).await.generated_tokens, Some(0));
    node.engines.script(|s| s.reading = says(1_500, 20.0));
    tokio::time::sleep(ROUND).await;
    assert_eq!(meters(&m).await.generated_tokens, Some(500));
}

#[tokio::test(start_paused = true)]
async fn of_what_makes_no_tokens_no_speed_is_guessed() {
    let node = FakeNode::default();
    let m = ready(&node, PoolSpec { workload: Workload::Embed, ..spec("chat") }).await;
    assert_eq!(hints(&m).await, PerfHints::default());
}
