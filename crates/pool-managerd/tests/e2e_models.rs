//! Models that are fetched: from a server on loopback into the cache, and from there to an engine.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Answer, Daemon, Engines, eventually, request};

const MIB: usize = 1 << 20;

/// Serves one content under every name; after its first half it waits for a word, if it is to.
struct Server {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
    /// The first byte that each request asked for.
    ranges: Receiver<usize>,
    go: Sender<()>,
}

impl Server {
    fn start(content: Vec<u8>, waits: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let (go, wait) = channel();
        let (told, ranges) = channel();
        let count = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                count.fetch_add(1, Ordering::SeqCst);
                // A client that is gone is its own business.
                let _ = serve(&stream, &content, waits.then_some(&wait), &told);
            }
        });
        Self { addr, requests, ranges, go }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

fn serve(stream: &TcpStream, content: &[u8], wait: Option<&Receiver<()>>, told: &Sender<usize>) -> std::io::Result<()> {
    let (mut lines, mut send) = (BufReader::new(stream.try_clone()?).lines(), stream);
    let mut from = 0;
    while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
        let line = line.to_ascii_lowercase();
        if line.starts_with("get /missing") {
            return send.write_all(b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().unwrap();
        }
    }
    let _ = told.send(from);
    let total = content.len();
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    let head = format!(
        "HTTP/1.1 {status}\r\netag: \"1\"\r\nconnection: close\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{total}\r\n\r\n",
        total - from,
        total - 1
    );
    send.write_all(head.as_bytes())?;
    let half = from.max(total / 2);
    send.write_all(&content[from..half])?;
    if let Some(wait) = wait {
        let _ = wait.recv();
    }
    send.write_all(&content[half..])
}

fn model(bytes: usize) -> Vec<u8> {
    let mut content = b"GGUF\x03\0\0\0".to_vec();
    content.resize(bytes, 7);
    content
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A stub engine that serves a model which has to be fetched.
fn pool(id: &str, model: &str) -> String {
    format!("[[pool]]\nid = \"{id}\"\nmodel = \"{model}\"\nengine = \"stub\"\nactivation = \"preload\"\n")
}

fn models(server: &Server, more: &str) -> String {
    format!("[models]\nallow = [\"{}\"]\ncache_dir = \"cache\"\n{more}\n", server.url("/*"))
}

fn refs(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir.join("cache/refs")).map(|all| all.map(|e| e.unwrap().path()).collect()).unwrap_or_default()
}

