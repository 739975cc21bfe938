//! The faults of the stub engine.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use crate::common::{Stub, command};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::json;

const ASK: &str = r#"{"prompt":"x","n_predict":1}"#;

fn pid_in(line: &str, prefix: &str) -> Option<Pid> {
    Pid::from_raw(line.strip_prefix(prefix)?.parse().unwrap())
}

#[test]
fn it_names_its_version() {
    let output = command(&["--version"]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("stub-engine {}\n", env!("CARGO_PKG_VERSION")));
    let output = command(&["stub-engine", "--version"]).output().unwrap();
    assert!(output.status.success(), "the subcommand word is understood");
    assert_eq!(command(&["--bogus"]).status().unwrap().code(), Some(2));
}

#[test]
fn while_it_loads_every_path_says_so() {
    let stub = Stub::start(&["--load-ms", "3600000"]);
    for path in ["/health", "/v1/health", "/props", "/slots", "/nowhere"] {
        let (status, body) = stub.get(path);
        assert_eq!(status, 503);
        let error = json!({ "code": 503, "message": "Loading model", "type": "unavailable_error" });
        assert_eq!(body["error"], error, "{path}");
        assert!((0.0..1.0).contains(&body["progress"].as_f64().unwrap()));
    }
}

#[test]
fn loading_ends() {
    let mut stub = Stub::start(&["--load-ms", "30"]);
    assert_eq!(stub.line().unwrap(), "model loaded");
    stub.poll("/health", |body| body["status"] == "ok");
}

#[test]
fn sigterm_ends_it_at_once_also_amid_a_stream_and_while_loading() {
    let mut stub = Stub::start(&["--tokens-per-second", "1"]);
    let _stream = stub.send("POST", "/completion", r#"{"prompt":"x","n_predict":1000,"stream":true}"#);
    stub.await_busy(1);
    stub.signal(Signal::TERM);
    assert_eq!(stub.wait().code(), Some(0));

    let mut stub = Stub::start(&["--load-ms", "3600000"]);
    stub.signal(Signal::TERM);
    assert_eq!(stub.wait().code(), Some(0));
}

#[test]
fn sigterm_can_be_ignored() {
    let mut stub = Stub::start(&["--ignore-sigterm"]);
    stub.signal(Signal::TERM);
    assert_eq!(stub.get("/health").0, 200);
    assert!(stub.is_running());
    stub.signal(Signal::KILL);
    assert_eq!(stub.wait().signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn it_crashes_some_time_after_it_was_ready() {
    let mut stub = Stub::start(&["--load-ms", "10", "--crash-after-ms", "10", "--exit-code", "7"]);
    assert_eq!(stub.line().unwrap(), "model loaded", "not before it is ready");
    assert_eq!(stub.wait().code(), Some(7));
}

#[test]
fn it_crashes_on_the_request_that_was_named() {
    let mut stub = Stub::start(&["--crash-on-request", "2"]);
    assert_eq!(stub.text("POST", "/completion", ASK).0, 200);
    assert!(stub.is_running());
    let _cut = stub.send("POST", "/completion", ASK);
    assert_eq!(stub.wait().code(), Some(1));
}

#[test]
fn it_dies_by_the_signal_that_was_named() {
    // One that nothing handles, one that Rust handles, two that the stub handles itself; also as a subcommand.
    for (name, signal) in
        [("KILL", Signal::KILL), ("SIGSEGV", Signal::SEGV), ("TERM", Signal::TERM), ("INT", Signal::INT)]
    {
        for word in [&[] as &[&str], &["stub-engine"]] {
            let mut command = command(word);
            command.args(["--port", "0", "--crash-after-ms", "0", "--signal", name]);
            let mut stub = Stub::from(&mut command);
            assert_eq!(stub.wait().signal(), Some(signal.as_raw()), "{name}");
        }
    }
}

#[test]
fn it_fails_to_start_as_often_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("starts");
    let args = ["--port", "0", "--fail-start-times", "2", "--state-file", state.to_str().unwrap(), "--exit-code", "3"];
    for _ in 0..2 {
        assert_eq!(command(&args).status().unwrap().code(), Some(3));
    }
    assert_eq!(Stub::start(&args[2..]).get("/health").0, 200);
}

#[test]
fn a_hung_decode_keeps_its_slot_while_health_stays_ok() {
    let stub = Stub::start(&["--hang-after-requests", "1"]);
    assert_eq!(stub.text("POST", "/completion", ASK).0, 200);
    let hung = stub.send("POST", "/completion", ASK);
    stub.await_busy(1);
    drop(hung);
    let _second = stub.send("POST", "/v1/embeddings", r#"{"input":"x"}"#);
    stub.await_busy(2);
    assert_eq!(stub.get("/health").0, 200);

    let stub = Stub::start(&["--hang-after-requests", "0"]);
    let _hung = stub.send("POST", "/completion", ASK);
    stub.await_busy(1);
}

#[test]
fn health_can_turn_bad_while_it_goes_on_to_serve() {
    let stub = Stub::start(&["--unhealthy-after-ms", "0"]);
    let (status, body) = stub.get("/health");
    assert_eq!(status, 503);
    assert_eq!(body.get("progress"), None, "not mistaken for loading");
    assert_eq!(stub.text("POST", "/completion", ASK).0, 200);
}

#[test]
fn it_can_answer_as_another_model() {
    let stub = Stub::start(&["--model", "stub:chat", "--alias", "chat", "--serve-model", "impostor"]);
    let (_, props) = stub.get("/props");
    assert_eq!((&props["model_alias"], &props["model_path"]), (&json!("impostor"), &json!("impostor")));
    assert_eq!(stub.get("/v1/models").1["data"][0]["id"], "impostor");
}

#[test]
fn memory_is_claimed_on_every_device_until_the_process_dies() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(&["--port", "0", "--vram", "2 GiB", "--load-ms", "3600000"]);
    command.env(sim_claims::SIM_DIR_ENV, dir.path()).env("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b");
    let mut stub = Stub::from(&mut command);
    let claim = |device: &str| sim_claims::HeldClaim { pid: stub.pid(), device: device.to_owned(), bytes: 2 << 30 };
    assert_eq!(sim_claims::read_claims(dir.path()).unwrap(), [claim("GPU-a"), claim("GPU-b")]);
    stub.signal(Signal::KILL);
    stub.wait();
    assert_eq!(sim_claims::read_claims(dir.path()).unwrap(), []);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "the files stay, and mean nothing");
}

#[test]
fn a_claim_without_a_place_or_a_device_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut bare = command(&["--port", "0", "--vram", "1 GiB"]);
    assert_eq!(bare.status().unwrap().code(), Some(1));
    assert_eq!(bare.env(sim_claims::SIM_DIR_ENV, dir.path()).status().unwrap().code(), Some(1));
}

