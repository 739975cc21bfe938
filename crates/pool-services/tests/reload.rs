//! Reloads end in the new spec, or in the old one as it was.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::failure::Exit;
use pool_domain::lifecycle::OnDeadline;
use pool_domain::rollout::Strategy;
use pool_domain::{Failure, FailureClass, PoolId};
use pool_services::control::ReloadRequest;
use pool_services::{
    Activation, ControlError, DrainOptions, Operation, OperationState, PoolControl, PoolManager, PoolSnapshot, PoolSpec,
};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);
const STRATEGIES: [Strategy; 3] = [Strategy::InPlace, Strategy::Overlap, Strategy::Rolling];

fn chat() -> PoolId {
    "chat".parse().unwrap()
}

fn old(replicas: u16) -> PoolSpec {
    let mut spec = PoolSpec { replicas, ..spec("chat") };
    // A test that wants a probation says so.
    spec.reload.probation = Duration::ZERO;
    spec
}

fn new(replicas: u16) -> PoolSpec {
    PoolSpec { model: "stub:other".parse().unwrap(), ..old(replicas) }
}

fn to(spec: PoolSpec, strategy: Strategy) -> ReloadRequest {
    ReloadRequest { declared: Some((spec, "new".into())), strategy: Some(strategy), ..ReloadRequest::default() }
}

async fn ended(m: &PoolManager, operation: Operation) -> OperationState {
    let ended = m.wait_operation(&operation.id, LONG).await.unwrap();
    assert_ne!(ended.state, OperationState::Running, "{ended:?}");
    ended.state
}

async fn reload(m: &PoolManager, request: ReloadRequest) -> OperationState {
    let operation = m.reload(&chat(), request).await.unwrap();
    ended(m, operation).await
}

async fn all_ready(m: &PoolManager, replicas: usize) -> PoolSnapshot {
    until(m, &chat(), |s| s.replicas.len() == replicas && s.replicas.iter().all(|r| r.ready)).await
}

