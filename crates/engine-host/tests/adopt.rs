//! Engines of a daemon that is no more: found, told from strangers, ended where they are provably ours.
#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine_host::{HostOptions, HttpProbe, ProcessHost, ShimCommand};
use pool_domain::failure::Exit;
use pool_domain::{FailureClass, Generation, ReplicaId, ReplicaKey, ResolvedMask};
use pool_services::Workload;
use pool_services::ports::{
    Endpoint, EngineHost, EngineProbe, EngineRecord, Listener, NotAdopted, Phase, PreparedEngine, RunningEngine, Up,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}

fn testbin() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples/engine_host_testbin")
}

/// A machine on which daemons come and go.
struct Machine {
    dir: TempDir,
    cgroup: bool,
    launched: Vec<Arc<dyn RunningEngine>>,
}

impl Machine {
    fn new(cgroup: bool) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), cgroup, launched: Vec::new() }
    }

    /// A daemon that knows nothing of those before it. Dropping it leaves its engines alone.
    fn daemon(&self) -> ProcessHost {
        ProcessHost::new(HostOptions {
            runtime_dir: self.dir.path().join("state/run"),
            shim: ShimCommand { program: testbin(), args: vec!["engine-shim".into()] },
            log_max_bytes: 1 << 20,
            cgroup: self.cgroup,
            lock_dir: self.dir.path().join("locks"),
            outlive: true,
        })
    }

    fn record(host: &ProcessHost, generation: u64, addr: SocketAddr) -> EngineRecord {
        EngineRecord {
            key: ReplicaKey { pool: "chat".parse().unwrap(), replica: ReplicaId(0) },
            generation: Generation(generation),
            nonce: host.nonce(),
            fingerprint: String::new(),
            endpoint: Endpoint {
                addr,
                kind: "stub".into(),
                model: "tiny".into(),
                model_path: None,
                workload: Workload::Generate,
                api_key: None,
            },
            engine_version: "1".into(),
            devices: ResolvedMask { uuids: vec!["GPU-a".into()] },
            bytes: vec![1],
            unlisted: None,
            executable: None,
            phase: Phase::Starting,
        }
    }

    async fn launch(&mut self, host: &ProcessHost, record: &EngineRecord, args: &[&str]) -> Arc<dyn RunningEngine> {
        let addr = record.endpoint.addr;
        let mut all: Vec<String> = ["stub-engine", "--alias", "tiny", "--host"].map(str::to_owned).into();
        all.extend([addr.ip().to_string(), "--port".into(), addr.port().to_string()]);
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        let engine = PreparedEngine {
            entry: Some(testbin()),
            args: all,
            env: Vec::new(),
            endpoint: record.endpoint.clone(),
            confinement: Default::default(),
            engine_version: "1".into(),
        };
        let running = in_time(host.launch(record, &engine)).await.unwrap();
        self.launched.push(Arc::clone(&running));
        running
    }

    /// A daemon starts an engine; the engine serves.
    async fn one_engine(&mut self, args: &[&str]) -> (EngineRecord, Arc<dyn RunningEngine>) {
        let host = self.daemon();
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut record = Self::record(&host, 1, addr);
        let engine = self.launch(&host, &record, args).await;
        serving(&record.endpoint).await;
        record.executable = engine.executable();
        (record, engine)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.launched.iter().for_each(|engine| engine.kill());
    }
}

