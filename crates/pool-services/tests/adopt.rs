//! A daemon goes and another comes: what happens to the engines.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::{FailureClass, Generation, PoolId};
use pool_services::ports::{Phase, StateLedger};
use pool_services::{Activation, DrainOptions, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, gpu, spec};

const LONG: Duration = Duration::from_secs(3_600);

async fn until(m: &PoolManager, id: &PoolId, wanted: impl Fn(&PoolSnapshot) -> bool) -> PoolSnapshot {
    let mut pool = m.pool(id).await.unwrap();
    let end = tokio::time::Instant::now() + LONG;
    while !wanted(&pool) {
        assert!(tokio::time::Instant::now() < end, "never came: {pool:#?}");
        pool = m.wait_pool(id, pool.snapshot, Duration::from_secs(1)).await.unwrap();
    }
    pool
}

fn id() -> PoolId {
    "chat".parse().unwrap()
}

fn state(pool: &PoolSnapshot) -> &'static str {
    pool.replicas[0].state
}

/// A daemon that was Ready and is no more.
async fn ready_and_left(node: &FakeNode, spec: PoolSpec) -> PoolSnapshot {
    let (m, _events) = node.manage(vec![spec]).await;
    let ready = until(&m, &id(), PoolSnapshot::ready).await;
    assert!(m.leave(LONG).await);
    ready
}

