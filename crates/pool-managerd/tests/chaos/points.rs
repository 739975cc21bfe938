//! `kill -9` at every named point, with engines in every state.
//!
//! Five pools are held in Starting, Warming, Ready, Draining and Stopping, two of them with a request that streams. A
//! sixth makes the daemon come to the point. So each run is one point with all five states.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use fault_points::Point;
use serde_json::Value;

use crate::checker::Checker;
use crate::node::{
    QUICK, children, generation, later, obedient, order, orders, parent, pid, place, pool, ready, start_blindly, state,
    stopped, until_dead,
};
use crate::support::stream::Stream;
use crate::support::{Daemon, Engines, alive, eventually, signal};

/// What the sixth pool is asked to do for a point to be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Start,
    Drain,
    Stop,
    /// The next daemon comes to it, when it finds what the first has left.
    Boot,
    /// Its own tests: `reloads.rs`.
    Reload,
}

/// How a point is met, and how often on the way it is of interest.
pub(crate) fn met(point: Point) -> (By, u32) {
    use Point::*;
    match point {
        BeforeIntent | AfterIntent | AfterRecord | BeforeLaunch | AfterReplicaLock | AfterSpecWritten
        | AfterSpawnShim | AfterStartedReport | AfterLaunch | BeforeProof | BeforeReadyRecord | AfterReadyRecord
        | BeforeHandoff | AfterHandoff => (By::Start, 1),
        // The intent and its copy, the record of the launch and of Ready, the handoff.
        BeforeRename | AfterRename => (By::Start, 5),
        DrainBegun | AfterDrainRecord => (By::Drain, 1),
        AfterTerm | AfterKill | BeforeStopRecord | AfterStopRecord | AfterGone | BeforeForget | AfterForget => {
            (By::Stop, 1)
        }
        AfterLock | AfterAdoptionProof => (By::Boot, 1),
        BeforeAdopt | AfterAdopt | AfterTakeOver => (By::Boot, 6),
        ReloadVerified | ReloadStopped | ReloadChanged | ReloadAdded | ReloadStarted | BeforeCommit | BetweenCopies
        | AfterCommit | AfterFlip | AfterRetire | UndoBegun | UndoneCommit | UndoneStart | UndoneChange
        | UndoneStop | UndoneAdd => (By::Reload, 1),
    }
}

/// Whether it is passed only while the engine takes its time to end: what is true no longer is not written down.
fn takes_time(point: Point) -> bool {
    matches!(point, Point::BeforeStopRecord | Point::AfterStopRecord)
}

fn config() -> String {
    let slowly = ["--tokens-per-second", "500"];
    let context = "devices = \"0\"\ncontext = 100000";
    [
        pool("starting", &["--load-ms", "600000"], "devices = \"2\""),
        pool("warming", &["--hang-after-requests", "0"], "devices = \"3\""),
        pool("ready", &slowly, context),
        pool("draining", &slowly, context),
        pool("stopping", &[], "devices = \"0\""),
        // Deaf, so that its stop has every step.
        later(
            "sixth",
            &["--ignore-sigterm"],
            &format!("devices = \"0\"\n{QUICK}[pool.drain]\nstop_grace = \"200ms\"\n"),
        ),
    ]
    .concat()
}

/// The five as they are held.
struct Five {
    starting: Value,
    warming: Value,
    ready: Value,
    draining: Value,
    stopping: Value,
    streams: [Stream; 2],
}

