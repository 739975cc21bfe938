//! The independent record: what really happened on the simulated node, and what exists there now.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pool_domain::{Generation, PoolId, ReplicaKey};

use super::accused::Accused;

/// Something that really happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Since the node was switched on.
    pub at: Duration,
    /// What.
    pub what: What,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A step of the schedule begins.
    Step(String),
    /// A command is about to be given.
    Asking(PoolId, Verb),
    /// It was answered, with a yes or a no.
    Asked(PoolId, Verb, bool),
    /// The manager was started; how often before.
    Started(u32),
    /// It is told to leave its engines.
    Leaving,
    /// It is gone, and how.
    Down(Down),
    /// The machine was started anew.
    Rebooted,
    /// The state directory was deleted.
    Wiped,
    /// The records of a pool's engines were changed by somebody.
    Tampered(PoolId),
    /// A person says that nothing is left on a device.
    Unfenced(String),
    /// The driver reports an XID of a device.
    Said(String, u64),
    /// How a device is now.
    Device {
        /// Which.
        uuid: String,
        /// It may be used.
        well: bool,
        /// It is not there.
        away: bool,
    },
    /// Facts can be written at once, or not so.
    DiskWell(bool),
    /// What strangers hold of each device, where the driver tells.
    Foreign(Vec<(String, u64)>),
    /// Whether the engines of a pool hang.
    Hangs(PoolId, bool),
    /// From now on engines of this pool, or of all, may behave badly.
    Ill(Option<PoolId>),
    /// From now on they behave well again.
    Well(Option<PoolId>),
    /// A launch was asked of the host.
    Launching {
        /// For whom.
        key: ReplicaKey,
        /// Which attempt.
        generation: Generation,
        /// Its devices with the bytes promised there.
        devices: Vec<(String, u64)>,
    },
    /// It was refused, for something of an earlier engine is left.
    Refused(ReplicaKey, Generation),
    /// It brought nothing.
    LaunchFailed(ReplicaKey, Generation),
    /// It brought a process.
    Launched(Launch),
    /// A reload is to be asked for, with so much time for all of it.
    ReloadBy(PoolId, Duration),
    /// A pool is being brought into another form, or has been.
    Reloading(PoolId, bool),
    /// The daemon that asked for it has it.
    Answered(u32),
    /// A process said that it serves the right model.
    Identified(u32),
    /// A process finished one unit of work.
    Worked(u32),
    /// TERM was sent.
    Term(u32),
    /// KILL was sent.
    Kill(u32),
    /// The main process ended.
    Ended(u32),
    /// Nothing of it is left.
    Gone(u32),
    /// A slot was granted in process, and a request runs there.
    Granted(PoolId, u32),
    /// Such a request is done.
    Released(u32),
}

/// How a daemon goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// Killed.
    Killed,
    /// In order, engines and all.
    Stopped,
    /// In order; its engines live on.
    Left,
}

/// A process at its birth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Its name; never used twice.
    pub pid: u32,
    /// Whose it is.
    pub key: ReplicaKey,
    /// The start attempt.
    pub generation: Generation,
    /// Its devices, with the bytes it was promised on each.
    pub devices: Vec<(String, u64)>,
    /// Whether the generation was durable at that moment.
    pub durable: bool,
    /// Whether a stranger listens on its port: whatever becomes of it may be taken for that.
    pub foreign_listener: bool,
    /// Whether KILL will have no effect.
    pub unkillable: bool,
    /// What it serves.
    pub model: String,
    /// How late its end will be seen.
    pub exit_lag: Duration,
    /// Requests of others that it says it works on; unset = it does not say how busy it is.
    pub busy: Option<u16>,
}

impl Launch {
    /// What it was promised on a device.
    #[must_use]
    pub fn on(&self, uuid: &str) -> Option<u64> {
        self.devices.iter().find(|(u, _)| u == uuid).map(|(_, bytes)| *bytes)
    }
}

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Preload.
    Preload,
    /// A drain that ends in a stop at the latest after this; `stop` is one of zero.
    Force(Duration),
    /// A drain that may be given up.
    Abort(Duration),
    /// Resume.
    Resume,
    /// Breaker reset.
    Reset,
    /// Another form of a pool, or the one before.
    Reload,
    /// The removal of a pool.
    Remove,
    /// A pool that is not there yet.
    Declare,
    /// A lease of a pool that may rest.
    Demand,
    /// The end of the daemon.
    Shutdown,
}

impl Verb {
    /// Whether it may end an engine.
    #[must_use]
    pub fn ends(self) -> bool {
        matches!(self, Self::Force(_) | Self::Abort(_) | Self::Reload | Self::Remove | Self::Shutdown)
    }

