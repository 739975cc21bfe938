//! The lifecycle of a replica: a state whose variants own exactly the data valid in them, and one pure transition
//! function, [`Replica::step`]. `docs/lifecycle.md` is generated from it.

mod event;
mod past;
mod policy;
mod state;
mod step;
#[cfg(test)]
mod tests;

pub use event::{Action, Command, Event, Fact};
pub use past::Past;
pub use policy::{HealthPolicy, Policy, StartPolicy, StopPolicy};
pub use state::{Launch, Left, OnDeadline, Proof, Replica, State, StopStage, Then, Wait};
