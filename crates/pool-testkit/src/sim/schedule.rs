//! What a seed stands for: a node, its pools, and what happens to them.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use pool_domain::estimate::LlamaCppSettings;
use pool_domain::lifecycle::{HealthPolicy, OnDeadline, Policy, StartPolicy, StopPolicy};
use pool_domain::plan::{EngineMemory, Split};
use pool_domain::rollout::Strategy;
use pool_domain::{BackoffPolicy, BreakerPolicy, DeviceHealth, DeviceMask, ModelRef};
use pool_services::Source;
use pool_services::spec::{Activation, PoolSpec, ReloadPolicy};

use super::script::Script;
use super::world::SimDevice;
use crate::{gpu, spec};

const GIB: u64 = 1 << 30;

/// One pool.
#[derive(Debug, Clone)]
pub struct SimPool {
    /// Its spec.
    pub spec: PoolSpec,
    /// Its engines while they are well.
    pub well: Script,
    /// How their memory is known.
    pub memory: EngineMemory,
    /// Whether it is declared over the API.
    pub api: bool,
}

impl SimPool {
    /// The pool in this form; they differ in the model.
    #[must_use]
    pub fn form(&self, number: u8) -> PoolSpec {
        let model = if number == 0 { self.spec.model.clone() } else { ModelRef::Stub(format!("m{number}")) };
        PoolSpec { model, ..self.spec.clone() }
    }

    /// As it is written down in that form, or was.
    #[must_use]
    pub fn formed(&self, document: &str) -> (PoolSpec, String) {
        (self.form(document.parse().unwrap_or_default()), document.to_owned())
    }

    /// Who declares it.
    #[must_use]
    pub fn source(&self) -> Source {
        if self.api { Source::Api } else { Source::File { digest: "table".into() } }
    }
}

/// What a step does. Pools and devices are counted around, so that steps still mean something when others are left out.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// Preload a pool.
    Preload(usize),
    /// Drain a pool.
    Drain(usize, Option<Duration>, Option<OnDeadline>),
    /// Resume a pool.
    Resume(usize),
    /// Stop a pool.
    Stop(usize),
    /// Stop a pool and preload it in the same breath.
    Bounce(usize),
    /// Give a pool another form, in a way and by a deadline.
    Reload(usize, u8, Strategy, Duration),
    /// Give it the form that it had before.
    Rollback(usize),
    /// Declare a pool in this form, whether or not it is there.
    Put(usize, u8),
    /// Remove a pool.
    Delete(usize),
    /// Reset a pool's breaker.
    Reset(usize),
    /// Take some slots of a pool in process.
    Take(usize, u32),
    /// Give back every `n`-th slot, counted from one.
    Release(usize),
    /// Ask a pool for a lease over the wire.
    Ask(usize, Duration),
    /// End the daemon in order. Whoever needs one starts it again.
    Restart,
    /// End it in order, and leave its engines.
    Leave,
    /// Kill it.
    Kill,
    /// Kill it at the n-th call of a port from now on.
    Fuse(u32),
    /// Start the machine anew.
    Reboot,
    /// Kill the daemon and delete its state directory.
    Wipe,
    /// Forge the records of a pool's engines.
    Tamper(usize),
    /// Say that nothing is left on a device.
    Unfence(usize),
    /// A pool's engines behave worse in up to three ways; the seed says which.
    Sicken(usize, u64),
    /// They decode no more, and are well otherwise.
    Hang(usize),
    /// They leave something behind when they end.
    Litter(usize),
    /// They behave well again.
    Heal(usize),
    /// Their main processes end.
    Crash(usize),
    /// A device's health changes: 0 well, 1 suspect, 2 lost, 3 unknown.
    Health(usize, u8),
    /// The driver reports this XID of a device.
    Xid(usize, u64),
    /// A device leaves the bus or returns.
    Present(usize, bool),
    /// Strangers hold so many GiB of a device.
    Foreign(usize, u64),
    /// Strangers take this many ports.
    Ports(u16),
    /// Nobody can say who holds memory.
    Blind(bool),
    /// Facts cannot be written.
    LedgerBroken(bool),
    /// Writing a fact takes this long.
    LedgerSlow(Duration),
    /// Models cannot be had: 0 they can, 1 not now, 2 never.
    Models(u8),
    /// A model takes this long.
    ModelsSlow(Duration),
    /// Nothing.
    Wait,
}

/// An act and the time until the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// What happens.
    pub act: Act,
    /// What passes after it.
    pub then: Duration,
}

