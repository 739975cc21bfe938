//! Drivers, conductors and the steward: they carry out what `pool-domain` decides, over ports that adapters implement.
#![forbid(unsafe_code)]

pub mod admission;
mod boot;
mod builder;
mod catalog;
mod change;
pub mod clock;
mod conditions;
mod conductor;
pub mod control;
mod declared;
mod devices;
mod driver;
pub mod events;
mod eviction;
pub mod execute;
mod hold;
pub mod lease;
mod lease_desk;
mod leases;
mod manager;
mod node;
pub mod planning;
#[cfg(feature = "planted-bugs")]
pub mod planted;
pub mod ports;
pub mod preflight;
pub mod registry;
mod remember;
mod returned;
mod roster;
pub mod routing;
pub mod snapshot;
pub mod spec;
mod steward;
mod tally;
mod view;

pub use builder::{BuildError, Builder};
pub use clock::Clock;
pub use control::{ControlError, DrainLeft, DrainOptions, Operation, OperationState, PoolControl, ReloadRequest};
pub use declared::{Declared, Restored, Source};
pub use events::{Event, EventKind};
pub use execute::{DrainOutcome, DrainRequest, PreloadOutcome, ReloadOutcome, execute_drain, execute_reload};
pub use lease::{Lease, LeaseRequest};
pub use leases::Slots;
pub use manager::{PoolManager, Specs};
pub use planning::{Placed, PlanReport};
pub use registry::Registry;
pub use routing::{Flow, Route, Routing};
pub use snapshot::{GuardCounts, NodeSnapshot, PoolSnapshot, ReplicaSnapshot};
pub use spec::{Activation, Clash, PoolSpec, ReloadPolicy, Workload};
