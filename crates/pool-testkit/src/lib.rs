//! Fakes that can be told to fail, hang or lie, and a whole node made of them.
#![forbid(unsafe_code)]
#![expect(
    clippy::disallowed_types,
    reason = "fakes are shared with tests; their locks are held for a line and never across an await"
)]

mod engines;
mod rest;
pub mod sim;

pub use engines::{FakeEngines, Script};
pub use rest::{FakeGpus, FakeLedger, FakeModels, gpu, spec};

use std::sync::Arc;

use pool_services::events::Event;
use pool_services::{PoolManager, PoolSpec};
use tokio::sync::mpsc;

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
    /// Starts a manager over the fakes.
    ///
    /// # Panics
    /// When the pools cannot be managed at all.
    pub async fn manage(&self, pools: Vec<PoolSpec>) -> (PoolManager, mpsc::Receiver<Event>) {
        let engines = &self.engines;
        PoolManager::builder()
            .gpu(Arc::clone(&self.gpus) as _)
            .models(Arc::clone(&self.models) as _)
            .provisioner(Arc::clone(engines) as _)
            .host(Arc::clone(engines) as _)
            .probe(Arc::clone(engines) as _)
            .ledger(Arc::clone(&self.ledger) as _)
            .pools(pools)
            .seed(7)
            .start()
            .await
            .expect("a complete set of fakes")
    }
}
