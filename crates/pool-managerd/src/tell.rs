//! Events become log lines and metrics. One event is the source of both, so they cannot disagree.

use std::sync::Arc;

use pool_api::metrics::Metrics;
use pool_services::{Event, EventKind, PoolSpec, Specs};
use tokio::sync::mpsc;

use crate::config::LogFormat;

/// Takes events until there are no more.
pub(crate) async fn run(mut events: mpsc::Receiver<Event>, pools: Specs, metrics: Arc<Metrics>, format: LogFormat) {
    while let Some(event) = events.recv().await {
        metrics.observe(&event);
        log(&event, pools.of(&event.key.pool).as_deref(), format);
    }
}

fn log(event: &Event, spec: Option<&PoolSpec>, format: LogFormat) {
    let sentence = event.human();
    // In the log for people the sentence is the message; programs find it under its name too.
    let human = (format == LogFormat::Json).then_some(sentence.as_str());
    let (backoff_ms, failure) = match &event.kind {
        EventKind::RestartPlanned { delay, failure, .. } => (Some(*delay), Some(failure)),
        EventKind::BreakerOpened { pause: delay } | EventKind::StartDelayed { delay } => (Some(*delay), None),
        EventKind::EngineFailed { failure, .. } => (None, Some(failure)),
        _ => (None, None),
    };
    let device = match &event.kind {
        EventKind::DeviceSuspected { device }
        | EventKind::DeviceReadmitted { device }
        | EventKind::DeviceIncident { device, .. } => Some(device.as_str()),
        _ => None,
    };
    let (xid, verdict) = match &event.kind {
        EventKind::DeviceIncident { xid, verdict, .. } => (Some(*xid), Some(verdict.code())),
        _ => (None, None),
    };
    let backoff_ms = backoff_ms.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
    let last_error = failure.map(ToString::to_string);
    let engine = spec.map(|s| s.engine.as_str());
    let model_id = spec.map(|s| s.model.model_id());
    let replica = event.key.replica.to_string();
    let holder = event.holder();
    let job_id = holder.and_then(|h| h.job_id.as_deref());
    let session_id = holder.and_then(|h| h.session_id.as_deref());
    let tenant_id = holder.and_then(|h| h.tenant_id.as_deref());
    let queue_position = match event.kind {
        EventKind::LeaseQueued { position, .. } => Some(position),
        _ => None,
    };
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                event = event.code(),
                pool_id = event.key.pool.as_str(),
                replica_id = replica.as_str(),
                generation = event.generation.0,
                engine,
                model_id,
                device,
                xid,
                verdict,
                backoff_ms,
                last_error,
                job_id,
                session_id,
                tenant_id,
                queue_position,
                human,
                "{sentence}"
            )
        };
    }
    match event.kind {
        EventKind::EngineFailed { .. }
        | EventKind::BreakerOpened { .. }
        | EventKind::Fenced { .. }
        | EventKind::DeviceSuspected { .. }
        | EventKind::DeviceIncident { .. }
        | EventKind::LeaseRefused { .. } => line!(warn),
        EventKind::StateChanged { .. }
        | EventKind::LeaseGranted { .. }
        | EventKind::LeaseQueued { .. }
        | EventKind::LeaseReleased { .. }
        | EventKind::LeaseRenewed { .. } => line!(debug),
        _ => line!(info),
    }
}
