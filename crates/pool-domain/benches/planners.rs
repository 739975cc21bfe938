//! What planning costs: a split of 128 layers over 8 devices, the ranking of 1,000 replicas, an eviction plan.
//!
//! `cargo bench -p pool-domain --bench planners`
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and criterion generates items")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use pool_domain::evict::{EvictionPolicy, Resident, Start, plan_eviction};
use pool_domain::rank::{Candidate, Request, Standing, rank};
use pool_domain::split::{SplitDevice, SplitInput, SplitPlan, SplitRatios, assign};
use pool_domain::{DeviceHealth, DeviceMask, DeviceSnapshot, ReplicaId, ReplicaKey, ResolvedMask, Tick};

const GIB: u64 = 1 << 30;

fn uuid(index: u64) -> String {
    format!("GPU-51000000-0000-4000-8000-{index:012x}")
}

fn split(c: &mut Criterion) {
    // Layers of different sizes on devices of different sizes, so that nothing is symmetric.
    let layers: Vec<u64> = (0..128u64).map(|l| GIB + (l * 7 % 13) * (GIB / 16)).collect();
    let device = |at| SplitDevice { uuid: uuid(at), usable: (20 + at * 4) * GIB, fixed: GIB / 2 };
    let devices: Vec<SplitDevice> = (0..8).map(device).collect();
    let input = SplitInput { layers: &layers, kv: &layers, output: 2 * GIB, devices: &devices };
    let plan = SplitPlan::compute(&input).unwrap();
    assert!(plan.shares().iter().all(|s| !s.layers.is_empty()), "{plan:?}");
    c.bench_function("split/8 devices x 128 layers", |b| {
        b.iter(|| SplitPlan::compute(black_box(&input)));
    });
    // The first layer is the worst load by far, so the second step has every freedom.
    let mut loose = layers.clone();
    loose[0] = 100 * GIB;
    let input = SplitInput { layers: &loose, kv: &loose, ..input };
    c.bench_function("split/8 devices x 128 layers, one layer dominates", |b| {
        b.iter(|| SplitPlan::compute(black_box(&input)));
    });
    c.bench_function("split/parse and assign, 8 x 128", |b| {
        b.iter(|| {
            let ratios = SplitRatios::parse(black_box("3,1,2,4,1,1,2,2"), 8).unwrap();
            assign(ratios.as_slice(), black_box(128), 999)
        });
    });
}

fn placement(c: &mut Criterion) {
    let candidate = |i: u16| Candidate {
        key: ReplicaKey { pool: format!("pool-{}", i % 50).parse().unwrap(), replica: ReplicaId(i / 50) },
        standing: if i.is_multiple_of(9) { Standing::NotReady("waiting") } else { Standing::Ready },
        models: vec![format!("model-{}", i % 10), "alias".to_owned()],
        devices: vec![uuid(u64::from(i % 8))],
        vram_free: u64::from(i) * 7919 % 64 * GIB,
        leases: u32::from(i % 4),
        slots: 4,
        context: Some(8192),
    };
    let candidates: Vec<Candidate> = (0..1000).map(candidate).collect();
    let request = Request {
        model: Some("alias".to_owned()),
        context: Some(4096),
        devices: Some(ResolvedMask { uuids: (0..8).map(uuid).collect() }),
        ..Request::default()
    };
    let serving = rank(&candidates, &request).iter().filter(|r| r.verdict.serves()).count();
    assert!(serving > 800, "{serving}");
    c.bench_function("placement/1,000 replicas", |b| b.iter(|| rank(black_box(&candidates), black_box(&request))));
}

fn eviction(c: &mut Criterion) {
    let device = |index: u32| DeviceSnapshot {
        uuid: uuid(u64::from(index)),
        index,
        name: String::new(),
        pci_bus_id: None,
        compute_capability: None,
        numa_node: None,
        vram_total: 80 * GIB,
        vram_free: 0,
        vram_used: 72 * GIB,
        vram_reserved: 0,
        vram_foreign: 0,
        utilisation: None,
        health: DeviceHealth::Ok,
        mig: None,
        mig_parent: false,
        verdict: Default::default(),
        details: Default::default(),
    };
    let devices: Vec<DeviceSnapshot> = (0..8).map(device).collect();
    let resident = |i: u16| Resident {
        key: ReplicaKey { pool: "p".parse().unwrap(), replica: ReplicaId(i) },
        holds: vec![(uuid(u64::from(i % 8)), 9 * GIB)],
        ready_since: Some(Tick(0)),
        last_used: Tick(u64::from(i) * 37 % 64),
        busy: 0,
        on_demand: true,
        pinned: false,
        held: false,
    };
    let residents: Vec<Resident> = (0..64).map(resident).collect();
    let (mask, policy) = (DeviceMask::Auto, EvictionPolicy::default());
    let plan = || {
        let start = Start { mask: black_box(&mask), bytes: &[40 * GIB] };
        plan_eviction(start, &devices, |_| 72 * GIB, &residents, &policy, Tick(1_000_000))
    };
    assert_eq!(plan().unwrap().evict.len(), 4);
    c.bench_function("eviction/8 devices, 64 replicas", |b| b.iter(plan));
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = split, placement, eviction
}
criterion_main!(benches);
