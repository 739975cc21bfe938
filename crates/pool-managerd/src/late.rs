//! The verbs before there is a manager: the API answers from the first moment on, also while devices are waited for.

use std::time::Duration;

use async_trait::async_trait;
use pool_domain::{Generation, Holder, PoolId, ReplicaKey};
use pool_services::control::{Lease, LeaseRequest, PlacementRequest, PlanRequest};
use pool_services::{
    ControlError, Declared, DrainOptions, EventKind, NodeSnapshot, Operation, Placed, PlanReport, PoolControl,
    PoolManager, PoolSnapshot, ReloadRequest, Route, Routing,
};
use tokio::sync::SetOnce;
use tokio::time::{Instant, timeout};

/// A manager that may come later. Until then nothing is there to be asked.
#[derive(Debug, Default)]
pub(crate) struct LateControl(SetOnce<PoolManager>);

impl LateControl {
    /// From now on there is one.
    pub(crate) fn set(&self, manager: PoolManager) {
        // Only one is ever made.
        let _ = self.0.set(manager);
    }

    fn get(&self) -> Result<&PoolManager, ControlError> {
        self.0.get().ok_or_else(|| ControlError::unready("the daemon is starting and waits for its GPUs"))
    }

    /// Who is ready to wait does so for the manager, too; and for so much less for what it is asked then.
    async fn within(&self, wait: Duration) -> Result<(&PoolManager, Duration), ControlError> {
        let since = Instant::now();
        match timeout(wait, self.0.wait()).await {
            Ok(manager) => Ok((manager, wait.saturating_sub(since.elapsed()))),
            Err(_) => Ok((self.get()?, Duration::ZERO)),
        }
    }
}

#[async_trait]
impl PoolControl for LateControl {
    async fn node(&self) -> Result<NodeSnapshot, ControlError> {
        self.get()?.node().await
    }
    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError> {
        self.get()?.pools().await
    }
    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError> {
        self.get()?.pool(id).await
    }
    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError> {
        let (manager, wait) = self.within(wait).await?;
        manager.wait_pool(id, after, wait).await
    }
    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.get()?.preload(id).await
    }
    async fn drain(&self, id: &PoolId, options: DrainOptions) -> Result<Operation, ControlError> {
        self.get()?.drain(id, options).await
    }
    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.get()?.resume(id).await
    }
    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.get()?.stop(id).await
    }
    async fn declare(&self, declared: Declared, if_match: Option<u64>) -> Result<Operation, ControlError> {
        self.get()?.declare(declared, if_match).await
    }
    async fn remove(&self, id: &PoolId, if_match: Option<u64>) -> Result<Operation, ControlError> {
        self.get()?.remove(id, if_match).await
    }
    async fn reload(&self, id: &PoolId, request: ReloadRequest) -> Result<Operation, ControlError> {
        self.get()?.reload(id, request).await
    }
    async fn rollback(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.get()?.rollback(id).await
    }
    async fn document(&self, id: &PoolId) -> Result<(u64, String), ControlError> {
        self.get()?.document(id).await
    }
    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError> {
        self.get()?.reset_breaker(id).await
    }
    async fn unfence(&self, device: &str) -> Result<(), ControlError> {
        self.get()?.unfence(device).await
    }
    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError> {
        self.get()?.plan(what).await
    }
    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError> {
        self.get()?.placements(request).await
    }
    async fn operations(&self) -> Result<Vec<Operation>, ControlError> {
        self.get()?.operations().await
    }
    async fn operation(&self, id: &str) -> Result<Operation, ControlError> {
        self.get()?.operation(id).await
    }
    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError> {
        let (manager, wait) = self.within(wait).await?;
        manager.wait_operation(id, wait).await
    }
    async fn lease(&self, id: &PoolId, mut request: LeaseRequest) -> Result<Lease, ControlError> {
        let (manager, wait) = self.within(request.wait).await?;
        request.wait = wait;
        manager.lease(id, request).await
    }
    async fn renew_for(&self, lease_id: &str, ttl: Option<Duration>, holder: Holder) -> Result<Lease, ControlError> {
        self.get()?.renew_for(lease_id, ttl, holder).await
    }
    async fn leases(&self) -> Result<Vec<Lease>, ControlError> {
        self.get()?.leases().await
    }
    async fn release(&self, lease_id: &str) -> Result<(), ControlError> {
        self.get()?.release(lease_id).await
    }
}

#[async_trait]
impl Routing for LateControl {
    fn named(&self, model: &str) -> Result<Vec<PoolId>, ControlError> {
        self.get()?.named(model)
    }
    async fn route(&self, pool: &PoolId, wait: Duration, holder: &Holder) -> Result<Route, ControlError> {
        self.get()?.route(pool, wait, holder).await
    }
    async fn follow(&self, lease_id: &str, holder: &Holder) -> Result<(Lease, Route), ControlError> {
        self.get()?.follow(lease_id, holder).await
    }
    fn tell(&self, key: &ReplicaKey, generation: Generation, kind: EventKind) {
        if let Ok(manager) = self.get() {
            manager.tell(key, generation, kind);
        }
    }
}
