//! How pools stand.

use std::fs;

use cucumber::{then, when};
use serde_json::Value;

use crate::site::Site;
use crate::support::{alive, eventually, signal};

fn replicas(pool: &Value) -> &Vec<Value> {
    pool["replicas"].as_array().unwrap()
}

fn pid(replica: &Value) -> Option<u32> {
    replica["pid"].as_u64()?.try_into().ok()
}

#[when(regex = r#"^pool "([^"]+)" is ready$"#)]
#[then(regex = r#"^pool "([^"]+)" is ready$"#)]
fn ready(site: &mut Site, id: String) {
    site.at = id;
    let pool = site.until(|p| p["ready"] == true);
    site.before.entry(site.at.clone()).or_insert(pool);
}

#[when(regex = r#"^all replicas of "([^"]+)" are ready$"#)]
fn all_ready(site: &mut Site, id: String) {
    site.at = id;
    let pool = site.until(|p| replicas(p).iter().all(|r| r["ready"] == true));
    site.before.insert(site.at.clone(), pool);
}

#[then("it is not ready")]
fn not_ready(site: &mut Site) {
    let pool = site.pool();
    assert_eq!((&pool["ready"], &pool["slots_free"]), (&false.into(), &0.into()), "{pool:#}");
}

#[then(regex = r#"^pool "([^"]+)" fails to start without ever being ready$"#)]
fn fails_to_start(site: &mut Site, id: String) {
    site.at = id;
    site.until(|p| {
        assert_eq!(p["ready"], false, "{p:#}");
        !p["last_error"].is_null()
    });
}

#[then(regex = r#"^pool "([^"]+)" waits to be restarted$"#)]
fn waits(site: &mut Site, id: String) {
    site.at = id;
    let pool = site.until(|p| p["state"] == "waiting");
    assert_eq!(pool["replicas"][0]["reason_code"], "backoff", "{pool:#}");
    assert!(pool["replicas"][0]["backoff"]["next_start_in_ms"].as_u64() > Some(0), "{pool:#}");
}

#[when(regex = r#"^pool "([^"]+)" waits for GPU memory$"#)]
#[then(regex = r#"^pool "([^"]+)" waits for GPU memory$"#)]
fn waits_for_memory(site: &mut Site, id: String) {
    site.at = id;
    site.until(|p| {
        assert_eq!(p["live"], false, "{p:#}");
        p["replicas"][0]["reason_code"] == "vram"
    });
}

#[then(regex = r#"^its reason names "([^"]+)"$"#)]
fn reason(site: &mut Site, other: String) {
    let pool = site.pool();
    assert!(pool["reason"].as_str().unwrap().contains(&other), "{pool:#}");
}

#[then(regex = r#"^pool "([^"]+)" rests$"#)]
fn rests(site: &mut Site, id: String) {
    site.at = id;
    site.until(|p| p["state"] == "idle" && p["live"] == false);
}

#[then(regex = r#"^pool "([^"]+)" rests on hold$"#)]
fn rests_on_hold(site: &mut Site, id: String) {
    rests(site, id);
    assert_eq!(site.pool()["hold"], true);
}

#[then("it is not on hold")]
fn no_hold(site: &mut Site) {
    assert_eq!(site.pool()["hold"], false);
}

#[when(regex = r#"^pool "([^"]+)" is draining$"#)]
#[then(regex = r#"^pool "([^"]+)" is draining$"#)]
fn draining(site: &mut Site, id: String) {
    site.at = id;
    site.until(|p| p["draining"] == true);
}

#[then(regex = r#"^its last error is "([^"]+)"$"#)]
fn last_error(site: &mut Site, class: String) {
    let pool = site.pool();
    assert_eq!(pool["last_error"]["class"], class, "{pool:#}");
    assert!(pool["last_error"]["detail"].as_str().is_some_and(|d| !d.is_empty()), "{pool:#}");
}

#[then("the log says that its engine met a driver error")]
fn driver_error_in_log(site: &mut Site) {
    let line = format!("Restarting the {} pool in", site.at);
    assert!(site.daemon_mut().wait_log(&line).contains("met a GPU driver error"));
}

#[then(regex = r"^it is served by engine number (\d+)$")]
fn generation(site: &mut Site, number: u64) {
    let pool = site.until(|p| p["ready"] == true && p["replicas"][0]["generation"].as_u64() >= Some(number));
    assert_eq!(pool["replicas"][0]["generation"], number, "{pool:#}");
}

#[then(regex = r"^it was restarted (\d+) times?$")]
fn restarts(site: &mut Site, times: u64) {
    assert_eq!(site.pool()["restart_count"], times);
}

#[then(regex = r#"^the breaker of pool "([^"]+)" opens$"#)]
fn breaker_opens(site: &mut Site, id: String) {
    site.at = id;
    site.until(|p| p["breaker"] == "open");
}

#[then(regex = r"^(\d+) engines were started for it$")]
fn starts(site: &mut Site, number: u64) {
    assert_eq!(site.pool()["replicas"][0]["generation"], number);
}

