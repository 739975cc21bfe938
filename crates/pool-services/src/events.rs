//! One event type, the source of log lines, event streams and metrics.

use std::sync::Arc;
use std::time::Duration;

use pool_domain::lifecycle::Left;
use pool_domain::xid::XidAction;
use pool_domain::{Failure, Generation, Holder, ReplicaKey, Verdict};

/// Something worth telling.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whom it concerns; unset where it is about the node alone.
    pub key: Option<ReplicaKey>,
    /// Its generation.
    pub generation: Generation,
    /// What happened.
    pub kind: EventKind,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// A state was left for another.
    StateChanged {
        /// Before.
        from: &'static str,
        /// After.
        to: &'static str,
    },
    /// The process was launched.
    Started,
    /// A model is being fetched; told now and then.
    ModelFetching {
        /// Bytes that are there.
        done: u64,
        /// Bytes in all, where that is known.
        total: Option<u64>,
    },
    /// A model that had to be fetched is there.
    ModelFetched {
        /// Its bytes.
        bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// The engine proved that it serves.
    BecameReady {
        /// Since the start attempt began.
        took: Duration,
    },
    /// The engine failed.
    EngineFailed {
        /// How.
        failure: Failure,
        /// How often in a row.
        nth: u32,
    },
    /// Two checks in a row failed: nothing is granted until one passes.
    Suspected {
        /// How.
        failure: Failure,
    },
    /// A start after a failure begins.
    Restarting,
    /// A restart is planned.
    RestartPlanned {
        /// When.
        delay: Duration,
        /// Why it is needed.
        failure: Failure,
        /// Failures in a row.
        nth: u32,
    },
    /// A start has to wait for what failures earned before it was asked for, perhaps those of an earlier daemon.
    StartDelayed {
        /// How long.
        delay: Duration,
    },
    /// The breaker opened.
    BreakerOpened {
        /// For how long.
        pause: Duration,
    },
    /// The breaker lets one start through.
    BreakerHalfOpen,
    /// The breaker closed.
    BreakerClosed,
    /// A drain began.
    DrainStarted {
        /// Leases still held.
        leases: u32,
        /// Time they have.
        deadline: Duration,
    },
    /// A drain ended.
    DrainEnded {
        /// `drained`, `forced`, `aborted`, `resumed`, `crashed`.
        outcome: &'static str,
        /// Time it took.
        took: Duration,
    },
    /// Nothing of the engine is left.
    Stopped,
    /// Something may be left.
    Fenced {
        /// Of what.
        left: Left,
    },
    /// A person says that nothing is.
    Unfenced,
    /// Engines of several pools failed on a device: nothing new starts there until its probation ends.
    DeviceSuspected {
        /// Its UUID.
        device: String,
    },
    /// The driver reported an error of a device that the replica uses.
    DeviceIncident {
        /// UUID of the GPU or slice.
        device: String,
        /// Its number; 48 for an error of memory that was not corrected.
        xid: u64,
        /// What follows.
        action: XidAction,
        /// What somebody has to do.
        verdict: Verdict,
    },
    /// A device is otherwise than it was, whoever found out.
    DeviceHealthChanged {
        /// UUID of the GPU or slice.
        device: String,
        /// Its health as one word.
        health: &'static str,
        /// Why, empty where it is well.
        reason: String,
        /// What somebody has to do.
        verdict: Verdict,
    },
    /// A device is used again.
    DeviceReadmitted {
        /// Its UUID.
        device: String,
    },
    /// A start needs memory that idle engines hold.
    EvictionPlanned {
        /// The plan in words.
        plan: String,
        /// Pools that give way.
        pools: Vec<String>,
    },
    /// An idle engine is stopped so that another can start.
    Evicted {
        /// The pool it gives way to.
        by: String,
    },
    /// What gave way comes back, because the start that it was for failed.
    BroughtBack,
    /// Nobody used it for as long as its pool says.
    IdleStopped {
        /// How long nobody used it.
        after: Duration,
    },
    /// A reload began.
    ReloadStarted,
    /// The new serves.
    Reloaded,
    /// The old serves as before.
    ReloadUndone {
        /// Why not the new.
        why: String,
    },
    /// The new failed, and so did the way back.
    ReloadBroken,
    /// A lease was granted.
    LeaseGranted {
        /// For whom.
        holder: Holder,
    },
    /// A lease is waited for.
    LeaseQueued {
        /// How many are before it.
        position: usize,
        /// For whom it would be.
        holder: Holder,
    },
    /// A lease was refused.
    LeaseRefused {
        /// Why, as one word.
        reason: &'static str,
        /// For whom it would have been.
        holder: Holder,
    },
    /// A lease was given back.
    LeaseReleased {
        /// For whom it was.
        holder: Holder,
        /// How long it was held.
        after: Duration,
    },
    /// A lease was neither renewed nor given back.
    LeaseExpired {
        /// For whom it was.
        holder: Holder,
        /// How long it was held.
        after: Duration,
    },
    /// A lease goes on.
    LeaseRenewed {
        /// For whom it is.
        holder: Holder,
    },
    /// A lease ended with its engine.
    LeaseRevoked {
        /// For whom it was.
        holder: Holder,
        /// How long it was held.
        after: Duration,
    },
    /// An answer begins to be streamed through the gateway.
    StreamStarted {
        /// The request's name, for finding it again.
        request: Arc<str>,
        /// For whom it is.
        holder: Holder,
    },
    /// It ended.
    StreamEnded {
        /// The request's name, for finding it again.
        request: Arc<str>,
        /// For whom it was.
        holder: Holder,
        /// `done`, `cancelled` (its client went away) or `engine_failed`.
        outcome: &'static str,
        /// Since the request was there.
        took: Duration,
        /// Until the engine began to answer.
        first_byte: Duration,
        /// Bytes that came from the engine.
        bytes: u64,
        /// Tokens of the request, where the engine told.
        tokens_in: Option<u64>,
        /// Tokens of the answer, where the engine told.
        tokens_out: Option<u64>,
        /// From the first token to the last.
        decode: Option<Duration>,
    },
}

