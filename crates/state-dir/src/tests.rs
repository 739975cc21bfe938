use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::rollout::Probation;
use pool_domain::{BreakerState, ReplicaId};

use pool_domain::ResolvedMask;
use pool_domain::lifecycle::{OnDeadline, Proof};
use pool_services::ports::{Endpoint, Phase};
use pool_services::{ApiKey, Workload};

use super::*;

mod stored;

const CHILD_ENV: &str = "STATE_DIR_TEST_CHILD";

fn key(pool: &str, replica: u16) -> ReplicaKey {
    ReplicaKey { pool: pool.parse().unwrap(), replica: ReplicaId(replica) }
}

fn handoff() -> Handoff {
    Handoff {
        key: key("chat", 0),
        generation: Generation(7),
        endpoint: "http://127.0.0.1:42000".into(),
        api_key: Some(ApiKey::new("canary")),
        engine: "llama.cpp".into(),
        engine_version: "b6000".into(),
        model: "qwen".into(),
        device_mask: "GPU-1".into(),
        slots: 4,
        vram: 1 << 33,
    }
}

fn engine(key: ReplicaKey, phase: pool_services::ports::Phase) -> EngineRecord {
    use pool_domain::ResolvedMask;
    use pool_services::ports::Endpoint;
    use pool_services::{ApiKey, Workload};
    EngineRecord {
        key,
        generation: Generation(3),
        nonce: "n".into(),
        fingerprint: "f".into(),
        endpoint: Endpoint {
            addr: "127.0.0.1:42000".parse().unwrap(),
            kind: "stub".into(),
            model: "tiny".into(),
            model_path: Some("/m".into()),
            workload: Workload::Embed,
            api_key: Some(ApiKey::new("canary")),
        },
        engine_version: "1".into(),
        devices: ResolvedMask { uuids: vec!["GPU-a".into(), "GPU-b".into()] },
        bytes: vec![1, 2],
        unlisted: Some(vec![7]),
        executable: Some("1:2".into()),
        phase,
    }
}

#[test]
fn it_is_made_for_this_user_alone_and_a_second_open_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("deep/state");
    let first = StateDir::open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(first.runtime_dir(), path.join("run"));
    assert!(first.runtime_dir().is_dir());
    assert!(matches!(StateDir::open(&path), Err(StateDirError::InUse { .. })));
    drop(first);
    assert!(path.join("lock").exists(), "the lock file is never unlinked");
    StateDir::open(&path).unwrap();
}

#[test]
fn a_second_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _held = StateDir::open(dir.path()).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::child_of_the_test_above", "--nocapture"])
        .env(CHILD_ENV, dir.path())
        .output()
        .unwrap();
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(String::from_utf8_lossy(&child.stdout).contains("refused: in use"));
}

#[test]
fn child_of_the_test_above() {
    if let Some(dir) = std::env::var_os(CHILD_ENV) {
        assert!(matches!(StateDir::open(dir), Err(StateDirError::InUse { .. })));
        println!("refused: in use");
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = StateDir::open(file.join("state")).unwrap_err();
    assert!(error.to_string().contains("could not create"), "{error}");
}

#[tokio::test]
async fn generations_and_holds_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (a, b, other) = (key("chat", 0), key("chat", 1), key("chat.json", 0));
    assert_eq!(state.last_generation(&a).await, Generation(0));
    assert!(!state.held(&a.pool).await);
    state.intend(&a, Generation(3)).await.unwrap();
    state.intend(&b, Generation(5)).await.unwrap();
    state.intend(&other, Generation(9)).await.unwrap();
    state.set_hold(&a.pool, true).await.unwrap();
    drop(state);
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.last_generation(&a).await, Generation(3));
    assert_eq!(state.last_generation(&b).await, Generation(5));
    assert_eq!(state.last_generation(&other).await, Generation(9));
    assert!(state.held(&a.pool).await);
    assert!(!state.held(&other.pool).await);
    state.set_hold(&a.pool, false).await.unwrap();
    assert!(!state.held(&a.pool).await);
    assert_eq!(state.last_generation(&a).await, Generation(3));
}

#[tokio::test]
async fn a_used_generation_is_refused_but_a_repeated_write_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.intend(&a, Generation(3)).await.unwrap();
    state.intend(&a, Generation(3)).await.unwrap();
    let error = state.intend(&a, Generation(2)).await.unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(state.last_generation(&a).await, Generation(3));
}

