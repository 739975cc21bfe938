//! What happens to a replica and what it asks for.

use std::time::Duration;

use super::{OnDeadline, Proof};
use crate::{Failure, Generation, Tick};

/// A wish from above.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Command {
    /// Run.
    Start,
    /// Run, but not before what earlier failures earned is over. Rest that somebody wants stays.
    Wake,
    /// Refuse new leases, wait for the running ones, then stop.
    Drain {
        /// From now.
        deadline: Duration,
        /// What happens then.
        on_deadline: OnDeadline,
    },
    /// Give up a running drain.
    Resume,
    /// Forget failures and close the breaker.
    ResetBreaker,
    /// Believe a person that nothing is left.
    Unfence,
    /// Devices, memory or ports may be free now.
    Unblocked,
    /// An engine of this generation was found at boot.
    Adopt {
        /// Its generation.
        generation: Generation,
        /// Ready since when, if it was.
        ready_since: Option<Tick>,
    },
}

/// Something learnt about one generation.
#[derive(Debug, Clone, PartialEq)]
pub enum Fact {
    /// The model is present and verified.
    Staged,
    /// Plan and reservation are made.
    Prepared,
    /// Nothing to reserve now.
    Blocked(super::Wait),
    /// Anything went wrong while no process existed.
    Unstartable(Failure),
    /// The process exists.
    Launched,
    /// The launch failed and left nothing.
    LaunchFailed(Failure),
    /// The start got somewhere.
    Progress,
    /// The engine says it serves.
    Serving,
    /// It proved it.
    Proved(Proof),
    /// It failed to.
    Unproved(Failure),
    /// Nobody can say whether it holds its memory, because the driver does not answer.
    Unprovable,
    /// A check passed.
    Healthy,
    /// A check failed.
    Missed(Failure),
    /// The main process ended.
    Exited(Failure),
    /// No process of the engine is left, but its memory has not come back.
    MemoryHeld,
    /// No process of the engine is left, and nobody can say whether its memory has come back.
    MemoryUnknown,
    /// Nothing of the engine is left.
    Gone,
    /// No lease is held.
    LeasesDone,
    /// An adopted engine is what the record says; with its proof if it was Ready and has proved it again.
    Adopted(Option<Proof>),
    /// It is not, but it is ours to end.
    NotAdopted(Failure),
    /// Nothing is to be tried again by itself; what serves goes on.
    GivenUp(Failure),
}

/// Anything that can happen.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A wish.
    Command(Command),
    /// A fact of one generation; of any but the current one it changes nothing.
    Engine(Generation, Fact),
    /// A deadline may have passed.
    Timer,
}

/// What has to be done. Everything concerns the current generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make the model present.
    Stage,
    /// Preflight, plan, reserve.
    Prepare,
    /// Launch the process.
    Launch,
    /// Watch the start for progress and serving.
    WatchStart,
    /// Prove identity, decoding and residency.
    Prove,
    /// Check periodically.
    WatchHealth,
    /// End whatever work of the above is running.
    CancelWork,
    /// Grant leases.
    OpenAdmission,
    /// Grant none.
    CloseAdmission,
    /// Take the granted ones back.
    RevokeLeases,
    /// TERM.
    Terminate,
    /// KILL, everything.
    Kill,
    /// Tell when nothing is left.
    AwaitGone,
    /// Look whether the recorded engine is ours.
    Adopt,
}
