//! Pools that were stored, and their wire form.
//!
//! A pool lies in two files of the same content. The first one decides: is it missing, there is no such pool, and is it
//! torn, the copy stands in. So the copy is written first and removed last, and whoever is interrupted leaves what was
//! there before, or what was to be.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use fault_points::{Point, reached};
use pool_domain::rollout::Probation;
use pool_domain::{PoolId, ReplicaId, Tick};
use pool_services::ports::StoredPool;
use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use crate::files;
use crate::record::{Unreadable, read_versioned};

const VERSION: u32 = 1;
const COPY: &str = ".copy";

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    version: u32,
    pool: String,
    revision: u64,
    document: String,
    file_digest: Option<String>,
    previous: Option<String>,
    /// Unset in records of before there was one.
    #[serde(default)]
    probation: Option<ProbationRecord>,
}

/// Ticks mean something only with the boot they belong to.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ProbationRecord {
    boot_id: String,
    until: u64,
    /// By the number of the replica.
    restarts: BTreeMap<u16, u64>,
}

impl ProbationRecord {
    fn new(p: &Probation, boot_id: &str) -> Self {
        let restarts = p.restarts.iter().map(|(id, count)| (id.0, *count)).collect();
        Self { boot_id: boot_id.to_owned(), until: p.until.0, restarts }
    }

    /// None of another boot: what was on probation ended with that.
    fn read(self, boot_id: &str) -> Option<Probation> {
        let restarts = self.restarts.into_iter().map(|(id, count)| (ReplicaId(id), count)).collect();
        (self.boot_id == boot_id).then_some(Probation { until: Tick(self.until), restarts })
    }
}

impl Written {
    fn new(p: &StoredPool, boot_id: &str) -> Self {
        Self {
            version: VERSION,
            pool: p.pool.to_string(),
            revision: p.revision,
            document: p.document.clone(),
            file_digest: p.file_digest.clone(),
            previous: p.previous.clone(),
            probation: p.probation.as_ref().map(|p| ProbationRecord::new(p, boot_id)),
        }
    }
}

fn read_one(path: &Path, boot_id: &str) -> Result<Option<StoredPool>, Unreadable> {
    let Some(written) = read_versioned::<Written>(path, VERSION)? else { return Ok(None) };
    let Written { pool, revision, document, file_digest, previous, probation, .. } = written;
    let invalid = |e: pool_domain::id::IdError| io::Error::new(ErrorKind::InvalidData, e.to_string());
    let pool = pool.parse().map_err(|e| Unreadable::Broken(invalid(e)))?;
    let probation = probation.and_then(|p| p.read(boot_id));
    Ok(Some(StoredPool { pool, revision, document, file_digest, previous, probation }))
}

/// A pool id may hold dots, so the copy is told by its end, which no first file has.
fn names(pool: &PoolId) -> [String; 2] {
    [format!("{pool}.json"), format!("{pool}.json{COPY}")]
}

/// Writes a pool, durably. What a newer version wrote is not overwritten.
pub(crate) fn store(dir: &Path, pool: &StoredPool, boot_id: &str) -> io::Result<()> {
    let [main, copy] = names(&pool.pool);
    if let Err(newer @ Unreadable::Newer(_)) = read_one(&dir.join(&main), boot_id) {
        return Err(newer.into());
    }
    let written = files::sealed(&Written::new(pool, boot_id))?;
    files::write_json(dir, &copy, &written)?;
    reached(Point::BetweenCopies);
    files::write_json(dir, &main, &written)
}

/// Removes a pool, durably.
pub(crate) fn remove(dir: &Path, pool: &PoolId) -> io::Result<()> {
    names(pool).iter().try_for_each(|name| files::remove(dir, name))
}

/// Every pool, by name. One of which neither file can be read is told and left as it is.
pub(crate) fn load_all(dir: &Path, boot_id: &str) -> io::Result<Vec<StoredPool>> {
    let mut pools = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(".json")) else { continue };
        let copy = dir.join(format!("{name}{COPY}"));
        match read_one(&path, boot_id) {
            Ok(found) => pools.extend(found),
            Err(why @ Unreadable::Newer(_)) => {
                error!(file = name, error = %io::Error::from(why), "a stored pool cannot be read");
            }
            Err(Unreadable::Broken(error)) => match read_one(&copy, boot_id) {
                Ok(Some(found)) => {
                    warn!(file = name, %error, "a stored pool cannot be read; its copy is used");
                    pools.push(found);
                }
                _ => error!(file = name, %error, "a stored pool cannot be read, nor can its copy: it is not there"),
            },
        }
    }
    pools.sort_by(|a, b| a.pool.cmp(&b.pool));
    Ok(pools)
}
