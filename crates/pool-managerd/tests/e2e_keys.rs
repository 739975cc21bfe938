//! Engines that want an API key: the real daemon with stub engines, and with llama.cpp's real server.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{Daemon, Engines, engine_ports, eventually, request, request_with, signal};

/// Keys on loopback, too.
fn node() -> String {
    let ports = engine_ports();
    format!("[node]\nstate_dir = \"state\"\nengine_keys = \"always\"\nengine_ports = \"{ports}\"\n")
}

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
slots = 4
activation = "preload"
[pool.health]
interval = "200ms"
timeout = "100ms"
[pool.backoff]
initial = "100ms"
max = "1s"
"#;
const ASK: &str = r#"{"model":"chat","messages":[{"role":"user","content":"hello"}],"max_tokens":4}"#;

/// A lease: where it leads, and the key.
fn lease(daemon: &Daemon) -> (String, String) {
    let lease = daemon.post("/v1/pools/chat/leases", "{}").json();
    let endpoint = &lease["endpoint"];
    let key = endpoint["api_key"].as_str().unwrap_or_else(|| panic!("no key: {lease:#}"));
    assert!(key.len() == 64 && key.bytes().all(|b| b.is_ascii_hexdigit()), "{key}");
    (endpoint["url"].as_str().unwrap().trim_start_matches("http://").to_owned(), key.to_owned())
}

fn bearer(key: &str) -> String {
    format!("Authorization: Bearer {key}\r\n")
}

/// Every file below, with what it holds.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().flatten().map(|e| e.path()));
        } else if path.is_file() {
            let held = fs::read(&path).unwrap_or_default();
            found.push((path, held));
        }
    }
    found
}

fn holds(bytes: &[u8], key: &str) -> bool {
    bytes.windows(key.len()).any(|w| w == key.as_bytes())
}

