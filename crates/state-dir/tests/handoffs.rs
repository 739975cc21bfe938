//! What a consumer learns from the handoffs of a running daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use pool_domain::{Generation, ReplicaId, ReplicaKey};
use pool_services::Registry;
use pool_services::ports::{Handoff, StateLedger};
use state_dir::{StateDir, handoffs};

fn handoff(pool: &str, replica: u16) -> Handoff {
    Handoff {
        key: ReplicaKey { pool: pool.parse().unwrap(), replica: ReplicaId(replica) },
        generation: Generation(7),
        endpoint: "http://127.0.0.1:42000".into(),
        api_key: None,
        engine: "llama.cpp".into(),
        engine_version: "b6000".into(),
        model: "qwen".into(),
        device_mask: "GPU-1".into(),
        slots: 4,
        vram: 1 << 33,
    }
}

#[tokio::test]
async fn a_registry_learns_from_handoff_files_who_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    assert!(handoffs(dir.path()).is_err(), "nobody was ever here");
    let state = StateDir::open(dir.path()).unwrap();
    let (chat, embed) = (handoff("chat", 12), handoff("embed", 0));
    state.publish_handoff(&embed).await.unwrap();
    state.publish_handoff(&chat).await.unwrap();
    for (name, text) in [(".new-x", "{"), ("odd.json", "{}"), ("torn.json", "{\"pool\": \"ch")] {
        fs::write(dir.path().join("handoff").join(name), text).unwrap();
    }
    // The daemon is there: it is read beside it.
    let read = handoffs(dir.path()).unwrap();
    assert_eq!(read, [chat.clone(), embed.clone()]);

    let mut registry = Registry::new();
    registry.set_last_error("chat", "broken");
    for handoff in &read {
        registry.register_ready_from_handoff(handoff, 42);
    }
    let seen = registry.snapshots();
    assert_eq!(seen.iter().map(|s| s.pool_id.as_str()).collect::<Vec<_>>(), ["chat", "embed"]);
    assert!(seen.iter().all(|s| s.health.live && s.health.ready && s.slots_free == Some(4)));
    assert_eq!((registry.get_last_error("chat"), registry.get_heartbeat("chat")), (None, Some(42)));
    assert_eq!(registry.get_engine_version("chat").as_deref(), Some("b6000"));

    state.withdraw_handoff(&chat.key, chat.generation).await.unwrap();
    assert_eq!(handoffs(dir.path()).unwrap(), [embed]);
}
