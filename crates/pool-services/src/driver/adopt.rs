//! Takes over the engine of an earlier daemon, and keeps on record what a later one needs to do the same.

use std::sync::Arc;
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::lifecycle::{Command, Event, Fact, OnDeadline, Proof, State};
use pool_domain::liveness::{Signals, Work};
use pool_domain::{Failure, FailureClass};
use tokio_util::sync::CancellationToken;

use super::work::{Unproved, prove};
use super::{Driver, Grant, Report};
use crate::admission::SlotGuard;
use crate::lease_desk::at;
use crate::ports::{
    Endpoint, EngineProbe, EngineRecord, NotAdopted, PROBE_TIMEOUT, Phase, PreparedEngine, RunningEngine, Up,
};
use crate::returned::Held;

/// Between two questions of one check, and of how busy an engine is.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What was found of a recorded engine.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) record: EngineRecord,
    pub(crate) outcome: Result<Arc<dyn RunningEngine>, NotAdopted>,
    /// Nothing is left of it: what it had may have been given to others already.
    pub(crate) gone: bool,
}

impl Driver {
    /// Begins with this engine instead of at rest. Called before anything else runs, so that nobody ever sees the replica
    /// without it.
    /// `hold`: the pool is not to run.
    pub(crate) fn take_over(&mut self, found: Found, hold: bool) {
        let Found { record, outcome, gone: _ } = found;
        let changed = record.fingerprint != self.spec.fingerprint(self.place);
        let (engine, refused) = match outcome {
            Ok(engine) => (Some(engine), changed.then(|| config("the pool was changed while no daemon ran"))),
            Err(NotAdopted { why, rest }) => (rest, Some(why)),
        };
        let ready_since = match &record.phase {
            Phase::Ready { since, .. } => Some(*since),
            Phase::Draining { ready_since, .. } => Some(*ready_since),
            Phase::Starting | Phase::Stopping => None,
        };
        let generation = record.generation;
        let end = record.phase == Phase::Stopping || hold && (record.phase == Phase::Starting || refused.is_some());
        let drain = match &record.phase {
            // Without a hold it was a reload that was not committed: it is undone.
            Phase::Draining { deadline, on_deadline, .. } if hold => Some((*deadline, *on_deadline)),
            Phase::Ready { .. } if hold => Some((self.clock.now() + self.spec.drain_deadline, self.spec.on_deadline)),
            _ => None,
        };
        self.attempt.grant = Some(Grant {
            generation,
            devices: record.devices.clone(),
            listen: Some(record.endpoint.addr),
            bytes: record.bytes.clone(),
            room: None,
            tensor_split: None,
            context: None,
        });
        self.attempt.prepared = Some(PreparedEngine {
            entry: None,
            args: Vec::new(),
            env: Vec::new(),
            endpoint: record.endpoint.clone(),
            confinement: Default::default(),
            engine_version: record.engine_version.clone(),
        });
        self.attempt.engine = engine;
        self.attempt.held = Held::of(&record);
        self.pace.take_over(self.perf_key(&record));
        self.attempt.record = Some(record);
        self.attempt.refused = refused;
        self.attempt.drain = drain;
        self.step(Event::Command(Command::Adopt { generation, ready_since }));
        if end {
            self.stop_adopted();
        }
        reached(Point::AfterTakeOver);
        self.publish();
    }

