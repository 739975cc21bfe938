//! What it costs to look at the inventory, and to renew it, with eight GPUs of the stand-in library.
#![allow(clippy::unwrap_used, reason = "a bench may panic")]

use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use gpu_nvml::{NvmlGpus, Opening, Options};
use nvml_standin::{Installed, Script};
use pool_services::ports::GpuProbe;

fn inventory(c: &mut Criterion) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nvml-standin/topologies/eight-nvlink.toml");
    let script = Script::parse(&std::fs::read_to_string(file).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let library = Installed::into_dir(dir.path(), &script).unwrap().library();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Looked at only when somebody asks.
    let options = Options { library: Some(library), sample_every: Duration::from_secs(3_600), ..Options::default() };
    let gpus = NvmlGpus::start(options).unwrap();
    runtime.block_on(async { gpus.opening().wait_for(|o| *o == Opening::Done).await.map(drop) }).unwrap();
    let seen = gpus.inventory();
    c.bench_function("read the inventory", |b| {
        b.iter(|| black_box(seen.borrow().devices.iter().map(|d| d.vram_free).sum::<u64>()));
    });
    c.bench_function("copy the inventory", |b| b.iter(|| black_box(seen.borrow().clone())));
    // Every question is answered after a look at all devices.
    c.bench_function("look at eight GPUs and ask who holds memory", |b| {
        b.iter(|| runtime.block_on(gpus.residency()));
    });
}

criterion_group!(benches, inventory);
criterion_main!(benches);
