//! The gateway of the real daemon, before the stub engine.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;

use serde_json::{Value, json};
use support::{Answer, Daemon, Engines, PATIENCE, alive, eventually, request, request_with, signal};

const POOLS: &str = r#"
[[pool]]
id = "chat"
model = "stub:tiny"
engine = "stub"
aliases = ["gpt-4o-mini"]
slots = 1
args = ["--slots", "1", "--load-ms", "300", "--tokens-per-second", "50"]
[pool.backoff]
initial = "100ms"
max = "1s"
[[pool]]
id = "vectors"
model = "stub:embedder"
engine = "stub"
workload = "embed"
"#;

/// A stream through the gateway, or before it.
struct Stream {
    head: String,
    lines: BufReader<TcpStream>,
}

impl Stream {
    fn open(addr: &str, path: &str, headers: &str, body: &Value) -> Self {
        let mut socket = TcpStream::connect(addr).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        write!(
            socket,
            "POST {path} HTTP/1.1\r\nHost: {addr}\r\n{headers}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut lines = BufReader::new(socket);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(lines.read_line(&mut head).unwrap() > 0, "no answer: {head}");
        }
        Self { head, lines }
    }

    /// The next line that begins so; what comes before it is passed over.
    fn next(&mut self, begin: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the stream ended before `{begin}`");
            if let Some(rest) = line.strip_prefix(begin) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Everything up to the end of the answer.
    fn rest(mut self) -> String {
        let mut out = String::new();
        while !out.ends_with("\r\n0\r\n\r\n") && self.lines.read_line(&mut out).unwrap() > 0 {}
        out
    }
}

fn chat(tokens: u64, stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": "go on" }]);
    json!({ "model": "chat", "messages": messages, "max_tokens": tokens, "stream": stream })
}

fn complete(daemon: &Daemon, body: &Value) -> Answer {
    daemon.post("/v1/chat/completions", &body.to_string())
}

fn started(config: &str) -> Daemon {
    let daemon = Daemon::start(config);
    eventually(|| (daemon.get("/v1/models").status == 200).then_some(()));
    daemon
}

/// The error in OpenAI's shape, and its status.
fn error(answer: &Answer) -> (u16, Value) {
    assert!(answer.head.to_ascii_lowercase().contains("content-type: application/json"), "{answer:?}");
    let error = answer.json()["error"].clone();
    assert!(!error["message"].as_str().unwrap().is_empty() && error["type"].is_string(), "{answer:?}");
    (answer.status, error)
}

#[test]
fn a_cold_pool_starts_when_its_model_is_asked_for_by_any_of_its_names() {
    let daemon = started(POOLS);
    let models = daemon.get("/v1/models").json();
    assert_eq!((&models["object"], models["data"].as_array().unwrap().len()), (&json!("list"), 2));
    let model = &models["data"][0];
    assert_eq!((&model["id"], &model["state"], &model["ready"]), (&json!("chat"), &json!("idle"), &json!(false)));
    assert_eq!(model["aliases"], json!(["tiny", "gpt-4o-mini"]));

    let first = complete(&daemon, &chat(3, false));
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.json()["usage"]["completion_tokens"], 3);
    for name in ["gpt-4o-mini", "tiny"] {
        let mut body = chat(2, false);
        body["model"] = name.into();
        let answer = complete(&daemon, &body);
        assert_eq!((answer.status, &answer.json()["object"]), (200, &json!("chat.completion")), "{name}");
    }
    let text = daemon.post("/v1/completions", r#"{"model":"chat","prompt":"a b","max_tokens":1}"#).json();
    assert_eq!(text["object"], "text_completion");
    let vectors = daemon.post("/v1/embeddings", r#"{"model":"embedder","input":["a","b"]}"#).json();
    assert_eq!(vectors["data"].as_array().unwrap().len(), 2, "{vectors}");
    let scores = daemon.post("/v1/rerank", r#"{"model":"vectors","query":"a","documents":["a","b"]}"#).json();
    assert_eq!(scores["results"].as_array().unwrap().len(), 2, "{scores}");
    // What this engine does not speak it says itself.
    assert_eq!(daemon.post("/v1/responses", r#"{"model":"chat"}"#).json()["error"]["type"], "not_found_error");
    let ready = daemon.get("/v1/models").json();
    assert_eq!((&ready["data"][0]["ready"], &ready["data"][0]["slots_free"]), (&json!(true), &json!(1)));
    assert_eq!(daemon.pool("chat")["replicas"][0]["generation"], 1);
}

#[test]
fn an_answer_is_the_engines_byte_for_byte() {
    let daemon = started(&POOLS.replace("\"--tokens-per-second\", \"50\"", "\"--tokens-per-second\", \"0\""));
    assert_eq!(complete(&daemon, &chat(1, false)).status, 200);
    let engine = daemon.pool("chat")["replicas"][0]["endpoint"].as_str().unwrap().replace("http://", "");
    // What changes from one answer to the next is the name and the speed.
    let strip = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| l.starts_with("data: "));
        let values = lines.map(|l| match serde_json::from_str::<Value>(&l[6..]) {
            Ok(mut v) => {
                v["id"].take();
                v["created"].take();
                v["timings"].take();
                v.to_string()
            }
            Err(_) => l.to_owned(),
        });
        values.collect()
    };
    let direct = Stream::open(&engine, "/v1/chat/completions", "", &chat(20, true));
    let through = Stream::open(daemon.addr(), "/v1/chat/completions", "", &chat(20, true));
    assert!(through.head.to_ascii_lowercase().contains("content-type: text/event-stream"), "{}", through.head);
    let (direct, through) = (direct.rest(), through.rest());
    assert_eq!(strip(&direct), strip(&through));
    assert_eq!(strip(&through).len(), 23, "{through}");
    // An odd body goes to the engine as it is, and its refusal comes back as it is.
    let odd = "{ \"model\" : \"chat\", \"messages\": 7 ,\n \"é\":\"\\u00e9\"}";
    let refused = [&engine, daemon.addr()].map(|addr| request(addr, "POST", "/v1/chat/completions", Some(odd)));
    assert_eq!((refused[0].status, &refused[0].body), (refused[1].status, &refused[1].body));
    assert_eq!(refused[0].status, 400);
}

#[test]
fn a_client_that_goes_away_frees_its_slot_at_once_and_who_waits_gets_it() {
    let daemon = started(POOLS);
    let mut stream =
        Stream::open(daemon.addr(), "/v1/chat/completions", "X-Request-Id: mine-1\r\n", &chat(100_000, true));
    assert!(stream.head.to_ascii_lowercase().contains("x-request-id: mine-1"), "{}", stream.head);
    for _ in 0..3 {
        stream.next("data: ");
    }
    assert_eq!(daemon.pool("chat")["active_leases"], 1);
    let body = chat(1, false).to_string();
    let full = request_with(daemon.addr(), "POST", "/v1/chat/completions", "X-Pool-Wait-Ms: 0\r\n", Some(&body));
    let (status, told) = error(&full);
    assert_eq!((status, &told["code"], &told["type"]), (429, &json!("POOL_SATURATED"), &json!("rate_limit_error")));
    assert!(full.head.to_ascii_lowercase().contains("retry-after: "), "{full:?}");

    let addr = daemon.addr().to_owned();
    let waiting = thread::spawn(move || request(&addr, "POST", "/v1/chat/completions", Some(&body)));
    eventually(|| (daemon.pool("chat")["leases_waiting"] == 1).then_some(()));
    drop(stream);
    let served = waiting.join().unwrap();
    assert_eq!(served.status, 200, "{served:?}");
    // One that waits for a whole answer and goes away is cancelled at the engine, too.
    let mut quiet = TcpStream::connect(daemon.addr()).unwrap();
    let long = chat(100_000, false).to_string();
    write!(
        quiet,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{long}",
        daemon.addr(),
        long.len()
    )
    .unwrap();
    let engine = daemon.pool("chat")["replicas"][0]["endpoint"].as_str().unwrap().replace("http://", "");
    let busy = || request(&engine, "GET", "/slots", None).body.contains("\"is_processing\":true");
    eventually(|| busy().then_some(()));
    drop(quiet);
    eventually(|| (!busy()).then_some(()));
    eventually(|| (daemon.pool("chat")["active_leases"] == 0).then_some(()));
    let metrics = daemon.get("/metrics").body;
    for line in [
        "gateway_requests_total{pool_id=\"chat\",tenant_id=\"\",outcome=\"cancelled\"} 2",
        "gateway_requests_total{pool_id=\"chat\",tenant_id=\"\",outcome=\"done\"} 1",
        "gateway_refused_total{tenant_id=\"\",code=\"POOL_SATURATED\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[test]
fn an_engine_that_dies_in_the_middle_is_told_in_the_stream_and_its_slot_is_free() {
    let daemon = started(POOLS);
    let mut stream = Stream::open(daemon.addr(), "/v1/chat/completions", "", &chat(100_000, true));
    stream.next("data: ");
    let pid = u32::try_from(daemon.pool("chat")["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    signal(pid, "KILL");
    let end = stream.rest();
    let last = end.lines().rfind(|l| l.starts_with("data: ")).unwrap();
    let told: Value = serde_json::from_str(&last[6..]).unwrap();
    assert_eq!(told["error"]["code"], "ENGINE_FAILED", "{end}");
    assert!(end.ends_with("0\r\n\r\n"), "the answer has an end: {end}");
    assert!(!end.contains("[DONE]"));
    // Once its end was noticed, a request waits for the next engine.
    daemon.until("chat", |p| p["last_error"]["class"] == "crash");
    let next = complete(&daemon, &chat(1, false));
    assert_eq!(next.status, 200, "{next:?}");
    assert!(!alive(pid));
    let pool = daemon.pool("chat");
    assert_eq!((&pool["active_leases"], &pool["replicas"][0]["generation"]), (&json!(0), &json!(2)));
    let metrics = daemon.get("/metrics").body;
    assert!(metrics.contains("outcome=\"engine_failed\"} 1"), "{metrics}");
}

#[test]
fn an_engine_that_dies_before_it_answers_is_not_asked_again() {
    let daemon = started(&POOLS.replace("\"--slots\", \"1\",", "\"--slots\", \"1\", \"--crash-on-request\", \"3\","));
    // The first two are the proof and this one.
    assert_eq!(complete(&daemon, &chat(1, false)).status, 200);
    let lost = complete(&daemon, &chat(1, false));
    let (status, told) = error(&lost);
    assert_eq!(
        (status, &told["code"], &told["type"]),
        (502, &json!("ENGINE_FAILED"), &json!("server_error")),
        "{lost:?}"
    );
    let again = daemon.until("chat", |p| p["replicas"][0]["generation"] == 2 && p["ready"] == true);
    // Had it been sent again, the new engine had seen more than its proof.
    let engine = again["replicas"][0]["endpoint"].as_str().unwrap().replace("http://", "");
    let metrics = request(&engine, "GET", "/metrics", None).body;
    let tokens = metrics.lines().find(|l| l.starts_with("llamacpp:tokens_predicted_total")).unwrap();
    assert!(tokens.ends_with(" 1"), "{tokens}");
}

#[test]
fn a_lease_of_the_clients_own_is_used_and_kept() {
    let daemon = started(POOLS);
    let lease = daemon.post("/v1/pools/chat/leases", r#"{"wait_ms":60000,"ttl_ms":600000}"#).json();
    let named = format!("X-Pool-Lease: {}\r\n", lease["lease_id"].as_str().unwrap());
    let body = chat(2, false).to_string();
    for _ in 0..2 {
        let answer = request_with(daemon.addr(), "POST", "/v1/chat/completions", &named, Some(&body));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(daemon.pool("chat")["active_leases"], 1, "it takes no slot but the lease's");
    }
    let id = lease["lease_id"].as_str().unwrap();
    assert_eq!(daemon.delete(&format!("/v1/leases/{id}")).status, 204);
    let over = request_with(daemon.addr(), "POST", "/v1/chat/completions", &named, Some(&body));
    let (status, told) = error(&over);
    assert_eq!((status, &told["code"]), (404, &json!("LEASE_NOT_FOUND")));
}

#[test]
fn how_far_a_start_is_comes_as_comments_for_who_asks() {
    let daemon = started(POOLS);
    let mut stream = Stream::open(daemon.addr(), "/v1/chat/completions", "X-Pool-Progress: true\r\n", &chat(2, true));
    assert!(stream.head.starts_with("HTTP/1.1 200"), "{}", stream.head);
    let comment = stream.next(": ");
    assert!(comment.starts_with("chat "), "{comment}");
    let rest = stream.rest();
    assert!(rest.contains(": chat starting") || rest.contains(": chat warming"), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    // Who asks for no events gets none.
    let whole = request_with(
        daemon.addr(),
        "POST",
        "/v1/chat/completions",
        "X-Pool-Progress: true\r\n",
        Some(&chat(2, false).to_string()),
    );
    assert_eq!((whole.status, whole.json()["object"].as_str()), (200, Some("chat.completion")), "{whole:?}");
    let refused = Stream::open(
        daemon.addr(),
        "/v1/chat/completions",
        "X-Pool-Progress: 1\r\n",
        &json!({ "model": "chat", "stream": true }),
    );
    assert!(refused.rest().contains("data: {\"error\":"), "a refusal of the engine is an event");
}

#[test]
fn who_asks_how_far_a_start_is_and_goes_away_is_noticed_while_the_engine_is_silent() {
    let daemon = started(
        r#"
[[pool]]
id = "mute"
model = "stub:mute"
engine = "stub"
slots = 2
activation = "preload"
"#,
    );
    daemon.until("mute", |p| p["ready"] == true);
    let engines = Engines::of(&daemon);
    let body = json!({ "model": "mute", "stream": true, "max_tokens": 4000, "messages": [{ "role": "user", "content": "hi" }] });
    let mut stream = Stream::open(daemon.addr(), "/v1/chat/completions", "X-Pool-Progress: true\r\n", &body);
    stream.next("data: ");
    let engine = engines.running()[0];
    signal(engine, "STOP");
    daemon.until("mute", |p| p["active_leases"] == 1);
    drop(stream);
    let after = daemon.until("mute", |p| p["active_leases"] == 0);
    // Not because the engine was found to hang, which comes later.
    assert_eq!((&after["ready"], &after["replicas"][0]["generation"]), (&true.into(), &1.into()), "{after:#}");
    signal(engine, "CONT");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn bad_requests_are_told_in_the_words_of_the_clients_library_and_start_nothing() {
    let daemon = started(POOLS);
    let addr = daemon.addr();
    let post = |path: &str, headers: &str, body: &str| request_with(addr, "POST", path, headers, Some(body));
    let path = "/v1/chat/completions";
    let deep = format!("{{\"model\":\"chat\",\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for (answer, status, code) in [
        (post(path, "", "{"), 400, "INVALID_PARAMS"),
        (post(path, "", "[\"chat\"]"), 400, "INVALID_PARAMS"),
        (post(path, "", "{}"), 400, "INVALID_PARAMS"),
        (post(path, "", r#"{"model":7}"#), 400, "INVALID_PARAMS"),
        (post(path, "", r#"{"model":"chat","model":"chat"}"#), 400, "INVALID_PARAMS"),
        (post(path, "", r#"{"model":"gpt-9"}"#), 404, "model_not_found"),
        (post(path, "", r#"{"model":"../../etc/passwd"}"#), 404, "model_not_found"),
        (post(path, "X-Pool-Wait-Ms: -1\r\n", r#"{"model":"chat"}"#), 400, "INVALID_PARAMS"),
        (post(path, "X-Pool-Progress: maybe\r\n", r#"{"model":"chat"}"#), 400, "INVALID_PARAMS"),
        (post(path, "X-Pool-Lease: nope\r\n", r#"{"model":"chat"}"#), 404, "LEASE_NOT_FOUND"),
    ] {
        let (s, told) = error(&answer);
        assert_eq!((s, told["code"].as_str()), (status, Some(code)), "{answer:?}");
        assert!(
            told["hint"].is_string() && answer.head.to_ascii_lowercase().contains("x-request-id: req-"),
            "{answer:?}"
        );
    }
    let claude = post("/v1/messages", "", r#"{"model":"claude"}"#).json();
    assert_eq!((&claude["type"], &claude["error"]["type"]), (&json!("error"), &json!("not_found_error")));
    // Larger than is taken: refused before it is read.
    let mut socket = TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(socket, "POST {path} HTTP/1.1\r\nHost: {addr}\r\nContent-Length: 33554433\r\n\r\n{{").unwrap();
    let mut head = [0; 12];
    socket.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 413");
    assert_eq!(daemon.pool("chat")["replicas"][0]["generation"], 0, "nothing was started");
    // Nested as deep as it likes, it is the engine's to refuse.
    let answer = post(path, "", &deep);
    assert_eq!(answer.json()["error"]["type"], "invalid_request_error", "{answer:?}");
    assert_eq!(daemon.pool("chat")["replicas"][0]["generation"], 1);
    let drained = daemon.post("/v1/pools/chat/drain?wait_ms=60000", "{}");
    assert_eq!(drained.status, 200, "{drained:?}");
    let (status, told) = error(&complete(&daemon, &chat(1, false)));
    assert_eq!((status, &told["code"]), (503, &json!("POOL_DRAINING")));
}
