//! Configs and daemons for faults.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::support::{Daemon, alive, binary, eventually, write_config};

/// Restarts that nobody has to wait for.
pub(crate) const QUICK: &str = "[pool.backoff]\ninitial = \"10ms\"\nmax = \"20ms\"\n";

/// A pool with a stub engine that starts at once.
pub(crate) fn pool(id: &str, args: &[&str], more: &str) -> String {
    format!(
        "[[pool]]\nid = \"{id}\"\nmodel = \"stub:{id}\"\nengine = \"stub\"\nargs = {args:?}\nactivation = \"preload\"\n{more}\n"
    )
}

/// The same, which starts when it is asked to.
pub(crate) fn later(id: &str, args: &[&str], more: &str) -> String {
    pool(id, args, more).replace("\"preload\"", "\"on_demand\"")
}

/// A directory with this config, of which the engines have ports that no other test has while this process lives.
pub(crate) fn place(pools: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let first = own_ports();
    let node = format!("{pools}\n[node]\nstate_dir = \"state\"\nengine_ports = \"{}-{}\"\n", first + 1, first + 7);
    write_config(dir.path(), &node);
    // Two more, where engines may load for ever without holding up others.
    let more = ["3", "4"].map(|n| {
        let uuid = format!("GPU-51000000-0000-4000-8000-00000000000{n}");
        format!("\n[[device]]\nname = \"Simulated GPU\"\nuuid = \"{uuid}\"\nvram = \"24 GiB\"\n")
    });
    fs::write(dir.path().join("two-gpus.toml"), gpu_sim::TWO_GPUS.to_owned() + &more.concat()).unwrap();
    dir
}

/// The first of eight ports below the ephemeral ones. It is listened on until this process ends, so that the others are
/// taken by nobody who asks here.
fn own_ports() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id() * 8 + NEXT.fetch_add(1, Ordering::Relaxed);
        let first = 10_000 + u16::try_from(n % 2_700 * 8).unwrap();
        if let Ok(guard) = TcpListener::bind(("127.0.0.1", first)) {
            std::mem::forget(guard);
            return first;
        }
    }
}

/// Where a test says what is to happen at which point.
pub(crate) fn orders(dir: &Path) -> PathBuf {
    dir.join("orders")
}

/// The daemon, looking for orders.
pub(crate) fn obedient(dir: &Path) -> Command {
    let mut command = binary();
    command.env(pool_managerd::fault::ORDERS_ENV, orders(dir));
    command
}

/// Gives an order, whole or not at all.
pub(crate) fn order(dir: &Path, what: &str) {
    let draft = dir.join("orders.draft");
    fs::write(&draft, what).unwrap();
    fs::rename(draft, orders(dir)).unwrap();
}

/// A daemon that may be dead before it says anything.
pub(crate) fn start_blindly(dir: &Path) -> Child {
    obedient(dir)
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(dir.join("pool-managerd.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

pub(crate) fn state(daemon: &Daemon, id: &str, state: &str) -> Value {
    daemon.until(id, |p| p["state"] == state)
}

pub(crate) fn ready(daemon: &Daemon, id: &str) -> Value {
    daemon.until(id, |p| p["ready"] == true)
}

pub(crate) fn pid(pool: &Value) -> u32 {
    u32::try_from(pool["replicas"][0]["pid"].as_u64().unwrap_or_else(|| panic!("no process: {pool:#}"))).unwrap()
}

pub(crate) fn generation(pool: &Value) -> u64 {
    pool["replicas"][0]["generation"].as_u64().unwrap()
}

/// A field of `/proc/<pid>/stat` by its number there, from 3 up.
fn stat(pid: u32, field: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(field - 3).map(str::to_owned)
}

pub(crate) fn parent(pid: u32) -> u32 {
    stat(pid, 4).unwrap().parse().unwrap()
}

/// Whether it is stopped by a signal.
pub(crate) fn stopped(pid: u32) -> bool {
    stat(pid, 3).is_some_and(|state| state == "T")
}

/// The children of all threads of a process.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>()).collect()
}

pub(crate) fn until_dead(pid: u32) {
    eventually(|| (!alive(pid)).then_some(()));
}
