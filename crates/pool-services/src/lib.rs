//! Drivers, conductors and the steward: they carry out what `pool-domain` decides, over ports that adapters implement.
#![forbid(unsafe_code)]

pub mod control;
pub mod events;
pub mod ports;
pub mod snapshot;
pub mod spec;

pub use control::{ControlError, DrainOptions, Operation, OperationState, PoolControl};
pub use events::{Event, EventKind};
pub use snapshot::{NodeSnapshot, PoolSnapshot, ReplicaSnapshot};
pub use spec::{Activation, PoolSpec, Workload};
