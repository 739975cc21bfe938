//! What the simulation found, each as a test of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::lifecycle::Policy;
use pool_domain::{BackoffPolicy, BreakerPolicy, PoolId};
use pool_services::ports::{Phase, StateLedger};
use pool_services::{Activation, DrainOptions, LeaseRequest, PoolControl, PoolSnapshot, PoolSpec, ReloadRequest};
use pool_testkit::{FakeNode, gpu, spec, until};
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

/// The replica is no more when the disk is well again.
#[tokio::test(start_paused = true)]
async fn the_handoff_of_a_replica_that_was_replaced_ends_once_the_disk_takes_it() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    let form = PoolSpec { model: "stub:other".parse().unwrap(), ..spec("chat") };
    let declared = Some((form, "other".to_owned()));
    let strategy = Some(pool_domain::rollout::Strategy::Overlap);
    m.reload(&id, ReloadRequest { declared, strategy, ..ReloadRequest::default() }).await.unwrap();
    until(&m, &id, |s| s.model_id == "other" && s.ready()).await;
    sleep(Duration::from_millis(100)).await;
    node.ledger.set_broken(true);
    drop(guard);
    sleep(Duration::from_secs(60)).await;
    assert_eq!((node.engines.running().len(), node.ledger.handoffs().len()), (1, 2));
    node.ledger.set_broken(false);
    sleep(Duration::from_secs(3)).await;
    let left: Vec<_> = node.ledger.handoffs().into_iter().map(|h| h.model).collect();
    assert_eq!(left, ["other"]);
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

const LONG: Duration = Duration::from_secs(3_600);

fn id() -> PoolId {
    "chat".parse().unwrap()
}

/// A daemon that had its one pool Ready and left it so.
async fn ready_and_left(node: &FakeNode) {
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    assert!(m.leave(LONG).await);
}