    fn stop_adopted(&mut self) {
        self.attempt.drain = None;
        let stop = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };
        self.step(Event::Command(stop));
    }

    /// One that served an earlier daemon may have leases of then: a drain that gives them time waits for the end of the
    /// look at it, which takes no longer than that.
    pub(super) fn drains_once_adopted(&mut self, command: Command) -> bool {
        let Command::Drain { deadline, on_deadline } = command else { return false };
        if self.attempt.refused.is_some() || deadline.is_zero() || !matches!(self.replica.state, State::Adopting { .. })
        {
            return false;
        }
        let Some(record) = &mut self.attempt.record else { return false };
        let (ready_since, proof) = match &record.phase {
            Phase::Ready { since, proof } => (*since, proof.clone()),
            Phase::Draining { ready_since, proof, .. } => (*ready_since, proof.clone()),
            Phase::Starting | Phase::Stopping => return false,
        };
        let end = self.clock.now() + deadline;
        let end = self.attempt.drain.map_or(end, |(earlier, _)| earlier.min(end));
        self.attempt.drain = Some((end, on_deadline));
        // Whoever comes after this daemon keeps to it, too.
        record.phase = Phase::Draining { ready_since, proof, deadline: end, on_deadline };
        self.scribe.record(record.clone());
        self.check_again();
        true
    }

    /// The last wish wins, also over a drain that goes on once its engine is adopted. The look at it that was to end with
    /// the drain begins anew.
    pub(super) fn call_off_drain(&mut self) {
        if self.attempt.drain.take().is_some() && matches!(self.replica.state, State::Adopting { .. }) {
            self.check_again();
        }
    }

    fn check_again(&mut self) {
        self.work.cancel();
        self.work = CancellationToken::new();
        self.check_adopted();
    }

    /// An engine that was to end anyway is not started again because it did, or because it is not what it was.
    pub(super) fn ends_while_adopted(&mut self, fact: &Fact) {
        let ends = matches!(fact, Fact::Exited(_) | Fact::Unproved(_) | Fact::NotAdopted(_));
        if ends && self.attempt.drain.is_some() && matches!(self.replica.state, State::Adopting { .. }) {
            self.stop_adopted();
        }
    }

    /// Whether the engine still is what it was.
    pub(super) fn check_adopted(&mut self) {
        if let Some(why) = self.attempt.refused.clone() {
            tracing::warn!(pool_id = %self.key.pool, replica_id = %self.key.replica, %why, "an engine of an earlier daemon is not taken over");
            self.send(Report::Fact(Fact::NotAdopted(why)));
            return;
        }
        let (Some((engine, endpoint)), Some(record)) = (self.running(), &self.attempt.record) else { return };
        let recorded = match &record.phase {
            Phase::Ready { proof, .. } | Phase::Draining { proof, .. } => proof.clone(),
            Phase::Starting => {
                self.watch_exit(engine);
                self.send(Report::Fact(Fact::Adopted(None)));
                return;
            }
            Phase::Stopping => {
                self.watch_exit(engine);
                return;
            }
        };
        self.watch_exit(Arc::clone(&engine));
        let (ports, record) = (self.ports.clone(), record.clone());
        let again = self.policy.health.timeout;
        let patience = again * self.policy.health.failures;
        // The end of a drain does not wait for a proof, nor for whatever is asked in its place.
        let ends_in = match self.attempt.drain {
            Some((deadline, OnDeadline::Force)) => deadline.since(self.clock.now()),
            _ => Duration::MAX,
        };
        self.run_work(async move {
            let check = || async {
                loop {
                    match prove(&ports, &engine, &endpoint, Some(&record)).await {
                        // The driver may have to come up first, as this daemon had.
                        Err(Unproved::Driver(_)) => tokio::time::sleep(ASK_AGAIN).await,
                        Err(Unproved::Engine(failure)) if failure.class == FailureClass::DriverError => {
                            tokio::time::sleep(ASK_AGAIN).await;
                        }
                        Err(Unproved::Engine(failure)) => return Err(failure),
                        Ok((proof, _)) => return Ok(proof),
                    }
                }
            };
            let asked = async {
                let mut checked = tokio::time::timeout(patience, check()).await;
                // With every slot taken by requests of before, nothing can be asked of it; busy is not dead.
                if checked.is_err() && !may_be_busy(&*ports.probe, &endpoint).await {
                    // It was until just now, perhaps.
                    checked = tokio::time::timeout(again, check()).await;
                }
                match checked {
                    Ok(Ok(proof)) => Fact::Adopted(Some(Proof { slots: recorded.slots, ..proof })),
                    Ok(Err(failure)) => Fact::Unproved(failure),
                    Err(_) if may_be_busy(&*ports.probe, &endpoint).await => Fact::Adopted(Some(recorded.clone())),
                    Err(_) => Fact::Unproved(Failure::new(FailureClass::Hang, "it does not do a unit of work in time")),
                }
            };
            let fact = tokio::select! {
                biased;
                // Of its end the watch tells, and knows why.
                _ = engine.exited() => std::future::pending().await,
                fact = tokio::time::timeout(ends_in, asked) => fact,
            };
            Report::Fact(fact.unwrap_or(Fact::Adopted(Some(recorded))))
        });
    }

    /// After an adoption: what was begun before goes on.
    pub(super) fn go_on(&mut self) {
        if !self.replica.state.ready() {
            return;
        }
        if let Some((deadline, on_deadline)) = self.attempt.drain.take() {
            let deadline = deadline.since(self.clock.now());
            self.step(Event::Command(Command::Drain { deadline, on_deadline }));
        }
    }

    /// Requests that run since before this daemon have no lease here, and clients may hold leases that this daemon does
    /// not know. The slots count as taken, at the desk, which is told what the engine says of how busy it is.
    pub(super) fn watch_strange_slots(&self, guards: Vec<SlotGuard>) {
        let Some((_, endpoint)) = self.running() else { return };
        let (probe, desk, at) =
            (Arc::clone(&self.ports.probe), self.desk.clone(), at(&self.key, self.replica.generation));
        tokio::spawn(async move {
            desk.adopted(at, guards).await;
            loop {
                tokio::time::sleep(ASK_AGAIN).await;
                if desk.busy(at, told(&*probe, &endpoint).await).await == 0 {
                    return;
                }
            }
        });
    }

    /// Keeps the record in step with the state. Called before the actions of a step, which may forget the attempt.
    pub(super) fn note_phase(&mut self) {
        if self.runs_elsewhere() {
            return;
        }
        let Some(record) = &mut self.attempt.record else { return };
        let generation = record.generation;
        let phase = match &self.replica.state {
            _ if self.replica.generation != generation => None,
            State::Starting { .. } | State::Warming { .. } => Some(Phase::Starting),
            State::Adopting { .. } => return,
            State::Ready { since, proof, .. } => Some(Phase::Ready { since: *since, proof: proof.clone() }),
            State::Suspect { ready_since, proof, .. } => {
                Some(Phase::Ready { since: *ready_since, proof: proof.clone() })
            }
            State::Draining { ready_since, proof, deadline, on_deadline, .. } => Some(Phase::Draining {
                ready_since: *ready_since,
                proof: proof.clone(),
                deadline: *deadline,
                on_deadline: *on_deadline,
            }),
            State::Stopping { .. } | State::Fenced { .. } => Some(Phase::Stopping),
            State::Idle
            | State::Staging { .. }
            | State::Preparing { .. }
            | State::Waiting { .. }
            | State::Failed { .. } => None,
        };
        match phase {
            Some(phase) if phase == record.phase => {}
            Some(phase) => {
                if matches!(phase, Phase::Ready { .. }) {
                    // A script may have become another program since its launch.
                    record.executable = self.attempt.engine.as_ref().and_then(|e| e.executable());
                }
                record.phase = phase;
                self.scribe.record(record.clone());
            }
            None => {
                self.attempt.record = None;
                self.scribe.forget(generation);
            }
        }
    }
}

