//! What must not happen, by mocks that fail the test when it does.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::disallowed_types, reason = "mockall's own locks")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use mockall::mock;
use pool_domain::{Failure, FailureClass};
use pool_services::ports::{EngineHost, EngineRecord, NotAdopted, PreparedEngine, RunningEngine};
use pool_services::{PoolControl, PoolManager};
use pool_testkit::{FakeNode, spec};

mock! {
    #[derive(Debug)]
    Host {}
    #[async_trait]
    impl EngineHost for Host {
        fn port_free(&self, addr: SocketAddr) -> bool;
        fn nonce(&self) -> String;
        async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine)
            -> Result<Arc<dyn RunningEngine>, Failure>;
        async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted>;
        async fn end_unknown(&self, known: &[EngineRecord], devices: &[String]) -> Vec<String>;
        fn device_clear(&self, device: &str) -> bool;
    }
}

async fn state_after_an_hour(node: &FakeNode) -> &'static str {
    let mut host = MockHost::new();
    host.expect_port_free().return_const(true);
    host.expect_nonce().return_const("nonce");
    host.expect_end_unknown().returning(|_, _| Vec::new());
    host.expect_device_clear().return_const(true);
    host.expect_launch().never();
    let (m, _events) = PoolManager::builder()
        .gpu(Arc::clone(&node.gpus) as _)
        .models(Arc::clone(&node.models) as _)
        .provisioner(Arc::clone(&node.engines) as _)
        .host(Arc::new(host))
        .probe(Arc::clone(&node.engines) as _)
        .ledger(Arc::clone(&node.ledger) as _)
        .pools(vec![spec("chat")])
        .start()
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    m.pool(&"chat".parse().unwrap()).await.unwrap().replicas[0].state
}

#[tokio::test(start_paused = true)]
async fn nothing_is_launched_after_a_failed_stage() {
    let node = FakeNode::default();
    node.models.fail(Some(Failure::new(FailureClass::Artifact, "missing")));
    assert_eq!(state_after_an_hour(&node).await, "failed");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_launched_after_a_failed_preflight() {
    let node = FakeNode::default();
    node.engines.script(|s| s.preflight = Some(Failure::new(FailureClass::Config, "no such binary")));
    assert_eq!(state_after_an_hour(&node).await, "failed");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_launched_without_a_device() {
    let node = FakeNode::default();
    node.gpus.change(|i| i.devices.clear());
    assert_eq!(state_after_an_hour(&node).await, "waiting");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_launched_without_a_durable_intent() {
    let node = FakeNode::default();
    node.ledger.set_broken(true);
    assert_ne!(state_after_an_hour(&node).await, "ready");
}
