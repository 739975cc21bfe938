//! The driver of a replica: the only writer of its lifecycle. It feeds events to [`pool_domain::lifecycle::Replica`]
//! and carries out the actions that come back; work that takes time runs in tasks that report with their generation.

mod adopt;
mod health;
mod lessons;
mod memory;
mod pace;
mod scribe;
mod staging;
mod tell;
mod work;

pub(crate) use adopt::{Found, busy};
pub(crate) use lessons::correction_key;
pub(crate) use memory::{Memory, Remembered};
pub(crate) use pace::{Pace, SpeedBook};

use scribe::Scribe;
use staging::Progress;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fault_points::{Point, reached};
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::{Action, Command, Event, Fact, OnDeadline, Policy, Proof, Replica, State, Wait};
use pool_domain::meters::Reading;
use pool_domain::perf::{PerfHints, PerfKey};
use pool_domain::plan::Demand;
use pool_domain::{DeviceMask, Draw, Failure, Generation, ReplicaKey, ResolvedMask};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::admission::Admission;
use crate::api_key::ApiKey;
use crate::clock::Clock;
use crate::events::EventSink;
use crate::lease_desk::Desk;
use crate::ports::{
    EngineHost, EngineProbe, EngineProvisioner, EngineRecord, GpuProbe, Handoff, ModelStore, PreparedEngine,
    ResolvedModel, RunningEngine, Staging, StateLedger,
};
use crate::returned::Held;
use crate::snapshot::{LastError, ReplicaSnapshot};
use crate::spec::{Activation, PoolSpec, Workload};

/// What a device serves that has to be left may end within this.
const EVACUATED_WITHIN: Duration = Duration::from_secs(10);

/// The ports, shared by every task.
#[derive(Debug, Clone)]
pub(crate) struct Ports {
    /// GPUs.
    pub(crate) gpu: Arc<dyn GpuProbe>,
    /// Models.
    pub(crate) models: Arc<dyn ModelStore>,
    /// Engine plans.
    pub(crate) provisioner: Arc<dyn EngineProvisioner>,
    /// Engine processes.
    pub(crate) host: Arc<dyn EngineHost>,
    /// Engine answers.
    pub(crate) probe: Arc<dyn EngineProbe>,
    /// Durable facts.
    pub(crate) ledger: Arc<dyn StateLedger>,
    /// Not a port: a bug on purpose.
    #[cfg(feature = "planted-bugs")]
    pub(crate) bug: Option<crate::planted::Bug>,
}

/// What a start needs from the node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Want {
    pub(crate) generation: Generation,
    pub(crate) mask: DeviceMask,
    /// Where it was, and is to be again if that can be.
    pub(crate) home: Option<ResolvedMask>,
    pub(crate) demand: Arc<Demand>,
    /// An engine run by somebody else needs neither devices nor a port.
    pub(crate) external: bool,
}

/// What the steward gave.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Grant {
    pub(crate) generation: Generation,
    pub(crate) devices: ResolvedMask,
    pub(crate) listen: Option<std::net::SocketAddr>,
    /// Bytes on each device, in order.
    pub(crate) bytes: Vec<u64>,
    /// What was free to it on all of them together; unset where nobody knows any more.
    pub(crate) room: Option<u64>,
    pub(crate) tensor_split: Option<String>,
    pub(crate) context: Option<u64>,
}

impl Grant {
    /// Bytes by device.
    pub(crate) fn pairs(&self) -> Vec<(String, u64)> {
        self.devices.uuids.iter().cloned().zip(self.bytes.iter().copied()).collect()
    }
}

