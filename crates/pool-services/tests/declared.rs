//! Pools that come and go while the daemon runs, and what a daemon that is killed in between leaves.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::{Generation, PoolId, ReplicaId, ReplicaKey};
use pool_services::control::ReloadRequest;
use pool_services::ports::StateLedger;
use pool_services::{
    Activation, ControlError, Declared, OperationState, PoolControl, PoolManager, PoolSnapshot, PoolSpec, Restored,
    Source,
};
use pool_testkit::{FakeNode, spec, until};

const LONG: Duration = Duration::from_secs(36_000);

fn id(text: &str) -> PoolId {
    text.parse().unwrap()
}

fn over_api(spec: PoolSpec) -> Declared {
    Declared { document: format!("{{\"id\":\"{}\"}}", spec.id), spec, source: Source::Api }
}

fn of_file(spec: PoolSpec, digest: &str) -> Declared {
    Declared { document: "{}".into(), spec, source: Source::File { digest: digest.into() } }
}

/// What the next daemon would find stored.
async fn after_a_restart(node: &FakeNode) -> Vec<Restored> {
    let stored = node.ledger.stored_pools().await;
    let restored = |p: pool_services::ports::StoredPool| Restored {
        declared: Declared { document: p.document, ..over_api(spec(p.pool.as_str())) },
        revision: p.revision,
        previous: None,
        probation: None,
        stored: true,
    };
    stored.into_iter().map(restored).collect()
}

