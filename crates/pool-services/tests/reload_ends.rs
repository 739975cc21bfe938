//! Every reload ends, also where nothing comes that it waits for; what it leaves behind is known to the next daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::lifecycle::OnDeadline;
use pool_domain::rollout::Strategy;
use pool_domain::{DeviceHealth, PoolId};
use pool_services::control::ReloadRequest;
use pool_services::ports::StateLedger;
use pool_services::{
    Activation, Declared, DrainOptions, LeaseRequest, Operation, OperationState, PoolControl, PoolManager,
    PoolSnapshot, PoolSpec, Restored, Source,
};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::{Instant, sleep};

const LONG: Duration = Duration::from_secs(36_000);

fn chat() -> PoolId {
    "chat".parse().unwrap()
}

fn old() -> PoolSpec {
    let mut spec = spec("chat");
    spec.reload.probation = Duration::ZERO;
    spec
}

fn new() -> PoolSpec {
    PoolSpec { model: "stub:other".parse().unwrap(), ..old() }
}

fn to(spec: PoolSpec, strategy: Strategy) -> ReloadRequest {
    ReloadRequest { declared: Some((spec, "new".into())), strategy: Some(strategy), ..ReloadRequest::default() }
}

/// A pool of the file, whose words are these.
fn of_file(spec: PoolSpec) -> Restored {
    Declared { spec, document: "old".into(), source: Source::File { digest: "d".into() } }.into()
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

async fn ready(m: &PoolManager) -> PoolSnapshot {
    until(m, &chat(), PoolSnapshot::ready).await
}

/// From now on no device can be had; what runs on one goes on.
fn lose_the_devices(node: &FakeNode) {
    node.gpus.change(|i| i.devices.iter_mut().for_each(|d| d.health = DeviceHealth::Suspect("XID 74".into())));
}

#[tokio::test(start_paused = true)]
async fn a_forced_reload_whose_device_goes_ends_when_its_start_has_had_its_time() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old()]).await;
    ready(&m).await;
    let (_, held) = m.allocate_lease(&chat()).unwrap();
    let deadline = Duration::from_secs(10);
    let forced = ReloadRequest {
        deadline: Some(deadline),
        on_deadline: Some(OnDeadline::Force),
        ..to(new(), Strategy::InPlace)
    };
    let began = Instant::now();
    let operation = m.reload(&chat(), forced).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    lose_the_devices(&node);
    let OperationState::Failed(why) = ended(&m, operation).await else { panic!("reloaded without a device") };
    assert!(why.contains("not done by its deadline") && why.contains("so did the way back"), "{why}");
    let policy = old().policy;
    let longest = deadline + 2 * policy.start.max + policy.stop.grace + policy.stop.prove;
    assert!(began.elapsed() <= longest + Duration::from_secs(1), "{:?}", began.elapsed());
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_way_back_that_finds_no_device_ends_with_both_reasons_and_a_person_starts_it_again() {
    let node = FakeNode::default();
    node.engines.script_of("other", |s| (s.load, s.model) = (Duration::from_secs(20), Some("third".into())));
    let (m, mut events) = node.manage(vec![old()]).await;
    ready(&m).await;
    let began = Instant::now();
    let operation = m.reload(&chat(), to(new(), Strategy::InPlace)).await.unwrap();
    until(&m, &chat(), |s| s.replicas[0].state == "starting").await;
    lose_the_devices(&node);
    let OperationState::Failed(why) = ended(&m, operation).await else { panic!("reloaded") };
    for part in ["it serves third", "so did the way back", "not done in time", "waiting"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let policy = old().policy;
    let undo = policy.stop.grace + policy.stop.prove + policy.start.max;
    let took = began.elapsed();
    assert!(took >= undo && took <= undo + Duration::from_secs(60), "{took:?}");
    let s = until(&m, &chat(), |s| s.replicas[0].state == "failed").await;
    assert!(s.replicas[0].reason.contains("it serves third"), "{s:#?}");
    node.gpus.change(|i| i.devices.iter_mut().for_each(|d| d.health = DeviceHealth::Ok));
    m.preload(&chat()).await.unwrap();
    assert_eq!(ready(&m).await.model_id, "tiny");
    m.shutdown(LONG).await;
    let mut told = 0;
    while let Ok(event) = events.try_recv() {
        told += u32::from(event.code() == "reload_broken");
    }
    assert_eq!(told, 1);
}

/// The disk hangs: neither the commit nor its undo is ever answered.
#[tokio::test(start_paused = true)]
async fn a_disk_that_never_answers_keeps_the_old_one_from_nothing() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old()]).await;
    ready(&m).await;
    node.engines.script_of("other", |s| s.load = Duration::from_secs(20));
    let deadline = Some(Duration::from_secs(120));
    let operation = m.reload(&chat(), ReloadRequest { deadline, ..to(new(), Strategy::Overlap) }).await.unwrap();
    sleep(Duration::from_secs(10)).await;
    node.ledger.hang_pools(true);
    let began = Instant::now();
    let OperationState::Failed(why) = ended(&m, operation).await else { panic!("it was written down") };
    assert!(why.contains("deadline") && why.contains("as it was"), "{why}");
    assert!(began.elapsed() < Duration::from_secs(180), "{:?}", began.elapsed());
    let s = ready(&m).await;
    assert_eq!((s.model_id.as_str(), s.revision, node.engines.models()), ("tiny", 1, vec!["tiny".to_owned()]));
    node.ledger.hang_pools(false);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(node.ledger.stored(&chat()), None, "what was on its way is taken back");
    assert!(m.shutdown(LONG).await);
}

