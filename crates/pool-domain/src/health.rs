//! Live and ready, with the facts that readiness rests on.

use crate::Tick;

/// `live` = a process of the current generation exists; `ready` = it proved that it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HealthStatus {
    /// A process of the current generation exists.
    pub live: bool,
    /// It is Ready.
    pub ready: bool,
    /// When it was last checked.
    pub last_check_at: Option<Tick>,
    /// Failed checks in a row.
    pub consecutive_failures: u32,
}
