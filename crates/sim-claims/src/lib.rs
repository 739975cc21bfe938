//! Simulated VRAM claims: the one home of the file format by which a stand-in engine says how much memory it holds on
//! which simulated device, read by everything that stands in for a GPU driver.
//!
//! A claim is a file `claim-<pid>-<n>` in the simulation directory with three lines:
//!
//! ```text
//! device=GPU-51000000-0000-4000-8000-000000000001
//! bytes=2147483648
//! pid=4242
//! ```
//!
//! Its holder keeps an exclusive lock on the file. A claim counts only while that lock is held, so the kernel ends a
//! claim together with its process, however that process dies; a file that nobody locks is a leftover without meaning.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// The environment variable that names the simulation directory.
pub const SIM_DIR_ENV: &str = "POOL_SIM_DIR";

const PREFIX: &str = "claim-";

/// Memory this process holds on simulated devices, given back on drop or when the process dies.
#[derive(Debug)]
#[must_use = "the memory is given back when the claim is dropped"]
pub struct Claim {
    held: Vec<LockedFile>,
}

/// A claim whose holder is alive.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldClaim {
    /// The process that holds the memory, as it sees its own pid.
    pub pid: u32,
    /// UUID of the device.
    pub device: String,
    /// Bytes held on that device.
    pub bytes: u64,
}

impl Claim {
    /// Claims the given bytes on each of the given devices, creating the directory where needed. Either every device is
    /// claimed or none is.
    ///
    /// # Errors
    ///
    /// A UUID that is empty or holds control characters, or whatever the file system says.
    pub fn hold(dir: &Path, devices: &[(&str, u64)]) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let pid = std::process::id();
        let held = devices
            .iter()
            .map(|&(device, bytes)| publish(dir, &HeldClaim { pid, device: device.to_owned(), bytes }))
            .collect::<io::Result<_>>()?;
        Ok(Self { held })
    }

    /// The files that carry this claim, one for each device.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.held.iter().map(|file| file.path.as_path())
    }
}

/// Reads the claims that count, sorted by pid, then device. A directory that does not exist holds none.
///
/// # Errors
///
/// A held claim that cannot be understood ([`ErrorKind::InvalidData`], naming the file), or whatever the file system
/// says.
pub fn read_claims(dir: &Path) -> io::Result<Vec<HeldClaim>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut claims = Vec::new();
    for entry in entries {
        let entry = entry?;
        if is_claim_name(&entry.file_name()) {
            claims.extend(read_if_held(&entry.path())?);
        }
    }
    claims.sort();
    Ok(claims)
}

/// A published claim file. The path is removed while the lock is still held, so no reader meets a leftover.
#[derive(Debug)]
struct LockedFile {
    path: PathBuf,
    lock: File,
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // Nothing to do about a failure: without its lock the file means nothing.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes and locks the claim under a name readers pass over, then renames it: a reader sees it whole and locked.
fn publish(dir: &Path, claim: &HeldClaim) -> io::Result<LockedFile> {
    if claim.device.is_empty() || claim.device.contains(char::is_control) {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("not a device UUID: {:?}", claim.device)));
    }
    for n in 0_u64.. {
        let name = format!("{PREFIX}{}-{n}", claim.pid);
        // Whoever creates the temporary file owns the name (pids repeat across namespaces), so the check below holds.
        let temporary = dir.join(format!(".{name}.new"));
        let file = match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        // From here on a failure removes the temporary file.
        let mut held = LockedFile { path: temporary, lock: file };
        let path = dir.join(name);
        if path.try_exists()? {
            continue;
        }
        held.lock.lock()?;
        held.lock.write_all(encode(claim).as_bytes())?;
        fs::rename(&held.path, &path)?;
        held.path = path;
        return Ok(held);
    }
    Err(io::Error::other("no free claim name"))
}

fn is_claim_name(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(PREFIX))
}

fn read_if_held(path: &Path) -> io::Result<Option<HeldClaim>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // A shared lock is refused by a holder alone; an exclusive one would make two readers take each other for one.
    match file.try_lock_shared() {
        Ok(()) => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let claim = decode(&text)
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("not a VRAM claim: {}", path.display())))?;
    Ok(Some(claim))
}

fn encode(claim: &HeldClaim) -> String {
    format!("device={}\nbytes={}\npid={}\n", claim.device, claim.bytes, claim.pid)
}

