//! The conductor of a pool: the only writer of its hold and its operations. It commands the drivers of its replicas
//! and sums up what they publish.

mod idle;
mod operations;
mod paper;
mod points;
mod probation;
mod reload;
mod verify;

pub(crate) use paper::Paper;
pub(crate) use reload::{Made, Reload, Running};

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lifecycle::{Command, OnDeadline};
use pool_domain::rollout::Probation;
use pool_domain::{ReplicaId, ReplicaKey, Tick};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::admission::Admission;
use crate::control::{ControlError, DrainOptions, Operation, OperationState};
use crate::declared::Source;
use crate::driver::{DriverCommand, Published};
use crate::events::EventKind;
use crate::hold::Hold;
use crate::lease_desk::Desk;
use crate::node::Node;
use crate::roster::{Roster, Seat};
use crate::snapshot::PoolSnapshot;
use crate::spec::Activation;

/// Operations remembered per pool.
const REMEMBERED: usize = 32;

/// A wish of a person or program.
#[derive(Debug, Clone)]
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
    /// The daemon ends: stop without leaving a hold, once leases have had this time to end.
    Shutdown {
        /// For leases.
        drain: Duration,
    },
    /// The daemon ends and its engines live on.
    Leave,
    /// Drain, then end: the pool is no more.
    Remove,
    /// To be made from another spec.
    Reload(Box<Reload>),
    /// To be made from the spec before the last reload.
    Rollback,
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
    /// Whether a reload is under way: whatever is not there now comes back, as the new or as the old.
    pub(crate) reloading: bool,
}

impl PoolFacts {
    pub(crate) fn first(snapshot: PoolSnapshot, begun: Option<Operation>) -> Self {
        Self { snapshot, operations: begun.into_iter().collect(), next_starts: Vec::new(), reloading: false }
    }

    /// The picture with what changes with every millisecond.
    pub(crate) fn at(&self, now: Tick) -> PoolSnapshot {
        let mut snapshot = self.snapshot.clone();
        for (r, due) in snapshot.replicas.iter_mut().zip(&self.next_starts) {
            r.next_start_in_ms = due.map(|due| u64::try_from(due.since(now).as_millis()).unwrap_or(u64::MAX));
        }
        snapshot
    }
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
    /// What the pool is made from, and what it was made from before the last reload.
    pub(crate) made: Made,
    pub(crate) source: Source,
    /// Whether that lies in the ledger: one of the file does only if something was reloaded over its table.
    pub(crate) stored: bool,
    pub(crate) previous: Option<Made>,
    pub(crate) revision: u64,
    /// The reload under way, and the one that is wanted after it.
    pub(crate) running: Option<Running>,
    pub(crate) queued: Option<(Reload, String)>,
    pub(crate) probation: Option<Probation>,
    pub(crate) node: Node,
    pub(crate) members: Vec<Member>,
    pub(crate) bell: Arc<Notify>,
    pub(crate) desk: Desk,
    pub(crate) commands: mpsc::Receiver<ConductorCommand>,
    pub(crate) facts: watch::Sender<PoolFacts>,
    pub(crate) roster: watch::Sender<Arc<Roster>>,
    pub(crate) hold: Hold,
    pub(crate) paper: Paper,
    /// Operations begun so far.
    pub(crate) begun: u64,
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
        self.rounds().await;
        // What a removal strikes out is not written again.
        self.paper.finish().await;
    }

    async fn rounds(&mut self) {
        if self.made.spec.activation == Activation::Preload && !self.hold.held() {
            self.command_all(Command::Wake).await;
        }
        loop {
            let (look_at, late) = (self.look_at(), self.reload_deadline());
            let mut found = None;
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                verdict = Self::verdict(&mut self.running) => found = Some(verdict),
                () = self.node.clock.sleep_until(late) => self.reload_is_late(),
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
                () = self.node.clock.sleep_until(look_at) => self.stop_if_unused().await,
            }
            self.advance(found).await;
            self.heed_probation().await;
            if self.running.is_none() {
                self.let_go();
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
        for member in self.members.iter_mut().filter(|m| m.serves || self.ending) {
            member.command(command).await;
        }
    }

    /// Also those that a reload replaced and that have leases still: a forced drain ends them with the others.
    async fn drain_all(&mut self, deadline: Duration, on_deadline: OnDeadline) {
        let command = Command::Drain { deadline, on_deadline };
        for member in self.members.iter_mut().filter(|m| m.serves || on_deadline == OnDeadline::Force) {
            member.command(command).await;
        }
        // Nor do those outlive it that a daemon before this one had replaced.
        if let (Some(hurry), OnDeadline::Force) = (self.node.hurry.get(&self.made.spec.id).cloned(), on_deadline) {
            tokio::spawn(async move {
                tokio::time::sleep(deadline).await;
                hurry.cancel();
            });
        }
    }

    async fn carry_out(&mut self, wish: Wish) -> Answer {
        if self.ending {
            return Err(ControlError::Unreachable("the pool is stopping".into()));
        }
        self.wish_during_reload(&wish)?;
        let verb = match wish {
            Wish::Reload(reload) => return Ok(self.reload(*reload, "reload")),
            Wish::Rollback => {
                let reload = Reload::back(self.before()?);
                return Ok(self.reload(reload, "rollback"));
            }
            Wish::Shutdown { drain } => {
                self.ending = true;
                self.command_all(Command::Drain { deadline: drain, on_deadline: OnDeadline::Force }).await;
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
                let (deadline, on_deadline) = (self.made.spec.drain_deadline, OnDeadline::Force);
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
                let deadline = o.deadline.unwrap_or(self.made.spec.drain_deadline);
                let on_deadline = o.on_deadline.unwrap_or(self.made.spec.on_deadline);
                self.drain_all(deadline, on_deadline).await;
                self.hold.set(true);
                "drain"
            }
            Wish::Stop => {
                self.drain_all(Duration::ZERO, OnDeadline::Force).await;
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
                if draining || self.made.spec.activation == Activation::Preload {
                    self.command_all(Command::Start).await;
                }
                return Ok(self.ended_operation("resume", "resumed"));
            }
            Wish::ResetBreaker => {
                self.command_all(Command::ResetBreaker).await;
                return Ok(self.ended_beside("breaker_reset", "reset"));
            }
        };
        Ok(self.begin_operation(verb))
    }

    fn wish_during_reload(&mut self, wish: &Wish) -> Result<(), ControlError> {
        if self.running.is_none() {
            return Ok(());
        }
        match wish {
            Wish::Preload | Wish::Resume => Err(ControlError::Conflict("the pool is being reloaded".into())),
            Wish::Demand => Err(ControlError::unready("it is being reloaded")),
            Wish::Drain(_) => {
                self.give_up_reload("a drain was asked for");
                Ok(())
            }
            Wish::Stop => {
                self.give_up_reload("a stop was asked for");
                Ok(())
            }
            Wish::Shutdown { .. } | Wish::Leave | Wish::Remove => {
                self.drop_reload();
                Ok(())
            }
            Wish::Reload(_) | Wish::Rollback | Wish::ResetBreaker | Wish::GiveWay(_) | Wish::ComeBack(_) => Ok(()),
        }
    }

    fn tell(&self, kind: EventKind) {
        if let Some(member) = self.serving().next() {
            let generation = member.published.borrow().snapshot.generation;
            self.node.events.send(&member.key, generation, kind);
        }
    }
}
