//! Events and logs of the real daemon, over HTTP and on the command line.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Stdio};

use serde_json::{Value, json};
use support::{Daemon, Engines, PATIENCE, alive, binary, request_with, signal};

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
slots = 2
args = ["--slots", "2"]
activation = "preload"
[pool.backoff]
initial = "100ms"
max = "1s"
"#;

/// What comes of a stream, line by line.
struct Lines(BufReader<TcpStream>);

impl Lines {
    fn open(addr: &str, path: &str) -> Self {
        let mut socket = TcpStream::connect(addr).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n").unwrap();
        let mut lines = Self(BufReader::new(socket));
        lines.until("content-type: text/event-stream");
        lines
    }

    fn until(&mut self, part: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "the stream ended before {part}");
            if line.contains(part) {
                return line.trim().to_owned();
            }
        }
    }
}

/// A command of a client that goes on; it ends with the test.
struct Following(Child, BufReader<ChildStdout>);

impl Following {
    fn start(args: &[&str], server: &str) -> Self {
        let mut command = binary();
        command.args(args).args(["--server", server]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self(child, out)
    }

    fn until(&mut self, part: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.1.read_line(&mut line).unwrap() > 0, "the command ended before {part}");
            if line.contains(part) {
                return line;
            }
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn events(text: &str) -> Vec<(String, Value)> {
    let ids = text.lines().filter_map(|l| l.strip_prefix("id: ")).map(str::to_owned);
    let data = text.lines().filter_map(|l| l.strip_prefix("data: ")).filter_map(|l| serde_json::from_str(l).ok());
    ids.zip(data).collect()
}

#[test]
fn what_happens_is_told_as_it_happens_and_who_comes_back_misses_nothing() {
    let daemon = Daemon::start(POOL);
    let ready = daemon.until("chat", |p| p["ready"] == true);
    let mut live = Lines::open(daemon.addr(), "/v1/events");
    live.until(": events");
    let pid = u32::try_from(ready["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    signal(pid, "KILL");
    let failed: Value = serde_json::from_str(&live.until("\"event\":\"engine_failed\"")[6..]).unwrap();
    assert_eq!(
        (&failed["pool_id"], &failed["class"], &failed["generation"]),
        (&json!("chat"), &json!("crash"), &json!(1))
    );
    assert_eq!(failed["human"], "The engine of the chat pool crashed for the first time");
    live.until("\"event\":\"became_ready\"");
    assert!(!alive(pid));

    let past = daemon.get("/v1/events?follow=false").body;
    let all = events(&past);
    let order = ["became_ready", "engine_failed", "restart_planned", "restarting", "became_ready"];
    let mut seen = all.iter().map(|(_, e)| e["event"].as_str().unwrap());
    for kind in order {
        assert!(seen.any(|k| k == kind), "{kind} is not in order: {past}");
    }
    let (id, _) = all.iter().find(|(_, e)| e["event"] == "engine_failed").unwrap();
    let back = request_with(daemon.addr(), "GET", "/v1/events?follow=false", &format!("Last-Event-ID: {id}\r\n"), None);
    let rest = events(&back.body);
    let at = all.iter().position(|(i, _)| i == id).unwrap();
    assert_eq!(rest[..], all[at + 1..]);
    let of_none = daemon.get("/v1/events?follow=false&pool_id=other").body;
    assert!(events(&of_none).is_empty());

    // The same on the command line.
    let told = daemon.cli(&["events", "chat"]);
    assert!(told.contains("Z  The engine of the chat pool crashed for the first time"), "{told}");
    let json = daemon.cli(&["events", "-n", "1", "--json"]);
    assert_eq!(json.lines().count(), 1);
    assert!(serde_json::from_str::<Value>(&json).unwrap()["event"].is_string(), "{json}");
    assert_eq!(daemon.stop(), Some(0), "listeners do not hold it up");
}

#[test]
fn a_log_is_read_and_followed_into_the_next_engine() {
    let daemon = Daemon::start(POOL);
    let engines = Engines::of(&daemon);
    let ready = daemon.until("chat", |p| p["ready"] == true);
    let server = format!("http://{}", daemon.addr());
    let log = daemon.cli(&["logs", "chat"]);
    assert!(log.lines().count() >= 1 && !log.contains("hint"), "{log}");
    let mut following = Following::start(&["logs", "chat", "-f"], &server);
    let first = log.lines().last().unwrap();
    following.until(first);
    let mut raw = Lines::open(daemon.addr(), "/v1/pools/chat/logs?follow=true&tail=0");
    raw.until(": log");
    let pid = u32::try_from(ready["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    signal(pid, "KILL");
    following.until("(engine 2 begins)");
    raw.until("event: generation");
    assert_eq!(raw.until("data: "), "data: 2");
    following.until(first.split(':').next().unwrap());
    let unknown = daemon.cli(&["logs", "nobody"]);
    assert!(unknown.contains("there is no pool `nobody`"), "{unknown}");
    let replica = daemon.cli(&["logs", "chat", "--replica", "r7"]);
    assert!(replica.contains("no such replica"), "{replica}");
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}

#[test]
fn the_node_at_a_glance() {
    let daemon = Daemon::start(&POOL.replace("slots = 2", "slots = 2\naliases = [\"gpt-4o-mini\"]"));
    daemon.until("chat", |p| p["ready"] == true);
    let pool = daemon.pool("chat");
    assert!(pool["vram_total_bytes"].as_u64().unwrap() >= pool["vram_free_bytes"].as_u64().unwrap(), "{pool:#}");
    assert!(pool["compute_capability"].is_string(), "{pool:#}");
    let can = daemon.get("/v1/capabilities").json();
    let stub = can["engines"].as_array().unwrap().iter().find(|e| e["name"] == "stub").unwrap();
    assert_eq!((&can["models"], &stub["versions"][0]), (&json!(["chat"]), &pool["engine_version"]));
    assert_eq!((&can["pools"][0]["slots_total"], &can["workloads"]), (&json!(2), &json!(["generate"])), "{can:#}");
    let table = daemon.cli(&["capabilities"]);
    assert!(table.contains("gpt-4o-mini") && table.contains("llama.cpp"), "{table}");
    daemon.post("/v1/pools/chat/leases", "{}");
    let load = daemon.get("/v1/autoscale").json();
    assert_eq!(
        (&load["pools"]["chat"]["active"], &load["pools"]["chat"]["utilisation_percent"]),
        (&json!(1), &json!(50))
    );
    let targets = daemon.get("/v1/sd/prometheus").json();
    let endpoint = pool["replicas"][0]["endpoint"].as_str().unwrap();
    assert_eq!(format!("http://{}", targets[0]["targets"][0].as_str().unwrap()), endpoint);
    // What Prometheus would scrape there is there.
    let scraped = support::request(targets[0]["targets"][0].as_str().unwrap(), "GET", "/metrics", None);
    assert!(scraped.status == 200 && scraped.body.contains("requests_processing"), "{scraped:?}");
}
