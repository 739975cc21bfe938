//! Kills of the kernel for memory, made by a real memory limit on the cgroup of an engine.
#![allow(clippy::print_stderr, reason = "a test that is skipped says why")]
#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use engine_host::{HostOptions, ProcessHost, ShimCommand};
use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass, Generation, ReplicaId, ReplicaKey, ResolvedMask};
use pool_services::Workload;
use pool_services::ports::{Endpoint, EngineHost, EngineRecord, Phase, PreparedEngine, RunningEngine};

const LIMIT: Duration = Duration::from_secs(60);

fn testbin() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/engine_host_testbin")
}

/// The file that limits the memory of this process's own cgroup, made by the host for it alone.
fn limit_of(pid: u32) -> Option<PathBuf> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let files = cgroups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        match controllers {
            "memory" => Some(format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
            "" => Some(format!("/sys/fs/cgroup{path}/memory.max")),
            _ => None,
        }
    });
    files.filter(|f| f.contains("/pool-managerd-")).map(PathBuf::from).find(|f| f.exists())
}

#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
fn skipped() {
    eprintln!("skipped: no cgroup of this machine counts the memory of an engine alone");
}

/// Launches a shell that runs `then` once its memory is limited, and tells how it ended; nothing where memory cannot be
/// limited here.
async fn end_of(then: &str) -> Option<Failure> {
    end_seen_by(then, Seen::ItsDaemon).await
}

/// Who sees the end.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    ItsDaemon,
    /// It took the engine over before.
    TheNext,
    /// It was not there yet.
    NextAfterwards,
}

async fn end_seen_by(then: &str, seen: Seen) -> Option<Failure> {
    let dir = tempfile::tempdir().unwrap();
    let daemon = || {
        ProcessHost::new(HostOptions {
            runtime_dir: dir.path().join("run"),
            shim: ShimCommand { program: testbin(), args: vec!["engine-shim".into()] },
            log_max_bytes: 1 << 20,
            cgroup: true,
            lock_dir: dir.path().join("locks"),
            outlive: seen != Seen::ItsDaemon,
        })
    };
    let host = daemon();
    let gate = dir.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let grow = "grow() { x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done; }";
    let engine = PreparedEngine {
        entry: Some("/bin/sh".into()),
        args: vec!["-c".into(), format!("{grow}; read _ < \"$0\"; {then}"), gate.to_str().unwrap().into()],
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        endpoint: Endpoint {
            addr: "127.0.0.1:1".parse().unwrap(),
            kind: "stub".into(),
            model: "m".into(),
            model_path: None,
            workload: Workload::Generate,
            api_key: None,
        },
        confinement: Default::default(),
        engine_version: String::new(),
    };
    let record = EngineRecord {
        key: ReplicaKey { pool: "chat".parse().unwrap(), replica: ReplicaId(0) },
        generation: Generation(1),
        nonce: host.nonce(),
        fingerprint: String::new(),
        endpoint: engine.endpoint.clone(),
        engine_version: String::new(),
        devices: ResolvedMask::default(),
        bytes: Vec::new(),
        unlisted: None,
        executable: None,
        phase: Phase::Starting,
    };
    let running: Arc<dyn RunningEngine> = host.launch(&record, &engine).await.unwrap();
    let limit = limit_of(running.pid().unwrap());
    let next = daemon();
    let adopt = async || {
        let found = next.adopt(&record).await.unwrap();
        next.end_unknown(std::slice::from_ref(&record), &[]).await;
        found
    };
    let mut judge = if seen == Seen::TheNext { adopt().await } else { Arc::clone(&running) };
    match &limit {
        Some(limit) => {
            fs::write(limit, (64 << 20).to_string()).unwrap();
            fs::write(&gate, "go\n").unwrap();
        }
        None => {
            skipped();
            running.kill();
        }
    }
    if seen == Seen::NextAfterwards {
        // The first daemon sees it too, so it has ended.
        tokio::time::timeout(LIMIT, running.exited()).await.unwrap();
        judge = adopt().await;
    }
    let failure = tokio::time::timeout(LIMIT, judge.exited()).await.unwrap();
    running.kill();
    tokio::time::timeout(LIMIT, running.gone()).await.unwrap();
    let limit = limit?;
    assert!(!limit.exists(), "its cgroup is left");
    Some(failure)
}

#[tokio::test]
async fn an_engine_that_the_kernel_killed_for_memory_ran_out_of_host_memory() {
    if let Some(failure) = end_of("grow").await {
        assert_eq!(failure.class, FailureClass::HostOom, "{failure}");
    }
}

#[tokio::test]
async fn so_did_one_that_gave_up_because_a_part_of_it_was_killed_so() {
    if let Some(failure) = end_of("(grow); exit 3").await {
        assert_eq!(failure.class, FailureClass::HostOom, "{failure}");
        assert!(failure.detail.contains("exit status 3"), "{failure}");
    }
}

#[tokio::test]
async fn a_sigkill_of_somebody_is_a_crash() {
    if let Some(failure) = end_of("kill -KILL $$").await {
        assert_eq!(failure.class, FailureClass::Crash(Exit::Signal(9)), "{failure}");
    }
}

#[tokio::test]
async fn a_daemon_that_took_the_engine_over_knows_it_as_well() {
    for seen in [Seen::TheNext, Seen::NextAfterwards] {
        // What is left holds its cgroup, and the count in it, until it is killed.
        if let Some(failure) = end_seen_by("sleep 1000 & grow", seen).await {
            assert_eq!(failure.class, FailureClass::HostOom, "{failure}");
        }
    }
}
