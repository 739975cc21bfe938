//! What a driver tells others: its picture and its events.

use pool_domain::lifecycle::{Left, Replica, State, StopStage, Then, Wait};
use pool_domain::{DeviceSnapshot, Failure, Tick};

use super::{Driver, Published, staging};
use crate::events::EventKind;
use crate::snapshot::ReplicaSnapshot;

/// What is compared before and after a step.
pub(super) struct Before {
    state: State,
    breaker: &'static str,
    failure: Option<(Tick, Failure)>,
    restarts: u64,
}

impl Before {
    pub(super) fn of(r: &Replica) -> Self {
        Self {
            state: r.state.clone(),
            breaker: r.breaker.code(),
            failure: r.last_failure.clone(),
            restarts: r.restarts,
        }
    }
}

impl Before {
    /// Whether there is a failure that was not there before.
    pub(super) fn fails_anew(&self, r: &Replica) -> bool {
        r.last_failure.is_some() && r.last_failure != self.failure
    }

    /// Whether it had become Ready.
    pub(super) fn served(&self) -> bool {
        self.state.proof().is_some()
    }
}

impl Published {
    /// What its engine takes of a device: what its processes are listed with, as long as one is, else what they were at its
    /// proof. Unset where none of them ever was.
    pub(crate) fn takes(&self, device: &DeviceSnapshot) -> Option<u64> {
        let proved = self.taken.get(&device.uuid).copied()?;
        let own = device.details.processes.iter().filter(|p| self.pids.contains(&p.pid));
        own.map(|p| p.bytes).reduce(u64::saturating_add).or(Some(proved))
    }
}

impl Driver {
    /// Whether nobody can command it any more and only its engine's memory is waited for.
    pub(super) fn ends_in_memory(&self) -> bool {
        let memory = matches!(self.replica.state, State::Stopping { stage: StopStage::Memory { .. }, .. });
        memory && self.commands.is_closed()
    }

    pub(super) fn emit(&self, kind: EventKind) {
        self.events.send(&self.key, self.replica.generation, kind);
    }

    /// `by_hand`: nothing was proved, a person said so.
    pub(super) fn tell(&self, before: &Before, now: Tick, by_hand: bool) {
        let (r, from, to) = (&self.replica, before.state.code(), self.replica.state.code());
        let nth = r.nth_failure();
        if let Some((_, failure)) = &r.last_failure
            && before.fails_anew(r)
        {
            self.emit(EventKind::EngineFailed { failure: failure.clone(), nth });
        }
        if r.restarts > before.restarts {
            self.emit(EventKind::Restarting);
        }
        if from != to {
            self.emit(EventKind::StateChanged { from, to });
        } else if self.process().is_some()
            && matches!((&before.state, &r.state), (State::Starting { launch: a, .. }, State::Starting { launch: b, .. }) if a != b)
        {
            self.emit(EventKind::Started);
        }
        match (&before.state, &r.state) {
            (State::Draining { since, deadline, .. }, State::Ready { .. } | State::Suspect { .. }) => {
                let outcome = if now >= *deadline { "aborted" } else { "resumed" };
                self.emit(EventKind::DrainEnded { outcome, took: now.since(*since) });
            }
            (State::Draining { since, deadline, .. }, State::Stopping { .. }) => {
                let outcome = match (before.fails_anew(r), now >= *deadline && self.admission.in_use() > 0) {
                    (true, _) => "crashed",
                    (false, true) => "forced",
                    (false, false) => "drained",
                };
                self.emit(EventKind::DrainEnded { outcome, took: now.since(*since) });
            }
            (State::Ready { .. }, State::Suspect { failure, .. }) => {
                self.emit(EventKind::Suspected { failure: failure.clone() });
            }
            (State::Warming { .. } | State::Adopting { .. }, State::Ready { .. }) => {
                self.emit(EventKind::BecameReady { took: now.since(self.attempt_began) });
            }
            (_, State::Draining { deadline, .. }) if from != to => {
                let leases = u32::from(self.admission.in_use());
                self.emit(EventKind::DrainStarted { leases, deadline: deadline.since(now) });
            }
            (_, State::Waiting { why: Wait::Backoff { until } | Wait::Breaker { until }, .. })
                if from != to && (from == "idle" || r.last_failure.is_none()) =>
            {
                self.emit(EventKind::StartDelayed { delay: until.since(now) });
            }
            (_, State::Waiting { why: Wait::Backoff { until }, .. }) if from != to => {
                if let Some((_, failure)) = &r.last_failure {
                    self.emit(EventKind::RestartPlanned { delay: until.since(now), failure: failure.clone(), nth });
                }
            }
            (_, State::Fenced { left, .. }) if from != to => self.emit(EventKind::Fenced { left: *left }),
            (State::Fenced { .. }, _) if from != to && by_hand => self.emit(EventKind::Unfenced),
            (State::Stopping { .. } | State::Fenced { .. }, _) if from != to => self.emit(EventKind::Stopped),
            _ => {}
        }
        match (before.breaker, r.breaker.code()) {
            (a, b) if a == b => {}
            (_, "open") => {
                let pause = r.breaker.open_until().map_or_else(Default::default, |u| u.since(now));
                self.emit(EventKind::BreakerOpened { pause });
            }
            (_, "half_open") => self.emit(EventKind::BreakerHalfOpen),
            (_, _) => self.emit(EventKind::BreakerClosed),
        }
    }

