//! `kill -9` at every named point of a reload and of its undo: the next daemon has the old or the new, whole.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use fault_points::Point;
use serde_json::{Value, json};

use crate::checker::Checker;
use crate::node::{QUICK, obedient, order, orders, place, pool};
use crate::points::{By, met, side_by_side};
use crate::support::stream::Stream;
use crate::support::{Daemon, Engines, alive, eventually, request};

/// How a reload comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Well,
    /// The new engine says that it serves another model.
    Wrong,
    /// The disk does not take the new form.
    Unwritten,
}

/// One way to a point: the strategy, how many replicas there are, how it would end, and the how manieth time it is.
#[derive(Debug, Clone, Copy)]
struct Way {
    point: Point,
    strategy: &'static str,
    replicas: usize,
    ends: Ends,
    nth: u32,
}

/// Every way by which it is met; for one that only one strategy has, that one.
fn ways(point: Point) -> Vec<Way> {
    use Ends::*;
    use Point::*;
    let way = |strategy, replicas, ends, nth| Way { point, strategy, replicas, ends, nth };
    let both = |ends| vec![way("in_place", 1, ends, 1), way("overlap", 1, ends, 1)];
    match point {
        ReloadVerified | BeforeCommit | AfterCommit => both(Well),
        // Of a commit, and the second time of what strikes it out or writes the old again.
        BetweenCopies => both(Well),
        ReloadStarted => [both(Well), vec![way("rolling", 2, Well, 1), way("rolling", 2, Well, 2)]].concat(),
        ReloadStopped | ReloadChanged => vec![way("in_place", 1, Well, 1), way("rolling", 2, Well, 2)],
        ReloadAdded | AfterFlip | AfterRetire => vec![way("overlap", 1, Well, 1)],
        UndoBegun => both(Wrong),
        UndoneStart => both(Wrong),
        UndoneChange => vec![way("in_place", 1, Wrong, 1)],
        UndoneStop => {
            vec![way("in_place", 1, Wrong, 1), way("rolling", 2, Unwritten, 1), way("rolling", 2, Unwritten, 2)]
        }
        UndoneAdd => vec![way("overlap", 1, Wrong, 1)],
        UndoneCommit => both(Unwritten),
        _ => Vec::new(),
    }
}

impl Way {
    fn committed(self) -> bool {
        matches!(self.point, Point::AfterCommit | Point::AfterFlip | Point::AfterRetire)
    }

    /// What the next daemon has.
    fn model(self) -> &'static str {
        if self.committed() { "stub:two" } else { "stub:one" }
    }
}

fn pids(pool: &Value) -> BTreeSet<u32> {
    let replicas = pool["replicas"].as_array().unwrap();
    replicas.iter().filter_map(|r| r["pid"].as_u64()).map(|pid| u32::try_from(pid).unwrap()).collect()
}

/// The model that a process was started for, by its own arguments.
fn serves(pid: u32) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).replace('\0', " ")
}

/// As many engines as there are to be, all Ready and nothing else.
fn whole(daemon: &Daemon, replicas: usize) -> Value {
    daemon.until("chat", |p| {
        let all = p["replicas"].as_array().unwrap();
        all.len() == replicas && all.iter().all(|r| r["ready"] == true)
    })
}

fn kill_in_a_reload(way: Way) {
    let what = format!("{} kill {}", way.point.name(), way.nth);
    let quick = format!("{QUICK}[pool.reload]\nprobation = \"0s\"\n");
    let config = pool("chat", &[], &format!("replicas = {}\n{quick}", way.replicas)).replace("stub:chat", "stub:one");
    let dir = place(&config);
    let mut daemon = Daemon::start_as(obedient(dir.path()), dir);
    let engines = Engines::of(&daemon);
    let checker = Checker::of(daemon.dir());
    let before = pids(&whole(&daemon, way.replicas));
    // With overlap the old serves on whatever becomes of the new. Without a lease it is retired all the same.
    let mut stream =
        (way.strategy == "overlap" && way.point != Point::AfterRetire).then(|| Stream::open(&daemon.pool("chat")));
    let in_the_way = daemon.dir().join("state/pools/chat.json.copy");
    if way.ends == Ends::Unwritten {
        fs::create_dir(&in_the_way).unwrap();
    }
    order(daemon.dir(), &what);
    let args: &[&str] = if way.ends == Ends::Wrong { &["--serve-model", "third"] } else { &["--slots", "3"] };
    let body = json!({ "new_model_ref": "stub:two", "args": args, "strategy": way.strategy }).to_string();
    let addr = daemon.addr().to_owned();
    // The daemon may die before it answers.
    let asked = thread::spawn(move || request(&addr, "POST", "/v1/pools/chat/reload", Some(&body)));
    assert_eq!(daemon.wait(), None, "{way:?}: it was to be killed");
    let _cut_off = asked.join();
    engines.starts();
    let dir = daemon.into_dir();
    assert!(!orders(dir.path()).exists(), "{way:?} was never met");
    if let Some(stream) = &mut stream {
        stream.goes_on();
    }
    if way.ends == Ends::Unwritten {
        fs::remove_dir(&in_the_way).unwrap();
    }
    let written = fs::read_to_string(dir.path().join("state/pools/chat.json")).is_ok();
    assert_eq!(written, way.committed(), "{way:?}");

    let daemon = Daemon::start_in_place(dir);
    let is = daemon.until("chat", |p| p["ready"] == true);
    let revision = if way.committed() { 2 } else { 1 };
    assert_eq!((&is["model"], &is["revision"]), (&json!(way.model()), &json!(revision)), "{way:?}: {is:#}");
    if let Some(stream) = stream.as_mut().filter(|_| !way.committed()) {
        stream.goes_on();
        assert_eq!(pids(&is), before, "{way:?}: it was never touched");
    }
    drop(stream);
    let is = whole(&daemon, way.replicas);
    // What nobody wants any more ends.
    eventually(|| (engines.running().len() == way.replicas).then_some(()));
    let lives: BTreeSet<u32> = engines.running().into_iter().collect();
    assert_eq!(lives, pids(&is), "{way:?}: {is:#}");
    let name = way.model().trim_start_matches("stub:");
    for process in &lives {
        assert!(alive(*process) && serves(*process).contains(name), "{way:?}: {}", serves(*process));
    }
    let new = |process: &u32| serves(*process).contains("--slots 3");
    assert!(lives.iter().all(|p| new(p) == way.committed()), "{way:?}: its arguments, too");
    checker.strangers_were_left_alone();
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0), "{way:?}");
    checker.nothing_is_left(dir.path());
}

fn kill_at_every_point(undo: bool) {
    let points = Point::ALL.iter().filter(|point| met(**point).0 == By::Reload);
    let all: Vec<Vec<Way>> = points.map(|point| ways(*point)).collect();
    assert!(all.iter().all(|ways| !ways.is_empty()), "a point that no reload here comes to");
    let jobs: Vec<Way> = all.into_iter().flatten().filter(|way| (way.ends != Ends::Well) == undo).collect();
    assert!(!jobs.is_empty());
    side_by_side(jobs, kill_in_a_reload);
}

#[test]
fn a_daemon_killed_at_any_point_of_a_reload_leaves_the_old_or_the_new() {
    kill_at_every_point(false);
}

#[test]
fn a_daemon_killed_at_any_point_of_the_undo_of_a_reload_leaves_the_old() {
    kill_at_every_point(true);
}
