//! Where the locks lie that engines hold: outside the state directory, so that they still stand in the way when that was
//! deleted, and under its name, so that two state directories are not in each other's way.

use std::env;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The directory for the locks of a state directory, made for this user alone.
pub(crate) fn create(state_dir: &Path) -> io::Result<PathBuf> {
    let state_dir = fs::canonicalize(state_dir)?;
    let owner = fs::metadata("/proc/self")?.uid();
    let home = runtime_home(owner);
    let digest = Sha256::digest(state_dir.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let dir = home.join(name);
    DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    for made in [&home, &dir] {
        // In a directory that everybody may write to, somebody else may have been there first.
        let found = fs::symlink_metadata(made)?;
        if !found.is_dir() || found.uid() != owner || found.mode() & 0o022 != 0 {
            let why = format!("{} belongs to somebody else, or others may write to it", made.display());
            return Err(io::Error::new(ErrorKind::PermissionDenied, why));
        }
    }
    Ok(dir)
}

/// A directory that is emptied no earlier than the machine stops, or the user's last process.
fn runtime_home(owner: u32) -> PathBuf {
    let given = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    match given {
        Some(dir) => dir.join("pool-managerd"),
        None if owner == 0 => "/run/pool-managerd".into(),
        None => env::temp_dir().join(format!("pool-managerd-{owner}")),
    }
}
