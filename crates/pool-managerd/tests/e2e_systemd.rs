//! What a service manager hears, and the unit that is shipped for one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use support::{PATIENCE, binary, write_config};

#[test]
fn a_service_manager_hears_when_it_serves_that_it_goes_round_and_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), "");
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut text = [0; 4096];
        let length = socket.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    let mut daemon = binary()
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(dir.path().join("pool-managerd.toml"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "100000")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let first = hear();
    assert!(first.starts_with("READY=1\n") && first.contains("STATUS=0 pools on 2 devices"), "{first}");
    for _ in 0..3 {
        assert_eq!(hear().trim(), "WATCHDOG=1");
    }
    support::signal(daemon.id(), "TERM");
    let last = std::iter::repeat_with(hear).find(|said| said.trim() != "WATCHDOG=1").unwrap();
    assert!(last.contains("STOPPING=1") && last.contains("EXTEND_TIMEOUT_USEC="), "{last}");
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let unit = include_str!("../../../deploy/systemd/pool-managerd.service");
    for line in [
        "Type=notify",
        "WatchdogSec=30s",
        "Delegate=yes",
        "DelegateSubgroup=supervisor",
        "KillMode=process",
        "LimitNOFILE=65536",
    ] {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    let Ok(found) = Command::new("systemd-analyze").arg("--version").stdout(Stdio::null()).status() else {
        println!("skipped: systemd-analyze is not here");
        return;
    };
    assert!(found.success());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool-managerd.service");
    std::fs::write(&path, unit.replace("/usr/bin/pool-managerd", env!("CARGO_BIN_EXE_pool-managerd"))).unwrap();
    let told = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    let words = String::from_utf8_lossy(&told.stderr).into_owned();
    // Of other units of the machine it may complain, too; and before version 254 it passes over one line of ours.
    let newer = |line: &&str| line.contains("'DelegateSubgroup'");
    let ours = words.lines().filter(|line| !newer(line)).find(|line| line.contains("pool-managerd.service:"));
    assert_eq!(ours, None, "{words}");
}
