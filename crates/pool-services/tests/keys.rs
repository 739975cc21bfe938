//! API keys of engines: who gets them, on paused time.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use pool_domain::{Holder, PoolId};
use pool_services::ports::StateLedger;
use pool_services::{LeaseRequest, PoolControl, PoolSnapshot, Routing};
use pool_testkit::{FakeNode, spec, until};

const LONG: Duration = Duration::from_secs(36_000);

#[tokio::test(start_paused = true)]
async fn whoever_gets_a_slot_gets_the_key_of_the_engine_behind_it_and_lists_do_not_show_it() {
    let node = FakeNode::default();
    node.engines.script(|s| s.keyed = true);
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    let id: PoolId = "chat".parse().unwrap();
    let ready = until(&m, &id, PoolSnapshot::ready).await;
    let lease = m.lease(&id, LeaseRequest::default()).await.unwrap();
    let key = lease.api_key.clone().unwrap();
    assert_eq!(key.reveal(), "key-0");
    let route = m.route(&id, Duration::ZERO, &Holder::default()).await.unwrap();
    assert_eq!(route.api_key.as_ref(), Some(&key));
    assert_eq!(m.follow(&lease.id, &Default::default()).await.unwrap().1.api_key.as_ref(), Some(&key));
    assert_eq!(m.renew(&lease.id, None).await.unwrap().api_key.as_ref(), Some(&key));
    assert_eq!(m.leases().await.unwrap()[0].api_key, None);
    assert_eq!(node.ledger.handoffs()[0].api_key.as_ref(), Some(&key));
    for shown in [format!("{ready:?}"), format!("{lease:?}"), format!("{route:?}")] {
        assert!(!shown.contains("key-0"), "{shown}");
    }
    drop(route);

    node.engines.crash_all();
    until(&m, &id, |p| p.ready() && p.replicas[0].restart_count == 1).await;
    let next = m.lease(&id, LeaseRequest::default()).await.unwrap();
    assert_eq!(next.api_key.unwrap().reveal(), "key-1", "each engine has its own");

    // A later daemon finds it on record.
    assert!(m.leave(LONG).await);
    assert_eq!(node.ledger.recorded().await[0].endpoint.api_key.as_ref().unwrap().reveal(), "key-1");
    let (m, _events) = node.manage(vec![spec("chat")]).await;
    until(&m, &id, PoolSnapshot::ready).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(m.lease(&id, LeaseRequest::default()).await.unwrap().api_key.unwrap().reveal(), "key-1");
}
