//! What cannot work: a clear message, nothing spawned, and the neighbours serve on.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;
use support::{Daemon, write_config};

/// A pool that serves whatever becomes of the others.
const NEIGHBOUR: &str = r#"
[[pool]]
id = "neighbour"
model = "stub:neighbour"
engine = "stub"
activation = "preload"
"#;

/// The pool once it is known that it cannot start, with its neighbour at work and nothing of its own ever launched.
fn failed(daemon: &Daemon, id: &str) -> Value {
    let pool = daemon.until(id, |p| {
        assert_eq!((&p["ready"], &p["live"]), (&false.into(), &false.into()), "{p:#}");
        p["state"] == "failed" || p["state"] == "waiting"
    });
    daemon.until("neighbour", |p| p["ready"] == true);
    let launches = daemon.dir().join(format!("state/run/{id}-r0"));
    assert!(!launches.exists(), "something was launched for {id}");
    pool
}

fn told(pool: &Value) -> (&str, &str) {
    (pool["last_error"]["class"].as_str().unwrap(), pool["last_error"]["detail"].as_str().unwrap())
}

#[test]
fn a_model_that_is_a_directory_a_fifo_or_missing_is_an_artifact_failure() {
    let dir = tempfile::tempdir().unwrap();
    let models = dir.path().join("models");
    fs::create_dir_all(models.join("directory.gguf")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(models.join("fifo.gguf")).status().unwrap().success());
    let pool = |id: &str| {
        format!(
            "[[pool]]\nid = \"{id}\"\nmodel = \"file:{}/{id}.gguf\"\nengine = \"stub\"\nactivation = \"preload\"\n",
            models.display()
        )
    };
    let pools = ["directory", "fifo", "missing"].map(pool).join("");
    let daemon = Daemon::start_in(dir, &format!("[models]\nroots = [\"{}\"]\n{pools}{NEIGHBOUR}", models.display()));
    for (id, word) in [("directory", "directory"), ("fifo", "regular file"), ("missing", "exist")] {
        let pool = failed(&daemon, id);
        let (class, detail) = told(&pool);
        assert_eq!((class, pool["state"].as_str()), ("artifact", Some("failed")), "{pool:#}");
        assert!(detail.contains(word), "{id}: {detail}");
        let lease = daemon.post(&format!("/v1/pools/{id}/leases"), r#"{"ttl_ms":1000}"#);
        assert_eq!((lease.status, lease.json()["code"].as_str()), (503, Some("POOL_UNREADY")), "{lease:?}");
        let preload = daemon.post(&format!("/v1/pools/{id}/preload?wait_ms=30000"), "{}");
        assert_eq!(preload.json()["state"], "failed", "{preload:?}");
    }
    assert_eq!(daemon.stop(), Some(0));
}

fn engine_pool(dir: &Path, path: &str) -> String {
    let model = dir.join("m.gguf");
    // A header without tensors: enough to be staged.
    fs::write(&model, [b"GGUF\x03\0\0\0".as_slice(), &[0; 16]].concat()).unwrap();
    format!(
        "[models]\nroots = [\"{root}\"]\n[engines.mine]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = \"{path}\"\n\
         [[pool]]\nid = \"bad\"\nmodel = \"file:{root}/m.gguf\"\nengine = \"mine\"\nvram = \"1 GiB\"\n\
         activation = \"preload\"\n{NEIGHBOUR}",
        root = dir.display(),
    )
}

#[test]
fn an_engine_that_is_missing_or_not_executable_is_a_config_failure() {
    for (name, word) in [("missing", "engine missing"), ("plain", "not executable"), ("folder", "not executable")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        match name {
            "plain" => {
                fs::write(&path, "no program").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            }
            "folder" => fs::create_dir(&path).unwrap(),
            _ => {}
        }
        let config = engine_pool(dir.path(), path.to_str().unwrap());
        let daemon = Daemon::start_in(dir, &config);
        let pool = failed(&daemon, "bad");
        let (class, detail) = told(&pool);
        assert_eq!((class, pool["state"].as_str()), ("config", Some("failed")), "{pool:#}");
        assert!(detail.contains(word), "{name}: {detail}");
        assert_eq!(daemon.stop(), Some(0));
    }
}

#[test]
fn when_every_engine_port_is_taken_pools_wait_and_say_so() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), "");
    let pool = "[[pool]]\nid = \"late\"\nmodel = \"stub:late\"\nengine = \"stub\"\nactivation = \"preload\"\n";
    let daemon =
        Daemon::start_in(dir, &format!("{pool}[node]\nstate_dir = \"state\"\nengine_ports = \"{port}-{port}\"\n"));
    let waits = daemon.until("late", |p| p["state"] == "waiting");
    assert!(waits["reason"].as_str().unwrap().contains("port"), "{waits:#}");
    assert!(!daemon.dir().join("state/run/late-r0").exists(), "something was launched");
    // It starts by itself once there is one.
    drop(taken);
    daemon.until("late", |p| p["ready"] == true);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn devices_that_cannot_be_are_refused_before_anything_is_started() {
    for (mask, word) in [
        ("0,0", "twice"),
        ("-1", "`-1`"),
        ("GPU-nope", "GPU-nope"),
        ("0,GPU-51000000-0000-4000-8000-000000000001", "same device"),
        ("", "empty"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let pool = format!(
            "{NEIGHBOUR}[[pool]]\nid = \"bad\"\nmodel = \"stub:bad\"\nengine = \"stub\"\ndevices = \"{mask}\"\n"
        );
        let file = write_config(dir.path(), &pool);
        let out = support::binary().args(["serve", "--config"]).arg(&file).output().unwrap();
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(78), "{mask}: {text}");
        assert!(text.contains("pool[1].devices: ") && text.contains(word), "{mask}: {text}");
        assert!(!dir.path().join("state/run/neighbour-r0").exists(), "{mask}: something was launched");
    }
}

#[test]
fn a_pool_whose_device_is_not_there_waits_for_it_and_nobody_waits_for_that_pool() {
    let absent = "GPU-51000000-0000-4000-8000-0000000000ff";
    for mask in ["7", absent] {
        let late = format!(
            "[[pool]]\nid = \"late\"\nmodel = \"stub:late\"\nengine = \"stub\"\nactivation = \"preload\"\n\
             devices = \"{mask}\"\n"
        );
        let mut daemon = Daemon::start(&(late + NEIGHBOUR));
        let pool = failed(&daemon, "late");
        assert_eq!((&pool["state"], &pool["replicas"][0]["reason_code"]), (&"waiting".into(), &"devices".into()));
        let reason = pool["reason"].as_str().unwrap();
        assert!(reason.contains(mask) && reason.contains("not on this node"), "{reason}");
        assert!(daemon.wait_log("waits for a device that is not there").contains("pool[0].devices"));
        let lease = daemon.post("/v1/pools/late/leases", "{}");
        assert_eq!((lease.status, lease.json()["code"].as_str()), (503, Some("POOL_UNREADY")), "{lease:?}");
        assert!(lease.json()["detail"].as_str().unwrap().contains("not on this node"), "{lease:?}");
        assert_eq!(daemon.stop(), Some(0));
    }
}