impl Five {
    fn hold(daemon: &Daemon) -> Self {
        let (well, draining) = (ready(daemon, "ready"), ready(daemon, "draining"));
        let streams = [Stream::open(&well), Stream::open(&draining)];
        // The request has a lease, as it should; without one a drain would be over at once.
        assert_eq!(daemon.post("/v1/pools/draining/leases", r#"{"ttl_ms":600000}"#).status, 201);
        daemon.post("/v1/pools/draining/drain", r#"{"deadline_ms":300000,"on_deadline":"force"}"#);
        let stopping = ready(daemon, "stopping");
        // Its shim cannot carry the stop out before it is let go on.
        signal(parent(pid(&stopping)), "STOP");
        daemon.post("/v1/pools/stopping/stop", "{}");
        let held = Self {
            starting: daemon.until("starting", |p| p["replicas"][0]["pid"].is_u64()),
            warming: state(daemon, "warming", "warming"),
            ready: well,
            draining: state(daemon, "draining", "draining"),
            stopping,
            streams,
        };
        state(daemon, "stopping", "stopping");
        // What is published is not written down yet.
        let phase = |id: &str| fs::read_to_string(daemon.dir().join(format!("state/engines/{id}-r0.json")));
        for (id, is) in
            [("starting", "starting"), ("warming", "starting"), ("ready", "ready"), ("draining", "draining")]
        {
            eventually(|| phase(id).ok()?.contains(&format!("\"is\": \"{is}\"")).then_some(()));
        }
        eventually(|| phase("stopping").ok()?.contains("\"is\": \"stopping\"").then_some(()));
        held
    }

    /// While there is no daemon, or another.
    fn serve_on(&mut self) {
        for pool in [&self.starting, &self.warming, &self.ready, &self.draining] {
            assert!(alive(pid(pool)), "{pool:#}");
        }
        self.streams.iter_mut().for_each(Stream::goes_on);
    }

    fn let_the_shim_go_on(&self) {
        let shim = parent(pid(&self.stopping));
        assert!(stopped(shim));
        signal(shim, "CONT");
    }

    /// After the next daemon has found them.
    fn are_as_they_were(&mut self, daemon: &Daemon) {
        let same = |before: &Value, id: &str, is: &str| {
            let after = state(daemon, id, is);
            assert_eq!((pid(&after), generation(&after)), (pid(before), generation(before)), "{after:#}");
        };
        same(&self.ready, "ready", "ready");
        same(&self.draining, "draining", "draining");
        same(&self.starting, "starting", "starting");
        same(&self.warming, "warming", "warming");
        until_dead(pid(&self.stopping));
        state(daemon, "stopping", "idle");
        self.serve_on();
    }
}

/// One point, the nth time. Says what phase the sixth pool was in on record when the daemon died.
fn kill_at(point: Point, nth: u32) {
    let (by, _) = met(point);
    let dir = place(&config());
    let mut daemon = Daemon::start_as(obedient(dir.path()), dir);
    let engines = Engines::of(&daemon);
    let checker = Checker::of(daemon.dir());
    state(&daemon, "sixth", "idle");
    if by != By::Start {
        assert_eq!(daemon.post("/v1/pools/sixth/preload?wait_ms=30000", "{}").json()["state"], "succeeded");
    }
    if by == By::Drain {
        assert_eq!(daemon.post("/v1/pools/sixth/leases", r#"{"ttl_ms":600000}"#).status, 201);
    }
    let mut five = Five::hold(&daemon);
    let held = takes_time(point).then(|| parent(pid(&ready(&daemon, "sixth"))));
    held.into_iter().for_each(|shim| signal(shim, "STOP"));
    let what = format!("{} kill {nth}", point.name());
    let dir = if by == By::Boot {
        let dir = daemon.kill(&engines);
        order(dir.path(), &what);
        let ended = start_blindly(dir.path()).wait().unwrap();
        assert_eq!(ended.signal(), Some(9), "{what}: {ended}");
        dir
    } else {
        order(daemon.dir(), &what);
        let (verb, body) = match by {
            By::Start => ("preload", "{}"),
            By::Drain => ("drain", r#"{"deadline_ms":300000,"on_deadline":"force"}"#),
            By::Stop | By::Boot | By::Reload => ("stop", "{}"),
        };
        // The daemon may die before it answers.
        let (addr, path) = (daemon.addr().to_owned(), format!("/v1/pools/sixth/{verb}"));
        let asked = thread::spawn(move || crate::support::request(&addr, "POST", &path, Some(body)));
        assert_eq!(daemon.wait(), None, "{what}: it was to be killed");
        let _cut_off = asked.join();
        engines.starts();
        daemon.into_dir()
    };
    assert!(!orders(dir.path()).exists(), "{what} was never met");
    five.serve_on();
    five.let_the_shim_go_on();
    held.into_iter().for_each(|shim| signal(shim, "CONT"));

    let daemon = Daemon::start_in_place(dir);
    five.are_as_they_were(&daemon);
    // Whatever became of the sixth: one engine, once somebody wants it.
    daemon.post("/v1/pools/sixth/preload", "{}");
    let sixth = ready(&daemon, "sixth");
    assert!(alive(pid(&sixth)), "{what}: {sixth:#}");
    let mut lives = engines.running();
    let mut known = [&five.starting, &five.warming, &five.ready, &five.draining, &sixth].map(pid).to_vec();
    lives.sort_unstable();
    known.sort_unstable();
    assert_eq!(lives, known, "{what}");
    checker.strangers_were_left_alone();
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0), "{what}");
    checker.nothing_is_left(dir.path());
}

/// Two at a time: they wait for processes more than they compute.
pub(crate) fn side_by_side<T: Send>(jobs: Vec<T>, work: impl Fn(T) + Sync) {
    let jobs = Mutex::new(jobs);
    let next = || jobs.lock().unwrap().pop();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(job) = next() {
                    work(job);
                }
            });
        }
    });
}

fn kill_at_every_point(chosen: impl Fn(By) -> bool) {
    let points = Point::ALL.iter().filter(|point| chosen(met(**point).0));
    let jobs: Vec<_> = points.flat_map(|point| (1..=met(*point).1).map(|nth| (*point, nth))).collect();
    assert!(!jobs.is_empty());
    side_by_side(jobs, |(point, nth)| kill_at(point, nth));
}

