//! The locks that engines hold, each together with its shim: one of its replica, which no two can hold, and a shared one
//! of every device it is on. Their files are never unlinked: a lock on a file that was replaced protects nothing.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pool_domain::ReplicaKey;

/// Between two tries to take a lock. A process that is just being started may have it for an instant more.
const TRY_AGAIN: Duration = Duration::from_millis(10);
const TRIES: u32 = 100;

/// Where they lie.
#[derive(Debug, Clone)]
pub(crate) struct Locks {
    dir: PathBuf,
}

impl Locks {
    /// Makes the directory, for nobody else.
    pub(crate) fn in_dir(dir: &Path) -> Self {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(&dir) {
            tracing::error!(%error, "there is no directory for the locks of engines: none can be launched");
        }
        Self { dir }
    }

    fn replica(&self, key: &str) -> PathBuf {
        self.dir.join(format!("replica-{key}.lock"))
    }

    fn device(&self, uuid: &str) -> PathBuf {
        let name: String = uuid.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
        self.dir.join(format!("device-{name}.lock"))
    }

    /// Where the shim says a second time what it started: it is found by the lock even when the state directory is gone.
    pub(crate) fn start_record(&self, key: &str) -> PathBuf {
        self.dir.join(format!("replica-{key}.json"))
    }

    /// Takes the lock of a replica, to hand it on.
    pub(crate) async fn take(&self, key: &ReplicaKey) -> io::Result<File> {
        let file = open(&self.replica(&key.to_string()))?;
        for _ in 0..TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(TRY_AGAIN).await,
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }

    /// The lock files of these devices, which are there from now on.
    pub(crate) fn of_devices(&self, uuids: &[String]) -> io::Result<Vec<PathBuf>> {
        let made = uuids.iter().map(|uuid| {
            let path = self.device(uuid);
            open(&path).map(|_| path)
        });
        made.collect()
    }

    pub(crate) fn replica_held(&self, key: &str) -> bool {
        held(&self.replica(key))
    }

    pub(crate) fn device_held(&self, uuid: &str) -> bool {
        held(&self.device(uuid))
    }

    /// Every replica that ever had a lock here.
    pub(crate) fn replicas(&self) -> Vec<String> {
        let names = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let key = |name: &str| Some(name.strip_prefix("replica-")?.strip_suffix(".lock")?.to_owned());
        names.filter_map(|name| key(name.to_str()?)).collect()
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether somebody has it. What cannot be asked is taken for held.
fn held(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => file.try_lock().is_err(),
        Err(error) => error.kind() != ErrorKind::NotFound,
    }
}
