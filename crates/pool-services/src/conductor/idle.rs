//! A pool that nobody uses stops, and what gives way or comes back does so through its conductor.

use std::time::Duration;

use pool_domain::idle::{Activity, IdlePolicy, Verdict, verdict};
use pool_domain::lifecycle::{Command, OnDeadline, State};
use pool_domain::{ReplicaId, Tick};

use super::{Conductor, Member};
use crate::driver::DriverCommand;
use crate::events::EventKind;
use crate::eviction::last_used;
use crate::spec::Activation;

impl Conductor {
    /// When the pool is to be looked at because nobody may have used it for long enough.
    pub(super) fn look_at(&self) -> Option<Tick> {
        match self.idleness() {
            Verdict::Stays => None,
            Verdict::Until(due) => Some(due),
            Verdict::Stops { .. } => Some(self.node.clock.now()),
        }
    }

    fn idleness(&self) -> Verdict {
        let Some(idle_ttl) = self.made.spec.idle_ttl else { return Verdict::Stays };
        let rests = self.ending || self.running.is_some() || self.hold.held() || self.made.spec.pin;
        // A replica that leaves or is not to serve yet is somebody else's business.
        let settled = self.members.iter().all(|m| m.serves && m.published.borrow().verbs == m.sent);
        if rests || !settled || self.made.spec.activation != Activation::OnDemand {
            return Verdict::Stays;
        }
        let now = self.node.clock.now();
        let policy = IdlePolicy { idle_ttl, min_ready_time: self.node.min_ready_time };
        let waited_for = self.desk.waiting() > 0;
        let activities: Vec<Activity> = self.members.iter().map(|m| activity(m, waited_for, now)).collect();
        verdict(&activities, self.asked, &policy, now)
    }

    /// Stops the pool if nobody uses it. A replica that got a lease in the meantime stays.
    pub(super) async fn stop_if_unused(&mut self) {
        let Verdict::Stops { unused_since } = self.idleness() else { return };
        let after = self.node.clock.now().since(unused_since);
        for member in &mut self.members {
            let (runs, generation) = {
                let published = member.published.borrow();
                let runs = matches!(published.state, State::Ready { .. } | State::Suspect { .. });
                (runs, published.snapshot.generation)
            };
            if runs {
                self.node.events.send(&member.key, generation, EventKind::IdleStopped { after });
                member.give_way().await;
            } else {
                member.command(Command::Drain { deadline: Duration::ZERO, on_deadline: OnDeadline::Force }).await;
            }
        }
    }

    /// The steward needs the memory of a replica.
    pub(super) async fn give_way(&mut self, id: ReplicaId) {
        // Whoever reloads it has its engines in hand.
        if self.ending || self.running.is_some() {
            return;
        }
        if let Some(member) = self.members.iter_mut().find(|m| m.key.replica == id && m.serves) {
            member.give_way().await;
        }
    }

    /// It gave way for nothing.
    pub(super) async fn come_back(&mut self, id: ReplicaId) {
        if self.ending || self.running.is_some() || self.hold.held() {
            return;
        }
        if let Some(member) = self.members.iter_mut().find(|m| m.key.replica == id && m.serves) {
            member.command(Command::Wake).await;
        }
    }
}

impl Member {
    async fn give_way(&mut self) {
        self.sent += 1;
        // Drivers never wait for their conductor, so this cannot deadlock.
        let _ended = self.commands.send(DriverCommand::GiveWay).await;
    }
}

/// `waited_for`: somebody waits for a slot of the pool.
fn activity(member: &Member, waited_for: bool, now: Tick) -> Activity {
    match &member.published.borrow().state {
        State::Idle | State::Failed { .. } | State::Fenced { .. } => Activity::Rests,
        State::Waiting { .. } => Activity::Waits,
        _ if waited_for || member.admission.in_use() > 0 => Activity::Busy,
        State::Ready { since: ready_since, .. } | State::Suspect { ready_since, .. } => {
            let last_used = last_used(member.admission.unused_for(), *ready_since, now);
            Activity::Unused { ready_since: *ready_since, last_used }
        }
        _ => Activity::Moves,
    }
}
