//! What the gateway counts by itself: its requests come too fast for each to be an event.

use std::time::Duration;

use pool_domain::PoolId;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::{Counters, Labels, Metrics, count, names, register};

#[derive(Debug, Clone, Copy)]
struct Fine;

impl MetricConstructor<Histogram> for Fine {
    fn new_metric(&self) -> Histogram {
        // 1 ms to 9 minutes: from a slot that is free to a long answer.
        Histogram::new(exponential_buckets(0.001, 2.0, 20))
    }
}

type Histograms = Family<Labels, Histogram, Fine>;

/// How one request went.
#[derive(Debug, Clone, Copy)]
pub struct GatewayTrip {
    /// For a slot.
    pub waited: Duration,
    /// From the request until the engine began to answer, if it did.
    pub first_byte: Option<Duration>,
    /// From the request to the end.
    pub took: Duration,
    /// From the request until the first part of an answer that streams.
    pub first_token: Option<Duration>,
    /// What came from the engine.
    pub bytes: u64,
    /// Tokens of the request, where the engine told.
    pub tokens_in: Option<u64>,
    /// Tokens of the answer, where the engine told.
    pub tokens_out: Option<u64>,
    /// From the first token to the last, where that is known.
    pub decode: Option<Duration>,
}

impl GatewayTrip {
    /// Seconds from one token to the next, in the mean.
    #[allow(clippy::cast_precision_loss, reason = "a mean")]
    fn token_seconds(&self) -> Option<f64> {
        let after_first = self.tokens_out?.checked_sub(1).filter(|n| *n > 0)?;
        Some(self.decode?.as_secs_f64() / after_first as f64)
    }
}

#[derive(Debug)]
pub(super) struct GatewayMetrics {
    requests: Counters,
    refused: Counters,
    bytes: Counters,
    tokens: Counters,
    wait: Histograms,
    first_byte: Histograms,
    first_token: Histograms,
    token: Histograms,
    decode: Histograms,
    duration: Histograms,
}

impl GatewayMetrics {
    pub(super) fn registered(r: &mut Registry) -> Self {
        let mut counters = |doc| {
            let family = Counters::default();
            register(r, doc, family.clone());
            family
        };
        let requests = counters(names::GATEWAY_REQUESTS);
        let refused = counters(names::GATEWAY_REFUSED);
        let bytes = counters(names::GATEWAY_BYTES);
        let tokens = counters(names::GATEWAY_TOKENS);
        let mut histograms = |doc| {
            let family = Histograms::new_with_constructor(Fine);
            register(r, doc, family.clone());
            family
        };
        let wait = histograms(names::GATEWAY_WAIT);
        let first_byte = histograms(names::GATEWAY_FIRST_BYTE);
        let first_token = histograms(names::GATEWAY_FIRST_TOKEN);
        let token = histograms(names::GATEWAY_TOKEN);
        let decode = histograms(names::GATEWAY_DECODE);
        let duration = histograms(names::GATEWAY_DURATION);
        Self { requests, refused, bytes, tokens, wait, first_byte, first_token, token, decode, duration }
    }
}

impl Metrics {
    /// Counts a request that went to an engine.
    pub fn gateway_trip(&self, pool: &PoolId, tenant: &str, outcome: &str, trip: &GatewayTrip) {
        let labels = vec![("pool_id", pool.to_string())];
        let g = &self.gateway;
        g.wait.get_or_create(&labels).observe(trip.waited.as_secs_f64());
        if let Some(first) = trip.first_byte {
            g.first_byte.get_or_create(&labels).observe(first.as_secs_f64());
        }
        if let Some(first) = trip.first_token {
            g.first_token.get_or_create(&labels).observe(first.as_secs_f64());
        }
        if let Some(decode) = trip.decode {
            g.decode.get_or_create(&labels).observe(decode.as_secs_f64());
        }
        if let Some(token) = trip.token_seconds() {
            g.token.get_or_create(&labels).observe(token);
        }
        for (direction, tokens) in [("in", trip.tokens_in), ("out", trip.tokens_out)] {
            let Some(tokens) = tokens else { continue };
            let further = [("tenant_id", tenant.to_owned()), ("direction", direction.to_owned())];
            g.tokens.get_or_create(&labels.iter().cloned().chain(further).collect()).inc_by(tokens);
        }
        g.duration.get_or_create(&labels).observe(trip.took.as_secs_f64());
        g.bytes.get_or_create(&labels).inc_by(trip.bytes);
        let further = [("tenant_id", tenant.to_owned()), ("outcome", outcome.to_owned())];
        count(&g.requests, &labels.into_iter().chain(further).collect());
    }

    /// Counts a request that did not.
    pub fn gateway_refused(&self, code: &str, tenant: &str) {
        count(&self.gateway.refused, &vec![("tenant_id", tenant.to_owned()), ("code", code.to_owned())]);
    }
}
