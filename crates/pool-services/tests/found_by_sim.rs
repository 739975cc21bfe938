//! What the simulation found, each as a test of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::lifecycle::Policy;
use pool_domain::{BackoffPolicy, BreakerPolicy, PoolId};
use pool_services::ports::StateLedger;
use pool_services::{PoolControl, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::{Instant, sleep};

#[tokio::test(start_paused = true)]
async fn a_slow_disk_delays_neither_the_news_of_a_crash_nor_a_stop() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    m.stop(&id).await.unwrap();
    until(&m, &id, |s| !s.live()).await;
    node.ledger.set_slow(Duration::from_secs(5));
    // A hold that is being lifted, and a handoff that is being written.
    let preload = tokio::spawn({
        let (m, id) = (m.clone(), id.clone());
        async move { m.preload(&id).await }
    });
    until(&m, &id, PoolSnapshot::ready).await;
    node.engines.crash_all();
    sleep(Duration::from_millis(50)).await;
    assert!(!m.pool(&id).await.unwrap().ready());
    preload.await.unwrap().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let began = Instant::now();
    let stop = tokio::spawn({
        let (m, id) = (m.clone(), id.clone());
        async move { m.stop(&id).await }
    });
    until(&m, &id, |s| !s.live()).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    stop.await.unwrap().unwrap();
    assert!(node.ledger.held(&id).await, "a stop is answered once its hold is durable");
}

#[tokio::test(start_paused = true)]
async fn what_a_full_disk_did_not_take_is_written_once_it_does() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    sleep(Duration::from_millis(1)).await;
    node.ledger.set_broken(true);
    m.stop(&id).await.unwrap();
    until(&m, &id, |s| !s.live()).await;
    assert!(!node.ledger.held(&id).await && node.ledger.handoffs().len() == 1);
    node.ledger.set_broken(false);
    sleep(Duration::from_secs(3)).await;
    assert!(node.ledger.held(&id).await && node.ledger.handoffs().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_never_shortens_the_backoff() {
    let node = FakeNode::default();
    node.engines.script(|s| s.crash_after = Some(Duration::ZERO));
    let s = Duration::from_secs;
    let policy = Policy {
        backoff: BackoffPolicy::new(s(40), s(60), 2.0, 0.0, s(600)).unwrap(),
        breaker: BreakerPolicy::new(1, 1, s(1), s(2), s(60)).unwrap(),
        ..Policy::default()
    };
    let (m, _events) = node.manage(vec![PoolSpec { policy, ..spec("chat") }]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, |s| s.replicas[0].generation.0 == 3).await;
    let at = node.engines.launches();
    assert!(at[1].0 - at[0].0 >= s(40), "{:?}", at[1].0 - at[0].0);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_that_may_leave_something_says_so() {
    let node = FakeNode::default();
    node.engines.script(|s| {
        s.leaves_child = true;
        s.killable = false;
    });
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let began = Instant::now();
    assert!(!m.shutdown(Duration::from_secs(600)).await);
    assert!(began.elapsed() < Duration::from_secs(60), "what is fenced is not waited for: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_until_the_handoff_is_withdrawn() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    sleep(Duration::from_millis(1)).await;
    node.ledger.set_slow(Duration::from_secs(3));
    assert!(m.shutdown(Duration::from_secs(600)).await);
    assert!(node.ledger.handoffs().is_empty());
}
