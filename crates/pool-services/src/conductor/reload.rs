//! Carries out a reload: the plan says what comes next, drivers are commanded, and what they publish says how it went.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lifecycle::{Command, OnDeadline, State, Wait};
use pool_domain::rollout::{Incumbent, Next, Outcome, Rollout, Step, Strategy, plan};
use pool_domain::{Failure, FailureClass, ReplicaId, Tick};
use tokio::sync::{oneshot, watch};

use super::{Conductor, Member};
use crate::control::{ControlError, Operation, OperationState};
use crate::declared::{Source, Standing};
use crate::driver::{DriverCommand, Published};
use crate::events::EventKind;
use crate::node::{Birth, Node};
use crate::planning::{self, Surroundings};
#[cfg(feature = "planted-bugs")]
use crate::planted::Bug;
use crate::roster::Roster;
use crate::spec::{Activation, PoolSpec};

/// What a pool is made from, with the words in which it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) spec: Arc<PoolSpec>,
    pub(crate) document: String,
}

/// A wish for another spec.
#[derive(Debug, Clone)]
pub(crate) struct Reload {
    pub(crate) to: Made,
    /// Who declares it from then on, where that changes.
    pub(crate) source: Option<Source>,
    /// Unset: what the new spec says.
    pub(crate) strategy: Option<Strategy>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) on_deadline: Option<OnDeadline>,
}

impl Reload {
    /// To what was before.
    pub(super) fn back(to: Made) -> Self {
        Self { to, source: None, strategy: None, deadline: None, on_deadline: None }
    }
}

/// How a replica stood before the reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Was {
    Ready,
    /// It was to run, and did not.
    Trying,
    Rest,
}

impl Was {
    fn of(state: &State) -> Self {
        match state {
            State::Ready { .. } => Self::Ready,
            State::Idle | State::Failed { .. } | State::Fenced { .. } => Self::Rest,
            _ => Self::Trying,
        }
    }
}

/// What a step that takes time found.
type Verdict = Result<Option<Strategy>, String>;

/// A reload that is being carried out.
#[derive(Debug)]
pub(crate) struct Running {
    rollout: Rollout,
    operation: String,
    reload: Reload,
    were: BTreeMap<ReplicaId, Was>,
    asleep: bool,
    /// Whether the step that is next was begun.
    begun: bool,
    /// When it is given up if it is not committed by then; for drains, when they end.
    deadline: Tick,
    on_deadline: OnDeadline,
    /// Set while a step runs that no driver tells of.
    work: Option<oneshot::Receiver<Verdict>>,
}

/// What a pool had before its last reload, and how long a failure brings that back.
#[derive(Debug)]
pub(crate) struct Probation {
    until: Tick,
    /// Restarts counted when it began.
    restarts: u64,
}

enum Look {
    Pending,
    Done,
    Failed(String),
}

impl Conductor {
    /// Resolves with what a step found that no driver tells of.
    pub(super) async fn verdict(running: &mut Option<Running>) -> Verdict {
        let Some(running) = running else { return std::future::pending().await };
        let verdict = match &mut running.work {
            Some(work) => work.await.unwrap_or_else(|_| Err("the work of a step was lost".into())),
            None => return std::future::pending().await,
        };
        running.work = None;
        verdict
    }

    /// When the reload under way is given up, if nothing is committed by then.
    pub(super) fn reload_deadline(&self) -> Option<Tick> {
        let running = self.running.as_ref()?;
        let counts = matches!(running.rollout.next(), Next::Do(_)) && !running.rollout.committed();
        // What is forced has ended by then; the new one has the time of a start, and does not wait for memory for ever.
        let start = match running.on_deadline {
            OnDeadline::Abort => Duration::ZERO,
            OnDeadline::Force => running.reload.to.spec.policy.start.max,
        };
        counts.then(|| running.deadline + start)
    }

    /// Time is up: the old engines serve on.
    pub(super) fn reload_is_late(&mut self) {
        if let Some(running) = &mut self.running {
            running.rollout.give_up("it was not done by its deadline");
            (running.begun, running.work) = (false, None);
        }
    }

