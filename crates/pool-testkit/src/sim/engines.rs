//! The engine ports of the simulated node, and its models.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::failure::Exit;
use pool_domain::liveness::{Signals, SlotWork, Work};
use pool_domain::plan::EngineMemory;
use pool_domain::{Failure, FailureClass, KvShape, LayerProfile, ModelFormat, ModelProfile, ModelRef};
use pool_services::ports::{
    Endpoint, EngineHost, EngineProbe, EngineProvisioner, EngineRecord, Identity, Listener, ModelStore, NotAdmitted,
    NotAdopted, Phase, PrepareRequest, PreparedEngine, Presence, ResolvedModel, RunningEngine, StagingTold, Up, Worked,
};
use pool_services::spec::PoolSpec;
use tokio::sync::watch;

use super::Plant;
use super::script::Script;
use super::truth::{Launch, What};
use super::world::{Engine, Event, Inner, World};

/// The first pid; far from 0 so that nothing is right by accident.
const FIRST_PID: u32 = 1_000;
/// Engines of this model do not start until somebody helps; those of the others of a pool do.
const BAD: &str = "m2";
/// How long the host waits for what it ends before anything is launched.
const SHORTLY: Duration = Duration::from_secs(5);

/// An engine as a daemon has it.
#[derive(Debug)]
struct Handle {
    world: Arc<World>,
    at: usize,
    pid: u32,
    /// Whether it is certainly the one, or at least what is left can be ended.
    certain: bool,
    reached: bool,
}

impl Handle {
    fn with<T>(&self, look: impl FnOnce(&Engine) -> T) -> T {
        look(&self.world.lock().engines[self.at])
    }
}

impl World {
    fn handle(&self, at: usize, certain: bool) -> Option<Arc<dyn RunningEngine>> {
        let (world, pid) = (self.me.upgrade()?, self.lock().engines.get(at)?.launch.pid);
        let reached = certain || world.cgroups;
        Some(Arc::new(Handle { world, at, pid, certain, reached }))
    }

    /// `reached`: what is left of it can be told from strangers.
    fn kill(&self, inner: &mut Inner, at: usize, reached: bool) {
        if reached || inner.helped {
            let pid = inner.engines[at].launch.pid;
            self.put(inner, What::Kill(pid));
        }
        let ends = reached && !inner.engines[at].script.unkillable || inner.helped;
        if !ends {
            inner.engines[at].doomed = true;
        } else {
            self.end(inner, at, Failure::crash(Exit::Signal(9)));
            self.go(inner, at);
        }
    }

    fn born(&self, record: &EngineRecord, addr: SocketAddr, script: &Script, durable: bool) -> usize {
        let mut inner = self.lock();
        let at = inner.engines.len();
        let launch = Launch {
            pid: FIRST_PID + u32::try_from(at).unwrap_or(u32::MAX - FIRST_PID),
            key: record.key.clone(),
            generation: record.generation,
            devices: record.devices.uuids.iter().cloned().zip(record.bytes.iter().copied()).collect(),
            durable,
            foreign_listener: script.foreign_listener,
            unkillable: script.unkillable,
            model: record.endpoint.model.clone(),
            exit_lag: script.exit_lag,
            busy: script.busy,
        };
        let began = inner.now();
        inner.engines.push(Engine {
            launch: launch.clone(),
            addr,
            nonce: record.nonce.clone(),
            script: script.clone(),
            began,
            ended: false,
            doomed: false,
            left: false,
            returned: false,
            requests: 0,
            exit: watch::Sender::new(None),
            gone: watch::Sender::new(false),
        });
        self.put(&mut inner, What::Launched(launch));
        self.tell_gpus(&mut inner);
        if let Some(after) = script.dies_after {
            self.after(&mut inner, after, Event::End(at, script.death.clone()));
        }
        at
    }
}