#[tokio::test(start_paused = true)]
async fn a_reload_of_a_pool_of_the_file_that_fails_leaves_nothing_written_down() {
    for lies in [false, true] {
        let node = FakeNode::default();
        let (m, _events) = node.manage_declared(vec![of_file(old())], Duration::ZERO).await;
        ready(&m).await;
        node.engines.script_of("other", |s| s.load = Duration::from_secs(20));
        let operation = m.reload(&chat(), to(new(), Strategy::Overlap)).await.unwrap();
        sleep(Duration::from_secs(10)).await;
        node.ledger.set_lying(lies);
        node.ledger.set_broken(true);
        let OperationState::Failed(why) = ended(&m, operation).await else { panic!("it was written down") };
        assert!(why.contains("as it was"), "{why}");
        assert_eq!(node.ledger.stored(&chat()), None, "whatever the disk said");
        node.ledger.set_broken(false);
        sleep(Duration::from_secs(10)).await;
        assert_eq!(node.ledger.stored(&chat()), None, "an override of what the file says anyway");
        assert!(m.shutdown(LONG).await);
    }
}

#[tokio::test(start_paused = true)]
async fn an_override_stands_when_the_next_reload_fails() {
    let node = FakeNode::default();
    let (m, _events) = node.manage_declared(vec![of_file(old())], Duration::ZERO).await;
    ready(&m).await;
    assert_eq!(reload(&m, to(new(), Strategy::Auto)).await, OperationState::Succeeded("reloaded".into()));
    let override_ = node.ledger.stored(&chat()).unwrap();
    assert_eq!((override_.document.as_str(), override_.file_digest.as_deref()), ("new", Some("d")));
    node.ledger.refuse_pools(true);
    let third = ReloadRequest { declared: Some((old(), "third".into())), ..ReloadRequest::default() };
    assert!(matches!(reload(&m, third).await, OperationState::Failed(_)));
    node.ledger.refuse_pools(false);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(node.ledger.stored(&chat()), Some(override_));
}

/// What a later daemon starts from.
async fn restored(node: &FakeNode, was: PoolSpec, is: PoolSpec) -> Restored {
    let stored = node.ledger.stored_pools().await.into_iter().next().unwrap();
    Restored {
        declared: Declared { spec: is, document: stored.document, source: Source::Api },
        revision: stored.revision,
        previous: stored.previous.map(|document| (was, document)),
        probation: stored.probation,
        stored: true,
    }
}