#[test]
fn children_outlive_it() {
    let mut stub = Stub::start(&["--fork-children", "2"]);
    let children: Vec<_> = stub.early.iter().filter_map(|line| pid_in(line, "child pid ")).collect();
    assert_eq!(children.len(), 2);
    stub.signal(Signal::TERM);
    assert_eq!(stub.wait().code(), Some(0));
    for child in children {
        test_kill_process(child).unwrap();
    }
}

#[test]
fn a_double_fork_leaves_a_process_in_a_session_of_its_own() {
    let stub = Stub::start(&["--double-fork"]);
    let detached = stub.early.iter().find_map(|line| pid_in(line, "detached pid ")).unwrap();
    let theirs = Stat::of(detached.as_raw_nonzero().get());
    let stubs = Stat::of(stub.pid());
    kill_process(detached, Signal::KILL).unwrap();
    assert_ne!(theirs.session, stubs.session);
    assert_ne!(theirs.parent, stub.pid());
}

struct Stat {
    parent: u32,
    /// Zero where the leader is outside of this PID namespace: getsid(2) is of no use there.
    session: u32,
}

impl Stat {
    /// See proc_pid_stat(5).
    fn of(pid: impl std::fmt::Display) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // Behind the name in brackets: state, parent, group, session.
        let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        Self { parent: fields[1].parse().unwrap(), session: fields[3].parse().unwrap() }
    }
}

#[test]
fn a_flooded_log_that_nobody_reads_does_not_stop_the_server() {
    let mut stub = Stub::from(command(&["--port", "0", "--log-flood"]).stderr(Stdio::null()));
    assert_eq!(stub.line().unwrap(), "model loaded");
    // More than a pipe holds.
    for _ in 0..2000 {
        assert!(stub.line().unwrap().starts_with("flood "));
    }
    assert_eq!(stub.get("/health").0, 200);
    stub.signal(Signal::TERM);
    assert_eq!(stub.wait().code(), Some(0));
}