async fn serving(endpoint: &Endpoint) {
    in_time(async {
        while HttpProbe::new().up(endpoint).await != Up::Serving {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
}

fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn parent(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
}

async fn adopted_as_launched(cgroup: bool) {
    let mut machine = Machine::new(cgroup);
    let (record, first) = machine.one_engine(&["--fork-children", "1"]).await;
    let host = machine.daemon();
    let found = in_time(host.adopt(&record)).await.unwrap();
    assert_eq!((found.pid(), found.executable()), (first.pid(), record.executable.clone()));
    assert_eq!(found.pids(), first.pids());
    assert_eq!(found.listener(record.endpoint.addr), Listener::Own);
    HttpProbe::new().work(&record.endpoint).await.unwrap();

    // No second one beside it, whoever tries.
    let second = Machine::record(&host, 2, record.endpoint.addr);
    let engine = PreparedEngine {
        entry: Some(testbin()),
        args: Vec::new(),
        env: Vec::new(),
        endpoint: second.endpoint.clone(),
        confinement: Default::default(),
        engine_version: "1".into(),
    };
    let refused = in_time(host.launch(&second, &engine)).await.unwrap_err();
    assert!(refused.detail.contains("lock"), "{refused}");
    assert!(!host.device_clear("GPU-a") && host.device_clear("GPU-b"));
    assert!(in_time(host.end_unknown(std::slice::from_ref(&record), &["GPU-a".into()])).await.is_empty());
    assert!(runs(found.pid().unwrap()), "what is on record is left alone");

    let pids = found.pids();
    found.terminate();
    assert_eq!(in_time(found.exited()).await.class, FailureClass::Crash(Exit::Code(0)));
    found.kill();
    in_time(found.gone()).await;
    assert!(!pids.into_iter().any(runs));
    in_time(async {
        while !host.device_clear("GPU-a") {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    machine.launch(&host, &second, &[]).await;
    serving(&second.endpoint).await;
}

#[tokio::test]
async fn an_engine_is_adopted_as_it_was_launched_with_cgroups() {
    adopted_as_launched(true).await;
}

#[tokio::test]
async fn an_engine_is_adopted_as_it_was_launched_by_parentage() {
    adopted_as_launched(false).await;
}

#[tokio::test]
async fn an_exit_that_no_daemon_saw_is_known_as_it_was() {
    let mut machine = Machine::new(true);
    let (record, first) = machine.one_engine(&["--crash-on-request", "1", "--exit-code", "7"]).await;
    let _cut_off = HttpProbe::new().work(&record.endpoint).await;
    in_time(first.gone()).await;
    let found = in_time(machine.daemon().adopt(&record)).await.unwrap();
    assert_eq!(in_time(found.exited()).await.class, FailureClass::Crash(Exit::Code(7)));
    in_time(found.gone()).await;
    found.kill();
}

#[tokio::test]
async fn an_adopted_engine_that_crashes_is_seen() {
    let mut machine = Machine::new(true);
    let (record, _first) = machine.one_engine(&[]).await;
    let found = in_time(machine.daemon().adopt(&record)).await.unwrap();
    kill(found.pid().unwrap());
    assert_eq!(in_time(found.exited()).await.class, FailureClass::Crash(Exit::Signal(9)));
    in_time(found.gone()).await;
}

async fn refused(machine: &Machine, record: &EngineRecord) -> NotAdopted {
    in_time(machine.daemon().adopt(record)).await.expect_err("it does not match")
}

#[tokio::test]
async fn every_mismatch_is_refused_and_without_a_cgroup_of_its_own_nobody_is_signalled() {
    let mut machine = Machine::new(false);
    let (record, first) = machine.one_engine(&[]).await;
    let pid = first.pid().unwrap();
    let start = machine.dir.path().join("state/run/chat-r0/1/start.json");
    let text = fs::read_to_string(&start).unwrap();

    let wrong_nonce = EngineRecord { nonce: "another".into(), ..record.clone() };
    let NotAdopted { why, rest } = refused(&machine, &wrong_nonce).await;
    assert!(why.detail.contains("nonce"), "{why}");
    rest.unwrap().kill();
    // Who has the pid now is somebody else, who started long before: init.
    let edit = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = serde_json::from_str(&text).unwrap();
        change(&mut json);
        fs::write(&start, json.to_string()).unwrap();
    };
    for field in ["shim_pid", "pid"] {
        edit(&|json| json[field] = 1.into());
        match in_time(machine.daemon().adopt(&record)).await {
            // That its exit nobody knows of is a crash; that it is gone nobody says.
            Ok(lost) => {
                assert_eq!(
                    (field, in_time(lost.exited()).await.class),
                    ("shim_pid", FailureClass::Crash(Exit::Unknown))
                );
                lost.kill();
                assert!(tokio::time::timeout(LOOK_AGAIN, lost.gone()).await.is_err());
            }
            Err(NotAdopted { rest, .. }) => assert!(field == "pid" && rest.is_some()),
        }
    }
    // The machine was started anew: nothing is left, whoever has those pids.
    edit(&|json| json["boot_id"] = "another".into());
    assert!(refused(&machine, &record).await.rest.is_none());
    fs::write(&start, &text).unwrap();
    let never = EngineRecord {
        generation: Generation(9),
        key: ReplicaKey { replica: ReplicaId(9), ..record.key.clone() },
        ..record.clone()
    };
    assert!(refused(&machine, &never).await.rest.is_none(), "what was never started has left nothing");

    // The shim is certain, the program is not what it was: that one may be ended, and is.
    serving(&record.endpoint).await;
    assert!(runs(pid), "nothing so far has touched it");
    let other_program = EngineRecord { executable: Some("0:0".into()), ..record.clone() };
    let rest = refused(&machine, &other_program).await.rest.unwrap();
    rest.kill();
    in_time(first.gone()).await;
}

#[tokio::test]
async fn what_is_not_adopted_is_ended_by_its_own_cgroup() {
    let mut machine = Machine::new(true);
    let (record, first) = machine.one_engine(&["--double-fork"]).await;
    let pids = first.pids();
    let wrong_nonce = EngineRecord { nonce: "another".into(), ..record.clone() };
    let rest = refused(&machine, &wrong_nonce).await.rest.unwrap();
    if !fs::read_to_string(format!("/proc/{}/cgroup", pids[0])).unwrap().contains("/pool-managerd-") {
        return; // No cgroups here.
    }
    rest.kill();
    in_time(rest.gone()).await;
    assert!(!pids.into_iter().any(runs));
}

#[tokio::test]
async fn a_shim_that_died_with_the_daemon_took_the_engine_along() {
    let mut machine = Machine::new(true);
    let (record, first) = machine.one_engine(&["--double-fork"]).await;
    let pids = first.pids();
    kill(parent(first.pid().unwrap()));
    let found = in_time(machine.daemon().adopt(&record)).await.unwrap();
    assert_eq!(in_time(found.exited()).await.class, FailureClass::Crash(Exit::Unknown));
    if fs::read_dir("/sys/fs/cgroup").is_ok() && in_cgroup(&machine, &record) {
        found.kill();
        in_time(found.gone()).await;
        assert!(!pids.into_iter().any(runs));
    } else {
        // Nothing proves that it is gone; but the test must leave nothing behind.
        pids.into_iter().filter(|&pid| runs(pid)).for_each(kill);
    }
}

fn in_cgroup(machine: &Machine, record: &EngineRecord) -> bool {
    let start = machine.dir.path().join(format!("state/run/{}/{}/start.json", record.key, record.generation));
    let json: serde_json::Value = serde_json::from_slice(&fs::read(start).unwrap()).unwrap();
    json["cgroup_procs"].as_array().is_some_and(|procs| !procs.is_empty())
}

#[tokio::test]
async fn with_the_state_directory_gone_the_holder_of_the_lock_is_found_and_ended() {
    let mut machine = Machine::new(true);
    let (record, first) = machine.one_engine(&["--ignore-sigterm"]).await;
    let pids = first.pids();
    fs::remove_dir_all(machine.dir.path().join("state")).unwrap();
    let host = machine.daemon();
    assert!(in_time(host.end_unknown(&[], &["GPU-a".into()])).await.is_empty());
    assert!(!pids.into_iter().any(runs) && host.device_clear("GPU-a"));

    // Without its record the holder is nobody that could be ended, and its device is not clear.
    let second = Machine::record(&host, 1, record.endpoint.addr);
    let engine = machine.launch(&host, &second, &[]).await;
    fs::remove_file(machine.dir.path().join("locks/replica-chat-r0.json")).unwrap();
    let devices = ["GPU-a".to_owned(), "GPU-b".to_owned()];
    assert_eq!(in_time(machine.daemon().end_unknown(&[], &devices)).await, ["GPU-a"]);
    assert!(runs(engine.pid().unwrap()));
}
