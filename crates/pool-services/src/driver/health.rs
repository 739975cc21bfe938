//! Watches a Ready engine, a round at a time. What the answers mean, `pool_domain::liveness` decides.

use std::sync::Arc;

use pool_domain::Tick;
use pool_domain::lifecycle::{Fact, HealthPolicy};
use pool_domain::liveness::{Canary, Health, Liveness, Next, Round, Verdict, Work};
use pool_domain::meters::Reading;
use tokio::time::{MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;

use super::{Driver, Report};
use crate::admission::Admission;
use crate::clock::Clock;
use crate::ports::{Endpoint, EngineProbe, Observed, Up, Worked};

/// Characters of an engine's answer that are told.
const TOLD: usize = 200;

/// Whom to watch, and how.
struct Watch {
    probe: Arc<dyn EngineProbe>,
    endpoint: Endpoint,
    admission: Arc<Admission>,
    clock: Clock,
    policy: HealthPolicy,
    liveness: Liveness,
}

impl Driver {
    pub(super) fn watch_health(&mut self) {
        let Some((_, endpoint)) = self.running() else { return };
        let mut watch = Watch {
            probe: Arc::clone(&self.ports.probe),
            endpoint,
            admission: Arc::clone(&self.admission),
            clock: self.clock,
            policy: self.policy.health,
            liveness: Liveness::new(self.clock.now()),
        };
        if !watch.policy.canary {
            tracing::warn!(pool_id = %self.key.pool, "health.canary is off: an idle engine that hangs is found only by the next request");
        }
        // A drain that was given up starts this again: the earlier watch must end first.
        self.work.cancel();
        self.work = CancellationToken::new();
        let (tx, generation, cancelled) = (self.reports_tx.clone(), self.replica.generation, self.work.clone());
        tokio::spawn(async move {
            let rounds = async {
                // From beginning to beginning, so that slow answers do not put off what they may be the sign of.
                let interval = watch.policy.interval;
                let mut due = interval_at(tokio::time::Instant::now() + interval, interval);
                due.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    due.tick().await;
                    let (verdict, reading) = watch.round().await;
                    let (told, seen) = (reading, watch.admission.seen().reading());
                    if (told, seen) != Default::default()
                        && tx.send((generation, Report::Read { told, seen })).await.is_err()
                    {
                        return;
                    }
                    let fact = match verdict {
                        Verdict::Well => Fact::Healthy,
                        Verdict::Missed(failure) => Fact::Missed(failure),
                        Verdict::Open => continue,
                    };
                    if tx.send((generation, Report::Checked(fact))).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                () = rounds => {}
            }
        });
    }
}

impl Watch {
    async fn round(&mut self) -> (Verdict, Reading) {
        let (began, limit) = (self.clock.now(), self.policy.timeout);
        let (health, work) = tokio::join!(
            timeout(limit, self.probe.up(&self.endpoint)),
            timeout(limit, self.probe.observe(&self.endpoint)),
        );
        let Observed { work, reading } = work.unwrap_or_else(|_| Work::Silent.into());
        let round = Round {
            health: health.map_or(Health::Silent, said),
            work,
            leases: self.admission.in_use(),
            flow: self.admission.flow(),
        };
        let verdict = match self.decide(round, began) {
            Next::Decided(verdict) => verdict,
            Next::AskForWork => {
                let outcome = self.canary().await;
                self.liveness.canary(outcome)
            }
        };
        (verdict, reading)
    }

    fn decide(&mut self, round: Round, began: Tick) -> Next {
        self.liveness.observe(round, began, &self.policy)
    }

    /// Holds no slot: a lease that comes goes first.
    async fn canary(&self) -> Canary {
        tokio::select! {
            biased;
            () = self.admission.taken() => Canary::GaveWay,
            worked = timeout(self.policy.timeout, self.probe.work(&self.endpoint)) => match worked {
                Ok(Ok(Worked::Done)) => Canary::Done,
                Ok(Ok(Worked::Declined)) => Canary::Declined,
                Ok(Err(failure)) => Canary::Failed(failure),
                Err(_) => Canary::Silent,
            },
        }
    }
}

fn said(up: Up) -> Health {
    match up {
        Up::Serving => Health::Serving,
        Up::Overloaded(why) => Health::Overloaded(why),
        other => Health::Ill(format!("health check: {other:?}").chars().take(TOLD).collect()),
    }
}
