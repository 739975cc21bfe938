//! The manager's verbs about leases.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use pool_domain::lease_book::LeaseId;
use pool_domain::{Holder, PoolId, ReplicaId, ReplicaKey};
use tokio::sync::watch;

use crate::admission::{Refused, SlotGuard};
use crate::control::ControlError;
use crate::lease::{Lease, LeaseRequest, MAX_NAME};
use crate::lease_desk::refusal;
use crate::manager::PoolManager;
use crate::roster::{PoolHandle, Roster, Seat};
use crate::tally::Tally;

fn invalid(detail: String) -> ControlError {
    ControlError::Refused { code: "INVALID_PARAMS".into(), detail }
}

fn check_ttl(ttl: Duration, max: Duration) -> Result<(), ControlError> {
    if ttl.is_zero() || ttl > max {
        let (asked, max) = (ttl.as_millis(), max.as_millis());
        return Err(invalid(format!("ttl_ms {asked} is outside 1 to {max}: ask for less, and renew the lease")));
    }
    Ok(())
}

fn check_names(request: &LeaseRequest) -> Result<(), ControlError> {
    let holder = &request.holder;
    let names = [
        ("job_id", &holder.job_id),
        ("session_id", &holder.session_id),
        ("tenant_id", &holder.tenant_id),
        ("idempotency_key", &request.key),
    ];
    for (what, name) in names {
        let Some(name) = name else { continue };
        if name.is_empty() || name.chars().count() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(invalid(format!("{what} is to have 1 to {MAX_NAME} characters, and none that is not printed")));
        }
    }
    Ok(())
}

/// Where most is free.
fn take_slot(roster: &Roster) -> Result<(&Seat, SlotGuard), Refused> {
    if let [seat] = &roster.seats[..] {
        return Ok((seat, seat.admission.acquire()?));
    }
    let mut by_room: Vec<_> = roster.serving().collect();
    by_room.sort_by_key(|seat| (Reverse(seat.admission.free()), seat.key.replica));
    let mut why = Refused::Closed;
    for seat in by_room {
        match seat.admission.acquire() {
            Ok(guard) => return Ok((seat, guard)),
            Err(Refused::Saturated) => why = Refused::Saturated,
            Err(Refused::Closed) => {}
        }
    }
    Err(why)
}

/// The slots of one pool, for whoever takes many of them: the pool is looked up once, and what is taken here touches
/// nothing that another pool's is counted or kept in.
#[derive(Debug, Clone)]
pub struct Slots {
    roster: watch::Receiver<Arc<Roster>>,
    seen: Arc<Roster>,
    tally: Arc<Tally>,
}

impl Slots {
    /// Takes a slot of this replica; it is given back when the guard is dropped. Nobody who waits is passed.
    ///
    /// # Errors
    /// When no replica is Ready (or the pool is no more), every slot is taken, or somebody waits.
    pub fn take(&mut self) -> Result<(ReplicaId, SlotGuard), Refused> {
        let taken = match self.roster.has_changed() {
            Ok(changed) => {
                if changed {
                    self.seen = Arc::clone(&self.roster.borrow_and_update());
                }
                take_slot(&self.seen).map(|(seat, guard)| (seat.key.replica, guard))
            }
            Err(_) => Err(Refused::Closed),
        };
        self.tally.count(&taken);
        taken
    }
}

impl PoolManager {
    /// The slots of a pool, for whoever takes many.
    ///
    /// # Errors
    /// When there is no such pool.
    pub fn slots(&self, id: &PoolId) -> Result<Slots, ControlError> {
        let PoolHandle { roster, desk, .. } = self.handle(id)?;
        let mut roster = roster;
        let seen = Arc::clone(&roster.borrow_and_update());
        Ok(Slots { roster, seen, tally: desk.tally })
    }

    /// Takes a slot in this process; it is given back when the guard is dropped. Nobody who waits is passed.
    ///
    /// # Errors
    /// When no replica is Ready, every slot is taken, or somebody waits.
    pub fn allocate_lease(&self, id: &PoolId) -> Result<(ReplicaKey, SlotGuard), ControlError> {
        let why = match self.grant(id)? {
            Ok(granted) => return Ok(granted),
            Err(why) => why,
        };
        let handle = self.handle(id)?;
        handle.desk.tally.refused(why);
        let saturated = (why == Refused::Saturated).then_some(Duration::from_secs(1));
        Err(refusal(&self.picture(&handle), saturated).0)
    }

    /// The same, but waits this long for a slot, in the order of all who wait; a pool at rest that starts on demand is
    /// started. Dropping the future gives up the place.
    ///
    /// # Errors
    /// When there was no slot in time, or there will be none.
    pub async fn lease_guard(&self, id: &PoolId, wait: Duration) -> Result<(ReplicaKey, SlotGuard), ControlError> {
        if let Ok(granted) = self.grant(id)? {
            return Ok(granted);
        }
        self.handle(id)?.desk.guard(wait, &Holder::default()).await
    }

    /// A slot, if there is one now. Told as a count, not as an event.
    pub(crate) fn grant(&self, id: &PoolId) -> Result<Result<(ReplicaKey, SlotGuard), Refused>, ControlError> {
        let table = self.inner.table.borrow();
        let handle = table.get(id).ok_or_else(|| ControlError::PoolNotFound(id.to_string()))?;
        let roster = handle.roster.borrow();
        let granted = take_slot(&roster).map(|(seat, guard)| (seat.key.clone(), guard));
        Ok(granted.inspect(|_| handle.desk.tally.granted()))
    }

    pub(crate) async fn take_lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError> {
        let handle = self.handle(id)?;
        check_ttl(request.ttl, self.inner.max_lease_ttl)?;
        check_names(&request)?;
        handle.desk.lease(request).await
    }

    pub(crate) async fn renew_lease(
        &self,
        lease: &str,
        ttl: Option<Duration>,
        holder: Holder,
    ) -> Result<Lease, ControlError> {
        let (handle, id) = self.desk_of(lease)?;
        ttl.map_or(Ok(()), |ttl| check_ttl(ttl, self.inner.max_lease_ttl))?;
        handle.desk.renew(id, ttl, holder).await
    }

    pub(crate) async fn release_lease(&self, lease: &str) -> Result<(), ControlError> {
        let (handle, id) = self.desk_of(lease)?;
        handle.desk.release(id).await
    }

    fn desk_of(&self, lease: &str) -> Result<(PoolHandle, LeaseId), ControlError> {
        let unknown = || ControlError::LeaseNotFound(lease.to_owned());
        let id: LeaseId = lease.parse().map_err(|_| unknown())?;
        let handle = self.handle(&id.pool).map_err(|_| unknown())?;
        Ok((handle, id))
    }

    pub(crate) async fn held_leases(&self) -> Vec<Lease> {
        let desks: Vec<_> = self.table().values().map(|h| h.desk.clone()).collect();
        let mut all = Vec::new();
        for desk in desks {
            // Who looks at leases need not be the one who may use them.
            all.extend(desk.list().await.into_iter().map(|lease| Lease { api_key: None, ..lease }));
        }
        all
    }
}