/// Whether it says that it serves, and not that it is idle. Who does not say is taken for busy, as in every check.
async fn may_be_busy(probe: &dyn EngineProbe, endpoint: &Endpoint) -> bool {
    let asked = async {
        let idle = matches!(probe.signals(endpoint).await, Work::Told(signals) if signals.running == 0);
        !idle && matches!(probe.up(endpoint).await, Up::Serving | Up::Overloaded(_))
    };
    tokio::time::timeout(PROBE_TIMEOUT, asked).await.unwrap_or(false)
}

/// Requests that an engine says it works on.
pub(crate) async fn busy(probe: &dyn EngineProbe, endpoint: &Endpoint) -> u16 {
    // Who does not say has nothing that could be waited for.
    told(probe, endpoint).await.map_or(0, |work| u16::try_from(work.running).unwrap_or(u16::MAX))
}

async fn told(probe: &dyn EngineProbe, endpoint: &Endpoint) -> Option<Signals> {
    match tokio::time::timeout(PROBE_TIMEOUT, probe.signals(endpoint)).await {
        Ok(Work::Told(signals)) => Some(signals),
        Ok(Work::Untold | Work::Silent) | Err(_) => None,
    }
}

fn config(why: &str) -> Failure {
    Failure::new(FailureClass::Config, why)
}
