//! Pools that were stored, and their wire form.
//!
//! A pool lies in two files of the same content. The first one decides: is it missing, there is no such pool, and is it
//! torn, the copy stands in. So the copy is written first and removed last, and whoever is interrupted leaves what was
//! there before, or what was to be.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use pool_domain::PoolId;
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
}

impl From<&StoredPool> for Written {
    fn from(p: &StoredPool) -> Self {
        Self {
            version: VERSION,
            pool: p.pool.to_string(),
            revision: p.revision,
            document: p.document.clone(),
            file_digest: p.file_digest.clone(),
            previous: p.previous.clone(),
        }
    }
}

fn read_one(path: &Path) -> Result<Option<StoredPool>, Unreadable> {
    let Some(written) = read_versioned::<Written>(path, VERSION)? else { return Ok(None) };
    let Written { pool, revision, document, file_digest, previous, .. } = written;
    let invalid = |e: pool_domain::id::IdError| io::Error::new(ErrorKind::InvalidData, e.to_string());
    let pool = pool.parse().map_err(|e| Unreadable::Broken(invalid(e)))?;
    Ok(Some(StoredPool { pool, revision, document, file_digest, previous }))
}

/// A pool id may hold dots, so the copy is told by its end, which no first file has.
fn names(pool: &PoolId) -> [String; 2] {
    [format!("{pool}.json"), format!("{pool}.json{COPY}")]
}

/// Writes a pool, durably. What a newer version wrote is not overwritten.
pub(crate) fn store(dir: &Path, pool: &StoredPool) -> io::Result<()> {
    let [main, copy] = names(&pool.pool);
    if let Err(newer @ Unreadable::Newer(_)) = read_one(&dir.join(&main)) {
        return Err(newer.into());
    }
    let written = files::sealed(&Written::from(pool))?;
    files::write_json(dir, &copy, &written)?;
    files::write_json(dir, &main, &written)
}

/// Removes a pool, durably.
pub(crate) fn remove(dir: &Path, pool: &PoolId) -> io::Result<()> {
    names(pool).iter().try_for_each(|name| files::remove(dir, name))
}

/// Every pool, by name. One of which neither file can be read is told and left as it is.
pub(crate) fn load_all(dir: &Path) -> io::Result<Vec<StoredPool>> {
    let mut pools = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(".json")) else { continue };
        let copy = dir.join(format!("{name}{COPY}"));
        match read_one(&path) {
            Ok(found) => pools.extend(found),
            Err(why @ Unreadable::Newer(_)) => {
                error!(file = name, error = %io::Error::from(why), "a stored pool cannot be read")
            }
            Err(Unreadable::Broken(error)) => match read_one(&copy) {
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