#[tokio::test]
async fn either_file_torn_at_any_byte_loses_no_generation_and_no_hold() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.set_hold(&a.pool, true).await.unwrap();
    state.intend(&a, Generation(41)).await.unwrap();
    for name in ["chat.json", "chat.json.copy"] {
        let path = dir.path().join("ledger").join(name);
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            assert_eq!(state.last_generation(&a).await, Generation(41), "{name} cut at {end}");
            assert!(state.held(&a.pool).await, "{name} cut at {end}");
        }
        // The next write mends it.
        state.intend(&a, Generation(41)).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        fs::remove_file(&path).unwrap();
        assert_eq!(state.last_generation(&a).await, Generation(41), "{name} missing");
        state.intend(&a, Generation(41)).await.unwrap();
    }
}

/// Every file that differs from `whole` by one bit.
fn flipped(whole: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    (0..whole.len() * 8).map(|bit| {
        let mut other = whole.to_vec();
        other[bit / 8] ^= 1 << (bit % 8);
        other
    })
}

#[tokio::test]
async fn any_flipped_bit_of_either_file_loses_no_generation_and_no_hold() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.intend(&a, Generation(41)).await.unwrap();
    state.set_hold(&a.pool, true).await.unwrap();
    for name in ["chat.json", "chat.json.copy"] {
        let path = dir.path().join("ledger").join(name);
        let whole = fs::read(&path).unwrap();
        for bits in flipped(&whole) {
            fs::write(&path, &bits).unwrap();
            let text = String::from_utf8_lossy(&bits);
            assert_eq!(state.last_generation(&a).await, Generation(41), "{name}: {text}");
            assert!(state.held(&a.pool).await, "{name}: {text}");
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[tokio::test]
async fn any_flipped_bit_of_an_engines_record_leaves_it_as_it_was_or_unread() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let record = engine(key("chat", 0), pool_services::ports::Phase::Stopping);
    state.record(&record).await.unwrap();
    let path = dir.path().join("engines/chat-r0.json");
    let whole = fs::read(&path).unwrap();
    for bits in flipped(&whole) {
        fs::write(&path, &bits).unwrap();
        let read = state.recorded().await;
        assert!(read.is_empty() || read == [record.clone()], "{}", String::from_utf8_lossy(&bits));
    }
}

#[tokio::test]
async fn a_record_of_before_there_were_checksums_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let record = engine(key("chat", 0), pool_services::ports::Phase::Starting);
    state.record(&record).await.unwrap();
    let path = dir.path().join("engines/chat-r0.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(json.as_object_mut().unwrap().remove("sha256").is_some());
    fs::write(&path, json.to_string()).unwrap();
    assert_eq!(state.recorded().await, [record]);
}

#[tokio::test]
async fn a_write_cut_between_the_two_files_counts_with_its_higher_generation() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.intend(&a, Generation(1)).await.unwrap();
    let main = dir.path().join("ledger/chat.json");
    let old = fs::read(&main).unwrap();
    state.intend(&a, Generation(2)).await.unwrap();
    fs::write(&main, old).unwrap();
    assert_eq!(state.last_generation(&a).await, Generation(2));
}

#[tokio::test]
async fn files_torn_both_start_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    for name in ["chat.json", "chat.json.copy"] {
        fs::write(dir.path().join("ledger").join(name), "{").unwrap();
    }
    assert_eq!(state.last_generation(&a).await, Generation(0));
    state.intend(&a, Generation(1)).await.unwrap();
    assert_eq!(state.last_generation(&a).await, Generation(1));
}

#[tokio::test]
async fn a_record_of_a_newer_version_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    let text = r#"{"version":2,"shape":"other"}"#;
    for name in ["chat.json", "chat.json.copy"] {
        fs::write(dir.path().join("ledger").join(name), text).unwrap();
    }
    assert_eq!(state.last_generation(&a).await, Generation(0));
    let error = state.intend(&a, Generation(1)).await.unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
    assert_eq!(fs::read_to_string(dir.path().join("ledger/chat.json")).unwrap(), text);
}

#[tokio::test]
async fn an_intent_that_cannot_be_written_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    fs::remove_dir_all(dir.path().join("ledger")).unwrap();
    assert!(state.intend(&key("chat", 0), Generation(1)).await.is_err());
}

