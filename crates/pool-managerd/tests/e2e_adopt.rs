//! The daemon goes, and comes back: what becomes of the engines, with real processes throughout.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::stream::Stream;
use support::{Daemon, Engines, alive, binary, eventually, signal};

fn stub(args: &str, more: &str) -> String {
    format!(
        "[[pool]]\nid = \"chat\"\nmodel = \"stub:chat\"\nengine = \"stub\"\nargs = [{args}]\nactivation = \"preload\"\n{more}\n"
    )
}

/// A config of which the daemon leaves its engines alone when it is asked to stop.
fn keeping(dir: &Path, config: &str) {
    let file = support::write_config(dir, config);
    let text = fs::read_to_string(&file).unwrap().replacen("[node]\n", "[node]\non_exit = \"keep\"\n", 1);
    fs::write(file, text).unwrap();
}

fn ready(daemon: &Daemon) -> Value {
    daemon.until("chat", |p| p["ready"] == true)
}

fn pid(pool: &Value) -> u32 {
    u32::try_from(pool["replicas"][0]["pid"].as_u64().unwrap()).unwrap()
}

/// What must be the same before and after.
fn identity(pool: &Value) -> Value {
    let replica = &pool["replicas"][0];
    json!([replica["pid"], replica["generation"], replica["endpoint"], pool["slots_total"], pool["device_mask"]])
}

#[test]
fn a_killed_daemon_finds_its_engine_again_and_no_stream_is_cut_off() {
    let daemon = Daemon::start(&stub(
        r#""--tokens-per-second", "100", "--vram", "2 GiB""#,
        "vram = \"3 GiB\"\ncontext = 100000",
    ));
    let engines = Engines::of(&daemon);
    let before = ready(&daemon);
    let mut stream = Stream::open(&before);
    let dir = daemon.kill(&engines);
    stream.goes_on();

    let daemon = Daemon::start_in_place(dir);
    let after = ready(&daemon);
    assert_eq!(identity(&after), identity(&before), "{after:#}");
    assert_eq!((after["restart_count"].as_u64(), after["last_error"].is_null()), (Some(0), true), "{after:#}");
    stream.goes_on();
    assert_eq!(after["proof"], "simulated");
    let node = daemon.get("/v1/node").json();
    let reserved: u64 =
        node["devices"].as_array().unwrap().iter().map(|d| d["vram_reserved_bytes"].as_u64().unwrap()).sum();
    assert_eq!(reserved, 3 << 30, "{node:#}");
    // It is written beside the work.
    let handoff = eventually(|| fs::read_to_string(daemon.dir().join("state/handoff/chat-r0.json")).ok());
    assert!(handoff.contains(before["replicas"][0]["endpoint"].as_str().unwrap()));
    // A crash of the adopted one is seen as of any other.
    signal(pid(&after), "KILL");
    let again = daemon.until("chat", |p| p["ready"] == true && p["replicas"][0]["generation"] == 2);
    assert_eq!(again["last_error"]["class"], "crash", "{again:#}");
    assert_eq!(engines.running(), [pid(&again)]);
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}

#[test]
fn on_exit_keep_hands_the_engine_to_the_next_daemon_and_stop_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = stub(r#""--tokens-per-second", "100", "--fork-children", "1""#, "context = 100000");
    keeping(dir.path(), &config);
    let daemon = Daemon::start_in_place(dir);
    let engines = Engines::of(&daemon);
    let before = ready(&daemon);
    let mut stream = Stream::open(&before);
    let (code, dir) = daemon.end(&engines);
    assert_eq!((code, engines.running()), (Some(0), vec![pid(&before)]));
    stream.goes_on();
    assert!(dir.path().join("state/handoff/chat-r0.json").exists(), "consumers may go on");

    support::write_config(dir.path(), &config);
    let daemon = Daemon::start_in_place(dir);
    let after = ready(&daemon);
    assert_eq!(identity(&after), identity(&before), "{after:#}");
    stream.goes_on();
    let (code, dir) = daemon.end(&engines);
    assert_eq!((code, engines.running()), (Some(0), vec![]));
    assert_eq!(fs::read_dir(dir.path().join("state/engines")).unwrap().count(), 0);
}

