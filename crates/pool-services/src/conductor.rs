//! The conductor of a pool: the only writer of its hold and its operations. It commands the drivers of its replicas
//! and sums up what they publish.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::Tick;
use pool_domain::lifecycle::{Command, OnDeadline, State, Wait};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::clock::Clock;
use crate::control::{ControlError, DrainOptions, Operation, OperationState};
use crate::driver::{DriverCommand, Published};
use crate::hold::Hold;
use crate::snapshot::PoolSnapshot;
use crate::spec::{Activation, PoolSpec};

/// Operations remembered per pool.
const REMEMBERED: usize = 32;

/// A wish of a person or program.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wish {
    Preload,
    Drain(DrainOptions),
    Resume,
    Stop,
    /// Somebody wants a lease of a pool that rests.
    Demand,
    ResetBreaker,
    /// The daemon ends: stop without leaving a hold.
    Shutdown,
    /// The daemon ends and its engines live on.
    Leave,
}

pub(crate) type Answer = Result<Operation, ControlError>;

#[derive(Debug)]
pub(crate) struct ConductorCommand {
    pub(crate) wish: Wish,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// What the conductor tells upwards.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PoolFacts {
    pub(crate) snapshot: PoolSnapshot,
    pub(crate) operations: VecDeque<Operation>,
    /// When each replica's next start is due, where one is planned.
    pub(crate) next_starts: Vec<Option<Tick>>,
}

impl PoolFacts {
    /// The picture with what changes with every millisecond.
    pub(crate) fn at(&self, now: Tick) -> PoolSnapshot {
        let mut snapshot = self.snapshot.clone();
        for (r, due) in snapshot.replicas.iter_mut().zip(&self.next_starts) {
            r.next_start_in_ms = due.map(|due| u64::try_from(due.since(now).as_millis()).unwrap_or(u64::MAX));
        }
        snapshot
    }
}

pub(crate) struct Conductor {
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) clock: Clock,
    pub(crate) drivers: Vec<mpsc::Sender<DriverCommand>>,
    pub(crate) replicas: Vec<watch::Receiver<Published>>,
    pub(crate) bell: Arc<Notify>,
    pub(crate) commands: mpsc::Receiver<ConductorCommand>,
    pub(crate) facts: watch::Sender<PoolFacts>,
    pub(crate) run_id: String,
    pub(crate) hold: Hold,
    /// Verbs sent so far, to every driver alike.
    pub(crate) verbs: u64,
    /// The daemon is ending: nothing is started any more.
    pub(crate) ending: bool,
    /// Its drivers have ended and left their engines as they are.
    pub(crate) left: bool,
}

