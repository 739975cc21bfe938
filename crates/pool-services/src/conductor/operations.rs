//! What was asked of a pool, and how it stands.

use pool_domain::lifecycle::{State, Wait};

use super::{Conductor, REMEMBERED};
use crate::control::{Operation, OperationState};
use crate::driver::Published;

impl Conductor {
    /// Remembers that something was asked for. The last wish wins: what it contradicts is over.
    pub(super) fn begin_operation(&mut self, verb: &str) -> Operation {
        self.facts.send_modify(|f| {
            for o in f.operations.iter_mut().filter(|o| o.state == OperationState::Running && o.verb != verb) {
                o.state = OperationState::Failed(format!("superseded by {verb}"));
            }
        });
        self.new_operation(verb)
    }

    fn new_operation(&mut self, verb: &str) -> Operation {
        self.begun += 1;
        let operation = Operation {
            id: format!("op-{}-{:08x}-{}", self.made.spec.id, self.node.seed & 0xffff_ffff, self.begun),
            verb: verb.into(),
            pool_id: self.made.spec.id.clone(),
            state: OperationState::Running,
            progress: String::new(),
            left: None,
            started_at: self.node.clock.wall(),
        };
        self.facts.send_modify(|f| {
            f.operations.push_front(operation.clone());
            f.operations.truncate(REMEMBERED);
        });
        operation
    }

    /// Remembers something that is done already.
    pub(super) fn ended_operation(&mut self, verb: &str, outcome: &str) -> Operation {
        let operation = self.begin_operation(verb);
        self.ended(operation, outcome)
    }

    /// The same of something that contradicts nothing that is under way.
    pub(super) fn ended_beside(&mut self, verb: &str, outcome: &str) -> Operation {
        let operation = self.new_operation(verb);
        self.ended(operation, outcome)
    }

    fn ended(&self, mut operation: Operation, outcome: &str) -> Operation {
        operation.state = OperationState::Succeeded(outcome.into());
        self.end_operation(&operation.id, operation.state.clone());
        operation
    }

    /// An operation that ended before keeps its end.
    pub(super) fn end_operation(&self, id: &str, state: OperationState) {
        self.change_operation(id, |o| {
            o.state = state;
            o.progress.clear();
        });
    }

    pub(super) fn set_progress(&self, id: &str, progress: String) {
        self.change_operation(id, |o| o.progress = progress);
    }

    fn change_operation(&self, id: &str, change: impl FnOnce(&mut Operation)) {
        self.facts.send_if_modified(|f| {
            let running = |o: &&mut Operation| o.id == id && o.state == OperationState::Running;
            let Some(operation) = f.operations.iter_mut().find(running) else { return false };
            let before = operation.clone();
            change(operation);
            *operation != before
        });
    }

    pub(super) fn publish(&mut self) {
        let replicas: Vec<Published> =
            self.members.iter_mut().map(|m| m.published.borrow_and_update().clone()).collect();
        // An operation is judged only once every driver has taken in its command.
        let settled = self.members.iter().zip(&replicas).all(|(m, r)| r.verbs == m.sent);
        let serving: Vec<&Published> =
            self.members.iter().zip(&replicas).filter(|(m, _)| m.serves).map(|(_, r)| r).collect();
        let (hold, revision, spec) = (self.hold.held(), self.revision, &self.made.spec);
        let reloading = self.running.is_some();
        let mut given_up = false;
        self.facts.send_if_modified(|f| {
            let before = f.clone();
            f.reloading = reloading;
            f.snapshot.hold = hold;
            f.snapshot.revision = revision;
            f.snapshot.engine = spec.engine.to_string();
            f.snapshot.model = spec.model.to_string();
            f.snapshot.model_id = spec.model.model_id();
            f.snapshot.aliases.clone_from(&spec.aliases);
            f.snapshot.workload = spec.workload.code();
            f.snapshot.replicas = replicas.iter().map(|r| r.snapshot.clone()).collect();
            f.next_starts = replicas.iter().map(|r| r.next_start).collect();
            if settled {
                for o in f.operations.iter_mut().filter(|o| o.state == OperationState::Running) {
                    judge(o, &serving);
                    // A drain that was given up holds nobody back: all is as it was before.
                    given_up |= o.verb == "drain" && o.state == OperationState::Failed(GIVEN_UP.into());
                }
                f.snapshot.hold &= !given_up;
            }
            let changed = *f != before;
            f.snapshot.snapshot += u64::from(changed);
            changed
        });
        if given_up {
            self.hold.set(false);
        }
    }
}

/// What became of a drain that aborts at its deadline.
const GIVEN_UP: &str = "given up: leases were still held at the deadline";

/// How an operation stands, given its pool's replicas.
fn judge(o: &mut Operation, replicas: &[&Published]) {
    let count = |p: fn(&State) -> bool| replicas.iter().filter(|r| p(&r.state)).count();
    match o.verb.as_str() {
        "preload" | "declare" => {
            let ready = count(State::ready);
            o.progress = format!("{ready} of {} ready", replicas.len());
            if replicas.len() > 1 {
                let each = |r: &&Published| format!("{} {}", r.snapshot.id, r.snapshot.state);
                o.progress = format!("{}: {}", o.progress, replicas.iter().map(each).collect::<Vec<_>>().join(", "));
            }
            if ready == replicas.len() {
                o.state = OperationState::Succeeded("ready".into());
            } else if let Some(r) = replicas
                .iter()
                .find(|r| matches!(r.state, State::Failed { .. } | State::Waiting { why: Wait::Breaker { .. }, .. }))
            {
                o.state = OperationState::Failed(r.snapshot.reason.clone());
            } else if let Some(r) = replicas.iter().find(|r| r.state == State::Idle && o.verb == "preload") {
                // Nobody asked for it any more, or another needed its memory.
                o.state = OperationState::Failed(format!("{} was stopped before all were ready", r.snapshot.id));
            }
        }
        // Their plans say how they stand.
        "reload" | "rollback" => {}
        _ => {
            let rest = count(|s| matches!(s, State::Idle | State::Failed { .. }));
            o.progress = format!("{rest} of {} at rest", replicas.len());
            if rest == replicas.len() && o.verb == "remove" {
                // Over when nothing is left on the disk, either.
            } else if rest == replicas.len() {
                o.state = OperationState::Succeeded("drained".into());
            } else if replicas.iter().any(|r| matches!(r.state, State::Fenced { .. })) {
                o.state = OperationState::Failed("something of an engine may be left: its devices are fenced".into());
            } else if replicas.iter().any(|r| r.state.ready()) {
                o.state = OperationState::Failed(GIVEN_UP.into());
            }
        }
    }
}
