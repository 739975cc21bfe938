//! Types, decisions and planners of pool-managerd.
//!
//! Everything that decides lives here as plain functions: state + event + now + random draw → new state + actions.
//! Nothing is awaited, no clock is read, no randomness is drawn; both are arguments.
#![forbid(unsafe_code)]

pub mod backoff;
pub mod breaker;
pub mod charges;
pub mod device;
#[cfg(test)]
mod dice;
pub mod download;
pub mod echo;
pub mod estimate;
pub mod evict;
pub mod failure;
pub mod health;
pub mod id;
pub mod idle;
pub mod isolation;
pub mod lease_book;
pub mod lifecycle;
pub mod liveness;
pub mod mask;
pub mod meters;
pub mod model;
pub mod model_cache;
pub mod model_files;
pub mod model_policy;
pub mod model_ref;
pub mod perf;
pub mod plan;
pub mod rank;
pub mod reconcile;
pub mod reserve;
pub mod residency;
pub mod returned;
pub mod rollout;
pub mod room;
pub mod split;
pub mod suspicion;
pub mod tick;
pub mod xid;

pub use backoff::{Backoff, BackoffPolicy};
pub use breaker::{BreakerPolicy, BreakerState, CircuitBreaker};
pub use device::{DeviceDetails, DeviceHealth, DeviceSnapshot, Verdict};
pub use failure::{Failure, FailureClass};
pub use health::HealthStatus;
pub use id::{EngineName, Generation, PoolId, ReplicaId, ReplicaKey};
pub use lease_book::{Holder, LeaseBook, LeaseId};
pub use mask::{DeviceMask, ResolvedMask};
pub use model::{KvShape, LayerProfile, ModelFormat, ModelProfile};
pub use model_ref::{FileRef, ModelRef, RemoteRef, RemoteSource, Sha256Digest};
pub use split::{SplitError, SplitPlan, SplitRatios, TensorParallelPlan};
pub use tick::{Draw, Tick};
