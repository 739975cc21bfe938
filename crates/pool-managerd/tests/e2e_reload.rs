//! What a client sees of reloads: the real daemon with stub engines, over HTTP.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use serde_json::{Value, json};
use support::stream::whole;
use support::{Daemon, Engines, eventually, request};

/// How often the pool is reloaded; `benches/reload.py` does it 200 times.
const RELOADS: u64 = 20;
const CLIENTS: u64 = 3;
/// 0.4 s at the stub's speed, which is longer than it takes from the start of a reload to its flip.
const TOKENS: u64 = 80;

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:one"
engine = "stub"
slots = 4
args = ["--slots", "4", "--load-ms", "20"]
activation = "preload"
"#;

/// What the clients have seen so far.
#[derive(Default)]
struct Seen {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Streams during which the pool changed its model.
    spanned: AtomicU64,
    flips: AtomicU64,
    over: AtomicBool,
}

/// Ends the clients, also if something fails.
struct Over<'a>(&'a Seen);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

/// Lease, stream, release, until it is over. Whatever breaks is a panic.
fn client(addr: &str, seen: &Seen) {
    while !seen.over.load(Ordering::SeqCst) {
        let asked = request(addr, "POST", "/v1/pools/chat/leases", Some(r#"{"wait_ms":60000}"#));
        assert_eq!(asked.status, 201, "who waits is not refused: {asked:?}");
        let lease = asked.json();
        let before = seen.flips.load(Ordering::SeqCst);
        let last = whole(lease["endpoint"]["url"].as_str().unwrap(), TOKENS, || {
            seen.begun.fetch_add(1, Ordering::SeqCst);
        });
        let model = last["model"].as_str().unwrap();
        assert!(["one", "two"].iter().any(|m| model.contains(m)), "{last}");
        seen.spanned.fetch_add(u64::from(seen.flips.load(Ordering::SeqCst) > before), Ordering::SeqCst);
        let path = format!("/v1/leases/{}", lease["lease_id"].as_str().unwrap());
        assert_eq!(request(addr, "DELETE", &path, None).status, 204);
        seen.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// Reloads to the other model while streams are under way.
fn reload(daemon: &Daemon, strategy: &str, nth: u64, seen: &Seen) {
    let begun = seen.begun.load(Ordering::SeqCst);
    eventually(|| (seen.begun.load(Ordering::SeqCst) >= begun + CLIENTS).then_some(()));
    let model = if nth.is_multiple_of(2) { "stub:two" } else { "stub:one" };
    let body = json!({ "new_model_ref": model, "strategy": strategy }).to_string();
    let begun = daemon.post("/v1/pools/chat/reload", &body);
    assert_eq!(begun.status, 202, "{begun:?}");
    daemon.until("chat", |p| {
        assert_eq!(p["ready"], true, "{p:#}");
        p["model"] == model
    });
    seen.flips.fetch_add(1, Ordering::SeqCst);
    let operation = begun.json()["operation_id"].as_str().unwrap().to_owned();
    let over = daemon.get(&format!("/v1/operations/{operation}?wait_ms=60000")).json();
    assert_eq!((&over["state"], &over["outcome"]), (&json!("succeeded"), &json!("reloaded")), "{over:#}");
}

/// Clients stream through so many reloads: none is cut off, none is refused, and in the end as many engines run as before.
fn streams_through(strategy: &str, pool: &str, reloads: u64, replicas: usize) {
    let daemon = Daemon::start(pool);
    let engines = Engines::of(&daemon);
    daemon.until("chat", |p| p["ready_replicas"] == replicas);
    let seen = Seen::default();
    let addr = daemon.addr().to_owned();
    // A client that panics fails the scope.
    thread::scope(|s| {
        let _over = Over(&seen);
        for _ in 0..CLIENTS {
            s.spawn(|| client(&addr, &seen));
        }
        (0..reloads).for_each(|nth| reload(&daemon, strategy, nth, &seen));
    });
    assert_eq!(seen.begun.load(Ordering::SeqCst), seen.ended.load(Ordering::SeqCst));
    assert!(seen.spanned.load(Ordering::SeqCst) > 0, "no stream went through a reload");
    let pool = daemon.pool("chat");
    assert_eq!((&pool["revision"], &pool["active_leases"]), (&json!(reloads + 1), &json!(0)), "{pool:#}");
    daemon.until("chat", |p| p["replicas"].as_array().unwrap().len() == replicas);
    assert_eq!(engines.running().len(), replicas, "only the last engines are left");
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}

#[test]
fn no_stream_is_broken_and_nobody_who_waits_is_refused_through_many_overlap_reloads() {
    streams_through("overlap", POOL, RELOADS, 1);
}

#[test]
fn no_stream_is_broken_and_nobody_who_waits_is_refused_while_replicas_are_replaced_in_turn() {
    let two = POOL.replace("slots = 4", "slots = 4\nreplicas = 2\ndevices = [\"0\", \"1\"]");
    streams_through("rolling", &two, 5, 2);
}

fn began(daemon: &Daemon, body: &Value) -> String {
    let answer = daemon.post("/v1/pools/chat/reload", &body.to_string());
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()["operation_id"].as_str().unwrap().to_owned()
}

fn ended(daemon: &Daemon, operation: &str) -> Value {
    daemon.get(&format!("/v1/operations/{operation}?wait_ms=60000")).json()
}

#[test]
fn of_reloads_that_are_wanted_at_once_the_last_one_wins_and_the_same_again_is_nothing() {
    let daemon = Daemon::start(&POOL.replace("\"20\"", "\"300\""));
    let before = daemon.until("chat", |p| p["ready"] == true);
    let models = ["stub:two", "stub:three", "stub:four", "stub:last"];
    let wishes = models.map(|model| began(&daemon, &json!({ "new_model_ref": model })));
    let [first, second, third, last] = wishes.map(|operation| ended(&daemon, &operation));
    for given_up in [&first, &second, &third] {
        assert_eq!(given_up["state"], "failed", "{given_up:#}");
        assert!(given_up["problem"].as_str().unwrap().contains("newer"), "{given_up:#}");
    }
    assert_eq!((&last["state"], &last["outcome"]), (&json!("succeeded"), &json!("reloaded")), "{last:#}");
    let now = daemon.until("chat", |p| p["ready"] == true && p["replicas"].as_array().unwrap().len() == 1);
    assert_eq!((&now["model"], &now["revision"]), (&json!("stub:last"), &json!(2)), "only what was committed counts");
    assert_ne!(now["replicas"][0]["pid"], before["replicas"][0]["pid"]);
    let again = ended(&daemon, &began(&daemon, &json!({ "new_model_ref": "stub:last" })));
    assert_eq!((&again["state"], &again["outcome"]), (&json!("succeeded"), &json!("unchanged")), "{again:#}");
    let same = daemon.pool("chat");
    for key in ["revision", "model"] {
        assert_eq!(same[key], now[key]);
    }
    assert_eq!(same["replicas"][0]["pid"], now["replicas"][0]["pid"]);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn when_the_way_back_fails_too_the_pool_has_failed_with_both_reasons_and_can_be_reloaded() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("old.gguf");
    // A header without tensors: enough to be staged.
    fs::write(&model, [b"GGUF\x03\0\0\0".as_slice(), &[0; 16]].concat()).unwrap();
    let pool = POOL.replace("stub:one", &format!("file:{}", model.display()));
    let daemon =
        Daemon::start_in(dir, &format!("[models]\nroots = [\"{}\"]\n{pool}", model.parent().unwrap().display()));
    daemon.until("chat", |p| p["ready"] == true);
    // What runs does not need it any more; to start again does.
    fs::remove_file(&model).unwrap();
    let wrong = json!({ "new_model_ref": "stub:new", "args": ["--serve-model", "other"], "strategy": "in_place" });
    let broken = ended(&daemon, &began(&daemon, &wrong));
    let problem = broken["problem"].as_str().unwrap();
    assert_eq!(broken["state"], "failed", "{broken:#}");
    let (why, undo) = problem.split_once("and so did the way back").unwrap_or_else(|| panic!("{problem}"));
    assert!(why.contains("other") && undo.contains("exist"), "{problem}");
    let failed = daemon.until("chat", |p| p["state"] == "failed");
    assert_eq!((&failed["ready"], &failed["live"]), (&json!(false), &json!(false)), "{failed:#}");
    let said = failed["reason"].as_str().unwrap();
    assert!(said.contains("other") && said.contains("exist"), "{failed:#}");
    let lease = daemon.post("/v1/pools/chat/leases", "{}");
    assert_eq!((lease.status, lease.json()["code"].as_str()), (503, Some("POOL_UNREADY")), "{lease:?}");
    // Nothing of it is lost: one that can serve does.
    let good = ended(&daemon, &began(&daemon, &json!({ "new_model_ref": "stub:good", "args": [] })));
    assert_eq!(good["state"], "succeeded", "{good:#}");
    assert_eq!(daemon.until("chat", |p| p["ready"] == true)["model"], "stub:good");
    assert_eq!(daemon.stop(), Some(0));
}