/// Longest sentence, and how much of a pool's name it has, in characters.
const SENTENCE: usize = 100;
const NAME: usize = 24;

fn ordinal(n: u32) -> String {
    match n {
        0 | 1 => "for the first time".into(),
        2 => "for the second time".into(),
        3 => "for the third time".into(),
        n @ 4..=99 => format!("for the {n}th time"),
        _ => "more than 99 times".into(),
    }
}

fn seconds(d: Duration) -> String {
    match d.as_secs() {
        0..10 => format!("{:.1} s", d.as_secs_f64()),
        s @ 10..600 => format!("{s} s"),
        s @ 600..7200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3600),
    }
}

/// Bytes, for people.
pub(crate) fn size(bytes: u64) -> String {
    let (mib, gib) = (f64::from(1u32 << 20), f64::from(1u32 << 30));
    let bytes = bytes as f64;
    if bytes < mib {
        format!("{:.0} KiB", bytes / 1024.0)
    } else if bytes < gib {
        format!("{:.0} MiB", bytes / mib)
    } else {
        format!("{:.1} GiB", bytes / gib)
    }
}

/// How much of something is done.
pub(crate) fn amount(done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) => format!("{} of {}", size(done), size(total)),
        None => size(done),
    }
}

impl Event {
    /// One plain sentence of at most 100 characters, without ids or secrets.
    #[must_use]
    pub fn human(&self) -> String {
        let pool = self.key.as_ref().map_or("", |key| key.pool.as_str());
        let name = |most: usize| pool.chars().take(most).collect::<String>();
        let text = self.sentence(&name(NAME));
        // Rather a shorter name than half a sentence.
        let over = text.chars().count().saturating_sub(SENTENCE);
        if over == 0 { text } else { self.sentence(&name(NAME.saturating_sub(over))).chars().take(SENTENCE).collect() }
    }

