//! What was fetched, on this disk.
//!
//! ```text
//! blobs/DIGEST        contents, each once; beside each, how it looked when it was verified
//! models/KEY/NAME     the same files under the names that engines look for (hard links)
//! refs/KEY.json       which files a model is, and how they looked when they were verified; with it a model is there
//! partial/KEY.N       what is being fetched
//! locks/KEY.lock      held by whoever fetches or removes; never unlinked
//! verified/KEY.json   local files that were compared with their digest
//! ```

mod room;
mod verify;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pool_domain::model_policy::Denied;
use pool_domain::{ModelRef, RemoteSource, Sha256Digest};
use rustix::fs::{
    AtFlags, CWD, FlockOperation, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, flock, statvfs, utimensat,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize as SerializeDerive};
use sha2::{Digest, Sha256};

pub(crate) use self::room::Keep;
pub(crate) use self::verify::hash_file;
use crate::fetch::{Fetched, RemoteFile, digest_of};

/// Version of the records.
const VERSION: u32 = 1;
const BLOBS: &str = "blobs";
const MODELS: &str = "models";
const REFS: &str = "refs";
const PARTIAL: &str = "partial";
const LOCKS: &str = "locks";
const VERIFIED: &str = "verified";
/// What marks a directory that need not be saved.
const TAG: (&str, &[u8]) = ("CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55\n");

/// A model that is in the cache.
#[derive(Debug, Clone, PartialEq, Eq, SerializeDerive, Deserialize)]
pub(crate) struct Entry {
    version: u32,
    /// Its reference, without a digest.
    pub(crate) model: String,
    /// What its repository called this state of it.
    pub(crate) revision: Option<String>,
    /// Its files, the one that an engine is given first.
    pub(crate) files: Vec<EntryFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, SerializeDerive, Deserialize)]
pub(crate) struct EntryFile {
    pub(crate) name: String,
    pub(crate) sha256: String,
    pub(crate) look: Look,
}

/// What tells, without reading it, that a file is still the one that was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, SerializeDerive, Deserialize)]
pub(crate) struct Look {
    pub(crate) bytes: u64,
    device: u64,
    inode: u64,
    mtime: i64,
    mtime_nsec: i64,
}

impl Look {
    pub(crate) fn at(path: &Path) -> io::Result<Self> {
        let m = fs::symlink_metadata(path)?;
        if !m.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
        }
        let (mtime, mtime_nsec) = (m.mtime(), m.mtime_nsec());
        Ok(Self { bytes: m.len(), device: m.dev(), inode: m.ino(), mtime, mtime_nsec })
    }
}

impl Entry {
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.look.bytes).sum()
    }
}

/// The cache directory.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    dir: Arc<Path>,
}

/// A JSON file, if it is one.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Bytes that may still be written where a directory is.
pub(crate) fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

