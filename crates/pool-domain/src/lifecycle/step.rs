//! The transition function.

use std::time::Duration;

use super::{
    Action, Command, Event, Fact, Launch, Left, OnDeadline, Policy, Proof, Replica, State, StopStage, Then, Wait,
};
use crate::failure::Exit;
use crate::{Draw, Failure, FailureClass, Tick};

/// Ports tried at once before a conflict waits like a failure.
const PORT_TRIES: u32 = 3;

/// A driver that hangs says so again within this, or answers.
const DRIVER_PATIENCE: Duration = Duration::from_secs(30);

/// Failed checks in a row that make an engine Suspect.
const SUSPECT_AT: u32 = 2;

/// The fixed surroundings of one step.
struct Cx<'a> {
    now: Tick,
    draw: Draw,
    policy: &'a Policy,
}

impl Replica {
    /// Takes in one event and says what has to be done.
    #[must_use]
    pub fn step(&mut self, event: Event, now: Tick, draw: Draw, policy: &Policy) -> Vec<Action> {
        let cx = Cx { now, draw, policy };
        match event {
            Event::Command(c) => self.command(c, &cx),
            Event::Engine(generation, fact) if generation == self.generation => self.fact(fact, &cx),
            Event::Engine(..) => Vec::new(),
            Event::Timer => self.timer(&cx),
        }
    }

    fn command(&mut self, command: Command, cx: &Cx<'_>) -> Vec<Action> {
        match command {
            Command::Start => self.start(cx),
            Command::Wake => self.wake(cx),
            Command::Drain { deadline, on_deadline } => self.drain(deadline, on_deadline, cx),
            Command::Resume => match &self.state {
                State::Draining { .. } => self.undrain(cx),
                _ => Vec::new(),
            },
            Command::ResetBreaker => {
                self.forget();
                match &mut self.state {
                    State::Waiting { why: Wait::Backoff { .. } | Wait::Breaker { .. }, .. } => self.attempt(cx),
                    // The wait that would follow is one that was held against it.
                    State::Stopping { then, .. } | State::Fenced { then, .. }
                        if matches!(then, Then::Wait(Wait::Backoff { .. } | Wait::Breaker { .. })) =>
                    {
                        *then = Then::Start;
                        Vec::new()
                    }
                    _ => Vec::new(),
                }
            }
            Command::Unfence => match std::mem::replace(&mut self.state, State::Idle) {
                State::Fenced { then, .. } => self.go(then, cx),
                other => {
                    self.state = other;
                    Vec::new()
                }
            },
            Command::Unblocked => match &self.state {
                State::Waiting { why: Wait::Devices { .. } | Wait::Vram { .. }, .. } => self.attempt(cx),
                _ => Vec::new(),
            },
            Command::Adopt { generation, ready_since } => match &self.state {
                State::Idle if generation >= self.generation => {
                    self.generation = generation;
                    // A record cannot know the future.
                    let ready_since = ready_since.map(|since| since.min(cx.now));
                    self.state = State::Adopting { since: cx.now, ready_since };
                    vec![Action::Adopt]
                }
                _ => Vec::new(),
            },
        }
    }

    fn start(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        match &mut self.state {
            State::Idle | State::Failed { .. } => self.attempt(cx),
            State::Stopping { then, .. } | State::Fenced { then, .. } => {
                if matches!(then, Then::Idle | Then::Fail(_)) {
                    *then = Then::Start;
                }
                Vec::new()
            }
            // The last wish wins.
            State::Draining { .. } => self.undrain(cx),
            _ => Vec::new(),
        }
    }

    /// A start that nobody asked for by hand.
    fn wake(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        if let Some(why) = self.waits_for(cx.now) {
            match &mut self.state {
                State::Idle => {
                    self.state = State::Waiting { since: cx.now, why };
                    return Vec::new();
                }
                State::Stopping { then: then @ Then::Idle, .. } | State::Fenced { then: then @ Then::Idle, .. } => {
                    *then = Then::Wait(why);
                    return Vec::new();
                }
                _ => {}
            }
        }
        match &self.state {
            State::Failed { .. } | State::Draining { .. } => Vec::new(),
            _ => self.start(cx),
        }
    }

