//! States and the data valid in each.

use std::fmt;

use crate::{Backoff, CircuitBreaker, Failure, FailureClass, Generation, Tick};

/// What an engine proved before it was called Ready.
#[derive(Debug, Clone, PartialEq)]
pub struct Proof {
    /// `vram` (holds its memory on its devices), `simulated`, or `served` where residency cannot be asked (external).
    pub residency: &'static str,
    /// Model the engine says it serves.
    pub model: String,
    /// Requests it takes at once.
    pub slots: u16,
    /// Milliseconds the first unit of work took.
    pub first_unit_ms: u64,
}

/// Whether a process exists during a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launch {
    /// Asked for, not answered.
    Asked,
    /// The process runs.
    Running,
}

/// What a replica waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// The backoff delay.
    Backoff {
        /// Its end.
        until: Tick,
    },
    /// The breaker's pause.
    Breaker {
        /// Its end.
        until: Tick,
    },
    /// A device that is there and well, or a port.
    Devices {
        /// Why not now.
        detail: String,
    },
    /// Memory on a device.
    Vram {
        /// Why not now, and who gives way or stays.
        detail: String,
        /// When it may become possible, if time alone can bring it.
        possible_at: Option<Tick>,
    },
}

/// What happens to leases that outlive a drain's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDeadline {
    /// They are revoked and the engine is stopped.
    Force,
    /// The drain is given up and the engine serves on.
    Abort,
}

/// How far a stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopStage {
    /// The launch was not answered yet; whatever it brings is stopped.
    Launching {
        /// Grace for it.
        kill_at: Tick,
    },
    /// TERM was sent.
    Term {
        /// When KILL follows.
        kill_at: Tick,
    },
    /// KILL was sent.
    Kill {
        /// When the device is fenced if something is left.
        fence_at: Tick,
    },
    /// No process is left, but its memory has not come back.
    Memory {
        /// When the device is fenced if it still has not.
        fence_at: Tick,
    },
}

/// What of an engine may be left on a fenced device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Processes.
    Processes,
    /// Nothing but memory that has not come back.
    Memory,
}

/// What follows a stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Then {
    /// Rest.
    Idle,
    /// Start, because it was asked for.
    Start,
    /// Start again at once, after a failure.
    Restart,
    /// Start after a wait.
    Wait(Wait),
    /// Nothing, until a person changes something.
    Fail(Failure),
}

/// Where a replica stands.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Nothing runs and nothing is wanted.
    Idle,
    /// The model is being made present and verified.
    Staging {
        /// Since when.
        since: Tick,
    },
    /// Preflight, plan and reservation.
    Preparing {
        /// Since when.
        since: Tick,
    },
    /// Something has to happen first.
    Waiting {
        /// Since when.
        since: Tick,
        /// What.
        why: Wait,
    },
    /// The engine was launched and does not serve yet.
    Starting {
        /// Since when.
        since: Tick,
        /// Whether the process exists.
        launch: Launch,
        /// End of patience without progress.
        stall_at: Tick,
        /// End of patience.
        max_at: Tick,
    },
    /// It serves and must prove it.
    Warming {
        /// Since when.
        since: Tick,
        /// End of patience without progress.
        stall_at: Tick,
        /// End of patience.
        max_at: Tick,
    },
    /// It proved that it serves.
    Ready {
        /// Since when.
        since: Tick,
        /// What it proved.
        proof: Proof,
        /// Failed checks in a row (0 or 1).
        misses: u32,
    },
    /// Two checks in a row failed: live, grants nothing, keeps its leases.
    Suspect {
        /// Since when.
        since: Tick,
        /// Ready since when.
        ready_since: Tick,
        /// What it proved.
        proof: Proof,
        /// Failed checks in a row.
        misses: u32,
        /// The newest of them.
        failure: Failure,
    },
    /// Refuses new leases and waits for the running ones.
    Draining {
        /// Since when.
        since: Tick,
        /// Ready since when.
        ready_since: Tick,
        /// What it proved.
        proof: Proof,
        /// Absolute end.
        deadline: Tick,
        /// What happens then.
        on_deadline: OnDeadline,
        /// The newest failed check, if it was Suspect: so it is again if the drain is given up.
        suspect: Option<Failure>,
    },
    /// The engine is being ended.
    Stopping {
        /// Since when.
        since: Tick,
        /// How far.
        stage: StopStage,
        /// What follows.
        then: Then,
    },
    /// Something of the engine may be left; its devices admit no other replica.
    Fenced {
        /// Since when.
        since: Tick,
        /// Of what.
        left: Left,
        /// What follows once nothing is left.
        then: Then,
    },
    /// Trying again is pointless until something changes.
    Failed {
        /// Since when.
        since: Tick,
        /// Why.
        failure: Failure,
    },
    /// An engine found at boot is being looked at.
    Adopting {
        /// Since when.
        since: Tick,
        /// Ready since when, if it was.
        ready_since: Option<Tick>,
    },
}

