//! Leases over whole managers, on paused time: the queue, TTLs, renewal, keys, starts on demand, restarts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::Duration;

use pool_domain::rollout::Strategy;
use pool_domain::{Failure, FailureClass, Holder, PoolId, ReplicaId};
use pool_services::ports::StateLedger;
use pool_services::{
    Activation, ControlError, DrainOptions, Event, EventKind, Lease, LeaseRequest, OperationState, PoolControl,
    PoolManager, PoolSnapshot, PoolSpec, ReloadRequest,
};
use pool_testkit::{FakeNode, spec, until};
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);
const SECOND: Duration = Duration::from_secs(1);

fn id() -> PoolId {
    "chat".parse().unwrap()
}

fn one_slot() -> PoolSpec {
    PoolSpec { slots: 1, ..spec("chat") }
}

fn on_demand() -> PoolSpec {
    PoolSpec { activation: Activation::OnDemand, ..one_slot() }
}

async fn ready(node: &FakeNode, spec: PoolSpec) -> (PoolManager, Receiver<Event>) {
    let (m, events) = node.manage(vec![spec]).await;
    until(&m, &id(), PoolSnapshot::ready).await;
    (m, events)
}

/// What the fakes have, whatever the spec says.
async fn slots(m: &PoolManager) -> u32 {
    m.pool(&id()).await.unwrap().replicas[0].slots_total
}

fn wish() -> LeaseRequest {
    LeaseRequest::default()
}

fn asking(m: &PoolManager, request: LeaseRequest) -> JoinHandle<Result<Lease, ControlError>> {
    let m = m.clone();
    tokio::spawn(async move { m.lease(&id(), request).await })
}

/// Lets every task come to rest.
async fn rest() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

async fn take_all(m: &PoolManager) -> Vec<Lease> {
    let mut all = Vec::new();
    for _ in 0..slots(m).await {
        all.push(m.lease(&id(), wish()).await.unwrap());
    }
    all
}

async fn waiting(m: &PoolManager) -> u32 {
    m.pool(&id()).await.unwrap().leases_waiting
}