#[then(regex = r"^more than (\d+) engines were started for it$")]
fn more_starts(site: &mut Site, number: u64) {
    site.until(|p| p["replicas"][0]["generation"].as_u64() > Some(number));
}

#[then("no engine was ever started for it")]
fn no_start(site: &mut Site) {
    let launches = site.daemon().dir().join(format!("state/run/{}-r0", site.at));
    assert!(!launches.exists(), "something was launched");
}

#[then(regex = r"^its engine sees GPU (\d+) alone$")]
fn sees(site: &mut Site, gpu: usize) {
    let node = site.daemon().get("/v1/node").json();
    let pool = site.pool();
    let pid = pid(&pool["replicas"][0]).unwrap();
    let environment = String::from_utf8(fs::read(format!("/proc/{pid}/environ")).unwrap()).unwrap();
    let visible = environment.split('\0').find_map(|v| v.strip_prefix("CUDA_VISIBLE_DEVICES=")).unwrap();
    assert_eq!(visible, node["devices"][gpu]["uuid"], "{node:#}");
    assert_eq!(pool["device_mask"], visible);
}

fn reserved(site: &Site, gpu: usize) -> u64 {
    site.daemon().get("/v1/node").json()["devices"][gpu]["vram_reserved_bytes"].as_u64().unwrap()
}

#[then(regex = r"^(\d+) GiB are reserved on GPU (\d+)$")]
fn is_reserved(site: &mut Site, gib: u64, gpu: usize) {
    assert_eq!(reserved(site, gpu), gib << 30);
}

#[then(regex = r"^nothing is reserved on GPU (\d+)$")]
fn nothing_reserved(site: &mut Site, gpu: usize) {
    assert_eq!(reserved(site, gpu), 0);
}

/// The engines that were there when the pool was first seen ready.
fn former(site: &Site) -> Vec<Value> {
    replicas(&site.before[&site.at]).clone()
}

#[then("it has the same engine as before")]
fn same_engine(site: &mut Site) {
    let identity = |r: &Value| (r["replica_id"].clone(), r["generation"].clone(), r["pid"].clone());
    let before: Vec<_> = former(site).iter().map(identity).collect();
    // What was made beside it may be there a moment longer.
    let now = site.until(|p| replicas(p).len() == before.len() && p["ready"] == true);
    assert_eq!(replicas(&now).iter().map(identity).collect::<Vec<_>>(), before, "{now:#}");
}

#[then(regex = "^(?:its engine|the engine of before) is gone$")]
fn engine_gone(site: &mut Site) {
    let pids: Vec<u32> = former(site).iter().filter_map(pid).collect();
    assert!(!pids.is_empty());
    eventually(|| pids.iter().all(|p| !alive(*p)).then_some(()));
}

#[then(regex = r#"^pool "([^"]+)" serves the model "([^"]+)"$"#)]
fn serves(site: &mut Site, id: String, model: String) {
    site.at = id;
    let pool = site.until(|p| p["ready"] == true);
    assert_eq!(pool["model"], model, "{pool:#}");
}

#[then(regex = r"^it is at revision (\d+)$")]
fn revision(site: &mut Site, number: u64) {
    assert_eq!(site.pool()["revision"], number);
}

#[then(regex = r"^(\d+) of (\d+) replicas? is ready$")]
fn some_ready(site: &mut Site, ready: u64, of: usize) {
    let pool = site.until(|p| p["ready_replicas"] == ready);
    assert_eq!(replicas(&pool).len(), of, "{pool:#}");
}

#[when(regex = r#"^the engine of replica "([^"]+)" is killed$"#)]
fn killed(site: &mut Site, replica: String) {
    let pool = site.pool();
    let found = replicas(&pool).iter().find(|r| r["replica_id"] == *replica).unwrap();
    signal(pid(found).unwrap(), "KILL");
}

#[when(regex = "^its engine (is frozen|goes on)$")]
fn frozen(site: &mut Site, how: String) {
    let pid = pid(&former(site)[0]).unwrap();
    signal(pid, if how == "goes on" { "CONT" } else { "STOP" });
}

#[then(regex = r"^its health is live and (not )?ready, with (at least )?(\d+) failed checks$")]
fn health(site: &mut Site, not: String, more: String, checks: u64) {
    let (id, ready) = (site.at.clone(), not.is_empty());
    eventually(|| {
        let health = site.daemon().get(&format!("/v1/pools/{id}/health")).json();
        assert_eq!(health["live"], true, "{health:#}");
        let failed = health["consecutive_failures"].as_u64().unwrap();
        let counted = if more.is_empty() { failed == checks } else { failed >= checks };
        let as_told = health["ready"] == ready && counted && health["last_check_at"].is_string();
        as_told.then(|| assert_eq!(health["replicas"][0]["ready"], ready, "{health:#}"))
    });
}

#[then(regex = r#"^there is no pool "([^"]+)"$"#)]
fn no_pool(site: &mut Site, id: String) {
    assert_eq!(site.daemon().get(&format!("/v1/pools/{id}")).status, 404);
}