/// Commands from above.
#[derive(Debug)]
pub(crate) enum DriverCommand {
    Verb(Command),
    Grant(Grant),
    Deny(Generation, Denied),
    /// It waits on, for this.
    Waits(Generation, Wait),
    /// Stop if nobody uses it.
    GiveWay,
    /// What it waited for may be there.
    Unblock,
    /// Its devices failed it: whatever this generation runs is ended at once.
    Condemn(Generation, Failure),
    /// Its devices are to be left: what this generation serves may end, for a short time, and then it looks for others.
    Evacuate(Generation),
    /// A person says that nothing of the engine is left.
    Unfence,
    /// Nothing is to be tried again by itself.
    GiveUp(Failure),
    /// What the next start makes the engine from.
    Respec(Arc<PoolSpec>),
    /// Where the next starts are to be, until there is another spec.
    GoHome(ResolvedMask),
    /// The daemon ends and its engines live on: leave everything as it is.
    Leave,
}

/// Why the steward gave nothing.
#[derive(Debug)]
pub(crate) enum Denied {
    Wait(Wait),
    Never(Failure),
}

/// What conductor and steward see of a replica.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Published {
    pub(crate) snapshot: ReplicaSnapshot,
    /// What its engine wants to hear: for those who get a slot, and not part of the picture that everybody sees.
    pub(crate) api_key: Option<ApiKey>,
    pub(crate) state: State,
    pub(crate) wants: Option<Want>,
    /// What it wanted when it was told to wait.
    pub(crate) blocked: Option<Want>,
    /// What it was seen to hold, by device, as far as that is known.
    pub(crate) taken: BTreeMap<String, u64>,
    /// Its processes, as far as they are known.
    pub(crate) pids: BTreeSet<u32>,
    /// When the next start is due, where one is planned.
    pub(crate) next_start: Option<pool_domain::Tick>,
    pub(crate) accused: Option<Accused>,
    /// Verbs taken in so far: what is older than a verb is no answer to it.
    pub(crate) verbs: u64,
}

/// The newest failure that throws suspicion on the devices it met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accused {
    pub(crate) generation: Generation,
    pub(crate) class: &'static str,
    pub(crate) at: pool_domain::Tick,
}

/// Memory that an engine was seen to hold.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    /// Bytes by device, as far as that is known.
    pub(crate) on: BTreeMap<String, u64>,
    pub(crate) pids: Vec<u32>,
}

/// Results of work, told to the driver.
#[derive(Debug)]
pub(crate) enum Report {
    Fact(Fact),
    Staging(Staging),
    /// Percent of its model that the engine says it has loaded.
    Loaded(u8),
    Staged(ResolvedModel, Arc<Demand>),
    Proved(Proof, Holds),
    /// The driver does not answer, for this reason.
    Unprovable(String),
    Preflighted,
    Prepared(Box<(PreparedEngine, EngineRecord)>),
    Launched(Arc<dyn RunningEngine>),
    /// What it publishes in numbers, and what of the same was seen of its answers.
    Read {
        told: Reading,
        seen: Reading,
    },
    Checked(Fact),
}

/// What the current attempt has gathered.
#[derive(Debug, Default)]
struct Attempt {
    /// How far its model has come.
    staging: Option<Progress>,
    /// Percent that the engine says it has loaded.
    loaded: Option<u8>,
    model: Option<ResolvedModel>,
    demand: Option<Arc<Demand>>,
    /// What it was seen to hold, by device, as far as that is known.
    taken: BTreeMap<String, u64>,
    /// Why nobody can say whether it holds its memory.
    unprovable: Option<String>,
    /// What it had taken when it was ended for taking more than its plan.
    outgrew: Option<u64>,
    want: Option<Want>,
    blocked: Option<Want>,
    grant: Option<Grant>,
    prepared: Option<PreparedEngine>,
    engine: Option<Arc<dyn RunningEngine>>,
    /// What is written down of it.
    record: Option<EngineRecord>,
    /// What has to come back when it ends.
    held: Held,
    /// It is of an earlier daemon: who uses its slots is not known.
    strange: bool,
    /// Why an engine that was found is not taken over.
    refused: Option<Failure>,
    /// The drain it was in when it was found: its end and what happens then.
    drain: Option<(pool_domain::Tick, OnDeadline)>,
}