    /// Takes in the wish for a reload.
    pub(super) fn reload(&mut self, reload: Reload, verb: &str) -> Operation {
        let operation = self.begin_operation(verb);
        self.begin_reload(reload, operation.id.clone());
        let now = self.facts.borrow().operations.iter().find(|o| o.id == operation.id).cloned();
        now.unwrap_or(operation)
    }

    /// A new engine that fails within its probation gives way to the old one.
    pub(super) async fn heed_probation(&mut self) {
        let Some(to) = self.fails_probation() else { return };
        let operation = self.begin_operation("rollback");
        tracing::warn!(pool_id = %self.made.spec.id, "rolling back: it failed within its probation");
        self.begin_reload(Reload::back(to), operation.id);
        self.advance(None).await;
    }

    /// Begins a reload, or puts it after the one that is under way, which is given up.
    fn begin_reload(&mut self, reload: Reload, operation: String) {
        if let Some(running) = &mut self.running {
            running.rollout.give_up("a newer one is wanted");
            running.begun = false;
            running.work = None;
            if let Some((_, earlier)) = self.queued.replace((reload, operation)) {
                self.end_operation(&earlier, OperationState::Failed("superseded by a newer reload".into()));
            }
            return;
        }
        // Other words, or another who says them, are written down with the next change.
        if *reload.to.spec == *self.made.spec {
            self.source = reload.source.unwrap_or_else(|| self.source.clone());
            self.show();
            self.end_operation(&operation, OperationState::Succeeded(crate::execute::UNCHANGED.into()));
            return;
        }
        let held = self.hold.held();
        let was = |m: &Member| {
            let published = m.published.borrow();
            // Its picture is older than a command that it has; without a hold that is one to run.
            if published.verbs != m.sent && !held { Was::Trying } else { Was::of(&published.state) }
        };
        let were: BTreeMap<_, _> = self.serving().map(|m| (m.key.replica, was(m))).collect();
        if held && were.values().any(|w| *w != Was::Rest) {
            let why = "it is being drained: wait until it rests, or resume it first";
            return self.end_operation(&operation, OperationState::Failed(why.into()));
        }
        let failed = |m: &Member| matches!(m.published.borrow().state, State::Failed { .. });
        let rests = were.values().all(|w| *w == Was::Rest) && !self.serving().any(failed);
        let asleep = held || rests && reload.to.spec.activation == Activation::OnDemand;
        self.tell(EventKind::ReloadStarted);
        let policy = &reload.to.spec.reload;
        let (deadline, on_deadline) =
            (reload.deadline.unwrap_or(policy.deadline), reload.on_deadline.unwrap_or(policy.on_deadline));
        self.running = Some(Running {
            rollout: Rollout::new(vec![Step::Verify]),
            operation,
            reload,
            were,
            asleep,
            begun: false,
            deadline: self.node.clock.now() + deadline,
            on_deadline,
            work: None,
        });
    }

    /// Gives up a reload that is not committed yet, and leaves the pool at rest: something else is wanted of it.
    pub(super) fn give_up_reload(&mut self, why: &str) {
        if let Some(running) = &mut self.running {
            running.rollout.give_up(why);
            (running.begun, running.work) = (false, None);
            running.were.values_mut().for_each(|w| *w = Was::Rest);
        }
        if let Some((_, operation)) = self.queued.take() {
            self.end_operation(&operation, OperationState::Failed(why.to_owned()));
        }
    }

    /// The pool ends: nobody carries on with a reload.
    pub(super) fn drop_reload(&mut self) {
        self.give_up_reload("the pool is ending");
        if let Some(running) = self.running.take() {
            self.end_operation(&running.operation, OperationState::Failed("the pool is ending".into()));
        }
    }