    /// Begins a start attempt if the breaker lets it.
    fn attempt(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        // No process exists here: a trial that is still on the book ended without a verdict.
        self.breaker.inconclusive(cx.now);
        if !self.breaker.admit(cx.now) {
            let until = self.breaker.open_until().unwrap_or(cx.now);
            self.state = State::Waiting { since: cx.now, why: Wait::Breaker { until } };
            return Vec::new();
        }
        self.not_before = None;
        self.generation = self.generation.next();
        self.state = State::Staging { since: cx.now };
        vec![Action::Stage]
    }

    /// An attempt because of a failure, which counts as a restart if it is made.
    fn restart(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        let actions = self.attempt(cx);
        self.restarts += u64::from(matches!(self.state, State::Staging { .. }));
        actions
    }

    fn drain(&mut self, deadline: Duration, on_deadline: OnDeadline, cx: &Cx<'_>) -> Vec<Action> {
        match &mut self.state {
            State::Idle | State::Failed { .. } => Vec::new(),
            State::Staging { .. } | State::Preparing { .. } | State::Waiting { .. } => {
                self.breaker.inconclusive(cx.now);
                self.state = State::Idle;
                vec![Action::CancelWork]
            }
            State::Stopping { then, stage, .. } => {
                *then = Then::Idle;
                // A stop under way may only be hurried.
                if let StopStage::Launching { kill_at } | StopStage::Term { kill_at } = stage {
                    *kill_at = (*kill_at).min(cx.now + deadline + cx.policy.stop.forced_grace());
                }
                self.timer(cx)
            }
            State::Fenced { then, .. } => {
                *then = Then::Idle;
                Vec::new()
            }
            State::Starting { .. } | State::Warming { .. } | State::Adopting { .. } => {
                self.breaker.inconclusive(cx.now);
                self.stop(cx.policy.stop.forced_grace(), Then::Idle, cx)
            }
            State::Ready { since, proof, .. } => {
                let (ready_since, proof) = (*since, proof.clone());
                self.begin_drain(ready_since, proof, None, cx.now + deadline, on_deadline, cx)
            }
            State::Suspect { ready_since, proof, failure, .. } => {
                let (ready_since, proof, suspect) = (*ready_since, proof.clone(), Some(failure.clone()));
                self.begin_drain(ready_since, proof, suspect, cx.now + deadline, on_deadline, cx)
            }
            // A second drain may only shorten the first, or change what happens at its end.
            State::Draining { deadline: at, on_deadline: what, .. } => {
                *at = (*at).min(cx.now + deadline);
                *what = on_deadline;
                self.timer(cx)
            }
        }
    }

    fn begin_drain(
        &mut self,
        ready_since: Tick,
        proof: Proof,
        suspect: Option<Failure>,
        deadline: Tick,
        on_deadline: OnDeadline,
        cx: &Cx<'_>,
    ) -> Vec<Action> {
        self.state = State::Draining { since: cx.now, ready_since, proof, deadline, on_deadline, suspect };
        // Whoever counts leases answers with LeasesDone, at once if there are none.
        let mut actions = vec![Action::CloseAdmission];
        actions.extend(self.timer(cx));
        actions
    }

    fn undrain(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        let State::Draining { ready_since, proof, suspect, .. } = &self.state else { return Vec::new() };
        let (ready_since, proof) = (*ready_since, proof.clone());
        match suspect.clone() {
            None => {
                self.credit(cx.now.since(ready_since), cx);
                self.state = State::Ready { since: ready_since, proof, misses: 0 };
                vec![Action::OpenAdmission, Action::WatchHealth]
            }
            Some(failure) => {
                self.state = State::Suspect { since: cx.now, ready_since, proof, misses: SUSPECT_AT, failure };
                vec![Action::WatchHealth]
            }
        }
    }

    /// An engine that was Ready is being ended because somebody wants it so: what it earned until now counts.
    fn end_drained(&mut self, kill_by: Tick, cx: &Cx<'_>) -> Vec<Action> {
        let State::Draining { ready_since, .. } = self.state else { return Vec::new() };
        self.credit(cx.now.since(ready_since), cx);
        self.breaker.inconclusive(cx.now);
        self.stop(kill_by.since(cx.now), Then::Idle, cx)
    }

