//! A control that answers what it is told to.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]
#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use pool_api::dto::{ConfigReloadView, EventView, Problem};
use pool_api::gateway::Gateway;
use pool_api::metrics::Metrics;
use pool_api::server::{Access, AppState, Feed, Flags, History, LogPart, Logs, NodeInfo, Reconfigure};
use pool_domain::device::{DeviceProcess, Ecc, Peer, Remap};
use pool_domain::estimate::DeviceEstimate;
use pool_domain::lifecycle::OnDeadline;
use pool_domain::meters::{Reading, Spent};
use pool_domain::perf::PerfHints;
use pool_domain::plan::Row;
use pool_domain::{
    DeviceDetails, DeviceHealth, DeviceSnapshot, FailureClass, Generation, Holder, PoolId, ReplicaId, ReplicaKey,
    Verdict, device::MigSlice, failure::Exit,
};
use pool_services::control::{Lease, LeaseRequest, PlacementRequest, PlanRequest};
use pool_services::ports::{Staging, StagingStep};
use pool_services::snapshot::{LastError, XidCount};
use pool_services::{
    ControlError, Declared, DrainLeft, DrainOptions, EventKind, NodeSnapshot, Operation, OperationState, Placed,
    PlanReport, PoolControl, PoolSnapshot, ReloadRequest, ReplicaSnapshot, Route, Routing,
};
use tokio_util::sync::CancellationToken;

/// Answers for the pool `chat`; every verb fails with `error` where it is set.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) error: Option<ControlError>,
    pub(crate) panics: bool,
}

pub(crate) fn id(text: &str) -> PoolId {
    text.parse().unwrap()
}

/// As an engine publishes it.
pub(crate) const METERS: Reading = Reading {
    running: Some(2),
    waiting: Some(1),
    kv_used: Some(0.25),
    prompt_tokens: Some(120),
    generated_tokens: Some(400),
    first_token: Some(Spent { seconds: 0.5, count: 4 }),
    decode: Some(Spent { seconds: 8.5, count: 396 }),
};

pub(crate) fn replica(n: u16) -> ReplicaSnapshot {
    ReplicaSnapshot {
        id: ReplicaId(n),
        generation: Generation(7),
        state: "ready",
        reason_code: "",
        reason: String::new(),
        live: true,
        ready: true,
        draining: false,
        endpoint: Some("http://127.0.0.1:42000".into()),
        pid: Some(12),
        device_mask: format!("GPU-51000000-0000-4000-8000-00000000000{n}"),
        engine_version: "b9".into(),
        slots_total: 4,
        active_leases: 1,
        restart_count: 2,
        breaker: "closed",
        backoff_failures: 1,
        next_start_in_ms: None,
        proof: "simulated",
        perf: PerfHints { tokens_per_s: Some(52.5), first_token_ms: Some(31) },
        meters: METERS,
        last_error: Some(LastError {
            class: FailureClass::Crash(Exit::Unknown),
            detail: "the engine ended with signal 9".into(),
            at: UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        }),
        consecutive_failures: 0,
        last_check_at: Some(UNIX_EPOCH + Duration::from_millis(1_700_000_001_000)),
        vram_reserved: 5,
        context: Some(8192),
        staging: Some(Staging { step: StagingStep::Fetching, done: 3, total: Some(7), rate: 2 }),
        loaded_percent: Some(42),
    }
}

pub(crate) fn chat() -> PoolSnapshot {
    PoolSnapshot {
        pool_id: id("chat"),
        snapshot: 9,
        revision: 1,
        source: "file",
        engine: "stub".into(),
        model: "stub:tiny".into(),
        model_id: "tiny".into(),
        aliases: vec!["gpt".into()],
        workload: "generate",
        hold: false,
        leases_waiting: 2,
        guards: Default::default(),
        replicas: vec![replica(0), replica(1)],
    }
}

