//! The durable facts of the daemon as files: generations, holds and handoffs, and the lock that keeps a second daemon
//! out.
//!
//! ```text
//! lock                       held for life, never unlinked
//! ledger/<pool>.json         hold, generations, what is held against replicas, their last failure, how fast engines were
//! engines/<pool>-<replica>.json   what a later daemon needs to find the engine and go on with it
//! pools/<pool>.json          a pool that was declared over the API, or that stands in for one of the file; and a .copy
//! devices.json               what is held against devices
//! handoff/<pool>-<replica>.json   what a Ready replica tells consumers
//! run/                       whatever engines need while they run
//! ```
//!
//! Every file is replaced whole: written beside, fsynced, renamed, and the directory fsynced. The first three kinds have a
//! checksum and a copy of the same content, `….json.copy`, written after them, which stands in for one that was torn.

#![forbid(unsafe_code)]

mod against_devices;
mod engines;
mod files;
mod lock_dir;
mod past;
mod record;
mod seal;
mod speed;
mod stored;

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use fault_points::{Point, reached};
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::Past;
use pool_domain::perf::{Perf, PerfKey, Speeds};
use pool_domain::{Generation, PoolId, ReplicaKey, Tick};
use pool_services::ports::{AgainstDevices, EngineRecord, Handoff, LedgerError, StateLedger, StoredPool};
use pool_services::snapshot::LastError;
use thiserror::Error;
use tokio::sync::Semaphore;
use tracing::error;

use crate::record::{HandoffRecord, PoolRecord};

/// Where handoffs lie.
const HANDOFF: &str = "handoff";

/// Why the state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// Another daemon uses it; the process exits with status 75.
    #[error("another pool-managerd uses the state directory {}", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The state directory, locked against every other daemon until it is dropped.
#[derive(Debug)]
pub struct StateDir {
    paths: Paths,
    /// One file operation at a time, because an update reads before it writes. The permit travels into the blocking
    /// task, so that a caller who gives up does not let the next one in early.
    turn: Arc<Semaphore>,
    /// Names this boot of the machine: ticks of another one mean nothing here.
    boot_id: String,
    lock_dir: PathBuf,
    _lock: File,
}

#[derive(Debug, Clone)]
struct Paths {
    root: PathBuf,
    ledger: PathBuf,
    handoff: PathBuf,
    engines: PathBuf,
    pools: PathBuf,
}

impl StateDir {
    /// Opens the state directory, creating it for this user alone where it is missing, and takes its lock. Handoffs of
    /// an earlier run are removed: a replica whose engine is taken over writes its own again.
    ///
    /// # Errors
    /// When another daemon holds the lock, or the file system refuses.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, StateDirError> {
        let root = path.into();
        let paths = Paths {
            ledger: root.join("ledger"),
            handoff: root.join(HANDOFF),
            engines: root.join("engines"),
            pools: root.join("pools"),
            root,
        };
        create_dir(&paths.root)?;
        let lock = take_lock(&paths.root)?;
        reached(Point::AfterLock);
        for dir in [&paths.ledger, &paths.handoff, &paths.engines, &paths.pools, &paths.root.join("run")] {
            create_dir(dir)?;
            close_to_others(dir)?;
        }
        clear(&paths.handoff, |_| true)?;
        clear(&paths.ledger, files::is_leftover)?;
        clear(&paths.engines, files::is_leftover)?;
        clear(&paths.pools, files::is_leftover)?;
        clear(&paths.root, files::is_leftover)?;
        let lock_dir = lock_dir::create(&paths.root).map_err(|source| StateDirError::Io {
            what: "make a directory for the locks of",
            path: paths.root.clone(),
            source,
        })?;
        Ok(Self { lock_dir, paths, turn: Arc::new(Semaphore::new(1)), boot_id: boot_id(), _lock: lock })
    }

    /// Where engines keep what they need while they run.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.paths.root.join("run")
    }

    /// What the names of leases are sealed with.
    ///
    /// # Errors
    /// When the kernel gives nothing random.
    pub fn seal_key(&self) -> io::Result<[u8; 32]> {
        seal::key(&self.paths.root)
    }

    /// Where the locks of engines lie. Not below the state directory, and never removed.
    #[must_use]
    pub fn lock_dir(&self) -> PathBuf {
        self.lock_dir.clone()
    }

    /// Runs file work off the async threads, one at a time.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Paths) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let permit = Arc::clone(&self.turn).acquire_owned().await.map_err(io::Error::other)?;
        let paths = self.paths.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&paths)
        })
        .await
        .map_err(io::Error::other)?
    }

    /// What is written down of a pool. What cannot be read is told and counts as nothing.
    async fn read(&self, pool: &PoolId) -> PoolRecord {
        let id = pool.clone();
        match self.work(move |paths| record::load(&paths.ledger, &id)).await {
            Ok(record) => record,
            Err(error) => {
                error!(%pool, %error, "the ledger of this pool cannot be read; it starts from nothing");
                PoolRecord::default()
            }
        }
    }

    async fn update(
        &self,
        what: &'static str,
        pool: &PoolId,
        change: impl FnOnce(&mut PoolRecord) -> io::Result<()> + Send + 'static,
    ) -> Result<(), LedgerError> {
        let pool = pool.clone();
        self.work(move |paths| {
            let mut record = record::load_for_update(&paths.ledger, &pool)?;
            change(&mut record)?;
            record::store(&paths.ledger, &pool, &record)
        })
        .await
        .map_err(|source| LedgerError { what, source })
    }
}