    fn sentence(&self, pool: &str) -> String {
        match &self.kind {
            EventKind::StateChanged { from, to } => format!("The {pool} pool went from {from} to {to}"),
            EventKind::Started => format!("Launched an engine for the {pool} pool"),
            EventKind::ModelFetching { done, total } => {
                format!("Fetching the model of the {pool} pool: {}", amount(*done, *total))
            }
            EventKind::ModelFetched { bytes, took } => {
                format!("Fetched the model of the {pool} pool, {}, in {}", size(*bytes), seconds(*took))
            }
            EventKind::BecameReady { took } => {
                format!("The {pool} pool proved that it serves after {}", seconds(*took))
            }
            EventKind::EngineFailed { failure, nth } => {
                format!("The engine of the {pool} pool {} {}", failure.class.human(), ordinal(*nth))
            }
            EventKind::Suspected { failure } => {
                format!("The {pool} pool gives no slots at present: its engine {}", failure.class.human())
            }
            EventKind::Restarting => format!("Restarting the engine of the {pool} pool"),
            EventKind::RestartPlanned { delay, failure, nth } => format!(
                "Restarting the {pool} pool in {} after its engine {} {}",
                seconds(*delay),
                failure.class.human(),
                ordinal(*nth)
            ),
            EventKind::StartDelayed { delay } => {
                format!("Starting the {pool} pool in {}: its engine failed before", seconds(*delay))
            }
            EventKind::BreakerOpened { pause } => {
                format!("Not restarting the {pool} pool for {}: its engine keeps failing", seconds(*pause))
            }
            EventKind::BreakerHalfOpen => format!("Trying to start the {pool} pool once more"),
            EventKind::BreakerClosed => format!("The {pool} pool has recovered"),
            EventKind::DrainStarted { leases, deadline } => {
                format!("Draining the {pool} pool: {leases} leases have {} to finish", seconds(*deadline))
            }
            EventKind::DrainEnded { outcome, took } => {
                format!("The drain of the {pool} pool ended ({outcome}) after {}", seconds(*took))
            }
            EventKind::Stopped => format!("The engine of the {pool} pool is gone"),
            EventKind::Fenced { left: Left::Processes } => {
                format!("Something of the {pool} pool's engine may be left: its devices are fenced")
            }
            EventKind::Fenced { left: Left::Memory } => {
                format!("Memory of the {pool} pool's engine has not come back: its devices are fenced")
            }
            EventKind::Unfenced => format!("Somebody says that nothing of the {pool} pool's engine is left"),
            EventKind::DeviceSuspected { .. } => {
                "Engines of several pools failed on one GPU: nothing new starts there until its probation ends".into()
            }
            EventKind::DeviceIncident { xid, action, .. } => format!(
                "The driver reports XID {xid} of a GPU {}: {}",
                if pool.is_empty() { "that no pool uses".to_owned() } else { format!("of the {pool} pool") },
                match action {
                    XidAction::Ignore => "nothing follows",
                    XidAction::RestartEngine => "its engine starts again",
                    XidAction::Suspect => "nothing new starts there",
                    XidAction::Drain => "it is drained",
                    XidAction::Lost => "it is lost",
                }
            ),
            EventKind::DeviceHealthChanged { health: "ok", .. } => "A GPU is well again".into(),
            EventKind::DeviceHealthChanged { health, verdict, .. } => {
                let what = match *health {
                    "suspect" => "is suspect: nothing new starts there",
                    "draining" => "is being drained",
                    "fenced" => "is fenced",
                    "lost" => "is lost",
                    _ => "is in a state that is not known",
                };
                let advice = verdict.advice();
                format!("A GPU {what}{}{advice}", if advice.is_empty() { "" } else { "; " })
            }
            EventKind::DeviceReadmitted { .. } => "A GPU that was not well is used again".into(),
            EventKind::EvictionPlanned { pools, .. } => {
                let first: String = pools.first().map(|p| p.chars().take(24).collect()).unwrap_or_default();
                let more = if pools.len() > 1 { " and others" } else { "" };
                format!("The {first} pool{more} gives way to the {pool} pool")
            }
            EventKind::Evicted { .. } => format!("Stopping the idle {pool} pool: another needs its memory"),
            EventKind::BroughtBack => format!("Bringing the {pool} pool back: the start it gave way to failed"),
            EventKind::IdleStopped { after } => {
                format!("Stopping the {pool} pool: nobody used it for {}", seconds(*after))
            }
            EventKind::ReloadStarted => format!("Reloading the {pool} pool"),
            EventKind::Reloaded => format!("The {pool} pool was reloaded"),
            EventKind::ReloadUndone { .. } => format!("The reload of the {pool} pool failed: it is as it was"),
            EventKind::ReloadBroken => format!("The reload of the {pool} pool failed, and so did the way back"),
            EventKind::LeaseGranted { .. } => format!("Granted a slot of the {pool} pool"),
            EventKind::LeaseQueued { position, .. } => {
                format!("Somebody waits for a slot of the {pool} pool, behind {position} others")
            }
            EventKind::LeaseRefused { reason, .. } => format!("Refused a slot of the {pool} pool: {reason}"),
            EventKind::LeaseReleased { after, .. } => {
                format!("A slot of the {pool} pool was given back after {}", seconds(*after))
            }
            EventKind::LeaseExpired { after, .. } => {
                format!("A lease of the {pool} pool expired after {}", seconds(*after))
            }
            EventKind::LeaseRenewed { .. } => format!("A lease of the {pool} pool goes on"),
            EventKind::LeaseRevoked { after, .. } => {
                format!("A lease of the {pool} pool ended with its engine, after {}", seconds(*after))
            }
            EventKind::StreamStarted { .. } => format!("The {pool} pool streams an answer"),
            EventKind::StreamEnded { outcome, took, .. } => {
                let how = match *outcome {
                    "cancelled" => "was given up by its client",
                    "engine_failed" => "broke off with its engine",
                    _ => "ended",
                };
                format!("An answer of the {pool} pool {how} after {}", seconds(*took))
            }
        }
    }