#[tokio::test]
async fn a_handoff_is_there_until_it_is_withdrawn_or_the_daemon_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let path = dir.path().join("handoff/chat-r0.json");
    state.publish_handoff(&handoff()).await.unwrap();
    let read: HandoffRecord = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(read == HandoffRecord::from(&handoff()));
    state.withdraw_handoff(&handoff().key, Generation(handoff().generation.0 - 1)).await.unwrap();
    assert!(path.exists(), "it is of a later generation");
    state.withdraw_handoff(&handoff().key, handoff().generation).await.unwrap();
    assert!(!path.exists());
    state.withdraw_handoff(&handoff().key, handoff().generation).await.unwrap();
    state.publish_handoff(&handoff()).await.unwrap();
    fs::write(dir.path().join("ledger/.new-x"), "half").unwrap();
    drop(state);
    let _state = StateDir::open(dir.path()).unwrap();
    assert!(!path.exists());
    assert!(!dir.path().join("ledger/.new-x").exists());
}

#[tokio::test]
async fn updates_at_the_same_time_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = Arc::new(StateDir::open(dir.path()).unwrap());
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let state = Arc::clone(&state);
            tokio::spawn(async move { state.intend(&key("chat", n), Generation(u64::from(n) + 1)).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    for n in 0..16 {
        assert_eq!(state.last_generation(&key("chat", n)).await, Generation(u64::from(n) + 1));
    }
}

#[tokio::test]
async fn what_engines_took_is_remembered_within_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let pool: PoolId = "chat".parse().unwrap();
    let key = |n: u64| CorrectionKey { model: "sha256:a".into(), settings: format!("context {n}") };
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.learnt(&pool, &key(0)).await, None);
    for n in 0..40 {
        state.learn(&pool, &key(n), Correction::new(n)).await.unwrap();
    }
    state.learn(&pool, &key(39), Correction { taken: 99, samples: 2, short: 7 }).await.unwrap();
    drop(state);
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.learnt(&pool, &key(39)).await, Some(Correction { taken: 99, samples: 2, short: 7 }));
    assert_eq!((state.learnt(&pool, &key(7)).await, state.learnt(&pool, &key(8)).await.is_some()), (None, true));
}

fn in_trouble() -> Past {
    let breaker = BreakerState::Open { until: Tick(90_000), trips: 2 };
    Past { failures: 7, breaker, not_before: Some(Tick(61_000)), restarts: 12, counted: Generation(9) }
}

#[tokio::test]
async fn what_is_held_against_a_replica_survives_a_restart_and_waits_go_on_after_a_reboot() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (a, b) = (key("chat", 0), key("chat", 1));
    state.intend(&a, Generation(3)).await.unwrap();
    state.note_past(&a, in_trouble(), None, Tick(60_000)).await.unwrap();
    state.intend(&a, Generation(4)).await.unwrap();
    drop(state);
    let mut state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.last_generation(&a).await, Generation(4));
    // In the same boot time has gone on, and what is written stands.
    assert_eq!(state.past(&a, Tick(70_000)).await, in_trouble());
    assert_eq!(state.past(&b, Tick(70_000)).await, Past::default());
    state.boot_id = "another".into();
    let left = Past {
        breaker: BreakerState::Open { until: Tick(30_050), trips: 2 },
        not_before: Some(Tick(1_050)),
        ..in_trouble()
    };
    assert_eq!(state.past(&a, Tick(50)).await, left);
    for breaker in [BreakerState::HalfOpen { trips: 1 }, BreakerState::Closed { failed_starts: 1, early_crashes: 2 }] {
        let past = Past { breaker, ..Past::default() };
        state.note_past(&b, past, None, Tick(0)).await.unwrap();
        assert_eq!(state.past(&b, Tick(9)).await, past);
    }
}

#[tokio::test]
async fn a_torn_file_keeps_what_the_other_holds_against_a_replica() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.note_past(&a, in_trouble(), None, Tick(1)).await.unwrap();
    let copy = dir.path().join("ledger/chat.json.copy");
    let older = fs::read(&copy).unwrap();
    state.note_past(&a, Past { restarts: 13, ..in_trouble() }, None, Tick(2)).await.unwrap();
    // Cut between the two files: the first is the newer. Torn itself, the older one counts.
    fs::write(&copy, older).unwrap();
    assert_eq!(state.past(&a, Tick(3)).await.restarts, 13);
    let main = dir.path().join("ledger/chat.json");
    let whole = fs::read(&main).unwrap();
    // Without its last byte, a newline, it is still whole.
    for end in 0..whole.len() - 1 {
        fs::write(&main, &whole[..end]).unwrap();
        assert_eq!(state.past(&a, Tick(3)).await, in_trouble(), "cut at {end}");
    }
}