    pub(super) fn publish(&self) {
        let next = Published {
            snapshot: self.snapshot(),
            api_key: self.attempt.prepared.as_ref().and_then(|p| p.endpoint.api_key.clone()),
            state: self.replica.state.clone(),
            wants: self.attempt.want.clone(),
            blocked: self.attempt.blocked.clone(),
            taken: self.attempt.taken.clone(),
            pids: self.process().into_iter().chain(self.attempt.held.pids.iter().copied()).collect(),
            next_start: next_start(&self.replica.state),
            accused: self.accused,
            verbs: self.verbs,
        };
        let changed = self.published.send_if_modified(|p| {
            let changed = *p != next;
            *p = next;
            changed
        });
        if changed {
            for bell in &self.bells {
                bell.notify_one();
            }
        }
    }

    fn snapshot(&self) -> ReplicaSnapshot {
        let r = &self.replica;
        let (reason_code, mut reason) = reason(&r.state, r.last_failure.as_ref());
        let staging = self.staging();
        if let Some(staging) = &staging {
            reason = staging::words(staging);
        }
        if let (State::Warming { .. }, Some(why)) = (&r.state, &self.attempt.unprovable) {
            reason = format!("it waits for the driver to prove its memory: {why}");
        }
        let loaded_percent = self.loaded();
        if let Some(percent) = loaded_percent {
            reason = format!("the engine has loaded {percent} %");
        }
        let (prepared, grant) = (self.attempt.prepared.as_ref(), self.attempt.grant.as_ref());
        let live = r.state.live()
            && match self.process() {
                Some(_) => true,
                // Who runs an external engine alone knows of its process: it lives once it answers. Of others there is
                // none that is known: what stands in the way of an adoption is not the engine.
                None => self.runs_elsewhere() && !matches!(r.state, State::Starting { .. }),
            };
        ReplicaSnapshot {
            id: self.key.replica,
            generation: r.generation,
            state: r.state.code(),
            reason_code,
            reason,
            live,
            ready: r.state.ready(),
            draining: matches!(r.state, State::Draining { .. }),
            endpoint: prepared.filter(|_| live).map(|p| p.endpoint.url()),
            pid: self.process().filter(|_| live),
            device_mask: grant.map(|g| g.devices.to_cuda_visible_devices()).unwrap_or_default(),
            engine_version: prepared.map(|p| p.engine_version.clone()).unwrap_or_default(),
            slots_total: r.state.proof().map_or(0, |p| u32::from(p.slots)),
            active_leases: u32::from(self.admission.in_use()),
            restart_count: r.restarts,
            breaker: r.breaker.code(),
            backoff_failures: r.backoff.failures(),
            // Filled in when somebody asks: it changes with every millisecond.
            next_start_in_ms: None,
            proof: r.state.proof().map_or("", |p| p.residency),
            perf: self.pace.hints(),
            meters: self.pace.shown(),
            last_error: self.last_error.clone(),
            consecutive_failures: r.state.misses(),
            last_check_at: self.last_check,
            staging,
            loaded_percent,
            context: grant.filter(|_| live).and_then(|g| g.context),
            vram_reserved: grant.filter(|_| r.state.holds_reservation()).map_or(0, |g| g.bytes.iter().sum()),
        }
    }
}

/// Known already while what failed is still being ended.
fn next_start(state: &State) -> Option<Tick> {
    match state {
        State::Waiting { why, .. } => why.possible_at(),
        State::Stopping { then: Then::Wait(why), .. } | State::Fenced { then: Then::Wait(why), .. } => why.until(),
        _ => None,
    }
}

fn reason(state: &State, last: Option<&(Tick, Failure)>) -> (&'static str, String) {
    let failed = || last.map_or((state.code(), String::new()), |(_, f)| (f.class.code(), f.detail.clone()));
    match state {
        State::Waiting { why: why @ (Wait::Backoff { .. } | Wait::Breaker { .. }), .. } => (
            why.code(),
            last.map_or_else(
                || format!("{why}, which an earlier run of the daemon began"),
                |(_, f)| format!("{why}; {f}"),
            ),
        ),
        State::Waiting { why, .. } => (why.code(), why.to_string()),
        State::Failed { failure, .. } => (failure.class.code(), failure.detail.clone()),
        State::Suspect { failure, .. } => (failure.class.code(), failure.detail.clone()),
        State::Stopping { stage: StopStage::Memory { .. }, .. } => {
            ("memory", "waiting for the engine's memory to come back".into())
        }
        State::Stopping { then, .. } => match then {
            Then::Idle => ("stop", "stopping because it was asked to".into()),
            _ => failed(),
        },
        State::Fenced { left: Left::Processes, .. } => ("fenced", "something of the engine may be left".into()),
        State::Fenced { left: Left::Memory, .. } => ("fenced", "the engine's memory has not come back".into()),
        State::Staging { .. } => ("staging", "making the model present".into()),
        State::Preparing { .. } => ("preparing", "checking the engine and reserving devices".into()),
        State::Starting { .. } => ("starting", "the engine does not serve yet".into()),
        State::Warming { .. } => ("warming", "the engine has not proved yet that it serves".into()),
        State::Draining { .. } => ("draining", "waiting for leases to end".into()),
        State::Adopting { .. } => ("adopting", "looking at an engine found at boot".into()),
        State::Idle | State::Ready { .. } => ("", String::new()),
    }
}
