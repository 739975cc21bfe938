//! Engines that do what a script says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::failure::Exit;
use pool_domain::liveness::{Signals, SlotWork, Work};
use pool_domain::meters::Reading;
use pool_domain::plan::EngineMemory;
use pool_domain::{Failure, FailureClass, Generation, ReplicaId, ReplicaKey};
use pool_services::ApiKey;
use pool_services::ports::{
    Endpoint, EngineHost, EngineProbe, EngineProvisioner, EngineRecord, Identity, Listener, NotAdmitted, NotAdopted,
    Observed, PrepareRequest, PreparedEngine, RunningEngine, Up, Worked,
};
use pool_services::spec::PoolSpec;
use tokio::sync::watch;
use tokio::time::Instant;

/// How engines behave, from the next launch on.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    /// Preflight fails with this.
    pub preflight: Option<Failure>,
    /// The launch fails with this.
    pub launch: Option<Failure>,
    /// Time until it serves.
    pub load: Duration,
    /// Whether it ever serves.
    pub serves: bool,
    /// Whether it decodes.
    pub decodes: bool,
    /// Model it says it serves; unset = the right one.
    pub model: Option<String>,
    /// Whose socket listens.
    pub listener: Listener,
    /// It crashes this long after its launch.
    pub crash_after: Option<Duration>,
    /// What it dies of, other than a crash.
    pub dies_of: Option<FailureClass>,
    /// Whether it ends when asked.
    pub obeys_term: bool,
    /// Whether something outlives its main process until it is killed.
    pub leaves_child: bool,
    /// Whether it can be killed at all.
    pub killable: bool,
    /// How its memory is known.
    pub memory: EngineMemory,
    /// Requests it says it works on; unset = it does not say.
    pub busy: Option<u16>,
    /// Whether what it says that it works on gets anywhere.
    pub progresses: bool,
    /// Whether it says so only of what has been decoded, not of prompts.
    pub coarse: bool,
    /// Whether it answers about its work at all.
    pub tells: bool,
    /// What it publishes in numbers; asked of the script, not of the launch.
    pub reading: Reading,
    /// It has no room for a unit of work.
    pub declines: bool,
    /// How long a unit of work takes.
    pub work_takes: Duration,
    /// What it says about its health, other than what it does.
    pub health: Option<Up>,
    /// How long an answer about health takes.
    pub health_takes: Duration,
    /// Ports that are taken.
    pub taken_ports: Vec<u16>,
    /// Whoever asks it to end meets a bug.
    pub panics: bool,
    /// Whether it gets an API key: `key-0`, `key-1`, ….
    pub keyed: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            preflight: None,
            launch: None,
            load: Duration::from_millis(100),
            serves: true,
            decodes: true,
            model: None,
            listener: Listener::Own,
            crash_after: None,
            dies_of: None,
            obeys_term: true,
            leaves_child: false,
            killable: true,
            memory: EngineMemory::Fixed(0),
            busy: Some(0),
            progresses: true,
            coarse: false,
            tells: true,
            reading: Reading::default(),
            declines: false,
            work_takes: Duration::ZERO,
            health: None,
            health_takes: Duration::ZERO,
            taken_ports: Vec::new(),
            panics: false,
            keyed: false,
        }
    }
}

/// What an engine that runs was made from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Whose it is.
    pub key: ReplicaKey,
    /// Of this start attempt.
    pub generation: Generation,
    /// What it serves.
    pub model: String,
    /// The arguments of its pool.
    pub args: Vec<String>,
    /// Its devices.
    pub mask: String,
}

/// One launched fake.
#[derive(Debug)]
struct FakeEngine {
    script: Script,
    began: Instant,
    pid: u32,
    nonce: String,
    is: Process,
    exit: watch::Sender<Option<Exit>>,
    gone: watch::Sender<bool>,
    terms: AtomicU64,
    kills: AtomicU64,
}

