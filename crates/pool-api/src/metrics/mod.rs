//! Counters that follow events, and gauges that are made from snapshots at each scrape, so that nothing stale is shown.

mod engine;
mod gateway;
mod gpu;
pub mod names;
mod text;

use pool_domain::ReplicaKey;
use pool_domain::lifecycle::State;
use pool_services::{Event, EventKind, NodeSnapshot, PoolSnapshot, ReplicaSnapshot};
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use std::sync::atomic::AtomicU64;

use gateway::GatewayMetrics;
pub use gateway::GatewayTrip;
pub use names::{ALL, MetricDoc};

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge<f64, AtomicU64>>;

#[derive(Debug, Clone, Copy)]
struct Buckets;

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        // 50 ms to 14 minutes: from a stub to a large model on a slow disk.
        Histogram::new(exponential_buckets(0.05, 2.0, 15))
    }
}

type Histograms = Family<Labels, Histogram, Buckets>;

/// The counters of a daemon.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    transitions: Counters,
    readiness: Counters,
    starts: Counters,
    restarts: Counters,
    evictions: Counters,
    idle_stops: Counters,
    exits: Counters,
    fetched_bytes: Counters,
    breaker_opens: Counters,
    drains: Counters,
    reloads: Counters,
    granted: Counters,
    refused: Counters,
    queued: Counters,
    ended: Counters,
    renewed: Counters,
    start_duration: Histograms,
    drain_duration: Histograms,
    gateway: GatewayMetrics,
}

fn register(registry: &mut Registry, doc: MetricDoc, metric: impl Metric) {
    // The encoder writes `_total` itself.
    registry.register(doc.name.strip_suffix("_total").unwrap_or(doc.name), doc.help, metric);
}

impl Default for Metrics {
    fn default() -> Self {
        let mut r = Registry::default();
        let mut counters = |doc| {
            let family = Counters::default();
            register(&mut r, doc, family.clone());
            family
        };
        let transitions = counters(names::STATE_TRANSITIONS);
        let readiness = counters(names::READINESS_TRANSITIONS);
        let starts = counters(names::STARTS);
        let restarts = counters(names::RESTARTS);
        let evictions = counters(names::EVICTIONS);
        let idle_stops = counters(names::IDLE_STOPS);
        let exits = counters(names::EXITS);
        let fetched_bytes = counters(names::MODEL_BYTES);
        let breaker_opens = counters(names::BREAKER_OPENS);
        let drains = counters(names::DRAINS);
        let reloads = counters(names::RELOADS);
        let granted = counters(names::LEASES_GRANTED);
        let refused = counters(names::LEASES_REFUSED);
        let queued = counters(names::LEASES_QUEUED);
        let ended = counters(names::LEASES_ENDED);
        let renewed = counters(names::LEASES_RENEWED);
        let start_duration = Histograms::new_with_constructor(Buckets);
        register(&mut r, names::START_DURATION, start_duration.clone());
        let drain_duration = Histograms::new_with_constructor(Buckets);
        register(&mut r, names::DRAIN_DURATION, drain_duration.clone());
        let gateway = GatewayMetrics::registered(&mut r);
        Self {
            registry: r,
            transitions,
            readiness,
            starts,
            restarts,
            evictions,
            idle_stops,
            exits,
            fetched_bytes,
            breaker_opens,
            drains,
            reloads,
            granted,
            refused,
            queued,
            ended,
            renewed,
            start_duration,
            drain_duration,
            gateway,
        }
    }
}

