//! Leases over HTTP, of the real daemon and the stub engine.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::Write;
use std::net::TcpStream;
use std::thread;

use serde_json::{Value, json};
use support::{Answer, Daemon, Engines, eventually, request};

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
slots = 1
args = ["--slots", "1"]
activation = "preload"
"#;

fn ready(config: &str) -> Daemon {
    let daemon = Daemon::start(config);
    daemon.until("chat", |p| p["ready"] == true);
    daemon
}

fn lease(daemon: &Daemon, body: &Value) -> Answer {
    daemon.post("/v1/pools/chat/leases", &body.to_string())
}

fn granted(daemon: &Daemon, body: &Value) -> Value {
    let answer = lease(daemon, body);
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

fn path(lease: &Value) -> String {
    format!("/v1/leases/{}", lease["lease_id"].as_str().unwrap())
}

fn release(daemon: &Daemon, lease: &Value) -> u16 {
    request(daemon.addr(), "DELETE", &path(lease), None).status
}

fn waiting(daemon: &Daemon, n: u64) {
    eventually(|| (daemon.pool("chat")["leases_waiting"] == n).then_some(()));
}

/// Asks in a thread of its own.
fn asking(daemon: &Daemon, body: &Value) -> thread::JoinHandle<Answer> {
    let (addr, body) = (daemon.addr().to_owned(), body.to_string());
    thread::spawn(move || request(&addr, "POST", "/v1/pools/chat/leases", Some(&body)))
}

#[test]
fn who_waits_is_served_in_order_and_who_hangs_up_loses_its_place() {
    let daemon = ready(POOL);
    let held = granted(&daemon, &json!({ "job_id": "j", "session_id": "s", "tenant_id": "t" }));
    assert_eq!((&held["pool_id"], &held["replica_id"], &held["generation"]), (&json!("chat"), &json!("r0"), &json!(1)));
    assert_eq!((&held["engine"], &held["slot"], &held["job_id"]), (&json!("stub"), &json!(0), &json!("j")));
    let pool = daemon.pool("chat");
    assert_eq!(
        (&held["endpoint"]["url"], &held["device_mask"]),
        (&pool["replicas"][0]["endpoint"], &pool["device_mask"])
    );
    let full = lease(&daemon, &json!({}));
    assert_eq!((full.status, full.json()["code"].as_str()), (429, Some("POOL_SATURATED")));
    assert!(full.head.to_ascii_lowercase().contains("retry-after: "), "{full:?}");

    let first = asking(&daemon, &json!({ "wait_ms": 60000 }));
    waiting(&daemon, 1);
    let body = r#"{"wait_ms":600000}"#;
    let mut gone = TcpStream::connect(daemon.addr()).unwrap();
    write!(
        gone,
        "POST /v1/pools/chat/leases HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        daemon.addr(),
        body.len()
    )
    .unwrap();
    waiting(&daemon, 2);
    let third = asking(&daemon, &json!({ "wait_ms": 60000 }));
    waiting(&daemon, 3);
    drop(gone);
    waiting(&daemon, 2);
    assert_eq!(release(&daemon, &held), 204);
    let first = first.join().unwrap().json();
    assert_eq!(daemon.get("/v1/leases").json().as_array().unwrap().len(), 1);
    assert!(!third.is_finished());
    assert_eq!(release(&daemon, &first), 204);
    let third = third.join().unwrap();
    assert_eq!(third.status, 201, "{third:?}");
    let ids = [&held["lease_id"], &first["lease_id"], &third.json()["lease_id"]].map(ToString::to_string);
    assert!(ids[0] != ids[1] && ids[1] != ids[2]);
    let metrics = daemon.get("/metrics").body;
    for line in ["leases_queued_total{pool_id=\"chat\",replica_id=\"r0\"} 3", "leases_waiting{pool_id=\"chat\"} 0"] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[test]
fn a_lease_expires_and_its_slot_goes_to_who_waits() {
    let daemon = ready(POOL);
    let short = granted(&daemon, &json!({ "ttl_ms": 300 }));
    let next = granted(&daemon, &json!({ "wait_ms": 60000 }));
    assert_ne!(next["lease_id"], short["lease_id"]);
    let over = daemon.post(&format!("{}/renew", path(&short)), "{}");
    assert_eq!((over.status, over.json()["code"].as_str()), (404, Some("LEASE_NOT_FOUND")), "{over:?}");
    assert_eq!(release(&daemon, &short), 204, "what was wanted is so");
    let longer = daemon.post(&format!("{}/renew", path(&next)), r#"{"ttl_ms":600000}"#);
    assert_eq!(longer.status, 200, "{longer:?}");
    assert!(longer.json()["expires_at"].as_str() > next["expires_at"].as_str());
}

#[test]
fn one_idempotency_key_is_one_lease() {
    let daemon = ready(POOL);
    let wish = json!({ "idempotency_key": "k", "wait_ms": 60000 });
    let one = granted(&daemon, &wish);
    assert_eq!(granted(&daemon, &wish)["lease_id"], one["lease_id"]);
    let other = lease(&daemon, &json!({ "idempotency_key": "k", "ttl_ms": 5 }));
    assert_eq!((other.status, other.json()["code"].as_str()), (409, Some("CONFLICT")));
    assert_eq!((release(&daemon, &one), release(&daemon, &one)), (204, 204));
    let over = daemon.post(&format!("{}/renew", path(&one)), "{}");
    assert_eq!((over.status, over.json()["code"].as_str()), (404, Some("LEASE_NOT_FOUND")), "{over:?}");
    assert!(over.json()["hint"].is_string(), "{over:?}");
    assert_eq!(lease(&daemon, &wish).status, 409, "a lease that is over is not given out again");
    assert_eq!(daemon.pool("chat")["active_leases"], 0);
}

#[test]
fn a_pool_at_rest_is_started_once_for_all_who_wait() {
    let daemon =
        Daemon::start(&POOL.replace("preload", "on_demand").replace("\"1\"]", "\"2\", \"--load-ms\", \"500\"]"));
    eventually(|| (daemon.get("/v1/pools/chat").status == 200).then_some(()));
    let wish = json!({ "wait_ms": 60000 });
    let both = [asking(&daemon, &wish), asking(&daemon, &wish)];
    for answer in both {
        assert_eq!(answer.join().unwrap().status, 201);
    }
    let pool = daemon.pool("chat");
    assert_eq!((&pool["replicas"][0]["generation"], &pool["active_leases"]), (&json!(1), &json!(2)), "{pool:#}");
}

#[test]
fn a_lease_goes_on_after_the_daemon_was_killed_and_its_slot_is_given_to_nobody_else() {
    let daemon = Daemon::start(POOL);
    let engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["ready"] == true);
    let held = granted(&daemon, &json!({ "ttl_ms": 600000 }));
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    daemon.until("chat", |p| p["ready"] == true);
    assert_eq!(lease(&daemon, &json!({})).status, 429, "who holds the slot is not known, but it is held");
    let renewed = daemon.post(&format!("{}/renew", path(&held)), r#"{"ttl_ms":600000}"#);
    assert_eq!(renewed.status, 200, "{renewed:?}");
    let renewed = renewed.json();
    for key in ["lease_id", "generation", "endpoint", "device_mask"] {
        assert_eq!(renewed[key], held[key], "{renewed:#}");
    }
    assert_eq!(daemon.get("/v1/leases").json().as_array().unwrap().len(), 1);
    assert_eq!(lease(&daemon, &json!({})).status, 429);
    assert_eq!(release(&daemon, &held), 204);
    let next = granted(&daemon, &json!({}));
    assert_ne!(next["lease_id"], held["lease_id"]);
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}

#[test]
fn a_drain_says_how_many_leases_and_how_much_time_are_left() {
    let daemon = ready(POOL);
    let held = granted(&daemon, &json!({ "ttl_ms": 600_000 }));
    let body = json!({ "deadline_ms": 300_000, "on_deadline": "force" }).to_string();
    let begun = daemon.post("/v1/pools/chat/drain", &body).json();
    let look = || daemon.get(&format!("/v1/operations/{}", begun["operation_id"].as_str().unwrap())).json();
    let told = eventually(|| Some(look()).filter(|o| o["time_left_ms"].is_u64()));
    assert_eq!((&told["state"], &told["leases_left"]), (&json!("running"), &json!(1)), "{told:#}");
    let left = |o: &Value| o["time_left_ms"].as_u64().unwrap();
    assert!(left(&told) <= 300_000, "{told:#}");
    let later = eventually(|| Some(look()).filter(|o| left(o) < left(&told)));
    assert_eq!(later["leases_left"], 1);
    assert!(daemon.get("/v1/operations").json()[0]["time_left_ms"].is_u64());
    assert_eq!(release(&daemon, &held), 204);
    let over = eventually(|| Some(look()).filter(|o| o["state"] != "running"));
    assert_eq!(
        (&over["outcome"], &over["time_left_ms"], &over["leases_left"]),
        (&json!("drained"), &json!(null), &json!(null))
    );
}

#[test]
fn bad_wishes_have_a_code_and_a_hint_and_change_nothing() {
    let daemon = ready(POOL);
    let held = granted(&daemon, &json!({}));
    let before = daemon.pool("chat");
    let (long, year) = ("x".repeat(129), 365u64 * 24 * 3600 * 1000);
    let leases = "/v1/pools/chat/leases".to_owned();
    let renew = format!("{}/renew", path(&held));
    let nobody = "/v1/leases/lease-chat-r0-g1-0000000000000000-7".to_owned();
    let none = json!({});
    for (method, path, body, status, code) in [
        ("POST", &leases, json!({ "ttl_ms": 0 }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "ttl_ms": year }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "ttl_ms": -1 }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "wait_ms": -1 }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "job_id": long }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "idempotency_key": "" }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "prefer_replica": "first" }), 400, "INVALID_PARAMS"),
        ("POST", &leases, json!({ "slots": 2 }), 400, "INVALID_PARAMS"),
        ("POST", &"/v1/pools/nope/leases".to_owned(), none.clone(), 404, "POOL_NOT_FOUND"),
        ("POST", &renew, json!({ "ttl_ms": year }), 400, "INVALID_PARAMS"),
        ("POST", &format!("{nobody}1/renew"), none.clone(), 404, "LEASE_NOT_FOUND"),
        ("DELETE", &"/v1/leases/lease-1".to_owned(), none.clone(), 404, "LEASE_NOT_FOUND"),
        ("DELETE", &"/v1/leases/lease-chat-r0-g9-0000000000000000-7".to_owned(), none.clone(), 404, "LEASE_NOT_FOUND"),
        ("POST", &leases, none, 429, "POOL_SATURATED"),
    ] {
        // A renewal of a lease of an earlier daemon goes on if there is a slot; here there is none.
        let answer = request(daemon.addr(), method, path, Some(&body.to_string()));
        let problem = answer.json();
        assert_eq!(
            (answer.status, problem["code"].as_str()),
            (status, Some(code)),
            "{method} {path} {body}: {answer:?}"
        );
        assert!(problem["hint"].is_string(), "{method} {path} {body}: {answer:?}");
    }
    let after = daemon.pool("chat");
    for key in ["state", "active_leases", "slots_free", "leases_waiting", "snapshot"] {
        assert_eq!(after[key], before[key], "{key}");
    }
}
