//! Whole nodes of fakes on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::estimate::LlamaCppSettings;
use pool_domain::estimate::learnt::LEARNT_MARGIN;
use pool_domain::failure::Exit;
use pool_domain::lifecycle::OnDeadline;
use pool_domain::plan::{EngineMemory, Split};
use pool_domain::{Failure, FailureClass, PoolId};
use pool_services::control::{PlacementRequest, PlanRequest};
use pool_services::ports::{Holder, Listener, Residency};
use pool_services::{
    Activation, ControlError, DrainOptions, LeaseRequest, OperationState, PoolControl, PoolManager, PoolSnapshot,
    PoolSpec,
};
use pool_testkit::{FakeNode, gpu, header, spec};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);

/// Waits, level-triggered and bounded, until the pool looks as wanted.
async fn until(m: &PoolManager, id: &PoolId, wanted: impl Fn(&PoolSnapshot) -> bool) -> PoolSnapshot {
    let mut seen = m.pool(id).await.unwrap();
    let end = Instant::now() + LONG;
    while !wanted(&seen) {
        assert!(Instant::now() < end, "never came: {seen:#?}");
        seen = m.wait_pool(id, seen.snapshot, Duration::from_secs(3_600)).await.unwrap();
    }
    seen
}

fn state(s: &PoolSnapshot) -> &'static str {
    s.replicas[0].state
}

#[tokio::test(start_paused = true)]
async fn ready_only_with_a_proof_and_a_handoff_while_it_stands() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let warming = until(&m, &id, PoolSnapshot::live).await;
    assert!(!warming.ready() && node.ledger.handoffs().is_empty());
    assert!(matches!(m.allocate_lease(&id), Err(ControlError::Unready { .. })));
    let ready = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!((ready.replicas[0].proof, ready.replicas[0].slots_total), ("simulated", 4));
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(node.ledger.handoffs()[0].model, "tiny");
    assert!(m.shutdown(LONG).await);
    assert!(node.ledger.handoffs().is_empty());
}

#[tokio::test(start_paused = true)]
async fn healthy_but_never_decoding_is_never_ready() {
    let node = FakeNode::default();
    node.engines.script(|s| s.decodes = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| {
        assert!(!s.ready());
        s.last_error().is_some()
    })
    .await;
    assert_eq!(failed.last_error().unwrap().class, FailureClass::StartTimeout);
}

#[tokio::test(start_paused = true)]
async fn another_model_is_the_wrong_server_and_another_process_a_port_conflict() {
    let node = FakeNode::default();
    node.engines.script(|s| s.model = Some("other".into()));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| s.last_error().is_some()).await;
    assert_eq!(failed.last_error().unwrap().class, FailureClass::WrongServer);
    node.engines.script(|s| {
        s.model = None;
        s.listener = Listener::Foreign;
    });
    let failed = until(&m, &id, |s| s.last_error().unwrap().class == FailureClass::PortConflict).await;
    assert_eq!(failed.replicas[0].backoff_failures, 1, "a stolen port is not counted");
}

#[tokio::test(start_paused = true)]
async fn memory_on_a_device_it_was_not_given_is_a_breach() {
    let node = FakeNode::default();
    node.gpus.set_residency(Residency::Simulated(vec![Holder { uuid: gpu(1, 0).uuid, pid: 0, bytes: 1 }]));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| state(s) == "failed").await;
    assert_eq!(failed.last_error().unwrap().class, FailureClass::MaskBreach);
}

