//! Events become log lines, metrics, and the stream that clients listen to. One event is the source of all, so they cannot
//! disagree.

use std::sync::Arc;

use pool_api::dto::EventView;
use pool_api::metrics::Metrics;
use pool_api::server::History;
use pool_services::{Clock, Event, EventKind, Specs};
use tokio::sync::mpsc;

use crate::config::LogFormat;

/// Takes events until there are no more.
pub(crate) async fn run(
    mut events: mpsc::Receiver<Event>,
    pools: Specs,
    metrics: Arc<Metrics>,
    mut history: History,
    format: LogFormat,
) {
    let clock = Clock::starting_at(0);
    loop {
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            () = history.attend() => continue,
        };
        let Some(event) = event else { return };
        metrics.observe(&event);
        let view =
            EventView::new(&event, event.key.as_ref().and_then(|key| pools.of(&key.pool)).as_deref(), clock.wall());
        log(&event, &view, format);
        history.push(&view, event.holder().is_some());
    }
}

fn log(event: &Event, view: &EventView, format: LogFormat) {
    let sentence = view.human.as_str();
    // In the log for people the sentence is the message; programs find it under its name too.
    let human = (format == LogFormat::Json).then_some(sentence);
    // What does not apply is left out.
    let of_pool = event.key.is_some();
    let (pool_id, replica_id) = (of_pool.then_some(&*view.pool_id), of_pool.then_some(&*view.replica_id));
    let generation = of_pool.then_some(view.generation);
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                event = view.event,
                pool_id,
                replica_id,
                generation,
                engine = view.engine,
                engine_version = view.engine_version,
                model_id = view.model_id,
                device = view.device,
                xid = view.xid,
                health = view.health,
                reason = view.reason.as_deref().filter(|_| view.health.is_some()),
                verdict = view.verdict,
                backoff_ms = view.backoff_ms,
                last_error = view.last_error,
                job_id = view.job_id,
                session_id = view.session_id,
                tenant_id = view.tenant_id,
                queue_position = view.queue_position,
                correlation_id = view.correlation_id,
                outcome = view.outcome,
                took_ms = view.took_ms,
                first_byte_ms = view.first_byte_ms,
                bytes_out = view.bytes_out,
                human,
                "{sentence}"
            )
        };
    }
    match event.kind {
        EventKind::DeviceHealthChanged { health: "ok", .. } => line!(info),
        EventKind::DeviceHealthChanged { .. } => line!(warn),
        EventKind::EngineFailed { .. }
        | EventKind::BreakerOpened { .. }
        | EventKind::Fenced { .. }
        | EventKind::DeviceSuspected { .. }
        | EventKind::DeviceIncident { .. }
        | EventKind::LeaseRefused { .. }
        | EventKind::StreamEnded { outcome: "engine_failed", .. } => line!(warn),
        EventKind::StateChanged { .. }
        | EventKind::LeaseGranted { .. }
        | EventKind::LeaseQueued { .. }
        | EventKind::LeaseReleased { .. }
        | EventKind::LeaseRenewed { .. }
        | EventKind::StreamStarted { .. }
        | EventKind::StreamEnded { .. } => line!(debug),
        _ => line!(info),
    }
}