#[tokio::test(start_paused = true)]
async fn who_came_first_is_served_first_and_guards_wait_in_the_same_queue() {
    let node = FakeNode::default();
    let (m, mut events) = ready(&node, one_slot()).await;
    let mut held = take_all(&m).await;
    assert!(matches!(m.lease(&id(), wish()).await, Err(ControlError::Saturated { .. })));
    let first = asking(&m, wish().waiting(LONG));
    rest().await;
    let second = tokio::spawn({
        let m = m.clone();
        async move { m.lease_guard(&id(), Duration::from_secs(500)).await }
    });
    rest().await;
    let third = asking(&m, wish().waiting(Duration::from_secs(500)));
    rest().await;
    assert_eq!(waiting(&m).await, 3);
    m.release(&held.pop().unwrap().id).await.unwrap();
    let first = first.await.unwrap().unwrap();
    assert!(matches!(m.allocate_lease(&id()), Err(ControlError::Saturated { .. })), "nobody passes who waits");
    assert!(!second.is_finished());
    m.release(&first.id).await.unwrap();
    let (key, guard) = second.await.unwrap().unwrap();
    assert_eq!(key.to_string(), "chat-r0");
    assert!(!third.is_finished());
    drop(guard);
    assert!(third.await.unwrap().is_ok());
    assert_eq!(waiting(&m).await, 0);
    let queued: Vec<usize> = std::iter::from_fn(|| events.try_recv().ok())
        .filter_map(|e| match e.kind {
            EventKind::LeaseQueued { position, .. } => Some(position),
            _ => None,
        })
        .collect();
    assert_eq!(queued, [0, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn who_is_gone_leaves_the_queue_and_no_slot_behind() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let held = take_all(&m).await;
    let gone = asking(&m, wish().waiting(LONG));
    let chat = id();
    let mut stays = m.lease(&chat, wish().waiting(LONG));
    assert!(tokio::time::timeout(SECOND, &mut stays).await.is_err());
    gone.abort();
    rest().await;
    assert_eq!(waiting(&m).await, 1);
    // The answer is on its way when the client goes.
    m.release(&held[0].id).await.unwrap();
    rest().await;
    assert_eq!(m.leases().await.unwrap().len(), held.len());
    drop(stays);
    rest().await;
    assert_eq!((waiting(&m).await, m.leases().await.unwrap().len()), (0, held.len() - 1));
    assert!(m.allocate_lease(&id()).is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_wait_ends_when_it_is_over_and_says_when_to_come_back() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let held = take_all(&m).await;
    let began = Instant::now();
    let late = m.lease(&id(), wish().waiting(5 * SECOND)).await;
    assert_eq!(began.elapsed(), 5 * SECOND);
    let Err(ControlError::Saturated { retry_after }) = late else { panic!("{late:?}") };
    assert_eq!(retry_after, 55 * SECOND, "the first lease ends then at the latest");
    tokio::time::sleep(3 * SECOND).await;
    for lease in &held {
        m.release(&lease.id).await.unwrap();
    }
    take_all(&m).await;
    let Err(ControlError::Saturated { retry_after }) = m.lease(&id(), wish()).await else { panic!("granted") };
    assert_eq!(retry_after, (8 * SECOND / u32::try_from(held.len()).unwrap()).max(SECOND), "leases last 8 s");
}

#[tokio::test(start_paused = true)]
async fn guards_are_counted_and_not_told_and_no_lease_crowds_out_what_happens_to_engines() {
    let node = FakeNode::default();
    let (m, mut events) = ready(&node, one_slot()).await;
    while events.try_recv().is_ok() {}
    // Nobody reads the events meanwhile.
    for _ in 0..5_000 {
        drop(m.allocate_lease(&id()).unwrap());
        drop(m.slots(&id()).unwrap().take().unwrap());
        drop(m.lease_guard(&id(), SECOND).await.unwrap());
    }
    let held: Vec<_> = (0..slots(&m).await).map(|_| m.allocate_lease(&id()).unwrap()).collect();
    assert!(m.allocate_lease(&id()).is_err());
    assert!(m.slots(&id()).unwrap().take().is_err());
    assert!(m.lease_guard(&id(), SECOND).await.is_err());
    let counts = m.pool(&id()).await.unwrap().guards;
    assert_eq!((counts.granted, counts.saturated, counts.closed), (15_000 + held.len() as u64, 3, 0));
    let told: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).collect();
    assert_eq!(told, ["lease_queued"], "only that somebody waited");
    drop(held);
    // Leases that have a name are told, as many as fit beside what matters more.
    for _ in 0..1_000 {
        let lease = m.lease(&id(), wish()).await.unwrap();
        m.release(&lease.id).await.unwrap();
    }
    assert!(m.events_lost() > 0);
    m.stop(&id()).await.unwrap();
    until(&m, &id(), |p| p.replicas[0].state == "idle").await;
    assert!(m.allocate_lease(&id()).is_err());
    assert_eq!(m.pool(&id()).await.unwrap().guards.closed, 1);
    let told: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).collect();
    assert_eq!((told[0], told.last()), ("lease_granted", Some(&"stopped")), "what came last is told");
}

#[tokio::test(start_paused = true)]
async fn slots_follow_their_pool_and_end_with_it() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let mut slots = m.slots(&id()).unwrap();
    let other = PoolSpec { model: "stub:other".parse().unwrap(), ..one_slot() };
    let request = ReloadRequest {
        declared: Some((other, "new".into())),
        strategy: Some(Strategy::Overlap),
        ..ReloadRequest::default()
    };
    let (before, guard) = slots.take().unwrap();
    let reload = m.reload(&id(), request).await.unwrap();
    until(&m, &id(), |p| p.model == "stub:other").await;
    let (after, other) = slots.take().unwrap();
    assert!(before != after && guard.valid() && other.valid());
    drop((guard, other));
    assert_eq!(m.wait_operation(&reload.id, LONG).await.unwrap().state, OperationState::Succeeded("reloaded".into()));
    assert!(m.shutdown(LONG).await);
    assert!(slots.take().is_err(), "the pool is no more");
}