#[tokio::test(start_paused = true)]
async fn no_memory_on_its_device_is_a_fall_back_to_the_cpu() {
    let node = FakeNode::default();
    node.gpus.set_residency(Residency::Provable(Vec::new()));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| state(s) == "failed").await;
    assert_eq!(failed.last_error().unwrap().class, FailureClass::CpuFallback);
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_backs_off_opens_the_breaker_and_tries_once_half_open() {
    let node = FakeNode::default();
    node.engines.script(|s| s.crash_after = Some(Duration::ZERO));
    let (m, mut events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, |s| s.replicas[0].reason_code == "breaker").await;
    let gaps = |node: &FakeNode| {
        let at = node.engines.launches();
        at.windows(2).map(|w| (w[1].0 - w[0].0).as_secs_f64()).collect::<Vec<_>>()
    };
    for (gap, v) in gaps(&node).iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((v / 2.0..=v + 0.1).contains(gap), "{:?}", gaps(&node));
    }
    assert_eq!(node.engines.launches().len(), 5);
    assert!(matches!(m.allocate_lease(&id), Err(ControlError::Unavailable { .. })));
    let open_again = until(&m, &id, |s| s.replicas[0].generation.0 == 6 && s.replicas[0].breaker == "open").await;
    assert_eq!(node.engines.launches().len(), 6, "half-open tries once: {open_again:?}");
    assert!((29.0..31.0).contains(&gaps(&node)[4]));
    node.engines.script(|s| s.crash_after = None);
    until(&m, &id, |s| s.ready() && s.replicas[0].breaker == "closed").await;
    let mut told = Vec::new();
    while let Ok(e) = events.try_recv() {
        assert!(e.human().chars().count() <= 100);
        told.push(e.code());
    }
    for code in
        ["restart_planned", "breaker_opened", "breaker_half_open", "breaker_closed", "engine_failed", "became_ready"]
    {
        assert!(told.contains(&code), "{code} was not told");
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_is_told_at_once_and_counts_down() {
    let node = FakeNode::default();
    node.engines.script(|s| s.crash_after = Some(Duration::ZERO));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let retry_after = || match m.allocate_lease(&id) {
        Err(ControlError::Unavailable { retry_after }) => retry_after,
        other => panic!("{other:?}"),
    };
    until(&m, &id, |s| s.replicas[0].generation.0 == 4).await;
    node.engines.script(|s| {
        s.leaves_child = true;
        s.killable = false;
    });
    let opened = until(&m, &id, |s| s.replicas[0].breaker == "open").await;
    assert_eq!(state(&opened), "stopping", "the child still lives");
    let first = retry_after();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(retry_after(), first - Duration::from_secs(20));
    let next = m.pool(&id).await.unwrap().replicas[0].next_start_in_ms;
    assert_eq!(next.map(u128::from), Some(retry_after().as_millis()), "a picture counts down, too");
}

#[tokio::test(start_paused = true)]
async fn a_killed_engine_comes_back_with_a_higher_generation() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let first = until(&m, &id, PoolSnapshot::ready).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    node.engines.crash_all();
    let down = until(&m, &id, |s| !s.ready()).await;
    assert_eq!(down.last_error().unwrap().class, FailureClass::Crash(Exit::Signal(9)));
    assert!(!guard.valid());
    let again = until(&m, &id, PoolSnapshot::ready).await;
    assert!(again.replicas[0].generation > first.replicas[0].generation);
    drop(guard);
    assert_eq!(m.pool(&id).await.unwrap().replicas[0].active_leases, 0);
    assert_eq!(again.replicas[0].restart_count, 1);
}

