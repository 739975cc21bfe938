//! Who gives way when memory is short, who does not, and in which order starts get theirs; on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pool_domain::failure::Exit;
use pool_domain::rollout::Strategy;
use pool_domain::{Failure, FailureClass, PoolId};
use pool_services::LeaseRequest;
use pool_services::control::ReloadRequest;
use pool_services::{
    Activation, ControlError, Event, EventKind, OperationState, PoolControl, PoolManager, PoolSnapshot, PoolSpec,
};
use pool_testkit::{FakeGpus, FakeNode, gpu, spec, until};
use tokio::sync::mpsc;
use tokio::time::Instant;

const GIB: u64 = 1 << 30;
const TTL: Duration = Duration::from_secs(30);

/// One GPU of 16 GiB, and engines that have to be killed, which takes two seconds.
fn small() -> FakeNode {
    let node = FakeNode { gpus: Arc::new(FakeGpus::with(vec![gpu(0, 16 * GIB)])), ..FakeNode::default() };
    node.engines.script(|s| s.obeys_term = false);
    node
}

/// 12 GiB, when somebody asks.
fn large(id: &str) -> PoolSpec {
    PoolSpec { activation: Activation::OnDemand, vram: Some(12 * GIB), ..spec(id) }
}

fn id(id: &str) -> PoolId {
    id.parse().unwrap()
}

fn state(s: &PoolSnapshot) -> &'static str {
    s.replicas[0].state
}

fn waits(s: &PoolSnapshot) -> bool {
    s.replicas[0].reason_code == "vram"
}