/// The engine ports, faked together because they speak of the same engines.
#[derive(Debug, Default)]
pub struct FakeEngines {
    script: Mutex<Script>,
    /// For engines of these models, instead.
    scripts: Mutex<BTreeMap<String, Script>>,
    /// For one launch of a replica with a model: which, counted from one.
    scripts_of_launches: Mutex<BTreeMap<(ReplicaId, String, u32), Script>>,
    launched: Mutex<BTreeMap<(ReplicaId, String), u32>>,
    by_addr: Mutex<BTreeMap<SocketAddr, Arc<FakeEngine>>>,
    launches: Mutex<Vec<(Instant, Generation)>>,
    count: AtomicU64,
    nonces: AtomicU64,
    keys: AtomicU64,
    asked: AtomicU64,
    worked: AtomicU64,
    steps: AtomicU64,
    unknown: Mutex<Vec<String>>,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeEngines {
    /// Changes the script for later launches and questions.
    pub fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut lock(&self.script));
    }

    /// Changes the script for engines of one model, which from then on is its own.
    pub fn script_of(&self, model: &str, change: impl FnOnce(&mut Script)) {
        let mut scripts = lock(&self.scripts);
        change(scripts.entry(model.to_owned()).or_insert_with(|| lock(&self.script).clone()));
    }

    /// Changes the script for the `nth` launch of a replica with a model alone, counted from one.
    pub fn script_of_launch(&self, replica: ReplicaId, model: &str, nth: u32, change: impl FnOnce(&mut Script)) {
        let mut scripts = lock(&self.scripts_of_launches);
        change(scripts.entry((replica, model.to_owned(), nth)).or_insert_with(|| self.script_for(model)));
    }

    fn script_of_next_launch(&self, replica: ReplicaId, model: &str) -> Script {
        let launch = (replica, model.to_owned());
        let nth = {
            let mut launched = lock(&self.launched);
            let nth = launched.entry(launch.clone()).or_default();
            *nth += 1;
            *nth
        };
        let script = lock(&self.scripts_of_launches).get(&(launch.0, launch.1, nth)).cloned();
        script.unwrap_or_else(|| self.script_for(model))
    }

    fn script_for(&self, model: &str) -> Script {
        lock(&self.scripts).get(model).cloned().unwrap_or_else(|| lock(&self.script).clone())
    }

    /// When launches happened and of which generation.
    #[must_use]
    pub fn launches(&self) -> Vec<(Instant, Generation)> {
        lock(&self.launches).clone()
    }

    fn at(&self, addr: SocketAddr) -> Option<Arc<FakeEngine>> {
        lock(&self.by_addr).get(&addr).filter(|e| e.exit.borrow().is_none()).cloned()
    }

    /// Units of work that were asked for, and those that were done.
    #[must_use]
    pub fn worked(&self) -> (u64, u64) {
        (self.asked.load(Ordering::Relaxed), self.worked.load(Ordering::Relaxed))
    }

    /// Ends every running main process, as SIGKILL from outside would.
    pub fn crash_all(&self) {
        for e in lock(&self.by_addr).values() {
            e.end(Exit::Signal(9));
        }
    }

    /// Whatever outlived an engine ends at last.
    pub fn leftovers_end(&self) {
        for e in lock(&self.by_addr).values() {
            e.gone.send_replace(true);
        }
    }

    /// Devices on which something that no record names is left from now on.
    pub fn leave_unknown_on(&self, devices: Vec<String>) {
        *lock(&self.unknown) = devices;
    }

    /// Pids of the engines that have not ended.
    #[must_use]
    pub fn running(&self) -> Vec<u32> {
        lock(&self.by_addr).values().filter(|e| e.exit.borrow().is_none()).map(|e| e.pid).collect()
    }

    /// The models of the engines that have not ended.
    #[must_use]
    pub fn models(&self) -> Vec<String> {
        lock(&self.by_addr).values().filter(|e| e.exit.borrow().is_none()).map(|e| e.is.model.clone()).collect()
    }

    /// The engines that have not ended.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let mut all: Vec<_> =
            lock(&self.by_addr).values().filter(|e| e.exit.borrow().is_none()).map(|e| e.is.clone()).collect();
        all.sort();
        all
    }

    /// TERM and KILL signals that engines have received so far.
    #[must_use]
    pub fn signals(&self) -> (u64, u64) {
        lock(&self.by_addr)
            .values()
            .fold((0, 0), |(t, k), e| (t + e.terms.load(Ordering::Relaxed), k + e.kills.load(Ordering::Relaxed)))
    }
}

impl FakeEngine {
    fn end(&self, exit: Exit) {
        self.exit.send_if_modified(|e| {
            let first = e.is_none();
            if first {
                *e = Some(exit);
            }
            first
        });
        if !self.script.leaves_child {
            self.gone.send_replace(true);
        }
    }
}

