//! Room for what is to be fetched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pool_domain::model_cache::{Cached, Room, make_room};
use pool_domain::{RemoteSource, Sha256Digest};

use super::{Cache, Entry, REFS, free_bytes, length, read_record};
use crate::fetch::{Trouble, disk};

/// What stays, and how much may be here.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keep {
    /// Models that pools may need, by their names here.
    pub(crate) keys: BTreeSet<String>,
    /// Contents of what is being fetched.
    pub(crate) contents: BTreeSet<Sha256Digest>,
    /// Bytes that the cache may hold.
    pub(crate) cap: Option<u64>,
    /// Bytes that are left to others on the disk.
    pub(crate) reserve: u64,
}

impl Cache {
    /// Makes room for `need` bytes of a model whose lock the caller has; models that nobody needs leave for it.
    pub(crate) fn make_room(&self, source: &RemoteSource, need: u64, keep: &Keep) -> Result<(), Trouble> {
        let own = Self::key(source);
        let free = free_bytes(&self.dir).map_err(|e| disk(&e))?;
        let room = Room { cap: keep.cap, free, reserve: keep.reserve };
        let held = self.held(keep, &own).map_err(|e| disk(&e))?;
        // What is here of it counts already.
        let leaving = make_room(&held, need, room).map_err(|no| Trouble::Node(no.to_string()))?;
        for key in leaving {
            if let Ok(digest) = key.parse() {
                self.remove_blob(digest).map_err(|e| disk(&e))?;
                continue;
            }
            // Whoever has the lock by now fetches it: what is missing then is found out by writing.
            let Some(_lock) = self.try_lock(&key).map_err(|e| disk(&e))? else { continue };
            self.remove(&key).map_err(|e| disk(&e))?;
            tracing::info!(model = key, "removed from the model cache to make room for another");
        }
        Ok(())
    }

    fn held(&self, keep: &Keep, own: &str) -> io::Result<Vec<Cached>> {
        let mut held: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for found in fs::read_dir(self.dir.join(REFS))? {
            let path = found?.path();
            let Some(key) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".json")) else {
                continue;
            };
            let bytes = read_record::<Entry>(&path).map_or(0, |entry| entry.bytes());
            held.insert(key.to_owned(), (bytes, changed_at(&path)));
        }
        for (key, path) in self.partials() {
            let (bytes, used) = held.entry(key).or_default();
            *bytes += length(&path);
            *used = (*used).max(changed_at(&path));
        }
        let mut cached = Vec::new();
        for (key, (bytes, used)) in held {
            let pinned = key == own || keep.keys.contains(&key) || self.try_lock(&key)?.is_none();
            cached.push(Cached { key, bytes, used, pinned });
        }
        for digest in self.spare_blobs()? {
            let path = self.blob(digest);
            let (bytes, used) = (length(&path), changed_at(&path));
            cached.push(Cached { key: digest.to_string(), bytes, used, pinned: keep.contents.contains(&digest) });
        }
        Ok(cached)
    }
}

fn changed_at(path: &Path) -> u64 {
    let nanos = |m: fs::Metadata| u64::try_from(m.mtime() * 1_000_000_000 + m.mtime_nsec()).unwrap_or(0);
    fs::metadata(path).map_or(0, nanos)
}
