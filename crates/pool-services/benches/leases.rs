//! What a lease costs within the process: taken and given back, on one pool, and on two pools by two threads at once.
//!
//! `cargo bench -p pool-services --bench leases`
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and criterion generates items")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use pool_domain::{Generation, PoolId};
use pool_services::admission::Admission;
use pool_services::{PoolManager, PoolSnapshot};
use pool_testkit::{FakeNode, spec, until};
use tokio::runtime::{Builder, Runtime};

const PAIRS: u64 = 100_000;

/// Two pools that serve; events are taken in, as a daemon does.
fn serving() -> (Runtime, PoolManager, [PoolId; 2]) {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    let ids = ["a", "b"].map(|id| id.parse::<PoolId>().unwrap());
    let manager = runtime.block_on(async {
        let (manager, mut events) = FakeNode::default().manage(vec![spec("a"), spec("b")]).await;
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        for id in &ids {
            until(&manager, id, PoolSnapshot::ready).await;
        }
        manager
    });
    (runtime, manager, ids)
}

fn word(c: &mut Criterion) {
    let admission = Arc::new(<Admission>::default());
    admission.open(Generation(1), 4);
    c.bench_function("leases/admission word: take and give back", |b| {
        b.iter(|| drop(black_box(admission.acquire().unwrap())));
    });
}

fn manager(c: &mut Criterion) {
    let (_runtime, manager, ids) = serving();
    c.bench_function("leases/manager: take and give back", |b| {
        b.iter(|| drop(black_box(manager.allocate_lease(black_box(&ids[0])).unwrap())));
    });
    c.bench_function("leases/slots of a pool: take and give back", |b| {
        let mut slots = manager.slots(&ids[0]).unwrap();
        b.iter(|| drop(black_box(slots.take().unwrap())));
    });
    for threads in [1, 2] {
        c.bench_function(&format!("leases/100,000 pairs of slots in each of {threads} threads, a pool each"), |b| {
            b.iter(|| {
                std::thread::scope(|s| {
                    for id in &ids[..threads] {
                        let mut slots = manager.slots(id).unwrap();
                        s.spawn(move || (0..PAIRS).for_each(|_| drop(slots.take().unwrap())));
                    }
                });
            });
        });
        c.bench_function(&format!("leases/100,000 pairs of words in each of {threads} threads"), |b| {
            b.iter(|| {
                std::thread::scope(|s| {
                    for _ in 0..threads {
                        let admission = Arc::new(<Admission>::default());
                        admission.open(Generation(1), 4);
                        s.spawn(move || (0..PAIRS).for_each(|_| drop(admission.acquire().unwrap())));
                    }
                });
            });
        });
        c.bench_function(&format!("leases/100,000 pairs in each of {threads} threads, a pool each"), |b| {
            b.iter(|| {
                std::thread::scope(|s| {
                    for id in &ids[..threads] {
                        let manager = &manager;
                        s.spawn(move || (0..PAIRS).for_each(|_| drop(manager.allocate_lease(id).unwrap())));
                    }
                });
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = word, manager
}
criterion_main!(benches);