#[tokio::test]
async fn a_record_of_before_there_was_a_past_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    let text = r#"{"version":1,"hold":false,"replicas":{"0":{"generation":5}}}"#;
    fs::write(dir.path().join("ledger/chat.json"), text).unwrap();
    assert_eq!((state.last_generation(&a).await, state.past(&a, Tick(0)).await), (Generation(5), Past::default()));
    // And one of before it said which end was the last that counted.
    state.note_past(&a, in_trouble(), None, Tick(2)).await.unwrap();
    let text = fs::read_to_string(dir.path().join("ledger/chat.json")).unwrap();
    let mut older: serde_json::Value = serde_json::from_str(&text).unwrap();
    let past = older["replicas"]["0"]["past"].as_object_mut().unwrap();
    assert_eq!(past.remove("counted"), Some(9.into()), "{text}");
    older.as_object_mut().unwrap().remove("sha256");
    for name in ["chat.json", "chat.json.copy"] {
        fs::write(dir.path().join("ledger").join(name), older.to_string()).unwrap();
    }
    assert_eq!(state.past(&a, Tick(2)).await, Past { counted: Generation(0), ..in_trouble() });
}

fn proof() -> Proof {
    Proof { residency: "simulated", model: "tiny".into(), slots: 4, first_unit_ms: 7 }
}

fn record(key: ReplicaKey, phase: Phase) -> EngineRecord {
    EngineRecord {
        key,
        generation: Generation(3),
        nonce: "n".into(),
        fingerprint: "f".into(),
        endpoint: Endpoint {
            addr: "127.0.0.1:42000".parse().unwrap(),
            kind: "stub".into(),
            model: "tiny".into(),
            model_path: Some("/m".into()),
            workload: Workload::Embed,
            api_key: Some(ApiKey::new("canary")),
        },
        engine_version: "1".into(),
        devices: ResolvedMask { uuids: vec!["GPU-a".into(), "GPU-b".into()] },
        bytes: vec![1, 2],
        unlisted: Some(vec![7]),
        executable: Some("1:2".into()),
        phase,
    }
}

#[tokio::test]
async fn engines_on_record_survive_and_are_struck_out_by_their_generation() {
    let proof = proof();
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let (since, deadline) = (Tick(5), Tick(9));
    let draining =
        Phase::Draining { ready_since: since, proof: proof.clone(), deadline, on_deadline: OnDeadline::Abort };
    let phases = [Phase::Starting, Phase::Ready { since, proof }, draining, Phase::Stopping];
    let all: Vec<EngineRecord> = (0..).zip(phases).map(|(n, phase)| engine(key("chat", n), phase)).collect();
    for record in &all {
        state.record(record).await.unwrap();
    }
    drop(state);
    fs::write(dir.path().join("engines/torn-r0.json"), "{").unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    assert_eq!(state.recorded().await, all);
    state.forget(&all[0].key, Generation(2)).await.unwrap();
    assert_eq!(state.recorded().await.len(), 4, "a later one is not meant");
    for record in &all {
        state.forget(&record.key, Generation(3)).await.unwrap();
    }
    assert!(state.recorded().await.is_empty());
}

#[test]
fn locks_lie_outside_under_the_name_of_the_directory() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = StateDir::open(one.path()).unwrap();
    let locks = state.lock_dir();
    assert!(locks.is_dir() && !locks.starts_with(one.path()));
    assert_eq!(fs::metadata(&locks).unwrap().permissions().mode() & 0o777, 0o700);
    assert_ne!(StateDir::open(two.path()).unwrap().lock_dir(), locks);
    drop(state);
    // The same directory by another way.
    let link = two.path().join("link");
    std::os::unix::fs::symlink(one.path(), &link).unwrap();
    assert_eq!(StateDir::open(&link).unwrap().lock_dir(), locks);
}

