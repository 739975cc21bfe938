//! Carries out a reload: the plan says what comes next, drivers are commanded, and what they publish says how it went.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::lifecycle::{Command, OnDeadline, State, Then, Wait};
use pool_domain::rollout::{Incumbent, Next, Outcome, Rollout, Step, Strategy, plan, time_to_start};
use pool_domain::{Failure, FailureClass, ReplicaId, ResolvedMask, Tick};
use tokio::sync::oneshot;

use super::verify::verify;
use super::{Conductor, Member, points};
use crate::control::{ControlError, Operation, OperationState};
use crate::declared::{Source, Standing};
use crate::driver::{DriverCommand, Published};
use crate::events::EventKind;
use crate::node::Birth;
#[cfg(feature = "planted-bugs")]
use crate::planted::Bug;
use crate::ports::StoredPool;
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
    /// To what was before: on probation that would end where it came from, and so on for ever.
    pub(crate) back: bool,
}

impl Reload {
    /// To what was before.
    pub(super) fn back(to: Made) -> Self {
        Self { to, source: None, strategy: None, deadline: None, on_deadline: None, back: true }
    }

    fn has_words(&self) -> bool {
        !self.to.document.is_empty()
    }

    fn says_the_file(&self) -> bool {
        matches!(self.source, Some(Source::File { .. }))
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
            // It starts as soon as nothing is left.
            State::Fenced { then: Then::Start | Then::Wait(_), .. } => Self::Trying,
            State::Idle | State::Failed { .. } | State::Fenced { .. } => Self::Rest,
            _ => Self::Trying,
        }
    }
}

/// What a step that takes time found.
pub(super) type Verdict = Result<Option<Strategy>, String>;

/// A reload that is being carried out.
#[derive(Debug)]
pub(crate) struct Running {
    rollout: Rollout,
    operation: String,
    pub(super) reload: Reload,
    were: BTreeMap<ReplicaId, Was>,
    /// Where they ran.
    homes: BTreeMap<ReplicaId, ResolvedMask>,
    asleep: bool,
    /// Whether the step that is next was begun.
    begun: bool,
    /// When it is given up if it is not committed by then; for drains, when they end.
    deadline: Tick,
    on_deadline: OnDeadline,
    /// When the undo that is under way has to be done.
    undo_by: Option<Tick>,
    /// The replicas that are made from the new spec.
    pub(super) new: BTreeSet<ReplicaId>,
    /// How the pool stands once it is committed; from the commit on.
    standing: Option<Standing>,
    /// Set while a step runs that no driver tells of.
    work: Option<oneshot::Receiver<Verdict>>,
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

    /// When the reload under way is given up, if nothing is committed by then; of an undo, when it has failed.
    pub(super) fn reload_deadline(&self) -> Option<Tick> {
        let running = self.running.as_ref()?;
        match running.rollout.next() {
            Next::Do(_) if !running.rollout.committed() => {}
            Next::Undo(_) => return running.undo_by,
            Next::Do(_) | Next::End(_) => return None,
        }
        let spec = &running.reload.to.spec;
        // What is forced has ended by then; the new ones have the time of their starts, and do not wait for memory for ever.
        let starts = match running.on_deadline {
            OnDeadline::Abort => Duration::ZERO,
            OnDeadline::Force => time_to_start(&spec.policy, spec.replicas.into()),
        };
        Some(running.deadline + starts)
    }

    /// Time is up: the old engines serve on, or the way back has failed, too.
    pub(super) fn reload_is_late(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        match running.rollout.next() {
            Next::Do(_) | Next::End(_) => running.rollout.give_up("it was not done by its deadline"),
            // What stands is what stood before, and is written until the disk takes it.
            Next::Undo(Step::Commit) => {
                tracing::error!(pool_id = %self.made.spec.id, "the disk does not say whether it took that the reload was undone");
                running.rollout.done();
            }
            Next::Undo(step) => {
                let why = self.unfinished(step);
                running.rollout.failed(why);
            }
        }
        (running.begun, running.work) = (false, None);
        self.running = Some(running);
    }

    /// What an undo that takes too long waits for.
    fn unfinished(&self, step: &Step) -> String {
        let ids = match step {
            Step::Stop(ids) | Step::Start(ids) => ids.as_slice(),
            _ => &[],
        };
        let members = self.members.iter().filter(|m| ids.contains(&m.key.replica));
        let each = |m: &Member| {
            let published = m.published.borrow();
            let (state, reason) = (published.state.code(), &published.snapshot.reason);
            let told = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
            (!published.state.ready()).then(|| format!("{} is {state}{told}", m.key.replica))
        };
        let waits: Vec<_> = members.filter_map(each).collect();
        format!("it was not done in time: {}", waits.join(", "))
    }

