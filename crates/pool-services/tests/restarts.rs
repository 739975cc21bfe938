//! What is held against a replica goes with it through restarts of the daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::PoolId;
use pool_services::ports::StateLedger;
use pool_services::{Activation, ControlError, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);

fn crashing() -> (FakeNode, PoolId) {
    let node = FakeNode::default();
    node.engines.script(|s| s.crash_after = Some(Duration::ZERO));
    (node, "chat".parse().unwrap())
}

#[tokio::test(start_paused = true)]
async fn the_last_error_is_known_after_a_restart_of_the_daemon() {
    for in_order in [true, false] {
        let (node, id) = crashing();
        node.engines.script(|s| s.crash_after = Some(Duration::from_secs(5)));
        let (m, _events) = node.manage(vec![spec("chat")]).await;
        let failed = until(&m, &id, |s| s.last_error().is_some() && s.replicas[0].state == "waiting").await;
        let was = failed.last_error().unwrap().clone();
        assert_eq!((was.class.code(), was.detail.as_str()), ("crash", "the engine ended with exit status 1"));
        tokio::time::sleep(Duration::from_millis(1)).await;
        let on_demand = PoolSpec { activation: Activation::OnDemand, ..spec("chat") };
        let m = another(&node, m, in_order, vec![on_demand]).await;
        let known = m.pool(&id).await.unwrap();
        assert_eq!(known.last_error(), Some(&was), "before anything ran");
        // It stands until there is a newer one.
        node.engines.script(|s| (s.crash_after, s.dies_of) = (None, None));
        m.preload(&id).await.unwrap();
        assert_eq!(until(&m, &id, PoolSnapshot::ready).await.last_error(), Some(&was));
        node.engines.script(|s| s.decodes = false);
        until(&m, &id, |s| s.last_error().is_some_and(|e| e.class.code() == "hang")).await;
    }
}

/// The next daemon on the same node, after the first one was stopped in order or has died.
async fn another(node: &FakeNode, first: PoolManager, in_order: bool, pools: Vec<PoolSpec>) -> PoolManager {
    if in_order {
        assert!(first.shutdown(LONG).await);
    }
    drop(first);
    node.manage(pools).await.0
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_stays_open_over_a_restart_of_the_daemon() {
    for in_order in [true, false] {
        let (node, id) = crashing();
        let (m, _events) = node.manage(vec![spec("chat")]).await;
        let open = until(&m, &id, |s| s.replicas[0].reason_code == "breaker").await;
        let began = Instant::now();
        let launches = node.engines.launches().len();
        tokio::time::sleep(Duration::from_secs(10)).await;
        let m = another(&node, m, in_order, vec![spec("chat")]).await;
        let waits = until(&m, &id, |s| s.replicas[0].state == "waiting").await;
        let (was, is) = (&open.replicas[0], &waits.replicas[0]);
        assert_eq!((is.breaker, is.reason_code, is.restart_count), ("open", "breaker", was.restart_count));
        assert!(is.reason.contains("earlier run"), "{}", is.reason);
        let Err(ControlError::Unavailable { retry_after }) = m.allocate_lease(&id) else { panic!("granted") };
        assert!(retry_after <= Duration::from_secs(20), "{retry_after:?}");
        let tried = until(&m, &id, |s| s.replicas[0].generation > was.generation).await;
        let waited = began.elapsed().as_secs_f64();
        assert!((29.9..30.2).contains(&waited), "{waited}");
        assert_eq!(tried.replicas[0].restart_count, was.restart_count + 1);
        until(&m, &id, |s| s.replicas[0].breaker == "open").await;
        assert_eq!(node.engines.launches().len(), launches + 1);
    }
}

#[tokio::test(start_paused = true)]
async fn restarting_the_daemon_between_crashes_never_starts_faster() {
    let (node, id) = crashing();
    let pools = || vec![spec("chat")];
    let mut m = node.manage(pools()).await.0;
    for n in 1..=4 {
        until(&m, &id, |s| s.replicas[0].backoff_failures == n && s.replicas[0].state == "waiting").await;
        m = another(&node, m, true, pools()).await;
    }
    until(&m, &id, |s| s.replicas[0].reason_code == "breaker").await;
    let at = node.engines.launches();
    let gaps: Vec<f64> = at.windows(2).map(|w| (w[1].0 - w[0].0).as_secs_f64()).collect();
    assert_eq!(gaps.len(), 4, "{gaps:?}");
    for (gap, v) in gaps.iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((v / 2.0..=v + 0.1).contains(gap), "{gaps:?}");
    }
    assert_eq!(m.pool(&id).await.unwrap().replicas[0].restart_count, 4);
}

