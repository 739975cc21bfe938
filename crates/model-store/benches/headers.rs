//! How long the header of a model with a vocabulary of 100,000 tokens takes; the aim is 30 ms.

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use support::{F32, Gguf};

/// Llama-like: tokens, their scores and types, as many merges, 32 layers of nine tensors.
fn large() -> Gguf {
    let tokens: Vec<String> = (0..100_000).map(|i| format!("token{i}")).collect();
    let merges: Vec<String> = (0..100_000).map(|i| format!("left{i} right")).collect();
    let numbers = |kind: u32| {
        let count = tokens.len() as u64;
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), &vec![0; tokens.len() * 4]].concat()
    };
    let mut file = Gguf::dense("llama", 32, 4096, 32, 8)
        .strings("tokenizer.ggml.tokens", tokens.iter().map(String::as_str))
        .raw("tokenizer.ggml.scores", 9, &numbers(6))
        .raw("tokenizer.ggml.token_type", 9, &numbers(5))
        .strings("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    for layer in 0..32 {
        for part in
            ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
        {
            file = file.tensor(&format!("blk.{layer}.{part}.weight"), &[4096, 4096], F32, 64 << 20);
        }
    }
    file
}

fn headers(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let file = large();
    let path = file.write(dir.path(), "large.gguf");
    let mut group = c.benchmark_group("header");
    group.throughput(Throughput::Bytes(file.header().len() as u64));
    group.bench_function("gguf, 100k tokens, from a file of 18 GiB", |b| {
        b.iter(|| model_store::profile(&path).expect("a good header"));
    });
    // Panics if tensor data is read.
    group.bench_function("gguf, 100k tokens, from memory", |b| {
        let read = |file| model_store::profile_gguf(file).expect("a good header");
        b.iter_batched(|| file.sparse(), read, BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, headers);
criterion_main!(benches);
