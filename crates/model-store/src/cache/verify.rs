//! Reading what is here, to see that it is what it has to be.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use pool_domain::Sha256Digest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::{Cache, Look, VERIFIED, read_record, write_json};
use crate::fetch::{Progress, digest_of};

/// Read at once, and between two looks at whether anybody still waits.
const PIECE: usize = 1 << 20;

/// The digest of a file, read whole. Ends early when nobody waits for it any more.
pub(crate) async fn hash_file(path: PathBuf, progress: &mut Progress<'_>) -> io::Result<Sha256Digest> {
    let (tx, mut pieces) = mpsc::channel::<u64>(4);
    let reader = tokio::task::spawn_blocking(move || hash(&path, &tx));
    while let Some(piece) = pieces.recv().await {
        progress.add(piece);
    }
    reader.await.map_err(|_| io::Error::other("it was not read to the end"))?
}

fn hash(path: &Path, told: &mpsc::Sender<u64>) -> io::Result<Sha256Digest> {
    let (mut file, mut hasher, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(digest_of(hasher)),
            Ok(n) => {
                hasher.update(&buffer[..n]);
                if told.blocking_send(n as u64).is_err() {
                    return Err(io::Error::other("nobody waits for it any more"));
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A local file that was compared with its digest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verified {
    sha256: String,
    look: Look,
}

impl Cache {
    fn verified_name(path: &Path) -> String {
        let digest = digest_of(Sha256::new_with_prefix(path.as_os_str().as_encoded_bytes())).to_string();
        format!("{}.json", &digest[..32])
    }

    /// The digest that a local file had when it looked as it does now.
    pub(crate) fn verified(&self, path: &Path) -> Option<Sha256Digest> {
        let known: Verified = read_record(&self.dir.join(VERIFIED).join(Self::verified_name(path)))?;
        let look = Look::at(path).ok()?;
        known.sha256.parse().ok().filter(|_| known.look == look)
    }

    /// Remembers the digest of a local file, which looked so before it was read.
    pub(crate) fn note_verified(&self, path: &Path, look: Look, digest: Sha256Digest) -> io::Result<()> {
        self.prepare()?;
        let known = Verified { sha256: digest.to_string(), look };
        write_json(&self.dir.join(VERIFIED), &Self::verified_name(path), &known)
    }
}