#[tokio::test(start_paused = true)]
async fn an_end_that_was_counted_is_not_counted_again_though_its_record_still_stands() {
    let (node, id) = crashing();
    node.engines.script(|s| s.crash_after = Some(Duration::from_secs(30)));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id, PoolSnapshot::ready).await;
    let stood = node.ledger.recorded().await;
    let was = until(&m, &id, |s| s.replicas[0].state == "waiting").await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(node.ledger.recorded().await.is_empty());
    // As if it had been killed in between.
    drop(m);
    node.ledger.tamper(|records| records.extend(stood.into_iter().map(|r| (r.key.clone(), r))));
    node.engines.script(|s| s.crash_after = None);
    let (m, mut events) = node.manage(vec![spec("chat")]).await;
    let waits = until(&m, &id, |s| s.replicas[0].state == "waiting").await;
    let (was, is) = (&was.replicas[0], &waits.replicas[0]);
    assert_eq!((is.backoff_failures, is.generation, &is.last_error), (1, was.generation, &was.last_error));
    let back = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!((back.replicas[0].backoff_failures, back.replicas[0].restart_count), (1, 1));
    let told: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).collect();
    assert!(told.contains(&"start_delayed") && !told.contains(&"engine_failed"), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_person_who_asks_does_not_wait_and_demand_does() {
    let (node, id) = crashing();
    let asked = || vec![PoolSpec { activation: Activation::OnDemand, ..spec("chat") }];
    let m = node.manage(asked()).await.0;
    m.preload(&id).await.unwrap();
    until(&m, &id, |s| s.replicas[0].backoff_failures == 3 && s.replicas[0].state == "waiting").await;
    let m = another(&node, m, true, asked()).await;
    node.engines.script(|s| s.crash_after = None);
    let rests = m.pool(&id).await.unwrap();
    assert_eq!((rests.replicas[0].state, rests.replicas[0].backoff_failures), ("idle", 3));
    assert!(m.lease(&id, pool_services::LeaseRequest::default()).await.is_err());
    let waits = until(&m, &id, |s| s.replicas[0].state == "waiting").await;
    assert_eq!(waits.replicas[0].reason_code, "backoff");
    m.stop(&id).await.unwrap();
    until(&m, &id, |s| s.replicas[0].state == "idle").await;
    let began = Instant::now();
    m.preload(&id).await.unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_past_is_written_when_it_changes_and_again_when_the_disk_is_well() {
    let (node, id) = crashing();
    node.engines.script(|s| s.crash_after = Some(Duration::from_secs(30)));
    let m = node.manage(vec![spec("chat")]).await.0;
    until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!(node.ledger.past_writes(), 0, "nothing is held against it");
    node.ledger.set_broken(true);
    until(&m, &id, |s| s.replicas[0].backoff_failures == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(node.ledger.past_writes(), 0);
    node.ledger.set_broken(false);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(node.ledger.past_writes() >= 1);
    // Ten minutes Ready, and nothing is held against it any more, on the disk too.
    node.engines.script(|s| s.crash_after = None);
    until(&m, &id, |s| s.ready() && s.replicas[0].backoff_failures == 0).await;
    let m = another(&node, m, true, vec![spec("chat")]).await;
    let fresh = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!((fresh.replicas[0].backoff_failures, fresh.replicas[0].breaker), (0, "closed"));
    assert!(node.ledger.past_writes() < 20, "{}", node.ledger.past_writes());
}
