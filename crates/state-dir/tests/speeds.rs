//! How fast engines were is there for the next daemon.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use pool_domain::PoolId;
use pool_domain::perf::{Mean, Perf, PerfKey, Speeds};
use pool_services::ports::StateLedger;
use state_dir::StateDir;

fn key(n: u64) -> PerfKey {
    PerfKey { engine: format!("llama.cpp {n}"), model: "qwen".into(), mask: "GPU-a,GPU-b".into() }
}

#[tokio::test]
async fn speeds_are_remembered_by_engine_model_and_devices_within_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let pool: PoolId = "chat".parse().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.speeds(&pool).await, Speeds::default());
    let perf = Perf {
        first_token: Some(Mean { ms: 31.5, samples: 0 }),
        token: Some(Mean { ms: 1000.0 / 3.0, samples: 4_096 }),
    };
    for n in 0..20 {
        state.note_speed(&pool, &key(n), perf.seeded(n)).await.unwrap();
    }
    state.note_speed(&pool, &key(19), perf).await.unwrap();
    drop(state);

    let state = StateDir::open(dir.path()).unwrap();
    let speeds = state.speeds(&pool).await;
    assert_eq!((speeds.known().len(), speeds.of(&key(3))), (16, None));
    let known = speeds.of(&key(19)).unwrap();
    assert_eq!((known.hints(), known.token.unwrap().samples), (perf.hints(), 4_096));
    assert_eq!(known.first_token, perf.first_token);
    state.forget_pool(&pool).await.unwrap();
    assert_eq!(state.speeds(&pool).await, Speeds::default(), "nothing of a pool that is no more");
}