#[async_trait]
impl RunningEngine for Handle {
    fn pid(&self) -> Option<u32> {
        self.certain.then_some(self.pid)
    }
    fn pids(&self) -> Vec<u32> {
        self.pid().into_iter().collect()
    }
    async fn exited(&self) -> Failure {
        let mut exit = self.with(|e| e.exit.subscribe());
        let seen = exit.wait_for(Option::is_some).await.ok().and_then(|f| f.clone());
        seen.unwrap_or_else(|| Failure::crash(Exit::Unknown))
    }
    async fn gone(&self) {
        let mut gone = self.with(|e| e.gone.subscribe());
        let _ = gone.wait_for(|g| *g).await;
    }
    fn terminate(&self) {
        if !self.certain {
            return;
        }
        let mut inner = self.world.lock();
        self.world.put(&mut inner, What::Term(self.pid));
        let script = &inner.engines[self.at].script;
        if let (Some(takes), false) = (script.term_takes, script.unkillable) {
            self.world.after(&mut inner, takes, Event::End(self.at, Failure::crash(Exit::Code(0))));
        }
    }
    fn kill(&self) {
        let mut inner = self.world.lock();
        self.world.kill(&mut inner, self.at, self.reached);
    }
    fn progress(&self) -> u64 {
        let now = self.world.now();
        let (progresses, began, load, ended) = self.with(|e| (e.script.progresses, e.began, e.script.load, e.ended));
        let seconds = now.saturating_sub(began).min(load.max(Duration::from_secs(1))).as_secs();
        if progresses && !ended { seconds } else { 0 }
    }
    fn listener(&self, _: SocketAddr) -> Listener {
        match self.with(|e| (e.script.foreign_listener || !self.certain, e.ended)) {
            (true, _) => Listener::Foreign,
            (false, true) => Listener::None,
            (false, false) => Listener::Own,
        }
    }
    fn executable(&self) -> Option<String> {
        self.certain.then(|| "/sim/engine".into())
    }
    fn answers_at_once(&self) -> bool {
        true
    }
}

#[async_trait]
impl EngineProvisioner for World {
    async fn preflight(&self, spec: &PoolSpec) -> Result<(), Failure> {
        self.call().await;
        self.script_of(&spec.id).and_then(|s| s.preflight).map_or(Ok(()), Err)
    }
    fn external(&self, _: &PoolSpec) -> Option<SocketAddr> {
        None
    }
    fn admits(&self, _: &PoolSpec) -> Result<(), NotAdmitted> {
        Ok(())
    }
    fn memory(&self, spec: &PoolSpec) -> EngineMemory {
        self.memory_of(&spec.id)
    }
    async fn prepare(&self, request: &PrepareRequest) -> Result<PreparedEngine, Failure> {
        self.call().await;
        if self.script_of(&request.spec.id).is_some_and(|s| s.port_stolen) {
            self.lock().taken_ports.insert(request.listen.port());
        }
        Ok(PreparedEngine {
            entry: Some("/sim/engine".into()),
            args: Vec::new(),
            env: Vec::new(),
            confinement: Default::default(),
            endpoint: Endpoint {
                addr: request.listen,
                kind: "sim".into(),
                model: request.model.id.clone(),
                model_path: None,
                workload: request.spec.workload,
                api_key: None,
            },
            engine_version: "1".into(),
        })
    }
}