#[async_trait]
impl StateLedger for StateDir {
    async fn last_generation(&self, key: &ReplicaKey) -> Generation {
        self.read(&key.pool).await.generation(key.replica)
    }

    async fn intend(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        let replica = key.replica;
        self.update("the intent to start an engine", &key.pool, move |r| r.intend(replica, generation)).await
    }

    async fn past(&self, key: &ReplicaKey, now: Tick) -> Past {
        self.read(&key.pool).await.past(key.replica, &self.boot_id, now)
    }

    async fn last_error(&self, key: &ReplicaKey) -> Option<LastError> {
        self.read(&key.pool).await.last_error(key.replica)
    }

    async fn against_devices(&self) -> AgainstDevices {
        let boot_id = self.boot_id.clone();
        self.work(move |paths| against_devices::load(&paths.root, &boot_id)).await.unwrap_or_else(|error| {
            error!(%error, "what is held against devices cannot be read; it is forgotten");
            AgainstDevices::default()
        })
    }

    async fn note_against_devices(&self, held: &AgainstDevices) -> Result<(), LedgerError> {
        let (held, boot_id) = (held.clone(), self.boot_id.clone());
        self.work(move |paths| against_devices::store(&paths.root, &held, boot_id))
            .await
            .map_err(|source| LedgerError { what: "what is held against devices", source })
    }

    async fn note_past(
        &self,
        key: &ReplicaKey,
        past: Past,
        last_error: Option<&LastError>,
        now: Tick,
    ) -> Result<(), LedgerError> {
        let (replica, boot_id, last_error) = (key.replica, self.boot_id.clone(), last_error.cloned());
        self.update("what is held against an engine", &key.pool, move |r| {
            r.note_past(replica, past, boot_id, now);
            r.note_last_error(replica, last_error.as_ref());
            Ok(())
        })
        .await
    }

    async fn held(&self, pool: &PoolId) -> bool {
        self.read(pool).await.hold
    }

    async fn set_hold(&self, pool: &PoolId, held: bool) -> Result<(), LedgerError> {
        self.update("the hold of a pool", pool, move |r| {
            r.hold = held;
            Ok(())
        })
        .await
    }

    async fn record(&self, record: &EngineRecord) -> Result<(), LedgerError> {
        let record = record.clone();
        self.work(move |paths| engines::store(&paths.engines, &record))
            .await
            .map_err(|source| LedgerError { what: "the record of an engine", source })
    }

    async fn forget(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        let key = key.clone();
        self.work(move |paths| engines::forget(&paths.engines, &key, generation))
            .await
            .map_err(|source| LedgerError { what: "the end of an engine", source })
    }

    async fn recorded(&self) -> Vec<EngineRecord> {
        self.work(|paths| engines::load_all(&paths.engines)).await.unwrap_or_else(|error| {
            error!(%error, "the records of engines cannot be read");
            Vec::new()
        })
    }

    async fn publish_handoff(&self, handoff: &Handoff) -> Result<(), LedgerError> {
        let name = handoff_name(&handoff.key);
        let record = HandoffRecord::from(handoff);
        self.work(move |paths| files::write_json(&paths.handoff, &name, &record))
            .await
            .map_err(|source| LedgerError { what: "a handoff", source })
    }

