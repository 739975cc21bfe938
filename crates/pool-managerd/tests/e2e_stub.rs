//! The faults, with the stub engine behind the real shim and the real daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::{Daemon, alive, processes_with, signal};

fn stub(id: &str, args: &str, more: &str) -> String {
    format!(
        "[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nargs = [{args}]\nactivation = \"preload\"\n{more}\n"
    )
}

#[test]
fn a_crash_loop_is_visible_everywhere() {
    let mut daemon = Daemon::start(&stub(
        "loop",
        r#""--crash-after-ms", "1", "--exit-code", "3""#,
        "[pool.backoff]\ninitial = \"50ms\"\nmax = \"400ms\"\n[pool.breaker]\nearly_crashes = 3\nfailed_starts = 3\nopen_for = \"1s\"\nmax_open_for = \"2s\"",
    ));
    let open = daemon.until("loop", |p| p["breaker"] == "open");
    assert_eq!(open["last_error"]["class"], "crash", "{open:#}");
    assert!(open["last_error"]["detail"].as_str().unwrap().contains("exit status 3"), "{open:#}");
    let status = daemon.cli(&["status"]);
    assert!(status.contains("open") && status.contains("loop"), "{status}");
    let metrics = daemon.get("/metrics").body;
    for family in ["pool_managerd_engine_starts_total", "pool_managerd_breaker", "pool_managerd_engine_failures_total"]
    {
        assert!(metrics.lines().any(|l| l.starts_with(family)), "{family} is missing:\n{metrics}");
    }
    assert!(daemon.wait_log("Restarting the loop pool in").contains("crashed for the first time"));
    daemon.wait_log("Not restarting the loop pool for 1.0 s: its engine keeps failing");
    daemon.wait_log("Trying to start the loop pool once more");
    let again = daemon.until("loop", |p| {
        p["breaker"] == "open" && p["replicas"][0]["generation"] != open["replicas"][0]["generation"]
    });
    let generation = |p: &serde_json::Value| p["replicas"][0]["generation"].as_u64().unwrap();
    assert_eq!(generation(&again), generation(&open) + 1, "half-open tries once: {again:#}");
    let refused = daemon.post("/v1/pools/loop/leases", r#"{"ttl_ms":1000}"#);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_UNAVAILABLE")), "{refused:?}");
    assert!(refused.head.to_ascii_lowercase().contains("retry-after"), "{refused:?}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn how_far_an_engine_has_loaded_is_told_while_it_loads() {
    let daemon = Daemon::start(&stub("slow", r#""--load-ms", "100000""#, ""));
    let loads = daemon.until("slow", |p| p["replicas"][0]["loaded_percent"].as_u64().is_some_and(|n| n > 0));
    assert_eq!((&loads["state"], loads["ready"] == true), (&"starting".into(), false), "{loads:#}");
    assert!(loads["reason"].as_str().unwrap().starts_with("the engine has loaded "), "{loads:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn healthy_but_not_decoding_is_never_ready_and_another_model_is_the_wrong_server() {
    let health = "[pool.health]\nstartup_stall = \"1s\"\nstartup_max = \"2s\"";
    let config =
        stub("mute", r#""--hang-after-requests", "0""#, health) + &stub("liar", r#""--serve-model", "other""#, "");
    let daemon = Daemon::start(&config);
    let mute = daemon.until("mute", |p| {
        assert_eq!(p["ready"], false);
        !p["last_error"].is_null()
    });
    assert_eq!(mute["last_error"]["class"], "start_timeout", "{mute:#}");
    let liar = daemon.until("liar", |p| {
        assert_eq!(p["ready"], false);
        !p["last_error"].is_null()
    });
    assert_eq!(liar["last_error"]["class"], "wrong_server", "{liar:#}");
    assert!(liar["last_error"]["detail"].as_str().unwrap().contains("other"), "{liar:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_ignores_sigterm_and_forked_twice_is_gone_after_stop() {
    let daemon = Daemon::start(&stub("stubborn", r#""--ignore-sigterm", "--double-fork", "--fork-children", "2""#, ""));
    let ready = daemon.until("stubborn", |p| p["ready"] == true);
    let main = u32::try_from(ready["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    let mut family = descendants_of_shim(main);
    family.push(main);
    assert!(family.len() >= 4, "main, two children and one detached: {family:?}");
    let stopped = daemon.post("/v1/pools/stubborn/stop?wait_ms=20000", "{}");
    assert_eq!(stopped.json()["state"], "succeeded", "{stopped:?}");
    assert!(family.iter().all(|p| !alive(*p)), "{family:?}");
    assert_eq!(daemon.pool("stubborn")["hold"], true);
    assert_eq!(daemon.stop(), Some(0));
}

/// Everything below the parent (the shim) of `main`.
fn descendants_of_shim(main: u32) -> Vec<u32> {
    let parent = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    let shim = parent(main).unwrap();
    let all: Vec<u32> = processes_with("");
    let below = |mut pid: u32| {
        while let Some(up) = parent(pid) {
            if up == shim {
                return true;
            }
            if up <= 1 {
                return false;
            }
            pid = up;
        }
        false
    };
    all.into_iter().filter(|p| *p != main && below(*p)).collect()
}

#[test]
fn nothing_is_restarted_before_the_children_of_a_dead_engine_are_gone() {
    let daemon = Daemon::start(&stub(
        "family",
        r#""--fork-children", "2", "--double-fork""#,
        "[pool.backoff]\ninitial = \"10ms\"\nmax = \"20ms\"",
    ));
    let ready = daemon.until("family", |p| p["ready"] == true);
    let main = u32::try_from(ready["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    let children = descendants_of_shim(main);
    assert!(children.len() >= 3, "{children:?}");
    signal(main, "KILL");
    daemon.until("family", |p| {
        let newer = p["replicas"][0]["generation"].as_u64() > Some(1);
        if newer {
            assert!(children.iter().all(|c| !alive(*c)), "a second generation beside children of the first");
        }
        newer && p["ready"] == true
    });
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_drain_with_stuck_leases_ends_in_time_and_resume_cancels_one() {
    let daemon = Daemon::start(&stub("busy", "", ""));
    daemon.until("busy", |p| p["ready"] == true);
    let lease = || daemon.post("/v1/pools/busy/leases", r#"{"ttl_ms":600000}"#);
    for _ in 0..3 {
        assert_eq!(lease().status, 201);
    }
    assert_eq!(daemon.pool("busy")["active_leases"], 3);

    assert_eq!(daemon.post("/v1/pools/busy/drain", r#"{"deadline_ms":60000}"#).status, 202);
    daemon.until("busy", |p| p["draining"] == true);
    let refused = lease();
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_DRAINING")), "{refused:?}");
    daemon.post("/v1/pools/busy/resume", "{}");
    let back = daemon.until("busy", |p| p["ready"] == true);
    assert_eq!((back["hold"].as_bool(), back["replicas"][0]["generation"].as_u64()), (Some(false), Some(1)));

    // The leases live for ten minutes: only the deadline can end this. How well it is kept is measured in benches/.
    let drained = daemon.post("/v1/pools/busy/drain?wait_ms=30000", r#"{"deadline_ms":2000,"on_deadline":"force"}"#);
    assert_eq!(drained.json()["state"], "succeeded", "{drained:?}");
    let rest = daemon.pool("busy");
    assert_eq!(
        (rest["state"].as_str(), rest["hold"].as_bool(), rest["active_leases"].as_u64()),
        (Some("idle"), Some(true), Some(0))
    );
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn memory_that_is_claimed_is_shown_and_given_back() {
    let daemon = Daemon::start(&stub("claim", r#""--vram", "3 GiB""#, "vram = \"4 GiB\"\ndevices = \"1\""));
    daemon.until("claim", |p| p["ready"] == true);
    let node = daemon.get("/v1/node").json();
    let device = &node["devices"][1];
    assert_eq!(
        (node["simulated"].as_bool(), device["vram_reserved_bytes"].as_u64()),
        (Some(true), Some(4 << 30)),
        "{node:#}"
    );
    let stopped = daemon.post("/v1/pools/claim/stop?wait_ms=20000", "{}");
    assert_eq!(stopped.json()["state"], "succeeded", "{stopped:?}");
    assert_eq!(daemon.stop(), Some(0));
}