#[test]
fn a_model_is_fetched_for_its_pool_and_how_far_it_is_can_be_seen() {
    let content = model(4 * MIB);
    let server = Server::start(content.clone(), true);
    let reference = format!("{}#sha256={}", server.url("/m/tiny.gguf"), sha256(&content));
    let config = models(&server, "") + &pool("chat", &reference);
    let mut daemon = Daemon::start(&config);
    let seen = daemon.until("chat", |p| p["replicas"][0]["staging"]["done_bytes"] == 2 * MIB);
    let replica = &seen["replicas"][0];
    assert_eq!((&seen["state"], &replica["staging"]["step"]), (&"staging".into(), &"fetching".into()), "{seen:#}");
    assert_eq!(replica["staging"]["total_bytes"], 4 * MIB);
    let reason = seen["reason"].as_str().unwrap();
    assert!(reason.starts_with("fetching the model: 2 MiB of 4 MiB"), "{reason}");
    // Nobody hangs on it: whoever asks is told, and told why.
    let refused = daemon.post("/v1/pools/chat/leases", r#"{"ttl_ms":1000}"#);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_UNREADY")), "{refused:?}");
    daemon.wait_log("Fetching the model of the chat pool:");
    server.go.send(()).unwrap();
    let ready = daemon.until("chat", |p| p["ready"] == true);
    assert_eq!((&ready["model_id"], &ready["replicas"][0]["staging"]), (&"tiny".into(), &Value::Null), "{ready:#}");
    daemon.wait_log("Fetched the model of the chat pool, 4 MiB");
    assert!(daemon.get("/metrics").body.contains("pool_managerd_model_fetched_bytes_total{"));
    assert_eq!(refs(daemon.dir()).len(), 1);
    let engines = Engines::of(&daemon);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    // From then on it is there, whoever serves it or not.
    let offline = config.replace("cache_dir", "offline = true\ncache_dir");
    let daemon = Daemon::start_in(dir, &offline);
    daemon.until("chat", |p| p["ready"] == true);
    assert_eq!((server.requests(), daemon.stop()), (1, Some(0)));
}

#[test]
fn a_daemon_that_is_killed_while_it_fetches_leaves_what_the_next_one_goes_on_with() {
    let content = model(4 * MIB);
    let server = Server::start(content, true);
    let config = models(&server, "") + &pool("chat", &server.url("/tiny.gguf"));
    let daemon = Daemon::start(&config);
    daemon.until("chat", |p| p["replicas"][0]["staging"]["done_bytes"] == 2 * MIB);
    let engines = Engines::of(&daemon);
    let dir = daemon.kill(&engines);
    assert_eq!(refs(dir.path()), Vec::<PathBuf>::new(), "what is not whole is no model");
    server.go.send(()).unwrap();
    server.go.send(()).unwrap();
    let daemon = Daemon::start_in_place(dir);
    daemon.until("chat", |p| p["ready"] == true);
    assert_eq!(server.ranges.try_iter().collect::<Vec<_>>(), [0, 2 * MIB]);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_model_that_cannot_be_had_is_a_failure_that_says_so() {
    let server = Server::start(model(MIB), false);
    let config = models(&server, "")
        + &pool("missing", &server.url("/missing.gguf"))
        + &pool("wrong", &format!("{}#sha256={}", server.url("/a.gguf"), sha256(b"x")));
    let daemon = Daemon::start(&config);
    for (id, because) in [("missing", "the server has no such file"), ("wrong", "not what its digest says")] {
        let failed = daemon.until(id, |p| p["state"] == "failed");
        assert_eq!(failed["last_error"]["class"], "artifact", "{failed:#}");
        let detail = failed["last_error"]["detail"].as_str().unwrap();
        assert!(detail.contains(because) && !detail.contains(daemon.dir().to_str().unwrap()), "{detail}");
        assert_eq!(failed["restart_count"], 0, "{failed:#}");
    }
    assert_eq!((refs(daemon.dir()).len(), daemon.stop()), (0, Some(0)));
}

fn code(answer: &Answer) -> (u16, String) {
    (answer.status, answer.json()["code"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn over_the_api_a_pool_names_only_models_that_the_file_allows() {
    let server = Server::start(model(MIB), false);
    let daemon = Daemon::start(&models(&server, ""));
    eventually(|| (daemon.get("/readyz").status == 200).then_some(()));
    let put = |model: &str| {
        let body = json!({"model": model, "engine": "stub", "activation": "preload"}).to_string();
        request(daemon.addr(), "PUT", "/v1/pools/free", Some(&body))
    };
    for denied in ["hf:org/repo", "https://h.org/a.gguf", "http://169.254.169.254/latest", "s3://bucket/a.gguf"] {
        let answer = put(denied);
        assert_eq!(code(&answer), (422, "MODEL_REF_DENIED".into()), "{denied}: {answer:?}");
        assert!(answer.json()["hint"].as_str().unwrap().contains("[models] allow"), "{answer:?}");
    }
    let long = format!("/{}", "a".repeat(4096));
    let wrong = ["../x", "%2e%2e/x", "/x\0y", "-m", &long, "http://169.254.169.254/", "hf://", "hf:org/repo/../x"];
    let digests = ["../../", &"a".repeat(63), &"A".repeat(64), &format!("{}\n", "a".repeat(64))];
    let digests = digests.map(|digest| format!("{}#sha256={digest}", server.url("/a.gguf")));
    for wrong in wrong.iter().map(ToString::to_string).chain(digests) {
        let answer = put(&wrong);
        assert_eq!(code(&answer), (422, "MODEL_REF_INVALID".into()), "{wrong}: {answer:?}");
        assert!(answer.json()["hint"].is_string(), "{answer:?}");
    }
    assert_eq!((daemon.get("/v1/pools/free").status, server.requests()), (404, 0), "nothing came of it");
    // What it will need is not known yet; that is no reason not to have it.
    let answer = put(&server.url("/a.gguf"));
    assert_eq!(answer.status, 202, "{answer:?}");
    daemon.until("free", |p| p["ready"] == true);
    // Another model, fetched while the old one serves.
    let body = json!({"new_model_ref": server.url("/b.gguf")}).to_string();
    let done = daemon.post("/v1/pools/free/reload?wait_ms=60000", &body);
    assert_eq!((done.status, done.json()["state"].as_str()), (200, Some("succeeded")), "{done:?}");
    assert_eq!(daemon.pool("free")["model_id"], "b");
    let body = json!({"new_model_ref": "hf:org/repo"}).to_string();
    assert_eq!(code(&daemon.post("/v1/pools/free/reload", &body)), (422, "MODEL_REF_DENIED".into()));
    assert_eq!((server.requests(), daemon.stop()), (2, Some(0)));
}

#[test]
fn a_real_engine_serves_a_model_that_was_fetched() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/engine").canonicalize();
    let dir = dir.expect("the real engine is missing: run `cargo xtask engine` (the test command does)");
    let server = Server::start(std::fs::read(dir.join("models/tiny.gguf")).unwrap(), false);
    let engine = format!(
        "[engines.\"llama.cpp\"]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = \"{}\"\n",
        dir.join("bin/llama-server").display()
    );
    let pool =
        pool("tiny", &server.url("/tiny.gguf")).replace("engine = \"stub\"", "engine = \"llama.cpp\"\ncontext = 512");
    let daemon = Daemon::start(&(models(&server, "") + &engine + &pool));
    let ready = daemon.until("tiny", |p| p["ready"] == true);
    assert_eq!((&ready["model_id"], server.requests()), (&"tiny".into(), 1), "{ready:#}");
    assert_eq!(daemon.stop(), Some(0));
}
