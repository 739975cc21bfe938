use super::*;
use pool_domain::FailureClass;
use std::collections::BTreeSet;

/// Says so when a kind is added that `all` does not know.
fn every_kind_is_below(kind: &EventKind) {
    match kind {
        EventKind::StateChanged { .. }
        | EventKind::Started
        | EventKind::BecameReady { .. }
        | EventKind::EngineFailed { .. }
        | EventKind::ModelFetching { .. }
        | EventKind::ModelFetched { .. }
        | EventKind::Suspected { .. }
        | EventKind::Restarting
        | EventKind::RestartPlanned { .. }
        | EventKind::StartDelayed { .. }
        | EventKind::BreakerOpened { .. }
        | EventKind::BreakerHalfOpen
        | EventKind::BreakerClosed
        | EventKind::DrainStarted { .. }
        | EventKind::DrainEnded { .. }
        | EventKind::Stopped
        | EventKind::Fenced { .. }
        | EventKind::Unfenced
        | EventKind::DeviceSuspected { .. }
        | EventKind::DeviceIncident { .. }
        | EventKind::DeviceHealthChanged { .. }
        | EventKind::DeviceReadmitted { .. }
        | EventKind::EvictionPlanned { .. }
        | EventKind::Evicted { .. }
        | EventKind::BroughtBack
        | EventKind::IdleStopped { .. }
        | EventKind::ReloadStarted
        | EventKind::Reloaded
        | EventKind::ReloadUndone { .. }
        | EventKind::ReloadBroken
        | EventKind::LeaseGranted { .. }
        | EventKind::LeaseQueued { .. }
        | EventKind::LeaseRefused { .. }
        | EventKind::LeaseReleased { .. }
        | EventKind::LeaseExpired { .. }
        | EventKind::LeaseRenewed { .. }
        | EventKind::LeaseRevoked { .. }
        | EventKind::StreamStarted { .. }
        | EventKind::StreamEnded { .. } => {}
    }
}
const KINDS: usize = 39;

/// What no sentence may tell: ids, and whatever a failure's detail may hold.
const CANARY: &str = "canary";

/// Each kind with the longest it may have to say; failures of every class.
fn all() -> Vec<EventKind> {
    let canary = || -> Arc<str> { CANARY.into() };
    let holder = || Holder { job_id: Some(canary()), session_id: Some(canary()), tenant_id: Some(canary()) };
    let long = Duration::from_secs(7 * 24 * 3600);
    let mut all = Vec::new();
    let codes = FailureClass::CODES;
    for failure in codes.iter().map(|c| Failure::new(FailureClass::from_code(c).unwrap(), CANARY)) {
        all.push(EventKind::EngineFailed { failure: failure.clone(), nth: 9999 });
        all.push(EventKind::Suspected { failure: failure.clone() });
        // What is permanent is not tried again.
        if !failure.class.policy().permanent {
            all.push(EventKind::RestartPlanned { delay: long, failure, nth: 9999 });
        }
    }
    for left in [Left::Processes, Left::Memory] {
        all.push(EventKind::Fenced { left });
    }
    use pool_domain::xid::XidAction as Follows;
    for action in [Follows::Ignore, Follows::RestartEngine, Follows::Suspect, Follows::Drain, Follows::Lost] {
        let verdict = pool_domain::Verdict::RebootNode;
        all.push(EventKind::DeviceIncident { device: CANARY.into(), xid: 999, action, verdict });
    }
    for (health, verdict) in
        pool_domain::DeviceHealth::CODES.iter().flat_map(|h| pool_domain::Verdict::ALL.map(|v| (*h, v)))
    {
        all.push(EventKind::DeviceHealthChanged { device: CANARY.into(), health, reason: CANARY.into(), verdict });
    }
    for outcome in ["done", "cancelled", "engine_failed"] {
        let (request, holder) = (canary(), holder());
        let (most, decode) = (Some(u64::MAX), Some(long));
        all.push(EventKind::StreamEnded {
            request,
            holder,
            outcome,
            took: long,
            first_byte: long,
            bytes: u64::MAX,
            tokens_in: most,
            tokens_out: most,
            decode,
        });
    }
    for outcome in ["drained", "forced", "aborted", "resumed", "crashed"] {
        all.push(EventKind::DrainEnded { outcome, took: long });
    }
    all.extend([
        EventKind::StateChanged { from: "preparing", to: "suspect" },
        EventKind::Started,
        EventKind::BecameReady { took: long },
        EventKind::ModelFetching { done: u64::MAX, total: Some(u64::MAX) },
        EventKind::ModelFetched { bytes: u64::MAX, took: long },
        EventKind::Restarting,
        EventKind::StartDelayed { delay: long },
        EventKind::BreakerOpened { pause: long },
        EventKind::BreakerHalfOpen,
        EventKind::BreakerClosed,
        EventKind::DrainStarted { leases: u32::MAX, deadline: long },
        EventKind::Stopped,
        EventKind::Unfenced,
        EventKind::DeviceSuspected { device: CANARY.into() },
        EventKind::DeviceReadmitted { device: CANARY.into() },
        EventKind::EvictionPlanned { plan: CANARY.into(), pools: vec!["p".repeat(63), "q".repeat(63)] },
        EventKind::Evicted { by: "p".repeat(63) },
        EventKind::BroughtBack,
        EventKind::IdleStopped { after: long },
        EventKind::ReloadStarted,
        EventKind::Reloaded,
        EventKind::ReloadUndone { why: CANARY.into() },
        EventKind::ReloadBroken,
        EventKind::LeaseGranted { holder: holder() },
        EventKind::LeaseQueued { position: usize::MAX, holder: holder() },
        EventKind::LeaseRefused { reason: "insufficient_vram", holder: holder() },
        EventKind::LeaseReleased { holder: holder(), after: long },
        EventKind::LeaseExpired { holder: holder(), after: long },
        EventKind::LeaseRenewed { holder: holder() },
        EventKind::LeaseRevoked { holder: holder(), after: long },
        EventKind::StreamStarted { request: canary(), holder: holder() },
    ]);
    all
}

#[test]
fn every_kind_has_a_whole_sentence_without_ids_or_secrets() {
    let mut codes = BTreeSet::new();
    for pool in [Some("c"), Some("x".repeat(63).as_str()), None] {
        let key = pool.map(|p| ReplicaKey { pool: p.parse().unwrap(), replica: pool_domain::ReplicaId(4711) });
        // Of a device alone.
        let of_device =
            |k: &EventKind| matches!(k, EventKind::DeviceIncident { .. } | EventKind::DeviceHealthChanged { .. });
        for kind in all().into_iter().filter(|kind| key.is_some() || of_device(kind)) {
            every_kind_is_below(&kind);
            let event = Event { key: key.clone(), generation: Generation(271_828), kind };
            let human = event.human();
            let shown = format!("{} {human:?}", event.code());
            assert!(!human.is_empty() && human.chars().count() <= 100, "{shown}");
            let last = human.rsplit(' ').next().unwrap();
            assert!(event.sentence("c").ends_with(last), "cut off: {shown}");
            assert!(human.starts_with(|c: char| c.is_uppercase()) && !human.ends_with('.'), "{shown}");
            for secret in [CANARY, "4711", "271828", "GPU-"] {
                assert!(!human.contains(secret), "{shown}");
            }
            codes.insert(event.code());
        }
    }
    assert_eq!(codes.len(), KINDS, "{codes:?}");
}
