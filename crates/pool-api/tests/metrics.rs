//! What is exposed is what is documented.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{chat, id, node};
use pool_api::metrics::{ALL, GatewayTrip, Metrics};
use pool_domain::{Failure, FailureClass, Generation, Holder, ReplicaId, ReplicaKey};
use pool_services::{Event, EventKind, GuardCounts, PoolSnapshot};

/// Eleven tokens in two seconds after the first.
const TRIP: GatewayTrip = GatewayTrip {
    waited: Duration::from_secs(1),
    first_byte: Some(Duration::from_secs(1)),
    first_token: Some(Duration::from_millis(1_500)),
    bytes: 7,
    tokens_in: Some(5),
    tokens_out: Some(11),
    decode: Some(Duration::from_secs(2)),
    took: Duration::from_secs(4),
};

#[test]
fn exposed_families_are_documented_and_the_other_way_round() {
    let m = Metrics::default();
    let failure = || Failure::new(FailureClass::Hang, "x");
    let took = Duration::from_secs(1);
    for kind in [
        EventKind::StateChanged { from: "warming", to: "ready" },
        EventKind::StateChanged { from: "ready", to: "suspect" },
        EventKind::Started,
        EventKind::ModelFetching { done: 1, total: Some(2) },
        EventKind::ModelFetched { bytes: 2, took },
        EventKind::BecameReady { took },
        EventKind::EngineFailed { failure: failure(), nth: 1 },
        EventKind::RestartPlanned { delay: took, failure: failure(), nth: 1 },
        EventKind::Restarting,
        EventKind::Evicted { by: "other".into() },
        EventKind::IdleStopped { after: took },
        EventKind::BreakerOpened { pause: took },
        EventKind::DrainEnded { outcome: "drained", took },
        EventKind::Reloaded,
        EventKind::LeaseGranted { holder: Holder::default() },
        EventKind::LeaseQueued { position: 3, holder: Holder::default() },
        EventKind::LeaseRefused { reason: "saturated", holder: Holder::default() },
        EventKind::LeaseReleased { holder: Holder::default(), after: took },
        EventKind::LeaseExpired { holder: Holder::default(), after: took },
        EventKind::LeaseRenewed { holder: Holder::default() },
        EventKind::LeaseRevoked { holder: Holder::default(), after: took },
    ] {
        let key = ReplicaKey { pool: id("chat"), replica: ReplicaId(0) };
        m.observe(&Event { key: Some(key), generation: Generation(1), kind });
    }
    m.gateway_trip(&id("chat"), "acme", "done", &TRIP);
    m.gateway_refused("POOL_SATURATED", "other");
    let guards = GuardCounts { granted: 7, saturated: 2, closed: 1 };
    let text = m.render(&[PoolSnapshot { guards, ..chat() }], &node());
    let mut exposed = BTreeSet::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let name = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        let doc = ALL.iter().find(|d| d.name == name).unwrap_or_else(|| panic!("{name} is not documented"));
        assert_eq!(doc.kind, kind, "{name}");
        let suffix = if kind == "histogram" { "_bucket" } else { "" };
        let sample =
            text.lines().find(|l| l.starts_with(&format!("{name}{suffix}"))).unwrap_or_else(|| panic!("{name}"));
        for label in doc.labels {
            assert!(sample.contains(&format!("{label}=\"")), "{name} lacks {label}: {sample}");
        }
        assert!(exposed.insert(name));
    }
    assert_eq!(exposed, ALL.iter().map(|d| d.name.to_owned()).collect());
    for doc in ALL {
        assert!(doc.name.starts_with("pool_managerd_") && !doc.help.is_empty());
        assert_eq!(doc.kind == "counter", doc.name.ends_with("_total"), "{}", doc.name);
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("pool_managerd_simulated 1"));
    assert!(text.contains("pool_managerd_guards_granted_total{pool_id=\"chat\"} 7"));
    assert!(text.contains("pool_managerd_replica_state{pool_id=\"chat\",replica_id=\"r1\",state=\"ready\"} 1"));
    for line in [
        "gateway_tokens_total{pool_id=\"chat\",tenant_id=\"acme\",direction=\"in\"} 5",
        "gateway_tokens_total{pool_id=\"chat\",tenant_id=\"acme\",direction=\"out\"} 11",
        "gateway_first_token_seconds_sum{pool_id=\"chat\"} 1.5",
        "gateway_decode_seconds_sum{pool_id=\"chat\"} 2.0",
        "gateway_token_latency_seconds_sum{pool_id=\"chat\"} 0.2",
        "engine_requests_running{pool_id=\"chat\",replica_id=\"r0\"} 2.0",
        "engine_kv_cache_usage_ratio{pool_id=\"chat\",replica_id=\"r0\"} 0.25",
        "engine_generated_tokens_total{pool_id=\"chat\",replica_id=\"r0\"} 400",
        "engine_decode_seconds_total{pool_id=\"chat\",replica_id=\"r0\"} 8.5",
        "engine_decoded_tokens_total{pool_id=\"chat\",replica_id=\"r0\"} 396",
        "perf_tokens_per_second{pool_id=\"chat\",replica_id=\"r0\"} 52.5",
        "perf_first_token_seconds{pool_id=\"chat\",replica_id=\"r0\"} 0.031",
    ] {
        assert!(text.contains(&format!("pool_managerd_{line}\n")), "{line}: {text}");
    }
    assert!(text.contains("readiness_transitions_total{pool_id=\"chat\",replica_id=\"r0\",ready=\"false\"} 1"));
}

#[test]
fn what_is_gone_is_not_exposed() {
    let m = Metrics::default();
    assert!(m.render(&[chat()], &node()).contains("GPU-51"));
    assert!(!m.render(&[], &pool_services::NodeSnapshot::default()).contains("chat"));
}
