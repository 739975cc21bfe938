//! An engine that somebody else runs: it cannot be ended, only left.

use std::future::pending;
use std::net::SocketAddr;

use async_trait::async_trait;
use pool_domain::Failure;
use pool_services::ports::{Listener, RunningEngine};
use tokio::sync::watch;

/// Attached to, not launched.
#[derive(Debug)]
pub(crate) struct ExternalEngine {
    left: watch::Sender<bool>,
}

impl ExternalEngine {
    pub(crate) fn new() -> Self {
        Self { left: watch::Sender::new(false) }
    }
}

#[async_trait]
impl RunningEngine for ExternalEngine {
    fn pid(&self) -> Option<u32> {
        None
    }

    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    async fn exited(&self) -> Failure {
        pending().await
    }

    async fn gone(&self) {
        // An error cannot be: the sender is here.
        let mut left = self.left.subscribe();
        let _told = left.wait_for(|left| *left).await;
    }

    fn terminate(&self) {
        self.left.send_replace(true);
    }

    fn kill(&self) {
        self.left.send_replace(true);
    }

    fn progress(&self) -> u64 {
        0
    }

    fn listener(&self, _addr: SocketAddr) -> Listener {
        Listener::Own
    }

    fn executable(&self) -> Option<String> {
        None
    }
}
