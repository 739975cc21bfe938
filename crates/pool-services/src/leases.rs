//! The manager's verbs about leases.

use std::cmp::Reverse;
use std::time::Duration;

use pool_domain::lease_book::LeaseId;
use pool_domain::{PoolId, ReplicaKey};

use crate::admission::{Refused, SlotGuard};
use crate::control::ControlError;
use crate::events::EventKind;
use crate::lease::{Lease, LeaseRequest, MAX_NAME};
use crate::lease_desk::refusal;
use crate::manager::PoolManager;
use crate::roster::PoolHandle;

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

impl PoolManager {
    /// Takes a slot in this process; it is given back when the guard is dropped. Nobody who waits is passed.
    ///
    /// # Errors
    /// When no replica is Ready, every slot is taken, or somebody waits.
    pub fn allocate_lease(&self, id: &PoolId) -> Result<(ReplicaKey, SlotGuard), ControlError> {
        let handle = self.handle(id)?;
        let saturated = match self.grant(&handle) {
            Ok(granted) => return Ok(granted),
            Err(why) => (why == Refused::Saturated).then_some(Duration::from_secs(1)),
        };
        let picture = self.picture(&handle);
        let (error, reason) = refusal(&picture, saturated);
        if let (Some(seat), Some(lead)) = (handle.roster().serving().next(), picture.lead()) {
            let kind = EventKind::LeaseRefused { reason, holder: Default::default() };
            self.inner.events.send(&seat.key, lead.generation, kind);
        }
        Err(error)
    }

    /// The same, but waits this long for a slot, in the order of all who wait; a pool at rest that starts on demand is
    /// started. Dropping the future gives up the place.
    ///
    /// # Errors
    /// When there was no slot in time, or there will be none.
    pub async fn lease_guard(&self, id: &PoolId, wait: Duration) -> Result<(ReplicaKey, SlotGuard), ControlError> {
        let handle = self.handle(id)?;
        if let Ok(granted) = self.grant(&handle) {
            return Ok(granted);
        }
        handle.desk.guard(wait).await
    }

    fn grant(&self, handle: &PoolHandle) -> Result<(ReplicaKey, SlotGuard), Refused> {
        let granted = |key: &ReplicaKey, guard: SlotGuard| {
            self.inner.events.send(key, guard.generation(), EventKind::LeaseGranted { holder: Default::default() });
            (key.clone(), guard)
        };
        let roster = handle.roster();
        if let [seat] = &roster.seats[..] {
            return seat.admission.acquire().map(|guard| granted(&seat.key, guard));
        }
        let mut by_room: Vec<_> = roster.serving().collect();
        by_room.sort_by_key(|seat| (Reverse(seat.admission.free()), seat.key.replica));
        let mut why = Refused::Closed;
        for seat in by_room {
            match seat.admission.acquire() {
                Ok(guard) => return Ok(granted(&seat.key, guard)),
                Err(Refused::Saturated) => why = Refused::Saturated,
                Err(Refused::Closed) => {}
            }
        }
        Err(why)
    }

    pub(crate) async fn take_lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError> {
        let handle = self.handle(id)?;
        check_ttl(request.ttl, self.inner.max_lease_ttl)?;
        check_names(&request)?;
        handle.desk.lease(request).await
    }

    pub(crate) async fn renew_lease(&self, lease: &str, ttl: Option<Duration>) -> Result<Lease, ControlError> {
        let (handle, id) = self.desk_of(lease)?;
        ttl.map_or(Ok(()), |ttl| check_ttl(ttl, self.inner.max_lease_ttl))?;
        handle.desk.renew(id, ttl).await
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
            all.extend(desk.list().await);
        }
        all
    }
}
