//! The facade: the verbs over drivers, conductors and the steward.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::lifecycle::State;
use pool_domain::{Holder, PoolId, Tick};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::boot::Strays;
use crate::catalog::{Declaring, Order, Owner};
use crate::change::{self, Change};
use crate::clock::Clock;
use crate::conditions::StewardCommand;
use crate::conductor::{ConductorCommand, PoolFacts, Wish};
use crate::control::{
    ControlError, DrainLeft, DrainOptions, Lease, LeaseRequest, Operation, OperationState, PlacementRequest,
    PlanRequest, PoolControl, ReloadRequest,
};
use crate::declared::{Declared, Source};
use crate::driver::Ports;
use crate::events::EventSink;
use crate::planning::{self, Placed, PlanReport, Surroundings};
use crate::roster::{PoolHandle, Seat, Table};
use crate::snapshot::{NodeSnapshot, PoolSnapshot};
use crate::spec::PoolSpec;
use crate::view::View;

use crate::builder::Builder;

/// What a killed engine gets to be gone before the daemon is.
const LAST_CALL: Duration = Duration::from_secs(2);

/// What clones of a manager share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) table: watch::Receiver<Table>,
    pub(crate) catalog: mpsc::Sender<Order>,
    /// How pools that are no more went.
    pub(crate) departed: watch::Receiver<VecDeque<Operation>>,
    pub(crate) view: View,
    pub(crate) steward: mpsc::Sender<StewardCommand>,
    pub(crate) max_lease_ttl: Duration,
    pub(crate) clock: Clock,
    pub(crate) events: EventSink,
    pub(crate) broken: CancellationToken,
    /// What still has to be written when the drivers are gone.
    pub(crate) memories: TaskTracker,
    /// Also held because the ledger is what keeps other daemons out.
    pub(crate) ports: Ports,
    /// For engines that are left when time is up.
    pub(crate) last_call: CancellationToken,
    /// Engines of earlier daemons that belong to no replica.
    pub(crate) strays: Strays,
}

/// The pools of one node. Clones share it.
#[derive(Debug, Clone)]
pub struct PoolManager {
    pub(crate) inner: Arc<Inner>,
}

impl PoolManager {
    /// Begins to gather.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The pools as they are now.
    pub(crate) fn table(&self) -> Table {
        Arc::clone(&self.inner.table.borrow())
    }

    pub(crate) fn handle(&self, id: &PoolId) -> Result<PoolHandle, ControlError> {
        self.inner.table.borrow().get(id).cloned().ok_or_else(|| ControlError::PoolNotFound(id.to_string()))
    }

    async fn wish(&self, id: &PoolId, wish: Wish) -> Result<Operation, ControlError> {
        change::ask(&self.handle(id)?, wish).await
    }

    pub(crate) fn picture(&self, handle: &PoolHandle) -> PoolSnapshot {
        let mut snapshot = handle.facts.borrow().at(self.inner.clock.now());
        snapshot.leases_waiting = handle.desk.waiting();
        snapshot.guards = handle.desk.tally.read();
        // Leases move faster than snapshots are published.
        for seat in &handle.roster().seats {
            if let Some(r) = snapshot.replicas.iter_mut().find(|r| r.id == seat.key.replica) {
                r.active_leases = u32::from(seat.admission.in_use());
            }
        }
        snapshot
    }

    /// Stops every engine and waits until nothing is left, at most `deadline`. What is left then is killed. Says whether
    /// nothing was: what is Fenced is not waited for, and may be left.
    pub async fn shutdown(&self, deadline: Duration) -> bool {
        self.shutdown_drained(Duration::ZERO, deadline).await
    }

    /// The same, but leases that run have `drain` of that time to end by themselves; new ones are refused at once.
    pub async fn shutdown_drained(&self, drain: Duration, deadline: Duration) -> bool {
        self.inner.strays.hurry();
        // Not `stop`: that would leave a hold behind.
        let in_time = self.end(Wish::Shutdown { drain }, deadline).await;
        if !in_time {
            self.inner.last_call.cancel();
            // Nothing is waited for any more, but the signals have to be sent.
            let _ = self.end(Wish::Shutdown { drain: Duration::ZERO }, LAST_CALL).await;
        }
        let fenced = |handle: &PoolHandle| handle.facts.borrow().snapshot.replicas.iter().any(|r| r.state == "fenced");
        in_time && !self.inner.strays.left() && !self.table().values().any(fenced)
    }

    /// Ends the management and leaves every engine as it is, for a later daemon to take over.
    pub async fn leave(&self, deadline: Duration) -> bool {
        self.end(Wish::Leave, deadline).await
    }

