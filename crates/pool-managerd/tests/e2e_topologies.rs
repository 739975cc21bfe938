//! The node topologies that are shipped as scripts of the driver library's stand-in, each with pools on them in every way in
//! which a mask can be written.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::nvml::{Node, device, gpu, slice};

/// A pool for each mask, all of them Ready on the devices that the mask means.
fn serves(node: &Node, masks: &[(&str, &str, String)]) -> support::Daemon {
    let pool = |(id, mask, _): &(&str, &str, String)| node.pool(id, mask, Some("1 GiB"), "vram = \"1 GiB\"");
    let daemon = node.start(&masks.iter().map(pool).collect::<String>());
    for (id, mask, uuids) in masks {
        let ready = daemon.until(id, |p| p["ready"] == true);
        assert_eq!((&ready["proof"], ready["device_mask"].as_str()), (&"vram".into(), Some(uuids.as_str())), "{mask}");
    }
    daemon
}

#[test]
fn an_h100_with_seven_slices() {
    let node = Node::of("h100-seven-slices.toml");
    let by_uuid = slice(4);
    let daemon =
        serves(&node, &[("by-index", "0:2", slice(2)), ("by-uuid", &by_uuid, slice(4)), ("last", "0:6", slice(6))]);
    // The GPU itself cannot be used while it is split, nor two of its slices by one engine.
    for (mask, status) in [("0", 422), ("0:0,0:1", 422), ("0000:41:00.0", 422)] {
        let body = format!("{{\"model\":\"stub:x\",\"engine\":\"stub\",\"devices\":\"{mask}\"}}");
        let answer = support::request(daemon.addr(), "PUT", "/v1/pools/no", Some(&body));
        assert_eq!(answer.status, status, "{mask}: {answer:?}");
        assert_eq!(answer.json()["code"], "MASK_INVALID");
    }
    let shown = device(&daemon, &slice(2));
    assert_eq!((&shown["mig"]["profile"], &shown["mig"]["index"]), (&"1g.12gb".into(), &2.into()), "{shown:#}");
    let table = daemon.cli(&["devices"]);
    assert!(table.contains("0:6") && table.contains("STAND-IN NVIDIA H100 NVL MIG 1g.12gb"), "{table}");
    let metrics = daemon.get("/metrics").body;
    let owned = format!("gpu_memory_used_bytes{{gpu_uuid=\"{}\",mig=\"1g.12gb\",pool_id=\"by-index\"}}", slice(2));
    assert!(metrics.contains(&owned), "{owned}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_slice_that_is_chosen() {
    let node = Node::of("h100-seven-slices.toml");
    let daemon = node.start(&node.pool("auto", "auto", Some("1 GiB"), "vram = \"1 GiB\""));
    let ready = daemon.until("auto", |p| p["ready"] == true);
    let chosen = ready["device_mask"].as_str().unwrap().to_owned();
    assert!((0..7).map(slice).any(|one| one == chosen) && ready["proof"] == "vram", "{ready:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_pair_of_24_and_12_gib() {
    let node = Node::of("mixed-24-12.toml");
    let (both, uuid) = (format!("{},{}", gpu(1), gpu(2)), gpu(2));
    let daemon = serves(
        &node,
        &[
            ("index", "0", gpu(1)),
            ("uuid", &uuid, gpu(2)),
            ("bus", "0000:65:00.0", gpu(2)),
            ("short-bus", "01:00.0", gpu(1)),
            ("both", "0,1", both.clone()),
            ("range", "0-1", both.clone()),
            ("all", "all", both),
            // Where there is most room.
            ("auto", "auto", gpu(1)),
        ],
    );
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn eight_gpus_that_are_linked() {
    let node = Node::of("eight-nvlink.toml");
    let by_uuid = gpu(5);
    let (list, uuids) = (format!("{},{}", gpu(7), gpu(3)), |range: std::ops::RangeInclusive<u32>| {
        range.map(gpu).collect::<Vec<_>>().join(",")
    });
    let daemon = serves(
        &node,
        &[
            ("index", "5", gpu(6)),
            ("uuid", &by_uuid, gpu(5)),
            ("range", "0-3", uuids(1..=4)),
            ("mixed", "0000:df:00.0,4", format!("{},{}", gpu(8), gpu(5))),
            ("order", &list, list.clone()),
            ("bus", "0000:df:00.0", gpu(8)),
            ("all", "all", uuids(1..=8)),
        ],
    );
    let shown = device(&daemon, &gpu(1));
    let peers = shown["details"]["peers"].as_array().unwrap();
    assert_eq!((peers.len(), &peers[0]["nvlinks"], &peers[0]["p2p"]), (7, &1.into(), &true.into()), "{shown:#}");
    assert_eq!((&peers[0]["path"], &peers[6]["path"]), (&"numa_node".into(), &"system".into()));
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn two_gpus_of_which_one_is_lost() {
    let node = Node::of("one-lost.toml");
    let pool = |id: &str, mask: &str| node.pool(id, mask, Some("1 GiB"), "vram = \"1 GiB\"");
    let (well, ill) = (gpu(1), gpu(2));
    let pools =
        [("auto", "auto"), ("index", "0"), ("uuid", &*well), ("lost", "1"), ("lost-uuid", &*ill), ("all", "all")];
    let daemon = node.start(&pools.iter().map(|(id, mask)| pool(id, mask)).collect::<String>());
    for id in ["index", "uuid"] {
        let ready = daemon.until(id, |p| p["ready"] == true);
        assert_eq!(ready["device_mask"].as_str(), Some(well.as_str()), "{id}");
    }
    // A mask that names it waits for it, whole.
    let waits = daemon.until("all", |p| p["state"] == "waiting");
    assert!(waits["reason"].as_str().unwrap().contains("GPU 1 is lost"), "{waits:#}");
    // It never said what its name is.
    let waits = daemon.until("lost-uuid", |p| p["state"] == "waiting");
    assert!(waits["reason"].as_str().unwrap().contains(&ill), "{waits:#}");
    let ready = daemon.until("auto", |p| p["ready"] == true);
    assert_eq!(ready["device_mask"].as_str(), Some(gpu(1).as_str()));
    let waits = daemon.until("lost", |p| p["state"] == "waiting");
    assert!(waits["reason"].as_str().unwrap().contains("GPU 1 is lost"), "{waits:#}");
    let shown = device(&daemon, "GPU-unknown-1");
    assert_eq!((&shown["health"], &shown["verdict"]), (&"lost".into(), &"reboot_node".into()), "{shown:#}");
    let node = daemon.get("/v1/node").json();
    assert!(node["problem"].as_str().unwrap().contains("1 of the GPUs"), "{node:#}");
    assert_eq!(daemon.stop(), Some(0));
}