impl State {
    /// The state as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Staging { .. } => "staging",
            Self::Preparing { .. } => "preparing",
            Self::Waiting { .. } => "waiting",
            Self::Starting { .. } => "starting",
            Self::Warming { .. } => "warming",
            Self::Ready { .. } => "ready",
            Self::Suspect { .. } => "suspect",
            Self::Draining { .. } => "draining",
            Self::Stopping { .. } => "stopping",
            Self::Fenced { .. } => "fenced",
            Self::Failed { .. } => "failed",
            Self::Adopting { .. } => "adopting",
        }
    }

    /// Every code, for tables and metrics.
    pub const CODES: [&'static str; 13] = [
        "idle",
        "staging",
        "preparing",
        "waiting",
        "starting",
        "warming",
        "ready",
        "suspect",
        "draining",
        "stopping",
        "fenced",
        "failed",
        "adopting",
    ];

    /// Whether a process of the current generation is known to exist. (While stopping, the end is not yet proved.)
    #[must_use]
    pub fn live(&self) -> bool {
        match self {
            Self::Starting { launch, .. } => *launch == Launch::Running,
            Self::Warming { .. }
            | Self::Ready { .. }
            | Self::Suspect { .. }
            | Self::Draining { .. }
            | Self::Adopting { .. } => true,
            Self::Stopping { stage, .. } => matches!(stage, StopStage::Term { .. }),
            Self::Idle
            | Self::Staging { .. }
            | Self::Preparing { .. }
            | Self::Waiting { .. }
            | Self::Fenced { .. }
            | Self::Failed { .. } => false,
        }
    }

    /// Whether it is Ready.
    #[must_use]
    pub fn ready(&self) -> bool {
        matches!(self, Self::Ready { .. })
    }

    /// Whether devices, memory and port are reserved for it.
    #[must_use]
    pub fn holds_reservation(&self) -> bool {
        matches!(
            self,
            Self::Preparing { .. }
                | Self::Starting { .. }
                | Self::Warming { .. }
                | Self::Ready { .. }
                | Self::Suspect { .. }
                | Self::Draining { .. }
                | Self::Stopping { .. }
                | Self::Fenced { .. }
                | Self::Adopting { .. }
        )
    }

    /// Nothing will change without a command.
    #[must_use]
    pub fn at_rest(&self) -> bool {
        matches!(self, Self::Idle | Self::Failed { .. } | Self::Fenced { .. })
    }

    /// What the engine proved, while that stands.
    #[must_use]
    pub fn proof(&self) -> Option<&Proof> {
        match self {
            Self::Ready { proof, .. } | Self::Suspect { proof, .. } | Self::Draining { proof, .. } => Some(proof),
            _ => None,
        }
    }

    /// Failed checks in a row.
    #[must_use]
    pub fn misses(&self) -> u32 {
        match self {
            Self::Ready { misses, .. } | Self::Suspect { misses, .. } => *misses,
            _ => 0,
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backoff { .. } => f.write_str("waiting for the backoff delay"),
            Self::Breaker { .. } => f.write_str("waiting because the circuit breaker is open"),
            Self::Devices { detail } => write!(f, "waiting for devices: {detail}"),
            Self::Vram { detail, .. } => write!(f, "waiting for GPU memory: {detail}"),
        }
    }
}