#[async_trait]
impl EngineHost for World {
    fn port_free(&self, addr: SocketAddr) -> bool {
        let taken = self.lock().taken_ports.contains(&addr.port());
        !taken && self.at(addr).is_none() && self.plant != Plant::PortsNeverFree
    }
    fn nonce(&self) -> String {
        let mut inner = self.lock();
        inner.nonces += 1;
        format!("nonce-{}", inner.nonces)
    }
    async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure> {
        let (key, generation) = (&record.key, record.generation);
        let gone = || Failure::crash(Exit::Unknown);
        let script = self.script_of(&key.pool).ok_or_else(gone)?;
        let devices: Vec<_> = record.devices.uuids.iter().cloned().zip(record.bytes.iter().copied()).collect();
        self.record(What::Launching { key: key.clone(), generation, devices });
        let durable = self.durable(record);
        self.call().await;
        // As the lock of the replica would have it.
        if self.lock().engines.iter().any(|e| !e.left && e.launch.key == *key) {
            self.record(What::Refused(key.clone(), generation));
            return Err(Failure::new(FailureClass::Crash(Exit::Unknown), "its lock is held"));
        }
        // Born at once or in the end: the daemon may die in between.
        let bad = engine.endpoint.model == BAD && !self.lock().helped;
        let early = self.lock().rng.bool() && script.launch.is_none() && !bad;
        let born = early.then(|| self.born(record, engine.endpoint.addr, &script, durable));
        self.call().await;
        tokio::time::sleep(script.launch_takes).await;
        let at = if let Some(at) = born {
            at
        } else {
            // It is born as its pool is now.
            let script = self.script_of(&key.pool).ok_or_else(gone)?;
            if let Some(failure) = script.launch.clone().or_else(|| bad.then(gone)) {
                self.record(What::LaunchFailed(key.clone(), generation));
                return Err(failure);
            }
            self.born(record, engine.endpoint.addr, &script, durable)
        };
        self.call().await;
        let pid = self.lock().engines[at].launch.pid;
        self.record(What::Answered(pid));
        self.handle(at, true).ok_or_else(gone)
    }
    async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted> {
        self.call().await;
        let (exact, of_replica) = {
            let inner = self.lock();
            (
                inner.engines.iter().position(|e| e.nonce == record.nonce && e.began >= inner.booted()),
                inner.engines.iter().rposition(|e| !e.left && e.launch.key == record.key),
            )
        };
        let lies = match self.plant {
            Plant::AdoptsNothing => true,
            Plant::FenceForgotten => record.phase == Phase::Stopping,
            _ => false,
        };
        let why = |what: &str| Failure::new(FailureClass::Crash(Exit::Unknown), what);
        if let Some(found) = exact.filter(|_| !lies).and_then(|at| self.handle(at, true)) {
            return Ok(found);
        }
        let rest = of_replica.filter(|_| !lies).and_then(|at| self.handle(at, false));
        Err(NotAdopted { why: why("it is not what is on record"), rest })
    }
    async fn end_unknown(&self, known: &[EngineRecord], devices: &[String]) -> Vec<String> {
        self.call().await;
        if matches!(self.plant, Plant::AdoptsNothing | Plant::FenceForgotten) {
            return Vec::new();
        }
        let unknown: Vec<usize> = {
            let mut inner = self.lock();
            let strange = |e: &Engine| !e.left && !known.iter().any(|r| r.key == e.launch.key);
            let unknown: Vec<usize> = (0..inner.engines.len()).filter(|i| strange(&inner.engines[*i])).collect();
            for at in &unknown {
                self.kill(&mut inner, *at, self.cgroups);
            }
            unknown
        };
        let left = |at: &&usize| !self.lock().engines[**at].left;
        if unknown.iter().any(|at| left(&at)) {
            tokio::time::sleep(SHORTLY).await;
        }
        let held: Vec<usize> = unknown.iter().filter(left).copied().collect();
        let inner = self.lock();
        let on = |uuid: &&String| held.iter().any(|at| inner.engines[*at].launch.on(uuid).is_some());
        devices.iter().filter(on).cloned().collect()
    }
    fn device_clear(&self, device: &str) -> bool {
        !self.lock().engines.iter().any(|e| !e.left && e.launch.on(device).is_some())
    }
}

