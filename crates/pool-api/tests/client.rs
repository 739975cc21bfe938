//! The client against a served router: what goes in comes out.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::time::Duration;

use common::{Fake, chat, id, node, operation, state};
use pool_api::client::{Follow, HttpControl};
use pool_api::dto::keys;
use pool_api::server::{self, Door, router};
use pool_api::spec::{Defaults, PoolIdText, PoolSpec};
use pool_domain::lifecycle::OnDeadline;
use pool_domain::rollout::Strategy;
use pool_domain::{Holder, ReplicaId};
use pool_services::control::{LeaseRequest, PlacementRequest, PlanRequest};
use pool_services::{
    ControlError, Declared, DrainOptions, OperationState, PoolControl, PoolSnapshot, ReloadRequest, Source,
};
use tokio_util::sync::CancellationToken;

async fn serve(fake: Fake) -> HttpControl {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server::serve(Door::Tcp(listener, None), router(state(fake)), 64, CancellationToken::new()));
    HttpControl::new(&format!("http://{address}/")).unwrap()
}

/// As it comes over the wire: what engines publish in numbers is for `/metrics`.
fn told() -> PoolSnapshot {
    let mut pool = chat();
    pool.replicas.iter_mut().for_each(|r| r.meters = Default::default());
    pool
}

#[tokio::test]
async fn round_trip() {
    let c = serve(Fake::default()).await;
    assert_eq!(c.node().await, Ok(node()));
    assert_eq!(c.pools().await, Ok(vec![told()]));
    assert_eq!(c.pool(&id("chat")).await, Ok(told()));
    let newer = c.wait_pool(&id("chat"), 41, Duration::from_secs(9999)).await;
    assert_eq!(newer, Ok(PoolSnapshot { snapshot: 42, ..told() }));
    assert_eq!(c.preload(&id("chat")).await, Ok(operation("preload", OperationState::Running)));
    assert_eq!(c.resume(&id("chat")).await, Ok(operation("resume", OperationState::Running)));
    assert_eq!(c.stop(&id("chat")).await, Ok(operation("stop", OperationState::Running)));
    let options = DrainOptions { deadline: Some(Duration::from_millis(250)), on_deadline: Some(OnDeadline::Abort) };
    assert_eq!(c.drain(&id("chat"), options).await.unwrap().progress, "Some(250ms) true");
    assert_eq!(c.drain(&id("chat"), DrainOptions::default()).await.unwrap().progress, "None false");
    assert_eq!(c.reset_breaker(&id("chat")).await, Ok(()));
    assert_eq!(c.unfence(&node().devices[0].0.uuid).await, Ok(()));
    assert_eq!(c.operations().await, Ok(vec![operation("stop", OperationState::Failed("fenced".into()))]));
    assert_eq!(c.operation("op-1").await, Ok(operation("drain", OperationState::Running)));
    let done = c.wait_operation("op-1", Duration::from_secs(1)).await;
    assert_eq!(done, Ok(operation("drain", OperationState::Succeeded("drained".into()))));
    let plan = c.plan(PlanRequest::Pool(id("chat"))).await.unwrap();
    assert_eq!(plan, Fake::default().plan(PlanRequest::Pool(id("chat"))).await.unwrap());
    let request = PlacementRequest { model: Some("chat".into()), context: Some(7), ..PlacementRequest::default() };
    let placed = c.placements(request.clone()).await;
    assert_eq!(placed, Fake::default().placements(request).await);
    let holder = Holder { job_id: Some("j".into()), session_id: Some("s".into()), tenant_id: Some("t".into()) };
    let (prefer, key) = (Some(ReplicaId(1)), Some("k".into()));
    let (ttl, wait) = (Duration::from_secs(5), Duration::from_secs(7));
    let wish = LeaseRequest { ttl, wait, holder, prefer, key };
    let lease = c.lease(&id("chat"), wish.clone()).await.unwrap();
    assert_eq!(lease, Fake::default().lease(&id("chat"), wish).await.unwrap());
    assert_eq!((lease.slot, &*lease.engine, &*lease.engine_version), (7, "k", "r1"), "all of it arrived");
    for ttl in [None, Some(Duration::from_secs(3))] {
        assert_eq!(c.renew(&lease.id, ttl).await, Fake::default().renew(&lease.id, ttl).await);
    }
    assert_eq!(c.leases().await, Fake::default().leases().await);
    assert_eq!(c.release(&lease.id).await, Ok(()));
    assert_eq!(c.node_view().await.unwrap().version, "1.2.3");
    assert_eq!(c.pool_views().await.unwrap()[0].source, "file");
}

