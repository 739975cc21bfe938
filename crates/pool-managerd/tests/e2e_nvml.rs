//! The whole daemon on the driver library's stand-in, through the real FFI.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use nvml_standin::script::{EVERY_CALL, Process, Size};
use serde_json::Value;
use support::nvml::{Node, device, device_when, gpu, slice};
use support::{Daemon, Engines, eventually, signal};

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

#[test]
fn an_engine_that_takes_more_than_its_plan_is_stopped_and_one_that_takes_a_little_more_is_counted_as_it_is() {
    let node = Node::of("mixed-24-12.toml");
    let much = node.pool("much", "0", Some("9 GiB"), "vram = \"2 GiB\"");
    let little = node.pool("little", "1", Some("2400 MiB"), "vram = \"2 GiB\"");
    let daemon = node.start(&(much + &little));
    let engines = Engines::of(&daemon);
    let failed = daemon.until("much", |p| p["state"] == "failed");
    assert_eq!(failed["last_error"]["class"], "config", "{failed:#}");
    let told = failed["reason"].as_str().unwrap();
    assert!(told.contains("holds 9.0 GiB") && told.contains("plan says 2.0 GiB") && told.contains("`vram`"), "{told}");
    ready(&daemon, "little");
    eventually(|| (engines.running().len() == 1).then_some(()));
    let all = 2400_u64 << 20;
    let counted = device_when(&daemon, &gpu(2), |d| d["vram_reserved_bytes"] == all);
    assert_eq!(counted["vram_foreign_bytes"], 0, "{counted:#}");
    device_when(&daemon, &gpu(1), |d| d["vram_used_bytes"] == 0 && d["vram_reserved_bytes"] == 0);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_an_engine_takes_on_each_of_its_devices_is_ours_and_is_never_told_as_foreign() {
    let mut node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&node.pool("wide", "0,1", Some("1300 MiB"), "vram = \"1 GiB\""));
    ready(&daemon, "wide");
    for uuid in [gpu(1), gpu(2)] {
        let shown = device_when(&daemon, &uuid, |d| d["vram_reserved_bytes"] == 1300 << 20);
        assert_eq!((&shown["vram_foreign_bytes"], &shown["vram_used_bytes"]), (&0.into(), &(1300 << 20).into()));
    }
    // Others come, whom nobody lists.
    node.change(|s| s.gpu(&gpu(2)).unlisted = Size::gib(1));
    let shown = device_when(&daemon, &gpu(2), |d| d["vram_foreign_bytes"] == GIB);
    assert_eq!(shown["vram_reserved_bytes"], 1300 << 20, "{shown:#}");
    assert_eq!(device(&daemon, &gpu(1))["vram_foreign_bytes"], 0);
    assert_eq!(daemon.stop(), Some(0));
}

fn generation(pool: &Value) -> u64 {
    pool["replicas"][0]["generation"].as_u64().unwrap()
}

fn ready(daemon: &Daemon, id: &str) -> Value {
    daemon.until(id, |p| p["ready"] == true)
}

fn again(daemon: &Daemon, id: &str) -> Value {
    daemon.until(id, |p| p["ready"] == true && generation(p) > 1)
}

/// It serves as it did, by the same process.
fn untouched(daemon: &Daemon, before: &Value) {
    let now = daemon.pool(before["pool_id"].as_str().unwrap());
    assert_eq!((&now["ready"], &now["replicas"][0]["pid"]), (&true.into(), &before["replicas"][0]["pid"]), "{now:#}");
}