/// Everything a driver is made of.
pub(crate) struct DriverParts {
    pub(crate) key: ReplicaKey,
    pub(crate) spec: Arc<PoolSpec>,
    /// Which mask of the spec is its own.
    pub(crate) place: u16,
    pub(crate) ports: Ports,
    pub(crate) clock: Clock,
    pub(crate) seed: u64,
    pub(crate) admission: Arc<Admission>,
    pub(crate) desk: Desk,
    pub(crate) commands: mpsc::Receiver<DriverCommand>,
    pub(crate) published: watch::Sender<Published>,
    /// Rung at every change: the pool's conductor and the node's steward.
    pub(crate) bells: [Arc<Notify>; 2],
    pub(crate) events: EventSink,
    pub(crate) replica: Replica,
    /// Its newest failure of before this daemon.
    pub(crate) last_error: Option<LastError>,
    /// Where its past is kept.
    pub(crate) memory: Memory,
    /// How much it did, and how fast.
    pub(crate) pace: Pace,
    /// Cancelled when there is no time left: whatever runs is ended at once.
    pub(crate) last_call: CancellationToken,
}

pub(crate) struct Driver {
    key: ReplicaKey,
    spec: Arc<PoolSpec>,
    place: u16,
    home: Option<ResolvedMask>,
    policy: Policy,
    replica: Replica,
    ports: Ports,
    clock: Clock,
    rng: fastrand::Rng,
    admission: Arc<Admission>,
    desk: Desk,
    commands: mpsc::Receiver<DriverCommand>,
    reports_tx: mpsc::Sender<(Generation, Report)>,
    reports: mpsc::Receiver<(Generation, Report)>,
    published: watch::Sender<Published>,
    bells: [Arc<Notify>; 2],
    events: EventSink,
    memory: Memory,
    pace: Pace,
    /// The newest of what was learnt of its engine's memory, which a disk may not have yet.
    learnt: Option<(CorrectionKey, Correction)>,
    attempt: Attempt,
    work: CancellationToken,
    scribe: Scribe,
    /// Wall times of what is shown to people.
    last_check: Option<SystemTime>,
    /// The newest failure, also one of before this daemon.
    last_error: Option<LastError>,
    accused: Option<Accused>,
    /// The generation that was ended because of its devices, which nobody need accuse any more.
    condemned: Option<Generation>,
    /// It is being drained because of its devices.
    evacuating: bool,
    attempt_began: pool_domain::Tick,
    verbs: u64,
    last_call: CancellationToken,
}

/// What the first picture of a replica shows.
pub(crate) fn at_rest(
    key: &ReplicaKey,
    replica: &Replica,
    last_error: Option<LastError>,
    perf: PerfHints,
) -> Published {
    Published {
        snapshot: ReplicaSnapshot {
            perf,
            generation: replica.generation,
            state: replica.state.code(),
            restart_count: replica.restarts,
            breaker: replica.breaker.code(),
            backoff_failures: replica.backoff.failures(),
            last_error,
            ..ReplicaSnapshot::idle(key.replica)
        },
        api_key: None,
        state: replica.state.clone(),
        wants: None,
        blocked: None,
        taken: BTreeMap::new(),
        pids: BTreeSet::new(),
        next_start: None,
        accused: None,
        verbs: 0,
    }
}

impl Driver {
    pub(crate) fn new(parts: DriverParts) -> Self {
        let (reports_tx, reports) = mpsc::channel(64);
        let now = parts.clock.now();
        Self {
            policy: parts.spec.policy,
            replica: parts.replica,
            scribe: Scribe::start(parts.key.clone(), Arc::clone(&parts.ports.ledger)),
            key: parts.key,
            spec: parts.spec,
            place: parts.place,
            home: None,
            ports: parts.ports,
            clock: parts.clock,
            rng: fastrand::Rng::with_seed(parts.seed),
            admission: parts.admission,
            desk: parts.desk,
            commands: parts.commands,
            reports_tx,
            reports,
            published: parts.published,
            bells: parts.bells,
            events: parts.events,
            memory: parts.memory,
            pace: parts.pace,
            learnt: None,
            attempt: Attempt::default(),
            work: CancellationToken::new(),
            last_check: None,
            last_error: parts.last_error,
            accused: None,
            condemned: None,
            evacuating: false,
            attempt_began: now,
            verbs: 0,
            last_call: parts.last_call,
        }
    }

