//! What engines and answers say of tokens and time: the real daemon with stub engines.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use serde_json::Value;
use support::{Daemon, Engines, eventually, signal};

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
args = ["--tokens-per-second", "1000"]
activation = "preload"
[pool.health]
interval = "200ms"
timeout = "100ms"
[pool.backoff]
initial = "100ms"
max = "1s"
"#;

/// The value of a metric of the pool, summed over its other labels that hold `part`.
fn metric(daemon: &Daemon, name: &str, part: &str) -> Option<f64> {
    let text = daemon.get("/metrics").body;
    let of = |line: &&str| line.starts_with(&format!("pool_managerd_{name}{{pool_id=\"chat\"")) && line.contains(part);
    let values = text.lines().filter(of).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
    values.reduce(|a, b| a + b)
}

#[test]
fn tokens_and_speed_are_known_through_crashes_and_restarts() {
    let mut daemon = Daemon::start(POOL);
    let engines = Engines::of(&daemon);
    let ready = daemon.until("chat", |p| p["ready"] == true);
    assert!(ready["perf"]["first_token_ms"].is_u64() && ready["perf"]["tokens_per_s"].is_f64(), "{ready:#}");

    let ask = |stream: bool, options: &str| {
        let body = format!(
            r#"{{"model":"chat","messages":[{{"role":"user","content":"one two three"}}],"max_tokens":40,"stream":{stream}{options}}}"#
        );
        let answer = daemon.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    };
    let whole: Value = serde_json::from_str(&ask(false, "")).unwrap();
    let prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    let streamed = ask(true, r#","stream_options":{"include_usage":true}"#);
    assert!(streamed.contains("\"usage\":{") && streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
    // What the gateway saw: both answers, and the time of the one that streamed.
    eventually(|| (metric(&daemon, "gateway_tokens_total", "\"out\"") == Some(80.0)).then_some(()));
    assert_eq!(metric(&daemon, "gateway_tokens_total", "\"in\""), Some(2.0 * prompt as f64));
    assert_eq!(metric(&daemon, "gateway_first_token_seconds_count", ""), Some(1.0));
    assert!(metric(&daemon, "gateway_token_latency_seconds_count", "").unwrap() >= 1.0);
    let past = daemon.get("/v1/events?follow=false").body;
    let mut events = past.lines().filter_map(|l| serde_json::from_str::<Value>(l.strip_prefix("data: ")?).ok());
    let ended = events.find(|e| e["event"] == "stream_ended").unwrap();
    assert_eq!((ended["tokens_in"].as_u64(), ended["tokens_out"].as_u64()), (Some(prompt), Some(40)), "{ended:#}");
    assert!(ended["decode_time_ms"].as_u64().unwrap() >= 30, "39 tokens of a millisecond each: {ended:#}");

    // What the engine counts: beside the two answers the daemon's own questions.
    let before = eventually(|| metric(&daemon, "engine_generated_tokens_total", "").filter(|n| *n >= 81.0));
    assert!(metric(&daemon, "engine_requests_running", "").is_some());
    let known = daemon.until("chat", |p| p["perf"]["tokens_per_s"].as_f64().is_some_and(|t| t > 0.0));
    signal(known["replicas"][0]["pid"].as_u64().unwrap().try_into().unwrap(), "KILL");
    daemon.wait_log("Restarting the chat pool in");
    daemon.until("chat", |p| p["ready"] == true && p["restart_count"] == 1);
    let go_on = |n: &f64| *n > before;
    eventually(|| metric(&daemon, "engine_generated_tokens_total", "").filter(go_on));
    let load = daemon.get("/v1/autoscale").json();
    assert!(load["pools"]["chat"]["engine_running"].is_u64(), "{load:#}");

    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    let config = std::fs::read_to_string(dir.path().join("pool-managerd.toml")).unwrap();
    std::fs::write(dir.path().join("pool-managerd.toml"), config.replace("\"preload\"", "\"on_demand\"")).unwrap();
    let daemon = Daemon::start_in_place(dir);
    let at_rest = daemon.until("chat", |p| p["state"] == "idle");
    assert!(at_rest["perf"]["tokens_per_s"].as_f64().unwrap() > 0.0, "known before the first start: {at_rest:#}");
    assert_eq!(daemon.stop(), Some(0));
}
