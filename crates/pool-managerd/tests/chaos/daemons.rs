//! A daemon that is hurried, starved, or not alone.

use std::net::TcpStream;
use std::{fs, thread};

use crate::checker::Checker;
use crate::node::{QUICK, generation, parent, pid, place, pool, ready, start_blindly};
use crate::support::{Daemon, Engines, alive, binary, eventually, signal};

#[test]
fn a_thousand_sigterms_are_one_orderly_stop_and_one_term_for_the_engine() {
    let dir = place(&pool("one", &["--ignore-sigterm"], ""));
    let mut daemon = Daemon::start_in_place(dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    ready(&daemon, "one");
    engines.starts();
    let log = daemon.dir().join("state/run/one-r0/1/engine.log");
    let storm = format!("for n in {{1..1000}}; do kill -TERM {} 2>/dev/null || exit 0; done", daemon.pid());
    let mut storm = std::process::Command::new("bash").args(["-c", &storm]).spawn().unwrap();
    assert_eq!(daemon.wait(), Some(0));
    storm.wait().unwrap();
    let heard = fs::read_to_string(log).unwrap().matches("SIGTERM is ignored").count();
    assert_eq!(heard, 1);
    let dir = daemon.into_dir();
    checker.nothing_is_left(dir.path());
}

#[test]
fn of_fifty_daemons_at_once_one_runs_and_the_others_end_with_75() {
    let dir = place(&pool("one", &[], ""));
    let mut all: Vec<_> = (0..50).map(|_| start_blindly(dir.path())).collect();
    let checker = Checker::of(dir.path());
    let mut codes = Vec::new();
    eventually(|| {
        all.retain_mut(|daemon| match daemon.try_wait().unwrap() {
            Some(status) => {
                codes.push(status.code());
                false
            }
            None => true,
        });
        (all.len() == 1).then_some(())
    });
    assert_eq!(codes, vec![Some(75); 49]);
    let shims = eventually(|| Some(crate::checker::starts(&dir.path().join("state/run"))).filter(|s| !s.is_empty()));
    assert_eq!(shims.len(), 1, "{shims:?}");
    let mut one = all.pop().unwrap();
    signal(one.id(), "TERM");
    assert_eq!(one.wait().unwrap().code(), Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn without_descriptors_the_daemon_keeps_its_engines_and_serves_again_when_there_are_some() {
    let daemon = Daemon::start_in_place(place(&pool("one", &[], QUICK)));
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = pid(&ready(&daemon, "one"));
    // The soft limit alone: it can be raised again by anybody.
    let limit = |descriptors: usize| {
        let (of, most) = (daemon.pid().to_string(), format!("--nofile={descriptors}:"));
        assert!(std::process::Command::new("prlimit").args(["--pid", &of, &most]).status().unwrap().success());
    };
    limit(1);
    assert!(alive(before));
    // Its end is seen all the same, and a start has to wait for descriptors.
    signal(before, "KILL");
    eventually(|| (!alive(before)).then_some(()));
    limit(1024);
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert_eq!(daemon.get("/livez").status, 200);
    assert_eq!(engines.running(), [pid(&after)]);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn connections_take_no_descriptors_that_the_daemon_needs_for_its_engines() {
    let dir = place(&pool("one", &[], QUICK));
    let mut starved = std::process::Command::new("prlimit");
    starved.env("XDG_RUNTIME_DIR", concat!(env!("CARGO_TARGET_TMPDIR"), "/runtime"));
    starved.args(["--nofile=64:64", "--"]).arg(binary().get_program());
    let daemon = Daemon::start_as(starved, dir);
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = pid(&ready(&daemon, "one"));
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let rest = descriptors();
    let taken: Vec<_> = (0..100).map(|_| TcpStream::connect(daemon.addr()).unwrap()).collect();
    // However many come, some descriptors are kept for the work.
    eventually(|| (descriptors() >= rest + 15).then_some(()));
    assert!(descriptors() < 64 && alive(before), "{}", descriptors());
    // With what is left its end is seen, and another one is started, while nobody gets through to the API.
    signal(before, "KILL");
    eventually(|| engines.running().iter().any(|pid| *pid != before).then_some(()));
    drop(taken);
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert_eq!(daemon.get("/livez").status, 200);
    assert_eq!(engines.running(), [pid(&after)]);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn a_killed_shim_takes_its_engine_along_and_is_replaced() {
    let daemon = Daemon::start_in_place(place(&pool("one", &["--fork-children", "2", "--double-fork"], QUICK)));
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    let before = pid(&ready(&daemon, "one"));
    signal(parent(before), "KILL");
    let after = daemon.until("one", |p| generation(p) > 1 && p["ready"] == true);
    assert!(!alive(before), "{after:#}");
    assert_eq!(engines.running(), [pid(&after)]);
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}

#[test]
fn a_daemon_with_damaged_files_has_each_engine_once() {
    // (file, how it is damaged): both copies of the ledger, the record of the engine, in parts and by bits.
    let files =
        [["ledger/one.json"].as_slice(), &["ledger/one.json", "ledger/one.json.copy"], &["engines/one-r0.json"]];
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 3] = [
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.clear(),
        |bytes| {
            let at = bytes.windows(10).position(|w| w == b"generation").unwrap() + 13;
            bytes[at] ^= 2;
        },
    ];
    thread::scope(|scope| {
        for files in files {
            scope.spawn(move || damages.iter().for_each(|damage| damaged(files, *damage)));
        }
    });
}

fn damaged(files: &[&str], damage: fn(&mut Vec<u8>)) {
    let daemon = Daemon::start_in_place(place(&pool("one", &[], QUICK)));
    let (engines, checker) = (Engines::of(&daemon), Checker::of(daemon.dir()));
    ready(&daemon, "one");
    let record = daemon.dir().join("state/engines/one-r0.json");
    eventually(|| fs::read_to_string(&record).is_ok_and(|r| r.contains("\"ready\"")).then_some(()));
    let dir = daemon.kill(&engines);
    for file in files {
        let path = dir.path().join("state").join(file);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    let daemon = Daemon::start_in_place(dir);
    let after = daemon.until("one", |p| p["ready"] == true);
    eventually(|| (engines.running() == [pid(&after)]).then_some(()));
    let (code, dir) = daemon.end(&engines);
    assert_eq!(code, Some(0));
    checker.nothing_is_left(dir.path());
}