/// The daemon goes right after a reload; the new engine crashes so long after it.
async fn crashes_under_the_next_daemon(after: Duration, restarts_before: u64) -> (FakeNode, PoolManager) {
    let node = FakeNode::default();
    let watched = |mut spec: PoolSpec| {
        spec.reload.probation = Duration::from_secs(60);
        spec
    };
    let (was, is) = (watched(old()), watched(new()));
    let api = Declared { spec: was.clone(), document: "old".into(), source: Source::Api };
    let (m, _events) = node.manage_declared(vec![api.into()], Duration::ZERO).await;
    ready(&m).await;
    for _ in 0..restarts_before {
        node.engines.crash_all();
        until(&m, &chat(), |s| !s.ready()).await;
        ready(&m).await;
    }
    assert_eq!(reload(&m, to(is.clone(), Strategy::InPlace)).await, OperationState::Succeeded("reloaded".into()));
    assert!(m.leave(LONG).await);
    drop(m);
    sleep(Duration::from_secs(5)).await;
    let (m, _events) = node.manage_declared(vec![restored(&node, was, is).await], Duration::ZERO).await;
    ready(&m).await;
    sleep(after).await;
    assert_eq!(m.pool(&chat()).await.unwrap().revision, 2, "nothing has failed yet");
    node.engines.crash_all();
    sleep(Duration::from_secs(30)).await;
    (node, m)
}

#[tokio::test(start_paused = true)]
async fn a_failure_within_the_probation_brings_the_old_one_back_also_under_a_later_daemon() {
    for restarts_before in [0, 2] {
        let (node, m) = crashes_under_the_next_daemon(Duration::from_secs(20), restarts_before).await;
        let s = ready(&m).await;
        assert_eq!((s.model_id.as_str(), s.revision), ("tiny", 3));
        assert_eq!(node.engines.models(), ["tiny"]);
        assert_eq!(node.ledger.stored(&chat()).unwrap().document, "old");
    }
}