#[tokio::test(start_paused = true)]
async fn a_lease_ends_with_its_ttl_unless_it_is_renewed_and_its_slot_goes_to_who_waits() {
    let node = FakeNode::default();
    let (m, mut events) = ready(&node, one_slot()).await;
    let held = take_all(&m).await;
    let waits = asking(&m, wish().waiting(LONG));
    tokio::time::sleep(50 * SECOND).await;
    for lease in &held[1..] {
        let renewed = m.renew(&lease.id, Some(100 * SECOND)).await.unwrap();
        assert_eq!((&renewed.id, &renewed.endpoint, renewed.slot), (&lease.id, &lease.endpoint, lease.slot));
    }
    let began = Instant::now();
    let next = waits.await.unwrap().unwrap();
    assert_eq!(began.elapsed(), 10 * SECOND, "when the first one expires");
    assert_eq!((next.slot, next.id == held[0].id), (held[0].slot, false));
    let over = ControlError::LeaseNotFound(held[0].id.clone());
    assert_eq!(m.renew(&held[0].id, None).await, Err(over));
    assert_eq!(m.release(&held[0].id).await, Ok(()), "it is over, which was wanted");
    for strange in ["lease-1", "lease-chat-r0-g1-0000000000000000-0", "lease-nope-r0-g1-0000000000000000-0"] {
        let never = Err(ControlError::LeaseNotFound(strange.into()));
        assert_eq!(m.renew(strange, None).await.map(drop), never);
    }
    assert!(m.release("lease-1").await.is_err());
    m.stop(&id()).await.unwrap();
    until(&m, &id(), |p| p.replicas[0].state == "idle").await;
    assert_eq!(m.leases().await.unwrap(), []);
    let mut seen: Vec<&str> =
        std::iter::from_fn(|| events.try_recv().ok()).map(|e| e.code()).filter(|c| c.starts_with("lease_")).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, ["lease_expired", "lease_granted", "lease_queued", "lease_renewed", "lease_revoked"]);
}

#[tokio::test(start_paused = true)]
async fn one_key_is_one_lease_however_often_it_is_asked_for() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let held = take_all(&m).await;
    let keyed = || LeaseRequest { key: Some("k".into()), ..wish().waiting(LONG) };
    let (a, b) = (asking(&m, keyed()), asking(&m, keyed()));
    rest().await;
    assert_eq!(waiting(&m).await, 1, "two who ask for one lease wait once");
    let other = LeaseRequest { ttl: SECOND, ..keyed() };
    assert!(matches!(m.lease(&id(), other.clone()).await, Err(ControlError::Conflict(_))));
    m.release(&held[0].id).await.unwrap();
    let (a, b) = (a.await.unwrap().unwrap(), b.await.unwrap().unwrap());
    let c = m.lease(&id(), keyed()).await.unwrap();
    assert_eq!((&a.id, &a.id), (&b.id, &c.id));
    m.release(&a.id).await.unwrap();
    let over = m.lease(&id(), keyed()).await;
    assert!(matches!(over, Err(ControlError::Conflict(_))), "a lease that is over is not given out again: {over:?}");
    tokio::time::sleep(Duration::from_secs(601)).await;
    assert!(m.lease(&id(), other).await.is_ok(), "forgotten");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_loses_the_answer_finds_its_lease_by_the_key() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let held = take_all(&m).await;
    let keyed = || LeaseRequest { key: Some("k".into()), ..wish().waiting(LONG) };
    let chat = id();
    let mut lost = m.lease(&chat, keyed());
    assert!(tokio::time::timeout(SECOND, &mut lost).await.is_err());
    m.release(&held[0].id).await.unwrap();
    rest().await;
    drop(lost);
    rest().await;
    let all: Vec<String> = m.leases().await.unwrap().into_iter().map(|l| l.id).collect();
    let again = m.lease(&id(), LeaseRequest { wait: Duration::ZERO, ..keyed() }).await.unwrap();
    assert!(all.contains(&again.id), "{all:?} {again:?}");
}