    /// Goes on as far as it can now. `found`: what the step under way found.
    pub(super) async fn advance(&mut self, mut found: Option<Verdict>) {
        while let Some(mut running) = self.running.take() {
            let look = match running.rollout.next() {
                Next::End(outcome) => {
                    let outcome = outcome.clone();
                    self.end_reload(&running, &outcome);
                    continue;
                }
                Next::Do(step) => {
                    let step = step.clone();
                    if !std::mem::replace(&mut running.begun, true) {
                        self.begin(&mut running, &step).await;
                    }
                    self.look(&mut running, &step, found.take())
                }
                Next::Undo(step) => {
                    let step = step.clone();
                    if !std::mem::replace(&mut running.begun, true) {
                        self.begin_undo(&mut running, &step).await;
                    }
                    self.look_undone(&running, &step, found.take())
                }
            };
            match look {
                Look::Pending => {
                    self.set_progress(&running.operation, running.rollout.progress());
                    self.running = Some(running);
                    return;
                }
                Look::Done => running.rollout.done(),
                Look::Failed(why) => running.rollout.failed(why),
            }
            running.begun = false;
            self.running = Some(running);
        }
    }

    async fn begin(&mut self, running: &mut Running, step: &Step) {
        let reload = &running.reload;
        match step {
            Step::Verify => {
                let serving = self.serving().count();
                let strategy = reload.strategy.unwrap_or(reload.to.spec.reload.strategy);
                running.work = Some(verify(&self.node, Arc::clone(&reload.to.spec), strategy, running.asleep, serving));
            }
            Step::Stop(ids) => {
                let deadline = running.deadline.since(self.node.clock.now());
                self.command(ids, Command::Drain { deadline, on_deadline: running.on_deadline }).await;
            }
            Step::Change(ids) => {
                let spec = Arc::clone(&reload.to.spec);
                // What the old earned is not held against the new.
                self.respec(ids, &spec).await;
                self.command(ids, Command::ResetBreaker).await;
            }
            Step::Add(new) => {
                for (id, place) in new {
                    let (spec, bell, desk, hold) = (&reload.to.spec, &self.bell, &self.desk, self.hold.held());
                    let birth = Birth { spec, id: *id, place: *place, bell, desk, serves: false, found: None, hold };
                    let member = self.node.replica(birth).await;
                    self.members.push(member);
                }
                self.show();
            }
            Step::Start(ids) => self.command(ids, Command::Start).await,
            Step::Commit => {
                let standing = Standing {
                    revision: self.revision + 1,
                    document: reload.to.document.clone(),
                    source: reload.source.clone().unwrap_or_else(|| self.source.clone()),
                    previous: Some(self.made.clone()),
                };
                // What the file says is not written down a second time.
                let from_file = matches!(reload.source, Some(Source::File { .. }));
                running.work = Some(self.store(&standing, from_file, false));
            }
            Step::Flip { to, from } => {
                for member in &mut self.members {
                    member.serves =
                        member.serves && !from.contains(&member.key.replica) || to.contains(&member.key.replica);
                }
                self.show();
            }
            Step::Retire(ids) => {
                let deadline = self.made.spec.drain_deadline;
                #[cfg(feature = "planted-bugs")]
                let deadline = if self.planted(Bug::CutsLeases) { Duration::ZERO } else { deadline };
                self.command(ids, Command::Drain { deadline, on_deadline: OnDeadline::Force }).await;
            }
        }
    }