/// Everything that a driver can tell.
fn details() -> DeviceDetails {
    DeviceDetails {
        ecc: Some(Ecc { corrected: 3, uncorrected: 1 }),
        remap: Some(Remap { pending: true, failed: false }),
        recovery_action: Some(1),
        persistence: Some(true),
        temperature: Some(61),
        power: Some(250_500),
        power_limit: Some(400_000),
        energy: Some(7_000),
        sm_clock: Some(1_980),
        memory_clock: Some(2_619),
        memory_utilisation: Some(25),
        clock_limits: Some(vec!["power_cap".into()]),
        pcie_replays: Some(4),
        unheard: Some("not now".into()),
        peers: vec![Peer { uuid: "GPU-y".into(), path: Some("system".into()), p2p: Some(true), nvlinks: 18 }],
        instance: Some((9, 0)),
        processes: vec![DeviceProcess { pid: 7, name: Some("Xorg".into()), bytes: 40, ours: false }],
    }
}

pub(crate) fn node() -> NodeSnapshot {
    let device = DeviceSnapshot {
        uuid: "GPU-51000000-0000-4000-8000-000000000001".into(),
        index: 0,
        name: "Simulated".into(),
        pci_bus_id: Some("0000:01:00.0".into()),
        compute_capability: Some((8, 9)),
        numa_node: None,
        vram_total: 100,
        vram_free: 60,
        vram_used: 40,
        vram_reserved: 3,
        vram_foreign: 2,
        utilisation: Some(50),
        health: DeviceHealth::Fenced("leftovers".into()),
        mig: Some(MigSlice { parent: "GPU-x".into(), profile: "1g.12gb".into(), index: 1 }),
        mig_parent: false,
        verdict: Verdict::ResetDevice,
        details: details(),
    };
    NodeSnapshot {
        simulated: true,
        driver: Some("580.1".into()),
        cuda: Some("13.0".into()),
        xids: vec![XidCount { device: "GPU-51000000-0000-4000-8000-000000000001".into(), xid: 94, count: 2 }],
        devices: vec![(device, 35)],
        problem: None,
        events_lost: 0,
    }
}

pub(crate) fn operation(verb: &str, state: OperationState) -> Operation {
    Operation {
        id: "op-1".into(),
        verb: verb.into(),
        pool_id: id("chat"),
        state,
        progress: "half".into(),
        left: Some(DrainLeft { leases: 2, time: Duration::from_millis(1_500) }),
        started_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
    }
}

impl Fake {
    fn check(&self, pool: &PoolId) -> Result<(), ControlError> {
        assert!(!self.panics, "a bug with /secret/path");
        match &self.error {
            Some(e) => Err(e.clone()),
            None if pool.as_str() == "chat" => Ok(()),
            None => Err(ControlError::PoolNotFound(pool.to_string())),
        }
    }
    fn begin(&self, pool: &PoolId, verb: &str) -> Result<Operation, ControlError> {
        self.check(pool).map(|()| operation(verb, OperationState::Running))
    }
}