#[async_trait]
impl RunningEngine for FakeEngine {
    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }
    fn pids(&self) -> Vec<u32> {
        vec![self.pid]
    }
    async fn exited(&self) -> Failure {
        let mut exit = self.exit.subscribe();
        let crash = async {
            match self.script.crash_after {
                Some(d) => tokio::time::sleep_until(self.began + d).await,
                None => std::future::pending().await,
            }
        };
        let ended = async { exit.wait_for(Option::is_some).await.ok().and_then(|e| *e).unwrap_or(Exit::Unknown) };
        let exit = tokio::select! {
            exit = ended => exit,
            () = crash => { self.end(Exit::Code(1)); Exit::Code(1) }
        };
        match &self.script.dies_of {
            Some(class) => Failure::new(class.clone(), "as it was told"),
            None => Failure::crash(exit),
        }
    }
    async fn gone(&self) {
        let _ = self.gone.subscribe().wait_for(|g| *g).await;
    }
    fn terminate(&self) {
        self.terms.fetch_add(1, Ordering::Relaxed);
        assert!(!self.script.panics, "a bug on purpose");
        if self.script.obeys_term {
            self.end(Exit::Code(0));
        }
    }
    fn kill(&self) {
        self.kills.fetch_add(1, Ordering::Relaxed);
        assert!(!self.script.panics, "a bug on purpose");
        if self.script.killable {
            self.end(Exit::Signal(9));
            self.gone.send_replace(true);
        }
    }
    fn progress(&self) -> u64 {
        0
    }
    fn listener(&self, _: SocketAddr) -> Listener {
        self.script.listener
    }
    fn executable(&self) -> Option<String> {
        Some("/fake/engine".into())
    }
}

/// An engine that cannot be told from a stranger: no signal reaches it, and nothing proves its end.
#[derive(Debug)]
struct Stranger;

#[async_trait]
impl RunningEngine for Stranger {
    fn pid(&self) -> Option<u32> {
        None
    }
    fn pids(&self) -> Vec<u32> {
        Vec::new()
    }
    async fn exited(&self) -> Failure {
        std::future::pending().await
    }
    async fn gone(&self) {
        std::future::pending::<()>().await;
    }
    fn terminate(&self) {}
    fn kill(&self) {}
    fn progress(&self) -> u64 {
        0
    }
    fn listener(&self, _: SocketAddr) -> Listener {
        Listener::Foreign
    }
    fn executable(&self) -> Option<String> {
        None
    }
}

#[async_trait]
impl EngineProvisioner for FakeEngines {
    async fn preflight(&self, spec: &PoolSpec) -> Result<(), Failure> {
        self.script_for(&spec.model.model_id()).preflight.map_or(Ok(()), Err)
    }
    fn external(&self, _: &PoolSpec) -> Option<SocketAddr> {
        None
    }
    fn admits(&self, _: &PoolSpec) -> Result<(), NotAdmitted> {
        Ok(())
    }
    fn memory(&self, spec: &PoolSpec) -> EngineMemory {
        self.script_for(&spec.model.model_id()).memory
    }
    async fn prepare(&self, request: &PrepareRequest) -> Result<PreparedEngine, Failure> {
        let keyed = self.script_for(&request.model.id).keyed;
        Ok(PreparedEngine {
            entry: Some("/fake/engine".into()),
            args: request.spec.args.clone(),
            env: Vec::new(),
            endpoint: Endpoint {
                addr: request.listen,
                kind: "fake".into(),
                model: request.model.id.clone(),
                model_path: None,
                workload: request.spec.workload,
                api_key: keyed.then(|| ApiKey::new(format!("key-{}", self.keys.fetch_add(1, Ordering::Relaxed)))),
            },
            confinement: Default::default(),
            engine_version: "1".into(),
        })
    }
}

