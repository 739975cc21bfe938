//! Bugs on purpose, to see that the simulation finds them.

/// What a driver does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// It takes facts of old generations for those of the current one.
    IgnoreGenerations,
    /// It goes on granting when it should refuse.
    NeverClose,
    /// It takes no lease back.
    NeverRevoke,
    /// A reload takes up what could not be written down.
    CommitsUnwritten,
    /// A reload ends the engines that it replaces at once, leases or not.
    CutsLeases,
}