    /// Whether a pool that was stopped may start engines after it.
    #[must_use]
    pub fn lifts_hold(self) -> bool {
        matches!(self, Self::Preload | Self::Resume | Self::Declare)
    }
}

/// One process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its birth.
    pub launch: Launch,
    /// When it was born.
    pub at: Duration,
    /// When its launch was asked for.
    pub began: Duration,
    /// When a daemon could first do something about it.
    pub known: Option<Duration>,
    /// It said that it serves the right model.
    pub identified: bool,
    /// It finished a unit of work, and when first.
    pub worked: Option<Duration>,
    /// The same, and when last.
    pub worked_last: Option<Duration>,
    /// Requests that it works on, and when there last were any.
    pub requests: u32,
    /// When it last had a request.
    pub busy_until: Option<Duration>,
    /// When its pool was first told to end its engines.
    pub told: Option<Duration>,
    /// A person said that nothing is left of it, or that it is on no record any more.
    pub disowned: bool,
    /// It is not as it is recorded.
    pub forged: bool,
    /// TERM or KILL was sent, and when first.
    pub signalled: Option<Duration>,
    /// Its main process ended.
    pub ended: Option<Duration>,
    /// Nothing of it is left.
    pub gone: Option<Duration>,
    /// Nothing that might excuse its end has happened to it: no fault, no command.
    pub blameless: bool,
}

/// What a write takes on a disk that is well, with whatever leads to it.
const SHORTLY: Duration = Duration::from_millis(200);
/// Nothing is tried again later than this.
const TRIED_AGAIN: Duration = Duration::from_secs(8);

/// What exists, replayed from the record alone.
#[derive(Debug, Clone)]
pub struct Scene {
    /// Every process ever.
    pub processes: BTreeMap<u32, Process>,
    /// Whose engines may behave badly; `None` stands for all.
    pub ill: BTreeSet<Option<PoolId>>,
    began: BTreeMap<ReplicaKey, Duration>,
    /// When engines were last made well.
    cured: BTreeMap<Option<PoolId>, Duration>,
    /// When each pool was last told to end its engines.
    told_to_end: BTreeMap<PoolId, Duration>,
    /// Pools whose hold was lifted, which is not written down yet for all that is known.
    lifting: BTreeSet<PoolId>,
    /// Pools with a drain that may be given up, or was.
    given_up: BTreeSet<PoolId>,
    /// Pools that are being brought into another form, for all that is known.
    pub reloading: BTreeSet<PoolId>,
    /// The last daemon went with something unwritten, for all that is known.
    unwritten: bool,
    /// Since when facts can be written at once; never unset but at times.
    disk_well: Option<Duration>,
    /// Since when the daemon is gone, if it is.
    pub down: Option<Duration>,
    /// When it was started last.
    pub up: Duration,
    /// It leaves its engines: what it shows is what it saw last.
    pub leaving: bool,
    /// What was said of devices.
    pub accused: Accused,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            processes: BTreeMap::new(),
            ill: BTreeSet::new(),
            began: BTreeMap::new(),
            cured: BTreeMap::new(),
            told_to_end: BTreeMap::new(),
            lifting: BTreeSet::new(),
            given_up: BTreeSet::new(),
            reloading: BTreeSet::new(),
            unwritten: false,
            disk_well: Some(Duration::ZERO),
            down: None,
            up: Duration::ZERO,
            leaving: false,
            accused: Accused::default(),
        }
    }
}

impl Scene {
    /// Processes of which something exists.
    pub fn alive(&self) -> impl Iterator<Item = &Process> {
        self.processes.values().filter(|p| p.gone.is_none())
    }

    fn blame(&mut self, pool: Option<&PoolId>) {
        for p in self.processes.values_mut() {
            if pool.is_none_or(|pool| p.launch.key.pool == *pool) {
                p.blameless = false;
            }
        }
    }

    /// Whether all that was known before `when` is written down: at once on a disk that is well; once it is well again,
    /// after the longest pause between two tries.
    #[must_use]
    pub fn written(&self, when: Duration, now: Duration) -> bool {
        let since = |well: Duration| if well < when { when + SHORTLY } else { well.max(when) + TRIED_AGAIN };
        self.disk_well.is_some_and(|well| now > since(well))
    }

    /// Whether facts can be written at once.
    #[must_use]
    pub fn disk_well(&self) -> bool {
        self.disk_well.is_some()
    }

