//! What hostile clients send, to the real daemon. It answers, and tells nothing that is not theirs to know.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use support::{Daemon, PATIENCE, binary, engine_ports, eventually, request, write_config};

const POOL: &str = r#"
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
"#;

fn say(addr: &str, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may be closed before all was said.
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(std::net::Shutdown::Write);
    let mut all = Vec::new();
    let _ = socket.read_to_end(&mut all);
    String::from_utf8_lossy(&all).into_owned()
}

#[test]
fn what_is_no_decent_request_gets_a_4xx_or_nothing_and_the_daemon_goes_on() {
    let daemon = Daemon::start(POOL);
    eventually(|| (daemon.get("/v1/pools").status == 200).then_some(()));
    let post = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n";
    let bomb = format!("{post}transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\nx");
    let cases: Vec<(String, &[u16])> = vec![
        (
            format!(
                "{post}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n"
            ),
            &[400],
        ),
        (format!("{post}content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef"), &[400]),
        (format!("{post}content-length: -1\r\n\r\n"), &[400]),
        (format!("{post}content-length: 99999999999999999999\r\n\r\n"), &[400, 413]),
        (format!("{post}transfer-encoding: gzip\r\n\r\nx"), &[400]),
        (bomb, &[400, 413]),
        (format!("{post}transfer-encoding: chunked\r\n\r\n1;{}\r\nx", "e".repeat(100_000)), &[400, 413]),
        (format!("{post}content-encoding: gzip\r\ncontent-length: 3\r\n\r\n\u{1f}\u{8b}"), &[400]),
        (format!("GET /livez HTTP/1.1\r\nhost: localhost\r\n{}\r\n", "x: y\r\n".repeat(10_000)), &[431]),
        (format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(100_000)), &[431]),
        (format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "a".repeat(70_000)), &[404, 414, 431]),
        ("GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n".into(), &[400, 403]),
        ("GET /livez HTTP/1.1\r\n\r\n".into(), &[400, 403]),
        ("GET /livez\r\n\r\n".into(), &[400]),
        ("\u{16}\u{3}\u{1}\0\u{5}\u{1}".into(), &[400]),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), &[400]),
        ("GET /livez HTTP/1.1\r\nhost: localhost\r\na\0b: c\r\n\r\n".into(), &[400]),
        (
            "GET /v1/pools/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
                .into(),
            &[400, 404],
        ),
        ("GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".into(), &[404]),
        ("TRACE /v1/pools HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".into(), &[405]),
    ];
    for (said, allowed) in cases {
        let shown: String = said.chars().take(120).collect();
        let answer = say(daemon.addr(), said.as_bytes());
        let status: u16 = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        assert!(answer.is_empty() || allowed.contains(&status), "{shown:?}: {answer}");
        assert!(answer.matches("HTTP/1.1 ").count() <= 1, "a second answer to {shown:?}: {answer}");
    }
    assert_eq!(daemon.get("/livez").status, 200);
    assert_eq!(daemon.pool("chat")["replicas"][0]["generation"], 0, "nothing was started");
}

