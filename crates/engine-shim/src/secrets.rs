//! Files that hold a secret for the engine. The child writes them as the engine's user, so nobody else ever could read them.

use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::spec::LaunchSpec;

/// One of them, made ready before the fork.
pub(crate) struct SecretText {
    name: CString,
    value: Vec<u8>,
}

impl SecretText {
    /// In the current directory, for its owner to read. Makes system calls only.
    pub(crate) fn write(&self) -> Result<(), Errno> {
        let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, &self.name, new, Mode::RUSR)?;
        let mut rest = self.value.as_slice();
        while !rest.is_empty() {
            let written = rustix::io::write(&file, rest)?;
            rest = rest.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Those of a launch.
pub(crate) fn files(spec: &LaunchSpec) -> io::Result<Vec<SecretText>> {
    let files = spec.secrets.iter().map(|secret| {
        if secret.name.is_empty() || secret.name.contains('/') || secret.name.starts_with('.') {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not the name of a file"));
        }
        Ok(SecretText { name: CString::new(secret.name.as_str())?, value: secret.value.clone().into_bytes() })
    });
    files.collect()
}

/// Removes them, when nobody is left who reads them.
pub(crate) fn remove(spec: &LaunchSpec) {
    for secret in &spec.secrets {
        let _gone = fs::remove_file(spec.workdir.join(&secret.name));
    }
}
