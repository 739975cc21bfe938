//! Engines that stop, fork, flood, or cannot be started.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;

use crate::checker::Checker;
use crate::node::{
    QUICK, children, generation, later, obedient, order, parent, pid, place, pool, ready, state, stopped, until_dead,
};
use crate::support::{Daemon, Engines, alive, eventually, signal};

const IMPATIENT: &str = "[pool.health]\ninterval = \"100ms\"\ntimeout = \"300ms\"\nfailures = 3\n";

#[test]
fn a_stopped_engine_is_a_hang_and_is_replaced() {
    let dir = place(&pool("one", &["--fork-children", "1"], &format!("{QUICK}{IMPATIENT}")));
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = pid(&ready(&daemon, "one"));
    signal(before, "STOP");
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert!(!alive(before), "{after:#}");
    assert_eq!(engines.running(), [pid(&after)]);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn a_stopped_engine_that_is_asked_to_stop_is_gone() {
    let dir = place(&pool("one", &["--fork-children", "2", "--double-fork"], ""));
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let main = pid(&ready(&daemon, "one"));
    let tree: Vec<u32> = children(main).into_iter().chain(children(parent(main))).collect();
    assert!(tree.len() >= 4, "main, two children and a detached one: {tree:?}");
    tree.iter().for_each(|pid| signal(*pid, "STOP"));
    let done = daemon.post("/v1/pools/one/stop?wait_ms=60000", "{}").json();
    assert_eq!(done["state"], "succeeded", "{done:#}");
    assert!(tree.iter().all(|pid| !alive(*pid)), "{tree:?}");
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn a_flood_of_log_fills_no_disk_blocks_no_engine_and_outlives_the_daemon() {
    const LOG_MAX: u64 = 16 << 20;
    let dir = place(&pool("one", &["--log-flood"], ""));
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = ready(&daemon, "one");
    let log = daemon.dir().join("state/run/one-r0/1/engine.log");
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |m| m.len());
    let old = log.with_extension("log.1");
    let turned = || fs::metadata(&old).ok()?.modified().ok();
    let first = eventually(turned);
    // Without a daemon as well.
    let dir = daemon.kill(&engines);
    eventually(|| turned().filter(|at| *at != first));
    assert!(size(&log) <= LOG_MAX + 4096 && size(&old) <= LOG_MAX + 4096, "{} {}", size(&log), size(&old));
    let daemon = Daemon::start_in_place(dir);
    let after = ready(&daemon, "one");
    assert_eq!((pid(&after), generation(&after)), (pid(&before), 1));
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

/// A server that says to everybody that all is well.
fn decoy(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let _asked = socket.read(&mut [0; 4096]);
            let body = r#"{"status":"ok"}"#;
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
            let _told = write!(socket, "{head}Content-Length: {}\r\n\r\n{body}", body.len());
        }
    });
}

#[test]
fn a_decoy_that_takes_the_port_between_choice_and_exec_is_never_taken_for_the_engine() {
    let dir = place(&later("one", &[], ""));
    let daemon = Daemon::start_as(obedient(dir.path()), dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    state(&daemon, "one", "idle");
    order(daemon.dir(), "before_launch stop 1");
    let addr = daemon.addr().to_owned();
    let asked = std::thread::spawn(move || crate::support::request(&addr, "POST", "/v1/pools/one/preload", Some("{}")));
    eventually(|| stopped(daemon.pid()).then_some(()));
    let record = fs::read_to_string(daemon.dir().join("state/engines/one-r0.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    let addr = record["addr"].as_str().unwrap().to_owned();
    decoy(TcpListener::bind(&addr).unwrap());
    signal(daemon.pid(), "CONT");
    asked.join().unwrap();
    let url = format!("http://{addr}");
    let after = daemon.until("one", |p| {
        assert!(p["ready"] != true || p["replicas"][0]["endpoint"] != url.as_str(), "{p:#}");
        p["ready"] == true
    });
    assert_eq!(after["last_error"]["class"], "port_conflict", "{after:#}");
    assert_eq!(after["replicas"][0]["backoff"]["failures"], 0, "somebody else's port is not its failure: {after:#}");
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

/// A cgroup that bounds how many processes there may be, where one can be made.
struct Bounded(PathBuf);

impl Bounded {
    fn around(pid: u32) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.split_once(":pids:"))?.1.trim_start_matches('/').to_owned();
        let dir = PathBuf::from("/sys/fs/cgroup/pids").join(own).join(format!("chaos-{pid}"));
        fs::create_dir(&dir).ok()?;
        let bounded = Self(dir);
        fs::write(bounded.0.join("cgroup.procs"), pid.to_string()).ok()?;
        Some(bounded)
    }

    fn limit(&self, most: &str) {
        fs::write(self.0.join("pids.max"), most).unwrap();
    }

    fn now(&self) -> u32 {
        fs::read_to_string(self.0.join("pids.current")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        let _in_use = fs::remove_dir(&self.0);
    }
}

#[test]
fn when_no_process_can_be_made_starts_are_tried_again_and_the_daemon_lives() {
    let dir = place(&later("one", &[], QUICK));
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    state(&daemon, "one", "idle");
    let Some(bounded) = Bounded::around(daemon.pid()) else {
        eprintln!("skipped: no cgroup of version 1 bounds processes here");
        return;
    };
    // Its threads are there; nothing may come.
    ready_once(&daemon);
    bounded.limit(&bounded.now().to_string());
    daemon.post("/v1/pools/one/preload", "{}");
    let failed = daemon.until("one", |p| !p["last_error"].is_null());
    assert_eq!(failed["last_error"]["class"], "node", "{failed:#}");
    assert_eq!(
        (failed["breaker"].as_str(), failed["backoff"]["failures"].as_u64()),
        (Some("closed"), Some(0)),
        "{failed:#}"
    );
    assert_eq!(daemon.get("/livez").status, 200);
    bounded.limit("max");
    daemon.post("/v1/pools/one/breaker/reset", "{}");
    let after = ready(&daemon, "one");
    assert_eq!(engines.running(), [pid(&after)]);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

/// A start and a stop, so that the threads that such work takes are there.
fn ready_once(daemon: &Daemon) {
    daemon.post("/v1/pools/one/preload", "{}");
    let main = pid(&ready(daemon, "one"));
    daemon.post("/v1/pools/one/stop?wait_ms=30000", "{}");
    until_dead(main);
    state(daemon, "one", "idle");
}

/// Half a head, half a body, and an answer that nobody reads, four hundred times.
#[test]
fn slow_clients_by_the_hundred_hold_up_neither_requests_nor_an_engine() {
    let dir = place(&pool("one", &[], QUICK));
    let daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = pid(&ready(&daemon, "one"));
    let words = [
        "GET /v1/pools HTTP/1.1\r\nHost: h\r\nX-Half: ",
        "POST /v1/pools/one/leases HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
        "GET /v1/pools HTTP/1.1\r\nHost: h\r\n\r\n",
    ];
    let slow: Vec<TcpStream> = (0..400)
        .map(|n| {
            let mut stream = TcpStream::connect(daemon.addr()).unwrap();
            stream.write_all(words[n % words.len()].as_bytes()).unwrap();
            stream
        })
        .collect();
    assert_eq!(daemon.get("/livez").status, 200);
    signal(before, "KILL");
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert_eq!(daemon.post("/v1/pools/one/leases", "{}").status, 201);
    assert_eq!(engines.running(), [pid(&after)]);
    drop(slow);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}