#[tokio::test]
async fn a_record_of_an_engine_torn_or_flipped_at_any_byte_is_lost_only_if_both_are() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    let older = record(a.clone(), Phase::Starting);
    let newer = record(a.clone(), Phase::Ready { since: Tick(5), proof: proof() });
    let path = |name: &str| dir.path().join("engines").join(name);
    state.record(&older).await.unwrap();
    let before = fs::read(path("chat-r0.json.copy")).unwrap();
    state.record(&newer).await.unwrap();
    for (hurt, other, left) in
        [("chat-r0.json", Some(&before), &older), ("chat-r0.json", None, &newer), ("chat-r0.json.copy", None, &newer)]
    {
        // Cut between the two files, the second is the version before.
        let copy = fs::read(path("chat-r0.json.copy")).unwrap();
        if let Some(before) = other {
            fs::write(path("chat-r0.json.copy"), before).unwrap();
        }
        let whole = fs::read(path(hurt)).unwrap();
        let damaged = (0..whole.len() - 1).flat_map(|at| {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            [whole[..at].to_vec(), flipped]
        });
        for bytes in damaged {
            fs::write(path(hurt), &bytes).unwrap();
            let found = state.recorded().await;
            let whole_still = found.as_slice() == std::slice::from_ref(&newer);
            assert!(
                found.as_slice() == std::slice::from_ref(left) || whole_still,
                "{hurt}: {}: {found:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
        fs::write(path(hurt), &whole).unwrap();
        fs::write(path("chat-r0.json.copy"), &copy).unwrap();
    }
    for name in ["chat-r0.json", "chat-r0.json.copy"] {
        fs::write(path(name), "{").unwrap();
    }
    assert!(state.recorded().await.is_empty());
    state.record(&newer).await.unwrap();
    state.forget(&a, Generation(3)).await.unwrap();
    assert_eq!(fs::read_dir(dir.path().join("engines")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_flipped_bit_in_either_file_changes_no_generation() {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    state.intend(&a, Generation(41)).await.unwrap();
    for name in ["chat.json", "chat.json.copy"] {
        let path = dir.path().join("ledger").join(name);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                fs::write(&path, &bytes).unwrap();
                assert_eq!(state.last_generation(&a).await, Generation(41), "{}", String::from_utf8_lossy(&bytes));
            }
        }
        fs::write(&path, &whole).unwrap();
    }
}

#[tokio::test]
async fn the_last_error_survives_and_what_is_held_against_devices_until_a_reboot() {
    use pool_domain::FailureClass;
    use pool_domain::charges::{ChargePolicy, Charges, Said};
    use pool_domain::suspicion::{Accusation, SuspicionPolicy, Suspicions};
    use pool_domain::xid::XidTable;
    use pool_services::ports::AgainstDevices;
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::open(dir.path()).unwrap();
    let a = key("chat", 0);
    assert_eq!((state.last_error(&a).await, state.against_devices().await), (None, AgainstDevices::default()));
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_763_900_000_123);
    let error = LastError { class: FailureClass::Hang, detail: "slot 0 stood still".into(), at };
    state.note_past(&a, in_trouble(), Some(&error), Tick(1)).await.unwrap();
    let (mut suspicions, mut charges) = (Suspicions::default(), Charges::default());
    charges.hear("GPU-2", Said::Xid(79), &XidTable::default(), Tick(7), &ChargePolicy::default());
    charges.hear("GPU-3", Said::Xid(54), &XidTable::default(), Tick(8), &ChargePolicy::default());
    for (pool, at) in [("a", 5), ("b", 9)] {
        let accusation = Accusation { pool: pool.parse().unwrap(), class: "driver_error", at: Tick(at) };
        suspicions.accuse("GPU-1", accusation, &SuspicionPolicy::default());
    }
    let held = AgainstDevices { suspicions, charges: charges.held().clone() };
    state.note_against_devices(&held).await.unwrap();
    drop(state);
    let mut state = StateDir::open(dir.path()).unwrap();
    assert_eq!((state.last_error(&a).await, state.against_devices().await), (Some(error.clone()), held.clone()));
    fs::write(dir.path().join("devices.json"), "torn").unwrap();
    assert_eq!(state.against_devices().await, held);
    state.boot_id = "another".into();
    assert_eq!((state.last_error(&a).await, state.against_devices().await), (Some(error), AgainstDevices::default()));
}

#[test]
fn what_is_below_it_is_closed_to_others_and_the_directory_itself_is_left_as_it_was() {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(dir.path(), open.clone()).unwrap();
    for name in ["ledger", "run"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::set_permissions(dir.path().join(name), open.clone()).unwrap();
    }
    let _state = StateDir::open(dir.path()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o755);
    for name in ["ledger", "run", "engines", "handoff", "pools"] {
        assert_eq!(mode(&dir.path().join(name)), 0o700, "{name}");
    }
    assert_eq!(mode(&dir.path().join("lock")), 0o600);
}
