//! The way from a model's name to a slot and an engine, on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::{Holder, PoolId};
use pool_services::{
    Activation, ControlError, LeaseRequest, PoolControl, PoolManager, PoolSnapshot, PoolSpec, Routing,
};
use pool_testkit::{FakeNode, spec, until};

const WAIT: Duration = Duration::from_secs(300);

fn id(text: &str) -> PoolId {
    text.parse().unwrap()
}

fn names(m: &PoolManager, model: &str) -> Vec<String> {
    m.named(model).unwrap().iter().map(ToString::to_string).collect()
}

async fn route(m: &PoolManager, pool: &str) -> Result<pool_services::Route, ControlError> {
    m.route(&id(pool), WAIT, &Holder::default()).await
}

#[tokio::test(start_paused = true)]
async fn a_name_is_a_pool_s_own_before_an_alias_before_a_model_and_room_goes_first() {
    let node = FakeNode::default();
    let with = |name: &str, aliases: &[&str]| PoolSpec {
        aliases: aliases.iter().map(ToString::to_string).collect(),
        model: pool_domain::ModelRef::Stub(format!("model-{name}")),
        vram: Some(1 << 29),
        ..spec(name)
    };
    let pools = vec![with("a", &["gpt", "x"]), with("b", &["gpt"]), with("x-1", &[])];
    let (m, _events) = node.manage(pools).await;
    for pool in ["a", "b", "x-1"] {
        until(&m, &id(pool), PoolSnapshot::ready).await;
    }
    assert_eq!((names(&m, "a"), names(&m, "nobody")), (vec!["a".to_owned()], Vec::new()));
    assert_eq!(names(&m, "gpt"), ["a", "b"]);
    assert_eq!(names(&m, "model-b"), ["b"]);
    // Who is full comes last.
    let slots = m.pool(&id("a")).await.unwrap().replicas[0].slots_total;
    let mut held = Vec::new();
    for _ in 0..slots {
        held.push(route(&m, "a").await.unwrap());
    }
    assert_eq!(names(&m, "gpt"), ["b", "a"]);
    drop(held);
    assert_eq!(names(&m, "gpt"), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_route_starts_what_rests_leads_to_its_engine_and_gives_its_slot_back() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![PoolSpec { activation: Activation::OnDemand, ..spec("chat") }]).await;
    let first = route(&m, "chat").await.unwrap();
    let shown = m.pool(&id("chat")).await.unwrap().replicas.remove(0);
    assert_eq!((Some(&first.endpoint), first.generation), (shown.endpoint.as_ref(), shown.generation));
    assert_eq!((first.key.pool.as_str(), shown.active_leases), ("chat", 1));
    drop(first);
    assert_eq!(m.pool(&id("chat")).await.unwrap().replicas[0].active_leases, 0);
    // An engine that dies is not led to any more: who asks waits for the next one.
    let lost = route(&m, "chat").await.unwrap();
    node.engines.crash_all();
    until(&m, &id("chat"), |p| !p.ready()).await;
    let next = route(&m, "chat").await.unwrap();
    assert!(next.generation > lost.generation);
    assert!(!lost.slot.as_ref().unwrap().valid());
    drop(lost);
    assert_eq!(m.pool(&id("chat")).await.unwrap().replicas[0].active_leases, 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_has_a_bound_and_is_told_why() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![PoolSpec { slots: 1, ..spec("chat") }]).await;
    until(&m, &id("chat"), PoolSnapshot::ready).await;
    let mut held = Vec::new();
    let full = loop {
        match m.route(&id("chat"), Duration::ZERO, &Holder::default()).await {
            Ok(route) => held.push(route),
            Err(full) => break full,
        }
    };
    assert!(matches!(full, ControlError::Saturated { .. }), "{full}");
    let began = tokio::time::Instant::now();
    assert!(matches!(route(&m, "chat").await, Err(ControlError::Saturated { .. })));
    assert_eq!(began.elapsed(), WAIT);
    let (next, ()) = tokio::join!(route(&m, "chat"), async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        held.clear();
    });
    assert!(next.is_ok());
    assert!(matches!(route(&m, "none").await, Err(ControlError::PoolNotFound(_))));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_followed_to_its_engine_as_long_as_it_lasts() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id("chat"), PoolSnapshot::ready).await;
    let lease = m.lease(&id("chat"), LeaseRequest::lasting(WAIT)).await.unwrap();
    tokio::time::sleep(WAIT / 2).await;
    let (renewed, way) = m.follow(&lease.id, &Default::default()).await.unwrap();
    assert_eq!((renewed.id, &way.endpoint, way.slot.is_none()), (lease.id.clone(), &lease.endpoint, true));
    assert!(renewed.expires_at > lease.expires_at, "it goes on while it is used");
    assert_eq!(m.pool(&id("chat")).await.unwrap().replicas[0].active_leases, 1);
    m.release(&lease.id).await.unwrap();
    assert!(matches!(m.follow(&lease.id, &Default::default()).await, Err(ControlError::LeaseNotFound(_))));
    assert!(matches!(m.follow("nothing", &Default::default()).await, Err(ControlError::LeaseNotFound(_))));
}
