//! The independent record: what really happened on the simulated node, and what exists there now.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pool_domain::{Generation, PoolId, ReplicaKey};

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
    /// Facts can be written or not.
    Writable(bool),
    /// From now on engines of this pool, or of all, may behave badly.
    Ill(Option<PoolId>),
    /// From now on they behave well again.
    Well(Option<PoolId>),
    /// A launch was asked of the host.
    Launching(ReplicaKey, Generation),
    /// It brought nothing.
    LaunchFailed(ReplicaKey, Generation),
    /// It brought a process.
    Launched(Launch),
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
    /// A slot was granted in process.
    Granted(PoolId, u32),
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
    /// Its devices.
    pub devices: Vec<String>,
    /// Bytes on each of them that it was promised.
    pub bytes: u64,
    /// Whether the generation was durable at that moment.
    pub durable: bool,
    /// Whether a stranger listens on its port: whatever becomes of it may be taken for that.
    pub foreign_listener: bool,
    /// Whether KILL will have no effect.
    pub unkillable: bool,
    /// How late its end will be seen.
    pub exit_lag: Duration,
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
    /// A lease of a pool that may rest.
    Demand,
    /// The end of the daemon.
    Shutdown,
}

impl Verb {
    /// Whether it may end an engine.
    #[must_use]
    pub fn ends(self) -> bool {
        matches!(self, Self::Force(_) | Self::Abort(_) | Self::Shutdown)
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
    /// It said that it serves the right model.
    pub identified: bool,
    /// It finished a unit of work, and when first.
    pub worked: Option<Duration>,
    /// TERM or KILL was sent, and when first.
    pub signalled: Option<Duration>,
    /// Its main process ended.
    pub ended: Option<Duration>,
    /// Nothing of it is left.
    pub gone: Option<Duration>,
    /// Nothing that might excuse its end has happened to it: no fault, no command.
    pub blameless: bool,
}

/// What exists, replayed from the record alone.
#[derive(Debug, Clone, Default)]
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
            What::Asking(pool, verb) | What::Asked(pool, verb, _) if verb.ends() => {
                self.blame(Some(pool));
                self.told_to_end.insert(pool.clone(), at);
            }
            What::Launching(key, _) => {
                self.began.insert(key.clone(), at);
            }
            What::Launched(launch) => {
                let (pool, began) = (&launch.key.pool, self.began.get(&launch.key).copied().unwrap_or(at));
                let told = self.told_to_end.get(pool).is_some_and(|told| *told >= began);
                let since = |whose: &Option<PoolId>| self.cured.get(whose).is_some_and(|cured| *cured >= began);
                let ill = [None, Some(pool.clone())].iter().any(|whose| self.ill.contains(whose) || since(whose));
                let blameless = !told && !ill;
                let process = Process {
                    began,
                    launch: launch.clone(),
                    at,
                    identified: false,
                    worked: None,
                    signalled: None,
                    ended: None,
                    gone: None,
                    blameless,
                };
                self.processes.insert(launch.pid, process);
            }
            What::Identified(pid) => self.with(*pid, |p| p.identified = true),
            What::Worked(pid) => self.with(*pid, |p| p.worked = p.worked.or(Some(at))),
            What::Term(pid) | What::Kill(pid) => self.with(*pid, |p| p.signalled = p.signalled.or(Some(at))),
            What::Ended(pid) => self.with(*pid, |p| p.ended = p.ended.or(Some(at))),
            What::Gone(pid) => self.with(*pid, |p| p.gone = p.gone.or(Some(at))),
            _ => {}
        }
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
            What::Writable(yes) => write!(f, "facts can be written: {yes}"),
            What::Ill(pool) => write!(f, "ill: {}", pool.as_ref().map_or("all", PoolId::as_str)),
            What::Well(pool) => write!(f, "well: {}", pool.as_ref().map_or("all", PoolId::as_str)),
            What::Launching(key, g) => write!(f, "launch of {key:?} generation {} begins", g.0),
            What::LaunchFailed(key, g) => write!(f, "launch of {key:?} generation {} failed", g.0),
            What::Launched(l) => {
                write!(f, "process {} of {:?} generation {} on {:?}", l.pid, l.key, l.generation.0, l.devices)
            }
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
