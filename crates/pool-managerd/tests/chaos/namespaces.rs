//! Faults that need a world of their own: a small disk, pids that come back. Each test runs itself again in a namespace,
//! which takes root; elsewhere it says that it was skipped.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, WaitOptions, waitpid};
use serde_json::Value;

use crate::checker::{Checker, starts};
use crate::node::{QUICK, generation, pid, place, pool, ready, until_dead};
use crate::support::{Daemon, Engines, alive, eventually, signal};

const INSIDE: &str = "CHAOS_INSIDE";

#[expect(clippy::print_stderr, reason = "the report of the run tells it")]
fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

/// Runs the test of this name again under `unshare`; true inside.
fn inside(name: &str, unshare: &[&str]) -> bool {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == name) {
        return true;
    }
    if !Command::new("unshare").args(unshare).arg("true").output().is_ok_and(|tried| tried.status.success()) {
        skip("no namespaces may be made here");
        return false;
    }
    let again = Command::new("unshare")
        .args(unshare)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("namespaces::{name}"), "--nocapture"])
        .env(INSIDE, name)
        .status();
    assert!(again.unwrap().success(), "inside its namespace it failed");
    false
}

#[test]
fn a_full_disk_holds_up_starts_and_loses_nothing() {
    if !inside("a_full_disk_holds_up_starts_and_loses_nothing", &["--mount", "--propagation", "private"]) {
        return;
    }
    let pools = pool("one", &[], QUICK) + &pool("two", &["--tokens-per-second", "0"], QUICK);
    let dir = place(&pools);
    let disk = dir.path().join("state");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=512k", "chaos"]).arg(&disk).status();
    assert!(mounted.unwrap().success());
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let (one, two) = (ready(&daemon, "one"), ready(&daemon, "two"));
    let filler = disk.join("filler");
    fill(&filler);
    signal(pid(&one), "KILL");
    daemon.until("one", held_up);
    assert_eq!(generation(&ready(&daemon, "two")), generation(&two), "the neighbour serves on");
    // It may also be killed now, and still loses nothing.
    let dir = daemon.kill(&engines);
    fs::remove_file(&filler).unwrap();
    let daemon = Daemon::start_in_place(dir);
    let after = daemon.until("one", |p| p["ready"] == true);
    assert!(generation(&after) > generation(&one), "a generation is never used twice: {after:#}");
    assert_eq!(pid(&ready(&daemon, "two")), pid(&two));
    // And again without a restart of the daemon.
    fill(&filler);
    signal(pid(&after), "KILL");
    daemon.until("one", held_up);
    fs::remove_file(&filler).unwrap();
    daemon.post("/v1/pools/one/breaker/reset", "{}");
    daemon.until("one", |p| p["ready"] == true && alive(pid(p)));
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
    // The mount goes with the namespace; the directory below it is to be empty for its removal.
    assert!(Command::new("umount").arg(&disk).status().unwrap().success());
}

/// Whichever write met the end of the disk: the daemon's own, or one for the launch.
fn held_up(pool: &Value) -> bool {
    let reason = pool["reason"].as_str().unwrap();
    pool["state"] == "waiting"
        && pool["breaker"] == "closed"
        && (reason.contains("state directory") || reason.contains("No space left"))
}

/// Takes all that is left.
fn fill(path: &Path) {
    let mut size = 1 << 20;
    while size > 0 {
        let part = fs::OpenOptions::new().create(true).append(true).open(path);
        let full = part.and_then(|mut file| std::io::Write::write_all(&mut file, &vec![0; size]));
        if full.is_err() {
            size /= 2;
        }
    }
}

/// The next process in this namespace gets this pid.
fn next_pid(pid: u32) {
    fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
}

#[test]
fn a_stranger_that_has_the_pid_of_a_shim_or_an_engine_is_never_signalled() {
    let name = "a_stranger_that_has_the_pid_of_a_shim_or_an_engine_is_never_signalled";
    if !inside(name, &["--pid", "--fork", "--mount-proc", "--kill-child"]) {
        return;
    }
    let daemon = Daemon::start_in_place(place(&pool("one", &[], QUICK)));
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    ready(&daemon, "one");
    let record = daemon.dir().join("state/engines/one-r0.json");
    eventually(|| fs::read_to_string(&record).is_ok_and(|r| r.contains("\"ready\"")).then_some(()));
    let run = daemon.dir().join("state/run");
    let start: Value = starts(&run).pop().unwrap();
    let number = |name: &str| u32::try_from(start[name].as_u64().unwrap()).unwrap();
    let (main, shim) = (number("pid"), number("shim_pid"));
    let dir = daemon.kill(&engines);
    signal(shim, "KILL");
    until_dead(main);
    // Its parent is gone, so it is ours to take off the table: this process is the first of the namespace.
    for pid in [main, shim] {
        let _reaped = waitpid(Pid::from_raw(pid.cast_signed()), WaitOptions::empty());
    }
    let mut strangers: Vec<_> = [main, shim]
        .into_iter()
        .map(|pid| {
            next_pid(pid);
            let stranger = Command::new("sleep").arg("600").spawn().unwrap();
            assert_eq!(stranger.id(), pid, "the pid is in use again");
            stranger
        })
        .collect();
    let daemon = Daemon::start_in_place(dir);
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert!(strangers.iter_mut().all(|s| s.try_wait().unwrap().is_none()), "{after:#}");
    daemon.post("/v1/pools/one/stop?wait_ms=30000", "{}");
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    for mut stranger in strangers {
        assert!(stranger.try_wait().unwrap().is_none(), "a stranger was signalled");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
    checker.nothing_is_left(dir.path());
}
