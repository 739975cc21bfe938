//! Leases on the wire.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::{Generation, Holder, PoolId, ReplicaId};
use pool_services::{ApiKey, Lease, LeaseRequest};
use serde::{Deserialize, Serialize};

use super::from_wire::{DtoError, pool_id, replica_id, time};

/// Body of `leases`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct LeaseBody {
    /// After this it ends by itself, unless it is renewed: 1 ms to `[node] max_lease_ttl`, 60 s when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// How long to wait for a slot, and for a pool at rest to start; at most ten minutes, not at all when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
    /// A job of the client, at most 128 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// A conversation: its leases are on one replica where that is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// A hint, as `r0` or `pool/r0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefer_replica: Option<String>,
    /// The same key of a tenant with the same wish is the same lease, also while it is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
}

impl LeaseBody {
    /// The wish it stands for. Numbers are judged where it is carried out.
    ///
    /// # Errors
    /// When the hint names no replica.
    pub fn request(self, pool: &PoolId) -> Result<LeaseRequest, DtoError> {
        let default = LeaseRequest::default();
        let prefer = self.prefer_replica.as_deref().and_then(|hint| match hint.split_once('/') {
            None => Some(replica_id(hint)),
            // A replica of another pool is a hint that cannot be followed.
            Some((of, replica)) => (of == pool.as_str()).then(|| replica_id(replica)),
        });
        Ok(LeaseRequest {
            ttl: self.ttl_ms.map_or(default.ttl, Duration::from_millis),
            wait: self.wait_ms.map_or(default.wait, Duration::from_millis),
            holder: holder(self.job_id, self.session_id, self.tenant_id),
            prefer: prefer.transpose().map_err(|e| DtoError { field: "prefer_replica", ..e })?,
            key: self.idempotency_key.map(Into::into),
        })
    }
}

fn holder(job_id: Option<String>, session_id: Option<String>, tenant_id: Option<String>) -> Holder {
    Holder {
        job_id: job_id.map(Into::into),
        session_id: session_id.map(Into::into),
        tenant_id: tenant_id.map(Into::into),
    }
}

fn text(name: Option<&Arc<str>>) -> Option<String> {
    name.map(ToString::to_string)
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

impl From<LeaseRequest> for LeaseBody {
    fn from(r: LeaseRequest) -> Self {
        Self {
            ttl_ms: Some(millis(r.ttl)),
            wait_ms: Some(millis(r.wait)).filter(|ms| *ms > 0),
            job_id: text(r.holder.job_id.as_ref()),
            session_id: text(r.holder.session_id.as_ref()),
            tenant_id: text(r.holder.tenant_id.as_ref()),
            prefer_replica: r.prefer.map(|p: ReplicaId| p.to_string()),
            idempotency_key: text(r.key.as_ref()),
        }
    }
}

/// Body of `renew`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RenewBody {
    /// From now on; as long as before when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// Where a lease is used.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct EndpointView {
    /// Base URL of the engine.
    pub url: String,
    /// What the engine wants to hear, as `Authorization: Bearer …`; only where engines have keys. It ends with the engine.
    /// Lists of leases leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
}

/// Leaves out the key.
impl fmt::Debug for EndpointView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointView").field("url", &self.url).finish_non_exhaustive()
    }
}

/// The right to use one slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct LeaseView {
    /// Never used twice.
    pub lease_id: String,
    /// The pool.
    pub pool_id: String,
    /// The replica.
    pub replica_id: String,
    /// Its generation.
    pub generation: u64,
    /// Where to send requests.
    pub endpoint: EndpointView,
    /// The engine's name.
    pub engine: String,
    /// Its version.
    pub engine_version: String,
    /// Its devices.
    pub device_mask: String,
    /// Which of the replica's slots: no two leases have the same. The engine itself chooses its slots.
    pub slot: u16,
    /// A job of the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// A conversation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<String>,
    /// When it ends by itself.
    pub expires_at: String,
}

impl From<&Lease> for LeaseView {
    fn from(l: &Lease) -> Self {
        Self {
            lease_id: l.id.clone(),
            pool_id: l.pool_id.to_string(),
            replica_id: l.replica_id.to_string(),
            generation: l.generation.0,
            endpoint: EndpointView {
                url: l.endpoint.clone(),
                api_key: l.api_key.as_ref().map(|k| k.reveal().to_owned()),
            },
            engine: l.engine.clone(),
            engine_version: l.engine_version.clone(),
            device_mask: l.device_mask.clone(),
            slot: l.slot,
            job_id: text(l.holder.job_id.as_ref()),
            session_id: text(l.holder.session_id.as_ref()),
            tenant_id: text(l.holder.tenant_id.as_ref()),
            expires_at: super::to_wire::time(l.expires_at),
        }
    }
}

impl TryFrom<LeaseView> for Lease {
    type Error = DtoError;
    fn try_from(l: LeaseView) -> Result<Self, DtoError> {
        Ok(Self {
            id: l.lease_id,
            pool_id: pool_id(&l.pool_id)?,
            replica_id: replica_id(&l.replica_id)?,
            generation: Generation(l.generation),
            endpoint: l.endpoint.url,
            api_key: l.endpoint.api_key.map(ApiKey::new),
            engine: l.engine,
            engine_version: l.engine_version,
            device_mask: l.device_mask,
            slot: l.slot,
            holder: holder(l.job_id, l.session_id, l.tenant_id),
            expires_at: time("expires_at", &l.expires_at)?,
        })
    }
}