    /// For whom the lease is, where it is about one.
    #[must_use]
    pub fn holder(&self) -> Option<&Holder> {
        match &self.kind {
            EventKind::LeaseGranted { holder }
            | EventKind::LeaseQueued { holder, .. }
            | EventKind::LeaseRefused { holder, .. }
            | EventKind::LeaseReleased { holder, .. }
            | EventKind::LeaseExpired { holder, .. }
            | EventKind::LeaseRenewed { holder }
            | EventKind::LeaseRevoked { holder, .. }
            | EventKind::StreamStarted { holder, .. }
            | EventKind::StreamEnded { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// The event as one word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self.kind {
            EventKind::StateChanged { .. } => "state_changed",
            EventKind::Started => "started",
            EventKind::ModelFetching { .. } => "model_fetching",
            EventKind::ModelFetched { .. } => "model_fetched",
            EventKind::BecameReady { .. } => "became_ready",
            EventKind::EngineFailed { .. } => "engine_failed",
            EventKind::Suspected { .. } => "suspected",
            EventKind::Restarting => "restarting",
            EventKind::RestartPlanned { .. } => "restart_planned",
            EventKind::StartDelayed { .. } => "start_delayed",
            EventKind::BreakerOpened { .. } => "breaker_opened",
            EventKind::BreakerHalfOpen => "breaker_half_open",
            EventKind::BreakerClosed => "breaker_closed",
            EventKind::DrainStarted { .. } => "drain_started",
            EventKind::DrainEnded { .. } => "drain_ended",
            EventKind::Stopped => "stopped",
            EventKind::Fenced { .. } => "fenced",
            EventKind::Unfenced => "unfenced",
            EventKind::DeviceSuspected { .. } => "device_suspected",
            EventKind::DeviceIncident { .. } => "device_incident",
            EventKind::DeviceHealthChanged { .. } => "device_health_changed",
            EventKind::DeviceReadmitted { .. } => "device_readmitted",
            EventKind::EvictionPlanned { .. } => "eviction_planned",
            EventKind::Evicted { .. } => "evicted",
            EventKind::BroughtBack => "brought_back",
            EventKind::IdleStopped { .. } => "idle_stopped",
            EventKind::ReloadStarted => "reload_started",
            EventKind::Reloaded => "reloaded",
            EventKind::ReloadUndone { .. } => "reload_undone",
            EventKind::ReloadBroken => "reload_broken",
            EventKind::LeaseGranted { .. } => "lease_granted",
            EventKind::LeaseQueued { .. } => "lease_queued",
            EventKind::LeaseRefused { .. } => "lease_refused",
            EventKind::LeaseReleased { .. } => "lease_released",
            EventKind::LeaseExpired { .. } => "lease_expired",
            EventKind::LeaseRenewed { .. } => "lease_renewed",
            EventKind::LeaseRevoked { .. } => "lease_revoked",
            EventKind::StreamStarted { .. } => "stream_started",
            EventKind::StreamEnded { .. } => "stream_ended",
        }
    }
}

/// Events that wait to be told.
const EVENTS: usize = 1024;
/// As many of them are never of leases: however many come and go, what happens to engines is told.
const NOT_FOR_LEASES: usize = EVENTS / 2;

/// Where events go: a bounded channel; what does not fit is counted, never waited for.
#[derive(Debug, Clone)]
pub struct EventSink {
    tx: tokio::sync::mpsc::Sender<Event>,
    lost: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

impl EventSink {
    /// A sink and its other end.
    #[must_use]
    pub fn channel() -> (Self, tokio::sync::mpsc::Receiver<Event>) {
        let (tx, rx) = tokio::sync::mpsc::channel(EVENTS);
        (Self { tx, lost: std::sync::Arc::default() }, rx)
    }

    /// Tells, or counts a loss.
    pub fn send(&self, key: &ReplicaKey, generation: Generation, kind: EventKind) {
        self.put(Event { key: Some(key.clone()), generation, kind });
    }

    /// The same of the node, whatever pools there are.
    pub fn send_of_node(&self, kind: EventKind) {
        self.put(Event { key: None, generation: Generation(0), kind });
    }

    fn put(&self, event: Event) {
        // Who asks at the same moment may find the same place: as many too many as there are threads.
        let crowded = event.holder().is_some() && self.tx.capacity() <= NOT_FOR_LEASES;
        if crowded || self.tx.try_send(event).is_err() {
            self.lost.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Events that did not fit.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
