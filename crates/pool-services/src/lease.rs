//! Leases as values that can cross a wire.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::api_key::ApiKey;
use pool_domain::{Generation, Holder, PoolId, ReplicaId};

/// How long a lease lasts where nothing else is said.
pub const DEFAULT_TTL: Duration = Duration::from_secs(60);
/// Longest wait for a lease.
pub const MAX_WAIT: Duration = Duration::from_secs(600);
/// Longest name of a job, session or tenant, and longest idempotency key, in characters.
pub const MAX_NAME: usize = 128;

/// A wish for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// After this it ends by itself, unless it is renewed.
    pub ttl: Duration,
    /// How long to wait for a slot, at most [`MAX_WAIT`].
    pub wait: Duration,
    /// For whom.
    pub holder: Holder,
    /// A hint.
    pub prefer: Option<ReplicaId>,
    /// The same key with the same wish is the same lease.
    pub key: Option<Arc<str>>,
}

impl Default for LeaseRequest {
    fn default() -> Self {
        Self { ttl: DEFAULT_TTL, wait: Duration::ZERO, holder: Holder::default(), prefer: None, key: None }
    }
}

impl LeaseRequest {
    /// For this long, and only if there is a slot now.
    #[must_use]
    pub fn lasting(ttl: Duration) -> Self {
        Self { ttl, ..Self::default() }
    }

    /// Waits this long for a slot.
    #[must_use]
    pub fn waiting(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

/// The right to use one slot. It is held until it is released or expires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Never used twice.
    pub id: String,
    /// The pool.
    pub pool_id: PoolId,
    /// The replica.
    pub replica_id: ReplicaId,
    /// Its generation.
    pub generation: Generation,
    /// Where to send the request.
    pub endpoint: String,
    /// What the engine wants to hear; in lists of leases it is left out.
    pub api_key: Option<ApiKey>,
    /// The engine's name.
    pub engine: String,
    /// Its version.
    pub engine_version: String,
    /// Its devices.
    pub device_mask: String,
    /// Which of the replica's slots: no two leases have the same. The engine itself chooses its slots.
    pub slot: u16,
    /// For whom it is.
    pub holder: Holder,
    /// When it expires by itself.
    pub expires_at: SystemTime,
}