    /// Time Ready heals: first the breaker's trial, in the end everything that was held against it.
    fn credit(&mut self, ready_for: Duration, cx: &Cx<'_>) {
        self.breaker.proved(&cx.policy.breaker, ready_for);
        if ready_for >= cx.policy.backoff.reset_after() {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.backoff.reset();
        self.held_up.reset();
        self.breaker.reset();
        self.not_before = None;
    }

    fn fact(&mut self, fact: Fact, cx: &Cx<'_>) -> Vec<Action> {
        match fact {
            Fact::Staged => match self.state {
                State::Staging { .. } => {
                    self.state = State::Preparing { since: cx.now };
                    vec![Action::Prepare]
                }
                _ => Vec::new(),
            },
            Fact::Prepared => match self.state {
                State::Preparing { .. } => {
                    let (stall_at, max_at) = (cx.now + cx.policy.start.stall, cx.now + cx.policy.start.max);
                    self.state = State::Starting { since: cx.now, launch: Launch::Asked, stall_at, max_at };
                    vec![Action::Launch]
                }
                _ => Vec::new(),
            },
            Fact::Blocked(why) => match self.state {
                State::Preparing { .. } => {
                    self.breaker.inconclusive(cx.now);
                    self.state = State::Waiting { since: cx.now, why };
                    vec![Action::CancelWork]
                }
                // It waits on, for another reason.
                State::Waiting { why: Wait::Devices { .. } | Wait::Vram { .. }, since } => {
                    self.state = State::Waiting { since, why };
                    Vec::new()
                }
                _ => Vec::new(),
            },
            Fact::Unstartable(failure) => match self.state {
                State::Staging { .. } | State::Preparing { .. } => {
                    let then = self.failed_start(failure, cx);
                    self.go(then, cx)
                }
                _ => Vec::new(),
            },
            Fact::Launched => self.launched(cx),
            Fact::LaunchFailed(failure) => match &self.state {
                State::Starting { launch: Launch::Asked, .. } => {
                    let then = self.failed_start(failure, cx);
                    self.go(then, cx)
                }
                State::Stopping { stage: StopStage::Launching { .. }, then, .. } => {
                    let then = then.clone();
                    self.go(then, cx)
                }
                _ => Vec::new(),
            },
            Fact::Progress => {
                if let State::Starting { stall_at, .. } | State::Warming { stall_at, .. } = &mut self.state {
                    *stall_at = (*stall_at).max(cx.now + cx.policy.start.stall);
                }
                Vec::new()
            }
            // It is not what hangs.
            Fact::Unprovable => {
                if let State::Warming { stall_at, max_at, .. } = &mut self.state {
                    let until = cx.now + DRIVER_PATIENCE;
                    (*stall_at, *max_at) = ((*stall_at).max(until), (*max_at).max(until));
                }
                Vec::new()
            }
            Fact::Serving => match self.state {
                State::Starting { launch: Launch::Running, max_at, .. } => {
                    self.state = State::Warming { since: cx.now, stall_at: cx.now + cx.policy.start.stall, max_at };
                    vec![Action::Prove]
                }
                _ => Vec::new(),
            },
            Fact::Proved(proof) => match self.state {
                State::Warming { .. } => self.become_ready(proof, cx.now),
                _ => Vec::new(),
            },
            Fact::Unproved(failure) => match self.state {
                State::Warming { .. } => self.end_failed(failure, false, cx),
                State::Adopting { .. } => self.end_failed(failure, true, cx),
                _ => Vec::new(),
            },
            Fact::Healthy => self.healthy(cx),
            Fact::Missed(failure) => self.missed(failure, cx),
            Fact::Exited(failure) => self.exited(failure, cx),
            Fact::Gone => match &self.state {
                State::Stopping { then, .. } | State::Fenced { then, .. } => {
                    let then = then.clone();
                    self.go(then, cx)
                }
                _ => Vec::new(),
            },
            Fact::MemoryHeld => {
                match &mut self.state {
                    State::Stopping { stage, .. } => {
                        *stage = StopStage::Memory { fence_at: cx.now + cx.policy.stop.prove };
                    }
                    State::Fenced { left, .. } => *left = Left::Memory,
                    _ => {}
                }
                Vec::new()
            }
            Fact::LeasesDone => match self.state {
                State::Draining { deadline, .. } => {
                    let patient = cx.now + cx.policy.stop.grace;
                    self.end_drained(patient.min(deadline + cx.policy.stop.forced_grace()), cx)
                }
                _ => Vec::new(),
            },
            // A device is not fenced because of another that hangs.
            Fact::MemoryUnknown => {
                if let State::Stopping { stage, .. } = &mut self.state {
                    let fence_at = cx.now + cx.policy.stop.prove.max(DRIVER_PATIENCE);
                    *stage = StopStage::Memory { fence_at };
                }
                Vec::new()
            }
            Fact::Adopted(proof) => match (&self.state, proof) {
                (State::Adopting { ready_since, .. }, Some(proof)) => {
                    let since = ready_since.unwrap_or(cx.now);
                    self.become_ready(proof, since)
                }
                (State::Adopting { .. }, None) => {
                    let (stall_at, max_at) = (cx.now + cx.policy.start.stall, cx.now + cx.policy.start.max);
                    self.state = State::Starting { since: cx.now, launch: Launch::Running, stall_at, max_at };
                    vec![Action::WatchStart]
                }
                _ => Vec::new(),
            },
            Fact::GivenUp(failure) => self.give_up(failure, cx),
            Fact::NotAdopted(failure) => match self.state {
                State::Adopting { .. } => {
                    self.last_failure = Some((cx.now, failure));
                    let then = self.earned(cx);
                    self.kill(then, cx)
                }
                _ => Vec::new(),
            },
        }
    }

    fn give_up(&mut self, failure: Failure, cx: &Cx<'_>) -> Vec<Action> {
        match &mut self.state {
            State::Ready { .. } | State::Suspect { .. } | State::Draining { .. } | State::Adopting { .. } => Vec::new(),
            State::Stopping { then, .. } | State::Fenced { then, .. } => {
                *then = Then::Fail(failure);
                Vec::new()
            }
            State::Starting { .. } | State::Warming { .. } => {
                self.breaker.inconclusive(cx.now);
                self.stop(cx.policy.stop.forced_grace(), Then::Fail(failure), cx)
            }
            State::Idle
            | State::Staging { .. }
            | State::Preparing { .. }
            | State::Waiting { .. }
            | State::Failed { .. } => {
                self.breaker.inconclusive(cx.now);
                self.last_failure = Some((cx.now, failure.clone()));
                self.state = State::Failed { since: cx.now, failure };
                vec![Action::CancelWork]
            }
        }
    }

    fn launched(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        match &mut self.state {
            State::Starting { launch: launch @ Launch::Asked, stall_at, .. } => {
                *launch = Launch::Running;
                *stall_at = cx.now + cx.policy.start.stall;
                vec![Action::WatchStart]
            }
            State::Stopping { stage, .. } => {
                let StopStage::Launching { kill_at } = *stage else { return Vec::new() };
                *stage = StopStage::Term { kill_at: kill_at.max(cx.now) };
                vec![Action::Terminate, Action::AwaitGone]
            }
            _ => Vec::new(),
        }
    }

    fn become_ready(&mut self, proof: Proof, since: Tick) -> Vec<Action> {
        self.breaker.became_ready();
        self.port_conflicts = 0;
        self.held_up.reset();
        self.state = State::Ready { since, proof, misses: 0 };
        vec![Action::OpenAdmission, Action::WatchHealth]
    }

    fn healthy(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        match &mut self.state {
            State::Ready { since, misses, .. } => {
                *misses = 0;
                let ready_for = cx.now.since(*since);
                self.credit(ready_for, cx);
                Vec::new()
            }
            State::Suspect { ready_since, proof, .. } => {
                self.state = State::Ready { since: *ready_since, proof: proof.clone(), misses: 0 };
                vec![Action::OpenAdmission]
            }
            _ => Vec::new(),
        }
    }

    fn missed(&mut self, failure: Failure, cx: &Cx<'_>) -> Vec<Action> {
        let (ready_since, proof, misses) = match &self.state {
            State::Ready { since, proof, misses } => (*since, proof.clone(), misses + 1),
            State::Suspect { ready_since, proof, misses, .. } => (*ready_since, proof.clone(), misses + 1),
            _ => return Vec::new(),
        };
        if misses >= cx.policy.health.failures {
            return self.end_failed(failure, true, cx);
        }
        if misses < SUSPECT_AT {
            self.state = State::Ready { since: ready_since, proof, misses };
            return Vec::new();
        }
        let was_ready = self.state.ready();
        let since = match self.state {
            State::Suspect { since, .. } => since,
            _ => cx.now,
        };
        self.state = State::Suspect { since, ready_since, proof, misses, failure };
        if was_ready { vec![Action::CloseAdmission] } else { Vec::new() }
    }

    fn exited(&mut self, failure: Failure, cx: &Cx<'_>) -> Vec<Action> {
        match &self.state {
            State::Starting { .. }
            | State::Warming { .. }
            | State::Ready { .. }
            | State::Suspect { .. }
            | State::Adopting { .. } => self.end_failed(failure, true, cx),
            State::Draining { ready_since, .. } => {
                let ready_for = cx.now.since(*ready_since);
                self.last_failure = Some((cx.now, failure));
                self.credit(ready_for, cx);
                self.breaker.inconclusive(cx.now);
                let mut actions = vec![Action::RevokeLeases];
                actions.extend(self.kill(Then::Idle, cx));
                actions
            }
            // What the main process left behind gets no grace of its own.
            State::Stopping { stage: StopStage::Term { .. }, then, .. } => {
                let then = then.clone();
                self.kill(then, cx)
            }
            _ => Vec::new(),
        }
    }

    /// Ends a running engine because of `failure`. `at_once`: nothing is gained by asking it politely.
    fn end_failed(&mut self, failure: Failure, at_once: bool, cx: &Cx<'_>) -> Vec<Action> {
        let ready_since = match &self.state {
            State::Ready { since, .. } => Some(*since),
            State::Suspect { ready_since, .. } => Some(*ready_since),
            State::Adopting { ready_since, .. } => *ready_since,
            _ => None,
        };
        let then = match ready_since {
            // The daemon before this one had counted it, and was gone before it could strike it out.
            _ if self.counted >= self.generation => self.counted_already(failure, ready_since.is_some(), cx),
            Some(since) => self.crashed(failure, cx.now.since(since), cx),
            None => self.failed_start(failure, cx),
        };
        self.counted = self.generation;
        let mut actions = Vec::new();
        if ready_since.is_some() {
            actions.extend([Action::CloseAdmission, Action::RevokeLeases]);
        }
        actions.extend(if at_once { self.kill(then, cx) } else { self.stop(cx.policy.stop.forced_grace(), then, cx) });
        actions
    }

    /// What it earned then is waited out.
    fn counted_already(&mut self, failure: Failure, was_ready: bool, cx: &Cx<'_>) -> Then {
        if failure.class.policy().permanent && !was_ready {
            self.last_failure = Some((cx.now, failure.clone()));
            return Then::Fail(failure);
        }
        self.earned(cx)
    }

    /// To start again, but not before what was earned is over.
    fn earned(&self, cx: &Cx<'_>) -> Then {
        self.waits_for(cx.now).map_or(Then::Restart, Then::Wait)
    }

    fn failed_start(&mut self, failure: Failure, cx: &Cx<'_>) -> Then {
        let policy = failure.class.policy();
        let port_conflict = failure.class == FailureClass::PortConflict;
        self.last_failure = Some((cx.now, failure.clone()));
        if policy.permanent {
            self.breaker.inconclusive(cx.now);
            return Then::Fail(failure);
        }
        if port_conflict {
            self.port_conflicts += 1;
        }
        if policy.counts {
            self.breaker.failed_start(&cx.policy.breaker, cx.now);
        } else {
            self.breaker.inconclusive(cx.now);
        }
        if port_conflict && self.port_conflicts <= PORT_TRIES {
            return Then::Restart;
        }
        if matches!(failure.class, FailureClass::Node | FailureClass::Fetch) {
            let delay = self.held_up.next_delay(&cx.policy.backoff, policy.multiplier, cx.draw);
            return self.wait_for(delay, cx);
        }
        self.pause(policy.multiplier, cx)
    }

    fn crashed(&mut self, mut failure: Failure, ready_for: Duration, cx: &Cx<'_>) -> Then {
        // It did start with this file, these arguments and this port: whatever its log says now, often in the words of
        // its clients, is no reason never to try again.
        if failure.class.policy().permanent || failure.class == FailureClass::PortConflict {
            failure.class = FailureClass::Crash(Exit::Unknown);
        }
        let policy = failure.class.policy();
        self.last_failure = Some((cx.now, failure));
        self.credit(ready_for, cx);
        if ready_for >= cx.policy.backoff.reset_after() {
            return Then::Restart;
        }
        self.breaker.early_crash(&cx.policy.breaker, cx.now);
        self.pause(policy.multiplier, cx)
    }

    fn pause(&mut self, multiplier: f64, cx: &Cx<'_>) -> Then {
        let delay = self.backoff.next_delay(&cx.policy.backoff, multiplier, cx.draw);
        self.wait_for(delay, cx)
    }

    fn wait_for(&mut self, delay: Duration, cx: &Cx<'_>) -> Then {
        self.not_before = Some(cx.now + delay);
        Then::Wait(match self.breaker.open_until() {
            // The longer of the two holds: a driver in trouble may need longer than a breaker's first pause.
            Some(until) => Wait::Breaker { until: until.max(cx.now + delay) },
            None => Wait::Backoff { until: cx.now + delay },
        })
    }

    fn stop(&mut self, grace: Duration, then: Then, cx: &Cx<'_>) -> Vec<Action> {
        let kill_at = cx.now + grace;
        if let State::Starting { launch: Launch::Asked, .. } = self.state {
            self.state = State::Stopping { since: cx.now, stage: StopStage::Launching { kill_at }, then };
            return Vec::new();
        }
        self.state = State::Stopping { since: cx.now, stage: StopStage::Term { kill_at }, then };
        vec![Action::CancelWork, Action::Terminate, Action::AwaitGone]
    }

    fn kill(&mut self, then: Then, cx: &Cx<'_>) -> Vec<Action> {
        if let State::Starting { launch: Launch::Asked, .. } = self.state {
            return self.stop(Duration::ZERO, then, cx);
        }
        let fence_at = cx.now + cx.policy.stop.prove;
        self.state = State::Stopping { since: cx.now, stage: StopStage::Kill { fence_at }, then };
        vec![Action::CancelWork, Action::Kill, Action::AwaitGone]
    }

    /// Goes on after a stop, or after a start that left nothing.
    fn go(&mut self, then: Then, cx: &Cx<'_>) -> Vec<Action> {
        let mut actions = vec![Action::CancelWork];
        match then {
            Then::Idle => self.state = State::Idle,
            Then::Fail(failure) => self.state = State::Failed { since: cx.now, failure },
            Then::Start => actions.extend(self.attempt(cx)),
            Then::Restart => actions.extend(self.restart(cx)),
            Then::Wait(why) => {
                self.state = State::Waiting { since: cx.now, why };
                actions.extend(self.timer(cx));
            }
        }
        actions
    }

    fn timer(&mut self, cx: &Cx<'_>) -> Vec<Action> {
        let now = cx.now;
        match &self.state {
            State::Waiting { why: Wait::Backoff { until } | Wait::Breaker { until }, .. } if now >= *until => {
                self.restart(cx)
            }
            State::Starting { stall_at, max_at, .. } | State::Warming { stall_at, max_at, .. }
                if now >= *stall_at.min(max_at) =>
            {
                let what = if now >= *max_at {
                    "it took longer than startup_max"
                } else {
                    "it made no progress within startup_stall"
                };
                let failure = Failure::new(FailureClass::StartTimeout, what);
                self.end_failed(failure, true, cx)
            }
            State::Draining { deadline, on_deadline, .. } if now >= *deadline => match on_deadline {
                OnDeadline::Abort => self.undrain(cx),
                OnDeadline::Force => {
                    let mut actions = vec![Action::RevokeLeases];
                    actions.extend(self.end_drained(now + cx.policy.stop.forced_grace(), cx));
                    actions
                }
            },
            State::Stopping { since, stage: StopStage::Term { kill_at }, then } if now >= *kill_at => {
                let (since, then) = (*since, then.clone());
                self.state =
                    State::Stopping { since, stage: StopStage::Kill { fence_at: now + cx.policy.stop.prove }, then };
                vec![Action::Kill]
            }
            State::Stopping { stage: StopStage::Kill { fence_at }, then, .. } if now >= *fence_at => {
                self.state = State::Fenced { since: now, left: Left::Processes, then: then.clone() };
                Vec::new()
            }
            State::Stopping { stage: StopStage::Memory { fence_at }, then, .. } if now >= *fence_at => {
                self.state = State::Fenced { since: now, left: Left::Memory, then: then.clone() };
                Vec::new()
            }
            State::Ready { since, .. } => {
                let ready_for = now.since(*since);
                self.credit(ready_for, cx);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }
}
