//! What is declared before the daemon runs.

use std::path::Path;

use cucumber::{given, when};

use crate::site::{Declared, Site};

/// What the CUDA runtime says, as the stub engine takes it.
const CUDA_ERROR: &str = "CUDA error: an illegal memory access was encountered";

#[given("no pool at all")]
fn nothing(_: &mut Site) {}

#[given(regex = r#"^a pool "([^"]+)" that starts (with the daemon|on demand)$"#)]
fn a_pool(site: &mut Site, id: String, how: String) {
    let activation = if how == "on demand" { "\"on_demand\"" } else { "\"preload\"" };
    site.at.clone_from(&id);
    let keys = [("activation", activation.to_owned())].into();
    site.pools.push(Declared { id, keys, ..Declared::default() });
}

#[given(regex = r#"^it serves the model "([^"]+)"$"#)]
fn serves(site: &mut Site, model: String) {
    site.declared().keys.insert("model", format!("{model:?}"));
}

#[given("its model file is missing")]
fn missing_model(site: &mut Site) {
    let models = site.dir.as_ref().unwrap().path().join("models");
    std::fs::create_dir(&models).unwrap();
    site.tables.push_str(&format!("[models]\nroots = [{models:?}]\n"));
    site.declared().keys.insert("model", format!("\"file:{}/missing.gguf\"", models.display()));
}

#[given(regex = r"^it takes (\d+) requests? at a time$")]
fn slots(site: &mut Site, number: u16) {
    site.declared().keys.insert("slots", number.to_string());
}

#[given(regex = r"^it has (\d+) replicas$")]
fn replicas(site: &mut Site, number: u16) {
    site.declared().keys.insert("replicas", number.to_string());
}

#[given(regex = r"^it may use GPU (\d+) alone$")]
fn mask(site: &mut Site, gpu: u32) {
    site.declared().keys.insert("devices", format!("\"{gpu}\""));
}

#[given(regex = r"^it needs (\d+) GiB of GPU memory$")]
fn vram(site: &mut Site, gib: u64) {
    site.declared().keys.insert("vram", format!("\"{gib} GiB\""));
    let less = format!("{} GiB", gib - 1);
    site.declared().args.extend(["--vram".to_owned(), less]);
}

#[given(regex = r"^it stops when nobody used it for (\w+)$")]
fn idle_ttl(site: &mut Site, ttl: String) {
    site.declared().keys.insert("idle_ttl", format!("{ttl:?}"));
}

#[given("it is pinned")]
fn pinned(site: &mut Site) {
    site.declared().keys.insert("pin", "true".to_owned());
}

#[given("engines may be stopped as soon as they are ready")]
fn give_way(site: &mut Site) {
    site.node.push_str("min_ready_time = \"0s\"\n");
}

#[given(regex = r"^it pauses between (\w+) and (\w+) before a restart$")]
fn backoff(site: &mut Site, initial: String, max: String) {
    let table = format!("[pool.backoff]\ninitial = {initial:?}\nmax = {max:?}\n");
    site.declared().tables.push_str(&table);
}

#[given(regex = r"^its breaker opens after (\d+) failures in a row, for (\w+)$")]
fn breaker(site: &mut Site, failures: u32, pause: String) {
    let table = format!(
        "[pool.breaker]\nfailed_starts = {failures}\nearly_crashes = {failures}\nopen_for = {pause:?}\nmax_open_for = {pause:?}\n"
    );
    site.declared().tables.push_str(&table);
}

fn args(site: &mut Site, args: &[&str]) {
    site.declared().args.extend(args.iter().map(|&a| a.to_owned()));
}

#[given("its engine answers as another model")]
fn another_model(site: &mut Site) {
    args(site, &["--serve-model", "another"]);
}

#[given(regex = r"^its engine loads for (\w+)$")]
fn loads(site: &mut Site, time: String) {
    args(site, &["--load-ms", &crate::site::millis(&time).to_string()]);
}

#[given(regex = r"^its engine fails to start (\d+) times$")]
fn fails_at_first(site: &mut Site, times: u32) {
    let count = site.dir.as_ref().unwrap().path().join("failed-starts");
    args(site, &["--fail-start-times", &times.to_string(), "--state-file", count.to_str().unwrap()]);
}

#[given("its engine crashes in every start")]
fn crashes(site: &mut Site) {
    args(site, &["--crash-on-request", "1"]);
}

#[given("its engine meets a CUDA error at the first request")]
fn driver_error(site: &mut Site) {
    // The first unit of work is its proof; nobody else is to ask it.
    let bytes: String = CUDA_ERROR.bytes().map(|b| format!("{b:02x}")).collect();
    args(site, &["--log-bytes", &bytes, "--crash-on-request", "2"]);
    site.declared().tables.push_str("[pool.health]\ncanary = false\n");
}

#[given(regex = r"^its engine is checked every (\w+), and given up after (\d+) failed checks$")]
fn checked(site: &mut Site, interval: String, failures: u32) {
    let table = format!("[pool.health]\ninterval = {interval:?}\ntimeout = \"500ms\"\nfailures = {failures}\n");
    site.declared().tables.push_str(&table);
}

#[given("a real model that is served over both GPUs in equal parts")]
fn real_model(site: &mut Site) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/engine").canonicalize();
    let dir = dir.expect("the real engine is missing: run `cargo xtask engine` (the test command does)");
    site.tables.push_str(&format!(
        "[models]\nroots = [{:?}]\n[engines.\"llama.cpp\"]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = {:?}\n",
        dir.join("models"),
        dir.join("bin/llama-server")
    ));
    let model = format!("file:{}", dir.join("models/smollm2-135m.gguf").display());
    site.plan = Some(serde_json::json!({
        "model": model, "engine": "llama.cpp", "devices": "0,1", "tensor_split": "1,1", "slots": 1
    }));
}

#[when("the daemon runs")]
fn runs(site: &mut Site) {
    site.start();
}
