//! The conductor of a pool: the only writer of its hold and its operations. It commands the drivers of its replicas
//! and sums up what they publish.

mod idle;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lifecycle::{Command, OnDeadline, State, Wait};
use pool_domain::{ReplicaId, ReplicaKey, Tick};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::admission::Admission;
use crate::control::{ControlError, DrainOptions, Operation, OperationState};
use crate::driver::{DriverCommand, Published};
use crate::hold::Hold;
use crate::node::Node;
use crate::roster::{Roster, Seat};
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
    /// Another pool needs the memory of this replica: stop it if nobody uses it.
    GiveWay(ReplicaId),
    /// This replica gave way for nothing.
    ComeBack(ReplicaId),
    /// The daemon ends: stop without leaving a hold.
    Shutdown,
    /// The daemon ends and its engines live on.
    Leave,
    /// Drain, then end: the pool is no more.
    Remove,
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

/// A replica of the pool; its driver ends with this.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) key: ReplicaKey,
    /// Which mask of the spec is its own.
    pub(crate) place: u16,
    pub(crate) commands: mpsc::Sender<DriverCommand>,
    pub(crate) published: watch::Receiver<Published>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) serves: bool,
    /// Verbs sent to it so far.
    pub(crate) sent: u64,
}

impl Member {
    /// What others see of it.
    pub(crate) fn seat(&self) -> Seat {
        Seat {
            key: self.key.clone(),
            published: self.published.clone(),
            commands: self.commands.downgrade(),
            admission: Arc::clone(&self.admission),
            serves: self.serves,
        }
    }

    async fn command(&mut self, command: Command) {
        self.sent += 1;
        // Drivers never wait for their conductor, so this cannot deadlock.
        let _ended = self.commands.send(DriverCommand::Verb(command)).await;
    }

    fn at_rest(&self) -> bool {
        self.published.borrow().state.at_rest()
    }
}

pub(crate) struct Conductor {
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) node: Node,
    pub(crate) members: Vec<Member>,
    pub(crate) bell: Arc<Notify>,
    pub(crate) commands: mpsc::Receiver<ConductorCommand>,
    pub(crate) facts: watch::Sender<PoolFacts>,
    pub(crate) roster: watch::Sender<Arc<Roster>>,
    pub(crate) hold: Hold,
    /// Operations begun so far.
    pub(crate) made: u64,
    /// When somebody last asked for the pool.
    pub(crate) asked: Tick,
    /// The pool is ending: nothing is started any more.
    pub(crate) ending: bool,
    /// Its drivers have ended and left their engines as they are.
    pub(crate) left: bool,
}

impl Conductor {
    /// Runs until nobody can command it any more; the drivers end with it.
    pub(crate) async fn run(mut self) {
        if self.spec.activation == Activation::Preload && !self.hold.held() {
            self.command_all(Command::Wake).await;
        }
        let clock = self.node.clock;
        loop {
            let look_at = self.look_at();
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                command = self.commands.recv() => match command {
                    Some(ConductorCommand { wish: Wish::GiveWay(id), .. }) => self.give_way(id).await,
                    Some(ConductorCommand { wish: Wish::ComeBack(id), .. }) => self.come_back(id).await,
                    Some(ConductorCommand { wish, answer }) => {
                        let result = self.carry_out(wish).await;
                        let written = self.hold.tried();
                        tokio::spawn(async move {
                            written.await;
                            // The asker may be gone; what was asked for goes on.
                            let _ = answer.send(result);
                        });
                    }
                    None => return,
                },
                () = clock.sleep_until(look_at) => self.stop_if_unused().await,
            }
            self.publish();
            if self.left {
                return;
            }
            if self.ending && self.members.iter().all(Member::at_rest) {
                // Without commands drivers end, and with them their channels, once all was written down.
                let ends: Vec<_> = self.members.drain(..).map(|m| m.published).collect();
                for mut published in ends {
                    while published.changed().await.is_ok() {}
                }
                return;
            }
        }
    }

    async fn command_all(&mut self, command: Command) {
        for member in self.members.iter_mut().filter(|m| m.serves) {
            member.command(command).await;
        }
    }

    async fn carry_out(&mut self, wish: Wish) -> Answer {
        if self.ending {
            return Err(ControlError::Unreachable("the pool is stopping".into()));
        }
        let verb = match wish {
            Wish::Shutdown => {
                self.ending = true;
                self.command_all(Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }).await;
                "shutdown"
            }
            Wish::Leave => {
                self.ending = true;
                for member in &self.members {
                    let _ended = member.commands.send(DriverCommand::Leave).await;
                    member.commands.closed().await;
                }
                self.left = true;
                "leave"
            }
            Wish::Remove => {
                self.ending = true;
                let (deadline, on_deadline) = (self.spec.drain_deadline, OnDeadline::Force);
                self.command_all(Command::Drain { deadline, on_deadline }).await;
                "remove"
            }
            Wish::Preload => {
                self.asked = self.node.clock.now();
                self.hold.set(false);
                self.command_all(Command::Start).await;
                "preload"
            }
            Wish::Demand => {
                // What somebody stopped is not woken by somebody else.
                if self.hold.held() {
                    return Err(ControlError::Draining);
                }
                self.asked = self.node.clock.now();
                self.command_all(Command::Wake).await;
                let starts = |o: &&Operation| o.verb == "preload" && o.state == OperationState::Running;
                // All that ask wait for one start.
                if let Some(start) = self.facts.borrow().operations.iter().find(starts) {
                    return Ok(start.clone());
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
            Wish::GiveWay(_) | Wish::ComeBack(_) => {
                return Err(ControlError::Conflict("it is told, and answers nobody".into()));
            }
            Wish::Resume => {
                self.asked = self.node.clock.now();
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
        self.made += 1;
        let operation = Operation {
            id: format!("op-{}-{:08x}-{}", self.spec.id, self.node.seed & 0xffff_ffff, self.made),
            verb: verb.into(),
            pool_id: self.spec.id.clone(),
            state: match wish {
                Wish::Resume | Wish::ResetBreaker => {
                    OperationState::Succeeded(if verb == "resume" { "resumed" } else { "reset" }.into())
                }
                _ => OperationState::Running,
            },
            progress: String::new(),
            started_at: self.node.clock.wall(),
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
        let replicas: Vec<Published> =
            self.members.iter_mut().map(|m| m.published.borrow_and_update().clone()).collect();
        // An operation is judged only once every driver has taken in its command.
        let settled = self.members.iter().zip(&replicas).all(|(m, r)| r.verbs == m.sent);
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
            if replicas.len() > 1 {
                let each = |r: &Published| format!("{} {}", r.snapshot.id, r.snapshot.state);
                let each = replicas.iter().map(each).collect::<Vec<_>>().join(", ");
                o.progress = format!("{}: {each}", o.progress);
            }
            if ready == replicas.len() {
                o.state = OperationState::Succeeded("ready".into());
            } else if let Some(r) = replicas
                .iter()
                .find(|r| matches!(r.state, State::Failed { .. } | State::Waiting { why: Wait::Breaker { .. }, .. }))
            {
                o.state = OperationState::Failed(r.snapshot.reason.clone());
            } else if let Some(r) = replicas.iter().find(|r| r.state == State::Idle) {
                // Nobody asked for it any more, or another needed its memory.
                o.state = OperationState::Failed(format!("{} was stopped before all were ready", r.snapshot.id));
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