/// Everything that a seed decides.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// The seed.
    pub seed: u64,
    /// Its devices.
    pub devices: Vec<SimDevice>,
    /// Whether residency can be proved.
    pub provable: bool,
    /// Whether the driver tells what others use.
    pub tells_foreign: bool,
    /// Whether engines have cgroups of their own.
    pub cgroups: bool,
    /// Ports engines may have.
    pub ports: std::ops::RangeInclusive<u16>,
    /// How long a replica that became Ready neither stops unused nor gives way.
    pub min_ready_time: Duration,
    /// Its pools.
    pub pools: Vec<SimPool>,
    /// What happens.
    pub steps: Vec<Step>,
}

fn seconds(rng: &mut Rng, range: std::ops::RangeInclusive<u64>) -> Duration {
    Duration::from_secs(rng.u64(range))
}

fn millis(rng: &mut Rng, range: std::ops::RangeInclusive<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

fn one_in(rng: &mut Rng, n: u32) -> bool {
    rng.u32(0..n) == 0
}

fn policy(rng: &mut Rng) -> Policy {
    if one_in(rng, 5) {
        return Policy::default();
    }
    let initial = millis(rng, 200..=2_000);
    let backoff = BackoffPolicy::new(initial, seconds(rng, 5..=60), 2.0, 0.5, seconds(rng, 30..=600));
    let open_for = seconds(rng, 5..=30);
    let pause = open_for + seconds(rng, 10..=120);
    let breaker = BreakerPolicy::new(rng.u32(2..=5), rng.u32(1..=3), open_for, pause, seconds(rng, 5..=60));
    Policy {
        backoff: backoff.unwrap_or_default(),
        breaker: breaker.unwrap_or_default(),
        start: StartPolicy { stall: seconds(rng, 15..=40), max: seconds(rng, 60..=120) },
        health: HealthPolicy {
            interval: seconds(rng, 2..=10),
            timeout: seconds(rng, 1..=5),
            failures: rng.u32(2..=4),
            ..HealthPolicy::default()
        },
        stop: StopPolicy { grace: seconds(rng, 0..=30), prove: seconds(rng, 2..=10) },
    }
}

fn pool(rng: &mut Rng, at: usize, devices: usize, alone: bool) -> SimPool {
    let mut spec = PoolSpec {
        replicas: if one_in(rng, 3) { 2 } else { 1 },
        activation: if rng.bool() { Activation::OnDemand } else { Activation::Preload },
        slots: rng.u16(1..=4),
        vram: Some(rng.u64(1..=9) * GIB),
        policy: policy(rng),
        drain_deadline: seconds(rng, 0..=30),
        on_deadline: if one_in(rng, 4) { OnDeadline::Abort } else { OnDeadline::Force },
        ..spec(&format!("p{at}"))
    };
    spec.reload = ReloadPolicy {
        deadline: seconds(rng, 10..=120),
        on_deadline: if one_in(rng, 4) { OnDeadline::Force } else { OnDeadline::Abort },
        probation: if rng.bool() { Duration::ZERO } else { seconds(rng, 1..=40) },
        ..spec.reload
    };
    if spec.activation == Activation::OnDemand {
        // Often more than fits beside others.
        spec.vram = Some(rng.u64(3..=9) * GIB);
        spec.idle_ttl = if rng.bool() { Some(seconds(rng, 1..=30)) } else { None };
        spec.pin = one_in(rng, 6);
    }
    let on = |text: String| text.parse().unwrap_or(DeviceMask::Auto);
    spec.devices = match rng.u32(0..6) {
        0 => vec![DeviceMask::All],
        1 => vec![on(format!("{}", rng.usize(0..devices)))],
        2 if devices > 1 => vec![on("0,1".into())],
        3 if devices > 1 => vec![on("0".into()), on("1".into())],
        _ => vec![DeviceMask::Auto],
    };
    let mut memory = if rng.bool() { EngineMemory::Fixed(0) } else { EngineMemory::Unknown };
    // Several of these on one node may wait for each other for reasons that the checks could not tell.
    if alone && one_in(rng, 2) {
        (spec.vram, spec.context, spec.replicas) = (None, Some(2048), 1);
        spec.devices = vec![if devices > 1 { on("0,1".into()) } else { DeviceMask::Auto }];
        spec.tensor_split = if devices > 1 && rng.bool() { Split::Ratios("3,1".into()) } else { Split::Auto };
        memory = EngineMemory::LlamaCpp(LlamaCppSettings { context: 2048, ..LlamaCppSettings::default() });
    }
    let mut well = Script::well(millis(rng, 10..=3_000), millis(rng, 1..=400));
    well.busy = *rng.choice(&[Some(0), Some(0), None, Some(1)]).unwrap_or(&None);
    // That the main process ended and that nothing is left are told apart, and in any order.
    well.exit_lag = millis(rng, 0..=40);
    well.term_takes = Some(millis(rng, 0..=800));
    SimPool { spec, well, memory, api: one_in(rng, 4) }
}

fn act(rng: &mut Rng, ports: u16) -> Act {
    let at = rng.usize(0..12);
    match rng.u32(0..100) {
        0..=6 => Act::Preload(at),
        7..=14 => {
            let deadline = if one_in(rng, 4) { None } else { Some(millis(rng, 0..=20_000)) };
            let end = *rng.choice(&[None, Some(OnDeadline::Force), Some(OnDeadline::Abort)]).unwrap_or(&None);
            Act::Drain(at, deadline, end)
        }
        15..=20 => Act::Resume(at),
        21..=22 => Act::Stop(at),
        23..=24 => Act::Bounce(at),
        25..=27 => Act::Reset(at),
        28..=37 => Act::Take(at, rng.u32(1..=6)),
        38..=41 => Act::Release(rng.usize(1..=3)),
        42..=45 => Act::Ask(at, millis(rng, 100..=30_000)),
        46 => Act::Restart,
        47 => Act::Leave,
        48..=49 => Act::Kill,
        50..=53 => Act::Fuse(rng.u32(1..=60)),
        54 => match rng.u32(0..4) {
            0 => Act::Reboot,
            1 => Act::Wipe,
            2 => Act::Tamper(at),
            _ => Act::Unfence(at),
        },
        55..=64 => Act::Sicken(at, rng.u64(..)),
        65..=70 => Act::Heal(at),
        71..=76 => Act::Crash(at),
        77..=78 => Act::Health(at, rng.u8(0..=3)),
        // Nothing, the engines start again, nothing new starts, they are drained, they are ended.
        79 => Act::Xid(at, *rng.choice(&[63, 94, 31, 54, 119, 48, 79]).unwrap_or(&63)),
        80..=81 => Act::Present(at, rng.bool()),
        82..=84 => Act::Foreign(at, rng.u64(0..=20)),
        85..=86 => Act::Ports(if rng.bool() { ports } else { rng.u16(0..=ports) }),
        87 => Act::Blind(rng.bool()),
        88..=89 => Act::LedgerBroken(rng.bool()),
        90..=91 => Act::LedgerSlow(millis(rng, 0..=900)),
        92 => Act::Models(rng.u8(0..=2)),
        93 => Act::ModelsSlow(millis(rng, 0..=9_000)),
        94..=98 => {
            let ways = [Strategy::Auto, Strategy::InPlace, Strategy::Overlap, Strategy::Rolling];
            let way = *rng.choice(&ways).unwrap_or(&Strategy::Auto);
            match rng.u32(0..6) {
                0 => Act::Rollback(at),
                1 => Act::Put(at, rng.u8(0..3)),
                2 if one_in(rng, 2) => Act::Delete(at),
                _ => Act::Reload(at, rng.u8(0..3), way, seconds(rng, 5..=120)),
            }
        }
        _ => Act::Wait,
    }
}

/// One act. Some bad moments are too short to be met by chance.
fn acts(rng: &mut Rng, ports: u16) -> Vec<Step> {
    let first = Step { act: act(rng, ports), then: pause(rng) };
    match first.act {
        Act::Crash(_) | Act::Sicken(..) if one_in(rng, 3) => {
            let kill = Step { act: Act::Kill, then: millis(rng, 0..=300) };
            let pool = rng.usize(0..12);
            vec![
                Step { then: millis(rng, 50..=900), ..first },
                kill,
                Step { act: Act::Ask(pool, millis(rng, 100..=9_000)), then: pause(rng) },
            ]
        }
        Act::Drain(at, ..) if one_in(rng, 3) => {
            let take = |then| Step { act: Act::Take(at, 1), then };
            let soon = millis(rng, 0..=300);
            vec![take(Duration::ZERO), Step { then: soon, ..first }, take(pause(rng))]
        }
        // Long enough to be found, with nothing else to do.
        Act::Heal(at) if one_in(rng, 4) => {
            let then = |act, then| Step { act, then: Duration::from_secs(then) };
            vec![
                first,
                then(Act::Release(1), 0),
                then(Act::Preload(at), 20),
                then(Act::Hang(at), 90),
                then(Act::Heal(at), 1),
            ]
        }
        // The second ends what was started by the first.
        Act::Bounce(at) if one_in(rng, 2) => {
            let long = Step { act: Act::Bounce(at), then: Duration::from_secs(15) };
            vec![Step { act: Act::Litter(at), then: Duration::ZERO }, long, first]
        }
        // Who uses it is not known to the next daemon.
        Act::Take(at, n) if one_in(rng, 12) => {
            let later = Step { act: Act::Take(at, 6), then: pause(rng) };
            vec![
                Step { act: Act::Take(at, n), then: millis(rng, 0..=900) },
                Step { act: Act::Kill, then: Duration::ZERO },
                Step { act: Act::Preload(at), then: seconds(rng, 12..=16) },
                later,
            ]
        }
        // Somebody uses it meanwhile; the new one fails; or whatever else may come in the middle of it.
        Act::Reload(at, ..) | Act::Put(at, _) => match rng.u32(0..6) {
            0..=1 => {
                let before = |act| Step { act, then: Duration::from_secs(4) };
                vec![before(Act::Heal(at)), before(Act::Preload(at)), before(Act::Take(at, 1)), first]
            }
            2 => {
                let ill = Step { act: Act::Sicken(at, rng.u64(..)), then: Duration::ZERO };
                vec![ill, Step { then: millis(rng, 0..=9_000), ..first }, Step { act: Act::Heal(at), then: pause(rng) }]
            }
            3 => {
                let disk = |broken, then| Step { act: Act::LedgerBroken(broken), then };
                let first = match first.act {
                    // Once the new one is started, all that is left is to write it down.
                    Act::Reload(at, form, _, by) if one_in(rng, 2) => {
                        let act = Act::Reload(at, form, Strategy::InPlace, by);
                        vec![Step { act, then: millis(rng, 100..=4_000) }, disk(true, seconds(rng, 1..=9))]
                    }
                    _ => vec![disk(true, Duration::ZERO), Step { then: millis(rng, 0..=9_000), ..first }],
                };
                [first, vec![disk(false, pause(rng))]].concat()
            }
            4 => {
                let soon = millis(rng, 0..=4_000);
                vec![Step { then: soon, ..first }, Step { act: act(rng, ports), then: pause(rng) }]
            }
            _ => vec![first],
        },
        _ => vec![first],
    }
}

fn pause(rng: &mut Rng) -> Duration {
    match rng.u32(0..10) {
        0..=1 => Duration::ZERO,
        2..=3 => millis(rng, 1..=60),
        4..=6 => millis(rng, 60..=3_000),
        7..=8 => seconds(rng, 3..=20),
        _ => seconds(rng, 20..=90),
    }
}

impl Schedule {
    /// What this seed stands for.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let rng = &mut Rng::with_seed(seed);
        let count = rng.usize(1..=3);
        let device = |rng: &mut Rng, at: usize| {
            let mut shown = gpu(u32::try_from(at).unwrap_or(0), rng.u64(10..=24) * GIB);
            shown.vram_reserved = rng.u64(0..=1) * GIB / 2;
            SimDevice { shown, present: true, foreign: 0 }
        };
        let devices: Vec<SimDevice> = (0..count).map(|at| device(rng, at)).collect();
        let pools = rng.usize(1..=4);
        let pools: Vec<SimPool> = (0..pools).map(|at| pool(rng, at, count, pools == 1)).collect();
        let min_ready_time = seconds(rng, 0..=30);
        let ports = 42_000..=42_000 + rng.u16(7..=15);
        let width = ports.end() - ports.start() + 1;
        let steps = rng.usize(4..=28);
        let steps = (0..steps).flat_map(|_| acts(rng, width)).collect();
        let (provable, tells_foreign, cgroups) = (rng.bool(), rng.bool(), rng.bool());
        Self { seed, devices, provable, tells_foreign, cgroups, ports, min_ready_time, pools, steps }
    }
}