    async fn begin_undo(&mut self, running: &mut Running, step: &Step) {
        match step {
            Step::Verify | Step::Flip { .. } | Step::Retire(_) => {}
            Step::Stop(ids) => {
                for id in ids {
                    if running.were.get(id).is_some_and(|was| *was != Was::Rest) {
                        self.command(&[*id], Command::Resume).await;
                        self.command(&[*id], Command::Start).await;
                    }
                }
            }
            Step::Change(ids) => {
                let spec = Arc::clone(&self.made.spec);
                self.respec(ids, &spec).await;
                self.command(ids, Command::ResetBreaker).await;
            }
            Step::Add(new) => {
                self.members.retain(|m| new.iter().all(|(id, _)| *id != m.key.replica));
                self.show();
            }
            Step::Start(ids) => {
                let stop = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };
                self.command(ids, stop).await;
            }
            // Whether it was written is not known.
            Step::Commit => running.work = Some(self.store(&self.standing(), false, true)),
        }
    }

    fn look(&mut self, running: &mut Running, step: &Step, found: Option<Verdict>) -> Look {
        match step {
            Step::Verify => match found {
                None => Look::Pending,
                Some(Err(why)) => Look::Failed(why),
                Some(Ok(strategy)) => {
                    let old: Vec<Incumbent> =
                        self.serving().map(|m| Incumbent { id: m.key.replica, place: m.place }).collect();
                    let strategy = strategy.unwrap_or_default();
                    let steps = plan(strategy, &old, running.reload.to.spec.replicas, running.asleep);
                    running.rollout = Rollout::new(steps);
                    Look::Done
                }
            },
            Step::Commit => {
                let look = waited(found);
                #[cfg(feature = "planted-bugs")]
                let look = match look {
                    Look::Failed(_) if self.planted(Bug::CommitsUnwritten) => Look::Done,
                    look => look,
                };
                if matches!(look, Look::Done) {
                    self.take_up(&running.reload);
                }
                look
            }
            Step::Change(_) | Step::Add(_) | Step::Flip { .. } => Look::Done,
            Step::Stop(ids) => self.over(ids, |seen| {
                if seen.iter().all(|p| matches!(p.state, State::Idle | State::Failed { .. })) {
                    Look::Done
                } else if seen.iter().any(|p| matches!(p.state, State::Fenced { .. })) {
                    Look::Failed("something of the old engine may be left".into())
                } else if seen.iter().any(|p| p.state.ready()) {
                    Look::Failed("leases were still held at the deadline".into())
                } else {
                    Look::Pending
                }
            }),
            Step::Start(ids) => self.over(ids, |seen| match seen.iter().find_map(failed) {
                Some(why) => Look::Failed(why),
                None if seen.iter().all(|p| p.state.ready()) => Look::Done,
                None => Look::Pending,
            }),
            Step::Retire(ids) => {
                let look = self.over(ids, |seen| match seen.iter().all(|p| p.state.at_rest()) {
                    true => Look::Done,
                    false => Look::Pending,
                });
                if matches!(look, Look::Done) {
                    // One that is fenced stays until nothing of it is left.
                    self.let_go();
                }
                look
            }
        }
    }

    fn look_undone(&self, running: &Running, step: &Step, found: Option<Verdict>) -> Look {
        match step {
            Step::Verify | Step::Change(_) | Step::Add(_) | Step::Flip { .. } | Step::Retire(_) => Look::Done,
            Step::Commit => match found {
                None => Look::Pending,
                Some(written) => {
                    // What stood there stands still, unless the disk lost its answer; it is tried again until it does.
                    if let Err(why) = written {
                        tracing::error!(pool_id = %self.made.spec.id, %why, "that the reload was undone is not written down yet");
                    }
                    Look::Done
                }
            },
            Step::Start(ids) => self.over(ids, |seen| {
                if seen.iter().any(|p| matches!(p.state, State::Fenced { .. })) {
                    Look::Failed("something of the new engine may be left".into())
                } else if seen.iter().all(|p| p.state.at_rest()) {
                    Look::Done
                } else {
                    Look::Pending
                }
            }),
            Step::Stop(ids) => {
                let ready = ids.iter().filter(|id| running.were.get(*id) == Some(&Was::Ready)).copied();
                self.over(&ready.collect::<Vec<_>>(), |seen| match seen.iter().find_map(failed) {
                    Some(why) => Look::Failed(why),
                    None if seen.iter().all(|p| p.state.ready()) => Look::Done,
                    None => Look::Pending,
                })
            }
        }
    }

    /// Judges replicas once they have taken in what they were told.
    fn over(&self, ids: &[ReplicaId], judge: impl FnOnce(&[Published]) -> Look) -> Look {
        let members: Vec<&Member> = self.members.iter().filter(|m| ids.contains(&m.key.replica)).collect();
        let published: Vec<_> = members.iter().map(|m| m.published.borrow().clone()).collect();
        if members.iter().zip(&published).any(|(m, p)| p.verbs != m.sent) {
            return Look::Pending;
        }
        judge(&published)
    }

    async fn command(&mut self, ids: &[ReplicaId], command: Command) {
        for member in self.members.iter_mut().filter(|m| ids.contains(&m.key.replica)) {
            member.command(command).await;
        }
    }

    async fn respec(&mut self, ids: &[ReplicaId], spec: &Arc<PoolSpec>) {
        for member in self.members.iter().filter(|m| ids.contains(&m.key.replica)) {
            let _ended = member.commands.send(DriverCommand::Respec(Arc::clone(spec))).await;
        }
    }

    pub(super) fn serving(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|m| m.serves)
    }

    /// Tells who belongs to the pool now.
    pub(super) fn show(&self) {
        let seats = self.members.iter().map(Member::seat).collect();
        let (spec, standing) = (Arc::clone(&self.made.spec), Arc::new(self.standing()));
        self.roster.send_replace(Arc::new(Roster { spec, standing, seats }));
        self.node.bell.notify_one();
    }

    /// Forgets those that have left and of which nothing is left.
    pub(super) fn let_go(&mut self) {
        let kept = |m: &Member| m.serves || !matches!(m.published.borrow().state, State::Idle | State::Failed { .. });
        if self.members.iter().all(kept) {
            return;
        }
        self.members.retain(kept);
        self.show();
    }

    /// The new spec is the pool's.
    fn take_up(&mut self, reload: &Reload) {
        self.previous = Some(std::mem::replace(&mut self.made, reload.to.clone()));
        if let Some(source) = &reload.source {
            self.source = source.clone();
        }
        self.revision += 1;
        let probation = self.made.spec.reload.probation;
        let restarts = self.members.iter().map(|m| m.published.borrow().snapshot.restart_count).max().unwrap_or(0);
        self.probation =
            (!probation.is_zero()).then(|| Probation { until: self.node.clock.now() + probation, restarts });
        self.show();
    }

    pub(super) fn standing(&self) -> Standing {
        Standing {
            revision: self.revision,
            document: self.made.document.clone(),
            source: self.source.clone(),
            previous: self.previous.clone(),
        }
    }

    /// Writes down what a later daemon starts from. Without words for it, whoever embeds this keeps it.
    fn store(&self, standing: &Standing, from_file: bool, until_written: bool) -> oneshot::Receiver<Verdict> {
        let (tell, told) = oneshot::channel();
        let words = (!standing.document.is_empty()).then(|| standing.stored(&self.made.spec.id));
        let text = words.map(|stored| (!from_file).then_some(stored));
        let written = text.map(|text| self.paper.write(text, until_written));
        tokio::spawn(async move {
            let verdict = match written {
                None => Ok(None),
                Some(written) => match written.await {
                    Ok(written) => written.map(|()| None).map_err(|e| format!("{e}: {}", e.source)),
                    Err(_) => Err("nobody writes any more".into()),
                },
            };
            let _ = tell.send(verdict);
        });
        told
    }

    fn end_reload(&mut self, running: &Running, outcome: &Outcome) {
        let state = match outcome {
            Outcome::New => {
                self.tell(EventKind::Reloaded);
                OperationState::Succeeded("reloaded".into())
            }
            Outcome::Old { why } => {
                self.tell(EventKind::ReloadUndone { why: why.clone() });
                OperationState::Failed(format!("{why}; the pool is as it was"))
            }
            Outcome::Broken { why, undo } => {
                let words = format!("the reload failed: {why}; and so did the way back: {undo}");
                tracing::error!(pool_id = %self.made.spec.id, "{words}");
                self.tell(EventKind::ReloadBroken);
                self.break_down(&words);
                OperationState::Failed(words)
            }
        };
        self.end_operation(&running.operation, state);
        if let Some((reload, operation)) = self.queued.take() {
            self.begin_reload(reload, operation);
        }
    }

    /// Nothing is tried again by itself; what serves goes on serving.
    fn break_down(&mut self, words: &str) {
        for member in &self.members {
            let failure = Failure::new(FailureClass::Config, words.to_owned());
            // Whoever starts it again gets what the pool says that it is.
            let _full = member.commands.try_send(DriverCommand::Respec(Arc::clone(&self.made.spec)));
            let _full = member.commands.try_send(DriverCommand::GiveUp(failure));
        }
        self.let_go();
    }

    /// Whether the new engine fails before its probation is over. Ends the probation.
    pub(super) fn fails_probation(&mut self) -> Option<Made> {
        let probation = self.probation.as_ref().filter(|_| self.running.is_none())?;
        if self.node.clock.now() >= probation.until {
            self.probation = None;
            return None;
        }
        let fails = |m: &Member| {
            let published = m.published.borrow();
            failed(&published).is_some() || published.snapshot.restart_count > probation.restarts
        };
        let fails = self.serving().any(fails);
        fails.then(|| self.probation = None)?;
        self.previous.clone()
    }

    #[cfg(feature = "planted-bugs")]
    fn planted(&self, bug: Bug) -> bool {
        self.node.ports.bug == Some(bug)
    }

    /// What `rollback` returns to.
    pub(super) fn before(&self) -> Result<Made, ControlError> {
        self.previous.clone().ok_or_else(|| ControlError::Conflict("the pool was never reloaded".into()))
    }
}