#[tokio::test(start_paused = true)]
async fn a_ready_engine_comes_back_without_a_launch_with_all_it_had() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices = vec![gpu(0, 10 << 30)]);
    let big = |id: &str| PoolSpec { vram: Some(6 << 30), ..spec(id) };
    let before = ready_and_left(&node, big("chat")).await;
    assert_eq!((node.engines.running().len(), node.engines.signals()), (1, (0, 0)), "nobody ended it");
    assert_eq!(node.ledger.handoffs().len(), 1, "consumers are still told of it");
    tokio::time::sleep(LONG).await;

    // The other pool comes first and wants the same bytes.
    let (m, _events) = node.manage(vec![big("a"), big("chat")]).await;
    assert_eq!(m.node().await.unwrap().devices[0].1, 6 << 30, "its reservation stands before anything is granted");
    let after = until(&m, &id(), PoolSnapshot::ready).await;
    let (before, after) = (&before.replicas[0], &after.replicas[0]);
    assert_eq!(
        (after.generation, after.pid, &after.endpoint, after.vram_reserved, after.slots_total),
        (before.generation, before.pid, &before.endpoint, before.vram_reserved, before.slots_total)
    );
    assert_eq!((after.restart_count, after.last_error.is_none()), (0, true));
    tokio::time::sleep(LONG).await;
    assert_eq!(m.pool(&"a".parse().unwrap()).await.unwrap().replicas[0].reason_code, "vram");
    assert_eq!(node.engines.launches().len(), 1);
    assert!(m.allocate_lease(&id()).is_ok());
    assert!(m.shutdown(LONG).await);
    assert!(node.engines.running().is_empty() && node.ledger.recorded().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_unfinished_start_proves_what_it_did_not() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(60));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), |p| p.replicas[0].live).await;
    assert!(m.leave(LONG).await);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let starting = until(&m, &id(), |p| state(p) == "starting").await;
    assert_eq!(starting.replicas[0].generation, Generation(1));
    let ready = until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!((ready.replicas[0].generation, node.engines.launches().len()), (Generation(1), 1));
    // It may have been Ready, and leased, for a moment that nobody wrote down.
    assert!(m.allocate_lease(&id()).is_err());
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(m.allocate_lease(&id()).is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_exit_while_nobody_looked_is_a_crash_and_then_there_is_one_new_generation() {
    let node = FakeNode::default();
    ready_and_left(&node, spec("chat")).await;
    node.engines.crash_all();
    let (m, mut events) = node.manage(vec![spec("chat")]).await;
    let back = until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!((back.replicas[0].generation, back.replicas[0].restart_count), (Generation(2), 1));
    assert!(matches!(back.replicas[0].last_error.as_ref().unwrap().class, FailureClass::Crash(_)));
    assert_eq!((back.replicas[0].backoff_failures, node.engines.running().len()), (1, 1));
    assert!(
        std::iter::from_fn(|| events.try_recv().ok()).any(|e| e.kind.clone() == pool_services::EventKind::Restarting)
    );
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_told_from_a_stranger_is_not_signalled_and_stands_in_the_way() {
    let node = FakeNode::default();
    ready_and_left(&node, spec("chat")).await;
    node.ledger.tamper(|records| records.values_mut().for_each(|r| r.nonce = "another".into()));
    let newcomer = PoolSpec { devices: vec!["0".parse().unwrap()], ..spec("new") };
    let (m, _events) = node.manage(vec![spec("chat"), newcomer]).await;
    let fenced = until(&m, &id(), |p| state(p) == "fenced").await;
    assert!(fenced.last_error().unwrap().detail.contains("nonce"), "{fenced:#?}");
    tokio::time::sleep(LONG).await;
    assert_eq!((state(&m.pool(&id()).await.unwrap()), node.engines.signals()), ("fenced", (0, 0)));
    assert_eq!(node.engines.launches().iter().filter(|(_, g)| *g == Generation(2)).count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_was_changed_meanwhile_gets_a_new_engine_and_one_that_is_no_more_loses_its() {
    let node = FakeNode::default();
    ready_and_left(&node, spec("chat")).await;
    let changed = PoolSpec { args: vec!["--other".into()], ..spec("chat") };
    let after = ready_and_left(&node, changed).await;
    assert_eq!((after.replicas[0].generation, node.engines.running().len()), (Generation(2), 1));

    let (m, _events) = node.manage(vec![spec("other")]).await;
    until(&m, &"other".parse().unwrap(), PoolSnapshot::ready).await;
    assert_eq!(node.engines.running().len(), 1, "the engine of the pool that is no more has ended");
    let left = node.ledger.recorded().await;
    assert_eq!(left.iter().map(|r| r.key.pool.as_str()).collect::<Vec<_>>(), ["other"]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_what_nobody_wants_any_more_or_says_that_it_is_left() {
    for killable in [true, false] {
        let node = FakeNode::default();
        node.engines.script(|s| (s.killable, s.obeys_term, s.busy) = (killable, false, Some(1)));
        let (m, _events) = node.manage(vec![spec("chat")]).await;
        until(&m, &id(), PoolSnapshot::ready).await;
        // It is leaving, and serves somebody: it would have its time.
        let (_, _guard) = m.allocate_lease(&id()).unwrap();
        m.drain(&id(), DrainOptions { deadline: Some(LONG), on_deadline: None }).await.unwrap();
        until(&m, &id(), |p| state(p) != "ready").await;
        assert!(m.leave(LONG).await);
        let (m, _events) = node.manage(vec![spec("other")]).await;
        assert_eq!(m.shutdown(LONG).await, killable);
        assert_eq!(node.engines.running().is_empty(), killable);
    }
}

/// Too busy to prove anything, so that it is looked at for a while: its clients have the time of the drain all the same.
#[tokio::test(start_paused = true)]
async fn a_drain_while_an_engine_is_looked_at_cuts_nobody_off_and_ends_in_time() {
    for (deadline, looked_at) in [(60, true), (4, true), (16, true), (60, false)] {
        let node = FakeNode::default();
        ready_and_left(&node, spec("chat")).await;
        node.engines.script(|s| (s.decodes, s.busy) = (!looked_at, Some(2)));
        let (m, _events) = node.manage(vec![spec("chat")]).await;
        if looked_at {
            until(&m, &id(), |p| state(p) == "adopting").await;
        }
        let began = tokio::time::Instant::now();
        let options = DrainOptions { deadline: Some(Duration::from_secs(deadline)), on_deadline: None };
        m.drain(&id(), options).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let Phase::Draining { .. } = node.ledger.recorded().await[0].phase else { panic!("not written down") };
        tokio::time::sleep(Duration::from_secs(deadline - 2)).await;
        assert_eq!(node.engines.running().len(), 1, "it has its time");
        let rest = until(&m, &id(), |p| state(p) == "idle").await;
        assert!(rest.hold && began.elapsed() <= Duration::from_secs(deadline + 2), "{:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_goes_on_to_its_old_deadline_and_a_stop_is_finished() {
    let node = FakeNode::default();
    // A request that never ends, and whose lease is gone with the daemon.
    node.engines.script(|s| s.busy = Some(1));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    let (_, _guard) = m.allocate_lease(&id()).unwrap();
    let began = tokio::time::Instant::now();
    m.drain(&id(), DrainOptions { deadline: Some(Duration::from_secs(100)), on_deadline: None }).await.unwrap();
    until(&m, &id(), PoolSnapshot::draining).await;
    assert!(matches!(node.ledger.recorded().await[0].phase, Phase::Draining { .. }));
    assert!(m.leave(LONG).await);
    tokio::time::sleep(Duration::from_secs(30)).await;

    let (m, _events) = node.manage_at(vec![spec("chat")], began.elapsed()).await;
    until(&m, &id(), PoolSnapshot::draining).await;
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].active_leases, 4, "who uses its slots is not known");
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].active_leases, 1, "what runs there counts");
    let rest = until(&m, &id(), |p| state(p) == "idle").await;
    assert!(rest.hold && node.engines.running().is_empty());
    let took = began.elapsed();
    assert!((Duration::from_secs(100)..=Duration::from_secs(102)).contains(&took), "{took:?}");
    assert!(m.leave(LONG).await);

    // On hold, whatever the record says.
    let node = FakeNode::default();
    let on_demand = || PoolSpec { activation: Activation::OnDemand, ..spec("chat") };
    let (m, _events) = node.manage(vec![on_demand()]).await;
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
    assert!(m.leave(LONG).await);
    node.ledger.set_hold(&id(), true).await.unwrap();
    let (m, _events) = node.manage(vec![on_demand()]).await;
    until(&m, &id(), |p| state(p) == "idle").await;
    assert!(node.engines.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_preload_while_an_engine_is_looked_at_calls_off_the_drain_that_was_to_go_on() {
    let node = FakeNode::default();
    let on_demand = || PoolSpec { activation: Activation::OnDemand, ..spec("chat") };
    let (m, _events) = node.manage(vec![on_demand()]).await;
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
    assert!(m.leave(LONG).await);
    node.ledger.set_hold(&id(), true).await.unwrap();
    // Too busy to prove anything, so that it is looked at for a while.
    node.engines.script(|s| (s.decodes, s.busy) = (false, Some(4)));
    let (m, _events) = node.manage(vec![on_demand()]).await;
    until(&m, &id(), |p| state(p) == "adopting").await;
    m.preload(&id()).await.unwrap();
    until(&m, &id(), PoolSnapshot::ready).await;
    tokio::time::sleep(LONG).await;
    let after = m.pool(&id()).await.unwrap();
    assert!(after.ready() && !after.hold && node.engines.launches().len() == 1, "{after:#?}");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_no_longer_does_its_work_is_ended_but_a_busy_one_is_kept() {
    let node = FakeNode::default();
    ready_and_left(&node, spec("chat")).await;
    node.engines.script(|s| (s.decodes, s.busy) = (false, Some(4)));
    let kept = ready_and_left(&node, spec("chat")).await;
    assert_eq!(kept.replicas[0].generation, Generation(1));
    node.engines.script(|s| s.busy = Some(0));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let hung = until(&m, &id(), |p| p.last_error().is_some()).await;
    assert_eq!(hung.last_error().unwrap().class, FailureClass::Hang);
    node.engines.script(|s| s.decodes = true);
    let back = until(&m, &id(), PoolSnapshot::ready).await;
    assert_eq!((back.replicas[0].generation, node.engines.running().len()), (Generation(2), 1));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_something_unknown_is_on_is_closed_until_it_is_gone() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices = vec![gpu(0, 10 << 30)]);
    node.engines.leave_unknown_on(vec![gpu(0, 0).uuid]);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), |p| state(p) == "waiting").await;
    tokio::time::sleep(LONG).await;
    assert!(node.engines.launches().is_empty());
    node.engines.leave_unknown_on(Vec::new());
    until(&m, &id(), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_is_on_record_before_it_is_launched_or_it_is_not() {
    let node = FakeNode::default();
    node.ledger.set_broken(true);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), |p| state(p) == "waiting").await;
    assert!(node.engines.launches().is_empty());
    node.ledger.set_broken(false);
    until(&m, &id(), PoolSnapshot::ready).await;
    let record = &node.ledger.recorded().await[0];
    assert!(matches!(record.phase, Phase::Ready { .. }) && record.executable.is_some());
}

#[tokio::test(start_paused = true)]
async fn what_is_left_when_the_time_for_an_orderly_end_is_up_is_killed() {
    let node = FakeNode::default();
    node.engines.script(|s| s.obeys_term = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    assert!(!m.shutdown(Duration::from_secs(1)).await);
    assert!(node.engines.running().is_empty(), "{:?}", node.engines.signals());
}