#[async_trait]
impl EngineProbe for World {
    async fn up(&self, endpoint: &Endpoint) -> Up {
        let Some((at, now)) = self.at(endpoint.addr) else { return Up::Refused };
        tokio::time::sleep(now.health_takes).await;
        let inner = self.lock();
        let (engine, time) = (&inner.engines[at], inner.now());
        if engine.ended {
            Up::Refused
        } else if engine.script.foreign_listener {
            Up::Serving
        } else if engine.script.serves && time >= engine.began + engine.script.load {
            now.up(time)
        } else {
            Up::Loading(None)
        }
    }
    async fn identify(&self, endpoint: &Endpoint) -> Result<Identity, Failure> {
        let nobody = || Failure::new(FailureClass::WrongServer, "nobody answers");
        let (at, _) = self.at(endpoint.addr).ok_or_else(nobody)?;
        let mut inner = self.lock();
        let engine = &inner.engines[at];
        if engine.script.wrong_model {
            return Err(Failure::new(FailureClass::WrongServer, "it serves another model"));
        }
        if !engine.script.foreign_listener {
            let pid = engine.launch.pid;
            self.put(&mut inner, What::Identified(pid));
        }
        Ok(Identity { model: endpoint.model.clone(), slots: 0, version: None })
    }
    async fn work(&self, endpoint: &Endpoint) -> Result<Worked, Failure> {
        let lost = || Failure::new(FailureClass::Health, "the connection was lost");
        if self.plant == Plant::WorkSkipped {
            return Ok(Worked::Done);
        }
        let (at, now) = self.at(endpoint.addr).ok_or_else(lost)?;
        if now.hangs {
            return std::future::pending().await;
        }
        // It waits for a slot as any request does.
        let taken = || {
            let inner = self.lock();
            let e = &inner.engines[at];
            (e.launch.key.pool.clone(), e.requests)
        };
        loop {
            let (pool, requests) = taken();
            if requests < self.slots_of(&pool) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        tokio::time::sleep(now.work_takes).await;
        let mut inner = self.lock();
        let (pid, ended) = (inner.engines[at].launch.pid, inner.engines[at].ended);
        if ended {
            return Err(lost());
        }
        self.put(&mut inner, What::Worked(pid));
        Ok(Worked::Done)
    }
    async fn signals(&self, endpoint: &Endpoint) -> Work {
        let Some((at, now)) = self.at(endpoint.addr) else { return Work::Untold };
        let inner = self.lock();
        let engine = &inner.engines[at];
        let running = match (self.plant, now.busy) {
            (_, None) => return Work::Untold,
            (Plant::BusyUnasked, _) => 0,
            (_, Some(others)) => u32::from(others + engine.requests),
        };
        if self.plant == Plant::AlwaysAtWork {
            let slots = vec![SlotWork { slot: 0, task: 1, prompt: 0, decoded: 0 }];
            return Work::Told(Signals { running: 1, slots, ..Signals::default() });
        }
        // A token every millisecond, until it hangs.
        let age = u64::try_from(inner.now().saturating_sub(engine.began).as_millis()).unwrap_or(u64::MAX);
        let decoded = if now.hangs { 0 } else { 1 + age };
        let slots = (0..running).map(|slot| SlotWork { slot, task: 1, prompt: 0, decoded }).collect();
        Work::Told(Signals { running, slots, prefill_told: true, ..Signals::default() })
    }
}

#[async_trait]
impl ModelStore for World {
    fn permits(&self, _: &ModelRef) -> Result<(), String> {
        Ok(())
    }
    async fn look(&self, model: &ModelRef) -> Result<Presence, Failure> {
        let (untold, _) = watch::channel(None);
        self.ensure_present(model, &untold).await.map(Presence::Here)
    }
    async fn ensure_present(&self, model: &ModelRef, _: &StagingTold) -> Result<ResolvedModel, Failure> {
        self.call().await;
        let takes = self.lock().models.1;
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        match self.lock().models.0.clone() {
            Some(failure) => Err(failure),
            None => Ok(ResolvedModel { id: model.model_id(), local_path: None, bytes: 0 }),
        }
    }
    async fn profile(&self, _: &ResolvedModel) -> Result<Option<ModelProfile>, Failure> {
        Ok(Some(header()))
    }
}

/// A small model, as its header would tell.
fn header() -> ModelProfile {
    let kv = KvShape { heads_kv: 8, key_length: 128, value_length: 128, window: None };
    let layer =
        LayerProfile { bytes: 300 << 20, heads: 32, kv: Some(kv), feed_forward_length: 8192, ..Default::default() };
    ModelProfile {
        format: ModelFormat::Gguf,
        architecture: "llama".into(),
        layers: vec![layer; 8],
        input_bytes: 100 << 20,
        output_bytes: 100 << 20,
        other_bytes: 0,
        tied_embeddings: false,
        embedding_bytes: 100 << 20,
        embedding_length: 4096,
        context_length: 32_768,
        vocabulary: 32_000,
        experts: 0,
        experts_used: 0,
        quantisation: "Q8_0".into(),
        tensor_bytes: 3 << 30,
        header_digest: "sha256:sim".into(),
    }
}