fn decode(text: &str) -> Option<HeldClaim> {
    let (mut device, mut bytes, mut pid) = (None, None, None);
    for line in text.lines() {
        match line.split_once('=')? {
            ("device", value) => device = Some(value.to_owned()),
            ("bytes", value) => bytes = Some(value.parse().ok()?),
            ("pid", value) => pid = Some(value.parse().ok()?),
            // Room for a later version to say more.
            _ => {}
        }
    }
    Some(HeldClaim { pid: pid?, device: device?, bytes: bytes? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    const A: &str = "GPU-51000000-0000-4000-8000-000000000001";
    const B: &str = "GPU-51000000-0000-4000-8000-000000000002";

    /// A directory of the test's own, removed at its end (std only: no tempfile here).
    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("sim-claims-{}-{n}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn held(device: &str, bytes: u64) -> HeldClaim {
        HeldClaim { pid: std::process::id(), device: device.to_owned(), bytes }
    }

    #[test]
    fn a_claim_counts_until_it_is_dropped() {
        let dir = Dir::new();
        let claim = Claim::hold(&dir.0, &[(A, 1), (B, u64::MAX)]).unwrap();
        assert_eq!(read_claims(&dir.0).unwrap(), [held(A, 1), held(B, u64::MAX)]);
        assert_eq!(claim.paths().count(), 2);
        drop(claim);
        assert_eq!(read_claims(&dir.0).unwrap(), []);
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn several_claims_of_one_process_stand_side_by_side() {
        let dir = Dir::new();
        let _first = Claim::hold(&dir.0, &[(A, 1)]).unwrap();
        let second = Claim::hold(&dir.0, &[(A, 2)]).unwrap();
        assert_eq!(read_claims(&dir.0).unwrap(), [held(A, 1), held(A, 2)]);
        drop(second);
        assert_eq!(read_claims(&dir.0).unwrap(), [held(A, 1)]);
    }

    #[test]
    fn a_file_without_its_lock_does_not_count_and_is_not_overwritten() {
        let dir = Dir::new();
        let stale = dir.0.join(format!("claim-{}-0", std::process::id()));
        fs::write(&stale, encode(&held(A, 5))).unwrap();
        assert_eq!(read_claims(&dir.0).unwrap(), []);
        let _claim = Claim::hold(&dir.0, &[(A, 7)]).unwrap();
        assert_eq!(read_claims(&dir.0).unwrap(), [held(A, 7)]);
        assert_eq!(decode(&fs::read_to_string(stale).unwrap()), Some(held(A, 5)));
    }

    #[test]
    fn a_missing_directory_holds_no_claims_and_is_made_for_the_first() {
        let dir = Dir::new();
        let inner = dir.0.join("not/yet");
        assert_eq!(read_claims(&inner).unwrap(), []);
        let _claim = Claim::hold(&inner, &[(A, 1)]).unwrap();
        assert_eq!(read_claims(&inner).unwrap(), [held(A, 1)]);
    }

    #[test]
    fn a_bad_uuid_claims_nothing_at_all() {
        let dir = Dir::new();
        for bad in ["", "GPU-1\nbytes=0"] {
            let error = Claim::hold(&dir.0, &[(A, 1), (bad, 1)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[test]
    fn other_files_are_passed_over_but_a_held_claim_must_be_readable() {
        let dir = Dir::new();
        fs::write(dir.0.join("topology.toml"), "x").unwrap();
        assert_eq!(read_claims(&dir.0).unwrap(), []);
        let path = dir.0.join("claim-1-0");
        fs::write(&path, "device=x\n").unwrap();
        let file = File::open(&path).unwrap();
        file.lock().unwrap();
        assert_eq!(read_claims(&dir.0).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn readers_never_see_half_a_claim_nor_mistake_each_other_for_a_holder() {
        let dir = Dir::new();
        fs::write(dir.0.join("claim-1-0"), encode(&held(B, 1))).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        for claim in read_claims(&dir.0).unwrap() {
                            assert_eq!(claim, held(A, 9));
                        }
                    }
                });
            }
            for _ in 0..500 {
                drop(Claim::hold(&dir.0, &[(A, 9)]).unwrap());
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn decoding_wants_every_line_and_forgives_new_ones() {
        let claim = held(A, 3);
        assert_eq!(decode(&encode(&claim)), Some(claim.clone()));
        assert_eq!(decode(&format!("{}lag_ms=5\n", encode(&claim))), Some(claim));
        for bad in ["", "device=a\nbytes=1\n", "device=a\nbytes=-1\npid=1\n", "nonsense"] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