#[test]
fn an_engine_serves_whoever_has_a_lease_and_nobody_else_and_its_key_is_shown_nowhere() {
    let mut daemon = Daemon::start(&(node() + POOL));
    let _engines = Engines::of(&daemon);
    let ready = daemon.until("chat", |p| p["ready"] == true);
    let (engine, key) = lease(&daemon);
    assert_eq!(request(&engine, "GET", "/slots", None).status, 401);
    assert_eq!(request_with(&engine, "GET", "/slots", &bearer("wrong"), None).status, 401);
    assert_eq!(request_with(&engine, "GET", "/slots", &bearer(&key), None).status, 200);
    // The gateway has it, and takes no key of a client for one of the engine.
    let through = request_with(daemon.addr(), "POST", "/v1/chat/completions", &bearer("sk-of-a-client"), Some(ASK));
    assert_eq!(through.status, 200, "{through:?}");
    // So has the watch: it reads the engine's work and numbers, which are not for everybody.
    let told = eventually(|| {
        let metrics = daemon.get("/metrics").body;
        metrics.contains("pool_managerd_engine_generated_tokens_total{").then_some(metrics)
    });
    let lease_id = daemon.get("/v1/leases").json()[0]["lease_id"].as_str().unwrap().to_owned();
    let renewed = daemon.post(&format!("/v1/leases/{lease_id}/renew"), "{}").json();
    assert_eq!(renewed["endpoint"]["api_key"], json!(key), "who may go on may know");

    // The canary: where it may not be.
    signal(ready["replicas"][0]["pid"].as_u64().unwrap().try_into().unwrap(), "KILL");
    daemon.wait_log("Restarting the chat pool in");
    let next = daemon.until("chat", |p| p["ready"] == true && p["restart_count"] == 1);
    let (_, second) = lease(&daemon);
    assert_ne!(second, key, "each engine has its own");
    let pid = &next["replicas"][0]["pid"];
    let shown = [
        told,
        daemon.get("/v1/pools").body,
        daemon.get("/v1/leases").body,
        daemon.get("/v1/events?follow=false").body,
        daemon.get("/v1/pools/chat/logs").body,
        daemon.get("/v1/sd/prometheus").body,
        daemon.post("/v1/plan", r#"{"pool":"chat"}"#).body,
        daemon.cli(&["status", "chat"]),
        String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap()).into_owned(),
        daemon.log_so_far(),
    ];
    for text in &shown {
        assert!(!text.contains(&key) && !text.contains(&second), "{text}");
    }
    let allowed = ["handoff", "engines", "work"];
    let handoff = daemon.dir().join("state/handoff/chat-r0.json");
    eventually(|| holds(&fs::read(&handoff).unwrap_or_default(), &second).then_some(()));
    for (path, held) in files(daemon.dir()) {
        if holds(&held, &key) || holds(&held, &second) {
            let below = path.strip_prefix(daemon.dir().join("state")).unwrap().to_string_lossy().into_owned();
            assert!(below.split('/').any(|part| allowed.contains(&part)), "{below}");
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "{below}");
        }
    }
    let told: Value = serde_json::from_slice(&fs::read(&handoff).unwrap()).unwrap();
    assert_eq!(told["api_key"], json!(second));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_is_taken_over_keeps_its_key() {
    let daemon = Daemon::start(&(node() + POOL));
    let engines = Engines::of(&daemon);
    let before = daemon.until("chat", |p| p["ready"] == true);
    let (engine, key) = lease(&daemon);
    let dir = daemon.kill(&engines);
    assert_eq!(engines.running().len(), 1, "it serves on");
    let daemon = Daemon::start_in_place(dir);
    let after = daemon.until("chat", |p| p["ready"] == true);
    assert_eq!(after["replicas"][0]["pid"], before["replicas"][0]["pid"]);
    // Its slots count as taken for a while: the handoff tells at once.
    let handoff = daemon.dir().join("state/handoff/chat-r0.json");
    let told: Value = eventually(|| serde_json::from_slice(&fs::read(&handoff).ok()?).ok());
    assert_eq!((&told["endpoint"], &told["api_key"]), (&json!(format!("http://{engine}")), &json!(key)));
    let through = request_with(&engine, "POST", "/v1/chat/completions", &bearer(&key), Some(ASK));
    assert_eq!(through.status, 200, "{through:?}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn without_a_wish_engines_on_loopback_have_no_key() {
    let daemon = Daemon::start(POOL);
    daemon.until("chat", |p| p["ready"] == true);
    let lease = daemon.post("/v1/pools/chat/leases", "{}").json();
    assert!(lease["endpoint"].get("api_key").is_none(), "{lease:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn the_real_llama_server_takes_its_key() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/engine");
    let dir = dir.canonicalize().expect("the real engine is missing: run `cargo xtask engine`");
    let daemon = Daemon::start(&format!(
        "{}[models]\nroots = [\"{models}\"]\n[engines.\"llama.cpp\"]\nkind = \"llama.cpp\"\nmode = \"binary\"\n\
         path = \"{bin}\"\n[[pool]]\nid = \"chat\"\nmodel = \"file:{models}/tiny.gguf\"\nengine = \"llama.cpp\"\n\
         context = 512\nslots = 2\nvram = \"1 GiB\"\nactivation = \"preload\"\n\
         [pool.health]\ninterval = \"500ms\"\ntimeout = \"400ms\"\n",
        node(),
        models = dir.join("models").display(),
        bin = dir.join("bin/llama-server").display(),
    ));
    daemon.until("chat", |p| p["ready"] == true);
    let (engine, key) = lease(&daemon);
    let ask = ASK.replace("hello", "once upon a time");
    assert_eq!(request(&engine, "POST", "/v1/chat/completions", Some(&ask)).status, 401);
    assert_eq!(request_with(&engine, "POST", "/v1/chat/completions", &bearer(&key), Some(&ask)).status, 200);
    assert_eq!(daemon.post("/v1/chat/completions", &ask).status, 200);
    // Read with the key, as its health is.
    let line = eventually(|| {
        let metrics = daemon.get("/metrics").body;
        metrics.lines().find(|l| l.starts_with("pool_managerd_engine_generated_tokens_total{")).map(str::to_owned)
    });
    assert!(line.rsplit(' ').next().unwrap().parse::<u64>().unwrap() >= 1, "{line}");
    assert_eq!(daemon.pool("chat")["ready"], true);
    assert_eq!(daemon.stop(), Some(0));
}
