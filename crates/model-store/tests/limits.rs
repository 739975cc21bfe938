//! The most that a header can cost: each limit used up.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of a test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use model_store::profile;
use support::{F32, Gguf};
use tokio::time::{Duration, Instant};

/// Bytes that the process had in memory at most.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn dense() -> Gguf {
    Gguf::dense("llama", 2, 64, 4, 2)
}

/// Four million texts of no length.
fn texts(dir: &Path) -> PathBuf {
    let count = (31u64 << 20) / 8;
    let array = [&8u32.to_le_bytes()[..], &count.to_le_bytes(), &vec![0; 31 << 20]].concat();
    dense().raw("x", 9, &array).write(dir, "texts.gguf")
}

fn keys(dir: &Path) -> PathBuf {
    let key = |i: u32| format!("{i:0>256}");
    (0..4000).fold(dense(), |f, i| f.u32(&key(i), i)).write(dir, "keys.gguf")
}

fn kept_arrays(dir: &Path) -> PathBuf {
    (0..127).fold(dense(), |f, i| f.list(&format!("list{i}"), &[7; 512])).write(dir, "arrays.gguf")
}

fn tensors(dir: &Path) -> PathBuf {
    (0..32_768).fold(dense(), |f, i| f.tensor(&format!("{i:0>63}"), &[1], F32, 4)).write(dir, "tensors.gguf")
}

fn safetensors(dir: &Path, name: &str, config: &str, entries: usize) -> PathBuf {
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    let start = r#"{"model_type":"llama","num_hidden_layers":2,"hidden_size":64,"num_attention_heads":4,"x":"#;
    fs::write(dir.join("config.json"), format!("{start}{config}}}")).unwrap();
    let entry = |i| format!(r#""t{i}":{{"dtype":"I8","shape":[],"data_offsets":[0,1]}}"#);
    let json = format!("{{{}}}", (0..entries).map(entry).collect::<Vec<_>>().join(","));
    let bytes = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0]].concat();
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    dir
}

/// Set for the child that reads one model; it reads nothing else, so that what was freed before does not count.
const MODEL: &str = "MODEL_STORE_TEST_MODEL";
const NAME: &str = "no_header_takes_more_than_16_mib_or_100_ms";

fn in_child(model: &Path) {
    let (before, started) = (peak(), Instant::now());
    let result = profile(model);
    let (took, grew) = (started.elapsed(), peak() - before);
    let name = model.file_name().unwrap().to_string_lossy();
    println!("{name}: {took:?}, {} KiB, {}", grew >> 10, result.err().map_or("read".into(), |e| e.to_string()));
    assert!(grew < 16 << 20, "{name} takes {grew} bytes");
    // Code that is not optimised is some twenty times slower, and is not what anyone runs.
    assert!(cfg!(debug_assertions) || took < Duration::from_millis(100), "{name} takes {took:?}");
}

#[test]
fn no_header_takes_more_than_16_mib_or_100_ms() {
    if let Some(model) = std::env::var_os(MODEL) {
        return in_child(Path::new(&model));
    }
    let dir = tempfile::tempdir().unwrap();
    let numbers = format!("[{}0]", "0,".repeat(130_000));
    let models = [
        texts(dir.path()),
        keys(dir.path()),
        kept_arrays(dir.path()),
        tensors(dir.path()),
        safetensors(dir.path(), "config", &numbers, 1),
        safetensors(dir.path(), "header", "0", 70_000),
    ];
    for model in models {
        let this = std::env::current_exe().unwrap();
        let child = Command::new(this).args(["--exact", NAME, "--nocapture"]).env(MODEL, &model).output().unwrap();
        let told = String::from_utf8_lossy(&child.stdout);
        println!("{}", told.lines().find(|l| l.contains(" KiB")).unwrap_or_default());
        assert!(child.status.success(), "{told}{}", String::from_utf8_lossy(&child.stderr));
    }
}