#[tokio::test(start_paused = true)]
async fn an_illness_is_told_once_and_one_that_passes_is_no_failure() {
    let node = FakeNode::default();
    let (m, mut events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    node.engines.script(|s| s.decodes = false);
    let suspect = until(&m, &id, |s| state(s) == "suspect").await;
    assert_eq!((suspect.replicas[0].reason_code, suspect.last_error()), ("hang", None));
    node.engines.script(|s| s.decodes = true);
    until(&m, &id, PoolSnapshot::ready).await;
    node.engines.script(|s| s.decodes = false);
    until(&m, &id, |s| s.last_error().is_some()).await;
    let mut told = Vec::new();
    while let Ok(e) = events.try_recv() {
        told.push(e.code());
    }
    let count = |code| told.iter().filter(|t| **t == code).count();
    assert_eq!((count("suspected"), count("engine_failed")), (2, 1), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn resume_brings_back_what_a_running_drain_has_stopped() {
    let node = FakeNode::default();
    let two = PoolSpec { replicas: 2, ..spec("chat") };
    let (m, _events) = node.manage(vec![two]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, |s| s.replicas.iter().all(|r| r.ready)).await;
    let (held, guard) = m.allocate_lease(&id).unwrap();
    let op = m.drain(&id, DrainOptions::default()).await.unwrap();
    until(&m, &id, |s| s.replicas.iter().any(|r| r.state == "idle")).await;
    assert!(m.operation(&op.id).await.unwrap().progress.ends_with("1 leases left"));
    m.resume(&id).await.unwrap();
    let back = until(&m, &id, |s| s.replicas.iter().all(|r| r.ready)).await;
    let generation = |stayed| back.replicas.iter().find(|r| (r.id == held.replica) == stayed).unwrap().generation.0;
    assert_eq!((generation(true), generation(false), guard.valid()), (1, 2, true));
}

#[tokio::test(start_paused = true)]
async fn a_preload_during_a_drain_calls_it_off() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    m.drain(&id, DrainOptions::default()).await.unwrap();
    until(&m, &id, PoolSnapshot::draining).await;
    let op = m.preload(&id).await.unwrap();
    assert_eq!(m.wait_operation(&op.id, LONG).await.unwrap().state, OperationState::Succeeded("ready".into()));
    assert_eq!((guard.valid(), m.pool(&id).await.unwrap().replicas[0].generation.0), (true, 1));
}

#[tokio::test(start_paused = true)]
async fn a_fenced_device_admits_no_newcomer_but_its_old_guests_may_come_back() {
    let node = FakeNode::default();
    node.engines.script(|s| {
        s.leaves_child = true;
        s.killable = false;
    });
    let on_first =
        |id: &str, activation| PoolSpec { devices: vec!["0".parse().unwrap()], vram: Some(1), activation, ..spec(id) };
    let asked = Activation::OnDemand;
    let pools = vec![on_first("sick", Activation::Preload), on_first("guest", asked), on_first("newcomer", asked)];
    let (m, _events) = node.manage(pools).await;
    let [sick, guest, newcomer]: [PoolId; 3] = ["sick", "guest", "newcomer"].map(|id| id.parse().unwrap());
    until(&m, &sick, PoolSnapshot::ready).await;
    node.engines.script(|s| {
        s.leaves_child = false;
        s.killable = true;
    });
    m.preload(&guest).await.unwrap();
    until(&m, &guest, PoolSnapshot::ready).await;
    m.stop(&guest).await.unwrap();
    until(&m, &guest, |s| state(s) == "idle").await;
    node.engines.crash_all();
    until(&m, &sick, |s| state(s) == "fenced").await;
    m.preload(&newcomer).await.unwrap();
    let waits = until(&m, &newcomer, |s| state(s) == "waiting").await;
    assert!(waits.replicas[0].reason.contains("may be left"), "{}", waits.replicas[0].reason);
    m.preload(&guest).await.unwrap();
    until(&m, &guest, PoolSnapshot::ready).await;
    assert_eq!(state(&m.pool(&newcomer).await.unwrap()), "waiting");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_started_before_the_child_of_a_dead_engine_is_gone() {
    let node = FakeNode::default();
    node.engines.script(|s| {
        s.leaves_child = true;
        s.killable = false;
    });
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    node.engines.crash_all();
    until(&m, &id, |s| state(s) == "fenced").await;
    tokio::time::sleep(LONG).await;
    assert_eq!((state(&m.pool(&id).await.unwrap()), node.engines.launches().len()), ("fenced", 1));
}

#[tokio::test(start_paused = true)]
async fn drain_with_three_stuck_leases_ends_in_time() {
    let node = FakeNode::default();
    node.engines.script(|s| s.obeys_term = false);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let guards: Vec<_> = (0..3).map(|_| m.allocate_lease(&id).unwrap()).collect();
    let began = Instant::now();
    let options = DrainOptions { deadline: Some(Duration::from_secs(2)), on_deadline: Some(OnDeadline::Force) };
    let op = m.drain(&id, options).await.unwrap();
    assert!(matches!(m.allocate_lease(&id), Err(ControlError::Draining)));
    let done = m.wait_operation(&op.id, LONG).await.unwrap();
    assert_eq!(done.state, OperationState::Succeeded("drained".into()));
    assert!(began.elapsed() <= Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(node.engines.signals(), (1, 1));
    assert!(guards.iter().all(|(_, g)| !g.valid()));
    // The hold stands until a person lifts it.
    tokio::time::sleep(LONG).await;
    let rested = m.pool(&id).await.unwrap();
    assert_eq!((state(&rested), rested.hold), ("idle", true));
    m.resume(&id).await.unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_gives_leases_their_time_and_leaves_no_hold() {
    const DRAIN: Duration = Duration::from_secs(60);
    for (held, expected) in [(Duration::from_secs(20), 20), (LONG, 60)] {
        let node = FakeNode::default();
        let (m, _events) = node.manage(vec![spec("chat"), spec("idle")]).await;
        let id: PoolId = "chat".parse().unwrap();
        until(&m, &id, PoolSnapshot::ready).await;
        let (_, guard) = m.allocate_lease(&id).unwrap();
        let began = Instant::now();
        let asked = m.clone();
        let ends = tokio::spawn(async move { asked.shutdown_drained(DRAIN, LONG).await });
        until(&m, &id, PoolSnapshot::draining).await;
        assert!(matches!(m.allocate_lease(&id), Err(ControlError::Draining)));
        let held = tokio::spawn(async move {
            let end = began + held;
            while guard.valid() && Instant::now() < end {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(ends.await.unwrap());
        held.await.unwrap();
        let took = began.elapsed().as_secs();
        assert!((expected..=expected + 2).contains(&took), "{took} s");
        assert!(
            !pool_services::ports::StateLedger::held(&*node.ledger, &id).await,
            "the next daemon would not start it"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn resume_cancels_a_running_drain_and_abort_gives_up() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let generation = until(&m, &id, PoolSnapshot::ready).await.replicas[0].generation;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    let op = m.drain(&id, DrainOptions::default()).await.unwrap();
    until(&m, &id, PoolSnapshot::draining).await;
    m.resume(&id).await.unwrap();
    let back = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!((back.replicas[0].generation, back.hold, guard.valid()), (generation, false, true));
    assert!(matches!(m.operation(&op.id).await.unwrap().state, OperationState::Failed(_)));
    let abort = DrainOptions { deadline: Some(Duration::from_secs(1)), on_deadline: Some(OnDeadline::Abort) };
    let op = m.drain(&id, abort).await.unwrap();
    let done = m.wait_operation(&op.id, LONG).await.unwrap();
    assert!(matches!(done.state, OperationState::Failed(_)), "{done:?}");
    let after = m.pool(&id).await.unwrap();
    assert!(after.ready() && !after.hold, "{after:?}");
    drop(guard);
    assert!(m.allocate_lease(&id).is_ok());
    assert!(!pool_services::ports::StateLedger::held(&*node.ledger, &id).await, "the next daemon would drain it");
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_as_soon_as_the_last_lease_does() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let (_, guard) = m.allocate_lease(&id).unwrap();
    let op = m.drain(&id, DrainOptions::default()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(m.operation(&op.id).await.unwrap().state, OperationState::Running);
    drop(guard);
    let began = Instant::now();
    m.wait_operation(&op.id, LONG).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn every_port_taken_waits_and_says_so_and_a_free_one_is_taken() {
    let node = FakeNode::default();
    node.engines.script(|s| s.taken_ports = (42_000..=42_999).collect());
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let waiting = until(&m, &id, |s| state(s) == "waiting").await;
    assert!(waiting.replicas[0].reason.contains("42000-42999"), "{}", waiting.replicas[0].reason);
    assert!(node.engines.launches().is_empty());
    node.engines.script(|s| s.taken_ports = (42_000..=42_998).collect());
    let ready = until(&m, &id, PoolSnapshot::ready).await;
    assert!(ready.replicas[0].endpoint.as_ref().unwrap().ends_with(":42999"));
    // What the steward did is no wish of anybody: operations are judged as before.
    let stop = m.stop(&id).await.unwrap();
    assert!(matches!(m.wait_operation(&stop.id, LONG).await.unwrap().state, OperationState::Succeeded(_)));
}

#[tokio::test(start_paused = true)]
async fn memory_is_never_promised_twice_and_a_device_that_comes_back_is_used() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices = vec![gpu(0, 10 << 30)]);
    let big = |id: &str| pool_services::PoolSpec { vram: Some(6 << 30), ..spec(id) };
    let (m, _events) = node.manage(vec![big("a"), big("b")]).await;
    let (a, b): (PoolId, PoolId) = ("a".parse().unwrap(), "b".parse().unwrap());
    until(&m, &a, |s| s.ready() || state(s) == "waiting").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let both = [m.pool(&a).await.unwrap(), m.pool(&b).await.unwrap()];
    assert_eq!(both.iter().filter(|s| s.ready()).count(), 1);
    let waiting = both.iter().find(|s| !s.ready()).unwrap();
    assert_eq!(waiting.replicas[0].reason_code, "vram");
    node.gpus.change(|i| i.devices.push(gpu(1, 10 << 30)));
    until(&m, &waiting.pool_id, PoolSnapshot::ready).await;
    assert!(m.node().await.unwrap().devices.iter().all(|(_, ours)| *ours == 6 << 30));
}

#[tokio::test(start_paused = true)]
async fn a_state_directory_that_cannot_be_written_starts_nothing() {
    let node = FakeNode::default();
    node.ledger.set_broken(true);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let waiting = until(&m, &id, |s| state(s) == "waiting").await;
    assert!(waiting.replicas[0].reason.contains("state directory") && node.engines.launches().is_empty());
    node.ledger.set_broken(false);
    until(&m, &id, PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn an_on_demand_pool_starts_when_somebody_asks() {
    let node = FakeNode::default();
    let (m, _events) =
        node.manage(vec![pool_services::PoolSpec { activation: Activation::OnDemand, ..spec("chat") }]).await;
    let id: PoolId = "chat".parse().unwrap();
    tokio::time::sleep(LONG).await;
    assert_eq!(state(&m.pool(&id).await.unwrap()), "idle");
    assert!(matches!(m.lease(&id, LeaseRequest::default()).await, Err(ControlError::Unready { .. })));
    until(&m, &id, PoolSnapshot::ready).await;
    let lease = m.lease(&id, LeaseRequest::default()).await.unwrap();
    assert_eq!(m.pool(&id).await.unwrap().replicas[0].active_leases, 1);
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(m.pool(&id).await.unwrap().replicas[0].active_leases, 0, "an expired lease is free");
    m.release(&lease.id).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_stage_launches_nothing_and_preload_tries_again() {
    let node = FakeNode::default();
    node.models.fail(Some(Failure::new(FailureClass::Artifact, "the model file is missing")));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| state(s) == "failed").await;
    assert!(failed.replicas[0].reason.contains("missing") && node.engines.launches().is_empty());
    node.models.fail(None);
    let op = m.preload(&id).await.unwrap();
    let done = m.wait_operation(&op.id, LONG).await.unwrap();
    assert_eq!(done.state, OperationState::Succeeded("ready".into()));
}

/// A node whose engines are estimated as llama.cpp's, and a pool without a size of its own.
fn estimated() -> (FakeNode, PoolSpec) {
    let node = FakeNode::default();
    node.models.set_profile(header());
    let settings = LlamaCppSettings { context: 4096, ..LlamaCppSettings::default() };
    node.engines.script(|s| s.memory = EngineMemory::LlamaCpp(settings));
    (node, PoolSpec { vram: None, context: Some(4096), ..spec("chat") })
}

#[tokio::test(start_paused = true)]
async fn what_an_engine_really_took_is_promised_the_next_time() {
    let (node, pool) = estimated();
    let device = gpu(0, 0).uuid;
    node.gpus.set_residency(Residency::Simulated(vec![Holder { uuid: device, pid: 0, bytes: 18 << 30 }]));
    let (m, _events) = node.manage(vec![pool]).await;
    let id: PoolId = "chat".parse().unwrap();
    let first = until(&m, &id, PoolSnapshot::ready).await.replicas[0].vram_reserved;
    assert!((16 << 30..18 << 30).contains(&first), "{first}");
    m.stop(&id).await.unwrap();
    // It is off the device again.
    node.gpus.set_residency(Residency::Simulated(Vec::new()));
    until(&m, &id, |s| state(s) == "idle").await;
    assert!(m.plan(PlanRequest::Pool(id.clone())).await.unwrap().learnt);
    m.preload(&id).await.unwrap();
    let second = until(&m, &id, PoolSnapshot::ready).await.replicas[0].vram_reserved;
    assert_eq!(second, (18 << 30) + LEARNT_MARGIN);
}

#[tokio::test(start_paused = true)]
async fn an_estimate_that_was_far_too_small_is_corrected_before_the_engine_serves() {
    let (node, pool) = estimated();
    let device = gpu(0, 0).uuid;
    node.gpus.set_residency(Residency::Simulated(vec![Holder { uuid: device, pid: 0, bytes: 21 << 30 }]));
    let (m, mut events) = node.manage(vec![pool]).await;
    let id: PoolId = "chat".parse().unwrap();
    let ended = until(&m, &id, |s| s.last_error().is_some()).await;
    assert_eq!((ended.last_error().unwrap().class.code(), ended.ready()), ("vram_oom", false), "{ended:?}");
    assert!(std::iter::from_fn(|| events.try_recv().ok()).any(|e| e.code() == "engine_failed"));
    // It is off the device again.
    node.gpus.set_residency(Residency::Simulated(Vec::new()));
    let second = until(&m, &id, PoolSnapshot::ready).await;
    assert_eq!(second.replicas[0].vram_reserved, (21 << 30) + LEARNT_MARGIN);
    assert_eq!(node.engines.launches().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_split_is_granted_whole_with_its_own_bytes_on_each_device() {
    let (node, pool) = estimated();
    let split = PoolSpec { tensor_split: Split::Ratios("3,1".into()), devices: vec!["0,1".parse().unwrap()], ..pool };
    let (m, _events) = node.manage(vec![split]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let promised: Vec<u64> = m.node().await.unwrap().devices.iter().map(|(_, ours)| *ours).collect();
    assert!(promised[0] > 2 * promised[1] && promised[1] > 3 << 30, "{promised:?}");
    let plan = m.plan(PlanRequest::Pool(id)).await.unwrap();
    assert!(plan.fits, "what its own engine holds is there for it: {plan:?}");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_estimated_has_to_be_said_and_what_is_too_large_says_what_would_fit() {
    let (node, pool) = estimated();
    let mut large = header();
    large.layers.iter_mut().for_each(|l| l.bytes *= 4);
    node.models.set_profile(large);
    let (m, _events) = node.manage(vec![pool.clone()]).await;
    let id: PoolId = "chat".parse().unwrap();
    let failed = until(&m, &id, |s| state(s) == "failed").await;
    assert_eq!(failed.last_error().unwrap().class, FailureClass::Config);
    let plan = m.plan(PlanRequest::Pool(id)).await.unwrap();
    assert!(!plan.fits && !plan.waiting_helps && plan.remedies[0].contains("smaller quantisation"), "{plan:?}");
    node.engines.script(|s| s.memory = EngineMemory::Unknown);
    let plan = m.plan(PlanRequest::Spec(Box::new(pool))).await.unwrap();
    assert!(plan.reason.ends_with("set `vram`"), "{plan:?}");
    assert_eq!(node.engines.launches().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn placements_rank_every_replica_with_its_reason() {
    let node = FakeNode::default();
    let asleep = PoolSpec { activation: Activation::OnDemand, ..spec("asleep") };
    let (m, _events) = node.manage(vec![spec("a"), spec("b"), asleep]).await;
    let [a, b]: [PoolId; 2] = ["a", "b"].map(|id| id.parse().unwrap());
    for id in [&a, &b] {
        until(&m, id, PoolSnapshot::ready).await;
    }
    let request = PlacementRequest { model: Some("tiny".into()), ..PlacementRequest::default() };
    let placed = m.placements(request.clone()).await.unwrap();
    let order: Vec<_> = placed.iter().map(|p| (p.key.pool.as_str(), p.serves, p.reason_code.as_str())).collect();
    // Both on the roomier GPU: the fewer leases, then the id.
    assert_eq!(order, [("a", true, ""), ("b", true, ""), ("asleep", false, "not_ready")]);
    let (_, _guard) = m.allocate_lease(&a).unwrap();
    assert_eq!(m.placements(request).await.unwrap()[0].key.pool, b);
    let unknown = PlacementRequest { model: Some("other".into()), ..PlacementRequest::default() };
    assert!(m.placements(unknown).await.unwrap().iter().all(|p| p.reason_code == "model_differs"));
}

#[tokio::test(start_paused = true)]
async fn memory_of_others_is_not_hidden_by_a_promise_that_is_not_used_yet() {
    const GIB: u64 = 1 << 30;
    let node = FakeNode::default();
    // A driver that tells how much is used, and not by whom.
    node.gpus.change(|i| {
        i.devices.truncate(1);
        i.devices[0].vram_used = 10 * GIB;
    });
    node.engines.script(|s| s.load = Duration::from_secs(3_000));
    let asked = |id: &str, vram| PoolSpec { vram: Some(vram), activation: Activation::OnDemand, ..spec(id) };
    let (m, _events) =
        node.manage(vec![asked("slow", 10 * GIB), asked("large", 14 * GIB), asked("small", 4 * GIB)]).await;
    let [slow, large, small]: [PoolId; 3] = ["slow", "large", "small"].map(|id| id.parse().unwrap());
    m.preload(&slow).await.unwrap();
    until(&m, &slow, PoolSnapshot::live).await;
    // 24 in all, 10 of others, 10 promised though nothing of that is used yet.
    m.preload(&large).await.unwrap();
    let waits = until(&m, &large, |s| state(s) == "waiting").await;
    assert!(waits.replicas[0].reason.contains("4.0 GiB left"), "{}", waits.replicas[0].reason);
    m.preload(&small).await.unwrap();
    until(&m, &small, PoolSnapshot::live).await;
    assert_eq!(m.node().await.unwrap().devices[0].0.vram_foreign, 10 * GIB);
}
