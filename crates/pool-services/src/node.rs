//! Makes the tasks of a pool: a driver for each replica, and their conductor.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lease_book::Limits;
use pool_domain::lifecycle::Replica;
use pool_domain::{ReplicaId, ReplicaKey};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::boot::Hurry;
use crate::clock::Clock;
use crate::conductor::{Conductor, Made, Member, Paper, PoolFacts};
use crate::control::{Operation, OperationState};
use crate::declared::{Restored, Standing};
use crate::driver::{Driver, DriverParts, Found, Memory, Pace, Ports, Remembered, SpeedBook, at_rest};
use crate::events::EventSink;
use crate::hold::Hold;
use crate::lease_desk::{Desk, DeskParts, EmptyDesk};
use crate::roster::{PoolHandle, Roster};
use crate::snapshot::PoolSnapshot;
use crate::spec::{Activation, PoolSpec};
use crate::view::View;

/// Commands that may wait for a task; more are refused.
pub(crate) const QUEUE: usize = 32;

/// What every pool of a node shares.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) ports: Ports,
    pub(crate) view: View,
    pub(crate) clock: Clock,
    pub(crate) seed: u64,
    /// No replica stops by itself earlier than this after it became Ready.
    pub(crate) min_ready_time: Duration,
    pub(crate) events: EventSink,
    /// Rung for the steward.
    pub(crate) bell: Arc<Notify>,
    /// What still has to be written when the drivers are gone.
    pub(crate) memories: TaskTracker,
    /// Cancelled by a bug.
    pub(crate) broken: CancellationToken,
    /// For engines that are left when time is up.
    pub(crate) last_call: CancellationToken,
    pub(crate) max_lease_ttl: Duration,
    /// Engines of earlier daemons that nobody wants any more.
    pub(crate) hurry: Arc<Hurry>,
}

/// A new replica.
pub(crate) struct Birth<'a> {
    pub(crate) spec: &'a Arc<PoolSpec>,
    pub(crate) id: ReplicaId,
    /// Which mask of the spec is its own.
    pub(crate) place: u16,
    /// Its conductor's.
    pub(crate) bell: &'a Arc<Notify>,
    pub(crate) desk: &'a Desk,
    pub(crate) serves: bool,
    /// The engine that it had.
    pub(crate) found: Option<Found>,
    pub(crate) hold: bool,
}

impl Node {
    /// Runs a task whose panic must not pass unnoticed.
    pub(crate) fn watched(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.watched_until(name, task, || {});
    }

    /// The same, and tells of its end, whichever it is.
    fn watched_until(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) {
        let broken = self.broken.clone();
        tokio::spawn(async move {
            if tokio::spawn(task).await.is_err_and(|e| e.is_panic()) {
                tracing::error!(task = name, "a task met a bug: nothing is started any more");
                broken.cancel();
            }
            ended();
        });
    }

    /// Starts the driver of a replica.
    pub(crate) async fn replica(&self, birth: Birth<'_>) -> Member {
        let Birth { spec, id, place, bell, desk, serves, found, hold } = birth;
        let (ports, clock) = (&self.ports, self.clock);
        let key = ReplicaKey { pool: spec.id.clone(), replica: id };
        let (generation, now) = (ports.ledger.last_generation(&key).await, clock.now());
        let replica = Replica::resume(generation, ports.ledger.past(&key, now).await, now, &spec.policy);
        let last_error = ports.ledger.last_error(&key).await;
        let remembered = Remembered { past: replica.past(), last_error: last_error.clone() };
        let memory = Memory::start(key.clone(), remembered, Arc::clone(&ports.ledger), clock, &self.memories);
        let book = SpeedBook::start(spec.id.clone(), Arc::clone(&ports.ledger), &self.memories);
        let pace = Pace::new(ports.ledger.speeds(&spec.id).await, &spec.model.model_id(), book);
        let (commands, driver_commands) = mpsc::channel(QUEUE);
        let (publish, published) = watch::channel(at_rest(&key, &replica, last_error.clone(), pace.hints()));
        let admission = Arc::new(Admission::belled(Arc::clone(&desk.bell)));
        let mut hasher = DefaultHasher::new();
        (self.seed, &key).hash(&mut hasher);
        let mut driver = Driver::new(DriverParts {
            key: key.clone(),
            spec: Arc::clone(spec),
            place,
            ports: ports.clone(),
            clock,
            seed: hasher.finish(),
            admission: Arc::clone(&admission),
            desk: desk.clone(),
            commands: driver_commands,
            published: publish,
            bells: [Arc::clone(bell), Arc::clone(&self.bell)],
            events: self.events.clone(),
            replica,
            last_error,
            memory,
            pace,
            last_call: self.last_call.clone(),
        });
        if let Some(found) = found {
            driver.take_over(found, hold);
        }
        let bell = Arc::clone(bell);
        self.watched_until("driver", driver.run(), move || bell.notify_one());
        Member { key, place, commands, published, admission, serves, sent: 0 }
    }

