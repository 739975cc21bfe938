//! What the names of leases are sealed with: random, made once, for this user alone. It outlives the daemon, as leases do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const NAME: &str = "seal.key";
const BYTES: usize = 32;

fn random() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The key of a state directory. One that cannot be read or written is made anew: leases of before it cannot be brought back
/// then, but by who may do everything.
pub(crate) fn key(root: &Path) -> io::Result<[u8; BYTES]> {
    let path = root.join(NAME);
    if let Some(kept) = fs::read(&path).ok().and_then(|bytes| bytes.try_into().ok()) {
        return Ok(kept);
    }
    let key = random()?;
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.write_all(&key)?;
        file.sync_all()
    };
    if let Err(error) = write() {
        tracing::warn!(%error, "names of leases will not be known again after a restart: their seal cannot be kept");
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_is_made_once_for_this_user_alone_and_anew_where_it_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let made = key(dir.path()).unwrap();
        assert_eq!(key(dir.path()).unwrap(), made);
        let file = dir.path().join(NAME);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&file, b"torn").unwrap();
        let anew = key(dir.path()).unwrap();
        assert_ne!(anew, made);
        assert_eq!(key(dir.path()).unwrap(), anew);
    }
}
