//! Pools of several replicas, and the order in which engines load; on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::PoolId;
use pool_services::{Activation, LeaseRequest, OperationState, PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, gpu, spec, until};
use tokio::time::Instant;

fn id(id: &str) -> PoolId {
    id.parse().unwrap()
}

async fn loading(m: &PoolManager) -> Vec<(String, String)> {
    let pools = m.pools().await.unwrap();
    let replicas = pools.iter().flat_map(|p| p.replicas.iter().map(move |r| (p, r)));
    replicas
        .filter(|(_, r)| matches!(r.state, "starting" | "warming"))
        .map(|(p, r)| (p.pool_id.to_string(), r.device_mask.clone()))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn auto_spreads_replicas_over_devices_while_there_are_such() {
    let node = FakeNode::default();
    // The first GPU has room for all of them.
    let (m, _events) = node.manage(vec![PoolSpec { replicas: 3, ..spec("chat") }]).await;
    let ready = until(&m, &id("chat"), |s| s.ready_replicas() == 3).await;
    let mut on: Vec<_> = ready.replicas.iter().map(|r| r.device_mask.clone()).collect();
    on.sort();
    assert_eq!(on, [gpu(0, 0).uuid, gpu(0, 0).uuid, gpu(1, 0).uuid]);
}

#[tokio::test(start_paused = true)]
async fn each_replica_gets_its_own_mask() {
    let node = FakeNode::default();
    let masks = vec!["1".parse().unwrap(), "0".parse().unwrap()];
    let (m, _events) = node.manage(vec![PoolSpec { replicas: 2, devices: masks, ..spec("chat") }]).await;
    let ready = until(&m, &id("chat"), |s| s.ready_replicas() == 2).await;
    let on: Vec<_> = ready.replicas.iter().map(|r| r.device_mask.clone()).collect();
    assert_eq!(on, [gpu(1, 0).uuid, gpu(0, 0).uuid]);
}

#[tokio::test(start_paused = true)]
async fn one_loads_at_a_time_on_a_device_and_devices_load_side_by_side() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(10));
    let on = |id: &str, mask: &str| PoolSpec { devices: vec![mask.parse().unwrap()], ..spec(id) };
    let began = Instant::now();
    let (m, _events) = node.manage(vec![on("a", "0"), on("b", "0"), on("c", "0"), on("d", "1")]).await;
    let mut most = 0;
    while m.pools().await.unwrap().iter().any(|p| !p.ready()) {
        let now = loading(&m).await;
        let mut devices: Vec<_> = now.iter().map(|(_, device)| device).collect();
        devices.sort();
        devices.dedup();
        assert_eq!(devices.len(), now.len(), "two load on one device: {now:?}");
        most = most.max(now.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(most, 2);
    let took = began.elapsed().as_secs();
    assert!((30..32).contains(&took), "{took}");
}

#[tokio::test(start_paused = true)]
async fn a_start_over_two_devices_gets_its_turn_though_others_keep_coming() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(10));
    let on = |id: &str, mask: &str| PoolSpec { devices: vec![mask.parse().unwrap()], ..spec(id) };
    let pools = vec![on("a", "0"), on("b", "0,1"), on("c", "1"), on("d", "0"), on("e", "1")];
    let began = Instant::now();
    let (m, _events) = node.manage(pools).await;
    until(&m, &id("b"), PoolSnapshot::ready).await;
    // After the one that loads on each of its devices, and before everybody else.
    assert!(began.elapsed().as_secs() < 32, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn preloaded_pools_come_first() {
    let node = FakeNode::default();
    node.engines.script(|s| s.load = Duration::from_secs(10));
    let on_first = |id: &str| PoolSpec { devices: vec!["0".parse().unwrap()], ..spec(id) };
    let asked = PoolSpec { activation: Activation::OnDemand, ..on_first("a") };
    let (m, _events) = node.manage(vec![asked, on_first("b"), on_first("c")]).await;
    until(&m, &id("b"), PoolSnapshot::live).await;
    assert!(m.lease(&id("a"), LeaseRequest::lasting(Duration::from_secs(1))).await.is_err());
    until(&m, &id("c"), PoolSnapshot::ready).await;
    assert!(!m.pool(&id("a")).await.unwrap().ready());
    until(&m, &id("a"), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn devices_that_are_not_there_yet_are_waited_for() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices.clear());
    let on_second = PoolSpec { devices: vec!["1".parse().unwrap()], ..spec("chat") };
    let (m, _events) = node.manage(vec![on_second]).await;
    let waits = |s: &PoolSnapshot| s.replicas[0].state == "waiting" && s.replicas[0].reason_code == "devices";
    until(&m, &id("chat"), waits).await;
    node.gpus.change(|i| i.devices = vec![gpu(0, 24 << 30)]);
    let waiting = until(&m, &id("chat"), |s| s.replicas[0].reason.contains("not on this node")).await;
    assert!(waits(&waiting), "{waiting:?}");
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert!(node.engines.launches().is_empty());
    node.gpus.change(|i| i.devices.push(gpu(1, 12 << 30)));
    until(&m, &id("chat"), PoolSnapshot::ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_is_as_ready_as_its_replicas_and_a_preload_tells_of_each() {
    let node = FakeNode::default();
    let cramped = PoolSpec { replicas: 2, vram: Some(20 << 30), ..spec("chat") };
    let (m, _events) = node.manage(vec![cramped]).await;
    let begun = m.preload(&id("chat")).await.unwrap();
    let degraded = until(&m, &id("chat"), |s| s.ready() && s.replicas.iter().any(|r| r.reason_code == "vram")).await;
    assert_eq!((degraded.ready_replicas(), degraded.replicas.len()), (1, 2));
    let (_, guard) = m.allocate_lease(&id("chat")).unwrap();
    let now = m.operation(&begun.id).await.unwrap();
    assert_eq!(now.state, OperationState::Running);
    assert!(now.progress.starts_with("1 of 2 ready: r"), "{}", now.progress);
    assert!(now.progress.contains("waiting") && now.progress.contains("ready"), "{}", now.progress);
    drop(guard);
}

#[tokio::test(start_paused = true)]
async fn leases_go_to_the_replica_with_most_room() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![PoolSpec { replicas: 2, ..spec("chat") }]).await;
    until(&m, &id("chat"), |s| s.ready_replicas() == 2).await;
    let held: Vec<_> = (0..8).map(|_| m.allocate_lease(&id("chat")).unwrap()).collect();
    for pair in held.chunks(2) {
        assert_ne!(pair[0].0.replica, pair[1].0.replica);
    }
}
