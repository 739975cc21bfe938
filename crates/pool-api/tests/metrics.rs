//! What is exposed is what is documented.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{chat, id, node};
use pool_api::metrics::{ALL, GatewayTrip, Metrics};
use pool_domain::{Failure, FailureClass, Generation, Holder, ReplicaId, ReplicaKey};
use pool_services::{Event, EventKind, GuardCounts, PoolSnapshot};

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
    m.gateway_trip(&id("chat"), "acme", "done", &GatewayTrip { waited: took, first_byte: Some(took), took, bytes: 7 });
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
    assert!(text.contains("readiness_transitions_total{pool_id=\"chat\",replica_id=\"r0\",ready=\"false\"} 1"));
}

#[test]
fn what_is_gone_is_not_exposed() {
    let m = Metrics::default();
    assert!(m.render(&[chat()], &node()).contains("GPU-51"));
    assert!(!m.render(&[], &pool_services::NodeSnapshot::default()).contains("chat"));
}