/// A health by its number.
#[must_use]
pub fn health(n: u8) -> DeviceHealth {
    match n {
        1 => DeviceHealth::Suspect("simulated".into()),
        2 => DeviceHealth::Lost("simulated".into()),
        3 => DeviceHealth::Unknown("simulated".into()),
        _ => DeviceHealth::Ok,
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, provable, tells_foreign, cgroups, min_ready_time, .. } = self;
        writeln!(
            f,
            "seed {seed}: residency provable: {provable}, use by others told: {tells_foreign}, cgroups: {cgroups}, stays for {min_ready_time:?}"
        )?;
        for d in &self.devices {
            let (total, kept) = (d.shown.vram_total / GIB, d.shown.vram_reserved / (1 << 20));
            writeln!(f, "  device {}: {total} GiB, {kept} MiB kept by the driver", d.shown.index)?;
        }
        for SimPool { spec, well, memory, api } in &self.pools {
            writeln!(
                f,
                "  pool {}: {} replicas on {:?}, {:?} GiB, {:?}, idle {:?}, pin {}, {} slots, {:?}, loads {:?}, works {:?}, busy {:?}, drain {:?} {:?}, {memory:?}, by the API: {api}, {:?}, {:?}",
                spec.id,
                spec.replicas,
                spec.devices,
                spec.vram.map(|v| v / GIB),
                spec.activation,
                spec.idle_ttl,
                spec.pin,
                spec.slots,
                spec.tensor_split,
                well.load,
                well.work_takes,
                well.busy,
                spec.drain_deadline,
                spec.on_deadline,
                spec.reload,
                spec.policy,
            )?;
        }
        for (at, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {at:>2}. {:?}, then {:?}", step.act, step.then)?;
        }
        Ok(())
    }
}
