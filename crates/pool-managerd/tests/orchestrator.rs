//! The orchestrator of the example, on pools of its own process and on those of the real daemon: the same code does the same.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

#[allow(dead_code, reason = "its command line is not used here")]
#[path = "../examples/embedded_orchestrator.rs"]
mod example;

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use example::{Done, Job, Orchestrator, declare, embedded, place};
use pool_api::client::HttpControl;
use pool_domain::{Generation, ReplicaId};
use pool_services::{LeaseRequest, PoolControl, PoolSnapshot, ReplicaSnapshot};
use support::{Daemon, Engines, alive, engine_ports};

const POOL: &str = r#"{
    "id": "jobs", "model": "stub:jobs", "engine": "stub", "replicas": 2, "slots": 2,
    "vram": "4 GiB", "args": ["--vram", "3 GiB"]
}"#;

/// Each engine ends at its third request, the one that proves it included.
const FRAIL: &str = r#"{
    "id": "jobs", "model": "stub:jobs", "engine": "stub", "slots": 1, "args": ["--crash-on-request", "3"],
    "backoff": { "initial": "10ms", "max": "20ms" }, "breaker": { "early_crashes": 100 }, "health": { "canary": false }
}"#;

const DEADLINE: Duration = Duration::from_secs(10);

fn jobs(n: u32) -> Vec<Job> {
    (0..n).map(|i| Job { id: format!("j{i}"), session: format!("s{}", i % 3), prompt: format!("Job {i}") }).collect()
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

async fn orchestrator(control: Arc<dyn PoolControl>, pool: &str) -> Orchestrator {
    let pool = declare(&*control, pool).await.unwrap();
    Orchestrator { control, pool }
}

fn all_answered(done: &[Done], n: usize) {
    assert_eq!(done.iter().map(|d| d.job.id.as_str()).collect::<BTreeSet<_>>().len(), n);
    assert!(done.iter().all(|d| d.replica.is_some() && d.answer.as_ref().is_ok_and(|a| !a.is_empty())), "{done:#?}");
}

/// What has to be so wherever the pools are.
async fn works(control: Arc<dyn PoolControl>) {
    let orchestrator = orchestrator(Arc::clone(&control), POOL).await;
    let before = control.pool(&orchestrator.pool).await.unwrap();
    assert_eq!(before.ready_replicas(), 2);

    // A place that has no room is not taken, also if the session is at home there.
    let session: Vec<Job> = (0..4).map(|i| Job { id: format!("a{i}"), ..jobs(1)[0].clone() }).collect();
    let done = orchestrator.run(session[..1].to_vec()).await;
    all_answered(&done, 1);
    let home = done[0].replica.unwrap();
    let wish = || LeaseRequest { prefer: Some(home), ..LeaseRequest::default() };
    let both = [
        control.lease(&orchestrator.pool, wish()).await.unwrap(),
        control.lease(&orchestrator.pool, wish()).await.unwrap(),
    ];
    assert!(both.iter().all(|lease| lease.replica_id == home), "{both:?}");
    let done = orchestrator.run(session).await;
    all_answered(&done, 4);
    assert!(done.iter().all(|d| d.replica != Some(home)), "no room there: {done:#?}");
    for lease in both {
        control.release(&lease.id).await.unwrap();
    }

    // More than there are slots: every one is done, nobody is forgotten, and every slot comes back.
    let done = orchestrator.run(jobs(20)).await;
    all_answered(&done, 20);
    assert_eq!(control.leases().await, Ok(Vec::new()));

    // Also from those who never give back: a drain ends that.
    let held = control.lease(&orchestrator.pool, LeaseRequest::default()).await.unwrap();
    assert_eq!(orchestrator.shutdown(Duration::from_millis(200)).await, Ok(Vec::new()));
    let rests = control.pool(&orchestrator.pool).await.unwrap();
    assert!(rests.hold && !rests.live(), "{rests:#?}");
    assert!(before.replicas.iter().filter_map(|r| r.pid).all(|pid| !alive(pid)), "engines are left");
    assert!(control.renew(&held.id, None).await.is_err());
    let refused = orchestrator.run(jobs(1)).await;
    assert!(refused[0].answer.as_ref().is_err_and(|why| why.contains("drained")), "{refused:?}");
}

#[test]
fn it_works_in_process() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_pool-managerd").into();
    block_on(async {
        let manager = embedded(dir.path(), program, &engine_ports()).await.unwrap();
        works(Arc::new(manager.clone())).await;
        assert!(manager.shutdown(DEADLINE).await);
    });
}

#[test]
fn it_works_over_http() {
    let daemon = Daemon::start("");
    support::eventually(|| (daemon.get("/v1/pools").status == 200).then_some(()));
    let engines = Engines::of(&daemon);
    let control = HttpControl::new(&format!("http://{}", daemon.addr())).unwrap();
    block_on(works(Arc::new(control)));
    assert_eq!(daemon.stop(), Some(0));
    assert!(engines.running().is_empty());
}

#[test]
fn jobs_whose_engine_dies_are_done_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_pool-managerd").into();
    block_on(async {
        let manager = embedded(dir.path(), program, &engine_ports()).await.unwrap();
        let orchestrator = orchestrator(Arc::new(manager.clone()), FRAIL).await;
        all_answered(&orchestrator.run(jobs(3)).await, 3);
        let pool = manager.pool(&orchestrator.pool).await.unwrap();
        assert!(pool.replicas[0].restart_count >= 2, "{pool:#?}");
        assert!(manager.shutdown(DEADLINE).await);
    });
}

/// Two replicas with this many of their two slots taken.
fn picture(taken: [u32; 2], second_ready: bool) -> PoolSnapshot {
    let replica = |n: u16, active_leases, ready| ReplicaSnapshot {
        id: ReplicaId(n),
        generation: Generation(1),
        state: if ready { "ready" } else { "starting" },
        reason_code: "",
        reason: String::new(),
        live: true,
        ready,
        draining: false,
        endpoint: None,
        pid: None,
        device_mask: String::new(),
        engine_version: String::new(),
        slots_total: 2,
        active_leases,
        restart_count: 0,
        breaker: "closed",
        backoff_failures: 0,
        next_start_in_ms: None,
        proof: "",
        first_unit_ms: None,
        last_error: None,
        consecutive_failures: 0,
        last_check_at: None,
        vram_reserved: 0,
        context: None,
        staging: None,
    };
    PoolSnapshot {
        pool_id: "jobs".parse().unwrap(),
        guards: pool_services::GuardCounts::default(),
        snapshot: 1,
        revision: 1,
        source: "api",
        engine: "stub".into(),
        model: "stub:jobs".into(),
        model_id: "jobs".into(),
        aliases: Vec::new(),
        workload: "generate",
        hold: false,
        leases_waiting: 0,
        replicas: vec![replica(0, taken[0], true), replica(1, taken[1], second_ready)],
    }
}

#[test]
fn a_job_goes_home_or_to_the_replica_with_the_least_to_do() {
    let (r0, r1) = (Some(ReplicaId(0)), Some(ReplicaId(1)));
    assert_eq!(place(&picture([0, 0], true), None), r0);
    assert_eq!(place(&picture([1, 0], true), None), r1);
    assert_eq!(place(&picture([0, 1], true), r1), r1, "its session is at home there");
    assert_eq!(place(&picture([0, 2], true), r1), r0, "home is full");
    assert_eq!(place(&picture([1, 0], false), r1), r0, "home is not ready");
    assert_eq!(place(&picture([2, 2], true), r0), None);
}
