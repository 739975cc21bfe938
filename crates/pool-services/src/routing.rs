//! A slot and the way to the engine behind it, for whoever sends requests on within this process.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::{Generation, Holder, PoolId, ReplicaKey};
use tokio::time::Instant;

use crate::admission::{Admission, SlotGuard};
use crate::api_key::ApiKey;
use crate::control::ControlError;
use crate::events::EventKind;
use crate::lease::{Lease, MAX_WAIT};
use crate::manager::PoolManager;
use crate::roster::{PoolHandle, Seat};

/// Where answers of one engine are counted: that they flow shows that it gets on.
#[derive(Debug, Clone)]
pub struct Flow(Arc<Admission>);

impl Flow {
    /// Of the engine behind this word.
    #[must_use]
    pub fn of(admission: Arc<Admission>) -> Self {
        Self(admission)
    }

    /// Something came from it.
    pub fn moved(&self) {
        self.0.flowed();
    }

    /// An answer of it began this long after it had the request.
    pub fn began(&self, after: Duration) {
        self.0.seen().began(after);
    }

    /// After the first token of an answer so many came within this.
    pub fn decoded(&self, took: Duration, tokens: u64) {
        self.0.seen().decoded(took, tokens);
    }
}

/// A slot, and where it leads. The slot is given back on drop.
#[derive(Debug)]
pub struct Route {
    /// Whose engine.
    pub key: ReplicaKey,
    /// Which of its engines.
    pub generation: Generation,
    /// Base URL of the engine.
    pub endpoint: String,
    /// What it wants to hear.
    pub api_key: Option<ApiKey>,
    /// Told of what comes from it.
    pub flow: Flow,
    /// The slot; none where a lease that somebody else holds is used.
    pub slot: Option<SlotGuard>,
}

/// Who serves which model, and the way there.
#[async_trait]
pub trait Routing: fmt::Debug + Send + Sync {
    /// The pools that go by this name, the one with most room first: the pool of that name itself, else those with such an
    /// alias, else those with such a model.
    fn named(&self, model: &str) -> Result<Vec<PoolId>, ControlError>;
    /// A slot of the pool, waiting for one at most this long; a pool at rest that starts on demand is started. Dropping
    /// the future gives up the place.
    async fn route(&self, pool: &PoolId, wait: Duration, holder: &Holder) -> Result<Route, ControlError>;
    /// The way to the engine of a lease, which goes on from now for as long as it was to last.
    async fn follow(&self, lease_id: &str, holder: &Holder) -> Result<(Lease, Route), ControlError>;
    /// Tells what happened on the way.
    fn tell(&self, key: &ReplicaKey, generation: Generation, kind: EventKind);
}

/// The way to the engine that the guard is of, if it is the one that is shown.
fn way(seat: &Seat, guard: SlotGuard) -> Option<Route> {
    let shown = seat.published.borrow();
    let generation = shown.snapshot.generation;
    let endpoint = shown.snapshot.endpoint.clone().filter(|_| guard.is_of(generation))?;
    let (flow, api_key) = (Flow(Arc::clone(&seat.admission)), shown.api_key.clone());
    Some(Route { key: seat.key.clone(), generation, endpoint, api_key, flow, slot: Some(guard) })
}

fn seat_of<'a>(seats: &'a [Seat], key: &ReplicaKey) -> Option<&'a Seat> {
    seats.iter().find(|seat| seat.key == *key)
}

/// How good a pool is for the next request: less is better.
fn rank(handle: &PoolHandle) -> (bool, bool, u32) {
    let roster = handle.roster.borrow();
    let free: u32 = roster.serving().map(|seat| u32::from(seat.admission.free())).sum();
    let serves = roster.serving().any(|seat| seat.published.borrow().snapshot.ready);
    (free == 0, !serves, handle.desk.waiting())
}

#[async_trait]
impl Routing for PoolManager {
    fn named(&self, model: &str) -> Result<Vec<PoolId>, ControlError> {
        let table = self.inner.table.borrow();
        if let Some((id, _)) = table.iter().find(|(id, _)| id.as_str() == model) {
            return Ok(vec![id.clone()]);
        }
        let whose = |goes_by: fn(&crate::spec::PoolSpec, &str) -> bool| {
            let mut found: Vec<_> = table
                .iter()
                .filter(|(_, handle)| goes_by(&handle.roster.borrow().spec, model))
                .map(|(id, handle)| (rank(handle), id.clone()))
                .collect();
            found.sort();
            found.into_iter().map(|(_, id)| id).collect::<Vec<_>>()
        };
        let by_alias = whose(|spec, model| spec.aliases.iter().any(|alias| alias == model));
        Ok(if by_alias.is_empty() { whose(|spec, model| spec.model.model_id() == model) } else { by_alias })
    }

    async fn route(&self, pool: &PoolId, wait: Duration, holder: &Holder) -> Result<Route, ControlError> {
        let until = Instant::now() + wait.min(MAX_WAIT);
        loop {
            let handle = self.handle(pool)?;
            let (key, guard) = match self.grant(pool)? {
                Ok(granted) => granted,
                Err(_) => handle.desk.guard(until.saturating_duration_since(Instant::now()), holder).await?,
            };
            let roster = handle.roster();
            if let Some(route) = seat_of(&roster.seats, &key).and_then(|seat| way(seat, guard)) {
                return Ok(route);
            }
            // Its engine came or went in this moment; by the desk's picture it is known by then.
            if Instant::now() >= until {
                return Err(ControlError::unready("it is changing its state"));
            }
            tokio::task::yield_now().await;
        }
    }

    async fn follow(&self, lease_id: &str, holder: &Holder) -> Result<(Lease, Route), ControlError> {
        let lease = self.renew_lease(lease_id, None, holder.clone()).await?;
        let key = ReplicaKey { pool: lease.pool_id.clone(), replica: lease.replica_id };
        let roster = self.handle(&lease.pool_id)?.roster();
        let seat = seat_of(&roster.seats, &key).ok_or_else(|| ControlError::LeaseNotFound(lease_id.to_owned()))?;
        let flow = Flow(Arc::clone(&seat.admission));
        let (generation, endpoint, api_key) = (lease.generation, lease.endpoint.clone(), lease.api_key.clone());
        Ok((lease, Route { key, generation, endpoint, api_key, flow, slot: None }))
    }

    fn tell(&self, key: &ReplicaKey, generation: Generation, kind: EventKind) {
        self.inner.events.send(key, generation, kind);
    }
}
