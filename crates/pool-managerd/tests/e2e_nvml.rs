//! The whole daemon on the driver library's stand-in, through the real FFI.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::nvml::{Node, device, device_when, gpu};
use support::{Engines, eventually};

const GIB: u64 = 1 << 30;

#[test]
fn an_engine_is_ready_when_its_memory_is_seen_on_exactly_its_device() {
    let node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&node.pool("chat", "0", Some("2 GiB"), "vram = \"3 GiB\""));
    let pool = daemon.until("chat", |p| p["ready"] == true);
    assert_eq!((&pool["proof"], &pool["device_mask"]), (&"vram".into(), &gpu(1).into()), "{pool:#}");
    // The inventory is a second old at the most.
    let used = device_when(&daemon, &gpu(1), |d| d["vram_used_bytes"] == 2 * GIB);
    assert_eq!(used["vram_reserved_bytes"], 3 * GIB, "{used:#}");
    assert_eq!(used["details"]["processes"][0]["ours"], true, "{used:#}");
    let shown = daemon.get("/v1/node").json();
    assert_eq!((shown["simulated"].as_bool(), &shown["driver"]), (Some(false), &nvml_standin::DRIVER_VERSION.into()));
    assert_eq!(device(&daemon, &gpu(2))["vram_used_bytes"], 0);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_serves_without_memory_of_its_device_fell_back_to_the_cpu_and_is_stopped() {
    let node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&node.pool("chat", "0", None, "vram = \"3 GiB\""));
    let engines = Engines::of(&daemon);
    let pool = daemon.until("chat", |p| p["state"] == "failed");
    assert_eq!(pool["last_error"]["class"], "cpu_fallback", "{pool:#}");
    assert_eq!(pool["reason"], "it holds no memory on a GPU it was given");
    eventually(|| engines.running().is_empty().then_some(()));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_takes_memory_elsewhere_is_stopped() {
    let node = Node::of("mixed-24-12.toml");
    let more = "vram = \"3 GiB\"";
    let pool = node.pool("chat", "0", Some("2 GiB"), more);
    let daemon = node.start(&pool.replace("\"--vram\"", &format!("\"--vram-on\", \"{}\", \"--vram\"", gpu(2))));
    let engines = Engines::of(&daemon);
    let pool = daemon.until("chat", |p| p["state"] == "failed");
    assert_eq!(pool["last_error"]["class"], "mask_breach", "{pool:#}");
    assert!(pool["reason"].as_str().unwrap().contains(&gpu(2)), "{pool:#}");
    eventually(|| engines.running().is_empty().then_some(()));
    assert_eq!(daemon.stop(), Some(0));
}
