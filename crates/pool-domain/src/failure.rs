//! What can go wrong with an engine, and what follows from it.

use std::fmt;

/// The kind of a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FailureClass {
    /// An exit nobody asked for, also with status 0.
    Crash(Exit),
    /// Killed by the kernel for host memory.
    HostOom,
    /// The device had too little memory.
    VramOom,
    /// Alive, but does not decode.
    Hang,
    /// No progress during the start, or the start took longer than its cap.
    StartTimeout,
    /// Health checks failed.
    Health,
    /// The driver or CUDA reported an error.
    DriverError,
    /// A device is gone.
    GpuLost,
    /// The engine fell back to the CPU.
    CpuFallback,
    /// The engine holds memory on a device outside its mask.
    MaskBreach,
    /// Something else answers, or it serves another model.
    WrongServer,
    /// The port was taken between choice and bind.
    PortConflict,
    /// The model cannot be used.
    Artifact,
    /// The spec cannot work: bad flag, missing binary, can never fit.
    Config,
    /// The node has no room for a launch: its disk is full or read-only, or it has no more processes to give.
    Node,
    /// The model could not be fetched now, which is nobody's fault here.
    Fetch,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Exit status.
    Code(i32),
    /// Signal number.
    Signal(i32),
    /// It ended while nobody could look.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(c) => write!(f, "exit status {c}"),
            Self::Signal(s) => write!(f, "signal {s}"),
            Self::Unknown => f.write_str("an exit nobody saw"),
        }
    }
}

/// What follows from a class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FailurePolicy {
    /// Whether it counts for backoff and breaker.
    pub counts: bool,
    /// Whether trying again is pointless until something changes.
    pub permanent: bool,
    /// Stretches the backoff delay (the cap still holds).
    pub multiplier: f64,
    /// Whether it throws suspicion on the device.
    pub accuses_device: bool,
}

impl FailureClass {
    /// Every class, for tables and metrics.
    pub const CODES: [&'static str; 16] = [
        "crash",
        "host_oom",
        "vram_oom",
        "hang",
        "start_timeout",
        "health",
        "driver_error",
        "gpu_lost",
        "cpu_fallback",
        "mask_breach",
        "wrong_server",
        "port_conflict",
        "artifact",
        "config",
        "node",
        "fetch",
    ];

    /// The class as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Crash(_) => "crash",
            Self::HostOom => "host_oom",
            Self::VramOom => "vram_oom",
            Self::Hang => "hang",
            Self::StartTimeout => "start_timeout",
            Self::Health => "health",
            Self::DriverError => "driver_error",
            Self::GpuLost => "gpu_lost",
            Self::CpuFallback => "cpu_fallback",
            Self::MaskBreach => "mask_breach",
            Self::WrongServer => "wrong_server",
            Self::PortConflict => "port_conflict",
            Self::Artifact => "artifact",
            Self::Config => "config",
            Self::Node => "node",
            Self::Fetch => "fetch",
        }
    }

    /// The class that a word names. How a process ended, the word does not tell.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        Some(match code {
            "crash" => Self::Crash(Exit::Unknown),
            "host_oom" => Self::HostOom,
            "vram_oom" => Self::VramOom,
            "hang" => Self::Hang,
            "start_timeout" => Self::StartTimeout,
            "health" => Self::Health,
            "driver_error" => Self::DriverError,
            "gpu_lost" => Self::GpuLost,
            "cpu_fallback" => Self::CpuFallback,
            "mask_breach" => Self::MaskBreach,
            "wrong_server" => Self::WrongServer,
            "port_conflict" => Self::PortConflict,
            "artifact" => Self::Artifact,
            "config" => Self::Config,
            "node" => Self::Node,
            "fetch" => Self::Fetch,
            _ => return None,
        })
    }

    /// What follows from it.
    #[must_use]
    pub fn policy(&self) -> FailurePolicy {
        let base = FailurePolicy { counts: true, permanent: false, multiplier: 1.0, accuses_device: false };
        match self {
            Self::Crash(_) | Self::HostOom | Self::Hang | Self::StartTimeout | Self::Health | Self::WrongServer => base,
            Self::VramOom => FailurePolicy { multiplier: 2.0, ..base },
            // A driver in trouble needs longer than a process does.
            Self::DriverError | Self::GpuLost => FailurePolicy { multiplier: 4.0, accuses_device: true, ..base },
            Self::PortConflict | Self::Node | Self::Fetch => FailurePolicy { counts: false, ..base },
            Self::CpuFallback | Self::MaskBreach | Self::Artifact | Self::Config => {
                FailurePolicy { permanent: true, ..base }
            }
        }
    }

    /// What happened, in a few words that fit behind "after its engine …".
    #[must_use]
    pub fn human(&self) -> &'static str {
        match self {
            Self::Crash(_) => "crashed",
            Self::HostOom => "ran out of host memory",
            Self::VramOom => "ran out of GPU memory",
            Self::Hang => "hung",
            Self::StartTimeout => "took too long to start",
            Self::Health => "failed its health checks",
            Self::DriverError => "met a GPU driver error",
            Self::GpuLost => "lost its GPU",
            Self::CpuFallback => "fell back to the CPU",
            Self::MaskBreach => "used a GPU it was not given",
            Self::WrongServer => "turned out to be the wrong server",
            Self::PortConflict => "found its port taken",
            Self::Artifact => "could not use its model",
            Self::Config => "was given a config that cannot work",
            Self::Node => "was held up by this node",
            Self::Fetch => "could not be given its model yet",
        }
    }
}

/// A failure with its details for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The kind.
    pub class: FailureClass,
    /// What happened, without paths, pids or secrets.
    pub detail: String,
}

impl Failure {
    /// A failure of `class`, told as `detail`.
    pub fn new(class: FailureClass, detail: impl Into<String>) -> Self {
        Self { class, detail: detail.into() }
    }

    /// An exit nobody asked for.
    #[must_use]
    pub fn crash(exit: Exit) -> Self {
        Self::new(FailureClass::Crash(exit), format!("the engine ended with {exit}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class.code(), self.detail)
    }
}