impl Cache {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir: dir.into() }
    }

    /// Where models lie under their names.
    pub(crate) fn models(&self) -> PathBuf {
        self.dir.join(MODELS)
    }

    fn at(&self, kind: &str, name: &str) -> PathBuf {
        self.dir.join(kind).join(name)
    }

    /// Makes the directories; others may read what is in them, since engines may be other users.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        for kind in ["", BLOBS, MODELS, REFS, PARTIAL, LOCKS, VERIFIED] {
            let dir = self.dir.join(kind);
            if !dir.exists() {
                DirBuilder::new().recursive(true).mode(0o755).create(&dir)?;
                // Whatever the daemon's umask is.
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
            }
        }
        if !self.dir.join(TAG.0).exists() {
            durable_files::replace(&self.dir, TAG.0, TAG.1)?;
        }
        Ok(())
    }

    /// What a model is called here: for people, and apart from every other.
    pub(crate) fn key(source: &RemoteSource) -> String {
        let text = source.to_string();
        let digest = digest_of(Sha256::new_with_prefix(text.as_bytes())).to_string();
        let id = ModelRef::Remote(pool_domain::RemoteRef { source: source.clone(), digest: None }).model_id();
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
        let stem: String = id.chars().map(plain).skip_while(|c| *c == '.').take(48).collect();
        format!("{stem}-{}", &digest[..16])
    }

    /// The lock of a model, if nobody else has it. It is free again once the last copy of the file is dropped.
    pub(crate) fn try_lock(&self, key: &str) -> io::Result<Option<File>> {
        let path = self.at(LOCKS, &format!("{key}.lock"));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The files that the n-th file of a model grows in.
    pub(crate) fn partial(&self, key: &str, n: usize) -> (PathBuf, PathBuf) {
        (self.at(PARTIAL, &format!("{key}.{n}")), self.at(PARTIAL, &format!("{key}.{n}.json")))
    }

    /// Bytes that somebody has fetched so far of a model.
    pub(crate) fn partial_bytes(&self, key: &str) -> u64 {
        self.partials().into_iter().filter(|(of, _)| of == key).map(|(_, path)| length(&path)).sum()
    }

    /// Every partial file, with the model it is of.
    fn partials(&self) -> Vec<(String, PathBuf)> {
        let Ok(found) = fs::read_dir(self.dir.join(PARTIAL)) else { return Vec::new() };
        let of = |path: PathBuf| {
            let name = path.file_name()?.to_str()?;
            let name = name.strip_suffix(".json").unwrap_or(name);
            Some((name.rsplit_once('.')?.0.to_owned(), path.clone()))
        };
        found.flatten().filter_map(|entry| of(entry.path())).collect()
    }

    /// The record of a model, if it says that this is the one.
    pub(crate) fn entry(&self, source: &RemoteSource) -> Option<Entry> {
        let entry: Entry = read_record(&self.at(REFS, &format!("{}.json", Self::key(source))))?;
        (entry.version == VERSION && entry.model == source.to_string() && !entry.files.is_empty()).then_some(entry)
    }

    /// Where a file of a model lies.
    pub(crate) fn file(&self, source: &RemoteSource, name: &str) -> PathBuf {
        self.at(MODELS, &Self::key(source)).join(name)
    }

    /// The files of a model that do not look as they did when they were verified.
    pub(crate) fn changed<'a>(&self, source: &RemoteSource, entry: &'a Entry) -> Vec<&'a EntryFile> {
        let same = |f: &&EntryFile| Look::at(&self.file(source, &f.name)).is_ok_and(|look| look == f.look);
        entry.files.iter().filter(|f| !same(f)).collect()
    }

    /// A model was used: it is not the next one to leave.
    pub(crate) fn touch(&self, source: &RemoteSource) {
        let path = self.at(REFS, &format!("{}.json", Self::key(source)));
        let now = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        };
        if let Err(error) = utimensat(CWD, &path, &now, AtFlags::empty()) {
            tracing::debug!(%error, "a model in the cache could not be marked as used");
        }
    }

    /// How it looked when it was taken in.
    fn look_of(&self, digest: Sha256Digest) -> PathBuf {
        self.at(BLOBS, &format!("{digest}.json"))
    }

    fn blob(&self, digest: Sha256Digest) -> PathBuf {
        self.at(BLOBS, &digest.to_string())
    }

    /// Whether a content is here, from whatever model.
    pub(crate) fn has(&self, file: &RemoteFile) -> Option<Fetched> {
        let digest = file.digest?;
        let look = Look::at(&self.blob(digest)).ok()?;
        // Somebody may have changed it since it was verified.
        read_record::<Look>(&self.look_of(digest)).filter(|known| *known == look)?;
        file.bytes.is_none_or(|bytes| bytes == look.bytes).then_some(Fetched { bytes: look.bytes, digest })
    }

    /// Takes in a content that was fetched whole and verified.
    pub(crate) fn take_in(&self, partial: &Path, digest: Sha256Digest) -> io::Result<()> {
        fs::set_permissions(partial, fs::Permissions::from_mode(0o644))?;
        let blob = self.blob(digest);
        fs::rename(partial, &blob)?;
        durable_files::sync_dir(&self.dir.join(BLOBS))?;
        write_json(&self.dir.join(BLOBS), &format!("{digest}.json"), &Look::at(&blob)?)
    }

    /// Makes a model of contents that are here: from now on it is there.
    pub(crate) fn publish(
        &self,
        source: &RemoteSource,
        revision: Option<String>,
        files: &[(String, Sha256Digest)],
    ) -> io::Result<Entry> {
        let (key, models) = (Self::key(source), self.dir.join(MODELS));
        let made = tempfile::Builder::new().prefix(".new-").tempdir_in(&models)?;
        fs::set_permissions(made.path(), fs::Permissions::from_mode(0o755))?;
        let mut entry = Entry { version: VERSION, model: source.to_string(), revision, files: Vec::new() };
        for (name, digest) in files {
            let path = made.path().join(name);
            fs::hard_link(self.blob(*digest), &path)?;
            let look = Look::at(&path)?;
            entry.files.push(EntryFile { name: name.clone(), sha256: digest.to_string(), look });
        }
        durable_files::sync_dir(made.path())?;
        let place = models.join(&key);
        gone(fs::remove_dir_all(&place))?;
        fs::rename(made.keep(), place)?;
        durable_files::sync_dir(&models)?;
        self.write_entry(&key, &entry)?;
        Ok(entry)
    }

    fn write_entry(&self, key: &str, entry: &Entry) -> io::Result<()> {
        write_json(&self.dir.join(REFS), &format!("{key}.json"), entry)
    }

    /// The files look otherwise, but hold what they held.
    pub(crate) fn looked_again(&self, source: &RemoteSource, mut entry: Entry) -> io::Result<Entry> {
        for file in &mut entry.files {
            file.look = Look::at(&self.file(source, &file.name))?;
        }
        self.write_entry(&Self::key(source), &entry)?;
        Ok(entry)
    }

    /// Removes a model, and the contents that were of it alone.
    pub(crate) fn remove(&self, key: &str) -> io::Result<()> {
        let record = format!("{key}.json");
        let entry: Option<Entry> = read_record(&self.at(REFS, &record));
        // First what says that it is there.
        durable_files::remove(&self.dir.join(REFS), &record)?;
        gone(fs::remove_dir_all(self.at(MODELS, key)))?;
        for (of, path) in self.partials() {
            if of == key {
                gone(fs::remove_file(path))?;
            }
        }
        for file in entry.iter().flat_map(|entry| &entry.files) {
            let Ok(digest) = file.sha256.parse() else { continue };
            if self.of_no_model(digest) {
                self.remove_blob(digest)?;
            }
        }
        Ok(())
    }

    /// Whether a content is here that no model has, or none yet.
    fn of_no_model(&self, digest: Sha256Digest) -> bool {
        fs::metadata(self.blob(digest)).is_ok_and(|m| m.nlink() == 1)
    }

    fn remove_blob(&self, digest: Sha256Digest) -> io::Result<()> {
        gone(fs::remove_file(self.look_of(digest)))?;
        gone(fs::remove_file(self.blob(digest)))
    }

    /// Contents that no model has, or none yet: of a model of several files that is being fetched, or never was whole.
    fn spare_blobs(&self) -> io::Result<Vec<Sha256Digest>> {
        let names = fs::read_dir(self.dir.join(BLOBS))?.flatten().map(|found| found.file_name());
        let digests = names.filter_map(|name| name.to_str()?.parse().ok());
        Ok(digests.filter(|digest| self.of_no_model(*digest)).collect())
    }

    /// Removes a content that turned out to be another.
    pub(crate) fn spoilt(&self, digest: &str) -> io::Result<()> {
        match digest.parse() {
            Ok(digest) => self.remove_blob(digest),
            Err(_) => Ok(()),
        }
    }
}

fn length(path: &Path) -> u64 {
    // The record beside a partial file counts for nothing.
    let is_record = path.extension().is_some_and(|e| e == "json");
    if is_record { 0 } else { fs::metadata(path).map_or(0, |m| m.len()) }
}

fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    durable_files::replace(dir, name, &serde_json::to_vec_pretty(value)?)
}

/// What is not there is removed already.
fn gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// What is said where something may only come from the cache.
pub(crate) fn offline() -> String {
    Denied::Offline.to_string()
}