    /// Runs until nobody can command it any more and nothing runs.
    pub(crate) async fn run(mut self) {
        let (mut commanded, mut hurried) = (true, false);
        loop {
            let deadline = self.replica.next_deadline(&self.policy);
            let draining = matches!(self.replica.state, State::Draining { .. });
            tokio::select! {
                biased;
                report = self.reports.recv() => {
                    if let Some((generation, report)) = report { self.report(generation, report); }
                }
                command = self.commands.recv(), if commanded => match command {
                    Some(DriverCommand::Leave) => {
                        self.admission.close();
                        break;
                    }
                    Some(command) => self.command(command),
                    None => {
                        commanded = false;
                        let stop = Command::Drain { deadline: std::time::Duration::ZERO, on_deadline: OnDeadline::Force };
                        self.step(Event::Command(stop));
                    }
                },
                () = self.admission.drained(), if draining => {
                    self.step(Event::Engine(self.replica.generation, Fact::LeasesDone));
                }
                () = self.last_call.cancelled(), if !hurried => {
                    hurried = true;
                    if let Some(engine) = &self.attempt.engine { engine.kill(); }
                }
                () = self.clock.sleep_until(deadline) => self.step(Event::Timer),
            }
            if self.evacuating && self.replica.state == State::Idle {
                self.evacuating = false;
                // One that is wanted only while somebody uses it comes back when somebody does.
                if commanded && self.spec.activation == Activation::Preload {
                    self.step(Event::Command(Command::Wake));
                }
            }
            self.publish();
            if !commanded && self.replica.state.at_rest() {
                break;
            }
        }
        self.scribe.finish().await;
    }

    fn command(&mut self, command: DriverCommand) {
        match command {
            DriverCommand::Verb(command) => {
                self.verbs += 1;
                self.evacuating = false;
                if matches!(command, Command::Start | Command::Resume) {
                    self.call_off_drain();
                }
                if command == Command::ResetBreaker {
                    self.forget_shortage();
                }
                if !self.drains_once_adopted(command) {
                    self.step(Event::Command(command));
                }
            }
            DriverCommand::Grant(grant) if self.wants(grant.generation) => {
                self.attempt.want = None;
                self.prepare(&grant);
                self.attempt.grant = Some(grant);
            }
            DriverCommand::Deny(generation, denied) if self.wants(generation) => {
                let want = self.attempt.want.take();
                let fact = match denied {
                    Denied::Wait(wait) => {
                        self.attempt.blocked = want;
                        Fact::Blocked(wait)
                    }
                    Denied::Never(failure) => Fact::Unstartable(failure),
                };
                self.step(Event::Engine(generation, fact));
            }
            DriverCommand::Waits(generation, why) => self.step(Event::Engine(generation, Fact::Blocked(why))),
            DriverCommand::GiveWay => {
                self.verbs += 1;
                // From here on nobody gets a lease: either one was there before, or there will be none.
                if matches!(self.replica.state, State::Ready { .. } | State::Suspect { .. })
                    && self.admission.close_if_unused()
                {
                    let stop = Command::Drain { deadline: std::time::Duration::ZERO, on_deadline: OnDeadline::Force };
                    self.step(Event::Command(stop));
                }
            }
            DriverCommand::GiveUp(failure) => {
                self.step(Event::Engine(self.replica.generation, Fact::GivenUp(failure)));
            }
            DriverCommand::Respec(spec) => {
                (self.policy, self.home) = (spec.policy, None);
                self.pace.of_model(&spec.model.model_id());
                self.spec = spec;
            }
            DriverCommand::GoHome(devices) => self.home = Some(devices),
            DriverCommand::Condemn(generation, failure) => {
                self.condemned = Some(generation);
                self.report(generation, Report::Fact(Fact::Exited(failure)));
            }
            DriverCommand::Evacuate(generation) if generation == self.replica.generation => {
                // Whoever drains it already wants it to stay down.
                self.evacuating = !matches!(self.replica.state, State::Draining { .. });
                self.step(Event::Command(Command::Drain {
                    deadline: EVACUATED_WITHIN,
                    on_deadline: OnDeadline::Force,
                }));
            }
            DriverCommand::Unblock => self.step(Event::Command(Command::Unblocked)),
            DriverCommand::Unfence => self.step(Event::Command(Command::Unfence)),
            // An answer to a question that was withdrawn.
            DriverCommand::Grant(_) | DriverCommand::Deny(..) | DriverCommand::Evacuate(_) | DriverCommand::Leave => {}
        }
    }