    async fn withdraw_handoff(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError> {
        let name = handoff_name(key);
        self.work(move |paths| record::withdraw(&paths.handoff, &name, generation))
            .await
            .map_err(|source| LedgerError { what: "the removal of a handoff", source })
    }

    async fn learnt(&self, pool: &PoolId, key: &CorrectionKey) -> Option<Correction> {
        self.read(pool).await.learnt(key)
    }

    async fn learn(&self, pool: &PoolId, key: &CorrectionKey, correction: Correction) -> Result<(), LedgerError> {
        let key = key.clone();
        self.update("what an engine took", pool, move |r| {
            r.learn(key, correction);
            Ok(())
        })
        .await
    }

    async fn speeds(&self, pool: &PoolId) -> Speeds {
        self.read(pool).await.speeds()
    }

    async fn note_speed(&self, pool: &PoolId, key: &PerfKey, perf: Perf) -> Result<(), LedgerError> {
        let key = key.clone();
        self.update("how fast an engine is", pool, move |r| {
            r.note_speed(key, perf);
            Ok(())
        })
        .await
    }

    async fn stored_pools(&self) -> Vec<StoredPool> {
        let boot_id = self.boot_id.clone();
        self.work(move |paths| stored::load_all(&paths.pools, &boot_id)).await.unwrap_or_else(|error| {
            error!(%error, "the stored pools cannot be read");
            Vec::new()
        })
    }

    async fn store_pool(&self, pool: &StoredPool) -> Result<(), LedgerError> {
        let (pool, boot_id) = (pool.clone(), self.boot_id.clone());
        self.work(move |paths| stored::store(&paths.pools, &pool, &boot_id))
            .await
            .map_err(|source| LedgerError { what: "a pool", source })
    }

    async fn drop_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        let pool = pool.clone();
        self.work(move |paths| stored::remove(&paths.pools, &pool))
            .await
            .map_err(|source| LedgerError { what: "the end of a pool", source })
    }

    async fn forget_pool(&self, pool: &PoolId) -> Result<(), LedgerError> {
        let pool = pool.clone();
        self.work(move |paths| {
            let mut record = record::load_for_update(&paths.ledger, &pool)?;
            if record.forget() { record::store(&paths.ledger, &pool, &record) } else { Ok(()) }
        })
        .await
        .map_err(|source| LedgerError { what: "that a pool is no more", source })
    }
}

/// Where the kernel does not say, every run counts as a boot of its own.
fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if id.is_empty() { format!("run-{}", std::process::id()) } else { id.trim().to_owned() }
}

/// What Ready replicas tell consumers, from the files below a state directory; those of a running daemon, too. What is no
/// handoff is left out.
///
/// # Errors
/// When the directory cannot be read.
pub fn handoffs(state_dir: &Path) -> io::Result<Vec<Handoff>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(state_dir.join(HANDOFF))? {
        let path = entry?.path();
        if files::is_leftover(&path) {
            continue;
        }
        // One that was withdrawn in the meantime is none.
        let record = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<HandoffRecord>(&bytes).ok());
        found.extend(record.and_then(HandoffRecord::into_handoff));
    }
    found.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

fn handoff_name(key: &ReplicaKey) -> String {
    format!("{key}.json")
}

/// What is below the state directory is nobody else's, whoever made it.
fn close_to_others(path: &Path) -> Result<(), StateDirError> {
    let failed = |source| StateDirError::Io { what: "close to others", path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)
}

fn create_dir(path: &Path) -> Result<(), StateDirError> {
    // One that exists keeps its mode: it may be a directory that others use too.
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| StateDirError::Io {
        what: "create",
        path: path.to_owned(),
        source,
    })
}

fn take_lock(root: &Path) -> Result<File, StateDirError> {
    let path = root.join("lock");
    let failed = |source| StateDirError::Io { what: "lock", path: path.clone(), source };
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600);
    let lock = options.open(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StateDirError::InUse { path: root.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

fn clear(dir: &Path, unwanted: impl Fn(&Path) -> bool) -> Result<(), StateDirError> {
    let failed = |source| StateDirError::Io { what: "tidy", path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_file() && unwanted(&path) {
            fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