#[tokio::test(start_paused = true)]
async fn all_who_ask_for_a_pool_at_rest_wait_for_one_start() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![on_demand()]).await;
    let all: Vec<_> = (0..3).map(|_| asking(&m, wish().waiting(60 * SECOND))).collect();
    let guard = m.lease_guard(&id(), 60 * SECOND).await;
    for lease in all {
        lease.await.unwrap().unwrap();
    }
    assert!(guard.is_ok());
    assert_eq!(node.engines.launches().len(), 1);
    let demands = m.operations().await.unwrap();
    assert_eq!(demands.len(), 1, "it is asked once: {demands:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_answers_all_who_wait_with_its_reason() {
    let node = FakeNode::default();
    node.models.set_slow(5 * SECOND);
    node.models.fail(Some(Failure::new(FailureClass::Artifact, "the model file is missing")));
    let (m, _events) = node.manage(vec![on_demand()]).await;
    let began = Instant::now();
    let all: Vec<_> = (0..3).map(|_| asking(&m, wish().waiting(60 * SECOND))).collect();
    for lease in all {
        let refused = lease.await.unwrap();
        assert!(
            matches!(&refused, Err(ControlError::Unready { why, .. }) if why.contains("model file is missing")),
            "{refused:?}"
        );
    }
    assert!(began.elapsed() < 6 * SECOND, "nobody waits for nothing");
    // The next one hears it at once.
    assert!(m.lease(&id(), wish().waiting(60 * SECOND)).await.is_err());
    assert!(began.elapsed() < 7 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_keeps_failing_says_when_the_next_start_is() {
    let node = FakeNode::default();
    node.engines.script(|s| s.serves = false);
    node.engines.script(|s| s.crash_after = Some(SECOND));
    let (m, _events) = node.manage(vec![on_demand()]).await;
    let refused = m.lease(&id(), wish().waiting(60 * SECOND)).await;
    let Err(ControlError::Unready { retry_after, .. }) = &refused else { panic!("{refused:?}") };
    assert!(retry_after.is_some_and(|t| t <= SECOND), "{refused:?}");
    // Who comes now waits for the next start.
    node.engines.script(|s| (s.serves, s.crash_after) = (true, None));
    assert!(m.lease(&id(), wish().waiting(60 * SECOND)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_drain_refuses_at_once_also_those_who_wait_and_demand_does_not_wake_it() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    take_all(&m).await;
    let waits = asking(&m, wish().waiting(LONG));
    rest().await;
    let began = Instant::now();
    m.drain(&id(), DrainOptions { deadline: Some(20 * SECOND), on_deadline: None }).await.unwrap();
    assert_eq!(waits.await.unwrap(), Err(ControlError::Draining));
    assert_eq!(m.lease(&id(), wish().waiting(LONG)).await, Err(ControlError::Draining));
    assert!(began.elapsed() < SECOND);
    until(&m, &id(), |p| p.replicas[0].state == "idle").await;
    assert_eq!(m.lease(&id(), wish().waiting(LONG)).await, Err(ControlError::Draining));
    assert!(m.lease_guard(&id(), LONG).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_slot_outlast_a_crash_of_the_engine() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    take_all(&m).await;
    let waits = asking(&m, wish().waiting(60 * SECOND));
    rest().await;
    node.engines.crash_all();
    let lease = waits.await.unwrap().unwrap();
    assert_eq!(lease.generation.0, 2);
    assert_eq!(m.leases().await.unwrap().len(), 1, "those of the old engine are over");
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_manager_answers_those_who_wait() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    take_all(&m).await;
    let waits = asking(&m, wish().waiting(LONG));
    rest().await;
    assert!(m.leave(SECOND).await);
    assert!(matches!(waits.await.unwrap(), Err(ControlError::Unreachable(_))));
    assert!(matches!(m.lease(&id(), wish()).await, Err(ControlError::Unreachable(_))));
}

#[tokio::test(start_paused = true)]
async fn replicas_are_chosen_by_hint_by_session_and_by_room() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![PoolSpec { replicas: 3, ..spec("chat") }]).await;
    until(&m, &id(), |p| p.replicas.iter().all(|r| r.ready)).await;
    let session = |s: &str| Holder { session_id: Some(s.into()), ..Holder::default() };
    let take = async |request: LeaseRequest| m.lease(&id(), request).await.unwrap().replica_id.0;
    assert_eq!(take(LeaseRequest { prefer: Some(ReplicaId(2)), holder: session("a"), ..wish() }).await, 2);
    assert_eq!(take(LeaseRequest { holder: session("a"), ..wish() }).await, 2, "where the session was");
    assert_eq!(take(wish()).await, 0, "where most is free");
    assert_eq!(take(wish()).await, 1);
    assert_eq!(take(LeaseRequest { prefer: Some(ReplicaId(9)), ..wish() }).await, 0, "a hint, not a condition");
    for _ in 0..2 {
        assert_eq!(take(LeaseRequest { prefer: Some(ReplicaId(2)), ..wish() }).await, 2);
    }
    assert_ne!(take(LeaseRequest { prefer: Some(ReplicaId(2)), ..wish() }).await, 2, "it is full");
}

#[tokio::test(start_paused = true)]
async fn bad_wishes_are_refused_and_change_nothing() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let before = m.pool(&id()).await.unwrap();
    let long: Arc<str> = "x".repeat(129).into();
    let holder = |job: &str| Holder { job_id: Some(job.into()), ..Holder::default() };
    for bad in [
        LeaseRequest::lasting(Duration::ZERO),
        LeaseRequest::lasting(365 * 24 * 3600 * SECOND),
        LeaseRequest { key: Some(long), ..wish() },
        LeaseRequest { holder: holder(""), ..wish() },
        LeaseRequest { holder: holder("a\nb"), ..wish() },
    ] {
        let refused = m.lease(&id(), bad).await;
        assert!(matches!(&refused, Err(ControlError::Refused { code, .. }) if code == "INVALID_PARAMS"), "{refused:?}");
    }
    let nowhere = m.lease(&"nope".parse().unwrap(), wish()).await;
    assert_eq!(nowhere, Err(ControlError::PoolNotFound("nope".into())));
    assert_eq!(m.pool(&id()).await.unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_slots_are_taken_until_they_are_renewed_or_the_engine_is_idle() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    let all = take_all(&m).await;
    let old = all[0].clone();
    assert!(m.leave(LONG).await);
    drop(m);

    node.engines.script(|s| s.busy = Some(2));
    let began = Instant::now();
    let (m, _events) = ready(&node, one_slot()).await;
    assert!(matches!(m.allocate_lease(&id()), Err(ControlError::Saturated { .. })));
    let renewed = m.renew(&old.id, None).await.unwrap();
    assert_eq!((&renewed.id, &renewed.endpoint), (&old.id, &old.endpoint));
    let waits = asking(&m, wish().waiting(LONG));
    let lease = waits.await.unwrap().unwrap();
    assert!(began.elapsed() >= 10 * SECOND && began.elapsed() < 13 * SECOND, "{:?}", began.elapsed());
    assert_ne!(lease.id, old.id);
    // Two requests run. One may be of the lease that was renewed, or both of nobody that is known.
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].active_leases, 4);
    m.release(&old.id).await.unwrap();
    m.release(&old.id).await.unwrap();
    node.engines.script(|s| s.busy = Some(0));
    tokio::time::sleep(3 * SECOND).await;
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].active_leases, 1);
    // A client that comes late still has its lease, if there is a slot.
    assert_eq!(m.renew(&all[1].id, Some(SECOND)).await.unwrap().id, all[1].id);
    tokio::time::sleep(2 * SECOND).await;
    assert!(m.renew(&all[1].id, None).await.is_err(), "it has expired");
    node.engines.crash_all();
    until(&m, &id(), |p| p.ready() && p.replicas[0].generation.0 == 2).await;
    assert!(m.renew(&all[2].id, None).await.is_err(), "its engine is gone");
    assert_eq!(m.release(&all[2].id).await, Ok(()));
    assert_eq!(m.pool(&id()).await.unwrap().replicas[0].active_leases, 0);
    assert!(m.shutdown(LONG).await);
    assert!(node.ledger.recorded().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_adopted_engine_that_does_not_say_how_busy_it_is_is_taken_for_the_longest_lease() {
    let node = FakeNode::default();
    let (m, _events) = ready(&node, one_slot()).await;
    assert!(m.leave(LONG).await);
    node.engines.script(|s| s.busy = None);
    let (m, _events) = ready(&node, one_slot()).await;
    tokio::time::sleep(Duration::from_secs(3_590)).await;
    assert!(matches!(m.allocate_lease(&id()), Err(ControlError::Saturated { .. })));
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert!(m.allocate_lease(&id()).is_ok());
}
