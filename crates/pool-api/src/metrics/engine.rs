//! What engines publish, under one set of names for every kind. What a kind does not tell has no series.

use pool_domain::ReplicaKey;
use pool_domain::meters::{Reading, Spent};
use pool_services::ReplicaSnapshot;

use super::names::{self, MetricDoc};
use super::{Scrape, number, of};

type Replica<'a> = (ReplicaKey, &'a ReplicaSnapshot);

pub(super) fn scrape(s: &mut Scrape, replicas: &[Replica<'_>]) {
    let mut gauge = |doc: MetricDoc, read: &dyn Fn(&ReplicaSnapshot) -> Option<f64>| {
        s.gauge(doc, replicas, |(k, r)| read(r).map(|value| (of(k, &[]), value)).into_iter().collect());
    };
    gauge(names::ENGINE_RUNNING, &|r| r.meters.running.map(f64::from));
    gauge(names::ENGINE_WAITING, &|r| r.meters.waiting.map(f64::from));
    gauge(names::ENGINE_KV, &|r| r.meters.kv_used);
    gauge(names::PERF_TOKENS, &|r| r.perf.tokens_per_s);
    gauge(names::PERF_FIRST_TOKEN, &|r| r.perf.first_token_ms.map(|ms| number(ms) / 1e3));
    let mut counter = |doc: MetricDoc, read: fn(&Reading) -> Option<u64>| {
        s.counter(doc, replicas, |(k, r)| read(&r.meters).map(|n| (of(k, &[]), n)).into_iter().collect());
    };
    counter(names::ENGINE_PROMPT_TOKENS, |m| m.prompt_tokens);
    counter(names::ENGINE_GENERATED_TOKENS, |m| m.generated_tokens);
    counter(names::ENGINE_FIRST_TOKENS, |m| m.first_token.map(|s| s.count));
    counter(names::ENGINE_DECODED_TOKENS, |m| m.decode.map(|s| s.count));
    let mut seconds = |doc: MetricDoc, read: fn(&Reading) -> Option<Spent>| {
        s.seconds(doc, replicas, |(k, r)| read(&r.meters).map(|n| (of(k, &[]), n.seconds)).into_iter().collect());
    };
    seconds(names::ENGINE_FIRST_TOKEN_SECONDS, |m| m.first_token);
    seconds(names::ENGINE_DECODE_SECONDS, |m| m.decode);
}