    /// Starts a pool, with the engines of it that were found.
    pub(crate) async fn pool(
        &self,
        pool: Restored,
        places: &[ReplicaId],
        found: &mut BTreeMap<ReplicaKey, Found>,
    ) -> PoolHandle {
        self.start(pool, places, found, 0, None).await
    }

    /// Starts a pool that is new, as an operation. Its operations are numbered from here.
    pub(crate) async fn declare(&self, pool: Restored, number: u64) -> (PoolHandle, Operation) {
        let spec = &pool.declared.spec;
        let operation = Operation {
            id: format!("op-{}-{:08x}-{number}", spec.id, self.seed & 0xffff_ffff),
            verb: "declare".into(),
            pool_id: spec.id.clone(),
            state: match spec.activation {
                Activation::Preload => OperationState::Running,
                Activation::OnDemand => OperationState::Succeeded("declared".into()),
            },
            progress: String::new(),
            left: None,
            started_at: self.clock.wall(),
        };
        let places: Vec<ReplicaId> = (0..spec.replicas).map(ReplicaId).collect();
        (self.start(pool, &places, &mut BTreeMap::new(), number, Some(operation.clone())).await, operation)
    }

    async fn start(
        &self,
        pool: Restored,
        places: &[ReplicaId],
        found: &mut BTreeMap<ReplicaKey, Found>,
        number: u64,
        begun: Option<Operation>,
    ) -> PoolHandle {
        let standing = Standing::of(&pool);
        let (spec, revision, stored) = (Arc::new(pool.declared.spec), pool.revision, pool.stored);
        let (bell, empty) = (Arc::new(Notify::new()), EmptyDesk::new());
        let desk = empty.desk.clone();
        let hold = self.ports.ledger.held(&spec.id).await;
        let mut members = Vec::new();
        for (place, id) in (0..).zip(places.iter().copied()) {
            let found = found.remove(&ReplicaKey { pool: spec.id.clone(), replica: id });
            let birth = Birth { spec: &spec, id, place, bell: &bell, desk: &desk, serves: true, found, hold };
            members.push(self.replica(birth).await);
        }
        let snapshot = PoolSnapshot {
            pool_id: spec.id.clone(),
            snapshot: 1,
            revision,
            source: standing.source.code(),
            engine: spec.engine.to_string(),
            model: spec.model.to_string(),
            model_id: spec.model.model_id(),
            aliases: spec.aliases.clone(),
            workload: spec.workload.code(),
            hold,
            leases_waiting: 0,
            guards: Default::default(),
            replicas: members.iter().map(|m| m.published.borrow().snapshot.clone()).collect(),
        };
        let (facts, facts_seen) = watch::channel(PoolFacts::first(snapshot, begun));
        let seats = members.iter().map(Member::seat).collect();
        let Standing { document, source, previous, probation, .. } = standing.clone();
        let standing = Arc::new(standing);
        let (roster, roster_seen) = watch::channel(Arc::new(Roster { spec: Arc::clone(&spec), standing, seats }));
        let (commands, conductor_commands) = mpsc::channel(QUEUE);
        let parts = DeskParts {
            roster: roster_seen.clone(),
            facts: facts_seen.clone(),
            conductor: commands.downgrade(),
            clock: self.clock,
            events: self.events.clone(),
            seed: self.seed,
            limits: Limits { max_ttl: self.max_lease_ttl, ..Limits::default() },
        };
        self.watched("lease desk", empty.run(parts));
        let conductor = Conductor {
            hold: Hold::found(spec.id.clone(), Arc::clone(&self.ports.ledger), hold),
            paper: Paper::of(spec.id.clone(), Arc::clone(&self.ports.ledger)),
            made: Made { spec, document },
            source,
            stored,
            previous,
            revision,
            running: None,
            queued: None,
            probation,
            node: self.clone(),
            members,
            bell,
            desk: desk.clone(),
            commands: conductor_commands,
            facts,
            roster,
            begun: number,
            asked: self.clock.now(),
            ending: false,
            left: false,
        };
        self.watched("conductor", conductor.run());
        PoolHandle { commands, facts: facts_seen, roster: roster_seen, desk }
    }
}
