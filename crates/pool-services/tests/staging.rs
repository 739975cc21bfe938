//! Models that have to be fetched, on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::{Failure, FailureClass, PoolId};
use pool_services::events::EventKind;
use pool_services::{ControlError, OperationState, PoolControl, PoolSnapshot, PoolSpec, ReloadRequest};
use pool_testkit::{FakeNode, spec, until};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(36_000);

#[tokio::test(start_paused = true)]
async fn how_far_a_model_is_is_told_and_nobody_is_flooded() {
    let node = FakeNode::default();
    // A minute in 1,200 steps.
    node.models.set_fetch(1_200, Duration::from_millis(50));
    let (m, mut events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let (began, mut pictures, mut last) = (Instant::now(), 0, 0);
    let mut seen = m.pool(&id).await.unwrap();
    while !seen.ready() {
        assert!(began.elapsed() < LONG);
        if let Some(staging) = seen.replicas[0].staging {
            assert_eq!(seen.replicas[0].state, "staging");
            assert!(staging.done >= last, "it does not go back");
            (pictures, last) = (pictures + 1, staging.done);
            if staging.done > 0 {
                let left = (1_200 - staging.done).div_ceil(2);
                assert!(seen.replicas[0].reason.ends_with(&format!("{left} s left")), "{}", seen.replicas[0].reason);
            }
        }
        seen = m.wait_pool(&id, seen.snapshot, Duration::from_secs(3_600)).await.unwrap();
    }
    assert!((50..=70).contains(&pictures), "about one a second: {pictures}");
    assert!(last > 1_100, "{last}");
    assert_eq!(seen.replicas[0].staging, None);
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        if matches!(event.kind, EventKind::ModelFetching { .. } | EventKind::ModelFetched { .. }) {
            told.push(event);
        }
    }
    let (done, fetching) = told.split_last().unwrap();
    assert!((5..=8).contains(&fetching.len()), "{fetching:?}");
    assert!(
        matches!(done.kind, EventKind::ModelFetched { bytes: 1_200, took } if took >= Duration::from_secs(58)),
        "{done:?}"
    );
    assert_eq!(fetching[0].human(), "Fetching the model of the chat pool: 0 KiB of 1 KiB");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_nobody_wants_any_more_ends_at_once() {
    let node = FakeNode::default();
    node.models.set_fetch(100, Duration::from_secs(60));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let fetching = until(&m, &id, |s| s.replicas[0].staging.is_some_and(|s| s.done > 2)).await;
    assert!(matches!(m.allocate_lease(&id), Err(ControlError::Unready { .. })), "nobody hangs on it");
    let began = Instant::now();
    let stopped = m.stop(&id).await.unwrap();
    m.wait_operation(&stopped.id, LONG).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{fetching:?}");
    let idle = until(&m, &id, |s| s.replicas[0].state == "idle").await;
    assert_eq!((idle.replicas[0].staging, node.engines.launches().len()), (None, 0));
}

/// The old one serves while the new model comes, and a reload that is given up fetches nothing any more.
#[tokio::test(start_paused = true)]
async fn a_reload_fetches_before_it_touches_anything() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    until(&m, &id, PoolSnapshot::ready).await;
    let other = || PoolSpec { model: "stub:other".parse().unwrap(), ..spec("chat") };
    let request = |deadline| ReloadRequest {
        declared: Some((other(), "new".into())),
        deadline: Some(Duration::from_secs(deadline)),
        ..ReloadRequest::default()
    };
    node.models.set_fetch(10, Duration::from_secs(60));
    let begun = m.reload(&id, request(60)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(node.models.fetching(), 1);
    assert!(m.pool(&id).await.unwrap().ready() && m.allocate_lease(&id).is_ok());
    let OperationState::Failed(why) = m.wait_operation(&begun.id, LONG).await.unwrap().state else { panic!("in time") };
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((node.models.fetching(), m.pool(&id).await.unwrap().ready()), (0, true), "{why}");
    let begun = m.reload(&id, request(3_600)).await.unwrap();
    let done = m.wait_operation(&begun.id, LONG).await.unwrap();
    assert_eq!(done.state, OperationState::Succeeded("reloaded".into()));
    assert_eq!(m.pool(&id).await.unwrap().model_id, "other");
}

#[tokio::test(start_paused = true)]
async fn a_model_that_cannot_be_fetched_now_is_tried_again_and_held_against_nobody() {
    let node = FakeNode::default();
    node.models.fail(Some(Failure::new(FailureClass::Fetch, "the hub does not answer")));
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let first = until(&m, &id, |s| s.replicas[0].generation.0 >= 8).await;
    assert_eq!(first.replicas[0].breaker, "closed", "{first:#?}");
    let waits = until(&m, &id, |s| s.replicas[0].state == "waiting").await;
    assert!(waits.replicas[0].reason.contains("the hub does not answer"), "{waits:#?}");
    assert_eq!((waits.last_error().unwrap().class.code(), node.engines.launches().len()), ("fetch", 0));
    node.models.fail(None);
    until(&m, &id, PoolSnapshot::ready).await;
}
