//! What is written down of a pool, and its wire form.
//!
//! The record lies in two files of the same content, the second written after the first, and a write counts once both
//! are there. Reading takes the higher generation of the two, so one torn file loses no generation.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;

use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::Past;
use pool_domain::perf::{Perf, PerfKey, Speeds};
use pool_domain::{Generation, PoolId, ReplicaId, ReplicaKey, Tick};
use pool_services::ApiKey;
use pool_services::ports::Handoff;
use pool_services::snapshot::LastError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::files;
use crate::past::{ErrorRecord, PastRecord};
use crate::speed::SpeedRecord;

const VERSION: u32 = 1;
/// Figures remembered for a pool; each belongs to another model or other settings.
const LEARNT_MAX: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolRecord {
    version: u32,
    pub(crate) hold: bool,
    replicas: BTreeMap<u16, ReplicaRecord>,
    /// What engines took, newest last.
    #[serde(default)]
    learnt: Vec<LearntRecord>,
    /// How fast engines were, newest last.
    #[serde(default)]
    speeds: Vec<SpeedRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LearntRecord {
    model: String,
    settings: String,
    taken: u64,
    samples: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    short: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl LearntRecord {
    fn is(&self, key: &CorrectionKey) -> bool {
        self.model == key.model && self.settings == key.settings
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct ReplicaRecord {
    generation: u64,
    #[serde(default)]
    past: Option<PastRecord>,
    #[serde(default)]
    last_error: Option<ErrorRecord>,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl Default for PoolRecord {
    fn default() -> Self {
        Self { version: VERSION, hold: false, replicas: BTreeMap::new(), learnt: Vec::new(), speeds: Vec::new() }
    }
}

impl PoolRecord {
    pub(crate) fn generation(&self, replica: ReplicaId) -> Generation {
        self.replicas.get(&replica.0).map(|r| Generation(r.generation)).unwrap_or_default()
    }

    /// Notes a generation. The same one again is a repeated write; an older one would be used twice.
    pub(crate) fn intend(&mut self, replica: ReplicaId, generation: Generation) -> io::Result<()> {
        let last = self.generation(replica);
        if generation < last {
            let why = format!("generation {generation} of {replica} was used already, the last is {last}");
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
        self.replicas.entry(replica.0).or_default().generation = generation.0;
        Ok(())
    }

    /// What is held against a replica, in ticks of this boot.
    pub(crate) fn past(&self, replica: ReplicaId, boot_id: &str, now: Tick) -> Past {
        let kept = self.replicas.get(&replica.0).and_then(|r| r.past.as_ref());
        kept.map(|p| p.read(boot_id, now)).unwrap_or_default()
    }

    pub(crate) fn note_past(&mut self, replica: ReplicaId, past: Past, boot_id: String, now: Tick) {
        self.replicas.entry(replica.0).or_default().past = Some(PastRecord::new(past, boot_id, now));
    }

    pub(crate) fn last_error(&self, replica: ReplicaId) -> Option<LastError> {
        self.replicas.get(&replica.0)?.last_error.as_ref()?.read()
    }

    pub(crate) fn note_last_error(&mut self, replica: ReplicaId, error: Option<&LastError>) {
        self.replicas.entry(replica.0).or_default().last_error = error.map(ErrorRecord::from);
    }

    pub(crate) fn learnt(&self, key: &CorrectionKey) -> Option<Correction> {
        let found = self.learnt.iter().find(|l| l.is(key))?;
        Some(Correction { taken: found.taken, samples: found.samples, short: found.short })
    }

    pub(crate) fn learn(&mut self, key: CorrectionKey, correction: Correction) {
        self.learnt.retain(|l| !l.is(&key));
        let (CorrectionKey { model, settings }, Correction { taken, samples, short }) = (key, correction);
        self.learnt.push(LearntRecord { model, settings, taken, samples, short });
        let superfluous = self.learnt.len().saturating_sub(LEARNT_MAX);
        self.learnt.drain(..superfluous);
    }

    pub(crate) fn speeds(&self) -> Speeds {
        Speeds::new(self.speeds.iter().map(SpeedRecord::read).collect())
    }

    pub(crate) fn note_speed(&mut self, key: PerfKey, perf: Perf) {
        let mut speeds = self.speeds();
        speeds.keep(key, perf);
        self.speeds = speeds.known().iter().map(SpeedRecord::from).collect();
    }

    /// Forgets all but the generations. Says whether there was anything.
    pub(crate) fn forget(&mut self) -> bool {
        let before = self.clone();
        self.hold = false;
        self.learnt.clear();
        self.speeds.clear();
        self.replicas.values_mut().for_each(|r| r.past = None);
        *self != before
    }

    /// Takes over every generation that is higher in `other`.
    fn raise(&mut self, other: &Self) {
        for (&replica, theirs) in &other.replicas {
            let ours = self.replicas.entry(replica).or_insert_with(|| theirs.clone());
            ours.generation = ours.generation.max(theirs.generation);
        }
    }
}

/// Why a record could not be read.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// Written by a version of the daemon that knows more.
    Newer(u32),
    /// Torn, or the file system refused.
    Broken(io::Error),
}

impl From<Unreadable> for io::Error {
    fn from(why: Unreadable) -> Self {
        match why {
            Unreadable::Newer(v) => {
                Self::new(ErrorKind::Unsupported, format!("version {v} is unknown, which a newer daemon wrote"))
            }
            Unreadable::Broken(error) => error,
        }
    }
}

/// Reads what is known of a pool; a pool without files is new.
pub(crate) fn load(dir: &Path, pool: &PoolId) -> io::Result<PoolRecord> {
    Ok(read_both(dir, pool)?)
}

/// Reads a record that will be written back. Torn files are replaced; those of a newer version are not, since they hold
/// what this version would lose.
pub(crate) fn load_for_update(dir: &Path, pool: &PoolId) -> io::Result<PoolRecord> {
    match read_both(dir, pool) {
        Ok(record) => Ok(record),
        Err(Unreadable::Broken(error)) if error.kind() == ErrorKind::InvalidData => Ok(PoolRecord::default()),
        Err(why) => Err(why.into()),
    }
}

/// Writes a record, durably, into both files.
pub(crate) fn store(dir: &Path, pool: &PoolId, record: &PoolRecord) -> io::Result<()> {
    files::write_sealed(dir, &name(pool), record)
}

/// A pool id may hold dots, so the copy is told by its end, which no record has.
fn name(pool: &PoolId) -> String {
    format!("{pool}.json")
}

fn read_both(dir: &Path, pool: &PoolId) -> Result<PoolRecord, Unreadable> {
    let [main, copy] = files::both(&name(pool)).map(|name| {
        let read = read_one(&dir.join(&name));
        if let Err(why) = &read {
            let reason = match why {
                Unreadable::Newer(v) => format!("its version {v} is unknown"),
                Unreadable::Broken(e) => e.to_string(),
            };
            warn!(%pool, file = name, reason, "a ledger file cannot be read; its other copy is used if that can");
        }
        read
    });
    match (main, copy) {
        (Ok(Some(mut main)), Ok(Some(copy))) => {
            main.raise(&copy);
            Ok(main)
        }
        (Ok(Some(one)), _) | (_, Ok(Some(one))) => Ok(one),
        (Ok(None), Ok(None)) => Ok(PoolRecord::default()),
        (Err(Unreadable::Newer(v)), _) | (_, Err(Unreadable::Newer(v))) => Err(Unreadable::Newer(v)),
        (Err(why), _) | (_, Err(why)) => Err(why),
    }
}

fn read_one(path: &Path) -> Result<Option<PoolRecord>, Unreadable> {
    read_versioned(path, VERSION)
}

/// Reads a record of this version; no file is no record. The first versions began without a checksum.
pub(crate) fn read_versioned<T: DeserializeOwned>(path: &Path, known: u32) -> Result<Option<T>, Unreadable> {
    let Some(value) = files::read_sealed(path, false).map_err(Unreadable::Broken)? else { return Ok(None) };
    let torn = |e: serde_json::Error| Unreadable::Broken(io::Error::new(ErrorKind::InvalidData, e));
    // The version first: a newer record may have any other shape.
    let Versioned { version } = Versioned::deserialize(&value).map_err(torn)?;
    if version != known {
        return Err(Unreadable::Newer(version));
    }
    serde_json::from_value(value).map(Some).map_err(torn)
}

/// A handoff as consumers read it.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandoffRecord {
    pool: String,
    replica: String,
    generation: u64,
    endpoint: String,
    /// What the engine wants to hear. The file is this user's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_key: Option<String>,
    engine: String,
    engine_version: String,
    model: String,
    device_mask: String,
    slots: u16,
    vram: u64,
}

/// The part that says whose handoff it is.
#[derive(Deserialize)]
struct HandoffOf {
    generation: u64,
}

/// Removes a handoff, but not one of a later generation. What cannot be read is nobody's.
pub(crate) fn withdraw(dir: &Path, name: &str, generation: Generation) -> io::Result<()> {
    let later = std::fs::read(dir.join(name))
        .ok()
        .and_then(|text| serde_json::from_slice::<HandoffOf>(&text).ok())
        .is_some_and(|of| of.generation > generation.0);
    if later { Ok(()) } else { files::remove(dir, name) }
}

impl From<&Handoff> for HandoffRecord {
    fn from(h: &Handoff) -> Self {
        Self {
            pool: h.key.pool.to_string(),
            replica: h.key.replica.to_string(),
            generation: h.generation.0,
            endpoint: h.endpoint.clone(),
            api_key: h.api_key.as_ref().map(|k| k.reveal().to_owned()),
            engine: h.engine.clone(),
            engine_version: h.engine_version.clone(),
            model: h.model.clone(),
            device_mask: h.device_mask.clone(),
            slots: h.slots,
            vram: h.vram,
        }
    }
}

impl HandoffRecord {
    /// What it says; nothing if one of its names is none.
    pub(crate) fn into_handoff(self) -> Option<Handoff> {
        let replica = ReplicaId(self.replica.strip_prefix('r')?.parse().ok()?);
        Some(Handoff {
            key: ReplicaKey { pool: self.pool.parse().ok()?, replica },
            generation: Generation(self.generation),
            endpoint: self.endpoint,
            api_key: self.api_key.map(ApiKey::new),
            engine: self.engine,
            engine_version: self.engine_version,
            model: self.model,
            device_mask: self.device_mask,
            slots: self.slots,
            vram: self.vram,
        })
    }
}