async fn conflict(m: &PoolManager, declared: Declared, if_match: Option<u64>) -> String {
    match m.declare(declared, if_match).await {
        Err(ControlError::Conflict(why)) => why,
        other => panic!("no conflict: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_pool_of_the_api_is_written_down_serves_and_is_gone_without_a_trace() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(vec![spec("other")]).await;
    let other = until(&m, &id("other"), PoolSnapshot::ready).await;
    let begun = m.declare(over_api(spec("chat")), None).await.unwrap();
    assert_eq!((begun.verb.as_str(), &begun.state), ("declare", &OperationState::Running));
    let stored = node.ledger.stored_pools().await;
    assert_eq!((stored[0].pool.as_str(), stored[0].revision, &stored[0].file_digest), ("chat", 1, &None));
    let done = m.wait_operation(&begun.id, LONG).await.unwrap();
    assert_eq!(done.state, OperationState::Succeeded("ready".into()));
    let pool = m.pool(&id("chat")).await.unwrap();
    assert_eq!((pool.source, pool.revision), ("api", 1));
    assert_eq!(m.document(&id("chat")).await, Ok((1, "{\"id\":\"chat\"}".into())));
    m.stop(&id("chat")).await.unwrap();
    assert!(node.ledger.held(&id("chat")).await);

    let begun = m.remove(&id("chat"), Some(1)).await.unwrap();
    let again = m.remove(&id("chat"), None).await;
    assert!(again.is_ok_and(|o| o.id == begun.id) || m.pool(&id("chat")).await.is_err(), "asking twice is asking once");
    let gone = m.wait_operation(&begun.id, LONG).await.unwrap();
    assert_eq!((gone.verb.as_str(), &gone.state), ("remove", &OperationState::Succeeded("removed".into())));
    assert_eq!(m.pool(&id("chat")).await, Err(ControlError::PoolNotFound("chat".into())));
    assert_eq!(m.operation(&begun.id).await.unwrap(), gone);
    assert_eq!(node.ledger.stored_pools().await, []);
    assert!(!node.ledger.held(&id("chat")).await);
    let key = ReplicaKey { pool: id("chat"), replica: ReplicaId(0) };
    assert_eq!(node.ledger.last_generation(&key).await, Generation(1), "none is used twice");

    // A later one of that name begins anew, with generations and operations of its own.
    let later = m.declare(over_api(spec("chat")), None).await.unwrap();
    assert_ne!(later.id, done.id);
    let pool = until(&m, &id("chat"), PoolSnapshot::ready).await;
    assert_eq!((pool.replicas[0].generation, pool.hold), (Generation(2), false));
    assert_eq!(m.pool(&id("other")).await.unwrap().replicas[0].pid, other.replicas[0].pid);
    assert!(m.shutdown(LONG).await);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_refuses_starts_nothing_and_a_removal_waits_for_it() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(Vec::new()).await;
    node.ledger.set_broken(true);
    let refused = m.declare(over_api(spec("chat")), None).await;
    assert!(
        matches!(&refused, Err(ControlError::Unreachable(why)) if why.contains("nothing was changed")),
        "{refused:?}"
    );
    assert_eq!((m.pools().await.unwrap(), node.engines.launches().len()), (Vec::new(), 0));
    node.ledger.set_broken(false);
    m.declare(over_api(spec("chat")), None).await.unwrap();
    until(&m, &id("chat"), PoolSnapshot::ready).await;
    node.ledger.set_broken(true);
    let begun = m.remove(&id("chat"), None).await.unwrap();
    let still = m.wait_operation(&begun.id, Duration::from_secs(120)).await.unwrap();
    assert_eq!(still.state, OperationState::Running, "the pool would be back after a restart");
    assert!(node.engines.running().is_empty());
    node.ledger.set_broken(false);
    let gone = m.wait_operation(&begun.id, Duration::from_secs(10)).await.unwrap();
    assert_eq!(gone.state, OperationState::Succeeded("removed".into()));
    assert_eq!(node.ledger.stored_pools().await, []);
}

/// Runs a life of a daemon that is killed: nothing of it goes on.
fn killed<T>(life: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(life)
}

#[test]
fn a_kill_while_a_pool_is_declared_leaves_none_or_all_of_it() {
    let mut seen = [0, 0];
    for kill_at in (0..=400).step_by(50) {
        let node = FakeNode::default();
        killed(async {
            let (m, _events) = node.manage(Vec::new()).await;
            node.ledger.set_slow(Duration::from_millis(100));
            let declared = m.declare(over_api(PoolSpec { activation: Activation::OnDemand, ..spec("chat") }), None);
            let answered = tokio::time::timeout(Duration::from_millis(kill_at), declared).await;
            let stored = !node.ledger.stored_pools().await.is_empty();
            assert!(
                stored || m.pools().await.unwrap().is_empty(),
                "{kill_at}: it was there before it was written down"
            );
            assert!(stored || answered.is_err(), "{kill_at}: it was promised and is not kept");
        });
        node.ledger.set_slow(Duration::ZERO);
        killed(async {
            let pools = after_a_restart(&node).await;
            seen[pools.len()] += 1;
            let (m, _events) = node.manage_declared(pools.clone(), Duration::ZERO).await;
            assert_eq!(m.pools().await.unwrap().len(), pools.len());
        });
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[test]
fn a_kill_while_a_pool_is_removed_leaves_all_of_it_or_none() {
    let mut seen = [0, 0];
    for kill_at in (0..=600).step_by(50) {
        let node = FakeNode::default();
        killed(async {
            let (m, _events) = node.manage(Vec::new()).await;
            m.declare(over_api(PoolSpec { activation: Activation::OnDemand, ..spec("chat") }), None).await.unwrap();
            node.ledger.set_slow(Duration::from_millis(100));
            let begun = m.remove(&id("chat"), None).await.unwrap();
            let told = m.wait_operation(&begun.id, Duration::from_millis(kill_at)).await.unwrap();
            let stored = !node.ledger.stored_pools().await.is_empty();
            assert!(!stored || told.state == OperationState::Running, "{kill_at}: it was said to be gone");
            assert!(!stored || m.pools().await.unwrap().len() == 1, "{kill_at}: it was missed before it was gone");
        });
        node.ledger.set_slow(Duration::ZERO);
        killed(async {
            let pools = after_a_restart(&node).await;
            seen[pools.len()] += 1;
            let (m, _events) = node.manage_declared(pools.clone(), Duration::ZERO).await;
            assert_eq!(m.pools().await.unwrap().len(), pools.len());
        });
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn whoever_declared_a_pool_changes_it() {
    let node = FakeNode::default();
    let file = Restored::from(of_file(spec("filed"), "d1"));
    let (m, _events) = node.manage_declared(vec![file], Duration::ZERO).await;
    until(&m, &id("filed"), PoolSnapshot::ready).await;
    m.declare(over_api(spec("free")), None).await.unwrap();
    let before = until(&m, &id("free"), PoolSnapshot::ready).await;
    let in_file = Err(ControlError::PoolInFile("filed".into()));
    assert_eq!(m.declare(over_api(spec("filed")), None).await, in_file);
    assert_eq!(m.remove(&id("filed"), None).await, in_file);
    assert!(matches!(m.retire(&id("free")).await, Err(ControlError::Conflict(_))));
    assert!(conflict(&m, of_file(spec("free"), "d1"), None).await.contains("over the API"));
    // Revisions.
    assert!(conflict(&m, over_api(spec("free")), Some(7)).await.contains("revision 1, not 7"));
    assert!(conflict(&m, over_api(spec("new")), Some(1)).await.contains("no pool `new`"));
    assert!(matches!(m.remove(&id("free"), Some(7)).await, Err(ControlError::Conflict(_))));
    let stale = ReloadRequest { if_match: Some(7), ..ReloadRequest::default() };
    assert!(matches!(m.reload(&id("free"), stale).await, Err(ControlError::Conflict(_))));
    assert!(matches!(m.rollback(&id("free")).await, Err(ControlError::Conflict(_))), "there is nothing before");
    assert_eq!(m.pool(&id("free")).await.unwrap(), before, "nothing was done");
    // The file may take its own back.
    let begun = m.retire(&id("filed")).await.unwrap();
    m.wait_operation(&begun.id, LONG).await.unwrap();
    assert!(m.pool(&id("filed")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_name_means_one_pool() {
    let node = FakeNode::default();
    let alias = |pool: &str, alias: &str| PoolSpec { aliases: vec![alias.into()], ..spec(pool) };
    let (m, _events) = node.manage(vec![alias("chat", "gpt")]).await;
    let launched = node.engines.launches().len();
    assert!(conflict(&m, over_api(spec("gpt")), None).await.contains("`gpt`"));
    assert!(conflict(&m, over_api(alias("more", "chat")), None).await.contains("`chat`"));
    assert_eq!((node.engines.launches().len(), node.ledger.stored_pools().await), (launched, Vec::new()));
    // One alias may be of several pools: whoever asks for it gets one of them.
    m.declare(over_api(alias("more", "gpt")), None).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_can_never_fit_is_refused_before_anything_is_done() {
    let node = FakeNode::default();
    let (m, _events) = node.manage(Vec::new()).await;
    let refused = |what: Result<_, ControlError>| match what {
        Err(ControlError::Refused { code, .. }) => code,
        other => panic!("not refused: {other:?}"),
    };
    let large = PoolSpec { vram: Some(100 << 30), ..spec("large") };
    assert_eq!(refused(m.declare(over_api(large), None).await), "DOES_NOT_FIT");
    let nowhere = PoolSpec { devices: vec!["9".parse().unwrap()], ..spec("nowhere") };
    assert_eq!(refused(m.declare(over_api(nowhere), None).await), "MASK_INVALID");
    let second = ["0", "1"].map(|mask| mask.parse().unwrap()).to_vec();
    let second = PoolSpec { devices: second, replicas: 2, vram: Some(20 << 30), ..spec("second") };
    assert_eq!(refused(m.declare(over_api(second), None).await), "DOES_NOT_FIT", "the second device is too small");
    assert_eq!((m.pools().await.unwrap(), node.ledger.stored_pools().await), (Vec::new(), Vec::new()));
}