/// Asks until there is a lease, as somebody would that waits; never more than one engine is there meanwhile.
async fn lease(node: &FakeNode, m: &PoolManager, pool: &PoolId) -> String {
    let end = Instant::now() + Duration::from_secs(600);
    loop {
        assert!(node.engines.running().len() <= 1, "both are resident");
        match m.lease(pool, LeaseRequest::lasting(TTL)).await {
            Ok(lease) => return lease.id,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn told(events: &mut mpsc::Receiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

fn count(events: &[Event], code: &str) -> usize {
    events.iter().filter(|e| e.code() == code).count()
}

/// Both pools, `a` Ready for longer than it needs to be.
async fn settled(node: &FakeNode) -> (PoolManager, mpsc::Receiver<Event>) {
    let (m, events) = node.manage(vec![large("a"), large("b")]).await;
    let held = lease(node, &m, &id("a")).await;
    m.release(&held).await.unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;
    (m, events)
}

#[tokio::test(start_paused = true)]
async fn the_idle_one_gives_way_by_a_plan_that_is_shown() {
    let node = small();
    let (m, mut events) = settled(&node).await;
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    let waiting = until(&m, &id("b"), waits).await;
    let reason = &waiting.replicas[0].reason;
    assert!(reason.contains("GPU 0 has 4.0 GiB left of the 12.0 GiB needed"), "{reason}");
    assert!(reason.contains("`a` gives way, idle, with 12.0 GiB"), "{reason}");
    until(&m, &id("b"), PoolSnapshot::ready).await;
    let gone = m.pool(&id("a")).await.unwrap();
    assert_eq!((state(&gone), gone.hold, node.engines.running().len()), ("idle", false, 1));
    let told = told(&mut events);
    assert_eq!((count(&told, "eviction_planned"), count(&told, "evicted"), count(&told, "brought_back")), (1, 1, 0));
    let plan = told.iter().find(|e| e.code() == "eviction_planned").unwrap();
    assert_eq!(plan.human(), "The a pool gives way to the b pool");
    assert!(matches!(&plan.kind, EventKind::EvictionPlanned { pools, .. } if pools == &["a"]));
}

#[tokio::test(start_paused = true)]
async fn requests_that_alternate_swap_the_two_and_each_waits_once() {
    let node = small();
    let (m, mut events) = node.manage(vec![large("a"), large("b")]).await;
    let evicted = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&evicted);
    tokio::spawn(async move {
        while let Some(e) = events.recv().await {
            counted.fetch_add(usize::from(e.code() == "evicted"), Ordering::Relaxed);
        }
    });
    let began = Instant::now();
    for round in 0..10 {
        let held = lease(&node, &m, &id(if round % 2 == 0 { "a" } else { "b" })).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        m.release(&held).await.unwrap();
    }
    assert_eq!(node.engines.launches().len(), 10, "one start for each request");
    assert_eq!(evicted.load(Ordering::Relaxed), 9);
    // Nobody is evicted within a minute of its start.
    let swaps = began.elapsed().as_secs();
    assert!((9 * 60..10 * 60).contains(&swaps), "{swaps}");
}

#[tokio::test(start_paused = true)]
async fn a_busy_one_stays_and_says_so_and_goes_once_it_is_not() {
    let node = small();
    let (m, _events) = settled(&node).await;
    let (_, guard) = m.allocate_lease(&id("a")).unwrap();
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    let waiting = until(&m, &id("b"), waits).await;
    assert!(waiting.replicas[0].reason.contains("`a` stays: it is busy"), "{waiting:?}");
    tokio::time::sleep(Duration::from_secs(300)).await;
    let Err(ControlError::InsufficientVram { detail, .. }) = m.lease(&id("b"), LeaseRequest::lasting(TTL)).await else {
        panic!("it fits")
    };
    assert!(detail.contains("busy"), "{detail}");
    assert!(guard.valid() && m.pool(&id("a")).await.unwrap().ready());
    drop(guard);
    let freed = Instant::now();
    until(&m, &id("b"), PoolSnapshot::ready).await;
    assert!(freed.elapsed() < Duration::from_secs(5), "{:?}", freed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn pinned_preloaded_and_young_ones_stay_and_time_is_told() {
    for (first, why) in [
        (PoolSpec { pin: true, ..large("a") }, "its pool is pinned"),
        (PoolSpec { activation: Activation::Preload, ..large("a") }, "it is preloaded"),
        (large("a"), "it became ready only a moment ago"),
    ] {
        let node = small();
        let (m, _events) = node.manage(vec![first, large("b")]).await;
        let held = lease(&node, &m, &id("a")).await;
        m.release(&held).await.unwrap();
        let young = why.contains("moment");
        if !young {
            tokio::time::sleep(Duration::from_secs(120)).await;
        }
        assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
        let waiting = until(&m, &id("b"), waits).await;
        let r = &waiting.replicas[0];
        assert!(r.reason.contains(&format!("`a` stays: {why}")), "{}", r.reason);
        assert_eq!(m.pool(&id("b")).await.unwrap().replicas[0].next_start_in_ms.is_some(), young);
        let began = Instant::now();
        if young {
            until(&m, &id("b"), PoolSnapshot::ready).await;
            assert!((55..65).contains(&began.elapsed().as_secs()));
        } else {
            tokio::time::sleep(Duration::from_secs(600)).await;
            assert!(waits(&m.pool(&id("b")).await.unwrap()) && m.pool(&id("a")).await.unwrap().ready());
        }
    }
}

/// Between the wish and its victim's driver there are a few turns of the runtime: a lease that comes in at any of them is
/// honoured, or refused.
#[tokio::test(start_paused = true)]
async fn one_that_got_a_lease_in_the_meantime_is_not_evicted() {
    let (mut honoured, mut refused) = (0, 0);
    for turns in 0..60 {
        let node = small();
        let (m, _events) = settled(&node).await;
        let asking = tokio::spawn({
            let m = m.clone();
            async move { m.lease(&id("b"), LeaseRequest::lasting(TTL)).await }
        });
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        let guard = m.allocate_lease(&id("a")).map(|(_, guard)| guard);
        assert!(asking.await.unwrap().is_err());
        tokio::time::sleep(Duration::from_secs(20)).await;
        let (a, b) = (m.pool(&id("a")).await.unwrap(), m.pool(&id("b")).await.unwrap());
        if let Ok(guard) = guard {
            honoured += 1;
            assert!(guard.valid() && a.ready(), "{a:?}");
            assert!(b.replicas[0].reason.contains("`a` stays: it is busy"), "{b:?}");
            drop(guard);
            until(&m, &id("b"), PoolSnapshot::ready).await;
        } else {
            refused += 1;
            assert!(b.ready() && !a.live(), "{b:?}");
        }
    }
    assert!(honoured > 0 && refused > 0, "{honoured} {refused}");
}

#[tokio::test(start_paused = true)]
async fn what_gave_way_comes_back_if_the_new_one_fails() {
    let node = small();
    let (m, mut events) = settled(&node).await;
    // Long enough to make engines well again between the two.
    node.models.set_slow(Duration::from_secs(1));
    node.engines.script(|s| s.launch = Some(Failure::new(FailureClass::Artifact, "no model inside")));
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), |s| state(s) == "failed").await;
    node.engines.script(|s| s.launch = None);
    until(&m, &id("a"), PoolSnapshot::ready).await;
    let told = told(&mut events);
    assert_eq!((count(&told, "evicted"), count(&told, "brought_back")), (1, 1));
    assert_eq!(state(&m.pool(&id("b")).await.unwrap()), "failed");
}

#[tokio::test(start_paused = true)]
async fn a_new_one_that_keeps_crashing_costs_the_old_one_its_place_at_most_once_a_minute() {
    let node = small();
    let (m, mut events) = settled(&node).await;
    // Engines that are there live on; those to come die.
    // Long enough to make engines well again between the two.
    node.models.set_slow(Duration::from_secs(1));
    node.engines.script(|s| s.launch = Some(Failure::crash(Exit::Code(1))));
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), |s| s.last_error().is_some()).await;
    node.engines.script(|s| s.launch = None);
    until(&m, &id("a"), PoolSnapshot::ready).await;
    assert_eq!(count(&told(&mut events), "brought_back"), 1);
    let again = Instant::now();
    until(&m, &id("b"), PoolSnapshot::ready).await;
    assert!((55..65).contains(&again.elapsed().as_secs()), "{:?}", again.elapsed());
}

#[tokio::test(start_paused = true)]
async fn two_that_wait_for_the_same_memory_get_it_in_the_order_of_their_coming() {
    let node = small();
    let (m, mut events) = node.manage(vec![large("a"), large("b"), large("z")]).await;
    let held = lease(&node, &m, &id("b")).await;
    m.release(&held).await.unwrap();
    assert!(m.lease(&id("z"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("z"), waits).await;
    assert!(m.lease(&id("a"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("a"), waits).await;
    until(&m, &id("z"), PoolSnapshot::ready).await;
    assert!(waits(&m.pool(&id("a")).await.unwrap()), "it came later");
    let since = Instant::now();
    until(&m, &id("a"), PoolSnapshot::ready).await;
    assert!((55..65).contains(&since.elapsed().as_secs()), "no ping-pong: {:?}", since.elapsed());
    assert_eq!(count(&told(&mut events), "evicted"), 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_for_one_nobody_else_gets() {
    let node = small();
    let little = PoolSpec { vram: Some(5 * GIB), activation: Activation::OnDemand, ..spec("aa") };
    let (m, _events) = node.manage(vec![large("a"), little, large("b")]).await;
    let held = lease(&node, &m, &id("a")).await;
    m.release(&held).await.unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;
    // Its model takes a while: in the meantime its memory is free, and somebody smaller comes by.
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), waits).await;
    node.models.set_slow(Duration::from_secs(20));
    until(&m, &id("a"), |s| state(s) == "idle").await;
    assert!(m.lease(&id("aa"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), PoolSnapshot::ready).await;
    assert!(!m.pool(&id("aa")).await.unwrap().live());
}

#[tokio::test(start_paused = true)]
async fn a_drain_of_the_starter_calls_it_off_and_brings_the_other_back() {
    let node = small();
    let (m, _events) = settled(&node).await;
    node.engines.script(|s| s.load = Duration::from_secs(20));
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), |s| state(s) == "starting").await;
    m.stop(&id("b")).await.unwrap();
    until(&m, &id("a"), PoolSnapshot::ready).await;
    assert_eq!(state(&m.pool(&id("b")).await.unwrap()), "idle");
}

#[tokio::test(start_paused = true)]
async fn the_memory_of_a_pool_that_is_reloaded_in_place_goes_to_nobody_who_waits() {
    let node = small();
    let a = PoolSpec { activation: Activation::Preload, ..large("a") };
    let (m, _events) = node.manage(vec![a.clone(), large("b")]).await;
    until(&m, &id("a"), PoolSnapshot::ready).await;
    assert!(m.lease(&id("b"), LeaseRequest::lasting(TTL)).await.is_err());
    until(&m, &id("b"), waits).await;
    // Longer than it takes to start the one that waits.
    node.models.set_slow(Duration::from_secs(20));
    let other = PoolSpec { model: "stub:other".parse().unwrap(), ..a };
    let request = ReloadRequest {
        declared: Some((other, "new".into())),
        strategy: Some(Strategy::InPlace),
        ..ReloadRequest::default()
    };
    let begun = m.reload(&id("a"), request).await.unwrap();
    let ended = m.wait_operation(&begun.id, Duration::from_secs(3_600)).await.unwrap();
    assert_eq!(ended.state, OperationState::Succeeded("reloaded".into()));
    assert!(waits(&m.pool(&id("b")).await.unwrap()) && m.pool(&id("a")).await.unwrap().ready());
}

#[tokio::test(start_paused = true)]
async fn never_more_than_there_is_whoever_asks_in_whatever_order() {
    for seed in 0..40u64 {
        let node = small();
        let pools = ["a", "b", "c", "d"];
        let sizes = [12, 9, 5, 3];
        let specs = pools.iter().zip(sizes).map(|(p, gib)| PoolSpec {
            vram: Some(gib * GIB),
            idle_ttl: (seed % 3 == 0).then_some(Duration::from_secs(90)),
            ..large(p)
        });
        let (m, _events) = node.manage(specs.collect()).await;
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut guards = Vec::new();
        for _ in 0..60 {
            let pool = id(pools[rng.usize(0..4)]);
            match rng.u32(0..4) {
                0 | 1 => drop(m.lease(&pool, LeaseRequest::lasting(Duration::from_secs(5))).await),
                2 => guards.extend(m.allocate_lease(&pool).ok().map(|(_, guard)| guard)),
                _ => guards.clear(),
            }
            assert!(
                guards.iter().all(pool_services::admission::SlotGuard::valid),
                "a lease was cut off by an eviction"
            );
            tokio::time::sleep(Duration::from_millis(rng.u64(1..40_000))).await;
            let promised = m.node().await.unwrap().devices[0].1;
            assert!(promised <= 16 * GIB, "{promised}");
        }
        guards.clear();
        // Whoever is asked for in the end gets its turn.
        for pool in pools {
            assert!(
                m.lease(&id(pool), LeaseRequest::lasting(Duration::from_secs(1))).await.is_ok() || {
                    until(&m, &id(pool), PoolSnapshot::ready).await;
                    true
                }
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_that_gave_way_come_back_when_somebody_waits_for_a_slot() {
    let node = small();
    let two = PoolSpec { replicas: 2, slots: 1, vram: Some(6 * GIB), ..large("a") };
    let (m, _events) = node.manage(vec![two, PoolSpec { vram: Some(9 * GIB), ..large("b") }]).await;
    m.preload(&id("a")).await.unwrap();
    until(&m, &id("a"), |s| s.ready_replicas() == 2).await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    m.preload(&id("b")).await.unwrap();
    until(&m, &id("b"), PoolSnapshot::ready).await;
    assert_eq!(m.pool(&id("a")).await.unwrap().ready_replicas(), 1, "one of them gave way");
    tokio::time::sleep(Duration::from_secs(61)).await;
    let mut held = Vec::new();
    while let Ok(granted) = m.allocate_lease(&id("a")) {
        held.push(granted);
    }
    assert!(!held.is_empty());
    // Every slot is held for ever, so this one is of the replica that comes back.
    let began = Instant::now();
    let lease = m.lease(&id("a"), LeaseRequest::lasting(TTL).waiting(TTL)).await.unwrap();
    assert!(began.elapsed() < TTL && held.iter().all(|(key, _)| key.replica != lease.replica_id));
}