#[test]
fn five_hundred_half_requests_keep_nobody_from_the_api_or_the_probes() {
    let dir = tempfile::tempdir().unwrap();
    let node = format!(
        "[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\nprobe_listen = \"127.0.0.1:0\"\n",
        engine_ports()
    );
    write_config(dir.path(), &format!("{POOL}{node}"));
    let mut daemon = Daemon::start_in_place(dir);
    let line = daemon.wait_log("probes are answered");
    let port = line.split("127.0.0.1:").nth(1).unwrap().split_whitespace().next().unwrap();
    let probes = format!("127.0.0.1:{port}");
    let half = |n: usize| {
        let mut socket = TcpStream::connect(daemon.addr()).unwrap();
        let said = [
            "",
            "GET /livez HT",
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{",
        ];
        socket.write_all(said[n % 3].as_bytes()).unwrap();
        socket
    };
    let halves: Vec<TcpStream> = (0..500).map(half).collect();
    for _ in 0..20 {
        assert_eq!(daemon.get("/v1/models").status, 200);
        assert_eq!(request(&probes, "GET", "/livez", None).status, 200);
    }
    let body = r#"{"model":"chat","prompt":"a","max_tokens":1}"#;
    assert_eq!(daemon.post("/v1/completions", body).status, 200);
    assert_eq!(request(&probes, "GET", "/readyz", None).status, 200);
    assert_eq!(request(&probes, "GET", "/v1/pools", None).status, 404, "probes alone");
    drop(halves);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn no_error_tells_a_path_a_process_or_the_environment_and_no_log_a_secret() {
    let dir = tempfile::Builder::new().prefix("canary-dir-").tempdir().unwrap();
    let models = dir.path().join("canary-models");
    std::fs::create_dir(&models).unwrap();
    std::fs::write(models.join("bad.gguf"), b"no model").unwrap();
    write_config(dir.path(), &format!("[models]\nroots = [\"canary-models\"]\n{POOL}"));
    let mut command = binary();
    command.env("SOME_SECRET", "canary-env-0123456789").env("POOL_MANAGERD_LOG", "debug");
    let mut daemon = Daemon::start_as(command, dir);
    eventually(|| (daemon.get("/v1/pools").status == 200).then_some(()));
    let file = format!("file:{}/bad.gguf", models.display());
    let outside = r#"{"model":"file:/etc/shadow","engine":"llama.cpp"}"#.to_owned();
    let inside = format!(r#"{{"model":"{file}","engine":"llama.cpp","vram":"1 GiB"}}"#);
    let mut told = 0;
    for (method, path, body) in [
        ("GET", "/nowhere", ""),
        ("PUT", "/v1/pools/x", outside.as_str()),
        ("PUT", "/v1/pools/x", inside.as_str()),
        ("PUT", "/v1/pools/x?dry_run=true", inside.as_str()),
        ("PUT", "/v1/pools/x", r#"{"model":"stub:a","engine":"/bin/sh"}"#),
        ("PUT", "/v1/pools/x", r#"{"model":"git+https://example.org/a.git#main","engine":"stub"}"#),
        ("PUT", "/v1/pools/x", r#"{"model":"stub:a","engine":"stub","args":["--state-file","/etc/x"]}"#),
        ("PUT", "/v1/pools/x", r#"{"model":"stub:a","engine":"stub","path":"/bin/sh"}"#),
        ("PUT", "/v1/pools/x", r#"{"model":"stub:a","engine":"stub","mode":"package"}"#),
        (
            "PUT",
            "/v1/pools/x",
            r#"{"model":"stub:a","engine":"llama.cpp","args":["--model-url","http://169.254.169.254/"]}"#,
        ),
        ("POST", "/v1/plan", r#"{"model":"file:/etc/passwd"}"#),
        ("POST", "/v1/pools/chat/drain", "{"),
        ("POST", "/v1/pools/nope/leases", "{}"),
        ("POST", "/v1/chat/completions", r#"{"model":"/etc/passwd"}"#),
        ("POST", "/v1/chat/completions", "{"),
        ("POST", "/v1/config/reload", r#"{"file":"/etc/passwd"}"#),
        ("GET", "/v1/pools/chat/logs?replica=..%2f..%2f", ""),
        ("DELETE", "/v1/pools/chat", ""),
    ] {
        let answer = request(daemon.addr(), method, path, Some(body).filter(|b| !b.is_empty()));
        assert!((400..500).contains(&answer.status) || path.contains("dry_run"), "{method} {path} {body}: {answer:?}");
        told += 1;
        let environment = ["canary", "SOME_SECRET", "/root", "/home", "/proc", "No such file"];
        for secret in environment.iter().filter(|s| !body.contains(**s)) {
            assert!(!answer.body.contains(secret), "{secret}: {method} {path} {body}: {answer:?}");
        }
        // What was asked for may be repeated; where that lies may not.
        let dir = daemon.dir().to_str().unwrap();
        assert!(body.contains(dir) || !answer.body.contains(dir), "{method} {path}: {answer:?}");
        assert!(!answer.body.contains(&format!(" {}", daemon.pid())), "a pid: {answer:?}");
    }
    assert!(told > 15);
    assert_eq!(daemon.get("/v1/pools").json().as_array().unwrap().len(), 1, "nothing came of it");
    let log = daemon.log_so_far();
    assert!(!log.contains("canary-env"), "{log}");
}
