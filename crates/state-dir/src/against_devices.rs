//! What is held against devices. A reboot resets them, so it goes with the boot.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;

use pool_domain::charges::{Charge, Fate};
use pool_domain::suspicion::{Accusation, Case, Suspicions};
use pool_domain::{FailureClass, Tick, Verdict};
use pool_services::ports::AgainstDevices;
use serde::{Deserialize, Serialize};

use crate::files;

const NAME: &str = "devices.json";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    version: u32,
    boot_id: String,
    devices: BTreeMap<String, WrittenCase>,
    #[serde(default)]
    charges: BTreeMap<String, WrittenCharge>,
}

/// What the driver said once.
#[derive(Debug, Serialize, Deserialize)]
struct WrittenCharge {
    fate: String,
    why: String,
    verdict: String,
    at: u64,
    was_away: bool,
    was_judged: bool,
    errors: u64,
    until: Option<u64>,
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

pub(crate) fn store(dir: &Path, held: &AgainstDevices, boot_id: String) -> io::Result<()> {
    let case = |case: &Case| WrittenCase {
        accusations: case
            .accusations
            .values()
            .map(|a| WrittenAccusation { pool: a.pool.to_string(), class: a.class.to_owned(), at: a.at.0 })
            .collect(),
        suspect_until: case.suspect_until.map(|t| t.0),
    };
    let devices = held.suspicions.cases().iter().map(|(uuid, c)| (uuid.clone(), case(c))).collect();
    let charges = held.charges.iter().map(|(uuid, c)| (uuid.clone(), WrittenCharge::of(c))).collect();
    files::write_sealed(dir, NAME, &Written { version: VERSION, boot_id, devices, charges })
}

/// The first of its files that is whole.
pub(crate) fn load(dir: &Path, boot_id: &str) -> io::Result<AgainstDevices> {
    let [main, copy] = files::both(NAME).map(|name| read(&dir.join(name)));
    let written = match (main, copy) {
        (Ok(Some(written)), _) | (_, Ok(Some(written))) => written,
        (Ok(None), Ok(None)) => return Ok(AgainstDevices::default()),
        (Err(error), _) | (_, Err(error)) => return Err(error),
    };
    if written.boot_id != boot_id {
        return Ok(AgainstDevices::default());
    }
    let cases = written.devices.into_iter().map(|(uuid, case)| (uuid, case.read())).collect();
    // A word of a later version is one that nobody here knows what to do about.
    let charges = written.charges.into_iter().filter_map(|(uuid, charge)| Some((uuid, charge.read()?))).collect();
    Ok(AgainstDevices { suspicions: Suspicions::resume(cases), charges })
}

fn read(path: &Path) -> io::Result<Option<Written>> {
    let Some(value) = files::read_sealed(path, true)? else { return Ok(None) };
    let invalid = |why: String| io::Error::new(ErrorKind::InvalidData, why);
    if value["version"] != VERSION {
        return Err(invalid(format!("its version {} is unknown", value["version"])));
    }
    serde_json::from_value(value).map(Some).map_err(|e| invalid(e.to_string()))
}

impl WrittenCharge {
    fn of(charge: &Charge) -> Self {
        Self {
            fate: charge.fate.code().to_owned(),
            why: charge.why.clone(),
            verdict: charge.verdict.code().to_owned(),
            at: charge.at.0,
            was_away: charge.was_away,
            was_judged: charge.was_judged,
            errors: charge.errors,
            until: charge.until.map(|t| t.0),
        }
    }

    fn read(self) -> Option<Charge> {
        Some(Charge {
            fate: Fate::from_code(&self.fate)?,
            why: self.why,
            verdict: Verdict::from_code(&self.verdict)?,
            at: Tick(self.at),
            was_away: self.was_away,
            was_judged: self.was_judged,
            errors: self.errors,
            until: self.until.map(Tick),
        })
    }
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