#[test]
fn a_daemon_killed_at_any_point_of_a_start_leaves_every_engine_as_it_was() {
    kill_at_every_point(|by| by == By::Start);
}

#[test]
fn a_daemon_killed_at_any_point_of_a_drain_or_stop_leaves_every_engine_as_it_was() {
    kill_at_every_point(|by| matches!(by, By::Drain | By::Stop));
}

#[test]
fn a_daemon_killed_at_any_point_of_a_boot_leaves_every_engine_as_it_was() {
    kill_at_every_point(|by| by == By::Boot);
}

#[test]
fn the_names_of_points_are_their_own() {
    let names: BTreeSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
    assert_eq!(names.len(), Point::ALL.len());
}

/// Who is killed while the daemon stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Engine,
    Shim,
}

/// The daemon is stopped at a point, somebody else is killed, the daemon goes on.
fn kill_beside(point: Point, victim: Victim) {
    let what = format!("{victim:?} at {}", point.name());
    let (by, _) = met(point);
    let dir = place(&later("one", &[], QUICK));
    let daemon = Daemon::start_as(obedient(dir.path()), dir);
    let engines = Engines::of(&daemon);
    let checker = Checker::of(daemon.dir());
    daemon.until("one", |p| p["state"] == "idle");
    if by != By::Start {
        daemon.post("/v1/pools/one/preload", "{}");
        ready(&daemon, "one");
    }
    let held = takes_time(point).then(|| parent(pid(&ready(&daemon, "one"))));
    held.into_iter().for_each(|shim| signal(shim, "STOP"));
    let verb = if by == By::Start { "preload" } else { "stop" };
    order(daemon.dir(), &format!("{} stop 1", point.name()));
    let (addr, path) = (daemon.addr().to_owned(), format!("/v1/pools/one/{verb}"));
    let asked = thread::spawn(move || crate::support::request(&addr, "POST", &path, Some("{}")));
    eventually(|| stopped(daemon.pid()).then_some(()));
    // At the end of a stop there may be nobody left to kill.
    let shim = children(daemon.pid()).into_iter().next();
    let killed = match (victim, shim) {
        (Victim::Shim, shim) => shim,
        (Victim::Engine, Some(shim)) => {
            eventually(|| Some(children(shim)).filter(|found| !found.is_empty() || by != By::Start)).into_iter().next()
        }
        (Victim::Engine, None) => None,
    };
    assert!(killed.is_some() || by == By::Stop, "{what}: nobody is there");
    if let Some(killed) = killed {
        // Its engine goes with a shim.
        let with_it = children(killed);
        // One that is being stopped may be gone by now.
        let sent = Command::new("kill").args(["-KILL", &killed.to_string()]).output().unwrap();
        assert!(sent.status.success() || by == By::Stop, "{what}: {sent:?}");
        until_dead(killed);
        with_it.into_iter().for_each(until_dead);
    }
    held.into_iter().filter(|shim| alive(*shim)).for_each(|shim| signal(shim, "CONT"));
    signal(daemon.pid(), "CONT");
    asked.join().unwrap();
    if by == By::Start {
        let after = daemon.until("one", |p| p["ready"] == true && alive(pid(p)));
        assert_eq!(engines.running(), [pid(&after)], "{what}");
    } else {
        state(&daemon, "one", "idle");
        assert!(engines.running().is_empty(), "{what}");
    }
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0), "{what}");
    checker.nothing_is_left(dir.path());
}

#[test]
fn an_engine_or_a_shim_killed_at_any_point_is_replaced_once_and_leaves_nothing() {
    use Point::*;
    let points = [
        AfterSpawnShim,
        AfterStartedReport,
        AfterLaunch,
        BeforeProof,
        BeforeReadyRecord,
        AfterReadyRecord,
        BeforeHandoff,
        AfterHandoff,
        AfterTerm,
        BeforeStopRecord,
        AfterStopRecord,
    ];
    let jobs = points.iter().flat_map(|point| [(*point, Victim::Engine), (*point, Victim::Shim)]).collect();
    side_by_side(jobs, |(point, victim)| kill_beside(point, victim));
}

/// `cargo xtask test` looks for this word in the daemon that is built without tests, and must not find it.
#[test]
fn a_daemon_with_points_has_the_word_by_which_it_is_told() {
    let daemon = fs::read(env!("CARGO_BIN_EXE_pool-managerd")).unwrap();
    let word = pool_managerd::fault::ORDERS_ENV.as_bytes();
    assert_eq!(word, b"POOL_MANAGERD_FAULT_ORDERS");
    assert!(daemon.windows(word.len()).any(|part| part == word));
}
