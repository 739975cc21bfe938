//! Events on the wire, and in the log: one form is the source of both.

use std::time::{Duration, SystemTime};

use pool_services::{Event, EventKind, PoolSpec};
use serde::{Deserialize, Serialize};

macro_rules! event {
    ($($(#[$doc:meta])* $field:ident: $ty:ty,)*) => {
        /// Something that happened. What does not apply is left out.
        #[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
        pub struct EventView {
            /// What happened, as one word.
            pub event: String,
            /// The same in one sentence of at most 100 characters, without ids or secrets.
            pub human: String,
            /// When.
            pub at: String,
            /// The pool.
            #[serde(default, skip_serializing_if = "String::is_empty")]
            pub pool_id: String,
            /// Its replica.
            #[serde(default, skip_serializing_if = "String::is_empty")]
            pub replica_id: String,
            /// The replica's start attempt; 0 where it is about no replica.
            #[serde(default)]
            pub generation: u64,
            $($(#[$doc])* #[serde(default, skip_serializing_if = "Option::is_none")] pub $field: Option<$ty>,)*
        }
    };
}

event! {
    /// The pool's engine.
    engine: String,
    /// The version that the pool is pinned to.
    engine_version: String,
    /// The pool's model.
    model_id: String,
    /// A device.
    device: String,
    /// The error that the driver reported of it.
    xid: u64,
    /// How it stands by now.
    health: String,
    /// What somebody has to do about it.
    verdict: String,
    /// The state that was left.
    from: String,
    /// The state that was entered.
    to: String,
    /// A job of the client.
    job_id: String,
    /// A conversation.
    session_id: String,
    /// Whose it is.
    tenant_id: String,
    /// The request's name.
    correlation_id: String,
    /// How many wait before it.
    queue_position: u64,
    /// Until the next start.
    backoff_ms: u64,
    /// Failures in a row.
    failures: u64,
    /// Class of the failure.
    class: String,
    /// What happened to the engine.
    last_error: String,
    /// Why, as one word or a sentence.
    reason: String,
    /// How it ended.
    outcome: String,
    /// How long it took, or lasted.
    took_ms: u64,
    /// Until the engine began to answer.
    first_byte_ms: u64,
    /// What came from the engine.
    bytes_out: u64,
    /// Tokens of the request, where the engine told.
    tokens_in: u64,
    /// Tokens of the answer, where the engine told.
    tokens_out: u64,
    /// From the first token of the answer to the last.
    decode_time_ms: u64,
    /// Bytes of a model that are here.
    bytes_here: u64,
    /// Of so many in all, where that is known.
    bytes_total: u64,
    /// Leases that are held.
    leases: u64,
    /// Time that they have.
    deadline_ms: u64,
    /// The pool that another gives way to.
    by_pool_id: String,
    /// The pools that give way.
    pools: Vec<String>,
}

fn millis(d: Duration) -> Option<u64> {
    Some(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl EventView {
    /// An event of a pool that is this, at this time.
    #[must_use]
    pub fn new(event: &Event, spec: Option<&PoolSpec>, at: SystemTime) -> Self {
        let holder = event.holder();
        let text = |name: fn(&pool_domain::Holder) -> Option<&std::sync::Arc<str>>| {
            holder.and_then(name).map(ToString::to_string)
        };
        let mut view = Self {
            event: event.code().to_owned(),
            human: event.human(),
            at: super::to_wire::time(at),
            pool_id: event.key.as_ref().map(|key| key.pool.to_string()).unwrap_or_default(),
            replica_id: event.key.as_ref().map(|key| key.replica.to_string()).unwrap_or_default(),
            generation: event.generation.0,
            engine: spec.map(|s| s.engine.to_string()),
            engine_version: spec.map(|s| s.version.clone()).filter(|v| !v.is_empty()),
            model_id: spec.map(|s| s.model.model_id()),
            job_id: text(|h| h.job_id.as_ref()),
            session_id: text(|h| h.session_id.as_ref()),
            tenant_id: text(|h| h.tenant_id.as_ref()),
            ..Self::default()
        };
        view.tell(&event.kind);
        view
    }

    fn failed(&mut self, failure: &pool_domain::Failure) {
        self.class = Some(failure.class.code().to_owned());
        self.last_error = Some(failure.to_string());
    }

    fn tell(&mut self, kind: &EventKind) {
        match kind {
            EventKind::StateChanged { from, to } => {
                (self.from, self.to) = (Some((*from).to_owned()), Some((*to).to_owned()));
            }
            EventKind::BecameReady { took } => self.took_ms = millis(*took),
            EventKind::ModelFetching { done, total } => (self.bytes_here, self.bytes_total) = (Some(*done), *total),
            EventKind::ModelFetched { bytes, took } => {
                (self.bytes_here, self.bytes_total, self.took_ms) = (Some(*bytes), Some(*bytes), millis(*took));
            }
            EventKind::EngineFailed { failure, nth } => {
                self.failed(failure);
                self.failures = Some(u64::from(*nth));
            }
            EventKind::Suspected { failure } => self.failed(failure),
            EventKind::RestartPlanned { delay, failure, nth } => {
                self.failed(failure);
                (self.backoff_ms, self.failures) = (millis(*delay), Some(u64::from(*nth)));
            }
            EventKind::StartDelayed { delay: wait } | EventKind::BreakerOpened { pause: wait } => {
                self.backoff_ms = millis(*wait);
            }
            EventKind::DrainStarted { leases, deadline } => {
                (self.leases, self.deadline_ms) = (Some(u64::from(*leases)), millis(*deadline));
            }
            EventKind::DrainEnded { outcome, took } => {
                (self.outcome, self.took_ms) = (Some((*outcome).to_owned()), millis(*took));
            }
            EventKind::Fenced { left } => self.reason = Some(format!("{left:?}").to_lowercase()),
            EventKind::DeviceSuspected { device } | EventKind::DeviceReadmitted { device } => {
                self.device = Some(device.clone());
            }
            EventKind::DeviceIncident { device, xid, verdict, .. } => {
                (self.device, self.xid) = (Some(device.clone()), Some(*xid));
                self.verdict = Some(verdict.code().to_owned());
            }
            EventKind::DeviceHealthChanged { device, health, reason, verdict } => {
                (self.device, self.health) = (Some(device.clone()), Some((*health).to_owned()));
                self.reason = (!reason.is_empty()).then(|| reason.clone());
                self.verdict = Some(verdict.code().to_owned());
            }
            EventKind::EvictionPlanned { plan, pools } => {
                (self.reason, self.pools) = (Some(plan.clone()), Some(pools.clone()));
            }
            EventKind::Evicted { by } => self.by_pool_id = Some(by.clone()),
            EventKind::IdleStopped { after } => self.took_ms = millis(*after),
            EventKind::ReloadUndone { why } => self.reason = Some(why.clone()),
            EventKind::LeaseQueued { position, .. } => self.queue_position = Some(*position as u64),
            EventKind::LeaseRefused { reason, .. } => self.reason = Some((*reason).to_owned()),
            EventKind::LeaseReleased { after, .. }
            | EventKind::LeaseExpired { after, .. }
            | EventKind::LeaseRevoked { after, .. } => self.took_ms = millis(*after),
            EventKind::StreamStarted { request, .. } => self.correlation_id = Some(request.to_string()),
            EventKind::StreamEnded {
                request,
                outcome,
                took,
                first_byte,
                bytes,
                tokens_in,
                tokens_out,
                decode,
                holder: _,
            } => {
                (self.tokens_in, self.tokens_out) = (*tokens_in, *tokens_out);
                self.decode_time_ms = decode.and_then(millis);
                self.correlation_id = Some(request.to_string());
                (self.outcome, self.took_ms) = (Some((*outcome).to_owned()), millis(*took));
                (self.first_byte_ms, self.bytes_out) = (millis(*first_byte), Some(*bytes));
            }
            EventKind::Started
            | EventKind::Restarting
            | EventKind::BreakerHalfOpen
            | EventKind::BreakerClosed
            | EventKind::Stopped
            | EventKind::Unfenced
            | EventKind::BroughtBack
            | EventKind::ReloadStarted
            | EventKind::Reloaded
            | EventKind::ReloadBroken
            | EventKind::LeaseGranted { .. }
            | EventKind::LeaseRenewed { .. } => {}
        }
    }
}

/// A server-sent event: its fields, as a browser's `EventSource` gives them.
#[cfg(feature = "server")]
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct EventFrame {
    /// Where to go on, as `Last-Event-ID`.
    pub id: Option<String>,
    /// What it is. `gap` says that something in between is not kept any more.
    pub event: Option<String>,
    /// Of an event the JSON of an `EventView`, of a log one line.
    pub data: String,
}
