//! What is held against devices because of what their driver said: an XID, an error of memory, a verdict of its own. It
//! decides what becomes of the engines there, and when the device is used again.
//!
//! What the driver says for as long as it holds (rows that wait for a reset, its own verdict) is read anew each time and
//! ends by itself. What it said once, as an XID, is held against the device until something shows that it was reset: it was
//! gone and is back, its verdict was there and is gone, its count of errors went back; or until the driver, asked again and
//! again, has had nothing to say against it for long. After that comes a probation.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::Tick;
use crate::device::{DeviceHealth, DeviceSnapshot, Verdict};
use crate::xid::{self, XidAction, XidTable};

/// Numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChargePolicy {
    /// A device that is well again is watched for this long before anything starts there.
    pub probation: Duration,
    /// One that was accused of what nobody knows is left alone for this long after the last accusation.
    pub suspicion: Duration,
    /// A driver that tells what has to be done, and says nothing for this long, is believed.
    pub trust: Duration,
    /// One that is not listed for this long is gone.
    pub gone_after: Duration,
}

impl Default for ChargePolicy {
    fn default() -> Self {
        Self {
            probation: Duration::from_secs(60),
            suspicion: Duration::from_secs(120),
            trust: Duration::from_secs(600),
            // With a look every second, and a lost device to be seen within six.
            gone_after: Duration::from_millis(1_500),
        }
    }
}

/// What a driver said once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// An XID.
    Xid(u64),
    /// An error of memory that was not corrected.
    DoubleBitEcc,
}

impl Said {
    /// Its XID. An error of memory that was not corrected has one of its own.
    #[must_use]
    pub fn number(self) -> u64 {
        match self {
            Self::Xid(number) => number,
            Self::DoubleBitEcc => 48,
        }
    }
}

/// What is to become of the engines on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Nothing.
    Stay,
    /// They end in order, within a short time.
    Drain,
    /// They are ended at once.
    End,
}

impl Fate {
    /// The fate as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Stay => "stay",
            Self::Drain => "drain",
            Self::End => "end",
        }
    }

    /// The fate that a word names.
    #[must_use]
    pub fn from_code(code: &str) -> Option<Self> {
        [Self::Stay, Self::Drain, Self::End].into_iter().find(|fate| fate.code() == code)
    }
}

/// How a device stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Its engines.
    pub fate: Fate,
    /// Why, as the end of a sentence.
    pub why: String,
    /// What somebody has to do.
    pub verdict: Verdict,
}

/// What was said once. It goes with the boot: every device is reset by a reboot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charge {
    /// What becomes of the engines there.
    pub fate: Fate,
    /// Why, as the end of a sentence.
    pub why: String,
    /// What somebody has to do.
    pub verdict: Verdict,
    /// When it was said last.
    pub at: Tick,
    /// The device was not there since.
    pub was_away: bool,
    /// The driver's own verdict was there since.
    pub was_judged: bool,
    /// Errors of memory that were not corrected, then.
    pub errors: u64,
    /// It is used again then, if nothing is said until then.
    pub until: Option<Tick>,
}

/// What is held against the devices of a node, by UUID.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Charges {
    charges: BTreeMap<String, Charge>,
    /// Since when each is not listed.
    missing: BTreeMap<String, Tick>,
    /// Errors of memory that were not corrected, when they were last read.
    errors: BTreeMap<String, u64>,
}

impl Charges {
    /// What was held against each device, by UUID, when the daemon ended.
    #[must_use]
    pub fn resume(charges: BTreeMap<String, Charge>) -> Self {
        Self { charges, ..Self::default() }
    }

    /// What is held against each device, by UUID.
    #[must_use]
    pub fn held(&self) -> &BTreeMap<String, Charge> {
        &self.charges
    }

    /// Takes in what was said of a device. Says what follows.
    pub fn hear(&mut self, device: &str, said: Said, table: &XidTable, now: Tick, policy: &ChargePolicy) -> XidAction {
        let number = said.number();
        let action = table.action(number);
        let fate = match action {
            XidAction::Ignore | XidAction::RestartEngine => return action,
            XidAction::Suspect => Fate::Stay,
            XidAction::Drain => Fate::Drain,
            XidAction::Lost => Fate::End,
        };
        let new = Charge {
            fate,
            why: words(number),
            verdict: xid::verdict(number, action),
            at: now,
            was_away: false,
            was_judged: false,
            errors: self.errors.get(device).copied().unwrap_or(0),
            until: (fate == Fate::Stay).then(|| now + policy.suspicion),
        };
        match self.charges.get_mut(device) {
            // What is worse stands.
            Some(old) if old.fate > fate => {
                old.at = now;
                // Who is accused on probation has not stood it.
                old.until = old.until.map(|until| until.max(now + policy.probation).max(new.until.unwrap_or(now)));
            }
            _ => {
                self.charges.insert(device.to_owned(), new);
            }
        }
        action
    }

