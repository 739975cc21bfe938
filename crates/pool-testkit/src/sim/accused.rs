//! What drivers say of devices, as it really was; and that nothing starts on one that has to be reset.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pool_domain::charges::ChargePolicy;
use pool_domain::xid::XidAction;

use super::checks::{Invariant, PREPARED_WITHIN};
use super::schedule::Schedule;
use super::truth::{Entry, Scene, What};

/// A device that leaves for a shorter time may leave unseen.
const SEEN: Duration = Duration::from_millis(10);
/// By how much a probation may end earlier than it is thought here that it began.
const SLACK: Duration = Duration::from_secs(1);

/// What was said of a device.
#[derive(Debug, Clone)]
struct Accusation {
    action: XidAction,
    at: Duration,
    /// Since when it is away, if it is.
    away: Option<Duration>,
    /// It was away since, and a daemon saw it.
    was_reset: bool,
    /// Since when it is well.
    well: Option<Duration>,
}

/// What was said of devices, for all that a daemon must know of it.
#[derive(Debug, Clone, Default)]
pub struct Accused {
    accusations: BTreeMap<String, Accusation>,
    /// Engines there may be ended for it, also by a daemon that knows more than is thought here.
    tainted: BTreeSet<String>,
    /// When engines on a device were last to be ended, and to start again.
    restarted: BTreeMap<String, Duration>,
    unwell: BTreeSet<String>,
}

impl Accused {
    /// Whether an engine that was launched there may be ended for what was said.
    #[must_use]
    pub fn may_end(&self, uuid: &str, now: Duration) -> bool {
        let restarted = self.restarted.get(uuid).is_some_and(|at| now < *at + PREPARED_WITHIN);
        restarted || self.tainted.contains(uuid)
    }

    /// Devices that somebody has to reset, for all that is known.
    pub fn to_reset(&self) -> impl Iterator<Item = &str> {
        self.tainted.iter().map(String::as_str)
    }

    /// The XID was said. Tells whether engines there may be ended for it.
    pub(super) fn said(&mut self, uuid: &str, xid: u64, at: Duration) -> bool {
        self.accusations.retain(|_, a| !a.is_over(at));
        let action = XidAction::by_catalogue(xid);
        match action {
            XidAction::Ignore => return false,
            XidAction::RestartEngine => {
                self.restarted.insert(uuid.to_owned(), at);
                return true;
            }
            XidAction::Suspect => {}
            XidAction::Drain | XidAction::Lost => {
                self.tainted.insert(uuid.to_owned());
            }
        }
        let worse = |old: &Accusation| rank(old.action) > rank(action);
        if !self.accusations.get(uuid).is_some_and(worse) {
            let well = (!self.unwell.contains(uuid)).then_some(at);
            let accusation = Accusation { action, at, away: None, was_reset: false, well };
            self.accusations.insert(uuid.to_owned(), accusation);
        }
        action != XidAction::Suspect
    }

    /// How a device is now. `up`: there is a daemon that sees it.
    pub(super) fn stands(&mut self, uuid: &str, well: bool, away: bool, up: bool, at: Duration) {
        self.accusations.retain(|_, a| !a.is_over(at));
        if well {
            self.unwell.remove(uuid)
        } else {
            self.unwell.insert(uuid.to_owned())
        };
        let Some(a) = self.accusations.get_mut(uuid) else { return };
        a.was_reset |= a.away.is_some_and(|since| at >= since + SEEN);
        a.away = if away && up { a.away.or(Some(at)) } else { None };
        a.well = if well { a.well.or(Some(at)) } else { None };
    }

    /// A person says that it is well.
    pub(super) fn acquitted(&mut self, uuid: &str) {
        self.accusations.remove(uuid);
    }

    /// What is not written down goes with the daemon; one that is away may be back before the next looks.
    pub(super) fn down(&mut self, written: impl Fn(Duration) -> bool) {
        self.accusations.retain(|_, a| written(a.at));
        self.accusations.values_mut().for_each(|a| a.away = None);
    }

    /// The state directory is gone.
    pub(super) fn forgotten(&mut self) {
        self.accusations.clear();
    }

    fn forbids(&self, uuid: &str, now: Duration) -> Option<&Accusation> {
        self.accusations.get(uuid).filter(|a| now > a.at + PREPARED_WITHIN && !a.is_over(now + SLACK))
    }
}

impl Accusation {
    fn is_over(&self, now: Duration) -> bool {
        let policy = ChargePolicy::default();
        match self.action {
            XidAction::Suspect => now >= self.at + policy.suspicion,
            _ => self.was_reset && self.well.is_some_and(|since| now >= since + policy.probation),
        }
    }
}

fn rank(action: XidAction) -> usize {
    XidAction::ALL.iter().position(|a| *a == action).unwrap_or(0)
}

/// Nothing starts on a device that has to be reset, or that is left alone for a while, once that was said; and it is used
/// again only a probation after something showed that it was.
#[derive(Debug)]
pub(super) struct NothingStartsOnTheAccused;
impl Invariant for NothingStartsOnTheAccused {
    fn name(&self) -> &'static str {
        "nothing_starts_on_the_accused"
    }
    fn saw(&mut self, entry: &Entry, scene: &Scene, _: &Schedule) -> Result<(), String> {
        let What::Launching { key, devices, .. } = &entry.what else { return Ok(()) };
        match devices.iter().find_map(|(uuid, _)| scene.accused.forbids(uuid, entry.at).map(|a| (uuid, a))) {
            Some((uuid, a)) => Err(format!("{key} starts on {uuid}, of which it was said: {a:?}")),
            None => Ok(()),
        }
    }
}