    async fn end(&self, wish: Wish, deadline: Duration) -> bool {
        for (id, handle) in &*self.table() {
            let (answer, _) = oneshot::channel();
            if handle.commands.send(ConductorCommand { wish: wish.clone(), answer }).await.is_err() {
                tracing::debug!(pool_id = %id, "already stopped");
            }
        }
        let all_rest = async {
            for handle in self.table().values() {
                let mut facts = handle.facts.clone();
                // The conductor ends, and with it the channel, once its drivers rest.
                while facts.changed().await.is_ok() {}
            }
            self.inner.memories.close();
            self.inner.memories.wait().await;
            if matches!(wish, Wish::Shutdown { .. }) {
                self.inner.strays.end().await;
            }
        };
        tokio::time::timeout(deadline, all_rest).await.is_ok()
    }

    /// An operation, and what tells how it goes on if its pool is there.
    fn find_operation(&self, id: &str) -> Result<(Option<watch::Receiver<PoolFacts>>, Operation), ControlError> {
        let among = |operations: &VecDeque<Operation>| operations.iter().find(|o| o.id == id).cloned();
        if let Some(o) = among(&self.inner.departed.borrow()) {
            return Ok((None, o));
        }
        for handle in self.table().values() {
            if let Some(o) = among(&handle.facts.borrow().operations) {
                return Ok((Some(handle.facts.clone()), o));
            }
        }
        Err(ControlError::OperationNotFound(id.to_owned()))
    }

    /// Leases and time move faster than operations are judged.
    fn at_present(&self, mut operation: Operation) -> Operation {
        let drains = matches!(operation.verb.as_str(), "drain" | "stop" | "remove" | "reload" | "rollback");
        if operation.state != OperationState::Running || !drains {
            return operation;
        }
        let Ok(handle) = self.handle(&operation.pool_id) else { return operation };
        let roster = handle.roster();
        let ends = |seat: &Seat| match seat.published.borrow().state {
            State::Draining { deadline, .. } => Some((deadline, u32::from(seat.admission.in_use()))),
            _ => None,
        };
        let draining: Vec<(Tick, u32)> = roster.seats.iter().filter_map(ends).collect();
        operation.left = draining.iter().map(|(deadline, _)| *deadline).max().map(|deadline| DrainLeft {
            leases: draining.iter().map(|(_, leases)| leases).sum(),
            time: deadline.since(self.inner.clock.now()),
        });
        if matches!(operation.verb.as_str(), "drain" | "stop") {
            let leases: u32 = roster.seats.iter().map(|s| u32::from(s.admission.in_use())).sum();
            operation.progress = format!("{}, {leases} leases left", operation.progress);
        }
        operation
    }

    /// Whether somebody over the API may have this pool: its name is its own, its engine takes its arguments (of which it
    /// may have had some before), its model is there, its masks can be, and it would fit if nobody else was there.
    async fn vet(&self, spec: &PoolSpec, source: &Source, had: &[String]) -> Result<(), ControlError> {
        let provisioner = &*self.inner.ports.provisioner;
        change::clash(&self.table(), |_| false, spec, source, provisioner)?;
        if spec.args == had {
            self.admits(spec)?;
        } else {
            provisioner.admits_from_api(spec).map_err(planning::not_admitted)?;
        }
        planning::permitted(spec, &*self.inner.ports.models)?;
        if provisioner.external(spec).is_some() {
            return Ok(());
        }
        let report = self.plan(PlanRequest::Spec(Box::new(spec.clone()))).await?;
        if report.fits || report.waiting_helps {
            return Ok(());
        }
        let remedies = report.remedies.iter().map(|r| format!("; {r}")).collect::<String>();
        Err(ControlError::Refused { code: "DOES_NOT_FIT".into(), detail: report.reason + &remedies })
    }

    /// The catalog says the last word; this says it before anything else is found wrong.
    fn refuse_of_file(&self, id: &PoolId) -> Result<(), ControlError> {
        match self.handle(id).map(|handle| handle.roster().standing.source.code()) {
            Ok("file") => Err(ControlError::PoolInFile(id.to_string())),
            _ => Ok(()),
        }
    }

    /// Whether the engine of a spec is there and may be given its arguments, and its model may be named.
    ///
    /// # Errors
    /// With the code of what cannot be.
    pub fn admits(&self, spec: &PoolSpec) -> Result<(), ControlError> {
        planning::admitted(spec, &*self.inner.ports.provisioner)?;
        planning::permitted(spec, &*self.inner.ports.models)
    }

    /// Drains a pool of the file and forgets it, because the file has it no more.
    ///
    /// # Errors
    /// When there is no such pool, or the daemon is stopping.
    pub async fn retire(&self, id: &PoolId) -> Result<Operation, ControlError> {
        let owner = Owner::File;
        self.order(|answer| Order::Remove { id: id.clone(), if_match: None, owner, answer }).await?
    }

