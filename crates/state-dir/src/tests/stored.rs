//! Pools that were declared over the API.

use super::*;

fn stored(pool: &str) -> StoredPool {
    StoredPool {
        pool: pool.parse().unwrap(),
        revision: 3,
        document: r#"{"id":"chat","model":"stub:b"}"#.into(),
        file_digest: Some("d1".into()),
        previous: Some(r#"{"id":"chat","model":"stub:a"}"#.into()),
        probation: Some(Probation { until: Tick(60), restarts: [(ReplicaId(1), 2)].into() }),
    }
}

#[tokio::test]
async fn stored_pools_survive_until_they_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.stored_pools().await, []);
    // Names that look like files of each other.
    let (chat, other) = (stored("chat"), StoredPool { file_digest: None, previous: None, ..stored("chat.json") });
    state.store_pool(&other).await.unwrap();
    state.store_pool(&chat).await.unwrap();
    let newer = StoredPool { revision: 4, ..chat.clone() };
    state.store_pool(&newer).await.unwrap();
    drop(state);
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.stored_pools().await, [newer, other.clone()]);
    state.drop_pool(&chat.pool).await.unwrap();
    state.drop_pool(&chat.pool).await.unwrap();
    assert_eq!(state.stored_pools().await, [other]);
    assert_eq!(fs::read_dir(dir.path().join("pools")).unwrap().count(), 2, "and its copy");
}

#[tokio::test]
async fn a_probation_survives_the_daemon_and_not_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = StateDir::open(dir.path()).unwrap();
    state.store_pool(&stored("chat")).await.unwrap();
    assert_eq!(state.stored_pools().await, [stored("chat")]);
    state.boot_id = "another".into();
    assert_eq!(state.stored_pools().await, [StoredPool { probation: None, ..stored("chat") }]);
}

#[tokio::test]
async fn a_stored_pool_torn_or_flipped_at_any_byte_is_read_from_its_copy_and_never_misread() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let chat = stored("chat");
    state.store_pool(&chat).await.unwrap();
    let (main, copy) = (dir.path().join("pools/chat.json"), dir.path().join("pools/chat.json.copy"));
    let whole = fs::read(&main).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        for broken in [&whole[..at], &flipped] {
            fs::write(&main, broken).unwrap();
            fs::write(&copy, &whole).unwrap();
            let found = state.stored_pools().await;
            // A version that is unknown may be a newer daemon's, and is left alone.
            let newer = flipped == broken && found.is_empty();
            assert!(found == [chat.clone()] || newer, "{at}: {found:?}");
            // With the copy broken the same way nothing is made up.
            fs::write(&copy, broken).unwrap();
            let found = state.stored_pools().await;
            assert!(found.is_empty() || found == [chat.clone()], "{at}: {found:?}");
        }
    }
}

#[tokio::test]
async fn a_store_or_a_drop_that_is_cut_short_leaves_the_old_or_the_new() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (main, copy) = (dir.path().join("pools/chat.json"), dir.path().join("pools/chat.json.copy"));
    let (old, new) = (stored("chat"), StoredPool { revision: 4, ..stored("chat") });
    state.store_pool(&new).await.unwrap();
    let written = fs::read(&copy).unwrap();
    // A first store, after the copy.
    fs::remove_file(&main).unwrap();
    assert_eq!(state.stored_pools().await, []);
    // A later one.
    state.store_pool(&old).await.unwrap();
    fs::write(&copy, &written).unwrap();
    assert_eq!(state.stored_pools().await, [old]);
    // A drop, after the first file.
    fs::remove_file(&main).unwrap();
    assert_eq!(state.stored_pools().await, []);
}

#[tokio::test]
async fn a_stored_pool_of_a_newer_version_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let file = dir.path().join("pools/chat.json");
    fs::write(&file, r#"{"version":2,"pools":[]}"#).unwrap();
    assert_eq!(state.stored_pools().await, []);
    let error = state.store_pool(&stored("chat")).await.unwrap_err();
    assert!(error.source.to_string().contains("version 2"), "{error:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), r#"{"version":2,"pools":[]}"#);
}

#[tokio::test]
async fn of_a_forgotten_pool_only_its_generations_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (chat, now) = (key("chat", 0), Tick(5));
    state.intend(&chat, Generation(3)).await.unwrap();
    state.set_hold(&chat.pool, true).await.unwrap();
    state.note_past(&chat, in_trouble(), None, now).await.unwrap();
    state.forget_pool(&chat.pool).await.unwrap();
    assert_eq!(state.last_generation(&chat).await, Generation(3));
    assert!(!state.held(&chat.pool).await);
    assert_eq!(state.past(&chat, now).await, Past::default());
    // One that never was leaves no file.
    state.forget_pool(&"none".parse().unwrap()).await.unwrap();
    assert!(!dir.path().join("ledger/none.json").exists());
}