impl Wait {
    /// The reason as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Backoff { .. } => "backoff",
            Self::Breaker { .. } => "breaker",
            Self::Devices { .. } => "devices",
            Self::Vram { .. } => "vram",
        }
    }

    /// When a start may be possible, as far as that is known.
    #[must_use]
    pub fn possible_at(&self) -> Option<Tick> {
        match self {
            Self::Vram { possible_at, .. } => *possible_at,
            _ => self.until(),
        }
    }

    /// When the wait ends by itself.
    #[must_use]
    pub fn until(&self) -> Option<Tick> {
        match self {
            Self::Backoff { until } | Self::Breaker { until } => Some(*until),
            Self::Devices { .. } | Self::Vram { .. } => None,
        }
    }
}

/// One replica: its state and what outlives states.
#[derive(Debug, Clone, PartialEq)]
pub struct Replica {
    /// Where it stands.
    pub state: State,
    /// The current start attempt.
    pub generation: Generation,
    /// Failures since the last long success.
    pub backoff: Backoff,
    /// The circuit breaker.
    pub breaker: CircuitBreaker,
    /// The last failure and when.
    pub last_failure: Option<(Tick, Failure)>,
    /// Starts that followed a failure.
    pub restarts: u64,
    /// End of the backoff delay that its last failure earned, also while it rests.
    pub(super) not_before: Option<Tick>,
    /// The last generation whose failure is counted, also by an earlier daemon.
    pub(super) counted: Generation,
    /// Starts that the node held up since the last Ready; no fault of the engine.
    pub(super) held_up: Backoff,
    /// Ports found taken since the last Ready.
    pub(super) port_conflicts: u32,
}

impl Replica {
    /// A replica at rest. `generation` is the last one ever used.
    #[must_use]
    pub fn new(generation: Generation) -> Self {
        Self {
            state: State::Idle,
            generation,
            backoff: Backoff::default(),
            breaker: CircuitBreaker::default(),
            last_failure: None,
            restarts: 0,
            not_before: None,
            counted: Generation(0),
            held_up: Backoff::default(),
            port_conflicts: 0,
        }
    }

    /// How many failures in a row the last one is the latest of.
    #[must_use]
    pub fn nth_failure(&self) -> u32 {
        let held_up = matches!(&self.last_failure, Some((_, f)) if f.class == FailureClass::Node);
        if held_up { self.held_up } else { self.backoff }.failures().max(1)
    }

    /// Whether anything is held against it.
    pub(super) fn has_failures(&self) -> bool {
        self.backoff.failures() > 0 || self.breaker != CircuitBreaker::default()
    }

    /// When [`super::Event::Timer`] is due.
    #[must_use]
    pub fn next_deadline(&self, policy: &super::Policy) -> Option<Tick> {
        match &self.state {
            State::Waiting { why, .. } => why.until(),
            State::Starting { stall_at, max_at, .. } | State::Warming { stall_at, max_at, .. } => {
                Some(*stall_at.min(max_at))
            }
            State::Draining { deadline, .. } => Some(*deadline),
            State::Stopping { stage, .. } => match stage {
                StopStage::Launching { .. } => None,
                StopStage::Term { kill_at } => Some(*kill_at),
                StopStage::Kill { fence_at } | StopStage::Memory { fence_at } => Some(*fence_at),
            },
            State::Ready { since, .. } => {
                let closes = (self.breaker.code() == "half_open").then(|| *since + policy.breaker.close_after());
                let forgives = self.has_failures().then(|| *since + policy.backoff.reset_after());
                closes.into_iter().chain(forgives).min()
            }
            _ => None,
        }
    }
}