    /// Who declared each pool.
    #[must_use]
    pub fn sources(&self) -> BTreeMap<PoolId, Source> {
        self.table().iter().map(|(id, handle)| (id.clone(), handle.roster().standing.source.clone())).collect()
    }

    /// The specs as they are now, for whoever must not keep the manager.
    #[must_use]
    pub fn specs(&self) -> Specs {
        Specs(Arc::downgrade(&self.inner))
    }

    async fn change(&self, handle: &PoolHandle, reload: Change) -> Result<Operation, ControlError> {
        let provisioner = &*self.inner.ports.provisioner;
        let new = reload.request.declared.as_ref().map(|(spec, _)| spec);
        if new.into_iter().chain([&*handle.spec()]).any(|spec| provisioner.external(spec).is_some()) {
            let why = "somebody else runs the engine of this pool: what it serves is changed there";
            return Err(ControlError::Conflict(why.into()));
        }
        change::begin(handle, reload).await
    }

    async fn order<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, ControlError> {
        let (answer, answered) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the daemon is stopping".into());
        self.inner.catalog.send(order(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    /// Resolves when the steward has gone round once more: whether it still does. A watchdog asks this.
    pub async fn answers(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        self.inner.steward.send(StewardCommand::Ping { answer }).await.is_ok() && answered.await.is_ok()
    }

    /// Resolves when a task that the manager cannot do without has met a bug. Nothing is started any more then.
    pub async fn broken(&self) {
        self.inner.broken.cancelled().await;
    }

    /// Events that did not fit their channel, and so are missing in logs and metrics.
    #[must_use]
    pub fn events_lost(&self) -> u64 {
        self.inner.events.lost()
    }
}

/// The specs of a manager's pools, as long as there is one.
#[derive(Debug, Clone)]
pub struct Specs(Weak<Inner>);

impl Specs {
    /// What a pool is now.
    #[must_use]
    pub fn of(&self, pool: &PoolId) -> Option<Arc<PoolSpec>> {
        Some(self.0.upgrade()?.table.borrow().get(pool)?.spec())
    }

    /// What all pools are now.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<PoolSpec>> {
        let Some(inner) = self.0.upgrade() else { return Vec::new() };
        let table = inner.table.borrow();
        table.values().map(PoolHandle::spec).collect()
    }
}

#[async_trait]
impl PoolControl for PoolManager {
    async fn node(&self) -> Result<NodeSnapshot, ControlError> {
        let inventory = self.inner.view.inventory();
        let told = self.inner.view.ledgered.borrow().clone();
        Ok(NodeSnapshot {
            simulated: inventory.simulated,
            driver: inventory.driver,
            cuda: inventory.cuda,
            xids: self.inner.view.conditions.borrow().xids.clone(),
            devices: inventory
                .devices
                .into_iter()
                .map(|mut d| {
                    let ours = told.promised.get(&d.uuid).copied().unwrap_or(0);
                    d.vram_foreign = d.vram_foreign.max(told.foreign.get(&d.uuid).copied().unwrap_or(0));
                    d.details.processes.iter_mut().for_each(|p| p.ours = told.pids.contains(&p.pid));
                    (d, ours)
                })
                .collect(),
            problem: inventory.problem,
            events_lost: self.events_lost(),
        })
    }

    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError> {
        Ok(self.table().values().map(|h| self.picture(h)).collect())
    }

    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError> {
        Ok(self.picture(&self.handle(id)?))
    }

    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError> {
        let handle = self.handle(id)?;
        let mut facts = handle.facts.clone();
        // Late or not, the newest picture is the answer.
        let _ = tokio::time::timeout(wait, facts.wait_for(|f| f.snapshot.snapshot > after)).await;
        Ok(self.picture(&handle))
    }

    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Preload).await
    }

