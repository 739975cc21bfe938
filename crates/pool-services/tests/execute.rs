//! Verbs carried out to their end.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::lifecycle::OnDeadline;
use pool_domain::rollout::Strategy;
use pool_domain::{Failure, FailureClass, PoolId};
use pool_services::{
    ControlError, DrainOptions, DrainOutcome, DrainRequest, PoolControl, PoolSnapshot, PoolSpec, PreloadOutcome,
    ReloadOutcome, ReloadRequest, execute_drain, execute_reload,
};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::Instant;

fn chat() -> PoolId {
    "chat".parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_over_when_nothing_runs_or_when_it_was_given_up() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &chat(), PoolSnapshot::ready).await;
    let held = m.allocate_lease(&chat()).unwrap();
    let request = DrainRequest::new(chat(), Duration::from_secs(10));
    let options = DrainOptions { on_deadline: Some(OnDeadline::Abort), ..request.options };
    let began = Instant::now();
    let outcome = execute_drain(&DrainRequest { options, ..request.clone() }, &m).await.unwrap();
    assert!(matches!(&outcome, DrainOutcome::NotDrained(why) if why.contains("leases were still held")), "{outcome:?}");
    assert!(began.elapsed() >= Duration::from_secs(10) && m.pool(&chat()).await.unwrap().ready());

    assert_eq!(execute_drain(&request, &m).await, Ok(DrainOutcome::Drained));
    let rests = m.pool(&chat()).await.unwrap();
    assert!(rests.hold && !rests.live() && node.engines.running().is_empty());
    drop(held);

    let nobody = DrainRequest::new("nobody".parse().unwrap(), Duration::ZERO);
    assert_eq!(execute_drain(&nobody, &m).await, Err(ControlError::PoolNotFound("nobody".into())));
}

#[tokio::test(start_paused = true)]
async fn a_reload_tells_the_new_the_old_and_nothing_apart() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &chat(), PoolSnapshot::ready).await;
    let to = |model: &str| {
        let spec = PoolSpec { model: model.parse().unwrap(), ..spec("chat") };
        ReloadRequest { declared: Some((spec, model.into())), strategy: Some(Strategy::Overlap), ..Default::default() }
    };
    assert_eq!(execute_reload(&chat(), to("stub:other"), &m).await, Ok(ReloadOutcome::Reloaded));
    assert_eq!(m.pool(&chat()).await.unwrap().model, "stub:other");
    assert_eq!(execute_reload(&chat(), to("stub:other"), &m).await, Ok(ReloadOutcome::Unchanged));
    node.engines.script_of("third", |s| s.model = Some("fourth".into()));
    let outcome = execute_reload(&chat(), to("stub:third"), &m).await.unwrap();
    assert!(matches!(&outcome, ReloadOutcome::NotReloaded(why) if why.contains("fourth")), "{outcome:?}");
    assert_eq!(m.pool(&chat()).await.unwrap().model, "stub:other");
    let late = ReloadRequest { if_match: Some(1), ..to("stub:third") };
    assert!(matches!(execute_reload(&chat(), late, &m).await, Err(ControlError::Conflict(_))));
}

#[tokio::test(start_paused = true)]
async fn a_preload_is_over_when_every_replica_serves_or_one_cannot() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(200));
    node.models.fail(Some(Failure::new(FailureClass::Artifact, "the model file is missing")));
    let (m, _events) = node.manage(vec![PoolSpec { replicas: 2, ..spec("chat") }]).await;
    let outcome = PreloadOutcome::execute(&chat(), &m).await.unwrap();
    assert!(matches!(&outcome, PreloadOutcome::NotReady(why) if why.contains("missing")), "{outcome:?}");
    assert!(node.engines.launches().is_empty());
    node.models.fail(None);
    assert_eq!(PreloadOutcome::execute(&chat(), &m).await, Ok(PreloadOutcome::Ready));
    assert_eq!(m.pool(&chat()).await.unwrap().ready_replicas(), 2);
    let nobody = PreloadOutcome::execute(&"nobody".parse().unwrap(), &m).await;
    assert_eq!(nobody, Err(ControlError::PoolNotFound("nobody".into())));
}