#[test]
fn an_unfinished_start_is_gone_on_with() {
    let daemon = Daemon::start(&stub(r#""--load-ms", "2000""#, ""));
    let engines = Engines::of(&daemon);
    let before = daemon.until("chat", |p| p["replicas"][0]["pid"].is_u64());
    assert_eq!(before["ready"], false);
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    let after = ready(&daemon);
    assert_eq!((pid(&after), &after["replicas"][0]["generation"]), (pid(&before), &json!(1)), "{after:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_died_while_no_daemon_ran_has_crashed() {
    let daemon = Daemon::start(&stub("", "[pool.backoff]\ninitial = \"10ms\"\nmax = \"20ms\""));
    let engines = Engines::of(&daemon);
    let before = ready(&daemon);
    let dir = daemon.kill(&engines);
    signal(pid(&before), "ABRT");
    let exit = dir.path().join("state/run/chat-r0/1/exit.json");
    eventually(|| fs::read_to_string(&exit).is_ok_and(|e| e.contains("\"gone\":true")).then_some(()));

    let daemon = Daemon::start_in_place(dir);
    let after = ready(&daemon);
    let replica = &after["replicas"][0];
    assert_eq!((replica["generation"].as_u64(), after["restart_count"].as_u64()), (Some(2), Some(1)), "{after:#}");
    assert_eq!(after["last_error"]["class"], "crash");
    assert!(after["last_error"]["detail"].as_str().unwrap().contains("signal 6"), "{after:#}");
    assert_eq!(engines.running(), [pid(&after)]);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn of_two_daemons_at_once_one_adopts_and_the_other_gives_way() {
    let daemon = Daemon::start(&stub("", ""));
    let engines = Engines::of(&daemon);
    let before = ready(&daemon);
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    let second = binary()
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(daemon.dir().join("pool-managerd.toml"))
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(second.code(), Some(75));
    assert_eq!(identity(&ready(&daemon)), identity(&before));
    assert_eq!(engines.running(), [pid(&before)]);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_is_not_the_recorded_one_is_ended_by_its_cgroup_or_stands_fenced() {
    let daemon = Daemon::start(&stub("", ""));
    let engines = Engines::of(&daemon);
    let before = pid(&ready(&daemon));
    let dir = daemon.kill(&engines);
    let has_cgroup = engines.starts()[0]["cgroup_procs"].as_array().is_some_and(|procs| !procs.is_empty());
    let record = dir.path().join("state/engines/chat-r0.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["nonce"] = "somebody else's".into();
    // Sealed again, or its other copy would count.
    json.as_object_mut().unwrap().remove("sha256");
    let sum: String = Sha256::digest(json.to_string()).iter().map(|byte| format!("{byte:02x}")).collect();
    json["sha256"] = sum.into();
    fs::write(&record, json.to_string()).unwrap();

    let daemon = Daemon::start_in_place(dir);
    if has_cgroup {
        let after = ready(&daemon);
        assert_eq!(after["replicas"][0]["generation"], 2, "{after:#}");
        assert_eq!((alive(before), engines.running()), (false, vec![pid(&after)]));
    } else {
        let fenced = daemon.until("chat", |p| p["state"] == "fenced");
        assert!(alive(before), "{fenced:#}");
    }
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_state_directory_that_was_deleted_leaves_no_engine_behind() {
    let daemon = Daemon::start(&stub(r#""--ignore-sigterm""#, ""));
    let engines = Engines::of(&daemon);
    let before = pid(&ready(&daemon));
    let dir = daemon.kill(&engines);
    fs::remove_dir_all(dir.path().join("state")).unwrap();
    assert!(alive(before));
    let daemon = Daemon::start_in_place(dir);
    let after = ready(&daemon);
    assert_eq!((alive(before), engines.running()), (false, vec![pid(&after)]), "{after:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pool_that_is_no_longer_declared_loses_its_engine() {
    let daemon = Daemon::start(&stub("", ""));
    let engines = Engines::of(&daemon);
    let before = pid(&ready(&daemon));
    let dir = daemon.kill(&engines);
    support::write_config(dir.path(), &stub("", "").replace("\"chat\"", "\"other\""));
    let daemon = Daemon::start_in_place(dir);
    daemon.until("other", |p| p["ready"] == true);
    eventually(|| (!alive(before)).then_some(()));
    assert_eq!(engines.running().len(), 1);
    assert_eq!(daemon.stop(), Some(0));
}
