//! How a Ready engine is watched: whole nodes of fakes on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::lifecycle::HealthPolicy;
use pool_domain::{FailureClass, PoolId};
use pool_services::ports::Up;
use pool_services::{PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);
const SECOND: Duration = Duration::from_secs(1);

fn watched(change: impl FnOnce(&mut HealthPolicy)) -> PoolSpec {
    let mut spec = spec("chat");
    change(&mut spec.policy.health);
    spec
}

async fn ready(node: &FakeNode, spec: PoolSpec) -> (PoolManager, PoolId) {
    let (m, _events) = node.manage(vec![spec]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    (m, id)
}

/// How long until the engine is ended, which has to be for a hang and whole; it comes back once it is well.
async fn ended_for_a_hang(node: &FakeNode, m: &PoolManager, id: &PoolId) -> (Duration, String) {
    let (began, generation) = (Instant::now(), m.pool(id).await.unwrap().replicas[0].generation);
    let ended = until(m, id, |s| s.last_error().is_some() && !s.live()).await;
    let took = began.elapsed();
    let error = ended.last_error().unwrap().clone();
    assert_eq!(error.class, FailureClass::Hang, "{error:?}");
    assert!(node.engines.signals().1 > 0, "killed, not asked");
    node.engines.script(|s| (s.decodes, s.progresses, s.tells, s.busy) = (true, true, true, Some(0)));
    let back = until(m, id, PoolSnapshot::ready).await;
    assert_eq!((back.replicas[0].restart_count, back.replicas[0].generation > generation), (1, true));
    (took, error.detail)
}

#[tokio::test(start_paused = true)]
async fn a_hang_while_idle_is_seen_within_45_s() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, spec("chat")).await;
    tokio::time::sleep(Duration::from_millis(10_001)).await;
    node.engines.script(|s| s.decodes = false);
    let (took, said) = ended_for_a_hang(&node, &m, &id).await;
    assert!(took <= 45 * SECOND && said.contains("does not decode"), "{took:?}: {said}");
}

#[tokio::test(start_paused = true)]
async fn a_hang_while_busy_is_seen_within_45_s_and_says_what_stood_still() {
    for coarse in [false, true] {
        let node = FakeNode::default();
        let (m, id) = ready(&node, watched(|h| h.busy_stall = 100 * SECOND)).await;
        let (_lease, _guard) = m.allocate_lease(&id).unwrap();
        node.engines.script(|s| (s.busy, s.coarse) = (Some(2), coarse));
        tokio::time::sleep(Duration::from_millis(30_001)).await;
        node.engines.script(|s| s.progresses = false);
        let (took, said) = ended_for_a_hang(&node, &m, &id).await;
        let limit = if coarse { 115 } else { 45 };
        assert!(took <= limit * SECOND, "{took:?}");
        assert!(said.starts_with("2 running and 0 waiting requests got no token and no prompt progress for"), "{said}");
        assert!(!coarse || took > 70 * SECOND, "a long prompt has its time: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_no_longer_answers_about_a_lease_s_work_hangs() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, spec("chat")).await;
    let (_lease, _guard) = m.allocate_lease(&id).unwrap();
    node.engines.script(|s| s.busy = Some(1));
    tokio::time::sleep(25 * SECOND).await;
    node.engines.script(|s| s.tells = false);
    let (took, _) = ended_for_a_hang(&node, &m, &id).await;
    assert!(took <= 45 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn busy_is_not_dead_and_too_much_to_do_is_no_failure() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, spec("chat")).await;
    let (_lease, _guard) = m.allocate_lease(&id).unwrap();
    // It would not decode for us, but it does for others, and says that it has no room.
    node.engines.script(|s| {
        s.busy = Some(4);
        (s.decodes, s.declines) = (false, true);
        s.health = Some(Up::Overloaded("/health answers 503: no slot".into()));
    });
    let (asked, _) = node.engines.worked();
    tokio::time::sleep(LONG).await;
    let well = m.pool(&id).await.unwrap();
    assert!(well.ready() && well.replicas[0].consecutive_failures == 0, "{well:?}");
    assert_eq!(node.engines.worked().0, asked, "who is busy is not asked to work");
    // The same words without work are an illness.
    node.engines.script(|s| s.busy = Some(0));
    let ended = until(&m, &id, |s| s.last_error().is_some()).await;
    assert_eq!(ended.last_error().unwrap().class, FailureClass::Health);
}

#[tokio::test(start_paused = true)]
async fn a_canary_holds_no_slot_and_a_lease_that_comes_goes_first() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, spec("chat")).await;
    // Ten seconds after Ready it is asked to work, which takes three.
    node.engines.script(|s| s.work_takes = 3 * SECOND);
    let before = node.engines.worked();
    tokio::time::sleep(Duration::from_millis(11_500)).await;
    let (asked, done) = node.engines.worked();
    assert_eq!((asked, done), (before.0 + 1, before.1), "it is at it");
    let leases: Vec<_> = (0..4).map(|_| m.allocate_lease(&id).unwrap()).collect();
    tokio::time::sleep(5 * SECOND).await;
    assert_eq!(node.engines.worked(), (asked, done), "the question was taken back");
    // And none is asked while they are held.
    tokio::time::sleep(100 * SECOND).await;
    assert_eq!(node.engines.worked(), (asked, done));
    drop(leases);
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(node.engines.worked(), (asked + 1, done + 1));
    assert_eq!(m.pool(&id).await.unwrap().replicas[0].consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn without_a_canary_an_idle_engine_is_not_asked_to_work() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, watched(|h| h.canary = false)).await;
    node.engines.script(|s| s.decodes = false);
    let before = node.engines.worked();
    tokio::time::sleep(LONG).await;
    assert!(m.pool(&id).await.unwrap().ready());
    assert_eq!(node.engines.worked(), before);
}

