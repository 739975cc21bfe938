//! An engine that ran out of GPU memory is not started again where nothing has changed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::estimate::LlamaCppSettings;
use pool_domain::estimate::learnt::LEARNT_MARGIN;
use pool_domain::plan::EngineMemory;
use pool_domain::{FailureClass, ModelRef, PoolId};
use pool_services::control::PlanRequest;
use pool_services::{PoolControl, PoolManager, PoolSnapshot, PoolSpec, ReloadRequest};
use pool_testkit::{FakeNode, spec, until};

const GIB: u64 = 1 << 30;
const LONG: Duration = Duration::from_secs(36_000);

fn id() -> PoolId {
    "chat".parse().unwrap()
}

fn pool() -> PoolSpec {
    PoolSpec { vram: Some(3 * GIB), devices: vec!["0".parse().unwrap()], ..spec("chat") }
}

/// What others use of the first device, which has 24 GiB.
fn others_use(node: &FakeNode, gib: u64) {
    node.gpus.change(|i| {
        i.devices[0].vram_used = gib * GIB;
        i.devices[0].vram_foreign = gib * GIB;
        i.devices[0].vram_free = (24 - gib) * GIB;
    });
}

fn too_little(node: &FakeNode) {
    node.engines.script(|s| (s.crash_after, s.dies_of) = (Some(Duration::ZERO), Some(FailureClass::VramOom)));
}

fn enough(node: &FakeNode) {
    node.engines.script(|s| (s.crash_after, s.dies_of) = (None, None));
}

/// Its engine ran out with 14 GiB free to it.
async fn ran_out() -> (FakeNode, PoolManager, PoolSnapshot) {
    let node = FakeNode::default();
    too_little(&node);
    others_use(&node, 10);
    let (m, _events) = node.manage(vec![pool()]).await;
    let waits = until(&m, &id(), |s| s.replicas[0].reason_code == "vram").await;
    assert_eq!(node.engines.launches().len(), 1);
    (node, m, waits)
}

#[tokio::test(start_paused = true)]
async fn a_start_that_ran_out_of_memory_waits_until_more_is_free_and_says_what_would_fit() {
    let (node, m, waits) = ran_out().await;
    let reason = &waits.replicas[0].reason;
    assert!(reason.contains("ran out of GPU memory where 14.0 GiB were free to it, and 14.0 GiB are now"), "{reason}");
    assert!(reason.contains("0.2 GiB more free memory on GPU 0") && reason.contains("fewer `slots`"), "{reason}");
    let plan = m.plan(PlanRequest::Pool(id())).await.unwrap();
    assert_eq!((plan.fits, plan.waiting_helps), (false, true), "{plan:?}");
    assert!(
        plan.reason.contains("ran out") && plan.remedies.iter().any(|r| r.contains("more free memory")),
        "{plan:?}"
    );
    tokio::time::sleep(LONG).await;
    // As much as it had, or less, is no reason to try; nor is what figures vary by.
    others_use(&node, 11);
    tokio::time::sleep(LONG).await;
    assert_eq!(node.engines.launches().len(), 1, "{:#?}", m.pool(&id()).await);
    enough(&node);
    others_use(&node, 5);
    let ready = until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!((ready.replicas[0].breaker, node.engines.launches().len()), ("closed", 2));
    // It got along with that: nothing is held against such a start any more.
    others_use(&node, 10);
    m.stop(&id()).await.unwrap();
    until(&m, &id(), |s| s.replicas[0].state == "idle").await;
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn memory_that_somebody_took_meanwhile_and_gave_back_is_memory_that_came_free() {
    let (node, m, _) = ran_out().await;
    enough(&node);
    others_use(&node, 23);
    until(&m, &id(), |s| s.replicas[0].reason.contains("left of the")).await;
    others_use(&node, 10);
    until(&m, &id(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn the_next_daemon_knows_that_it_ran_out() {
    let (node, m, _) = ran_out().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(m);
    let (m, _events) = node.manage(vec![pool()]).await;
    until(&m, &id(), |s| s.replicas[0].reason_code == "vram").await;
    tokio::time::sleep(LONG).await;
    assert_eq!(node.engines.launches().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_spec_or_a_person_has_it_tried_again() {
    let (node, m, _) = ran_out().await;
    enough(&node);
    m.reset_breaker(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;

    let (node, m, _) = ran_out().await;
    enough(&node);
    let smaller = PoolSpec { model: ModelRef::Stub("smaller".into()), ..pool() };
    let declared = Some((smaller, "smaller".to_owned()));
    m.reload(&id(), ReloadRequest { declared, ..ReloadRequest::default() }).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn one_that_had_served_comes_back_with_more_promised() {
    let node = FakeNode::default();
    node.models.set_profile(pool_testkit::header());
    let settings = LlamaCppSettings { context: 4096, ..LlamaCppSettings::default() };
    node.engines.script(|s| {
        s.memory = EngineMemory::LlamaCpp(settings);
        (s.crash_after, s.dies_of) = (Some(Duration::from_secs(60)), Some(FailureClass::VramOom));
    });
    let (m, _events) = node.manage(vec![PoolSpec { vram: None, context: Some(4096), ..pool() }]).await;
    let first = until(&m, &id(), PoolSnapshot::ready).await.replicas[0].vram_reserved;
    let again = until(&m, &id(), |s| s.ready() && s.replicas[0].generation.0 == 2).await.replicas[0].vram_reserved;
    assert_eq!(again, first + LEARNT_MARGIN);
    // More than the device has is never promised.
    let third = until(&m, &id(), |s| s.ready() && s.replicas[0].generation.0 == 3).await.replicas[0].vram_reserved;
    assert_eq!(third, first + 2 * LEARNT_MARGIN);
}
