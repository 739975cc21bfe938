//! The engines on record, each in two files of the same content with a checksum. A file that is torn or was changed is no
//! record; then the other one is.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pool_domain::lifecycle::{OnDeadline, Proof};
use pool_domain::{Generation, ReplicaId, ReplicaKey, ResolvedMask, Tick};
use pool_services::ports::{Endpoint, EngineRecord, Phase};
use pool_services::{ApiKey, Workload};
use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use crate::files;

/// 1 had no checksum.
const VERSION: u32 = 2;

#[derive(Serialize, Deserialize)]
struct Written {
    version: u32,
    pool: String,
    replica: u16,
    generation: u64,
    nonce: String,
    fingerprint: String,
    addr: SocketAddr,
    kind: String,
    model: String,
    model_path: Option<PathBuf>,
    workload: String,
    /// What it wants to hear. Not in the first records of this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    api_key: Option<String>,
    engine_version: String,
    devices: Vec<String>,
    bytes: Vec<u64>,
    /// Not in the first records of this version.
    #[serde(default)]
    unlisted: Option<Vec<u64>>,
    executable: Option<String>,
    phase: WrittenPhase,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
enum WrittenPhase {
    Starting,
    Ready { since: u64, proof: WrittenProof },
    Draining { ready_since: u64, proof: WrittenProof, deadline: u64, force: bool },
    Stopping,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenProof {
    residency: String,
    model: String,
    slots: u16,
    first_unit_ms: u64,
}

impl From<&Proof> for WrittenProof {
    fn from(p: &Proof) -> Self {
        Self {
            residency: p.residency.to_owned(),
            model: p.model.clone(),
            slots: p.slots,
            first_unit_ms: p.first_unit_ms,
        }
    }
}

impl From<WrittenProof> for Proof {
    fn from(p: WrittenProof) -> Self {
        let residency = ["vram", "simulated", "served"].into_iter().find(|r| *r == p.residency).unwrap_or("");
        Self { residency, model: p.model, slots: p.slots, first_unit_ms: p.first_unit_ms }
    }
}

impl From<&EngineRecord> for Written {
    fn from(r: &EngineRecord) -> Self {
        Self {
            version: VERSION,
            pool: r.key.pool.to_string(),
            replica: r.key.replica.0,
            generation: r.generation.0,
            nonce: r.nonce.clone(),
            fingerprint: r.fingerprint.clone(),
            addr: r.endpoint.addr,
            kind: r.endpoint.kind.clone(),
            model: r.endpoint.model.clone(),
            model_path: r.endpoint.model_path.clone(),
            workload: r.endpoint.workload.code().to_owned(),
            api_key: r.endpoint.api_key.as_ref().map(|k| k.reveal().to_owned()),
            engine_version: r.engine_version.clone(),
            devices: r.devices.uuids.clone(),
            bytes: r.bytes.clone(),
            unlisted: r.unlisted.clone(),
            executable: r.executable.clone(),
            phase: match &r.phase {
                Phase::Starting => WrittenPhase::Starting,
                Phase::Ready { since, proof } => WrittenPhase::Ready { since: since.0, proof: proof.into() },
                Phase::Draining { ready_since, proof, deadline, on_deadline } => WrittenPhase::Draining {
                    ready_since: ready_since.0,
                    proof: proof.into(),
                    deadline: deadline.0,
                    force: *on_deadline == OnDeadline::Force,
                },
                Phase::Stopping => WrittenPhase::Stopping,
            },
        }
    }
}

impl Written {
    fn read(self) -> Result<EngineRecord, String> {
        let workload = [Workload::Generate, Workload::Embed, Workload::Rerank];
        let workload = workload.into_iter().find(|w| w.code() == self.workload).ok_or("its workload is unknown")?;
        let phase = match self.phase {
            WrittenPhase::Starting => Phase::Starting,
            WrittenPhase::Ready { since, proof } => Phase::Ready { since: Tick(since), proof: proof.into() },
            WrittenPhase::Draining { ready_since, proof, deadline, force } => Phase::Draining {
                ready_since: Tick(ready_since),
                proof: proof.into(),
                deadline: Tick(deadline),
                on_deadline: if force { OnDeadline::Force } else { OnDeadline::Abort },
            },
            WrittenPhase::Stopping => Phase::Stopping,
        };
        let pool = self.pool.parse().map_err(|e: pool_domain::id::IdError| e.to_string())?;
        Ok(EngineRecord {
            key: ReplicaKey { pool, replica: ReplicaId(self.replica) },
            generation: Generation(self.generation),
            nonce: self.nonce,
            fingerprint: self.fingerprint,
            endpoint: Endpoint {
                addr: self.addr,
                kind: self.kind,
                model: self.model,
                model_path: self.model_path,
                workload,
                api_key: self.api_key.map(ApiKey::new),
            },
            engine_version: self.engine_version,
            devices: ResolvedMask { uuids: self.devices },
            bytes: self.bytes,
            unlisted: self.unlisted,
            executable: self.executable,
            phase,
        })
    }
}

fn name(key: &ReplicaKey) -> String {
    format!("{key}.json")
}

/// Writes a record, durably.
pub(crate) fn store(dir: &Path, record: &EngineRecord) -> io::Result<()> {
    files::write_sealed(dir, &name(&record.key), &Written::from(record))
}

/// Removes the record of a generation, or of one before it.
pub(crate) fn forget(dir: &Path, key: &ReplicaKey, generation: Generation) -> io::Result<()> {
    match read(dir, &name(key)) {
        Ok(Some(record)) if record.generation > generation => Ok(()),
        // One that is left by a crash in between names an engine that is gone, which is found out.
        _ => files::both(&name(key)).iter().try_for_each(|name| files::remove(dir, name)),
    }
}

/// Every record. One that cannot be read is told and left out: its engine is then one that no record names, which is
/// ended by what its lock tells of it, or fences its devices.
pub(crate) fn load_all(dir: &Path) -> io::Result<Vec<EngineRecord>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.insert(name.strip_suffix(".copy").map(ToOwned::to_owned).unwrap_or(name));
    }
    let mut records = Vec::new();
    for name in names {
        match read(dir, &name) {
            Ok(found) => records.extend(found),
            Err(error) => error!(file = name, %error, "the record of an engine cannot be read"),
        }
    }
    records.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(records)
}

/// The first of its files that is whole: it was written first, so the other is never newer.
fn read(dir: &Path, name: &str) -> io::Result<Option<EngineRecord>> {
    let [main, copy] = files::both(name).map(|name| read_one(&dir.join(name)));
    match (main, copy) {
        (Ok(Some(record)), _) => Ok(Some(record)),
        (Err(error), Ok(Some(record))) => {
            warn!(file = name, %error, "the record of an engine cannot be read; its other copy is used");
            Ok(Some(record))
        }
        (Ok(None), copy) => copy,
        (Err(error), _) => Err(error),
    }
}

fn read_one(path: &Path) -> io::Result<Option<EngineRecord>> {
    let Some(value) = files::read_sealed(path, true)? else { return Ok(None) };
    let invalid = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    // The version first: a newer record may have any other shape.
    if value["version"] != VERSION {
        return Err(invalid(format!("its version {} is unknown", value["version"])));
    }
    let written: Written = serde_json::from_value(value).map_err(|e| invalid(e.to_string()))?;
    written.read().map(Some).map_err(invalid)
}