    /// Takes in the wish for a reload.
    pub(super) fn reload(&mut self, reload: Reload, verb: &str) -> Operation {
        let operation = self.begin_operation(verb);
        self.begin_reload(reload, operation.id.clone());
        let now = self.facts.borrow().operations.iter().find(|o| o.id == operation.id).cloned();
        now.unwrap_or(operation)
    }

    /// Begins a reload, or puts it after the one that is under way, which is given up.
    pub(super) fn begin_reload(&mut self, reload: Reload, operation: String) {
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
        let home = |m: &Member| {
            let mask = m.published.borrow().snapshot.device_mask.clone();
            (!mask.is_empty()).then(|| ResolvedMask { uuids: mask.split(',').map(str::to_owned).collect() })
        };
        let homes = self.serving().filter_map(|m| Some((m.key.replica, home(m)?))).collect();
        self.tell(EventKind::ReloadStarted);
        let policy = &reload.to.spec.reload;
        let (deadline, on_deadline) =
            (reload.deadline.unwrap_or(policy.deadline), reload.on_deadline.unwrap_or(policy.on_deadline));
        self.running = Some(Running {
            rollout: Rollout::new(vec![Step::Verify]),
            operation,
            reload,
            were,
            homes,
            asleep,
            begun: false,
            deadline: self.node.clock.now() + deadline,
            on_deadline,
            undo_by: None,
            new: BTreeSet::new(),
            standing: None,
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
                    let look = self.look(&mut running, &step, found.take());
                    match look {
                        Look::Done => reached(points::done(&step)),
                        Look::Failed(_) if !running.rollout.committed() => reached(Point::UndoBegun),
                        Look::Failed(_) | Look::Pending => {}
                    }
                    look
                }
                Next::Undo(step) => {
                    let step = step.clone();
                    if !std::mem::replace(&mut running.begun, true) {
                        let policy = &running.reload.to.spec.policy;
                        let old = &self.made.spec.policy;
                        let policy = if matches!(step, Step::Stop(_)) { old } else { policy };
                        running.undo_by = step.time_to_undo(policy).map(|limit| self.node.clock.now() + limit);
                        self.begin_undo(&mut running, &step).await;
                    }
                    let look = self.look_undone(&running, &step, found.take());
                    if let (Look::Done, Some(point)) = (&look, points::undone(&step)) {
                        reached(point);
                    }
                    look
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
                running.new.extend(ids);
                let spec = Arc::clone(&reload.to.spec);
                // What the old earned is not held against the new.
                self.respec(ids, &spec).await;
                self.command(ids, Command::ResetBreaker).await;
            }
            Step::Add(new) => {
                running.new.extend(new.iter().map(|(id, _)| *id));
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
                reached(Point::BeforeCommit);
                let standing = Standing {
                    revision: self.revision + 1,
                    document: reload.to.document.clone(),
                    source: reload.source.clone().unwrap_or_else(|| self.source.clone()),
                    previous: Some(self.made.clone()),
                    probation: self.probation_of(running),
                };
                // Without words for it, whoever embeds this keeps it. What the file says is not written down a second time.
                let text = (!reload.says_the_file()).then(|| standing.stored(&self.made.spec.id));
                running.work = Some(if reload.has_words() { self.write_down(text, false) } else { kept_elsewhere() });
                running.standing = Some(standing);
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
                        if let Some(home) = running.homes.get(id) {
                            self.each(&[*id], || DriverCommand::GoHome(home.clone())).await;
                        }
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
            // One that is fenced stays until nothing of it is left.
            Step::Add(_) => self.let_go(),
            Step::Start(ids) => {
                let stop = Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force };
                self.command(ids, stop).await;
            }
            // Whether it was written is not known.
            Step::Commit if running.reload.has_words() => {
                let text = self.stored.then(|| self.standing().stored(&self.made.spec.id));
                running.work = Some(self.write_down(text, true));
            }
            Step::Commit => running.work = Some(kept_elsewhere()),
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
                    let left: Vec<_> = self.members.iter().filter(|m| !m.serves).map(|m| m.key.replica).collect();
                    let steps = plan(strategy, &old, &left, running.reload.to.spec.replicas, running.asleep);
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
                    self.take_up(running);
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
            Step::Start(ids) => self.over(ids, |seen| match seen.iter().find_map(|p| failed(p).or_else(|| left(p))) {
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
            Step::Start(ids) => {
                let old = |id: &&ReplicaId| running.were.contains_key(*id);
                let (old, newcomers): (Vec<_>, Vec<_>) = ids.iter().partition(old);
                let fenced = |p: &Published| matches!(p.state, State::Fenced { .. });
                // Something of a newcomer that may be left is beside the old, which serves.
                let newcomers = self.over(&newcomers, |seen| match seen.iter().all(|p| p.state.at_rest()) {
                    true => Look::Done,
                    false => Look::Pending,
                });
                let old = self.over(&old, |seen| match seen.iter().all(|p| p.state.at_rest() && !fenced(p)) {
                    true => Look::Done,
                    false => Look::Pending,
                });
                if matches!(newcomers, Look::Done) { old } else { newcomers }
            }
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
        if let Some(lost) = members.iter().find(|m| m.published.has_changed().is_err()) {
            return Look::Failed(format!("the driver of {} has ended", lost.key.replica));
        }
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
        self.each(ids, || DriverCommand::Respec(Arc::clone(spec))).await;
    }

    async fn each(&self, ids: &[ReplicaId], command: impl Fn() -> DriverCommand) {
        for member in self.members.iter().filter(|m| ids.contains(&m.key.replica)) {
            let _ended = member.commands.send(command()).await;
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
    fn take_up(&mut self, running: &mut Running) {
        let Some(standing) = running.standing.take() else { return };
        let made = std::mem::replace(&mut self.made, running.reload.to.clone());
        (self.previous, self.source, self.revision) = (Some(made), standing.source, standing.revision);
        self.probation = standing.probation;
        if running.reload.has_words() {
            self.stored = !running.reload.says_the_file();
        }
        self.show();
    }

    pub(super) fn standing(&self) -> Standing {
        Standing {
            revision: self.revision,
            document: self.made.document.clone(),
            source: self.source.clone(),
            previous: self.previous.clone(),
            probation: self.probation.clone(),
        }
    }

    /// Writes down what a later daemon starts from; nothing where the file says it.
    fn write_down(&self, text: Option<StoredPool>, until_written: bool) -> oneshot::Receiver<Verdict> {
        let (tell, told) = oneshot::channel();
        let written = self.paper.write(text, until_written);
        tokio::spawn(async move {
            let verdict = match written.await {
                Ok(written) => written.map(|()| None).map_err(|e| format!("{e}: {}", e.source)),
                Err(_) => Err("nobody writes any more".into()),
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

    #[cfg(feature = "planted-bugs")]
    fn planted(&self, bug: Bug) -> bool {
        self.node.ports.bug == Some(bug)
    }

    /// What `rollback` returns to.
    pub(super) fn before(&self) -> Result<Made, ControlError> {
        self.previous.clone().ok_or_else(|| ControlError::Conflict("the pool was never reloaded".into()))
    }
}

fn kept_elsewhere() -> oneshot::Receiver<Verdict> {
    let (tell, told) = oneshot::channel();
    let _ = tell.send(Ok(None));
    told
}

fn waited(found: Option<Verdict>) -> Look {
    match found {
        None => Look::Pending,
        Some(Ok(_)) => Look::Done,
        Some(Err(why)) => Look::Failed(why),
    }
}

/// Why an engine failed of which something may be left.
fn left(published: &Published) -> Option<String> {
    let why = published.snapshot.last_error.as_ref().map(|e| format!("{}: {}", e.class.code(), e.detail));
    let fenced = matches!(published.state, State::Fenced { .. });
    fenced.then(|| why.unwrap_or_else(|| "something of it may be left".into()))
}

/// Why a start is not going to succeed; memory and devices are waited for.
pub(super) fn failed(published: &Published) -> Option<String> {
    let last = || published.snapshot.last_error.as_ref().map(|e| format!("{}: {}", e.class.code(), e.detail));
    match &published.state {
        State::Failed { failure, .. } => Some(failure.to_string()),
        State::Waiting { why: why @ (Wait::Backoff { .. } | Wait::Breaker { .. }), .. } => {
            Some(last().unwrap_or_else(|| why.to_string()))
        }
        _ => None,
    }
}
