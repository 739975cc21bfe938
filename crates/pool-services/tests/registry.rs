//! The registry of an embedder.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use pool_domain::DeviceSnapshot;
use pool_domain::perf::PerfHints;
use pool_services::Registry;
use pool_testkit::gpu;

fn device(index: u32, free: u64, compute_capability: Option<(u32, u32)>) -> DeviceSnapshot {
    DeviceSnapshot { vram_free: free, compute_capability, ..gpu(index, 10) }
}

#[test]
fn placement_sees_memory_compute_capability_and_speed() {
    let devices = [device(0, 3, Some((8, 9))), device(1, 4, Some((8, 6))), device(2, 5, None)];
    let mask = |of: &[usize]| of.iter().map(|&i| devices[i].uuid.clone()).collect::<Vec<_>>().join(",");
    let mut r = Registry::new();
    for (id, mask) in [("one", mask(&[0])), ("both", mask(&[0, 1])), ("odd", mask(&[0, 2])), ("gone", "GPU-x".into())] {
        r.set_device_mask(id, mask);
    }
    r.register("unknown");
    r.update_devices(&devices);
    let perf = PerfHints { tokens_per_s: Some(42.5), first_token_ms: Some(7) };
    r.set_perf("one", perf);
    let seen = |id: &str| {
        let s = r.snapshots().into_iter().find(|s| s.pool_id == id).unwrap();
        (s.vram_total_bytes, s.vram_free_bytes, s.compute_capability, s.perf)
    };
    let none = PerfHints::default();
    assert_eq!(seen("one"), (Some(10), Some(3), Some((8, 9)), perf));
    assert_eq!(seen("both"), (Some(20), Some(7), Some((8, 6)), none));
    assert_eq!(seen("odd"), (Some(20), Some(8), None, none), "what one device does not tell is not made up");
    for id in ["gone", "unknown"] {
        assert_eq!(seen(id), (None, None, None, none), "{id}");
    }
    assert_eq!((r.get_perf("one"), r.get_perf("nope")), (Some(perf), None));
    r.update_devices(&[]);
    assert!(r.snapshots().iter().all(|s| s.vram_free_bytes.is_none()), "nothing old is told");
}
