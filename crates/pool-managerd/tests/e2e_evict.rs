//! Two models of 12 GiB on one simulated GPU of 16 GiB, behind the real daemon: who gives way, and who waits.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;

use serde_json::Value;
use support::{Daemon, Engines, alive, engine_ports, request, write_config};

const ONE_GPU: &str = r#"[[device]]
name = "Simulated GPU of 16 GiB"
uuid = "GPU-51000000-0000-4000-8000-000000000016"
vram = "16 GiB"
compute_capability = "8.9"
"#;

fn large(id: &str, more: &str) -> String {
    let args = r#""--load-ms", "50", "--vram", "11 GiB""#;
    format!(
        "[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nargs = [{args}]\nvram = \"12 GiB\"\nactivation = \"on_demand\"\n{more}\n"
    )
}

/// A daemon on one GPU of 16 GiB that evicts engines once they were ready for this long.
fn start(min_ready_time: &str, pools: &str) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let node = format!(
        "[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\nmin_ready_time = \"{min_ready_time}\"\n",
        engine_ports()
    );
    // The section of the node has to come first, and the helper writes none where there is one.
    let file = write_config(dir.path(), &format!("{pools}\n# [node]\n"));
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, node + &text).unwrap();
    fs::write(dir.path().join("two-gpus.toml"), ONE_GPU).unwrap();
    Daemon::start_in_place(dir)
}

/// What one request for a lease is answered that waits for so long.
fn ask(addr: &str, pool: &str, wait_ms: u64) -> (u16, Value) {
    let body = serde_json::json!({ "ttl_ms": 600_000, "wait_ms": wait_ms });
    let answer = request(addr, "POST", &format!("/v1/pools/{pool}/leases"), Some(&body.to_string()));
    (answer.status, answer.json())
}

/// A lease, for which nobody asks twice.
fn lease(addr: &str, pool: &str) -> String {
    let (status, body) = ask(addr, pool, 60_000);
    assert_eq!(status, 201, "{body:#}");
    body["lease_id"].as_str().unwrap().to_owned()
}

#[test]
fn two_models_that_are_too_large_for_one_gpu_take_turns_and_no_request_is_lost() {
    let mut daemon = start("0s", &(large("a", "") + &large("b", "")));
    let engines = Engines::of(&daemon);
    for round in 0..6 {
        let (pool, other) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        let lease = lease(daemon.addr(), pool);
        assert_eq!(daemon.pool(pool)["ready"], true);
        assert_eq!(engines.running().len(), 1, "both are resident");
        assert_eq!(daemon.pool(other)["live"], false, "both are resident");
        assert_eq!(daemon.delete(&format!("/v1/leases/{lease}")).status, 204);
    }
    assert_eq!(engines.starts().len(), 6, "each waits for one start");
    daemon.wait_log("The a pool gives way to the b pool");
    daemon.wait_log("The b pool gives way to the a pool");
    let metrics = daemon.get("/metrics").body;
    let evicted = |pool: &str| metrics.contains(&format!("evictions_total{{pool_id=\"{pool}\",replica_id=\"r0\"}} 3"));
    assert!(evicted("a") && metrics.contains("evictions_total{pool_id=\"b\",replica_id=\"r0\"} 2"), "{metrics}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn while_one_is_busy_the_other_waits_and_is_told_for_what() {
    let daemon = start("0s", &(large("a", "") + &large("b", "")));
    let engines = Engines::of(&daemon);
    let held = lease(daemon.addr(), "a");
    let (status, refused) = ask(daemon.addr(), "b", 300);
    assert_eq!((status, refused["code"].as_str()), (503, Some("INSUFFICIENT_VRAM")), "{refused:#}");
    let waiting = daemon.until("b", |p| p["replicas"][0]["reason_code"] == "vram");
    let reason = waiting["reason"].as_str().unwrap();
    assert!(reason.contains("4.0 GiB left of the 12.0 GiB needed; `a` stays: it is busy"), "{reason}");
    let (status, refused) = ask(daemon.addr(), "b", 0);
    assert_eq!((status, refused["code"].as_str()), (503, Some("INSUFFICIENT_VRAM")), "{refused:#}");
    assert!(refused["hint"].as_str().is_some() && refused["retry_after_ms"].as_u64().is_some(), "{refused:#}");
    let first = engines.running();
    assert_eq!(daemon.pool("a")["ready"], true);
    // Who waits longer has it as soon as it is free.
    let patient = std::thread::scope(|s| {
        let addr = daemon.addr();
        let patient = s.spawn(move || lease(addr, "b"));
        daemon.until("b", |p| p["leases_waiting"] == 1);
        assert_eq!(daemon.delete(&format!("/v1/leases/{held}")).status, 204);
        patient.join().unwrap()
    });
    assert_eq!(daemon.delete(&format!("/v1/leases/{patient}")).status, 204);
    assert!(!first.iter().any(|pid| alive(*pid)), "both are resident");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_gave_way_comes_back_when_the_new_one_fails() {
    let broken = large("b", "").replace(r#""--load-ms", "50""#, r#""--serve-model", "another""#);
    let daemon = start("0s", &(large("a", "") + &broken));
    let held = lease(daemon.addr(), "a");
    let before = daemon.pool("a")["replicas"][0]["generation"].as_u64();
    assert_eq!(daemon.delete(&format!("/v1/leases/{held}")).status, 204);
    ask(daemon.addr(), "b", 0);
    let failed = daemon.until("b", |p| !p["last_error"].is_null());
    assert_eq!(failed["last_error"]["class"], "wrong_server", "{failed:#}");
    daemon.until("a", |p| p["ready"] == true && p["replicas"][0]["generation"].as_u64() > before);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_that_nobody_uses_stops_and_the_next_request_starts_it() {
    let mut daemon = start("0s", &large("a", "idle_ttl = \"1s\""));
    let held = lease(daemon.addr(), "a");
    assert_eq!(daemon.delete(&format!("/v1/leases/{held}")).status, 204);
    let stopped = daemon.until("a", |p| p["state"] == "idle" && p["snapshot"].as_u64() > Some(1));
    assert_eq!(stopped["hold"], false);
    daemon.wait_log("Stopping the a pool: nobody used it for 1.0 s");
    lease(daemon.addr(), "a");
    assert_eq!(daemon.stop(), Some(0));
}