    async fn drain(&self, id: &PoolId, options: DrainOptions) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Drain(options)).await
    }

    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Resume).await
    }

    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.wish(id, Wish::Stop).await
    }

    async fn declare(&self, declared: Declared, if_match: Option<u64>) -> Result<Operation, ControlError> {
        let (spec, document, source) = (declared.spec.clone(), declared.document.clone(), declared.source.clone());
        // A pool of the file may come before its model does, as when the daemon starts.
        if source == Source::Api {
            self.refuse_of_file(&spec.id)?;
            self.vet(&spec, &source, &[]).await?;
        }
        let ordered = self.order(|answer| Order::Declare { declared: Box::new(declared), if_match, answer }).await?;
        match ordered? {
            Declaring::New(operation) => Ok(operation),
            Declaring::Exists(handle) => {
                let request = ReloadRequest { declared: Some((spec, document)), if_match, ..ReloadRequest::default() };
                self.change(&handle, Change { request, source: Some(source) }).await
            }
        }
    }

    async fn remove(&self, id: &PoolId, if_match: Option<u64>) -> Result<Operation, ControlError> {
        let owner = Owner::Api;
        self.order(|answer| Order::Remove { id: id.clone(), if_match, owner, answer }).await?
    }

    async fn reload(&self, id: &PoolId, request: ReloadRequest) -> Result<Operation, ControlError> {
        let handle = self.handle(id)?;
        if let Some((spec, _)) = &request.declared {
            if spec.id != *id {
                return Err(ControlError::Conflict(format!(
                    "a pool keeps its name: `{id}` cannot become `{}`",
                    spec.id
                )));
            }
            let (source, had) = (handle.roster().standing.source.clone(), handle.spec());
            self.vet(spec, &source, &had.args).await?;
        }
        self.change(&handle, Change { request, source: None }).await
    }

    async fn rollback(&self, id: &PoolId) -> Result<Operation, ControlError> {
        let handle = self.handle(id)?;
        if handle.roster().standing.previous.is_none() {
            return Err(ControlError::Conflict(format!(
                "the pool `{id}` was not reloaded: there is nothing to go back to"
            )));
        }
        change::back(&handle).await
    }

    async fn document(&self, id: &PoolId) -> Result<(u64, String), ControlError> {
        let standing = Arc::clone(&self.handle(id)?.roster().standing);
        Ok((standing.revision, standing.document.clone()))
    }

    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError> {
        self.wish(id, Wish::ResetBreaker).await.map(|_| ())
    }

    async fn unfence(&self, device: &str) -> Result<(), ControlError> {
        let (answer, answered) = oneshot::channel();
        let stopping = || ControlError::Unreachable("the daemon is stopping".into());
        let command = StewardCommand::Unfence { device: device.to_owned(), answer };
        self.inner.steward.send(command).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())?
    }

    async fn operations(&self) -> Result<Vec<Operation>, ControlError> {
        let mut all: Vec<Operation> = self
            .table()
            .values()
            .flat_map(|h| h.facts.borrow().operations.iter().cloned().collect::<Vec<_>>())
            .map(|o| self.at_present(o))
            .collect();
        all.sort_by_key(|o| std::cmp::Reverse(o.started_at));
        Ok(all)
    }

    async fn operation(&self, id: &str) -> Result<Operation, ControlError> {
        self.find_operation(id).map(|(_, o)| self.at_present(o))
    }

    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError> {
        let (Some(mut facts), _) = self.find_operation(id)? else { return self.operation(id).await };
        let done =
            |f: &PoolFacts| f.operations.iter().find(|o| o.id == id).is_none_or(|o| o.state != OperationState::Running);
        let mut departed = self.inner.departed.clone();
        let over = async {
            if facts.wait_for(done).await.is_err() {
                // The pool is going: what became of it is told there.
                let _ = departed.wait_for(|all| all.iter().any(|o| o.id == id)).await;
            }
        };
        let _ = tokio::time::timeout(wait, over).await;
        self.operation(id).await
    }

    async fn lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError> {
        self.take_lease(id, request).await
    }

    async fn renew_for(&self, lease_id: &str, ttl: Option<Duration>, holder: Holder) -> Result<Lease, ControlError> {
        self.renew_lease(lease_id, ttl, holder).await
    }

    async fn leases(&self) -> Result<Vec<Lease>, ControlError> {
        Ok(self.held_leases().await)
    }

    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError> {
        let spec = match what {
            PlanRequest::Pool(id) => (*self.handle(&id)?.spec()).clone(),
            PlanRequest::Spec(spec) => *spec,
        };
        // What the pool holds already is there for it.
        let (devices, promised) = self.inner.view.devices_without(Some(&spec.id));
        let ports = &self.inner.ports;
        let from = Surroundings {
            models: &*ports.models,
            provisioner: &*ports.provisioner,
            ledger: Some(&*ports.ledger),
            devices: &devices,
            promised: &promised,
        };
        planning::report(&spec, from).await
    }

    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError> {
        if let Some(pool) = &request.pool {
            self.handle(pool)?;
        }
        let (devices, promised) = self.inner.view.devices_without(None);
        let pools: Vec<_> = self.table().values().map(|h| (h.spec(), self.picture(h))).collect();
        let pools = pools.iter().map(|(spec, picture)| (&**spec, picture.clone()));
        planning::placements(pools, &devices, &promised, request)
    }

    async fn release(&self, lease_id: &str) -> Result<(), ControlError> {
        self.release_lease(lease_id).await
    }
}
