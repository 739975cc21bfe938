//! The main job on llama.cpp's real server, as `cargo xtask engine` brings it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::PathBuf;

use support::{Daemon, request, signal};

fn engine_dir() -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/engine").canonicalize();
    let dir = dir.expect("the real engine is missing: run `cargo xtask engine` (the test command does)");
    assert!(dir.join("bin/llama-server").exists() && dir.join("models/tiny.gguf").exists(), "run `cargo xtask engine`");
    dir
}

#[test]
fn a_real_engine_is_ready_only_after_its_first_token_and_comes_back_after_sigkill() {
    let dir = engine_dir();
    let (bin, models) = (dir.join("bin/llama-server"), dir.join("models"));
    let mut daemon = Daemon::start(&format!(
        r#"
[models]
roots = ["{models}"]
[engines."llama.cpp"]
kind = "llama.cpp"
mode = "binary"
path = "{bin}"
[[pool]]
id = "tiny"
model = "file:{models}/tiny.gguf"
engine = "llama.cpp"
context = 512
slots = 2
vram = "1 GiB"
activation = "preload"
[pool.backoff]
initial = "200ms"
max = "1s"
"#,
        models = models.display(),
        bin = bin.display(),
    ));
    // Not ready while it starts; every picture on the way is looked at.
    let mut before = Vec::new();
    let ready = daemon.until("tiny", |p| {
        if p["ready"] == false {
            before.push(p["state"].as_str().unwrap().to_owned());
        }
        assert_eq!(
            p["ready"] == true,
            !p["replicas"][0]["perf"]["first_token_ms"].is_null(),
            "ready without a token: {p:#}"
        );
        p["ready"] == true
    });
    assert!(
        before.iter().any(|s| s == "starting" || s == "warming" || s == "staging" || s == "preparing" || s == "idle"),
        "{before:?}"
    );
    assert_eq!(
        (&ready["proof"], &ready["slots_total"], &ready["model_id"]),
        (&"simulated".into(), &2.into(), &"tiny".into())
    );
    let endpoint = ready["replicas"][0]["endpoint"].as_str().unwrap().trim_start_matches("http://").to_owned();

    // The engine itself counts the token that proved it.
    let metrics = request(&endpoint, "GET", "/metrics", None).body;
    let tokens = metrics.lines().find(|l| l.starts_with("llamacpp:tokens_predicted_total")).unwrap();
    assert!(tokens.split_whitespace().last().unwrap().parse::<f64>().unwrap() >= 1.0, "{tokens}");

    // The settings are in force.
    let props = request(&endpoint, "GET", "/props", None).json();
    assert_eq!(props["total_slots"], 2);

    let stream = request(
        &endpoint,
        "POST",
        "/v1/chat/completions",
        Some(r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":8,"stream":true}"#),
    );
    let chunks = stream.body.lines().filter(|l| l.starts_with("data: {")).count();
    assert!(stream.status == 200 && chunks > 2 && stream.body.contains("data: [DONE]"), "{stream:?}");

    // What it was promised is what its plan says, and the plan's arguments are those of the process.
    let plan = daemon.post("/v1/plan", r#"{"pool":"tiny"}"#).json();
    assert_eq!((&plan["fits"], &plan["context"]), (&true.into(), &512.into()), "{plan:#}");
    let args = plan["args"].as_array().unwrap();
    let running = std::fs::read(format!("/proc/{}/cmdline", ready["replicas"][0]["pid"])).unwrap();
    let running = String::from_utf8_lossy(&running);
    for flag in ["--ctx-size", "--parallel", "--alias"] {
        let at = args.iter().position(|a| a == flag).unwrap();
        let pair = format!("{flag}\0{}\0", args[at + 1].as_str().unwrap());
        assert!(running.contains(&pair), "{flag} differs: {args:?}");
    }
    let too_many = daemon.post(
        "/v1/plan",
        &format!(r#"{{"model":"file:{}/tiny.gguf","devices":"0,1","tensor_split":"1,1,1"}}"#, models.display()),
    );
    assert_eq!((too_many.status, too_many.json()["code"].as_str()), (422, Some("SPLIT_INVALID")), "{too_many:?}");
    assert!(too_many.json()["detail"].as_str().unwrap().contains("entry 3"), "{too_many:?}");
    let placed = daemon.post("/v1/placements", r#"{"model":"tiny"}"#).json();
    assert_eq!((&placed[0]["pool_id"], &placed[0]["serves"]), (&"tiny".into(), &true.into()), "{placed:#}");

    // The handoff file says the same as the API.
    let handoff = daemon.dir().join("state/handoff/tiny-r0.json");
    let told = support::eventually(|| std::fs::read(&handoff).ok());
    let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
    assert_eq!(told["endpoint"], ready["replicas"][0]["endpoint"]);

    let (pid, generation) =
        (ready["replicas"][0]["pid"].as_u64().unwrap(), ready["replicas"][0]["generation"].as_u64().unwrap());
    signal(u32::try_from(pid).unwrap(), "KILL");
    let down = daemon.until("tiny", |p| p["ready"] == false);
    assert_eq!(down["last_error"]["class"], "crash", "{down:#}");
    assert!(down["last_error"]["detail"].as_str().unwrap().contains("signal 9"), "{down:#}");
    let line = daemon.wait_log("Restarting the tiny pool in");
    assert!(line.contains("crashed for the first time"), "{line}");
    let again = daemon.until("tiny", |p| p["ready"] == true);
    assert!(again["replicas"][0]["generation"].as_u64().unwrap() > generation);
    assert_eq!(again["restart_count"], 1);

    let second = u32::try_from(again["replicas"][0]["pid"].as_u64().unwrap()).unwrap();
    assert_eq!(daemon.stop(), Some(0));
    assert!(!support::alive(second), "the engine outlived the daemon");
}

#[test]
fn a_file_that_is_no_model_fails_at_once_and_is_not_tried_again() {
    let dir = engine_dir();
    let models = tempfile::tempdir().unwrap();
    std::fs::write(
        models.path().join("bad.gguf"),
        b"GGUF\x03\0\0\0no more than the beginning of a model is in this file",
    )
    .unwrap();
    let daemon = Daemon::start(&format!(
        r#"
[models]
roots = ["{models}"]
[engines."llama.cpp"]
kind = "llama.cpp"
mode = "binary"
path = "{bin}"
[[pool]]
id = "bad"
model = "file:{models}/bad.gguf"
vram = "1 GiB"
activation = "preload"
"#,
        models = models.path().display(),
        bin = dir.join("bin/llama-server").display(),
    ));
    let failed = daemon.until("bad", |p| {
        assert_eq!(p["ready"], false);
        p["state"] == "failed"
    });
    assert_eq!(failed["replicas"][0]["generation"], 1, "{failed:#}");
    assert_eq!(failed["last_error"]["class"], "artifact", "{failed:#}");
    assert_eq!(failed["replicas"][0]["backoff"]["next_start_in_ms"], serde_json::Value::Null, "{failed:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn plan_says_what_a_real_model_needs_and_what_would_fit_instead() {
    let dir = engine_dir();
    let site = tempfile::tempdir().unwrap();
    let file = support::write_config(
        site.path(),
        &format!(
            "[engines.\"llama.cpp\"]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = \"{}\"\n",
            dir.join("bin/llama-server").display()
        ),
    );
    let model = dir.join("models/smollm2-135m.gguf");
    let plan = |more: &[&str]| {
        let out = support::binary().arg("plan").arg(&model).arg("--config").arg(&file).args(more).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        (out.status.code(), text)
    };
    let (code, table) = plan(&["--context", "4096"]);
    // 30 layers, 3 heads of 64 numbers, keys and values of 2 bytes: 90 MiB.
    assert!(code == Some(0) && table.contains("90.0 MiB") && table.contains("--ctx-size 4096"), "{table}");
    let (code, table) = plan(&["--context", "2000000"]);
    assert!(code == Some(1) && table.contains("it never fits") && table.contains("instead: context = "), "{table}");
    for (split, word) in
        [("3,-1", "`-1`"), ("nan", "`nan`"), ("0,0", "every entry"), ("1,1,1", "too many"), ("", "empty")]
    {
        let (code, text) = plan(&["--devices", "all", "--tensor-split", split]);
        assert!(code == Some(64) && text.contains(word), "{split}: {text}");
    }
}

/// Reads a streamed answer up to where `enough` says, and hangs up.
fn stream(addr: &str, path: &str, body: &str, mut enough: impl FnMut(&str) -> bool) -> String {
    use std::io::{BufRead, Write};
    let mut socket = std::net::TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(support::PATIENCE)).unwrap();
    write!(
        socket,
        "POST {path} HTTP/1.1\r\nHost: {addr}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let (mut lines, mut all) = (std::io::BufReader::new(socket), String::new());
    while !enough(&all) {
        assert!(lines.read_line(&mut all).unwrap() > 0, "the stream ended: {all}");
    }
    all
}

#[test]
fn a_real_engine_behind_the_gateway_is_started_streamed_and_cancelled() {
    let dir = engine_dir();
    let (bin, models) = (dir.join("bin/llama-server"), dir.join("models"));
    let daemon = Daemon::start(&format!(
        r#"
[models]
roots = ["{models}"]
[engines."llama.cpp"]
kind = "llama.cpp"
mode = "binary"
path = "{bin}"
[[pool]]
id = "tiny"
model = "file:{models}/tiny.gguf"
context = 2048
slots = 1
vram = "1 GiB"
[[pool]]
id = "vectors"
model = "file:{models}/tiny.gguf"
context = 512
slots = 1
vram = "1 GiB"
workload = "embed"
args = ["--pooling", "mean"]
"#,
        models = models.display(),
        bin = bin.display(),
    ));
    support::eventually(|| (daemon.get("/v1/models").status == 200).then_some(()));
    assert_eq!(daemon.pool("tiny")["state"], "idle");
    let body = |tokens: u32, stream: bool| {
        format!(
            r#"{{"model":"tiny","messages":[{{"role":"user","content":"once"}}],"max_tokens":{tokens},"stream":{stream},"ignore_eos":true}}"#
        )
    };
    let chat = "/v1/chat/completions";
    let cold = daemon.post(chat, &body(4, false));
    assert_eq!(cold.status, 200, "{cold:?}");
    assert_eq!(cold.json()["usage"]["completion_tokens"], 4, "{cold:?}");
    let streamed = stream(daemon.addr(), chat, &body(8, true), |all| all.ends_with("data: [DONE]\n"));
    assert!(streamed.to_ascii_lowercase().contains("content-type: text/event-stream"), "{streamed}");
    assert!(streamed.matches("data: {").count() >= 8, "{streamed}");
    // Hangs up after a few of very many tokens: the engine's one slot is free for the next.
    stream(daemon.addr(), chat, &body(1900, true), |all| all.matches("data: {").count() >= 3);
    let engine = daemon.pool("tiny")["replicas"][0]["endpoint"].as_str().unwrap().replace("http://", "");
    let busy = || request(&engine, "GET", "/slots", None).body.contains("\"is_processing\":true");
    support::eventually(|| (!busy() && daemon.pool("tiny")["active_leases"] == 0).then_some(()));
    assert_eq!(daemon.post(chat, &body(1, false)).status, 200);
    let vectors = daemon.post("/v1/embeddings", r#"{"model":"vectors","input":["a","b"]}"#);
    assert_eq!(vectors.status, 200, "{vectors:?}");
    let vectors = vectors.json();
    assert!(vectors["data"][1]["embedding"].as_array().unwrap().len() > 1, "{vectors}");
    let text = daemon.post("/v1/completions", r#"{"model":"tiny","prompt":"a","max_tokens":2}"#);
    assert_eq!((text.status, &text.json()["object"]), (200, &"text_completion".into()), "{text:?}");
    assert_eq!(daemon.stop(), Some(0));
}