    /// Takes in the devices as they are now. Names those that are used again.
    pub fn see(
        &mut self,
        devices: &[DeviceSnapshot],
        table: &XidTable,
        now: Tick,
        policy: &ChargePolicy,
    ) -> Vec<String> {
        for device in devices {
            self.see_errors(device, table, now, policy);
        }
        let find = |uuid: &str| devices.iter().find(|d| d.uuid == uuid);
        let mut again = Vec::new();
        self.charges.retain(|uuid, charge| {
            let device = find(uuid);
            let (away, well) = match device.map(|d| &d.health) {
                None | Some(DeviceHealth::Lost(_)) => (true, false),
                Some(DeviceHealth::Ok) => (false, true),
                Some(_) => (false, false),
            };
            let judged = device.and_then(|d| d.details.recovery_action);
            charge.was_away |= away;
            charge.was_judged |= judged.is_some_and(|action| action != 0);
            let errors = device.and_then(|d| d.details.ecc).map(|e| e.uncorrected);
            let quiet = judged.is_none_or(|action| action == 0);
            let was_reset = charge.was_away || charge.was_judged || errors.is_some_and(|n| n < charge.errors);
            let trusted = judged == Some(0) && now.since(charge.at) >= policy.trust;
            if charge.fate != Fate::Stay {
                charge.until = match (well && quiet && (was_reset || trusted), charge.until) {
                    (true, None) => Some(now + policy.probation),
                    (true, until) => until,
                    (false, _) => None,
                };
            }
            let over = charge.until.is_some_and(|until| until <= now);
            if over {
                again.push(uuid.clone());
            }
            !over
        });
        again
    }

    /// A device whose count of errors grew said so, whether or not anybody heard it.
    fn see_errors(&mut self, device: &DeviceSnapshot, table: &XidTable, now: Tick, policy: &ChargePolicy) {
        let Some(ecc) = device.details.ecc else { return };
        let before = self.errors.insert(device.uuid.clone(), ecc.uncorrected);
        let charged = self.charges.get(&device.uuid).is_some_and(|c| c.fate >= Fate::Drain);
        if before.is_some_and(|before| ecc.uncorrected > before) && !charged {
            self.hear(&device.uuid, Said::DoubleBitEcc, table, now, policy);
        }
    }

    /// Notes whether somebody's device is listed, and says whether it has been away for too long.
    pub fn gone(&mut self, uuid: &str, listed: bool, now: Tick, policy: &ChargePolicy) -> bool {
        if listed {
            self.missing.remove(uuid);
            return false;
        }
        now.since(*self.missing.entry(uuid.to_owned()).or_insert(now)) >= policy.gone_after
    }

    /// A person says that it is well. Says whether anything was held against it.
    pub fn acquit(&mut self, device: &str) -> bool {
        self.charges.remove(device).is_some()
    }

    /// When something ends by itself.
    #[must_use]
    pub fn next_end(&self) -> Option<Tick> {
        self.charges.values().filter_map(|c| c.until).min()
    }

    /// How a device stands: what its driver says now, or what it said once, whichever is worse.
    #[must_use]
    pub fn standing(&self, device: &DeviceSnapshot) -> Option<Standing> {
        let said = self.charges.get(&device.uuid).map(|c| Standing {
            fate: c.fate,
            why: match c.until {
                Some(_) if c.fate != Fate::Stay => format!("{}; it was reset and is on probation", c.why),
                _ => c.why.clone(),
            },
            verdict: if c.until.is_some() { Verdict::None } else { c.verdict },
        });
        said.into_iter().chain(now_told(device)).max_by_key(|s| (s.fate, s.verdict))
    }
}

fn words(number: u64) -> String {
    format!("XID {number}: {}", xid::meaning(number))
}

/// What the driver says of a device for as long as it holds.
fn now_told(device: &DeviceSnapshot) -> Option<Standing> {
    let standing = |fate, why: &str, verdict| Standing { fate, why: why.to_owned(), verdict };
    let remap = device.details.remap.unwrap_or_default();
    let judged = match device.details.recovery_action {
        None | Some(0) => None,
        Some(1) => Some(standing(Fate::Drain, "the driver says that it has to be reset", Verdict::ResetDevice)),
        Some(2) => Some(standing(Fate::End, "the driver says that the node has to be rebooted", Verdict::RebootNode)),
        Some(4) => Some(standing(Fate::Drain, "the driver says to drain and reset it", Verdict::ResetDevice)),
        Some(other) => {
            let why = format!("the driver asks for its recovery (action {other})");
            Some(standing(Fate::Stay, &why, Verdict::ResetDevice))
        }
    };
    let rows = if remap.failed {
        Some(standing(Fate::Drain, "no spare row is left for a bad one", Verdict::Replace))
    } else if remap.pending {
        Some(standing(Fate::Stay, "spare rows wait for a reset to take the place of bad ones", Verdict::ResetDevice))
    } else {
        None
    };
    let unusable = match &device.health {
        DeviceHealth::Fenced(why) => Some(standing(Fate::Drain, why, Verdict::ResetDevice)),
        _ => None,
    };
    unusable.into_iter().chain(judged).chain(rows).max_by_key(|s| (s.fate, s.verdict))
}

#[cfg(test)]
#[path = "charges/tests.rs"]
mod tests;