    fn wants(&self, generation: Generation) -> bool {
        self.attempt.want.as_ref().is_some_and(|w| w.generation == generation)
    }

    fn report(&mut self, generation: Generation, report: Report) {
        #[cfg(feature = "planted-bugs")]
        let generation = if self.ports.bug == Some(crate::planted::Bug::IgnoreGenerations) {
            self.replica.generation
        } else {
            generation
        };
        if generation != self.replica.generation {
            // A late launch cannot happen: its generation stays current until the launch was answered.
            return;
        }
        let fact = match report {
            // Whoever ends the daemon is not kept waiting by a driver that hangs.
            Report::Fact(Fact::MemoryUnknown) if self.ends_in_memory() => return,
            Report::Fact(fact) => fact,
            Report::Staging(staging) => {
                self.progressed(staging);
                return;
            }
            Report::Loaded(percent) => {
                self.attempt.loaded = Some(percent);
                return;
            }
            Report::Staged(model, demand) => {
                self.staged();
                self.attempt.model = Some(model);
                self.attempt.demand = Some(demand);
                Fact::Staged
            }
            Report::Read { told, seen } => {
                self.pace.read(told, seen);
                return;
            }
            Report::Unprovable(why) => {
                self.attempt.unprovable = Some(why);
                Fact::Unprovable
            }
            Report::Proved(proof, holds) => self.proved(proof, holds),
            Report::Preflighted => {
                if matches!(self.replica.state, State::Preparing { .. }) {
                    self.attempt.want = self.want();
                }
                return;
            }
            Report::Prepared(both) => {
                let (prepared, record) = *both;
                match prepared.entry {
                    Some(_) => self.pace.begin(self.perf_key(&record)),
                    // Somebody else's may have been there for long.
                    None => self.pace.take_over(self.perf_key(&record)),
                }
                self.attempt.prepared = Some(prepared);
                self.attempt.held = Held::of(&record);
                self.attempt.record = Some(record);
                Fact::Prepared
            }
            Report::Launched(engine) => {
                reached(Point::AfterLaunch);
                self.watch_exit(Arc::clone(&engine));
                self.attempt.engine = Some(engine);
                Fact::Launched
            }
            Report::Checked(fact) => {
                self.last_check = Some(self.clock.wall());
                fact
            }
        };
        let adopted = matches!(fact, Fact::Adopted(_));
        if let Fact::Adopted(Some(proof)) = &fact {
            self.timed(proof);
        }
        // One that was still starting when its record was written may have been leased since.
        self.attempt.strange |= adopted;
        self.ends_while_adopted(&fact);
        self.step(Event::Engine(generation, fact));
        if adopted {
            reached(Point::AfterAdoptionProof);
            self.go_on();
        }
    }

    fn step(&mut self, event: Event) {
        let before = tell::Before::of(&self.replica);
        let (now, generation) = (self.clock.now(), self.replica.generation);
        let by_hand = event == Event::Command(Command::Unfence);
        let actions = self.replica.step(event, now, Draw::new(self.rng.f64()), &self.policy);
        if before.fails_anew(&self.replica) {
            let at = self.clock.wall();
            let told = |f: &Failure| LastError { class: f.class.clone(), detail: f.detail.clone(), at };
            self.last_error = self.replica.last_failure.as_ref().map(|(_, f)| told(f));
            self.accuse(generation);
            self.learn_shortage(before.served());
        }
        if self.replica.state.live() {
            self.attempt.held.see(&*self.ports.gpu);
        }
        self.memory.keep(self.replica.past(), self.last_error.as_ref());
        if !self.replica.state.live() {
            self.pace.rest();
        }
        self.tell(&before, now, by_hand);
        self.note_phase();
        for action in actions {
            self.act(action);
        }
    }

