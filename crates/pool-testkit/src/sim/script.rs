//! How one simulated engine behaves, well and ill.

use std::time::Duration;

use fastrand::Rng;
use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass};
use pool_services::ports::Up;

/// What it says when it is asked for its health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// That it serves.
    Fine,
    /// That it does not.
    Failing,
    /// That it is something else.
    Wrong,
    /// That it serves and that it does not, in turns of this length.
    Flapping(Duration),
}

/// Where it holds its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Where it was told to.
    There,
    /// On no device.
    Nowhere,
    /// On another device as well.
    Elsewhere,
}

/// The behaviour of one pool's engines. What is said of a start holds from the next launch on, the rest at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    /// Preflight fails with this.
    pub preflight: Option<Failure>,
    /// The launch fails with this.
    pub launch: Option<Failure>,
    /// Time a launch takes.
    pub launch_takes: Duration,
    /// Time until it serves.
    pub load: Duration,
    /// Whether it ever serves.
    pub serves: bool,
    /// Whether progress is to be seen while it loads.
    pub progresses: bool,
    /// Its main process ends by itself so long after the launch.
    pub dies_after: Option<Duration>,
    /// How.
    pub death: Failure,
    /// How late that is seen.
    pub exit_lag: Duration,
    /// How long it takes to end when asked; unset = it is deaf.
    pub term_takes: Option<Duration>,
    /// Something outlives its main process until it is killed.
    pub leaves_child: bool,
    /// KILL has no effect.
    pub unkillable: bool,
    /// It serves another model.
    pub wrong_model: bool,
    /// A stranger listens on its port.
    pub foreign_listener: bool,
    /// A stranger takes its port between choice and launch.
    pub port_stolen: bool,
    /// It does not decode.
    pub hangs: bool,
    /// Time one unit of work takes.
    pub work_takes: Duration,
    /// What it says of its health.
    pub health: Health,
    /// Time an answer about its health takes.
    pub health_takes: Duration,
    /// Requests of others that it says it works on as well; unset = it does not say how busy it is.
    pub busy: Option<u16>,
    /// How long after its end its memory is free.
    pub memory_lag: Duration,
    /// Where it holds its memory.
    pub held: Held,
}

impl Script {
    /// An engine that does what it should.
    #[must_use]
    pub fn well(load: Duration, work_takes: Duration) -> Self {
        Self {
            preflight: None,
            launch: None,
            launch_takes: Duration::from_millis(2),
            load,
            serves: true,
            progresses: true,
            dies_after: None,
            death: Failure::crash(Exit::Code(1)),
            exit_lag: Duration::ZERO,
            term_takes: Some(Duration::from_millis(5)),
            leaves_child: false,
            unkillable: false,
            wrong_model: false,
            foreign_listener: false,
            port_stolen: false,
            hangs: false,
            work_takes,
            health: Health::Fine,
            health_takes: Duration::ZERO,
            busy: Some(0),
            memory_lag: Duration::ZERO,
            held: Held::There,
        }
    }

    /// What it says of its health once it serves.
    #[must_use]
    pub fn up(&self, now: Duration) -> Up {
        match self.health {
            Health::Flapping(turn) if now.as_millis() / turn.as_millis().max(1) % 2 == 1 => Up::Failed("503".into()),
            Health::Fine | Health::Flapping(_) => Up::Serving,
            Health::Failing => Up::Failed("500".into()),
            Health::Wrong => Up::Wrong("a web server".into()),
        }
    }

    /// One more thing is wrong with it; says what, as one word.
    pub fn sicken(&mut self, rng: &mut Rng) -> &'static str {
        let ms = |rng: &mut Rng, range: std::ops::Range<u64>| Duration::from_millis(rng.u64(range));
        match rng.u32(0..25) {
            0 => {
                self.preflight = Some(Failure::new(FailureClass::DriverError, "the driver does not answer"));
                "preflight_fails"
            }
            1 => {
                self.preflight = Some(Failure::new(FailureClass::Config, "no such flag"));
                "preflight_refuses"
            }
            2 => {
                let full = Failure::new(FailureClass::Node, "No space left on device");
                self.launch = Some(if rng.bool() { full } else { Failure::crash(Exit::Code(127)) });
                "launch_fails"
            }
            3 => {
                self.launch_takes = ms(rng, 200..8_000);
                "launch_slow"
            }
            4 => {
                self.dies_after = Some(ms(rng, 0..200));
                "dies_early"
            }
            5 => {
                self.dies_after = Some(self.load + ms(rng, 0..60_000));
                "dies_later"
            }
            6 => {
                let class = if rng.bool() { FailureClass::HostOom } else { FailureClass::VramOom };
                (self.dies_after, self.death) = (Some(self.load), Failure::new(class, "out of memory"));
                "dies_of_memory"
            }
            7 => {
                (self.serves, self.progresses) = (false, rng.bool());
                "never_serves"
            }
            8 => {
                self.load += ms(rng, 1_000..40_000);
                "loads_slowly"
            }
            9 => {
                self.term_takes = None;
                "deaf"
            }
            10 => {
                self.term_takes = Some(ms(rng, 0..40_000));
                "ends_slowly"
            }
            11 | 12 => {
                self.leaves_child = true;
                "leaves_child"
            }
            13 => {
                self.unkillable = true;
                "unkillable"
            }
            14 => {
                self.wrong_model = true;
                "wrong_model"
            }
            15 => {
                self.foreign_listener = true;
                "foreign_listener"
            }
            16 => {
                self.port_stolen = true;
                "port_stolen"
            }
            17 => {
                self.hangs = true;
                "hangs"
            }
            18 => {
                self.health = match rng.u32(0..3) {
                    0 => Health::Failing,
                    1 => Health::Wrong,
                    _ => Health::Flapping(ms(rng, 500..20_000)),
                };
                "health_fails"
            }
            19 => {
                self.health_takes = ms(rng, 100..20_000);
                "health_slow"
            }
            20 => {
                self.held = if rng.bool() { Held::Nowhere } else { Held::Elsewhere };
                "residency_lies"
            }
            21 => {
                let class = if rng.bool() { FailureClass::DriverError } else { FailureClass::GpuLost };
                (self.dies_after, self.death) = (Some(ms(rng, 0..20_000)), Failure::new(class, "Xid 31"));
                "dies_of_driver"
            }
            22 | 23 => {
                self.memory_lag = ms(rng, 100..15_000);
                "memory_returns_late"
            }
            _ => {
                self.exit_lag = ms(rng, 1..3_000);
                "exit_seen_late"
            }
        }
    }
}
