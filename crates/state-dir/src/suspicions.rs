//! What is held against devices. A reboot resets them, so it goes with the boot.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;

use pool_domain::suspicion::{Accusation, Case, Suspicions};
use pool_domain::{FailureClass, Tick};
use serde::{Deserialize, Serialize};

use crate::files;

const NAME: &str = "devices.json";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    version: u32,
    boot_id: String,
    devices: BTreeMap<String, WrittenCase>,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenCase {
    accusations: Vec<WrittenAccusation>,
    suspect_until: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenAccusation {
    pool: String,
    class: String,
    at: u64,
}

pub(crate) fn store(dir: &Path, suspicions: &Suspicions, boot_id: String) -> io::Result<()> {
    let case = |case: &Case| WrittenCase {
        accusations: case
            .accusations
            .values()
            .map(|a| WrittenAccusation { pool: a.pool.to_string(), class: a.class.to_owned(), at: a.at.0 })
            .collect(),
        suspect_until: case.suspect_until.map(|t| t.0),
    };
    let devices = suspicions.cases().iter().map(|(uuid, c)| (uuid.clone(), case(c))).collect();
    files::write_sealed(dir, NAME, &Written { version: VERSION, boot_id, devices })
}

/// The first of its files that is whole.
pub(crate) fn load(dir: &Path, boot_id: &str) -> io::Result<Suspicions> {
    let [main, copy] = files::both(NAME).map(|name| read(&dir.join(name)));
    let written = match (main, copy) {
        (Ok(Some(written)), _) | (_, Ok(Some(written))) => written,
        (Ok(None), Ok(None)) => return Ok(Suspicions::default()),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    let devices = if written.boot_id == boot_id { written.devices } else { BTreeMap::new() };
    Ok(Suspicions::resume(devices.into_iter().map(|(uuid, case)| (uuid, case.read())).collect()))
}

fn read(path: &Path) -> io::Result<Option<Written>> {
    let Some(value) = files::read_sealed(path, true)? else { return Ok(None) };
    let invalid = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    if value["version"] != VERSION {
        return Err(invalid(format!("its version {} is unknown", value["version"])));
    }
    serde_json::from_value(value).map(Some).map_err(|e| invalid(e.to_string()))
}

impl WrittenCase {
    fn read(self) -> Case {
        let accusation = |a: WrittenAccusation| {
            let class = FailureClass::CODES.into_iter().find(|code| *code == a.class)?;
            Some(Accusation { pool: a.pool.parse().ok()?, class, at: Tick(a.at) })
        };
        let accusations = self.accusations.into_iter().filter_map(accusation).map(|a| (a.pool.clone(), a)).collect();
        Case { accusations, suspect_until: self.suspect_until.map(Tick) }
    }
}