    /// Of the generation that failed: the next one may have begun already.
    fn accuse(&mut self, generation: Generation) {
        if let Some((at, failure)) = &self.replica.last_failure
            && failure.class.policy().accuses_device
            && self.condemned != Some(generation)
        {
            self.accused = Some(Accused { generation, class: failure.class.code(), at: *at });
        }
    }

    fn act(&mut self, action: Action) {
        #[cfg(feature = "planted-bugs")]
        if matches!(
            (self.ports.bug, &action),
            (Some(crate::planted::Bug::NeverClose), Action::CloseAdmission)
                | (Some(crate::planted::Bug::NeverRevoke), Action::RevokeLeases)
        ) {
            return;
        }
        match action {
            Action::Stage => self.stage(),
            Action::Prepare => self.preflight(),
            Action::Launch => self.launch(),
            Action::WatchStart => self.watch_start(),
            Action::Prove => self.prove(),
            Action::WatchHealth => self.watch_health(),
            Action::CancelWork => {
                self.work.cancel();
                self.attempt.want = None;
            }
            Action::OpenAdmission => {
                let slots = self.replica.state.proof().map_or(0, |p| p.slots);
                if std::mem::take(&mut self.attempt.strange) {
                    self.watch_strange_slots(self.admission.open_taken(self.replica.generation, slots));
                } else {
                    self.admission.open(self.replica.generation, slots);
                }
                self.scribe.want(self.replica.generation, self.handoff());
            }
            Action::CloseAdmission => {
                self.admission.close();
                if matches!(self.replica.state, State::Draining { .. }) {
                    reached(Point::DrainBegun);
                }
            }
            Action::RevokeLeases => self.admission.revoke(),
            Action::Terminate => {
                self.scribe.want(self.replica.generation, None);
                if let Some(e) = &self.attempt.engine {
                    e.terminate();
                }
                reached(Point::AfterTerm);
            }
            Action::Kill => {
                self.scribe.want(self.replica.generation, None);
                if let Some(e) = &self.attempt.engine {
                    e.kill();
                }
                reached(Point::AfterKill);
            }
            Action::AwaitGone => self.await_gone(),
            Action::Adopt => self.check_adopted(),
        }
    }

    /// The proof tells how long a first token takes, as far as there are tokens.
    fn timed(&mut self, proof: &Proof) {
        if self.spec.workload == Workload::Generate {
            self.pace.proved(proof.first_unit_ms);
        }
    }

    fn perf_key(&self, record: &EngineRecord) -> PerfKey {
        PerfKey {
            engine: format!("{} {}", self.spec.engine, record.engine_version),
            model: record.endpoint.model.clone(),
            mask: record.devices.to_cuda_visible_devices(),
        }
    }

    /// Its main process, if it is ours.
    fn process(&self) -> Option<u32> {
        self.attempt.engine.as_ref().and_then(|e| e.pid())
    }

    /// Whether somebody else runs it.
    fn runs_elsewhere(&self) -> bool {
        self.ports.provisioner.external(&self.spec).is_some()
    }

    fn handoff(&self) -> Option<Handoff> {
        let (prepared, grant) = (self.attempt.prepared.as_ref()?, self.attempt.grant.as_ref()?);
        let proof = self.replica.state.proof()?;
        Some(Handoff {
            key: self.key.clone(),
            generation: self.replica.generation,
            endpoint: prepared.endpoint.url(),
            api_key: prepared.endpoint.api_key.clone(),
            engine: self.spec.engine.to_string(),
            engine_version: prepared.engine_version.clone(),
            model: proof.model.clone(),
            device_mask: grant.devices.to_cuda_visible_devices(),
            slots: proof.slots,
            vram: grant.bytes.iter().sum(),
        })
    }
}