fn waited(found: Option<Verdict>) -> Look {
    match found {
        None => Look::Pending,
        Some(Ok(_)) => Look::Done,
        Some(Err(why)) => Look::Failed(why),
    }
}

/// Why a start is not going to succeed; memory and devices are waited for.
fn failed(published: &Published) -> Option<String> {
    let last = || published.snapshot.last_error.as_ref().map(|e| format!("{}: {}", e.class.code(), e.detail));
    match &published.state {
        State::Failed { failure, .. } => Some(failure.to_string()),
        State::Waiting { why: why @ (Wait::Backoff { .. } | Wait::Breaker { .. }), .. } => {
            Some(last().unwrap_or_else(|| why.to_string()))
        }
        _ => None,
    }
}

/// Looks whether the new one can run here, without touching the old, and in which way it can take its place.
fn verify(
    node: &Node,
    spec: Arc<PoolSpec>,
    strategy: Strategy,
    asleep: bool,
    serving: usize,
) -> oneshot::Receiver<Verdict> {
    let (tell, told) = oneshot::channel();
    let node = node.clone();
    tokio::spawn(async move {
        let verdict = async {
            node.ports.provisioner.preflight(&spec).await.map_err(|failure| failure.detail)?;
            let beside = fits(&node, &spec, false).await?;
            match strategy {
                _ if asleep => Ok(Some(Strategy::InPlace)),
                Strategy::Overlap if beside.is_err() => {
                    Err(format!("it does not fit beside the old one: {}", beside.err().unwrap_or_default()))
                }
                Strategy::Overlap => Ok(Some(Strategy::Overlap)),
                Strategy::Auto if beside.is_ok() => Ok(Some(Strategy::Overlap)),
                other => {
                    // With the old one gone.
                    fits(&node, &spec, true).await??;
                    let gentle = if serving > 1 { Strategy::Rolling } else { Strategy::InPlace };
                    Ok(Some(if other == Strategy::Auto { gentle } else { other }))
                }
            }
        };
        // Nobody waits any more if the reload was given up.
        let _ = tell.send(verdict.await);
    });
    told
}

/// Whether the pool fits beside all that runs, or `alone`: without what it holds itself.
async fn fits(node: &Node, spec: &PoolSpec, alone: bool) -> Result<Result<(), String>, String> {
    planning::permitted(spec, &*node.ports.models).map_err(|e| e.to_string())?;
    // A model that has to be fetched is, before anything is touched.
    let (untold, _) = watch::channel(None);
    node.ports.models.ensure_present(&spec.model, &untold).await.map_err(|f| f.detail)?;
    let (devices, promised) = node.view.devices_without(alone.then_some(&spec.id));
    let from = Surroundings {
        models: &*node.ports.models,
        provisioner: &*node.ports.provisioner,
        ledger: Some(&*node.ports.ledger),
        devices: &devices,
        promised: &promised,
    };
    let report = planning::report(spec, from).await.map_err(|e| e.to_string())?;
    if !report.engine_problem.is_empty() {
        return Err(report.engine_problem);
    }
    Ok(if report.fits { Ok(()) } else { Err(report.reason) })
}
