//! What outlives a daemon, seen from outside.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::stream::Stream;
use support::{Daemon, Engines, alive, eventually};

#[test]
fn a_crash_loop_is_not_reset_by_restarting_the_daemon() {
    let config = r#"
[[pool]]
id = "loop"
model = "stub:loop"
engine = "stub"
args = ["--crash-after-ms", "1", "--exit-code", "3"]
activation = "preload"
[pool.backoff]
initial = "10ms"
max = "50ms"
[pool.breaker]
failed_starts = 3
early_crashes = 3
open_for = "290s"
"#;
    let number = |p: &Value, name: &str| p["replicas"][0][name].as_u64().unwrap();
    let rest = |p: &Value| p["replicas"][0]["backoff"]["next_start_in_ms"].as_u64().unwrap();
    let opens = |p: &Value| p["state"] == "waiting" && p["breaker"] == "open";
    let mut daemon = Daemon::start(config);
    let mut before = daemon.until("loop", opens);
    for signal in ["KILL", "TERM", "TERM"] {
        if signal == "KILL" {
            // It is written beside the work, and a daemon that is killed has no last word.
            let record = daemon.dir().join("state/ledger/loop.json.copy");
            eventually(|| fs::read_to_string(&record).ok().filter(|text| text.contains("\"open\"")));
        }
        daemon = Daemon::start_in(daemon.end_by(signal), config);
        let after = daemon.until("loop", opens);
        daemon.wait_log("its engine failed before");
        assert_eq!(number(&after, "generation"), number(&before, "generation"), "{signal}: {after:#}");
        assert_eq!(number(&after, "restart_count"), number(&before, "restart_count"), "{signal}: {after:#}");
        assert!(rest(&after) <= rest(&before), "{signal}: {after:#}");
        before = after;
    }
    let refused = daemon.post("/v1/pools/loop/leases", r#"{"ttl_ms":1000}"#);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_UNAVAILABLE")), "{refused:?}");
    // A person may close it, and that stays, too.
    assert_eq!(daemon.post("/v1/pools/loop/breaker/reset", "{}").status, 204);
    let again = daemon.until("loop", opens);
    assert!(number(&again, "generation") > number(&before, "generation"), "{again:#}");
    assert_eq!(daemon.stop(), Some(0));
}

/// The parent of a process.
fn parent(pid: u64) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_device_is_fenced_while_something_may_be_left_and_unfence_or_proof_ends_it() {
    let pool = |id: &str, activation: &str| {
        format!(
            "[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\ndevices = \"0\"\n\
             activation = \"{activation}\"\n"
        )
    };
    let daemon = Daemon::start(&(pool("sick", "preload") + &pool("well", "on_demand")));
    let ready = daemon.until("sick", |p| p["ready"] == true);
    // Stopped, the shim can neither end its engine nor say that it has: like one whose engine waits for a driver.
    let shim = parent(ready["replicas"][0]["pid"].as_u64().unwrap());
    support::signal(shim, "STOP");
    let stopped = daemon.post("/v1/pools/sick/stop?wait_ms=60000", "{}");
    assert!(stopped.json()["problem"].as_str().unwrap().contains("fenced"), "{stopped:?}");
    let device = eventually(|| {
        let device = daemon.get("/v1/node").json()["devices"][0].clone();
        (device["health"] == "fenced").then_some(device)
    });
    let uuid = device["uuid"].as_str().unwrap();
    assert!(device["health_detail"].as_str().unwrap().contains("sick"), "{device:#}");
    assert!(daemon.cli(&["devices"]).contains("fenced"));
    let line = format!("pool_managerd_gpu_health{{gpu_uuid=\"{uuid}\",mig=\"\",pool_id=\"\",health=\"fenced\"}} 1");
    assert!(daemon.get("/metrics").body.contains(&line));
    daemon.post("/v1/pools/well/preload", "{}");
    daemon.until("well", |p| p["state"] == "waiting" && p["reason"].as_str().unwrap().contains("fenced"));

    let unknown = daemon.post("/v1/devices/GPU-nope/unfence", "{}");
    assert_eq!((unknown.status, unknown.json()["code"].as_str()), (404, Some("DEVICE_NOT_FOUND")), "{unknown:?}");
    assert!(daemon.cli(&["unfence", "0"]).contains("nothing is fenced on 0"));
    daemon.until("sick", |p| p["state"] == "idle");
    daemon.until("well", |p| p["ready"] == true);
    assert_eq!(daemon.post(&format!("/v1/devices/{uuid}/unfence"), "{}").status, 204);
    assert_eq!(daemon.get("/v1/node").json()["devices"][0]["health"], "ok");
    support::signal(shim, "CONT");
    eventually(|| (!support::alive(shim)).then_some(()));
    assert_eq!(daemon.stop(), Some(0));
}

/// What the record of an engine says of its drain: the deadline, in milliseconds since the machine was booted.
fn recorded_deadline(dir: &Path) -> Option<u64> {
    let record: Value = serde_json::from_str(&fs::read_to_string(dir.join("state/engines/chat-r0.json")).ok()?).ok()?;
    fn find(value: &Value) -> Option<u64> {
        let object = value.as_object()?;
        object.get("deadline").and_then(Value::as_u64).or_else(|| object.values().find_map(find))
    }
    find(&record)
}

/// Milliseconds since the machine was booted, within ten of them.
fn uptime() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap();
    let (seconds, parts) = text.split_whitespace().next().unwrap().split_once('.').unwrap();
    seconds.parse::<u64>().unwrap() * 1000 + parts.parse::<u64>().unwrap() * 10
}

#[test]
fn a_drain_ends_at_its_deadline_though_the_daemon_was_killed_meanwhile() {
    let config = "[[pool]]\nid = \"chat\"\nmodel = \"stub:chat\"\nengine = \"stub\"\nactivation = \"preload\"\n";
    let daemon = Daemon::start(config);
    let engines = Engines::of(&daemon);
    let pool = daemon.until("chat", |p| p["ready"] == true);
    let lease = daemon.post("/v1/pools/chat/leases", r#"{"ttl_ms":600000}"#);
    assert_eq!(lease.status, 201, "{lease:?}");
    let mut stream = Stream::open(&pool);
    let before = uptime();
    let drain = daemon.post("/v1/pools/chat/drain", r#"{"deadline_ms":6000}"#);
    assert_eq!(drain.status, 202, "{drain:?}");
    let deadline = eventually(|| recorded_deadline(daemon.dir()));
    assert!(before + 5_990 <= deadline, "{before} {deadline}");
    let dir = daemon.kill(&engines);
    stream.goes_on();
    let mut daemon = Daemon::start_in_place(dir);
    let engine = u32::try_from(pool["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    let stopped = daemon.until("chat", |p| {
        let gone = !alive(engine);
        // A record that is there, is there with the deadline that it had.
        let recorded = recorded_deadline(daemon.dir()).unwrap_or(deadline);
        assert_eq!(recorded, deadline, "{p:#}");
        assert_eq!(p["ready"], false, "{p:#}");
        gone && p["state"] == "idle"
    });
    assert!(uptime() + 10 >= deadline, "it was cut off before its time");
    assert_eq!((&stopped["hold"], &stopped["replicas"][0]["generation"]), (&true.into(), &1.into()), "{stopped:#}");
    daemon.wait_log("The drain of the chat pool ended (forced)");
    assert_eq!(daemon.stop(), Some(0));
}
