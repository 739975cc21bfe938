//! What a drain answers, whatever its pool is doing: the real daemon with stub engines, over HTTP.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use serde_json::{Value, json};
use support::{Daemon, Engines};

fn pool(more: &str) -> String {
    format!("[[pool]]\nid = \"chat\"\nmodel = \"stub:chat\"\nengine = \"stub\"\n{more}\n")
}

/// The operation of a drain, at its end.
fn drained(daemon: &Daemon, body: &Value) -> Value {
    let answer = daemon.post("/v1/pools/chat/drain?wait_ms=60000", &body.to_string());
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// That it succeeded, and what there is to see of it then.
fn rests(daemon: &Daemon, operation: &Value) -> Value {
    assert_eq!((&operation["state"], &operation["outcome"]), (&json!("succeeded"), &json!("drained")), "{operation:#}");
    let pool = daemon.pool("chat");
    assert_eq!(
        (&pool["hold"], &pool["ready"], &pool["live"]),
        (&json!(true), &json!(false), &json!(false)),
        "{pool:#}"
    );
    let lease = daemon.post("/v1/pools/chat/leases", "{}");
    assert_eq!((lease.status, lease.json()["code"].as_str()), (503, Some("POOL_DRAINING")), "{lease:?}");
    pool
}

#[test]
fn a_pool_that_is_starting_is_stopped_at_once() {
    let args = "args = [\"--load-ms\", \"600000\"]\nactivation = \"preload\"";
    let daemon = Daemon::start(&pool(args));
    let engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["live"] == true);
    let asked = daemon.post("/v1/pools/chat/preload", "{}").json()["operation_id"].as_str().unwrap().to_owned();
    let operation = drained(&daemon, &json!({}));
    assert_eq!(rests(&daemon, &operation)["state"], "idle");
    assert!(engines.running().is_empty());
    let preload = daemon.get(&format!("/v1/operations/{asked}")).json();
    assert_eq!(preload["state"], "failed", "the wish that it contradicts is over: {preload:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_that_waits_for_its_next_start_does_not_start() {
    let backoff = "[pool.backoff]\ninitial = \"10m\"\nmax = \"10m\"\njitter = 0.0";
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("starts").display().to_string();
    let args = format!("args = [\"--fail-start-times\", \"1\", \"--state-file\", \"{count}\"]");
    let daemon = Daemon::start_in(dir, &pool(&format!("{args}\nactivation = \"preload\"\n{backoff}")));
    let engines = Engines::of(&daemon);
    let waits = daemon.until("chat", |p| p["state"] == "waiting");
    assert_eq!(waits["replicas"][0]["reason_code"], "backoff", "{waits:#}");
    let operation = drained(&daemon, &json!({}));
    assert_eq!(rests(&daemon, &operation)["state"], "idle");
    assert_eq!(engines.starts().len(), 1);
    // It is the operator who wants it now: the wait is over.
    let again = daemon.post("/v1/pools/chat/preload?wait_ms=60000", "{}").json();
    assert_eq!(again["state"], "succeeded", "{again:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_that_has_failed_keeps_saying_why() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.gguf");
    let text = pool("activation = \"preload\"").replace("stub:chat", &format!("file:{}", missing.display()));
    let root = dir.path().display().to_string();
    let daemon = Daemon::start_in(dir, &format!("[models]\nroots = [\"{root}\"]\n{text}"));
    let failed = daemon.until("chat", |p| p["state"] == "failed");
    let operation = drained(&daemon, &json!({ "on_deadline": "abort" }));
    let pool = rests(&daemon, &operation);
    assert_eq!((&pool["state"], &pool["last_error"]["class"]), (&json!("failed"), &json!("artifact")), "{pool:#}");
    assert_eq!(pool["reason"], failed["reason"]);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_at_rest_is_held_and_a_drain_of_a_drained_one_is_nothing() {
    let daemon = Daemon::start(&pool("activation = \"on_demand\""));
    let engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["state"] == "idle");
    for body in [json!({}), json!({ "deadline_ms": 0 }), json!({ "on_deadline": "abort" })] {
        let operation = drained(&daemon, &body);
        assert_eq!(rests(&daemon, &operation)["state"], "idle");
    }
    assert!(engines.starts().is_empty());
    // A hold that is lifted is one that demand may end.
    assert_eq!(daemon.post("/v1/pools/chat/resume?wait_ms=60000", "{}").json()["state"], "succeeded");
    assert_eq!(daemon.pool("chat")["hold"], false);
    let lease = daemon.post("/v1/pools/chat/leases", r#"{"wait_ms":60000}"#);
    assert_eq!(lease.status, 201, "{lease:?}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_second_drain_is_one_wish_with_the_first_and_the_last_deadline_counts() {
    let daemon = Daemon::start(&pool("activation = \"preload\""));
    let engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["ready"] == true);
    let lease = daemon.post("/v1/pools/chat/leases", "{}").json();
    let first = daemon.post("/v1/pools/chat/drain", r#"{"deadline_ms":600000}"#).json();
    daemon.until("chat", |p| p["draining"] == true);
    let second = drained(&daemon, &json!({ "deadline_ms": 200 }));
    rests(&daemon, &second);
    let first = daemon.get(&format!("/v1/operations/{}", first["operation_id"].as_str().unwrap())).json();
    assert_eq!((&first["state"], &first["outcome"]), (&json!("succeeded"), &json!("drained")), "{first:#}");
    let gone = daemon.delete(&format!("/v1/leases/{}", lease["lease_id"].as_str().unwrap()));
    assert_eq!(gone.status, 204, "a release of what was revoked is nothing: {gone:?}");
    assert!(engines.running().is_empty());
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn two_pools_drain_at_once_and_a_third_serves_on() {
    let three = ["one", "two", "three"].map(|id| {
        format!("[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nactivation = \"preload\"\n")
    });
    let daemon = Daemon::start(&three.concat());
    let leases = ["one", "two", "three"].map(|id| {
        daemon.until(id, |p| p["ready"] == true);
        daemon.post(&format!("/v1/pools/{id}/leases"), "{}").json()["lease_id"].as_str().unwrap().to_owned()
    });
    let [one, two] = ["one", "two"].map(|id| {
        let drain = daemon.post(&format!("/v1/pools/{id}/drain"), r#"{"deadline_ms":600000}"#);
        assert_eq!(drain.status, 202, "{drain:?}");
        daemon.until(id, |p| p["draining"] == true);
        drain.json()["operation_id"].as_str().unwrap().to_owned()
    });
    let ended = |operation: &str| daemon.get(&format!("/v1/operations/{operation}?wait_ms=60000")).json();
    assert_eq!(daemon.delete(&format!("/v1/leases/{}", leases[1])).status, 204);
    assert_eq!(ended(&two)["outcome"], "drained");
    assert_eq!(daemon.pool("one")["draining"], true, "each for itself");
    assert_eq!(daemon.delete(&format!("/v1/leases/{}", leases[0])).status, 204);
    assert_eq!(ended(&one)["outcome"], "drained");
    let third = daemon.pool("three");
    assert_eq!((&third["ready"], &third["active_leases"]), (&json!(true), &json!(1)), "{third:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_daemon_that_is_asked_to_stop_lets_what_runs_end_first() {
    let dir = tempfile::tempdir().unwrap();
    let ports = support::engine_ports();
    let node = format!("[node]\nstate_dir = \"state\"\nengine_ports = \"{ports}\"\nshutdown_drain = \"50s\"\n");
    support::write_config(dir.path(), &format!("{}\n{}", "", pool("activation = \"preload\"")));
    let file = dir.path().join("pool-managerd.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, node + &text[text.find("[gpu]").unwrap()..]).unwrap();
    let mut daemon = Daemon::start_in_place(dir);
    daemon.until("chat", |p| p["ready"] == true);
    let lease = daemon.post("/v1/pools/chat/leases", "{}").json();
    daemon.signal("TERM");
    let draining = daemon.until("chat", |p| p["draining"] == true);
    assert_eq!((&draining["live"], &draining["active_leases"]), (&json!(true), &json!(1)), "{draining:#}");
    assert_eq!((daemon.get("/readyz").status, daemon.get("/livez").status), (503, 200));
    let refused = daemon.post("/v1/pools/chat/leases", "{}");
    assert_eq!(refused.status, 503, "{refused:?}");
    assert_eq!(daemon.delete(&format!("/v1/leases/{}", lease["lease_id"].as_str().unwrap())).status, 204);
    assert_eq!(daemon.wait(), Some(0), "within the test's time, not the drain's");
}