#[tokio::test(start_paused = true)]
async fn a_handoff_that_was_written_though_the_disk_said_no_is_withdrawn() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(10));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::live).await;
    node.ledger.set_lying(true);
    node.ledger.set_broken(true);
    until(&m, &id(), PoolSnapshot::ready).await;
    sleep(Duration::from_millis(1)).await;
    assert_eq!(node.ledger.handoffs().len(), 1);
    node.ledger.set_broken(false);
    assert!(m.shutdown(LONG).await);
    assert!(node.ledger.handoffs().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_does_not_say_how_busy_it_is_is_not_ended_because_a_new_daemon_cannot_ask_it() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.engines.script(|s| (s.decodes, s.busy) = (false, None));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!((node.engines.launches().len(), node.engines.signals()), (1, (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_became_idle_just_as_time_was_up_is_asked_once_more() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.engines.script(|s| s.decodes = false);
    let health = Policy::default().health;
    let patience = health.timeout * health.failures;
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    sleep(patience - Duration::from_millis(1)).await;
    assert!(!m.pool(&id()).await.unwrap().ready());
    node.engines.script(|s| s.decodes = true);
    until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!(node.engines.launches().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_held_pool_stays_down_also_if_its_engine_dies_while_it_is_being_adopted() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.ledger.set_hold(&id(), true).await.unwrap();
    node.engines.script(|s| s.decodes = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    sleep(Duration::from_secs(1)).await;
    node.engines.crash_all();
    node.engines.script(|s| s.decodes = true);
    sleep(LONG).await;
    assert_eq!((m.pool(&id()).await.unwrap().replicas[0].state, node.engines.launches().len()), ("idle", 1));
}

#[tokio::test(start_paused = true)]
async fn a_held_pool_stays_down_also_if_its_engine_is_not_what_it_was() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.ledger.set_hold(&id(), true).await.unwrap();
    let (m, _events) = node.manage(vec![PoolSpec { slots: 9, ..spec("chat") }]).await;
    sleep(LONG).await;
    assert_eq!((m.pool(&id()).await.unwrap().replicas[0].state, node.engines.launches().len()), ("idle", 1));
    assert!(node.engines.running().is_empty());
}

/// A drain with a lease that does not end, and a daemon that goes during it.
async fn draining_and_left(node: &FakeNode, deadline: Duration) {
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    let (_, _lease) = m.allocate_lease(&id()).unwrap();
    m.drain(&id(), DrainOptions { deadline: Some(deadline), on_deadline: None }).await.unwrap();
    until(&m, &id(), |s| s.replicas[0].state == "draining").await;
    assert!(m.leave(LONG).await);
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_in_time_though_the_next_daemon_gets_no_answer() {
    let node = FakeNode::default();
    let began = Instant::now();
    draining_and_left(&node, Duration::from_secs(5)).await;
    node.engines.script(|s| (s.decodes, s.busy) = (false, Some(4)));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), |s| s.replicas[0].state == "idle").await;
    assert!(began.elapsed() <= Duration::from_secs(7), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_in_time_though_the_next_daemon_asks_once_more() {
    let node = FakeNode::default();
    let health = Policy::default().health;
    let deadline = health.timeout * health.failures + Duration::from_secs(1);
    let began = Instant::now();
    draining_and_left(&node, deadline).await;
    // Idle, and so asked again when the first time is up.
    node.engines.script(|s| s.decodes = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), |s| s.replicas[0].state == "idle").await;
    assert!(began.elapsed() <= deadline + Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_resume_during_the_adoption_calls_the_drain_off() {
    let node = FakeNode::default();
    draining_and_left(&node, Duration::from_secs(60)).await;
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    m.resume(&id()).await.unwrap();
    sleep(LONG).await;
    assert!(m.pool(&id()).await.unwrap().ready());
    assert_eq!(node.engines.launches().len(), 1);
}

/// It starts as soon as nothing is left, which may be in the middle of the reload.
#[tokio::test(start_paused = true)]
async fn a_pool_that_waits_for_a_fence_is_not_reloaded_as_if_it_slept() {
    let node = FakeNode::default();
    node.engines.script(|s| (s.leaves_child, s.killable) = (true, false));
    let pool =
        |model: &str| PoolSpec { model: model.parse().unwrap(), activation: Activation::OnDemand, ..spec("chat") };
    let (m, _events) = node.manage(vec![pool("stub:tiny")]).await;
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
    m.stop(&id()).await.unwrap();
    until(&m, &id(), |s| s.replicas[0].state == "fenced").await;
    m.preload(&id()).await.unwrap();
    node.engines.script(|s| (s.leaves_child, s.killable) = (false, true));
    let declared = Some((pool("stub:other"), "other".to_owned()));
    node.models.set_slow(Duration::from_secs(6));
    let operation = m.reload(&id(), ReloadRequest { declared, ..ReloadRequest::default() }).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    node.engines.leftovers_end();
    m.wait_operation(&operation.id, LONG).await.unwrap();
    sleep(Duration::from_secs(60)).await;
    let s = until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!(node.engines.models(), [s.model_id]);
}

/// Nor is it taken for Ready because the time of the drain that was called off is up.
#[tokio::test(start_paused = true)]
async fn a_resume_during_the_adoption_leaves_the_proof_its_time() {
    let node = FakeNode::default();
    draining_and_left(&node, Duration::from_secs(8)).await;
    node.engines.script(|s| s.decodes = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    m.resume(&id()).await.unwrap();
    sleep(Duration::from_secs(12)).await;
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].state, "adopting", "it has proved nothing yet");
    node.engines.script(|s| s.decodes = true);
    until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!(node.engines.launches().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_an_engine_had_that_is_gone_is_not_promised_any_more() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.engines.crash_all();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    assert_eq!(m.node().await.unwrap().devices.iter().map(|(_, promised)| promised).sum::<u64>(), 0);
    until(&m, &id(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_fence_outlives_the_daemon() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices = vec![gpu(0, 24 << 30)]);
    node.engines.script(|s| (s.leaves_child, s.killable) = (true, false));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    node.engines.crash_all();
    until(&m, &id(), |s| s.replicas[0].state == "fenced").await;
    assert!(m.leave(LONG).await);
    node.engines.script(|s| (s.leaves_child, s.killable) = (false, true));
    let (m, _events) = node.manage(vec![spec("a"), spec("chat")]).await;
    let newcomer: PoolId = "a".parse().unwrap();
    sleep(LONG).await;
    assert_eq!(m.pool(&newcomer).await.unwrap().replicas[0].reason_code, "devices");
    assert_eq!(node.engines.launches().len(), 1, "not for a moment");
    node.engines.leftovers_end();
    until(&m, &newcomer, PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_also_waits_for_an_engine_that_nobody_wants_any_more() {
    let node = FakeNode::default();
    node.engines.script(|s| s.obeys_term = false);
    ready_and_left(&node).await;
    let (m, _events) = node.manage(vec![]).await;
    assert!(m.shutdown(LONG).await);
    assert!(node.engines.running().is_empty() && node.ledger.recorded().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_gives_the_requests_of_an_engine_that_nobody_wants_no_more_time_than_others() {
    let node = FakeNode::default();
    draining_and_left(&node, LONG).await;
    node.engines.script(|s| s.busy = Some(1));
    let (m, _events) = node.manage(vec![]).await;
    let began = Instant::now();
    assert!(m.shutdown(LONG).await);
    assert!(node.engines.running().is_empty());
    assert!(began.elapsed() <= Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_says_that_an_engine_that_nobody_wants_may_be_left_and_does_not_wait_for_it() {
    let node = FakeNode::default();
    node.engines.script(|s| (s.leaves_child, s.killable) = (true, false));
    ready_and_left(&node).await;
    let (m, _events) = node.manage(vec![]).await;
    let began = Instant::now();
    assert!(!m.shutdown(Duration::from_secs(600)).await);
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_nobody_wants_is_killed_when_the_time_for_an_orderly_end_is_up() {
    let node = FakeNode::default();
    node.engines.script(|s| s.obeys_term = false);
    ready_and_left(&node).await;
    let (m, _events) = node.manage(vec![]).await;
    assert!(!m.shutdown(Duration::from_millis(100)).await);
    assert!(node.engines.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_stands_where_an_engine_was_recorded_is_not_shown_as_its_process() {
    for phase in [None, Some(Phase::Starting), Some(Phase::Stopping)] {
        let node = FakeNode::default();
        ready_and_left(&node).await;
        node.ledger.tamper(|records| {
            for r in records.values_mut() {
                r.nonce = "another".into();
                r.phase = phase.clone().unwrap_or(r.phase.clone());
            }
        });
        let (m, _events) = node.manage(vec![spec("chat")]).await;
        until(&m, &id(), |p| {
            assert!(!p.live(), "{phase:?}: {p:#?}");
            p.replicas[0].state == "fenced"
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_of_before_keeps_its_slot_though_a_newer_lease_is_idle() {
    let node = FakeNode::default();
    ready_and_left(&node).await;
    node.engines.script(|s| s.busy = Some(1));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let leases = async || m.pool(&id()).await.unwrap().replicas[0].active_leases;
    until(&m, &id(), PoolSnapshot::ready).await;
    sleep(Duration::from_secs(12)).await;
    let lease = m.lease(&id(), LeaseRequest::lasting(Duration::from_secs(60))).await.unwrap();
    sleep(Duration::from_secs(5)).await;
    assert_eq!(leases().await, 2, "the one request may be anybody's");
    m.release(&lease.id).await.unwrap();
    assert_eq!(leases().await, 1);
    node.engines.script(|s| s.busy = Some(0));
    sleep(Duration::from_secs(2)).await;
    assert_eq!(leases().await, 0);
}
