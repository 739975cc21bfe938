//! Hangs and what looks like one, with the stub engine behind the real shim and the real daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::Write;
use std::net::TcpStream;

use serde_json::Value;
use support::{Daemon, alive, eventually, request, signal};

fn stub(args: &str, health: &str) -> String {
    format!(
        "[[pool]]\nid = \"p\"\nmodel = \"stub:p\"\nengine = \"stub\"\nargs = [{args}]\nactivation = \"preload\"\n\
         [pool.backoff]\ninitial = \"10ms\"\nmax = \"20ms\"\n[pool.health]\n{health}\n"
    )
}

const QUICK: &str = "interval = \"200ms\"\ntimeout = \"2s\"";

fn main_process(pool: &Value) -> u32 {
    u32::try_from(pool["replicas"][0]["pid"].as_u64().unwrap()).unwrap()
}

fn endpoint(pool: &Value) -> String {
    pool["replicas"][0]["endpoint"].as_str().unwrap().trim_start_matches("http://").to_owned()
}

/// Asks for many tokens and does not wait for them.
fn ask(addr: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    let body = r#"{"prompt":"a b c","n_predict":100000,"stream":true}"#;
    let head = format!("POST /completion HTTP/1.1\r\nHost: {addr}\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).unwrap();
    stream
}

fn busy(addr: &str) -> bool {
    request(addr, "GET", "/slots", None).body.contains("\"is_processing\":true")
}

#[test]
fn a_busy_engine_that_decodes_no_more_is_killed_whole_and_comes_back_though_its_health_says_ok() {
    // One unit of work is its proof; a canary would hang in its place.
    let config = stub(r#""--hang-after-requests", "1", "--fork-children", "1""#, &format!("{QUICK}\ncanary = false"));
    let daemon = Daemon::start(&config);
    let ready = daemon.until("p", |p| p["ready"] == true);
    let addr = endpoint(&ready);
    let lease = daemon.post("/v1/pools/p/leases", r#"{"ttl_ms":600000}"#);
    assert_eq!(lease.status, 201, "{lease:?}");
    let _request = ask(&addr);
    eventually(|| busy(&addr).then_some(()));
    assert_eq!(request(&addr, "GET", "/health", None).status, 200);
    let back = daemon.until("p", |p| {
        p["ready"] == true && p["replicas"][0]["generation"].as_u64() > ready["replicas"][0]["generation"].as_u64()
    });
    // A port that was taken counts as a restart too.
    assert!(back["restart_count"].as_u64() > ready["restart_count"].as_u64(), "{back:#}");
    assert_eq!(back["last_error"]["class"], "hang", "{back:#}");
    let detail = back["last_error"]["detail"].as_str().unwrap();
    assert!(detail.contains("1 running and 0 waiting requests got no token and no prompt progress"), "{detail}");
    assert!(!alive(main_process(&ready)));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_idle_engine_that_decodes_no_more_is_found_by_its_canary() {
    let daemon = Daemon::start(&stub(r#""--hang-after-requests", "2""#, QUICK));
    // Its proof is one, the first canary the other.
    daemon.until("p", |p| p["last_error"]["class"] == "hang");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_works_is_left_alone_and_one_that_is_stopped_dead_is_not() {
    // Slow tokens, and one slot for it: whoever asks has to wait.
    let daemon =
        Daemon::start(&stub(r#""--tokens-per-second", "10", "--slots", "1""#, "interval = \"1s\"\ntimeout = \"3s\""));
    let ready = daemon.until("p", |p| p["ready"] == true);
    let addr = endpoint(&ready);
    let _request = ask(&addr);
    eventually(|| busy(&addr).then_some(()));
    // Some checks later it is as it was.
    let seen = |p: &Value| p["replicas"][0]["last_check_at"].as_str().map(ToOwned::to_owned);
    let mut checks = Vec::new();
    let well = daemon.until("p", |p| {
        if let Some(at) = seen(p).filter(|at| checks.last() != Some(at)) {
            checks.push(at);
        }
        checks.len() > 3
    });
    assert_eq!((&well["ready"], &well["last_error"]), (&Value::Bool(true), &ready["last_error"]), "{well:#}");
    signal(main_process(&ready), "STOP");
    let hung = daemon.until("p", |p| p["last_error"] != ready["last_error"]);
    assert_eq!(hung["last_error"]["class"], "hang", "{hung:#}");
    daemon.until("p", |p| p["ready"] == true);
    assert!(!alive(main_process(&ready)));
    assert_eq!(daemon.stop(), Some(0));
}
