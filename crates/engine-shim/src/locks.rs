//! Locks that shim and engine hold together: descriptors without close-on-exec, which the engine inherits, and with them
//! the locks. A lock is free again when the last of both has ended, however that came about.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use crate::spec::LaunchSpec;

/// Takes what the spec names. Nobody else can take the descriptors along: the shim has one thread and one child.
pub(crate) fn take(spec: &LaunchSpec) -> io::Result<Vec<OwnedFd>> {
    let mut held = Vec::with_capacity(spec.shared_locks.len() + 1);
    if spec.lock_on_stdin {
        // The engine's own stdin is closed, so it gets another descriptor of the same open file.
        held.push(rustix::io::dup(io::stdin())?);
    }
    for path in &spec.shared_locks {
        let file = File::options().read(true).open(path)?;
        file.try_lock_shared().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(ErrorKind::WouldBlock, "the device is closed to newcomers"),
            TryLockError::Error(error) => error,
        })?;
        held.push(rustix::io::dup(&file)?);
    }
    Ok(held)
}