#[tokio::test(start_paused = true)]
async fn interval_timeout_and_failures_decide_when() {
    let of = |interval, timeout, failures| {
        watched(|h| (h.interval, h.timeout, h.failures) = (interval * SECOND, timeout * SECOND, failures))
    };
    for (interval, timeout, failures) in [(2, 1, 2), (10, 5, 6), (60, 30, 2)] {
        let node = FakeNode::default();
        let (m, id) = ready(&node, of(interval, timeout, failures)).await;
        node.engines.script(|s| s.decodes = false);
        let (took, _) = ended_for_a_hang(&node, &m, &id).await;
        let expected = interval * failures * SECOND + timeout * SECOND;
        assert!(took <= expected && took + interval * SECOND >= expected, "{took:?} of {expected:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_seen_of_one_generation_counts_for_no_other() {
    let node = FakeNode::default();
    let (m, id) = ready(&node, spec("chat")).await;
    node.engines.script(|s| (s.busy, s.progresses) = (Some(1), false));
    // Two misses in, it dies of something else.
    until(&m, &id, |s| s.replicas[0].consecutive_failures == 2).await;
    node.engines.crash_all();
    let crashed = until(&m, &id, |s| s.last_error().is_some()).await;
    assert_eq!(crashed.last_error().unwrap().class.code(), "crash");
    let back = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!(back.replicas[0].consecutive_failures, 0);
    let began = Instant::now();
    until(&m, &id, |s| s.replicas[0].consecutive_failures > 0).await;
    assert!(began.elapsed() >= 20 * SECOND, "its first sight shows nothing: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn slow_health_within_its_timeout_and_an_engine_that_does_not_say_how_busy_it_is_are_well() {
    let node = FakeNode::default();
    node.engines.script(|s| s.health_takes = Duration::from_secs(3));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    // Perhaps it works for somebody else, and so long: nobody can tell.
    node.engines.script(|s| {
        s.busy = None;
        s.decodes = false;
    });
    tokio::time::sleep(LONG).await;
    let well = m.pool(&id).await.unwrap();
    assert!(well.ready() && well.last_error().is_none(), "{well:?}");
}