#[async_trait]
impl PoolControl for Fake {
    async fn node(&self) -> Result<NodeSnapshot, ControlError> {
        Ok(node())
    }
    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError> {
        Ok(vec![chat()])
    }
    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError> {
        self.check(id).map(|()| chat())
    }
    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError> {
        self.check(id)?;
        assert!(wait <= Duration::from_secs(600));
        Ok(PoolSnapshot { snapshot: after + 1, ..chat() })
    }
    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.begin(id, "preload")
    }
    async fn drain(&self, id: &PoolId, o: DrainOptions) -> Result<Operation, ControlError> {
        let mut op = self.begin(id, "drain")?;
        op.progress = format!("{:?} {}", o.deadline, o.on_deadline == Some(OnDeadline::Abort));
        Ok(op)
    }
    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.begin(id, "resume")
    }
    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.begin(id, "stop")
    }
    async fn declare(&self, declared: Declared, if_match: Option<u64>) -> Result<Operation, ControlError> {
        assert!(!self.panics, "a bug with /secret/path");
        match (&self.error, declared.spec.id.as_str()) {
            (Some(e), _) => Err(e.clone()),
            (None, "chat") => {
                let mut op = operation("declare", OperationState::Running);
                op.progress = format!("{:?} {if_match:?} {}", declared.source, declared.document);
                Ok(op)
            }
            (None, _) => Err(ControlError::PoolInFile(declared.spec.id.to_string())),
        }
    }
    async fn remove(&self, id: &PoolId, if_match: Option<u64>) -> Result<Operation, ControlError> {
        let mut op = self.begin(id, "remove")?;
        op.progress = format!("{if_match:?}");
        Ok(op)
    }
    async fn reload(&self, id: &PoolId, r: ReloadRequest) -> Result<Operation, ControlError> {
        let mut op = self.begin(id, "reload")?;
        let document = r.declared.map(|(_, document)| document);
        op.progress = format!("{document:?} {:?} {:?} {:?} {:?}", r.if_match, r.strategy, r.deadline, r.on_deadline);
        Ok(op)
    }
    async fn rollback(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.begin(id, "rollback")
    }
    async fn document(&self, id: &PoolId) -> Result<(u64, String), ControlError> {
        self.check(id)?;
        Ok((3, r#"{"id":"chat","model":"stub:tiny","engine":"stub","slots":2,"drain":{"deadline":"5s"}}"#.into()))
    }
    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError> {
        self.check(id)
    }
    async fn unfence(&self, device: &str) -> Result<(), ControlError> {
        assert!(!self.panics, "a bug with /secret/path");
        if device == node().devices[0].0.uuid { Ok(()) } else { Err(ControlError::DeviceNotFound(device.into())) }
    }
    async fn operations(&self) -> Result<Vec<Operation>, ControlError> {
        Ok(vec![operation("stop", OperationState::Failed("fenced".into()))])
    }
    async fn operation(&self, id: &str) -> Result<Operation, ControlError> {
        match id {
            "op-1" => Ok(operation("drain", OperationState::Running)),
            other => Err(ControlError::OperationNotFound(other.into())),
        }
    }
    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError> {
        assert!(wait <= Duration::from_secs(600));
        let op = self.operation(id).await?;
        Ok(Operation { state: OperationState::Succeeded("drained".into()), ..op })
    }
    async fn lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError> {
        self.check(id)?;
        if request.ttl.is_zero() {
            return Err(ControlError::Refused { code: "INVALID_PARAMS".into(), detail: "ttl".into() });
        }
        Ok(Lease {
            // What it was asked for is seen again.
            slot: u16::try_from(request.wait.as_secs()).unwrap(),
            engine: request.key.map(|k| k.to_string()).unwrap_or_default(),
            engine_version: request.prefer.map(|p| p.to_string()).unwrap_or_default(),
            device_mask: "GPU-1".into(),
            holder: request.holder,
            id: "l-1".into(),
            pool_id: id.clone(),
            replica_id: ReplicaId(0),
            generation: Generation(7),
            api_key: Some(pool_services::ApiKey::new("key-of-the-engine")),
            endpoint: "http://127.0.0.1:42000".into(),
            expires_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000) + request.ttl,
        })
    }
    async fn renew_for(
        &self,
        lease: &str,
        ttl: Option<Duration>,
        _: pool_domain::Holder,
    ) -> Result<Lease, ControlError> {
        self.release(lease).await?;
        self.lease(&id("chat"), LeaseRequest::lasting(ttl.unwrap_or(Duration::from_secs(9)))).await
    }
    async fn leases(&self) -> Result<Vec<Lease>, ControlError> {
        Ok(vec![self.lease(&id("chat"), LeaseRequest::default()).await?])
    }
    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError> {
        let estimate = DeviceEstimate { weights: 1, kv: 2, compute: 3, runtime: 4, margin: 5 };
        let row = Row { uuid: "GPU-1".into(), index: 0, layers: 0..32, output: true, estimate, promised: 15, room: 20 };
        let told = match what {
            PlanRequest::Pool(id) => self.check(&id).map(|()| id.to_string())?,
            PlanRequest::Spec(spec) => format!("{} {:?} {:?}", spec.model, spec.tensor_split, spec.vram),
        };
        Ok(PlanReport {
            fits: true,
            waiting_helps: false,
            reason: String::new(),
            rows: vec![row],
            tensor_split: Some("3,1".into()),
            context: Some(8192),
            host: estimate,
            learnt: false,
            remedies: vec![told],
            args: vec!["--metrics".into()],
            engine_problem: String::new(),
        })
    }
    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError> {
        let key = ReplicaKey { pool: id("chat"), replica: ReplicaId(1) };
        Ok(vec![Placed {
            serves: request.prefer_replica.as_ref() == Some(&key),
            key,
            reason: "it is full".into(),
            reason_code: "saturated".into(),
            vram_free: 7,
            leases: 4,
            slots: 4,
        }])
    }
    async fn release(&self, lease: &str) -> Result<(), ControlError> {
        if lease == "l-1" { Ok(()) } else { Err(ControlError::LeaseNotFound(lease.into())) }
    }
}