/// What must be the same after a reload that failed, but for generations where it had to stop something.
type Shown = (u16, &'static str, bool, String);

fn picture(s: &PoolSnapshot) -> (String, u64, Vec<Shown>) {
    let replicas = s.replicas.iter().map(|r| (r.id.0, r.state, r.ready, r.device_mask.clone()));
    (s.model.clone(), s.revision, replicas.collect())
}

#[tokio::test(start_paused = true)]
async fn every_strategy_ends_in_the_new_spec_with_as_many_engines() {
    for strategy in STRATEGIES {
        for replicas in [1, 3] {
            let node = FakeNode::default();
            let (m, _events) = node.manage(vec![old(replicas)]).await;
            all_ready(&m, replicas.into()).await;
            assert_eq!(reload(&m, to(new(replicas), strategy)).await, OperationState::Succeeded("reloaded".into()));
            let s = all_ready(&m, replicas.into()).await;
            assert_eq!((s.model.as_str(), s.model_id.as_str(), s.revision), ("stub:other", "other", 2), "{strategy}");
            assert_eq!(node.engines.running().len(), usize::from(replicas));
            let (_key, _guard) = m.allocate_lease(&chat()).unwrap();
            assert_eq!(m.document(&chat()).await.unwrap(), (2, "new".into()));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_number_of_replicas_may_change_in_both_directions() {
    for strategy in STRATEGIES {
        for (before, after) in [(1, 3), (3, 1)] {
            let node = FakeNode::default();
            let (m, _events) = node.manage(vec![old(before)]).await;
            all_ready(&m, before.into()).await;
            assert_eq!(reload(&m, to(new(after), strategy)).await, OperationState::Succeeded("reloaded".into()));
            all_ready(&m, after.into()).await;
            assert_eq!(node.engines.running().len(), usize::from(after), "{strategy}");
        }
    }
}

/// Everything that can go wrong with the new one.
type Fault = (&'static str, fn(&FakeNode));

fn faults() -> Vec<Fault> {
    vec![
        ("it is not staged", |n| n.models.missing("other")),
        ("preflight", |n| {
            n.engines.script_of("other", |s| s.preflight = Some(Failure::new(FailureClass::Config, "no such flag")));
        }),
        ("launch", |n| {
            n.engines.script_of("other", |s| s.launch = Some(Failure::crash(Exit::Unknown)));
        }),
        ("crash", |n| n.engines.script_of("other", |s| s.crash_after = Some(Duration::from_millis(50)))),
        ("wrong model", |n| n.engines.script_of("other", |s| s.model = Some("third".into()))),
        ("never decodes", |n| n.engines.script_of("other", |s| s.decodes = false)),
        ("never serves", |n| n.engines.script_of("other", |s| s.serves = false)),
        ("it is not written down", |n| n.ledger.refuse_pools(true)),
    ]
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_before_the_flip_the_old_engines_serve_as_before() {
    for strategy in STRATEGIES {
        for (what, fault) in faults() {
            for replicas in [1, 2] {
                let node = FakeNode::default();
                let (m, _events) = node.manage(vec![old(replicas)]).await;
                let before = all_ready(&m, replicas.into()).await;
                fault(&node);
                let request = ReloadRequest { deadline: Some(LONG), ..to(new(replicas), strategy) };
                let state = match m.reload(&chat(), request).await {
                    Ok(operation) => ended(&m, operation).await,
                    // Refused at the door.
                    Err(ControlError::Refused { detail, .. }) => OperationState::Failed(detail),
                    Err(other) => panic!("{what}: {other:?}"),
                };
                let OperationState::Failed(why) = state else { panic!("{what}, {strategy}: {state:?}") };
                assert!(!why.is_empty());
                let after = all_ready(&m, replicas.into()).await;
                assert_eq!(picture(&after), picture(&before), "{what}, {strategy}");
                assert_eq!(node.engines.running().len(), usize::from(replicas), "{what}, {strategy}");
                let _slot = m.allocate_lease(&chat()).unwrap();
                if strategy == Strategy::Overlap {
                    let generations = |s: &PoolSnapshot| s.replicas.iter().map(|r| r.generation).collect::<Vec<_>>();
                    assert_eq!(generations(&after), generations(&before), "{what}: the old ones were never touched");
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_way_back_fails_too_the_pool_has_failed_with_both_reasons() {
    let node = FakeNode::default();
    let (m, mut events) = node.manage(vec![old(1)]).await;
    all_ready(&m, 1).await;
    node.engines.script_of("other", |s| s.model = Some("third".into()));
    node.engines.script(|s| s.crash_after = Some(Duration::ZERO));
    let OperationState::Failed(why) = reload(&m, to(new(1), Strategy::InPlace)).await else { panic!("it worked") };
    assert!(why.contains("it serves third") && why.contains("way back"), "{why}");
    let s = until(&m, &chat(), |s| s.replicas[0].state == "failed").await;
    assert!(s.replicas[0].reason.contains("it serves third"), "{}", s.replicas[0].reason);
    m.shutdown(LONG).await;
    let mut told = false;
    while let Ok(event) = events.try_recv() {
        told |= event.code() == "reload_broken";
    }
    assert!(told);
}

#[tokio::test(start_paused = true)]
async fn with_overlap_a_slot_is_always_to_be_had_and_leases_of_the_old_are_honoured() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(20));
    let (m, _events) = node.manage(vec![old(1)]).await;
    all_ready(&m, 1).await;
    let held = m.allocate_lease(&chat()).unwrap().1;
    let operation = m.reload(&chat(), to(new(1), Strategy::Overlap)).await.unwrap();
    let began = Instant::now();
    loop {
        let slot = m.allocate_lease(&chat());
        assert!(slot.is_ok(), "after {:?}: {slot:?}", began.elapsed());
        drop(slot);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let s = m.pool(&chat()).await.unwrap();
        if s.revision == 2 {
            break;
        }
        assert!(held.valid());
    }
    assert!(began.elapsed() >= Duration::from_secs(20));
    assert!(held.valid(), "the old one serves those that it has");
    assert_eq!(node.engines.running().len(), 2);
    drop(held);
    assert_eq!(ended(&m, operation).await, OperationState::Succeeded("reloaded".into()));
    assert_eq!(node.engines.running().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn auto_overlaps_where_the_memory_allows_and_takes_turns_where_not() {
    for (gib, overlaps) in [(4u64, true), (20, false)] {
        let node = FakeNode::default();
        let sized = |spec: PoolSpec| PoolSpec { vram: Some(gib << 30), devices: vec!["0".parse().unwrap()], ..spec };
        let (m, _events) = node.manage(vec![sized(old(1))]).await;
        all_ready(&m, 1).await;
        assert_eq!(reload(&m, to(sized(new(1)), Strategy::Auto)).await, OperationState::Succeeded("reloaded".into()));
        let s = all_ready(&m, 1).await;
        assert_eq!(s.replicas[0].id.0, u16::from(overlaps), "a new replica only beside the old");
    }
}

#[tokio::test(start_paused = true)]
async fn an_overlap_that_does_not_fit_touches_nothing() {
    let node = FakeNode::default();
    let sized = |spec: PoolSpec| PoolSpec { vram: Some(20 << 30), devices: vec!["0".parse().unwrap()], ..spec };
    let (m, _events) = node.manage(vec![sized(old(1))]).await;
    let before = all_ready(&m, 1).await;
    let OperationState::Failed(why) = reload(&m, to(sized(new(1)), Strategy::Overlap)).await else { panic!("it fits") };
    assert!(why.contains("beside"), "{why}");
    assert_eq!(all_ready(&m, 1).await.replicas[0].generation, before.replicas[0].generation);
}

#[tokio::test(start_paused = true)]
async fn in_place_waits_for_leases_until_its_deadline_and_then_the_old_serves_on() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    let before = all_ready(&m, 1).await;
    let held = m.allocate_lease(&chat()).unwrap().1;
    let began = Instant::now();
    let request = ReloadRequest { deadline: Some(Duration::from_secs(10)), ..to(new(1), Strategy::InPlace) };
    let OperationState::Failed(why) = reload(&m, request).await else { panic!("it did not wait") };
    assert!(why.contains("as it was"), "{why}");
    assert!((9..=11).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    let after = all_ready(&m, 1).await;
    assert_eq!((after.replicas[0].generation, after.revision), (before.replicas[0].generation, 1));
    assert!(held.valid());
    let _another = m.allocate_lease(&chat()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_same_spec_again_is_nothing_and_the_last_of_many_wins() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    let before = all_ready(&m, 1).await;
    assert_eq!(reload(&m, to(old(1), Strategy::InPlace)).await, OperationState::Succeeded("unchanged".into()));
    assert_eq!(m.pool(&chat()).await.unwrap().replicas[0].generation, before.replicas[0].generation);
    let mut operations = Vec::new();
    for n in 0..5 {
        let spec = PoolSpec { args: vec![format!("--n={n}")], ..new(1) };
        operations.push(m.reload(&chat(), to(spec, STRATEGIES[n % 3])).await.unwrap());
    }
    let last = operations.pop().unwrap();
    assert_eq!(ended(&m, last).await, OperationState::Succeeded("reloaded".into()));
    for earlier in operations {
        assert!(matches!(ended(&m, earlier).await, OperationState::Failed(_)));
    }
    let s = all_ready(&m, 1).await;
    assert_eq!((s.revision, node.engines.running().len()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn rollback_returns_to_what_was_and_a_second_one_comes_back() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    all_ready(&m, 1).await;
    assert!(matches!(m.rollback(&chat()).await, Err(ControlError::Conflict(_))));
    reload(&m, to(new(1), Strategy::InPlace)).await;
    for (model, revision) in [("stub:tiny", 3), ("stub:other", 4)] {
        let operation = m.rollback(&chat()).await.unwrap();
        assert_eq!(ended(&m, operation).await, OperationState::Succeeded("reloaded".into()));
        let s = all_ready(&m, 1).await;
        assert_eq!((s.model.as_str(), s.revision), (model, revision));
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_within_the_probation_brings_the_old_one_back_by_itself() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    all_ready(&m, 1).await;
    node.engines.script_of("other", |s| s.crash_after = Some(Duration::from_secs(30)));
    let mut watched = new(1);
    watched.reload.probation = Duration::from_secs(60);
    assert_eq!(reload(&m, to(watched, Strategy::InPlace)).await, OperationState::Succeeded("reloaded".into()));
    let s = until(&m, &chat(), |s| s.revision == 3 && s.ready()).await;
    assert_eq!(s.model, "stub:tiny");
    let rollbacks = m.operations().await.unwrap().into_iter().filter(|o| o.verb == "rollback").count();
    assert_eq!(rollbacks, 1);
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(m.pool(&chat()).await.unwrap().revision, 3, "and it stays");
}

/// Of two forms that both crash, none would ever stay.
#[tokio::test(start_paused = true)]
async fn what_was_brought_back_is_on_no_probation() {
    let node = FakeNode::default();
    let watched = |mut spec: PoolSpec| {
        spec.reload.probation = Duration::from_secs(60);
        spec
    };
    let (m, _events) = node.manage(vec![watched(old(1))]).await;
    all_ready(&m, 1).await;
    for model in ["tiny", "other"] {
        node.engines.script_of(model, |s| s.crash_after = Some(Duration::from_secs(30)));
    }
    let new = to(watched(new(1)), Strategy::InPlace);
    assert_eq!(reload(&m, new).await, OperationState::Succeeded("reloaded".into()));
    until(&m, &chat(), |s| s.revision == 3 && s.ready()).await;
    let crashed = until(&m, &chat(), |s| s.last_error().is_some()).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let s = m.pool(&chat()).await.unwrap();
    assert_eq!((s.revision, s.model.as_str()), (3, "stub:tiny"), "{crashed:?}");
    assert!(s.replicas[0].restart_count > 0, "{s:?}");
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_sleeps_is_changed_without_waking_it() {
    let node = FakeNode::default();
    let asleep = |spec: PoolSpec| PoolSpec { activation: Activation::OnDemand, ..spec };
    let (m, _events) = node.manage(vec![asleep(old(1))]).await;
    assert_eq!(reload(&m, to(asleep(new(1)), Strategy::Auto)).await, OperationState::Succeeded("reloaded".into()));
    let s = m.pool(&chat()).await.unwrap();
    assert_eq!((s.revision, s.replicas[0].state, node.engines.launches().len()), (2, "idle", 0));
    m.preload(&chat()).await.unwrap();
    assert_eq!(all_ready(&m, 1).await.model, "stub:other");
}

/// Otherwise the old engine would come back under the new spec's name when the drain is called off.
#[tokio::test(start_paused = true)]
async fn a_pool_that_is_being_drained_is_not_reloaded() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    let before = picture(&all_ready(&m, 1).await);
    let (_, guard) = m.allocate_lease(&chat()).unwrap();
    m.drain(&chat(), DrainOptions { deadline: Some(LONG), on_deadline: None }).await.unwrap();
    until(&m, &chat(), PoolSnapshot::draining).await;
    let state = reload(&m, to(new(1), Strategy::Auto)).await;
    assert!(matches!(&state, OperationState::Failed(why) if why.contains("drained")), "{state:?}");
    m.resume(&chat()).await.unwrap();
    assert_eq!(picture(&all_ready(&m, 1).await), before);
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn a_failed_pool_is_started_by_a_reload() {
    let node = FakeNode::default();
    node.engines.script_of("tiny", |s| s.preflight = Some(Failure::new(FailureClass::Config, "no such flag")));
    let (m, _events) = node.manage(vec![old(1)]).await;
    until(&m, &chat(), |s| s.replicas[0].state == "failed").await;
    assert_eq!(reload(&m, to(new(1), Strategy::Auto)).await, OperationState::Succeeded("reloaded".into()));
    all_ready(&m, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_or_a_stop_ends_a_reload_and_the_pool_rests() {
    for strategy in STRATEGIES {
        for stop in [false, true] {
            let node = FakeNode::default();
            node.engines.script_of("other", |s| s.load = Duration::from_secs(100));
            let (m, _events) = node.manage(vec![old(1)]).await;
            all_ready(&m, 1).await;
            let reloading = m.reload(&chat(), to(new(1), strategy)).await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            let operation = match stop {
                true => m.stop(&chat()).await.unwrap(),
                false => m.drain(&chat(), DrainOptions::default()).await.unwrap(),
            };
            assert_eq!(ended(&m, operation).await, OperationState::Succeeded("drained".into()));
            assert!(matches!(ended(&m, reloading).await, OperationState::Failed(_)));
            let s = until(&m, &chat(), |s| s.replicas.len() == 1).await;
            assert_eq!((s.model.as_str(), s.replicas[0].state, s.hold), ("stub:tiny", "idle", true), "{strategy}");
            assert!(node.engines.running().is_empty());
            m.resume(&chat()).await.unwrap();
            all_ready(&m, 1).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_daemon_ends_in_the_middle_of_a_reload_and_nothing_is_left() {
    for strategy in STRATEGIES {
        let node = FakeNode::default();
        node.engines.script_of("other", |s| s.load = Duration::from_secs(100));
        let (m, _events) = node.manage(vec![old(1)]).await;
        all_ready(&m, 1).await;
        m.reload(&chat(), to(new(1), strategy)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(m.shutdown(LONG).await, "{strategy}");
        assert!(node.engines.running().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_the_breaker_says_nothing_about_what_is_under_way() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old(1)]).await;
    all_ready(&m, 1).await;
    node.engines.script_of("other", |s| s.load = Duration::from_secs(20));
    let operation = m.reload(&chat(), to(new(1), Strategy::Overlap)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    m.reset_breaker(&chat()).await.unwrap();
    assert_eq!(m.operation(&operation.id).await.unwrap().state, OperationState::Running);
    assert_eq!(ended(&m, operation).await, OperationState::Succeeded("reloaded".into()));
}

/// Right at the start, before anybody could see that it is to run.
#[tokio::test(start_paused = true)]
async fn a_pool_that_was_just_begun_runs_on_when_its_reload_fails() {
    let node = FakeNode::default();
    node.engines.script_of("other", |s| s.crash_after = Some(Duration::ZERO));
    let (m, _events) = node.manage(vec![old(1)]).await;
    let operation = m.reload(&chat(), to(new(1), Strategy::InPlace)).await.unwrap();
    assert!(matches!(ended(&m, operation).await, OperationState::Failed(_)));
    assert_eq!(all_ready(&m, 1).await.model_id, "tiny");
}

#[tokio::test(start_paused = true)]
async fn a_forced_drain_is_over_in_time_for_those_that_were_replaced_too() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![PoolSpec { drain_deadline: Duration::from_secs(600), ..old(1) }]).await;
    all_ready(&m, 1).await;
    let (_, guard) = m.allocate_lease(&chat()).unwrap();
    let form = PoolSpec { drain_deadline: Duration::from_secs(600), ..new(1) };
    m.reload(&chat(), to(form, Strategy::Overlap)).await.unwrap();
    until(&m, &chat(), |s| s.model_id == "other" && s.ready()).await;
    assert_eq!((node.engines.running().len(), guard.valid()), (2, true), "its lease is honoured");
    let force = DrainOptions { deadline: Some(Duration::from_secs(5)), on_deadline: Some(OnDeadline::Force) };
    m.drain(&chat(), force).await.unwrap();
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!((node.engines.running().len(), guard.valid()), (0, false));
}

/// Its memory went to the old one while it was looked at.
#[tokio::test(start_paused = true)]
async fn a_forced_reload_does_not_wait_for_memory_for_ever_either() {
    let node = FakeNode::default();
    let large = |spec: PoolSpec| PoolSpec { vram: Some(20 << 30), ..spec };
    let (m, _events) = node.manage(vec![large(old(1))]).await;
    let forced = ReloadRequest { on_deadline: Some(OnDeadline::Force), ..to(large(new(1)), Strategy::Overlap) };
    let operation = m.reload(&chat(), forced).await.unwrap();
    assert!(matches!(ended(&m, operation).await, OperationState::Failed(_)));
    let s = all_ready(&m, 1).await;
    assert_eq!((s.model_id.as_str(), node.engines.running().len()), ("tiny", 1));
}

/// Something of the new engine may be left, so the way back fails, too. What is started later is the old.
#[tokio::test(start_paused = true)]
async fn a_pool_whose_way_back_failed_starts_as_what_it_says_that_it_is() {
    let node = FakeNode::default();
    node.engines.script_of("other", |s| (s.serves, s.leaves_child, s.killable) = (false, true, false));
    let mut spec = old(1);
    spec.policy.start.stall = Duration::from_secs(5);
    let (m, _events) = node.manage(vec![spec.clone()]).await;
    all_ready(&m, 1).await;
    let form = PoolSpec { model: "stub:other".parse().unwrap(), ..spec };
    let OperationState::Failed(why) = reload(&m, to(form, Strategy::InPlace)).await else { panic!("reloaded") };
    assert!(why.contains("so did the way back"), "{why}");
    node.engines.leftovers_end();
    node.engines.crash_all();
    tokio::time::sleep(Duration::from_secs(1)).await;
    m.preload(&chat()).await.unwrap();
    assert_eq!(all_ready(&m, 1).await.model_id, "tiny");
    assert_eq!(node.engines.models(), ["tiny"]);
}

/// A disk that took the new form, said that it did not, and is ill for a while.
#[tokio::test(start_paused = true)]
async fn that_a_reload_was_undone_is_written_down_once_the_disk_takes_it() {
    let node = FakeNode::default();
    let asked = PoolSpec { activation: Activation::OnDemand, ..old(1) };
    let (m, _events) = node.manage(vec![asked.clone()]).await;
    let other = PoolSpec { activation: Activation::OnDemand, ..new(1) };
    assert_eq!(reload(&m, to(other.clone(), Strategy::Auto)).await, OperationState::Succeeded("reloaded".into()));
    node.ledger.set_broken(true);
    node.ledger.set_lying(true);
    let back = ReloadRequest { declared: Some((asked, "old".into())), ..ReloadRequest::default() };
    node.ledger.set_slow(Duration::from_secs(1));
    let operation = m.reload(&chat(), back).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    // It took the commit, and does not take that it was undone.
    node.ledger.set_lying(false);
    let OperationState::Failed(why) = ended(&m, operation).await else { panic!("it was written down") };
    assert!(why.contains("as it was"), "{why}");
    let stored = || node.ledger.stored(&chat()).map(|s| s.document);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(stored().as_deref(), Some("old"), "what the disk lied about");
    node.ledger.set_broken(false);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(stored().as_deref(), Some("new"));
    // Nor is it after something newer.
    assert!(m.shutdown(LONG).await);
    assert_eq!(stored().as_deref(), Some("new"));
}

/// The daemon dies at some moment of a reload, and the next one starts from what is written down.
async fn after_death(
    strategy: Strategy,
    dies_after: Duration,
    replicas: u16,
) -> (FakeNode, PoolManager, PoolSnapshot, u64) {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(2));
    node.engines.script_of("other", |s| s.load = Duration::from_secs(2));
    let (m, _events) = node.manage(vec![old(replicas)]).await;
    all_ready(&m, replicas.into()).await;
    m.reload(&chat(), to(new(replicas), strategy)).await.unwrap();
    tokio::time::sleep(dies_after).await;
    let stored = node.ledger.stored(&chat());
    // As if it had died: it does nothing more, and its engines live on.
    assert!(m.leave(LONG).await);
    let (spec, revision) = if stored.is_some() { (new(replicas), 2) } else { (old(replicas), 1) };
    let (m, _events) = node.manage(vec![spec]).await;
    let s = all_ready(&m, replicas.into()).await;
    tokio::time::sleep(Duration::from_secs(40)).await;
    (node, m, s, revision)
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_dies_in_a_reload_leaves_a_pool_that_is_all_old_or_all_new() {
    for strategy in STRATEGIES {
        for replicas in [1, 2] {
            let (mut old_ones, mut new_ones) = (0, 0);
            for step in 0..25 {
                let dies_after = Duration::from_millis(step * 320);
                let (node, m, s, revision) = after_death(strategy, dies_after, replicas).await;
                let model = if revision == 2 { "other" } else { "tiny" };
                assert_eq!(s.model_id, model);
                let s = all_ready(&m, replicas.into()).await;
                assert_eq!(
                    node.engines.running().len(),
                    usize::from(replicas),
                    "{strategy} after {dies_after:?}: {s:#?}"
                );
                assert_eq!(node.engines.models(), vec![model; replicas.into()], "{strategy} after {dies_after:?}");
                if revision == 2 { new_ones += 1 } else { old_ones += 1 }
            }
            assert!(old_ones > 0 && new_ones > 0, "{strategy}: {old_ones} and {new_ones}");
        }
    }
}
