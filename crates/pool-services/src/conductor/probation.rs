//! The time after a reload in which a failure of the new engines brings the old ones back.

use pool_domain::rollout::Probation;

use super::reload::failed;
use super::{Conductor, Made, Member, Reload, Running};

impl Conductor {
    /// What begins with the commit of a reload, if its spec asks for it.
    pub(super) fn probation_of(&self, running: &Running) -> Option<Probation> {
        let lasts = running.reload.to.spec.reload.probation;
        let new = self.members.iter().filter(|m| running.new.contains(&m.key.replica));
        let restarts = new.map(|m| (m.key.replica, m.published.borrow().snapshot.restart_count)).collect();
        (!lasts.is_zero() && !running.reload.back).then(|| Probation { until: self.node.clock.now() + lasts, restarts })
    }

    /// A new engine that fails within its probation gives way to the old one.
    pub(super) async fn heed_probation(&mut self) {
        let Some(to) = self.fails_probation() else { return };
        let operation = self.begin_operation("rollback");
        tracing::warn!(pool_id = %self.made.spec.id, "rolling back: it failed within its probation");
        self.begin_reload(Reload::back(to), operation.id);
        self.advance(None).await;
    }

    /// Whether the new engine fails before its probation is over. Ends the probation.
    fn fails_probation(&mut self) -> Option<Made> {
        let probation = self.probation.as_ref().filter(|_| self.running.is_none() && !self.ending)?;
        if self.node.clock.now() >= probation.until {
            self.probation = None;
            return None;
        }
        let fails = |m: &Member| {
            let published = m.published.borrow();
            failed(&published).is_some() || probation.fails(m.key.replica, published.snapshot.restart_count)
        };
        let fails = self.serving().any(fails);
        fails.then(|| self.probation = None)?;
        self.previous.clone()
    }
}