/// A config file that is as it was.
#[derive(Debug)]
pub(crate) struct FakeConfig;

#[async_trait]
impl Reconfigure for FakeConfig {
    async fn reload_config(&self) -> Result<ConfigReloadView, Problem> {
        Ok(ConfigReloadView { unchanged: vec!["chat".into()], ..Default::default() })
    }
}

/// Where no model is served.
#[derive(Debug)]
pub(crate) struct NoEngines;

#[async_trait]
impl Routing for NoEngines {
    fn named(&self, _: &str) -> Result<Vec<PoolId>, ControlError> {
        Ok(Vec::new())
    }
    async fn route(&self, pool: &PoolId, _: Duration, _: &Holder) -> Result<Route, ControlError> {
        Err(ControlError::PoolNotFound(pool.to_string()))
    }
    async fn follow(&self, lease: &str, _: &pool_domain::Holder) -> Result<(Lease, Route), ControlError> {
        Err(ControlError::LeaseNotFound(lease.to_owned()))
    }
    fn tell(&self, _: &ReplicaKey, _: Generation, _: EventKind) {}
}

/// Three lines of each engine, and one more with each look.
#[derive(Debug)]
pub(crate) struct FakeLogs;

#[async_trait]
impl Logs for FakeLogs {
    async fn last(&self, key: &ReplicaKey, generation: Generation, lines: usize) -> LogPart {
        let all = (1..=3u64).map(|n| (n, format!("{key} {generation} line {n}")));
        LogPart { lines: all.skip(3usize.saturating_sub(lines)).collect(), next: 3 }
    }
    async fn after(&self, key: &ReplicaKey, generation: Generation, place: u64) -> LogPart {
        LogPart { lines: vec![(place + 1, format!("{key} {generation} line {}", place + 1))], next: place + 1 }
    }
}

/// Where one event happened. Without a runtime nobody can listen.
fn attended() -> Feed {
    let (mut history, feed) = History::begin("e".into());
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        let event = EventView { event: "started".into(), pool_id: "chat".into(), ..EventView::default() };
        runtime.spawn(async move {
            history.push(&event, false);
            history.attend().await;
        });
    }
    feed
}

pub(crate) fn state(fake: Fake) -> Arc<AppState> {
    let flags = Flags::default();
    flags.set_started();
    flags.set_accepting(true);
    Arc::new(AppState {
        control: Arc::new(fake),
        info: NodeInfo {
            version: "1.2.3".into(),
            profile: "home".into(),
            hosts: vec!["gpu.lan".into()],
            origins: vec!["https://ui.lan".into()],
            defaults: Default::default(),
            engines: Vec::new(),
        },
        config: Some(Arc::new(FakeConfig)),
        metrics: Arc::new(Metrics::default()),
        flags: Arc::new(flags),
        gateway: Gateway::new(Arc::new(NoEngines), Duration::from_secs(1)),
        access: Access::Open,
        seal: None,
        feed: attended(),
        logs: Arc::new(FakeLogs),
        closing: CancellationToken::new(),
    })
}