fn of(key: &ReplicaKey, further: &[(&'static str, &str)]) -> Labels {
    let mut labels = vec![("pool_id", key.pool.to_string()), ("replica_id", key.replica.to_string())];
    labels.extend(further.iter().map(|(k, v)| (*k, (*v).to_owned())));
    labels
}

fn count(family: &Counters, labels: &Labels) {
    family.get_or_create(labels).inc();
}

impl Metrics {
    /// Counts an event.
    pub fn observe(&self, event: &Event) {
        // What happens to a device alone is counted with the devices.
        let Some(key) = &event.key else { return };
        match &event.kind {
            EventKind::StateChanged { from, to } => {
                count(&self.transitions, &of(key, &[("from", from), ("to", to)]));
                match (*from == "ready", *to == "ready") {
                    (false, true) => count(&self.readiness, &of(key, &[("ready", "true")])),
                    (true, false) => count(&self.readiness, &of(key, &[("ready", "false")])),
                    _ => {}
                }
            }
            EventKind::Started => count(&self.starts, &of(key, &[])),
            EventKind::BecameReady { took } => {
                self.start_duration.get_or_create(&of(key, &[])).observe(took.as_secs_f64());
            }
            EventKind::EngineFailed { failure, .. } => {
                count(&self.exits, &of(key, &[("class", failure.class.code())]));
            }
            EventKind::Restarting => count(&self.restarts, &of(key, &[])),
            EventKind::BreakerOpened { .. } => count(&self.breaker_opens, &of(key, &[])),
            EventKind::DrainEnded { outcome, took } => {
                let labels = of(key, &[("outcome", outcome)]);
                count(&self.drains, &labels);
                self.drain_duration.get_or_create(&labels).observe(took.as_secs_f64());
            }
            EventKind::Reloaded => count(&self.reloads, &of(key, &[("outcome", "reloaded")])),
            EventKind::ReloadUndone { .. } => count(&self.reloads, &of(key, &[("outcome", "undone")])),
            EventKind::ReloadBroken => count(&self.reloads, &of(key, &[("outcome", "broken")])),
            EventKind::LeaseGranted { .. } => count(&self.granted, &of(key, &[])),
            EventKind::LeaseQueued { .. } => count(&self.queued, &of(key, &[])),
            EventKind::LeaseRenewed { .. } => count(&self.renewed, &of(key, &[])),
            EventKind::LeaseReleased { .. } => count(&self.ended, &of(key, &[("how", "released")])),
            EventKind::LeaseExpired { .. } => count(&self.ended, &of(key, &[("how", "expired")])),
            EventKind::LeaseRevoked { .. } => count(&self.ended, &of(key, &[("how", "revoked")])),
            EventKind::LeaseRefused { reason, .. } => count(&self.refused, &of(key, &[("reason", reason)])),
            EventKind::Evicted { .. } => count(&self.evictions, &of(key, &[])),
            EventKind::IdleStopped { .. } => count(&self.idle_stops, &of(key, &[])),
            EventKind::ModelFetched { bytes, .. } => {
                self.fetched_bytes.get_or_create(&of(key, &[])).inc_by(*bytes);
            }
            EventKind::ModelFetching { .. }
            | EventKind::EvictionPlanned { .. }
            | EventKind::BroughtBack
            | EventKind::Suspected { .. }
            | EventKind::RestartPlanned { .. }
            | EventKind::BreakerHalfOpen
            | EventKind::BreakerClosed
            | EventKind::DrainStarted { .. }
            | EventKind::Stopped
            | EventKind::Fenced { .. }
            | EventKind::Unfenced
            | EventKind::StartDelayed { .. }
            | EventKind::ReloadStarted
            | EventKind::DeviceSuspected { .. }
            | EventKind::DeviceIncident { .. }
            | EventKind::DeviceHealthChanged { .. }
            | EventKind::DeviceReadmitted { .. }
            // Counted as they end, with those that are no streams.
            | EventKind::StreamStarted { .. }
            | EventKind::StreamEnded { .. } => {}
        }
    }

    /// Everything in the OpenMetrics text format.
    #[must_use]
    pub fn render(&self, pools: &[PoolSnapshot], node: &NodeSnapshot) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = encode_registry(&mut out, &self.registry);
        let _ = encode_registry(&mut out, &scrape(pools, node));
        let _ = encode_eof(&mut out);
        out
    }

    /// The same in Prometheus' own text format.
    #[must_use]
    pub fn render_plain(&self, pools: &[PoolSnapshot], node: &NodeSnapshot) -> String {
        text::from_openmetrics(&self.render(pools, node))
    }
}

struct Scrape(Registry);

impl Scrape {
    fn gauge<T>(&mut self, doc: MetricDoc, items: &[T], read: impl Fn(&T) -> Vec<(Labels, f64)>) {
        let family = Gauges::default();
        for (labels, value) in items.iter().flat_map(read) {
            family.get_or_create(&labels).set(value);
        }
        register(&mut self.0, doc, family);
    }

    fn counter<T>(&mut self, doc: MetricDoc, items: &[T], read: impl Fn(&T) -> Vec<(Labels, u64)>) {
        let family = Counters::default();
        for (labels, value) in items.iter().flat_map(read) {
            family.get_or_create(&labels).inc_by(value);
        }
        register(&mut self.0, doc, family);
    }

    /// A total of time.
    fn seconds<T>(&mut self, doc: MetricDoc, items: &[T], read: impl Fn(&T) -> Vec<(Labels, f64)>) {
        let family = Family::<Labels, Counter<f64, AtomicU64>>::default();
        for (labels, value) in items.iter().flat_map(read) {
            family.get_or_create(&labels).inc_by(value);
        }
        register(&mut self.0, doc, family);
    }
}

fn flag(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floats; 2^53 bytes are 8 PiB")]
fn number(n: u64) -> f64 {
    n as f64
}

fn one_hot(key: &ReplicaKey, states: &[&'static str], now: &str) -> Vec<(Labels, f64)> {
    states.iter().map(|s| (of(key, &[("state", s)]), flag(*s == now))).collect()
}

fn scrape(pools: &[PoolSnapshot], node: &NodeSnapshot) -> Registry {
    let mut s = Scrape(Registry::default());
    let pool = |p: &PoolSnapshot| vec![("pool_id", p.pool_id.to_string())];
    s.gauge(names::POOL_READY, pools, |p| vec![(pool(p), flag(p.ready()))]);
    s.gauge(names::POOL_LIVE, pools, |p| vec![(pool(p), flag(p.live()))]);
    s.gauge(names::LEASES_WAITING, pools, |p| vec![(pool(p), f64::from(p.leases_waiting))]);
    s.counter(names::GUARDS_GRANTED, pools, |p| vec![(pool(p), p.guards.granted)]);
    s.counter(names::GUARDS_REFUSED, pools, |p| {
        let refused = |reason: &str, n| ([pool(p), vec![("reason", reason.to_owned())]].concat(), n);
        vec![refused("saturated", p.guards.saturated), refused("closed", p.guards.closed)]
    });
    s.gauge(names::POOL_READY_REPLICAS, pools, |p| vec![(pool(p), f64::from(p.ready_replicas()))]);
    s.gauge(names::POOL_REPLICAS, pools, |p| vec![(pool(p), number(p.replicas.len() as u64))]);
    s.gauge(names::POOL_HOLD, pools, |p| vec![(pool(p), flag(p.hold))]);

    let replicas: Vec<(ReplicaKey, &ReplicaSnapshot)> = pools
        .iter()
        .flat_map(|p| p.replicas.iter().map(|r| (ReplicaKey { pool: p.pool_id.clone(), replica: r.id }, r)))
        .collect();
    s.gauge(names::REPLICA_STATE, &replicas, |(k, r)| one_hot(k, &State::CODES, r.state));
    s.gauge(names::BREAKER_STATE, &replicas, |(k, r)| one_hot(k, &["closed", "open", "half_open"], r.breaker));
    s.gauge(names::REPLICA_RESTARTS, &replicas, |(k, r)| vec![(of(k, &[]), number(r.restart_count))]);
    s.gauge(names::BACKOFF_FAILURES, &replicas, |(k, r)| vec![(of(k, &[]), f64::from(r.backoff_failures))]);
    s.gauge(names::HEALTH_FAILURES, &replicas, |(k, r)| vec![(of(k, &[]), f64::from(r.consecutive_failures))]);
    s.gauge(names::LEASES_ACTIVE, &replicas, |(k, r)| vec![(of(k, &[]), f64::from(r.active_leases))]);
    s.gauge(names::SLOTS, &replicas, |(k, r)| vec![(of(k, &[]), f64::from(r.slots_total))]);

    engine::scrape(&mut s, &replicas);
    gpu::scrape(&mut s, pools, node);
    s.gauge(names::SIMULATED, &[node.simulated], |s| vec![(Vec::new(), flag(*s))]);
    s.counter(names::EVENTS_LOST, &[node.events_lost], |n| vec![(Vec::new(), *n)]);
    s.0
}