#[tokio::test]
async fn pools_are_declared_changed_and_removed() {
    let c = serve(Fake::default()).await;
    let table = r#"{"id":"chat","model":"stub:b","engine":"stub","slots":2}"#;
    let wire: PoolSpec = serde_json::from_str(table).unwrap();
    let document = serde_json::to_string(&wire).unwrap();
    let spec = wire.check(&Defaults::default()).unwrap();
    let declared = Declared { spec: spec.clone(), document: document.clone(), source: Source::Api };
    let begun = c.declare(declared.clone(), Some(3)).await.unwrap();
    assert_eq!(begun.progress, format!("Api Some(3) {document}"));
    assert_eq!(c.remove(&id("chat"), Some(4)).await.unwrap().progress, "Some(4)");
    assert_eq!(c.remove(&id("chat"), None).await.unwrap().progress, "None");
    assert_eq!(c.rollback(&id("chat")).await.unwrap().verb, "rollback");
    let (revision, read) = c.document(&id("chat")).await.unwrap();
    let there = Fake::default().document(&id("chat")).await.unwrap();
    assert_eq!((revision, keys(&read).unwrap()), (there.0, keys(&there.1).unwrap()));
    // What was there and is not there any more goes, too, and the answer is about the revision that was read.
    let request = ReloadRequest {
        declared: Some((spec, document.clone())),
        strategy: Some(Strategy::Rolling),
        deadline: Some(Duration::from_secs(9)),
        on_deadline: Some(OnDeadline::Force),
        ..ReloadRequest::default()
    };
    let progress = c.reload(&id("chat"), request).await.unwrap().progress;
    assert_eq!(progress, format!("{:?} Some(3) Some(Rolling) Some(9s) Some(Force)", Some(&document)));
    let plain = c.reload(&id("chat"), ReloadRequest::default()).await.unwrap().progress;
    assert_eq!(plain, "None None None None None");
    assert_eq!(c.reload_config().await.unwrap().unchanged, ["chat"]);
    let other = PoolSpec { id: PoolIdText::parse("other").unwrap(), ..serde_json::from_str(table).unwrap() };
    let document = serde_json::to_string(&other).unwrap();
    let declared = Declared { spec: other.check(&Defaults::default()).unwrap(), document, ..declared };
    assert_eq!(c.declare(declared, None).await, Err(ControlError::PoolInFile("other".into())));
}

#[tokio::test]
async fn errors_come_back_as_they_were() {
    for error in [
        ControlError::PoolNotFound("chat".into()),
        ControlError::Conflict("busy".into()),
        ControlError::Saturated { retry_after: Duration::from_secs(7) },
        ControlError::Unready { why: "starting".into(), retry_after: Some(Duration::from_secs(3)) },
        ControlError::Draining,
        ControlError::Unavailable { retry_after: Duration::from_millis(1500) },
        ControlError::Unreachable("stopping".into()),
        ControlError::Refused { code: "NEW".into(), detail: "d".into() },
    ] {
        let c = serve(Fake { error: Some(error.clone()), ..Fake::default() }).await;
        assert_eq!(c.lease(&id("chat"), LeaseRequest::default()).await, Err(error));
    }
    let c = serve(Fake::default()).await;
    for odd in ["op 2/..?#é", "..", ".", "%2e"] {
        assert_eq!(c.operation(odd).await, Err(ControlError::OperationNotFound(odd.into())));
        assert_eq!(c.unfence(odd).await, Err(ControlError::DeviceNotFound(odd.into())));
        assert_eq!(c.renew(odd, None).await, Err(ControlError::LeaseNotFound(odd.into())));
        assert_eq!(c.release(odd).await, Err(ControlError::LeaseNotFound(odd.into())));
    }
    let refused = c.lease(&id("chat"), LeaseRequest::lasting(Duration::ZERO)).await;
    assert!(matches!(refused, Err(ControlError::Refused { code, .. }) if code == "INVALID_PARAMS"));
}

#[tokio::test]
async fn nobody_there() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let c = HttpControl::new(&format!("http://{address}")).unwrap();
    let Err(ControlError::Unreachable(text)) = c.node().await else { panic!("it is not there") };
    assert!(text.contains("does not take connections") && text.contains("serve"), "{text}");
}

#[tokio::test]
async fn events_and_logs_are_followed() {
    let c = serve(Fake::default()).await;
    let mut past = c.events(&Follow::default(), Some(&id("chat"))).await.unwrap();
    let event = past.next().await.unwrap().unwrap();
    assert_eq!((event.id.as_deref(), event.kind.as_str()), (Some("e-1"), "started"));
    assert_eq!(event.view().unwrap().pool_id, "chat");
    assert_eq!(past.next().await, Ok(None));
    let mut lines = c.logs(&id("chat"), None, &Follow { follow: true, tail: Some(1), after: None }).await.unwrap();
    let mut told = Vec::new();
    while told.len() < 4 {
        told.push(lines.next().await.unwrap().unwrap().data);
    }
    // The last line there is, and one more with each look.
    assert_eq!(told, ["chat-r0 7 line 3", "chat-r0 7 line 4", "chat-r0 7 line 5", "chat-r0 7 line 6"]);
    let unknown = c.logs(&id("none"), None, &Follow::default()).await;
    assert!(matches!(unknown, Err(ControlError::PoolNotFound(_))));
    assert_eq!(c.capabilities().await.unwrap().models, ["tiny"]);
}

#[test]
fn addresses() {
    for good in ["http://127.0.0.1:9200", "http://[::1]:9200/", "http://gpu.lan", "unix:/x", "unix:///x"] {
        assert!(HttpControl::new(good).is_ok(), "{good}");
    }
    for bad in
        ["", "127.0.0.1:9200", "https://x", "http://", "http://u:p@x", "http://x/y", "http://x?y", "unix:x", "unix:"]
    {
        assert!(HttpControl::new(bad).is_err(), "{bad}");
    }
}
