//! Fakes that can be told to fail, hang or lie, and a whole node made of them.
#![forbid(unsafe_code)]
#![expect(
    clippy::disallowed_types,
    reason = "fakes are shared with tests; their locks are held for a line and never across an await"
)]

mod engines;
mod rest;
pub mod sim;

pub use engines::{FakeEngines, Process, Script};
pub use rest::{FakeGpus, FakeLedger, FakeModels, gpu, spec};

use std::sync::Arc;
use std::time::Duration;

use pool_domain::{KvShape, LayerProfile, ModelFormat, ModelProfile, PoolId};
use pool_services::events::Event;
use pool_services::{Builder, PoolControl, PoolManager, PoolSnapshot, PoolSpec, Restored};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Waits, level-triggered and bounded, until the pool looks as wanted.
///
/// # Panics
/// When there is no such pool, or it does not look so within ten hours.
pub async fn until(m: &PoolManager, id: &PoolId, wanted: impl Fn(&PoolSnapshot) -> bool) -> PoolSnapshot {
    let mut seen = m.pool(id).await.expect("a pool");
    let end = Instant::now() + Duration::from_secs(36_000);
    while !wanted(&seen) {
        assert!(Instant::now() < end, "never came: {seen:#?}");
        seen = m.wait_pool(id, seen.snapshot, Duration::from_secs(3_600)).await.expect("a pool");
    }
    seen
}

/// A model of 16 GiB, as its header would tell.
#[must_use]
pub fn header() -> ModelProfile {
    let kv = KvShape { heads_kv: 8, key_length: 128, value_length: 128, window: None };
    let layer =
        LayerProfile { bytes: 500 << 20, heads: 32, kv: Some(kv), feed_forward_length: 8192, ..Default::default() };
    ModelProfile {
        format: ModelFormat::Gguf,
        architecture: "llama".into(),
        layers: vec![layer; 32],
        input_bytes: 100 << 20,
        output_bytes: 100 << 20,
        other_bytes: 0,
        tied_embeddings: false,
        embedding_bytes: 100 << 20,
        embedding_length: 4096,
        context_length: 32_768,
        vocabulary: 32_000,
        experts: 0,
        experts_used: 0,
        quantisation: "Q8_0".into(),
        tensor_bytes: 16 << 30,
        header_digest: "sha256:a".into(),
    }
}

/// A node of fakes.
#[derive(Debug, Clone)]
pub struct FakeNode {
    /// Engines.
    pub engines: Arc<FakeEngines>,
    /// GPUs.
    pub gpus: Arc<FakeGpus>,
    /// Models.
    pub models: Arc<FakeModels>,
    /// Durable facts.
    pub ledger: Arc<FakeLedger>,
}

impl Default for FakeNode {
    fn default() -> Self {
        Self {
            engines: Arc::new(FakeEngines::default()),
            gpus: Arc::new(FakeGpus::with(vec![gpu(0, 24 << 30), gpu(1, 12 << 30)])),
            models: Arc::new(FakeModels::default()),
            ledger: Arc::new(FakeLedger::default()),
        }
    }
}

impl FakeNode {
    /// Starts a manager over the fakes; the first one when the machine boots, later ones in the same boot.
    ///
    /// # Panics
    /// When the pools cannot be managed at all.
    pub async fn manage(&self, pools: Vec<PoolSpec>) -> (PoolManager, mpsc::Receiver<Event>) {
        self.manage_at(pools, Duration::ZERO).await
    }

    /// The same, this long after the boot of the machine.
    ///
    /// # Panics
    /// When the pools cannot be managed at all.
    pub async fn manage_at(&self, pools: Vec<PoolSpec>, uptime: Duration) -> (PoolManager, mpsc::Receiver<Event>) {
        self.manage_declared(pools.into_iter().map(Into::into).collect(), uptime).await
    }

    /// The same with pools that have a history.
    ///
    /// # Panics
    /// When the pools cannot be managed at all.
    pub async fn manage_declared(
        &self,
        pools: Vec<Restored>,
        uptime: Duration,
    ) -> (PoolManager, mpsc::Receiver<Event>) {
        self.builder(pools, uptime).start().await.expect("a complete set of fakes")
    }

    /// What a manager is made of, to be changed before it starts.
    #[must_use]
    pub fn builder(&self, pools: Vec<Restored>, uptime: Duration) -> Builder {
        let engines = &self.engines;
        PoolManager::builder()
            .gpu(Arc::clone(&self.gpus) as _)
            .models(Arc::clone(&self.models) as _)
            .provisioner(Arc::clone(engines) as _)
            .host(Arc::clone(engines) as _)
            .probe(Arc::clone(engines) as _)
            .ledger(Arc::clone(&self.ledger) as _)
            .declared(pools)
            .seed(7)
            .boot_ms(u64::try_from(uptime.max(self.ledger.booted().elapsed()).as_millis()).unwrap_or(u64::MAX))
    }
}