    /// Whether a drain that may be given up may be all that this daemon knows of a later one that may not.
    #[must_use]
    pub fn may_give_up(&self, pool: &PoolId) -> bool {
        self.unwritten && self.given_up.contains(pool)
    }

    /// Takes in what happened.
    pub fn saw(&mut self, Entry { at, what }: &Entry) {
        let at = *at;
        match what {
            What::Ill(pool) => {
                self.ill.insert(pool.clone());
                self.blame(pool.as_ref());
            }
            What::Well(pool) if self.ill.remove(pool) => {
                self.cured.insert(pool.clone(), at);
            }
            What::Reloading(pool, true) => {
                self.blame(Some(pool));
                self.reloading.insert(pool.clone());
            }
            What::Reloading(pool, false) => {
                self.blame(Some(pool));
                self.reloading.remove(pool);
            }
            What::Asking(pool, verb) | What::Asked(pool, verb, _) if verb.ends() => {
                self.blame(Some(pool));
                if *verb == Verb::Reload {
                    self.reloading.insert(pool.clone());
                }
                if matches!(verb, Verb::Abort(_)) {
                    self.given_up.insert(pool.clone());
                }
                self.told_to_end.insert(pool.clone(), at);
                for p in self.processes.values_mut().filter(|p| p.launch.key.pool == *pool) {
                    p.told = p.told.or(Some(at));
                }
            }
            What::Asking(pool, verb) if verb.lifts_hold() => {
                self.given_up.remove(pool);
                self.lifting.insert(pool.clone());
            }
            What::Asked(pool, verb, true) if verb.lifts_hold() && self.written(Duration::ZERO, at) => {
                self.lifting.remove(pool);
            }
            What::Said(uuid, xid) if self.accused.said(uuid, *xid, at) => {
                for p in self.processes.values_mut().filter(|p| p.launch.on(uuid).is_some()) {
                    p.blameless = false;
                }
            }
            What::Device { uuid, well, away } => self.accused.stands(uuid, *well, *away, self.down.is_none(), at),
            What::DiskWell(true) => self.disk_well = self.disk_well.or(Some(at)),
            What::DiskWell(false) => self.disk_well = None,
            What::Leaving => self.leaving = true,
            What::Down(_) => {
                self.down = Some(at);
                let lifting = std::mem::take(&mut self.lifting);
                self.unwritten = !self.written(Duration::ZERO, at);
                let mut accused = std::mem::take(&mut self.accused);
                accused.down(|when| self.written(when, at));
                self.accused = accused;
                // The next daemon may find the hold that was lifted.
                if self.unwritten {
                    lifting.iter().for_each(|pool| self.blame(Some(pool)));
                }
                // A drain that was given up leaves an engine that serves, and a hold, which the next daemon follows.
                self.given_up.clone().iter().for_each(|pool| self.blame(Some(pool)));
            }
            What::Started(_) => {
                (self.down, self.up, self.leaving) = (None, at, false);
                self.processes.values_mut().for_each(|p| p.known = p.known.or(Some(at)));
            }
            What::Answered(pid) => self.with(*pid, |p| p.known = Some(at)),
            What::Rebooted => {
                self.accused = Accused::default();
                for p in self.processes.values_mut() {
                    (p.ended, p.gone, p.requests) = (p.ended.or(Some(at)), p.gone.or(Some(at)), 0);
                }
            }
            What::Wiped => {
                self.accused.forgotten();
                self.blame(None);
                self.processes.values_mut().for_each(|p| p.disowned |= p.gone.is_none());
            }
            What::Tampered(pool) => {
                self.blame(Some(pool));
                for p in self.processes.values_mut().filter(|p| p.launch.key.pool == *pool) {
                    p.forged |= p.gone.is_none();
                }
            }
            What::Unfenced(uuid) => {
                self.accused.acquitted(uuid);
                self.processes.values_mut().for_each(|p| p.disowned |= p.gone.is_none() && p.launch.on(uuid).is_some());
            }
            What::Launching { key, .. } => {
                self.began.insert(key.clone(), at);
            }
            What::Launched(launch) => self.born(launch, at),
            What::Identified(pid) => self.with(*pid, |p| p.identified = true),
            What::Worked(pid) => {
                self.with(*pid, |p| (p.worked, p.worked_last) = (p.worked.or(Some(at)), Some(at)));
            }
            What::Granted(_, pid) => self.with(*pid, |p| p.requests += 1),
            What::Released(pid) => {
                self.with(*pid, |p| (p.requests, p.busy_until) = (p.requests.saturating_sub(1), Some(at)));
            }
            What::Term(pid) | What::Kill(pid) => self.with(*pid, |p| p.signalled = p.signalled.or(Some(at))),
            What::Ended(pid) => self.with(*pid, |p| {
                p.busy_until = if p.requests > 0 { Some(at) } else { p.busy_until };
                (p.ended, p.requests) = (p.ended.or(Some(at)), 0);
            }),
            What::Gone(pid) => self.with(*pid, |p| p.gone = p.gone.or(Some(at))),
            _ => {}
        }
    }