impl Conductor {
    /// Runs until nobody can command it any more; the drivers end with it.
    pub(crate) async fn run(mut self) {
        let mut made = 0u64;
        if self.spec.activation == Activation::Preload && !self.hold.held() {
            self.command_all(Command::Wake).await;
        }
        loop {
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                command = self.commands.recv() => match command {
                    Some(ConductorCommand { wish, answer }) => {
                        made += 1;
                        let result = self.carry_out(wish, made).await;
                        let written = self.hold.tried();
                        tokio::spawn(async move {
                            written.await;
                            // The asker may be gone; what was asked for goes on.
                            let _ = answer.send(result);
                        });
                    }
                    None => return,
                },
            }
            self.publish();
            if self.left {
                return;
            }
            if self.ending && self.replicas.iter().all(|r| r.borrow().state.at_rest()) {
                // Without commands drivers end, and with them their channels, once all was written down.
                self.drivers.clear();
                for r in &mut self.replicas {
                    while r.changed().await.is_ok() {}
                }
                return;
            }
        }
    }

    async fn command_all(&mut self, command: Command) {
        self.verbs += 1;
        for d in &self.drivers {
            // Drivers never wait for their conductor, so this cannot deadlock.
            let _ = d.send(DriverCommand::Verb(command)).await;
        }
    }

    async fn carry_out(&mut self, wish: Wish, n: u64) -> Answer {
        if self.ending {
            return Err(ControlError::Unreachable("the daemon is stopping".into()));
        }
        let verb = match wish {
            Wish::Shutdown => {
                self.ending = true;
                self.command_all(Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }).await;
                "shutdown"
            }
            Wish::Leave => {
                self.ending = true;
                for d in &self.drivers {
                    let _ = d.send(DriverCommand::Leave).await;
                    d.closed().await;
                }
                self.left = true;
                "leave"
            }
            Wish::Preload => {
                self.hold.set(false);
                self.command_all(Command::Start).await;
                "preload"
            }
            Wish::Demand => {
                if !self.hold.held() {
                    self.command_all(Command::Wake).await;
                }
                "preload"
            }
            Wish::Drain(o) => {
                let deadline = o.deadline.unwrap_or(self.spec.drain_deadline);
                self.command_all(Command::Drain {
                    deadline,
                    on_deadline: o.on_deadline.unwrap_or(self.spec.on_deadline),
                })
                .await;
                self.hold.set(true);
                "drain"
            }
            Wish::Stop => {
                self.command_all(Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }).await;
                self.hold.set(true);
                "stop"
            }
            Wish::Resume => {
                // What a running drain has stopped already comes back, too.
                let drains = |o: &Operation| o.verb == "drain" && o.state == OperationState::Running;
                let draining = self.facts.borrow().operations.iter().any(drains);
                self.hold.set(false);
                self.command_all(Command::Resume).await;
                if draining || self.spec.activation == Activation::Preload {
                    self.command_all(Command::Start).await;
                }
                "resume"
            }
            Wish::ResetBreaker => {
                self.command_all(Command::ResetBreaker).await;
                "breaker_reset"
            }
        };
        let operation = Operation {
            id: format!("op-{}-{}-{n}", self.spec.id, self.run_id),
            verb: verb.into(),
            pool_id: self.spec.id.clone(),
            state: match wish {
                Wish::Resume | Wish::ResetBreaker => {
                    OperationState::Succeeded(if verb == "resume" { "resumed" } else { "reset" }.into())
                }
                _ => OperationState::Running,
            },
            progress: String::new(),
            started_at: self.clock.wall(),
        };
        self.facts.send_modify(|f| {
            // The last wish wins: what it contradicts is over.
            for o in f.operations.iter_mut().filter(|o| o.state == OperationState::Running && o.verb != verb) {
                o.state = OperationState::Failed(format!("superseded by {verb}"));
            }
            f.operations.push_front(operation.clone());
            f.operations.truncate(REMEMBERED);
        });
        Ok(operation)
    }

    fn publish(&mut self) {
        let replicas: Vec<Published> = self.replicas.iter_mut().map(|r| r.borrow_and_update().clone()).collect();
        // An operation is judged only once every driver has taken in its command.
        let settled = replicas.iter().all(|r| r.verbs == self.verbs);
        let hold = self.hold.held();
        self.facts.send_if_modified(|f| {
            let before = f.clone();
            f.snapshot.hold = hold;
            f.snapshot.replicas = replicas.iter().map(|r| r.snapshot.clone()).collect();
            f.next_starts = replicas.iter().map(|r| r.next_start).collect();
            if settled {
                for o in f.operations.iter_mut().filter(|o| o.state == OperationState::Running) {
                    judge(o, &replicas);
                }
            }
            let changed = *f != before;
            f.snapshot.snapshot += u64::from(changed);
            changed
        });
    }
}

/// How an operation stands, given its pool's replicas.
fn judge(o: &mut Operation, replicas: &[Published]) {
    let count = |p: fn(&State) -> bool| replicas.iter().filter(|r| p(&r.state)).count();
    match o.verb.as_str() {
        "preload" => {
            let ready = count(State::ready);
            o.progress = format!("{ready} of {} ready", replicas.len());
            if ready == replicas.len() {
                o.state = OperationState::Succeeded("ready".into());
            } else if let Some(r) = replicas
                .iter()
                .find(|r| matches!(r.state, State::Failed { .. } | State::Waiting { why: Wait::Breaker { .. }, .. }))
            {
                o.state = OperationState::Failed(r.snapshot.reason.clone());
            }
        }
        _ => {
            let rest = count(|s| matches!(s, State::Idle | State::Failed { .. }));
            o.progress = format!("{rest} of {} at rest", replicas.len());
            if rest == replicas.len() {
                o.state = OperationState::Succeeded("drained".into());
            } else if replicas.iter().any(|r| matches!(r.state, State::Fenced { .. })) {
                o.state = OperationState::Failed("something of an engine may be left: its devices are fenced".into());
            } else if replicas.iter().any(|r| r.state.ready()) {
                o.state = OperationState::Failed("given up: leases were still held at the deadline".into());
            }
        }
    }
}