/// It counts from the reload on, not from the restart.
#[tokio::test(start_paused = true)]
async fn a_restart_of_the_daemon_does_not_make_a_probation_longer() {
    let (_node, m) = crashes_under_the_next_daemon(Duration::from_secs(58), 0).await;
    let s = ready(&m).await;
    assert_eq!((s.model_id.as_str(), s.revision), ("other", 2));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_goes_on_waiting_while_the_pool_is_reloaded_in_place() {
    for fails in [false, true] {
        let node = FakeNode::default();
        node.engines.script_of("other", |s| {
            s.load = Duration::from_secs(20);
            s.model = fails.then(|| "third".to_owned());
        });
        let (m, _events) = node.manage(vec![PoolSpec { activation: Activation::OnDemand, ..old() }]).await;
        m.preload(&chat()).await.unwrap();
        ready(&m).await;
        let slots: Vec<_> = (0..4).map(|_| m.allocate_lease(&chat()).unwrap().1).collect();
        let waits = |wait: u64| {
            let m = m.clone();
            let wish =
                LeaseRequest { wait: Duration::from_secs(wait), ..LeaseRequest::lasting(Duration::from_secs(600)) };
            tokio::spawn(async move { (m.lease(&chat(), wish).await, Instant::now()) })
        };
        let first = waits(300);
        sleep(Duration::from_secs(1)).await;
        let form = PoolSpec { activation: Activation::OnDemand, ..new() };
        let operation = m.reload(&chat(), to(form, Strategy::InPlace)).await.unwrap();
        until(&m, &chat(), PoolSnapshot::draining).await;
        let second = waits(300);
        let impatient = waits(2);
        sleep(Duration::from_secs(1)).await;
        assert!(m.allocate_lease(&chat()).is_err(), "nothing new is granted meanwhile");
        sleep(Duration::from_secs(2)).await;
        assert!(impatient.await.unwrap().0.is_err(), "nobody waits longer than it said");
        assert!(!first.is_finished() && !second.is_finished());
        drop(slots);
        assert_eq!(matches!(ended(&m, operation).await, OperationState::Failed(_)), fails);
        let (first, second) = (first.await.unwrap(), second.await.unwrap());
        let (lease, then) = (first.0.unwrap(), second.0.unwrap());
        assert!(first.1 <= second.1 && lease.slot <= then.slot, "in their order: {lease:?} {then:?}");
        assert_eq!(m.pool(&chat()).await.unwrap().model_id, if fails { "tiny" } else { "other" });
        assert!(m.shutdown(LONG).await);
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_while_a_reload_is_given_up_for_a_drain_is_told_so() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old()]).await;
    ready(&m).await;
    let (_, slot) = m.allocate_lease(&chat()).unwrap();
    m.reload(&chat(), to(new(), Strategy::InPlace)).await.unwrap();
    until(&m, &chat(), PoolSnapshot::draining).await;
    let wish = LeaseRequest { wait: Duration::from_secs(300), ..LeaseRequest::lasting(Duration::from_secs(600)) };
    let waiting = tokio::spawn({
        let m = m.clone();
        async move { m.lease(&chat(), wish).await }
    });
    sleep(Duration::from_secs(1)).await;
    assert!(!waiting.is_finished());
    let began = Instant::now();
    m.drain(&chat(), DrainOptions::default()).await.unwrap();
    let refused = waiting.await.unwrap();
    assert!(matches!(refused, Err(pool_services::ControlError::Draining)), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    drop(slot);
}

/// Nobody wakes it in the middle; it is asked again afterwards.
#[tokio::test(start_paused = true)]
async fn who_asks_for_a_sleeping_pool_while_it_is_reloaded_gets_the_new_one() {
    let node = FakeNode::default();
    let asleep = |spec: PoolSpec| PoolSpec { activation: Activation::OnDemand, ..spec };
    let (m, _events) = node.manage(vec![asleep(old())]).await;
    node.ledger.hang_pools(true);
    let operation = m.reload(&chat(), to(asleep(new()), Strategy::Auto)).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let wish = LeaseRequest { wait: Duration::from_secs(300), ..LeaseRequest::lasting(Duration::from_secs(600)) };
    let waiting = tokio::spawn({
        let m = m.clone();
        async move { m.lease(&chat(), wish).await }
    });
    sleep(Duration::from_secs(5)).await;
    assert_eq!((waiting.is_finished(), node.engines.launches().len()), (false, 0));
    node.ledger.hang_pools(false);
    assert_eq!(ended(&m, operation).await, OperationState::Succeeded("reloaded".into()));
    waiting.await.unwrap().unwrap();
    assert_eq!(m.pool(&chat()).await.unwrap().model_id, "other");
}

/// One of which something may be left keeps its name until nothing is.
#[tokio::test(start_paused = true)]
async fn a_newcomer_never_takes_the_name_of_one_of_which_something_is_left() {
    let node = FakeNode::default();
    node.engines.script(|s| (s.leaves_child, s.killable) = (true, false));
    let (m, _events) = node.manage(vec![old()]).await;
    ready(&m).await;
    node.engines.script_of("other", |s| (s.leaves_child, s.killable) = (false, true));
    let done = OperationState::Succeeded("reloaded".into());
    assert_eq!(reload(&m, to(new(), Strategy::Overlap)).await, done);
    let ids = |s: &PoolSnapshot| s.replicas.iter().map(|r| (r.id.0, r.state)).collect::<Vec<_>>();
    assert_eq!(ids(&m.pool(&chat()).await.unwrap()), [(0, "fenced"), (1, "ready")]);
    let third = PoolSpec { args: vec!["--third".into()], ..new() };
    assert_eq!(reload(&m, to(third, Strategy::Overlap)).await, done);
    assert_eq!(ids(&m.pool(&chat()).await.unwrap()), [(0, "fenced"), (2, "ready")]);
    node.engines.leftovers_end();
    until(&m, &chat(), |s| ids(s) == [(2, "ready")]).await;
}

/// What may be left of a newcomer is beside the old one, which was never touched.
#[tokio::test(start_paused = true)]
async fn a_newcomer_that_cannot_be_ended_does_not_break_the_pool_it_was_to_replace() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![old()]).await;
    let before = ready(&m).await;
    node.engines.script_of("other", |s| {
        (s.leaves_child, s.killable, s.model) = (true, false, Some("third".into()));
    });
    let OperationState::Failed(why) = reload(&m, to(new(), Strategy::Overlap)).await else { panic!("reloaded") };
    assert!(why.contains("as it was"), "{why}");
    let s = m.pool(&chat()).await.unwrap();
    let shown: Vec<_> = s.replicas.iter().map(|r| (r.id.0, r.state)).collect();
    assert_eq!(shown, [(0, "ready"), (1, "fenced")], "its device stays closed");
    assert_eq!(s.replicas[0].generation, before.replicas[0].generation);
    node.engines.leftovers_end();
    until(&m, &chat(), |s| s.replicas.len() == 1).await;
}