    fn born(&mut self, launch: &Launch, at: Duration) {
        let (pool, began) = (&launch.key.pool, self.began.get(&launch.key).copied().unwrap_or(at));
        let told = self.told_to_end.get(pool).filter(|told| **told >= began).copied();
        let since = |whose: &Option<PoolId>| self.cured.get(whose).is_some_and(|cured| *cured >= began);
        let ill = [None, Some(pool.clone())].iter().any(|whose| self.ill.contains(whose) || since(whose));
        let ill = ill || launch.devices.iter().any(|(uuid, _)| self.accused.may_end(uuid, began));
        let process = Process {
            began,
            launch: launch.clone(),
            at,
            known: None,
            identified: false,
            worked: None,
            worked_last: None,
            requests: 0,
            busy_until: None,
            told,
            disowned: false,
            forged: false,
            signalled: None,
            ended: None,
            gone: None,
            blameless: told.is_none() && !ill && !self.reloading.contains(pool),
        };
        self.processes.insert(launch.pid, process);
    }

    fn with(&mut self, pid: u32, change: impl FnOnce(&mut Process)) {
        if let Some(p) = self.processes.get_mut(&pid) {
            change(p);
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>11.3} s  ", self.at.as_secs_f64())?;
        match &self.what {
            What::Step(step) => write!(f, "-- {step}"),
            What::Asking(pool, verb) => write!(f, "asking {pool}: {verb:?}"),
            What::Asked(pool, verb, ok) => write!(f, "answered {pool}: {verb:?} {}", if *ok { "yes" } else { "no" }),
            What::Started(life) => write!(f, "manager {life} starts"),
            What::Leaving => f.write_str("the manager is to leave its engines"),
            What::Down(how) => write!(f, "the manager is gone: {how:?}"),
            What::Rebooted => f.write_str("the machine was started anew"),
            What::Wiped => f.write_str("the state directory was deleted"),
            What::Tampered(pool) => write!(f, "the records of {pool} were forged"),
            What::Unfenced(uuid) => write!(f, "a person says that nothing is left on {uuid}"),
            What::Said(uuid, xid) => write!(f, "the driver reports XID {xid} of {uuid}"),
            What::Device { uuid, well, away } => write!(f, "{uuid}: well {well}, away {away}"),
            What::DiskWell(yes) => write!(f, "the disk is well: {yes}"),
            What::Foreign(of) => write!(f, "strangers hold {of:?}"),
            What::Hangs(pool, yes) => write!(f, "engines of {pool} hang: {yes}"),
            What::Refused(key, g) => write!(f, "launch of {key} generation {} refused: its lock is held", g.0),
            What::Released(pid) => write!(f, "a request on process {pid} is done"),
            What::Ill(pool) => write!(f, "ill: {}", pool.as_ref().map_or("all", PoolId::as_str)),
            What::Well(pool) => write!(f, "well: {}", pool.as_ref().map_or("all", PoolId::as_str)),
            What::Launching { key, generation, .. } => write!(f, "launch of {key} generation {} begins", generation.0),
            What::LaunchFailed(key, g) => write!(f, "launch of {key} generation {} failed", g.0),
            What::Launched(l) => {
                write!(f, "process {} of {} generation {} on {:?}", l.pid, l.key, l.generation.0, l.devices)
            }
            What::ReloadBy(pool, by) => write!(f, "{pool} is to be reloaded within {by:?}"),
            What::Reloading(pool, yes) => write!(f, "{pool} is being reloaded: {yes}"),
            What::Answered(pid) => write!(f, "process {pid} is known"),
            What::Identified(pid) => write!(f, "process {pid} named its model"),
            What::Worked(pid) => write!(f, "process {pid} did one unit of work"),
            What::Term(pid) => write!(f, "TERM to process {pid}"),
            What::Kill(pid) => write!(f, "KILL to process {pid}"),
            What::Ended(pid) => write!(f, "main process {pid} ended"),
            What::Gone(pid) => write!(f, "nothing is left of process {pid}"),
            What::Granted(pool, pid) => write!(f, "slot of {pool} granted on process {pid}"),
        }
    }
}
