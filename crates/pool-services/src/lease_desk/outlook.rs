//! What a pool's picture means to somebody who waits for a slot.

use std::time::Duration;

use crate::control::ControlError;
use crate::snapshot::{PoolSnapshot, ReplicaSnapshot};

/// Whether waiting makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outlook {
    /// A replica serves: a slot comes free.
    Serves,
    /// One may serve soon.
    Coming,
    /// One would if it were asked to.
    Rests,
    /// None will.
    Hopeless,
}

/// On its way to Ready, or back to it.
fn comes(r: &ReplicaSnapshot) -> bool {
    matches!(r.state, "staging" | "preparing" | "starting" | "warming" | "adopting" | "suspect" | "stopping")
        || (r.state == "waiting" && r.breaker != "open")
}

impl Outlook {
    /// `reloading`: what is not there now comes back, as the new or as the old.
    pub(super) fn of(pool: &PoolSnapshot, reloading: bool) -> Self {
        let any = |p: fn(&ReplicaSnapshot) -> bool| pool.replicas.iter().any(p);
        if pool.ready() {
            Self::Serves
        } else if pool.hold {
            Self::Hopeless
        } else if reloading || any(comes) {
            Self::Coming
        } else if any(|r| r.state == "idle") {
            Self::Rests
        } else {
            Self::Hopeless
        }
    }
}

/// Whether a start has failed between two pictures, and no other is under way: those who waited for it are to hear why.
/// One that had been Ready and died is another matter: it comes back.
pub(super) fn start_failed(before: &PoolSnapshot, after: &PoolSnapshot) -> bool {
    let starts = |r: &ReplicaSnapshot| comes(r) && !matches!(r.state, "stopping" | "waiting");
    let failed = after.replicas.iter().any(|r| {
        let was = before.replicas.iter().find(|b| b.id == r.id);
        let served = was.is_some_and(|w| matches!(w.state, "ready" | "suspect" | "draining"));
        r.last_error.is_some() && r.last_error != was.and_then(|w| w.last_error.clone()) && !served
    });
    failed && !after.ready() && !after.replicas.iter().any(starts)
}

/// Why there is no slot, and the same as one word. `saturated`: when it may be worth asking again, where a replica serves.
pub(crate) fn refusal(pool: &PoolSnapshot, saturated: Option<Duration>) -> (ControlError, &'static str) {
    if let Some(retry_after) = saturated {
        return (ControlError::Saturated { retry_after }, "saturated");
    }
    if pool.hold || pool.draining() {
        return (ControlError::Draining, "draining");
    }
    let Some(lead) = pool.lead() else { return (ControlError::unready("it has no replicas"), "unready") };
    let next = lead.next_start_in_ms.map(Duration::from_millis);
    match (lead.breaker, next) {
        ("open", Some(retry_after)) => (ControlError::Unavailable { retry_after }, "breaker_open"),
        _ if lead.reason_code == "vram" => {
            let detail = lead.reason.clone();
            (ControlError::InsufficientVram { detail, retry_after: next }, "insufficient_vram")
        }
        _ => {
            let why = if lead.ready {
                "it is changing its state".to_owned()
            } else if lead.reason.is_empty() {
                format!("it is {}", lead.state)
            } else {
                lead.reason.clone()
            };
            (ControlError::Unready { why, retry_after: next }, "unready")
        }
    }
}
