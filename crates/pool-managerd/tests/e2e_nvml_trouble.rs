//! The whole daemon on the driver library's stand-in, while something is wrong: memory that runs out, errors that are told
//! of devices, a driver that hangs at the same time, and a daemon that dies meanwhile.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::Write;

use nvml_standin::script::{EVERY_CALL, Process, Size};
use serde_json::Value;
use support::nvml::{Node, device_when, gpu};
use support::{Daemon, Engines, eventually, request};

fn ready(daemon: &Daemon, id: &str) -> Value {
    daemon.until(id, |p| p["ready"] == true)
}

/// Two pools that serve, each on a GPU of its own.
fn two(node: &Node) -> String {
    let vram = "vram = \"3 GiB\"";
    node.pool("here", "0", Some("2 GiB"), vram) + &node.pool("there", "1", Some("2 GiB"), vram)
}

fn untouched(daemon: &Daemon, before: &Value) {
    let now = daemon.pool(before["pool_id"].as_str().unwrap());
    assert_eq!((&now["ready"], &now["replicas"][0]["pid"]), (&true.into(), &before["replicas"][0]["pid"]), "{now:#}");
}

#[test]
fn a_start_that_runs_out_of_memory_waits_until_more_is_free_and_says_what_would_fit() {
    let mut node = Node::of("mixed-24-12.toml");
    // Others hold 10 of the first GPU's 24 GiB.
    let stranger = Process { pid: std::process::id(), used: Size::gib(10) };
    node.change(|s| s.gpu(&gpu(1)).process.push(stranger));
    let starts = node.file("starts");
    let words: String = "CUDA error: out of memory".bytes().map(|b| format!("{b:02x}")).collect();
    let fails = format!(
        "\"--log-bytes\", \"{words}\", \"--fail-start-times\", \"1\", \"--state-file\", \"{}\", \"--vram\"",
        starts.display()
    );
    let pool = node.pool("chat", "0", Some("2 GiB"), "vram = \"3 GiB\"").replace("\"--vram\"", &fails);
    let daemon = node.start(&pool);
    let engines = Engines::of(&daemon);
    let failed = daemon.until("chat", |p| p["last_error"]["class"] == "vram_oom");
    assert!(failed["last_error"]["detail"].as_str().unwrap().contains("out of memory"), "{failed:#}");
    let waits = daemon.until("chat", |p| p["replicas"][0]["reason_code"] == "vram");
    let reason = waits["reason"].as_str().unwrap();
    assert!(reason.contains("ran out of GPU memory where") && reason.contains("fewer `slots`"), "{reason}");
    assert!(reason.contains("0.2 GiB more free memory on GPU 0 is needed"), "{reason}");
    let plan = daemon.post("/v1/plan", "{\"pool\":\"chat\"}").json();
    assert_eq!(plan["fits"], false, "{plan:#}");
    assert!(plan["reason"].as_str().unwrap().contains("ran out"), "{plan:#}");
    assert!(
        plan["remedies"].as_array().unwrap().iter().any(|r| r.as_str().unwrap().contains("free memory")),
        "{plan:#}"
    );
    let shown = daemon.cli(&["status", "chat"]);
    assert!(shown.contains("ran out of GPU memory"), "{shown}");
    // The next daemon knows it too, and starts nothing.
    let dir = daemon.kill(&engines);
    let daemon = node.start_in_place(dir);
    daemon.until("chat", |p| p["replicas"][0]["reason_code"] == "vram");
    assert_eq!(fs::read_to_string(&starts).unwrap().trim(), "1");
    assert!(engines.running().is_empty());
    node.change(|s| s.gpu(&gpu(1)).process.clear());
    assert_eq!(ready(&daemon, "chat")["proof"], "vram");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_sole_gpu_that_fails_from_the_first_is_no_matter_of_permissions() {
    for (code, words) in [(15, "fell off"), (16, "reset")] {
        let mut node = Node::of("h100-seven-slices.toml");
        node.change(|s| {
            s.gpu(&gpu(1)).errors.insert(EVERY_CALL.into(), code);
        });
        let mut daemon = node.start_with("wait = \"1ms\"\n", "");
        assert_eq!(daemon.wait(), Some(69));
        let log = daemon.log_so_far();
        assert!(log.contains("none of which can be used") && log.contains(words), "{log}");
        assert!(!log.contains("refused access"), "{log}");
    }
}

#[test]
fn a_device_that_has_to_be_reset_stays_fenced_though_the_daemon_is_killed_and_its_probation_goes_on() {
    let mut node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&two(&node));
    let engines = Engines::of(&daemon);
    ready(&daemon, "here");
    let there = ready(&daemon, "there");
    node.report(&daemon, 119, None);
    device_when(&daemon, &gpu(1), |d| d["health"] == "fenced");
    let kept = daemon.dir().join("state/devices.json");
    let keeps =
        |words: &str| eventually(|| fs::read_to_string(&kept).unwrap_or_default().contains(words).then_some(()));
    keeps("XID 119");
    let dir = daemon.kill(&engines);
    // What was said to the daemon before is not said again.
    node.change(|s| s.event.clear());
    let daemon = node.start_in_place(dir);
    untouched(&daemon, &ready(&daemon, "there"));
    assert_eq!(daemon.pool("there")["replicas"][0]["pid"], there["replicas"][0]["pid"]);
    let stands = device_when(&daemon, &gpu(1), |d| d["health"] == "fenced");
    assert!(stands["health_detail"].as_str().unwrap().contains("XID 119"), "{stands:#}");
    assert_eq!(stands["verdict"], "reset_device");
    let waits = daemon.until("here", |p| p["replicas"][0]["reason_code"] == "devices");
    assert!(waits["reason"].as_str().unwrap().contains("XID 119"), "{waits:#}");
    // It is reset, which shows, and is watched for a while; by the next daemon too.
    node.change(|s| s.gpu(&gpu(1)).gone = true);
    device_when(&daemon, &gpu(1), |d| d["health"] == "lost");
    node.change(|s| s.gpu(&gpu(1)).gone = false);
    let watched = |d: &Value| d["health_detail"].as_str().is_some_and(|why| why.contains("on probation"));
    device_when(&daemon, &gpu(1), watched);
    keeps("\"was_away\": true");
    let engines = Engines::of(&daemon);
    let dir = daemon.kill(&engines);
    let daemon = node.start_in_place(dir);
    ready(&daemon, "there");
    device_when(&daemon, &gpu(1), watched);
    // A person need not wait.
    assert_eq!(daemon.post(&format!("/v1/devices/{}/unfence", gpu(1)), "").status, 204);
    ready(&daemon, "here");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_error_that_only_the_kernel_s_log_tells_of_is_heard_and_one_of_both_once() {
    let mut node = Node::of("mixed-24-12.toml");
    let log = node.file("kmsg");
    fs::write(&log, "4,1,1,-;NVRM: Xid (PCI:0000:01:00): 79, pid=1, name=a, of yesterday\n").unwrap();
    let daemon = node.start_with(&format!("kernel_log = \"{}\"\n", log.display()), &two(&node));
    let (_, there) = (ready(&daemon, "here"), ready(&daemon, "there"));
    let mut kernel = fs::OpenOptions::new().append(true).open(&log).unwrap();
    writeln!(kernel, "4,2,2,-;NVRM: Xid (PCI:0000:01:00): 94, pid=7194, name=a, Contained: SM (0x1). RST: No").unwrap();
    let again = daemon.until("here", |p| p["ready"] == true && p["replicas"][0]["generation"] == 2);
    assert!(again["last_error"]["detail"].as_str().unwrap().contains("XID 94"), "{again:#}");
    // The library tells of the same, late, and then of another one, which shows that it was heard.
    node.report(&daemon, 94, None);
    node.report(&daemon, 54, None);
    device_when(&daemon, &gpu(1), |d| d["health"] == "suspect");
    let counted = daemon.get("/v1/node").json()["xids"].clone();
    let of = |xid: u64| {
        counted.as_array().unwrap().iter().find(|x| x["xid"] == xid).map_or(0, |x| x["count"].as_u64().unwrap())
    };
    assert_eq!((of(94), of(54), of(79)), (1, 1, 0), "{counted:#}");
    assert_eq!(daemon.pool("here")["replicas"][0]["generation"], 2);
    untouched(&daemon, &there);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_log_of_the_kernel_that_may_not_be_read_is_said_once_and_can_be_left_out() {
    let node = Node::of("mixed-24-12.toml");
    let pool = node.pool("chat", "0", Some("2 GiB"), "vram = \"3 GiB\"");
    for (log, said) in [(node.file("none").display().to_string(), 1), ("off".to_owned(), 0)] {
        let mut daemon = node.start_with(&format!("kernel_log = \"{log}\"\n"), &pool);
        ready(&daemon, "chat");
        assert_eq!(daemon.log_so_far().matches("the kernel's log is not read").count(), said, "{log}");
        assert_eq!(daemon.stop(), Some(0));
    }
}

#[test]
fn xid_119_while_the_driver_hangs_costs_the_accused_gpu_alone() {
    let mut node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&two(&node));
    let (here, there) = (ready(&daemon, "here"), ready(&daemon, "there"));
    // Somebody listens: what the driver says from here on is heard.
    node.report(&daemon, 63, None);
    let hung = node.hang(Some(gpu(1)));
    node.report_unheard(119);
    let stands = device_when(&daemon, &gpu(1), |d| d["health"] == "unknown" && d["verdict"] == "reset_device");
    assert!(stands["health_detail"].as_str().unwrap().contains("has not answered"), "{stands:#}");
    // Its engine is ended in order; whether its memory came back nobody can say.
    daemon.until("here", |p| p["replicas"][0]["reason_code"] == "memory" || p["state"] == "fenced");
    assert!(!support::alive(u32::try_from(here["replicas"][0]["pid"].as_u64().unwrap()).unwrap()));
    untouched(&daemon, &there);
    for path in ["/v1/node", "/metrics", "/readyz", "/livez", "/v1/pools"] {
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
    let lease = daemon.post("/v1/pools/there/leases", "{\"ttl_ms\":60000}");
    assert_eq!(lease.status, 201, "{lease:?}");
    assert_eq!(fs::read_to_string(&hung).unwrap().lines().count(), 1, "one call hangs, and no second is made");
    // The call returns: what is known is new again, and the device still has to be reset.
    fs::remove_file(hung).unwrap();
    let waits = daemon.until("here", |p| p["replicas"][0]["reason_code"] == "devices");
    assert!(waits["reason"].as_str().unwrap().contains("XID 119"), "{waits:#}");
    assert_eq!(device_when(&daemon, &gpu(1), |d| d["health"] == "fenced")["verdict"], "reset_device");
    device_when(&daemon, &gpu(2), |d| d["health"] == "ok");
    untouched(&daemon, &there);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_error_of_a_gpu_that_no_pool_uses_shows_on_the_node_and_as_an_event() {
    let mut node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&node.pool("there", "1", Some("2 GiB"), "vram = \"3 GiB\""));
    let there = ready(&daemon, "there");
    node.report(&daemon, 79, None);
    let stands = device_when(&daemon, &gpu(1), |d| d["health"] == "lost");
    assert_eq!(stands["verdict"], "reboot_node", "{stands:#}");
    let told = eventually(|| {
        let past = daemon.get("/v1/events?follow=false").body;
        let lines = past.lines().filter_map(|l| l.strip_prefix("data: "));
        let mut events = lines.filter_map(|l| serde_json::from_str::<Value>(l).ok());
        events.find(|e| e["event"] == "device_incident" && e["xid"] == 79)
    });
    assert_eq!((&told["device"], told.get("pool_id")), (&gpu(1).into(), None), "{told:#}");
    assert_eq!(told["human"], "The driver reports XID 79 of a GPU that no pool uses: it is lost");
    assert_eq!(request(daemon.addr(), "GET", "/metrics", None).body.matches("xid=\"79\"} 1").count(), 1);
    untouched(&daemon, &there);
    assert_eq!(daemon.stop(), Some(0));
}