#[async_trait]
impl EngineHost for FakeEngines {
    fn port_free(&self, addr: SocketAddr) -> bool {
        !lock(&self.script).taken_ports.contains(&addr.port()) && self.at(addr).is_none()
    }
    async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure> {
        let script = self.script_of_next_launch(record.key.replica, &engine.endpoint.model);
        lock(&self.launches).push((Instant::now(), record.generation));
        if let Some(f) = script.launch {
            return Err(f);
        }
        let pid = u32::try_from(self.count.fetch_add(1, Ordering::Relaxed)).unwrap_or(u32::MAX);
        let fake = Arc::new(FakeEngine {
            script,
            began: Instant::now(),
            pid,
            nonce: record.nonce.clone(),
            is: Process {
                key: record.key.clone(),
                generation: record.generation,
                model: engine.endpoint.model.clone(),
                args: engine.args.clone(),
                mask: record.devices.to_cuda_visible_devices(),
            },
            exit: watch::Sender::new(None),
            gone: watch::Sender::new(false),
            terms: AtomicU64::new(0),
            kills: AtomicU64::new(0),
        });
        lock(&self.by_addr).insert(engine.endpoint.addr, Arc::clone(&fake));
        Ok(fake)
    }
    fn nonce(&self) -> String {
        format!("nonce-{}", self.nonces.fetch_add(1, Ordering::Relaxed))
    }
    async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted> {
        let why = |what: &str| Failure::new(FailureClass::Crash(Exit::Unknown), what);
        match lock(&self.by_addr).get(&record.endpoint.addr).cloned() {
            Some(engine) if engine.nonce == record.nonce => Ok(engine),
            Some(engine) if engine.exit.borrow().is_none() => {
                Err(NotAdopted { why: why("its nonce differs"), rest: Some(Arc::new(Stranger)) })
            }
            _ => Err(NotAdopted { why: why("nothing was launched"), rest: None }),
        }
    }
    async fn end_unknown(&self, _: &[EngineRecord], devices: &[String]) -> Vec<String> {
        lock(&self.unknown).iter().filter(|d| devices.contains(d)).cloned().collect()
    }
    fn device_clear(&self, device: &str) -> bool {
        !lock(&self.unknown).iter().any(|d| d == device)
    }
}

#[async_trait]
impl EngineProbe for FakeEngines {
    async fn up(&self, endpoint: &Endpoint) -> Up {
        let (takes, says) = {
            let script = lock(&self.script);
            (script.health_takes, script.health.clone())
        };
        tokio::time::sleep(takes).await;
        if let Some(says) = says {
            return says;
        }
        match self.at(endpoint.addr) {
            Some(e) if e.script.serves && e.began.elapsed() >= e.script.load => Up::Serving,
            Some(_) => Up::Loading(None),
            None => Up::Refused,
        }
    }
    async fn identify(&self, endpoint: &Endpoint) -> Result<Identity, Failure> {
        let said =
            self.at(endpoint.addr).and_then(|e| e.script.model.clone()).unwrap_or_else(|| endpoint.model.clone());
        if said == endpoint.model {
            Ok(Identity { model: said, slots: 4, version: None })
        } else {
            Err(Failure::new(FailureClass::WrongServer, format!("it serves {said}")))
        }
    }
    async fn work(&self, endpoint: &Endpoint) -> Result<Worked, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        // Asked of the script, not of the launch, so that a running engine can be told to hang.
        let Script { decodes, declines, work_takes, .. } = self.script_for(&endpoint.model);
        if declines {
            return Ok(Worked::Declined);
        }
        if !decodes || self.at(endpoint.addr).is_none() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(work_takes).await;
        self.worked.fetch_add(1, Ordering::Relaxed);
        Ok(Worked::Done)
    }
    async fn signals(&self, _: &Endpoint) -> Work {
        let Script { busy, progresses, coarse, tells, .. } = lock(&self.script).clone();
        if !tells {
            std::future::pending::<()>().await;
        }
        let Some(running) = busy.map(u32::from) else { return Work::Untold };
        let step = if progresses { self.steps.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let decoded = if coarse { 0 } else { 1 + step };
        let slots = (0..running).map(|slot| SlotWork { slot, task: u64::from(slot), prompt: 0, decoded }).collect();
        // As a kind that counts what it did for others and for the canary alike.
        let counters = vec![self.worked.load(Ordering::Relaxed)];
        Work::Told(Signals { running, waiting: 0, counters, slots, prefill_told: !coarse })
    }
    async fn observe(&self, endpoint: &Endpoint) -> Observed {
        let work = EngineProbe::signals(self, endpoint).await;
        Observed { work, reading: lock(&self.script).reading }
    }
}
