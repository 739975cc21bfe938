//! Pools that start when somebody asks and stop when nobody does, on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::PoolId;
use pool_services::{Activation, ControlError, Event, LeaseRequest, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, spec, until};
use tokio::sync::mpsc;
use tokio::time::Instant;

const TTL: Duration = Duration::from_secs(600);

fn on_demand(id: &str) -> PoolSpec {
    PoolSpec { activation: Activation::OnDemand, idle_ttl: Some(TTL), ..spec(id) }
}

fn state(s: &PoolSnapshot) -> &'static str {
    s.replicas[0].state
}

fn stops(events: &mut mpsc::Receiver<Event>) -> usize {
    std::iter::from_fn(|| events.try_recv().ok()).filter(|e| e.code() == "idle_stopped").count()
}

/// A pool that somebody asked for a moment ago, and when it became Ready.
async fn woken(node: &FakeNode, spec: PoolSpec) -> (PoolManager, mpsc::Receiver<Event>, PoolId, Instant) {
    let id = spec.id.clone();
    let (m, events) = node.manage(vec![spec]).await;
    assert!(m.lease(&id, LeaseRequest::lasting(TTL)).await.is_err(), "nothing runs yet");
    until(&m, &id, PoolSnapshot::ready).await;
    (m, events, id, Instant::now())
}

/// Seconds until the pool rests.
async fn rests_after(m: &PoolManager, id: &PoolId, since: Instant) -> f64 {
    let stopped = until(m, id, |s| state(s) == "idle").await;
    assert!(!stopped.hold);
    since.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn nobody_came_for_as_long_as_it_says_and_the_next_one_starts_it_again() {
    let node = FakeNode::default();
    let (m, mut events, id, ready) = woken(&node, on_demand("chat")).await;
    let after = rests_after(&m, &id, ready).await;
    assert!((600.0..601.0).contains(&after), "{after}");
    assert_eq!((stops(&mut events), node.engines.running().len()), (1, 0));
    assert!(m.lease(&id, LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!(node.engines.launches().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn its_patience_begins_with_the_end_of_the_last_lease_and_checks_are_no_use() {
    let node = FakeNode::default();
    let (m, mut events, id, _) = woken(&node, on_demand("chat")).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    tokio::time::sleep(TTL * 3).await;
    assert!(m.pool(&id).await.unwrap().ready() && guard.valid());
    let (_, second) = m.allocate_lease(&id).unwrap();
    drop(guard);
    tokio::time::sleep(Duration::from_secs(100)).await;
    drop(second);
    let after = rests_after(&m, &id, Instant::now()).await;
    // A health check every ten seconds asked the engine for a unit of work all the while.
    assert!((600.0..601.0).contains(&after), "{after}");
    assert_eq!(stops(&mut events), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_became_ready_a_moment_ago_stays() {
    let node = FakeNode::default();
    let short = PoolSpec { idle_ttl: Some(Duration::from_secs(5)), ..on_demand("chat") };
    let (m, _events, id, ready) = woken(&node, short).await;
    let after = rests_after(&m, &id, ready).await;
    assert!((60.0..61.0).contains(&after), "{after}");
}

#[tokio::test(start_paused = true)]
async fn preloaded_and_pinned_ones_never_stop_by_themselves() {
    let node = FakeNode::default();
    let preloaded = PoolSpec { idle_ttl: Some(TTL), ..spec("preloaded") };
    let pinned = PoolSpec { pin: true, ..on_demand("pinned") };
    let patient = PoolSpec { idle_ttl: None, ..on_demand("patient") };
    let (m, mut events) = node.manage(vec![preloaded, pinned, patient]).await;
    for id in ["pinned", "patient"] {
        assert!(m.lease(&id.parse().unwrap(), LeaseRequest::lasting(TTL)).await.is_err());
    }
    tokio::time::sleep(TTL * 20).await;
    assert!(m.pools().await.unwrap().iter().all(PoolSnapshot::ready));
    assert_eq!(stops(&mut events), 0);
}

#[tokio::test(start_paused = true)]
async fn demand_does_not_lift_a_hold_and_all_that_ask_wait_for_one_start() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![on_demand("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    for _ in 0..3 {
        assert!(matches!(m.lease(&id, LeaseRequest::lasting(TTL)).await, Err(ControlError::Unready { .. })));
    }
    let begun: Vec<_> = m.operations().await.unwrap().into_iter().filter(|o| o.verb == "preload").collect();
    assert_eq!(begun.len(), 1, "{begun:?}");
    until(&m, &id, PoolSnapshot::ready).await;
    m.stop(&id).await.unwrap();
    until(&m, &id, |s| state(s) == "idle").await;
    assert_eq!(m.lease(&id, LeaseRequest::lasting(TTL)).await, Err(ControlError::Draining));
    tokio::time::sleep(TTL).await;
    assert_eq!((state(&m.pool(&id).await.unwrap()), node.engines.launches().len()), ("idle", 1));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_nobody_waits_for_any_more_is_called_off() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices.clear());
    let (m, _events) = node.manage(vec![on_demand("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let asked = Instant::now();
    assert!(m.lease(&id, LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id, |s| s.replicas[0].reason_code == "devices").await;
    let after = rests_after(&m, &id, asked).await;
    assert!((600.0..601.0).contains(&after), "{after}");
    let given_up = m.operations().await.unwrap();
    assert!(matches!(&given_up[0].state, pool_services::OperationState::Failed(why) if why.contains("stopped")));
}

#[tokio::test(start_paused = true)]
async fn its_replicas_stop_together_or_not_at_all() {
    let node = FakeNode::default();
    let (m, _events, id, _) = woken(&node, PoolSpec { replicas: 2, ..on_demand("chat") }).await;
    until(&m, &id, |s| s.ready_replicas() == 2).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(m.pool(&id).await.unwrap().ready_replicas(), 2, "use of one is use of the pool");
    drop(guard);
    until(&m, &id, |s| s.replicas.iter().all(|r| r.state == "idle")).await;
}

#[tokio::test(start_paused = true)]
async fn one_that_somebody_waits_for_is_not_unused() {
    // The first one tells when it is suspect; of the second one the patience ends while it is.
    let mut idle_ttl = TTL;
    for waits in [false, true] {
        let node = FakeNode::default();
        let patient = PoolSpec { idle_ttl: Some(idle_ttl), ..on_demand("chat") };
        let (m, mut events, id, ready) = woken(&node, patient).await;
        tokio::time::sleep(Duration::from_secs(61)).await;
        node.engines.script(|s| s.decodes = false);
        until(&m, &id, |s| state(s) == "suspect").await;
        node.engines.script(|s| s.decodes = true);
        idle_ttl = ready.elapsed() + Duration::from_secs(2);
        if waits {
            // A suspect engine grants nothing.
            assert!(m.lease(&id, LeaseRequest::lasting(TTL).waiting(TTL)).await.is_ok());
            assert!(ready.elapsed() > idle_ttl);
            assert_eq!((stops(&mut events), node.engines.launches().len()), (0, 1), "stopped under who waited");
        }
    }
}