#[test]
fn memory_that_does_not_come_back_fences_its_device_until_it_does() {
    let mut node = Node::of("mixed-24-12.toml");
    let small = node.pool("small", "0", Some("1 GiB"), "vram = \"1 GiB\"").replace("\"preload\"", "\"on_demand\"");
    let daemon = node.start(&format!("{}{small}", node.pool("chat", "0", Some("2 GiB"), "vram = \"3 GiB\"")));
    ready(&daemon, "chat");
    node.change(|s| s.free_after_ms = 10_000_000);
    // Known to the driver before the engine ends.
    device_when(&daemon, &gpu(1), |d| d["vram_used_bytes"] == 2 * GIB);
    daemon.post("/v1/pools/chat/stop", "");
    let fenced = daemon.until("chat", |p| p["state"] == "fenced");
    assert_eq!(fenced["reason"], "the engine's memory has not come back", "{fenced:#}");
    assert_eq!(device_when(&daemon, &gpu(1), |d| d["health"] == "fenced")["vram_reserved_bytes"], 3 * GIB);
    daemon.post("/v1/pools/small/preload", "");
    daemon.until("small", |p| p["reason"].as_str().is_some_and(|r| r.contains("fenced")));
    node.change(|s| s.free_after_ms = 0);
    daemon.until("chat", |p| p["state"] == "idle");
    ready(&daemon, "small");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn memory_that_comes_back_late_is_waited_for_and_never_promised_before() {
    let mut node = Node::of("mixed-24-12.toml");
    node.change(|s| s.free_after_ms = 3_000);
    let daemon = node.start(&node.pool("chat", "1", Some("8 GiB"), "vram = \"8 GiB\""));
    let first = ready(&daemon, "chat");
    device_when(&daemon, &gpu(2), |d| d["vram_used_bytes"] == 8 * GIB);
    signal(u32::try_from(first["replicas"][0]["pid"].as_u64().unwrap()).unwrap(), "KILL");
    let waits = daemon.until("chat", |p| p["replicas"][0]["reason_code"] == "memory");
    assert_eq!((&waits["live"], generation(&waits)), (&false.into(), 1), "{waits:#}");
    // Others take more and more of it meanwhile.
    node.change(|s| s.gpu(&gpu(2)).unlisted = Size::gib(1));
    let back = again(&daemon, "chat");
    assert_eq!(back["proof"], "vram");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn processes_of_others_are_named_and_their_memory_is_not_promised() {
    let mut node = Node::of("mixed-24-12.toml");
    let process = Process { pid: std::process::id(), used: Size::gib(20) };
    node.change(|s| s.gpu(&gpu(1)).process.push(process));
    let daemon = node.start(&node.pool("chat", "0", Some("2 GiB"), "vram = \"6 GiB\""));
    let waits = daemon.until("chat", |p| p["state"] == "waiting");
    assert!(waits["reason"].as_str().unwrap().contains("GPU memory"), "{waits:#}");
    let shown = device(&daemon, &gpu(1));
    let foreign = &shown["details"]["processes"][0];
    assert_eq!((&foreign["pid"], &foreign["ours"]), (&std::process::id().into(), &false.into()), "{shown:#}");
    assert_eq!((&foreign["vram_bytes"], &shown["vram_foreign_bytes"]), (&(20 * GIB).into(), &(20 * GIB).into()));
    node.change(|s| s.gpu(&gpu(1)).process.clear());
    ready(&daemon, "chat");
    assert_eq!(daemon.stop(), Some(0));
}

/// Two pools that serve, each on a GPU of its own.
fn two(node: &Node) -> (Daemon, Value, Value) {
    let (here, there) = ("vram = \"3 GiB\"", "vram = \"3 GiB\"");
    let pools = node.pool("here", "0", Some("2 GiB"), here) + &node.pool("there", "1", Some("2 GiB"), there);
    let daemon = node.start(&pools);
    let (here, there) = (ready(&daemon, "here"), ready(&daemon, "there"));
    (daemon, here, there)
}

#[test]
fn xid_94_restarts_the_engines_of_its_gpu_alone() {
    let mut node = Node::of("mixed-24-12.toml");
    let (daemon, _, there) = two(&node);
    node.report(&daemon, 94, None);
    let back = again(&daemon, "here");
    assert_eq!(back["last_error"]["class"], "driver_error", "{back:#}");
    assert!(back["last_error"]["detail"].as_str().unwrap().contains("XID 94"));
    untouched(&daemon, &there);
    let stands = device(&daemon, &gpu(1));
    assert_eq!((&stands["health"], &stands["verdict"]), (&"ok".into(), &"none".into()), "{stands:#}");
    let metrics = daemon.get("/metrics").body;
    assert!(metrics.contains(&format!("pool_managerd_gpu_xids_total{{gpu_uuid=\"{}\",xid=\"94\"}} 1", gpu(1))));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn xid_79_ends_the_engines_of_its_gpu_at_once_and_says_what_to_do() {
    let mut node = Node::of("mixed-24-12.toml");
    let (daemon, _, there) = two(&node);
    node.report(&daemon, 79, None);
    let ended = daemon.until("here", |p| p["last_error"]["class"] == "gpu_lost");
    assert!(ended["last_error"]["detail"].as_str().unwrap().contains("fallen off the bus"), "{ended:#}");
    let stands = device_when(&daemon, &gpu(1), |d| d["health"] == "lost");
    assert_eq!((&stands["verdict"], &stands["advice"]), (&"reboot_node".into(), &"reboot the node".into()));
    untouched(&daemon, &there);
    let table = daemon.cli(&["devices"]);
    assert!(table.contains("lost") && table.contains("reboot the node"), "{table}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn errors_of_its_memory_and_its_driver_s_verdict_drain_a_gpu_or_keep_new_starts_away() {
    let mut node = Node::of("eight-nvlink.toml");
    let (daemon, here, there) = two(&node);
    node.change(|s| s.gpu(&gpu(1)).remap_pending = Some(true));
    let stands = device_when(&daemon, &gpu(1), |d| d["health"] == "suspect");
    assert_eq!(stands["verdict"], "reset_device", "{stands:#}");
    untouched(&daemon, &here);
    node.change(|s| s.gpu(&gpu(1)).ecc = Some((0, 1)));
    daemon.until("here", |p| p["reason"].as_str().is_some_and(|r| r.contains("XID 48")));
    assert_eq!(device_when(&daemon, &gpu(1), |d| d["health"] == "fenced")["verdict"], "reset_device");
    // The other's rows failed: nothing helps but another device.
    untouched(&daemon, &there);
    node.change(|s| s.gpu(&gpu(2)).remap_failed = Some(true));
    daemon.until("there", |p| p["reason"].as_str().is_some_and(|r| r.contains("no spare row")));
    assert_eq!(device_when(&daemon, &gpu(2), |d| d["health"] == "fenced")["verdict"], "replace");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn while_the_driver_hangs_the_api_answers_engines_serve_and_starts_wait() {
    let mut node = Node::of("mixed-24-12.toml");
    let (daemon, here, there) = two(&node);
    node.report(&daemon, 63, None);
    let hung = node.hang(Some(gpu(1)));
    let unknown = device_when(&daemon, &gpu(1), |d| d["health"] == "unknown");
    assert!(unknown["health_detail"].as_str().unwrap().contains("has not answered"), "{unknown:#}");
    let stale = device(&daemon, &gpu(2));
    assert!(stale["health_detail"].as_str().unwrap().contains("is old"), "{stale:#}");
    // Nothing that is asked of the daemon waits for the driver, whose call does not return.
    for path in ["/v1/node", "/metrics", "/readyz", "/livez", "/v1/pools"] {
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
    let lease = daemon.post("/v1/pools/here/leases", "{\"ttl_ms\":60000}");
    assert_eq!(lease.status, 201, "{lease:?}");
    untouched(&daemon, &here);
    untouched(&daemon, &there);
    daemon.post("/v1/pools/there/stop", "");
    // Whether its memory is back nobody can say, and nothing is held against its device.
    daemon.until("there", |p| p["replicas"][0]["reason_code"] == "memory");
    std::fs::remove_file(hung).unwrap();
    device_when(&daemon, &gpu(1), |d| d["health"] == "ok");
    daemon.until("there", |p| p["state"] == "idle");
    daemon.post("/v1/pools/there/preload", "");
    again(&daemon, "there");
    untouched(&daemon, &here);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_loads_while_the_driver_hangs_about_another_gpu_waits_for_its_proof() {
    let mut node = Node::of("mixed-24-12.toml");
    let late = node.pool("late", "1", Some("2 GiB"), "vram = \"3 GiB\"");
    let late =
        late.replace("\"--vram\"", "\"--load-ms\", \"1500\", \"--vram\"").replace("\"preload\"", "\"on_demand\"");
    let daemon = node.start(&(node.pool("here", "0", Some("2 GiB"), "vram = \"3 GiB\"") + &late));
    let here = ready(&daemon, "here");
    daemon.post("/v1/pools/late/preload", "");
    daemon.until("late", |p| p["state"] == "starting" && p["live"] == true);
    let hung = node.hang(Some(gpu(1)));
    let waits = daemon.until("late", |p| p["reason"].as_str().is_some_and(|r| r.contains("waits for the driver")));
    assert_eq!((&waits["state"], &waits["last_error"]), (&"warming".into(), &Value::Null), "{waits:#}");
    std::fs::remove_file(hung).unwrap();
    let proved = ready(&daemon, "late");
    assert_eq!((generation(&proved), &proved["proof"]), (1, &"vram".into()), "{proved:#}");
    device_when(&daemon, &gpu(2), |d| d["health"] == "ok");
    untouched(&daemon, &here);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_driver_that_is_loaded_anew_costs_no_engine_and_starts_wait_for_it() {
    for code in [9, 18] {
        let mut node = Node::of("mixed-24-12.toml");
        let late = node.pool("late", "1", Some("1 GiB"), "vram = \"1 GiB\"").replace("\"preload\"", "\"on_demand\"");
        let daemon = node.start(&(node.pool("here", "0", Some("2 GiB"), "vram = \"3 GiB\"") + &late));
        let here = ready(&daemon, "here");
        node.change(|s| {
            s.errors.insert(EVERY_CALL.into(), code);
        });
        device_when(&daemon, &gpu(1), |d| d["health"] == "unknown");
        daemon.post("/v1/pools/late/preload", "");
        let waits = daemon.until("late", |p| p["state"] == "waiting");
        assert!(waits["reason"].as_str().unwrap().contains("driver"), "{waits:#}");
        untouched(&daemon, &here);
        node.change(|s| s.errors.clear());
        ready(&daemon, "late");
        untouched(&daemon, &here);
        assert_eq!(daemon.stop(), Some(0));
    }
}

#[test]
fn a_slice_that_is_taken_apart_ends_its_engine_and_the_one_in_its_place_is_another() {
    let mut node = Node::of("h100-seven-slices.toml");
    let pool = |id: &str, devices: &str| node.pool(id, devices, Some("2 GiB"), "vram = \"3 GiB\"");
    let daemon = node.start(&(pool("first", &slice(0)) + &pool("second", "0:1")));
    let (_, second) = (ready(&daemon, "first"), ready(&daemon, "second"));
    // Its place, and so its handle, is another one's now.
    node.change(|s| s.gpu(&gpu(1)).mig[0].uuid = slice(9));
    let ended = daemon.until("first", |p| p["last_error"]["class"] == "gpu_lost");
    assert!(ended["last_error"]["detail"].as_str().unwrap().contains("not there any more"), "{ended:#}");
    untouched(&daemon, &second);
    daemon.until("first", |p| p["state"] == "waiting" && p["replicas"][0]["reason_code"] == "devices");
    node.change(|s| s.gpu(&gpu(1)).mig[0].uuid = slice(0));
    again(&daemon, "first");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_xid_of_one_slice_touches_no_other() {
    let mut node = Node::of("h100-seven-slices.toml");
    let pool = |id: &str, devices: &str| node.pool(id, devices, Some("2 GiB"), "vram = \"3 GiB\"");
    let daemon = node.start(&(pool("first", "0:0") + &pool("second", "0:1")));
    let (first, _) = (ready(&daemon, "first"), ready(&daemon, "second"));
    // GPU instance 8 is the second slice.
    node.report(&daemon, 31, Some((8, 0)));
    let second = again(&daemon, "second");
    untouched(&daemon, &first);
    // One of a slice that nobody knows is counted and costs no engine; the next, which is heard after it, shows that.
    node.report(&daemon, 13, Some((77, 0)));
    node.report(&daemon, 63, None);
    let counted = daemon.get("/v1/node").json()["xids"].clone();
    assert!(counted.as_array().unwrap().iter().any(|x| x["xid"] == 13 && x["count"] == 1), "{counted:#}");
    untouched(&daemon, &first);
    untouched(&daemon, &second);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_gpu_that_leaves_without_a_word_ends_its_engines_and_no_other() {
    let mut node = Node::of("mixed-24-12.toml");
    let (daemon, _, there) = two(&node);
    node.change(|s| s.gpu(&gpu(1)).gone = true);
    daemon.until("here", |p| p["last_error"]["class"] == "gpu_lost");
    untouched(&daemon, &there);
    assert_eq!(device(&daemon, &gpu(1))["health"], "lost");
    node.change(|s| s.gpu(&gpu(1)).gone = false);
    again(&daemon, "here");
    untouched(&daemon, &there);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn while_devices_are_waited_for_the_api_serves_and_startup_is_not_over() {
    let mut node = Node::of("mixed-24-12.toml");
    node.change(|s| {
        s.errors.insert("nvmlInit_v2".into(), 9);
    });
    let daemon = node.start_with("wait = \"forever\"\n", &node.pool("chat", "0", Some("2 GiB"), ""));
    assert_eq!((daemon.get("/startupz").status, daemon.get("/livez").status), (503, 200));
    node.change(|s| s.errors.clear());
    eventually(|| (daemon.get("/startupz").status == 200).then_some(()));
    ready(&daemon, "chat");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn without_a_device_in_time_it_is_69_and_a_version_that_does_not_match_is_not_waited_for() {
    for (code, wait, words) in [(9, "1ms", "modprobe"), (18, "1h", "reboot")] {
        let mut node = Node::of("mixed-24-12.toml");
        node.change(|s| {
            s.errors.insert("nvmlInit_v2".into(), code);
        });
        let mut daemon = node.start_with(&format!("wait = \"{wait}\"\n"), "");
        daemon.wait_log(words);
        assert_eq!(daemon.wait(), Some(69));
    }
}

#[test]
fn an_engine_of_an_earlier_daemon_is_looked_after_though_there_is_no_driver() {
    let mut node = Node::of("mixed-24-12.toml");
    let daemon = node.start(&node.pool("chat", "0", Some("2 GiB"), "vram = \"3 GiB\""));
    let engines = Engines::of(&daemon);
    let before = ready(&daemon, "chat");
    // What it proved is written down before this is.
    let handoff = daemon.dir().join("state/handoff/chat-r0.json");
    eventually(|| handoff.exists().then_some(()));
    let dir = daemon.kill(&engines);
    // No wait would help.
    node.change(|s| {
        s.errors.insert("nvmlInit_v2".into(), 18);
    });
    let daemon = node.start_in_place(dir);
    // What it had proved stands while nobody can prove it again.
    let after = ready(&daemon, "chat");
    assert_eq!(after["replicas"][0]["pid"], before["replicas"][0]["pid"], "{after:#}");
    assert_eq!(device(&daemon, &gpu(1)), Value::default(), "no device is known");
    node.change(|s| s.errors.clear());
    device_when(&daemon, &gpu(1), |d| d["health"] == "ok");
    untouched(&daemon, &before);
    assert_eq!(after["proof"], "vram");
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}
