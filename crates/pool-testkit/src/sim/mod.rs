//! A seeded simulation: whole nodes, with the real manager, steward, conductors and drivers over fakes, on paused time,
//! through random commands and faults. Checks look only at the record of what really happened ([`truth`]) and at what
//! anybody can see. The same seed is the same run.
//!
//! To add a promise: write an [`checks::Invariant`] and put it into [`checks::all`]. To add a fault: a field of
//! [`script::Script`] or an [`schedule::Act`].

mod accused;
pub mod checks;
pub mod checks_life;
pub mod checks_reload;
pub mod checks_time;
mod engines;
mod ledger;
mod reloads;
pub mod run;
pub mod schedule;
pub mod script;
pub mod seeds;
pub mod truth;
pub mod world;

use std::fmt;
use std::time::Duration;

pub use run::run;
pub use schedule::Schedule;
pub use seeds::{Failed, Report, shrink, soak};

/// A fault put there on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Plant {
    /// None.
    #[default]
    None,
    /// Drivers take facts of old generations for those of the current one.
    IgnoreGenerations,
    /// Drivers go on granting when they should refuse.
    NeverClose,
    /// Drivers take no lease back.
    NeverRevoke,
    /// A reload takes up what could not be written down.
    CommitsUnwritten,
    /// A reload ends the engines that it replaces at once.
    CutsLeases,
    /// A daemon that starts does not know what was reloaded over the file.
    ReloadsForgotten,
    /// The host says that nothing is left as soon as the main process ended.
    GoneTooEarly,
    /// The host finds nothing of engines that live, so that a second one is launched.
    AdoptsNothing,
    /// The host finds nothing of engines that could not be ended.
    FenceForgotten,
    /// The host tells deaths late.
    DeathsUnseen,
    /// The host finds every port taken.
    PortsNeverFree,
    /// A unit of work is never done, and said to be.
    WorkSkipped,
    /// Every engine is said to be idle.
    BusyUnasked,
    /// Every engine is said to be reading a prompt.
    AlwaysAtWork,
    /// Devices are said to have twice their memory.
    MemoryTwice,
    /// The state directory loses the generations.
    GenerationsForgotten,
    /// The state directory loses what is held against a replica.
    PastForgotten,
    /// The state directory loses holds.
    HoldForgotten,
    /// The state directory loses the records of engines.
    RecordsForgotten,
    /// Handoffs are never withdrawn.
    HandoffStays,
}

impl Plant {
    /// Every bug there is.
    pub const ALL: [Self; 20] = [
        Self::IgnoreGenerations,
        Self::NeverClose,
        Self::NeverRevoke,
        Self::CommitsUnwritten,
        Self::CutsLeases,
        Self::ReloadsForgotten,
        Self::GoneTooEarly,
        Self::AdoptsNothing,
        Self::FenceForgotten,
        Self::DeathsUnseen,
        Self::PortsNeverFree,
        Self::WorkSkipped,
        Self::BusyUnasked,
        Self::AlwaysAtWork,
        Self::MemoryTwice,
        Self::GenerationsForgotten,
        Self::PastForgotten,
        Self::HoldForgotten,
        Self::RecordsForgotten,
        Self::HandoffStays,
    ];
}

/// What was wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant.
    pub invariant: &'static str,
    /// How.
    pub detail: String,
    /// When.
    pub at: Duration,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.invariant, self.at.as_secs_f64(), self.detail)
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was wrong, if anything.
    pub violation: Option<Violation>,
    /// What really happened.
    pub log: Vec<truth::Entry>,
    /// Simulated time.
    pub lasted: Duration,
}
