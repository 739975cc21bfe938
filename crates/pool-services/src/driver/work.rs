//! The work of an attempt, each piece in a task of its own that reports with its generation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fault_points::{Point, reached};
use pool_domain::lifecycle::{Fact, Proof, Wait};
use pool_domain::residency::{self, Listing, Place};
use pool_domain::returned::Back;
use pool_domain::{Failure, FailureClass, Generation};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lessons::correction_key;
use super::staging::tell_staging;
use super::{Attempt, Driver, Grant, Holds, Report, Want};
use crate::planning::demand;
use crate::ports::{
    Endpoint, EngineRecord, LedgerError, Listener, PROBE_TIMEOUT, Phase, PrepareRequest, Residency, RunningEngine, Up,
    Worked,
};
use crate::returned;

/// Between two looks at a starting engine: a fiftieth of the time it has taken so far, within these bounds. A look
/// costs the engine a request while it loads, and readiness must be seen within 100 ms.
const LOOK: std::ops::RangeInclusive<Duration> = Duration::from_millis(2)..=Duration::from_millis(50);

/// The longest for an engine that somebody else starts, whenever that may be.
const LOOK_EXTERNAL: Duration = Duration::from_secs(1);

/// Between two proofs while the driver does not answer.
const ASK_DRIVER_AGAIN: Duration = Duration::from_secs(1);

/// Between an answer that was cut off and the news that the engine has ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

impl Driver {
    pub(super) fn send(&self, report: Report) {
        let (tx, generation) = (self.reports_tx.clone(), self.replica.generation);
        tokio::spawn(async move {
            // The driver holds the receiver for as long as it lives.
            let _ = tx.send((generation, report)).await;
        });
    }

    /// Runs `work` until it is done or the attempt is cancelled.
    pub(super) fn run_work(&self, work: impl Future<Output = Report> + Send + 'static) {
        let (tx, generation, cancelled) = (self.reports_tx.clone(), self.replica.generation, self.work.clone());
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                report = work => { let _ = tx.send((generation, report)).await; }
            }
        });
    }

    pub(super) fn stage(&mut self) {
        self.work.cancel();
        self.work = CancellationToken::new();
        self.attempt = Attempt::default();
        self.attempt_began = self.clock.now();
        let (ports, spec) = (self.ports.clone(), Arc::clone(&self.spec));
        let (told, progress) = watch::channel(None);
        let (tx, generation) = (self.reports_tx.clone(), self.replica.generation);
        let learnt = self.learnt.clone();
        self.run_work(async move {
            let staged = async {
                let model = ports.models.ensure_present(&spec.model, &told).await?;
                let (models, provisioner) = (&*ports.models, &*ports.provisioner);
                let mut demand = demand(models, provisioner, Some(&*ports.ledger), &spec, &model).await?;
                if let Some((_, newest)) = learnt.filter(|(key, _)| *key == correction_key(&spec, &demand)) {
                    demand.learnt = Some(newest);
                }
                Ok((model, demand))
            };
            let staged = tokio::select! {
                biased;
                staged = staged => staged,
                () = tell_staging(progress, &tx, generation) => std::future::pending().await,
            };
            match staged {
                Ok((model, demand)) => Report::Staged(model, Arc::new(demand)),
                Err(failure) => Report::Fact(Fact::Unstartable(failure)),
            }
        });
    }

    pub(super) fn preflight(&mut self) {
        let (provisioner, spec) = (Arc::clone(&self.ports.provisioner), Arc::clone(&self.spec));
        self.run_work(async move {
            match provisioner.preflight(&spec).await {
                Ok(()) => Report::Preflighted,
                Err(failure) => Report::Fact(Fact::Unstartable(failure)),
            }
        });
    }

    pub(super) fn want(&self) -> Option<Want> {
        Some(Want {
            generation: self.replica.generation,
            mask: self.spec.mask_of(self.place).clone(),
            home: self.home.clone(),
            demand: Arc::clone(self.attempt.demand.as_ref()?),
            external: self.ports.provisioner.external(&self.spec).is_some(),
        })
    }

    pub(super) fn prepare(&mut self, grant: &Grant) {
        let Some(model) = self.attempt.model.clone() else { return };
        let Some(listen) = grant.listen.or_else(|| self.ports.provisioner.external(&self.spec)) else { return };
        let request = PrepareRequest {
            spec: (*self.spec).clone(),
            model,
            devices: grant.devices.clone(),
            listen,
            tensor_split: grant.tensor_split.clone(),
            context: grant.context,
        };
        let (ledger, provisioner) = (Arc::clone(&self.ports.ledger), Arc::clone(&self.ports.provisioner));
        let (key, place, generation) = (self.key.clone(), self.place, self.replica.generation);
        let (host, gpu, bytes) = (Arc::clone(&self.ports.host), Arc::clone(&self.ports.gpu), grant.bytes.clone());
        let last_words = self.scribe.tried();
        self.run_work(async move {
            // Intent is durable before a spawn; without it no generation may run.
            let unwritten = |e: LedgerError| {
                tracing::error!(pool_id = %key.pool, error = %e, "the state directory cannot be written");
                let detail = "the state directory cannot be written".to_owned();
                Report::Fact(Fact::Blocked(Wait::Devices { detail }))
            };
            reached(Point::BeforeIntent);
            if let Err(e) = ledger.intend(&key, generation).await {
                return unwritten(e);
            }
            reached(Point::AfterIntent);
            let unlisted = returned::unlisted(&*gpu, &request.devices.uuids).await;
            let prepared = match provisioner.prepare(&request).await {
                Ok(prepared) => prepared,
                Err(failure) => return Report::Fact(Fact::Unstartable(failure)),
            };
            let record = EngineRecord {
                key: key.clone(),
                generation,
                nonce: host.nonce(),
                fingerprint: request.spec.fingerprint(place),
                endpoint: prepared.endpoint.clone(),
                engine_version: prepared.engine_version.clone(),
                devices: request.devices,
                bytes,
                unlisted,
                executable: None,
                phase: Phase::Starting,
            };
            last_words.await;
            // One that somebody else runs is not ours to find again.
            if prepared.entry.is_some()
                && let Err(e) = ledger.record(&record).await
            {
                return unwritten(e);
            }
            reached(Point::AfterRecord);
            Report::Prepared(Box::new((prepared, record)))
        });
    }

    /// Not cancellable: a launch that was begun is always answered, so that what it brings can be stopped.
    pub(super) fn launch(&mut self) {
        let (Some(prepared), Some(record)) = (self.attempt.prepared.clone(), self.attempt.record.clone()) else {
            return;
        };
        let (host, generation) = (Arc::clone(&self.ports.host), self.replica.generation);
        let tx = self.reports_tx.clone();
        tokio::spawn(async move {
            let addr = prepared.endpoint.addr;
            let report = if prepared.entry.is_some() && !host.port_free(addr) {
                let failure = Failure::new(FailureClass::PortConflict, format!("port {} is taken", addr.port()));
                Report::Fact(Fact::LaunchFailed(failure))
            } else {
                reached(Point::BeforeLaunch);
                match host.launch(&record, &prepared).await {
                    Ok(engine) => Report::Launched(engine),
                    Err(failure) => Report::Fact(Fact::LaunchFailed(failure)),
                }
            };
            let _ = tx.send((generation, report)).await;
        });
    }

    pub(super) fn watch_exit(&self, engine: Arc<dyn RunningEngine>) {
        let (tx, generation) = (self.reports_tx.clone(), self.replica.generation);
        tokio::spawn(async move {
            let failure = engine.exited().await;
            let _ = tx.send((generation, Report::Fact(Fact::Exited(failure)))).await;
        });
    }

    pub(super) fn await_gone(&self) {
        let (tx, generation, engine) = (self.reports_tx.clone(), self.replica.generation, self.attempt.engine.clone());
        let (gpu, mut held) = (Arc::clone(&self.ports.gpu), self.attempt.held.clone());
        tokio::spawn(async move {
            if let Some(engine) = engine {
                held.pids.extend(look(&engine, |e| e.pids()).await.unwrap_or_default());
                engine.gone().await;
            }
            reached(Point::AfterGone);
            // The first look may wait for the driver longer than processes may take to go.
            let mut seen =
                tokio::time::timeout(returned::LOOK_AGAIN, held.is_back(&*gpu)).await.unwrap_or(Back::Unknown);
            let mut told = None;
            while seen != Back::Yes {
                let fact = if seen == Back::No { Fact::MemoryHeld } else { Fact::MemoryUnknown };
                // That nobody can say is said again as long as it is so.
                if told.replace(seen) != Some(seen) || seen == Back::Unknown {
                    let _ = tx.send((generation, Report::Fact(fact))).await;
                }
                tokio::time::sleep(returned::LOOK_AGAIN).await;
                seen = held.is_back(&*gpu).await;
            }
            let _ = tx.send((generation, Report::Fact(Fact::Gone))).await;
        });
    }

    pub(super) fn running(&self) -> Option<(Arc<dyn RunningEngine>, Endpoint)> {
        let prepared = self.attempt.prepared.as_ref()?;
        Some((Arc::clone(self.attempt.engine.as_ref()?), prepared.endpoint.clone()))
    }

    pub(super) fn watch_start(&mut self) {
        let Some((engine, endpoint)) = self.running() else { return };
        let probe = Arc::clone(&self.ports.probe);
        let (tx, generation) = (self.reports_tx.clone(), self.replica.generation);
        self.run_work(async move {
            let (began, loading) = (Instant::now(), AtomicU32::new(0));
            let answers = async {
                loop {
                    // Who does not answer in time is asked again; its progress counts meanwhile.
                    match tokio::time::timeout(PROBE_TIMEOUT, probe.up(&endpoint)).await {
                        // Something answers; whether it is the right thing, the proof decides.
                        Ok(Up::Serving | Up::Wrong(_)) => return Report::Fact(Fact::Serving),
                        Ok(Up::Loading(Some(share))) => loading.store(share.to_bits(), Ordering::Relaxed),
                        Ok(Up::Loading(None) | Up::Refused | Up::Overloaded(_) | Up::Failed(_)) | Err(_) => {}
                    }
                    let longest = if engine.pid().is_some() { *LOOK.end() } else { LOOK_EXTERNAL };
                    tokio::time::sleep((began.elapsed() / 50).clamp(*LOOK.start(), longest)).await;
                }
            };
            tokio::select! {
                biased;
                report = answers => report,
                () = tell_progress(&engine, &loading, &tx, generation) => std::future::pending().await,
            }
        });
    }

    pub(super) fn prove(&mut self) {
        let Some((engine, endpoint)) = self.running() else { return };
        let ports = self.ports.clone();
        let (slots, record) = (self.spec.slots, self.attempt.record.clone().filter(|_| engine.pid().is_some()));
        let (tx, generation) = (self.reports_tx.clone(), self.replica.generation);
        self.run_work(async move {
            reached(Point::BeforeProof);
            let loading = AtomicU32::new(0);
            let proved = async {
                loop {
                    match prove(&ports, &engine, &endpoint, record.as_ref()).await {
                        Ok(proved) => return Ok(proved),
                        Err(Unproved::Engine(failure)) => return Err(failure),
                        // Which is nothing against the engine, nor against its devices.
                        Err(Unproved::Driver(why)) => {
                            let _ = tx.send((generation, Report::Unprovable(why))).await;
                            tokio::time::sleep(ASK_DRIVER_AGAIN).await;
                        }
                    }
                }
            };
            let proved = tokio::select! {
                biased;
                proved = proved => proved,
                () = tell_progress(&engine, &loading, &tx, generation) => std::future::pending().await,
            };
            match proved {
                Ok((mut proof, holds)) => {
                    proof.slots = if proof.slots == 0 { slots } else { proof.slots };
                    Report::Proved(proof, holds)
                }
                Err(failure) => {
                    // An engine that ends cuts off its answers first; the watch of its end knows why.
                    let ends = tokio::time::timeout(LAST_WORDS, engine.exited()).await.is_ok();
                    if ends { std::future::pending().await } else { Report::Fact(Fact::Unproved(failure)) }
                }
            }
        });
    }
}

/// Tells, until nobody listens any more, whenever the engine got somewhere. A process tree is read once a second, since
/// that costs milliseconds.
async fn tell_progress(
    engine: &Arc<dyn RunningEngine>,
    loading: &AtomicU32,
    tx: &mpsc::Sender<(Generation, Report)>,
    generation: Generation,
) {
    let mut seen = None;
    loop {
        let share = loading.load(Ordering::Relaxed);
        let now = (look(engine, |e| e.progress()).await, share);
        if seen.is_some_and(|(_, before)| before != share)
            && tx.send((generation, Report::Loaded(percent(f32::from_bits(share))))).await.is_err()
        {
            return;
        }
        if seen.replace(now) != Some(now) && tx.send((generation, Report::Fact(Fact::Progress))).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Of a share from 0 to 1, whatever an engine says.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0 to 100")]
fn percent(share: f32) -> u8 {
    (share.clamp(0.0, 1.0) * 100.0) as u8
}

/// Looks at the engine's processes without holding up other tasks. `None` only when the runtime is ending.
pub(super) async fn look<T: Send + 'static>(
    engine: &Arc<dyn RunningEngine>,
    question: impl FnOnce(&dyn RunningEngine) -> T + Send + 'static,
) -> Option<T> {
    if engine.answers_at_once() {
        return Some(question(&**engine));
    }
    let engine = Arc::clone(engine);
    tokio::task::spawn_blocking(move || question(&*engine)).await.ok()
}

/// Why there is no proof.
#[derive(Debug)]
pub(super) enum Unproved {
    /// The engine failed it.
    Engine(Failure),
    /// Nobody can say where its memory is.
    Driver(String),
}

impl From<Failure> for Unproved {
    fn from(failure: Failure) -> Self {
        Self::Engine(failure)
    }
}

/// Alive, the socket is its own, the right model, one unit of work done, memory on exactly its devices. What somebody else
/// runs has no record.
pub(super) async fn prove(
    ports: &super::Ports,
    engine: &Arc<dyn RunningEngine>,
    endpoint: &Endpoint,
    record: Option<&EngineRecord>,
) -> Result<(Proof, Holds), Unproved> {
    let external = record.is_none();
    let addr = endpoint.addr;
    let listener = async {
        match look(engine, move |e| e.listener(addr)).await.unwrap_or(Listener::None) {
            Listener::Own => Ok(()),
            Listener::Foreign => {
                let detail = format!("port {} belongs to another process", addr.port());
                Err(Failure::new(FailureClass::PortConflict, detail))
            }
            Listener::None => Err(Failure::new(FailureClass::WrongServer, "nothing of the engine listens on its port")),
        }
    };
    let identity = async {
        let (listener, up, identity) = tokio::join!(listener, ports.probe.up(endpoint), ports.probe.identify(endpoint));
        // Whose socket it is counts before what it says.
        listener?;
        match up {
            Up::Wrong(what) => Err(Failure::new(FailureClass::WrongServer, what)),
            _ => identity,
        }
    };
    let work = async {
        let began = Instant::now();
        match ports.probe.work(endpoint).await? {
            Worked::Done => Ok(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)),
            Worked::Declined => Err(Failure::new(FailureClass::Health, "it has no room for one unit of work")),
        }
    };
    tokio::pin!(identity, work);
    let mut worked = None;
    let identity = tokio::select! {
        biased;
        identity = &mut identity => identity,
        // Where an engine of ours was started there is no harm in asking at once; what it answers counts only if it is the
        // one. Somebody else's server is asked only when it is known to be the right one.
        done = &mut work, if !external => {
            worked = Some(done);
            identity.await
        }
    }?;
    let first_unit_ms = match worked {
        Some(done) => done,
        None => work.await,
    }?;
    let (residency, holds) = match record {
        None => ("served", Holds::default()),
        Some(record) => residency(ports, engine, record).await?,
    };
    Ok((Proof { residency, model: identity.model, slots: identity.slots, first_unit_ms }, holds))
}

/// Looks for this long, in a list that does not tell of everybody, for memory that may be told of late.
const TOLD_LATE: Duration = Duration::from_secs(5);

async fn residency(
    ports: &super::Ports,
    engine: &Arc<dyn RunningEngine>,
    record: &EngineRecord,
) -> Result<(&'static str, Holds), Unproved> {
    let devices = &record.devices.uuids;
    let began = Instant::now();
    loop {
        let (holders, listing) = match ports.gpu.residency().await {
            Residency::Provable(h) => (h, Listing::Whole),
            Residency::Partial(h) => (h, Listing::Partial),
            Residency::Simulated(h) => (h, Listing::Simulated),
            Residency::Unknown(why) => {
                return match &record.phase {
                    // It was proved of this very process, and that nobody can say so again is not its fault.
                    Phase::Ready { proof, .. } | Phase::Draining { proof, .. } => {
                        Ok((proof.residency, Holds::default()))
                    }
                    Phase::Starting | Phase::Stopping => Err(Unproved::Driver(why)),
                };
            }
        };
        // Who holds nothing need not be looked for.
        let pids = if holders.is_empty() { Vec::new() } else { look(engine, |e| e.pids()).await.unwrap_or_default() };
        let ours: Vec<_> = holders.iter().filter(|h| pids.contains(&h.pid)).collect();
        let grew = returned::growth(&*ports.gpu, &holders, record);
        let place = |at: usize| Place {
            uuid: &devices[at],
            promised: record.bytes.get(at).copied().unwrap_or(0),
            grew: grew.get(at).copied().flatten(),
        };
        let places: Vec<_> = (0..devices.len()).map(place).collect();
        let holds: Vec<&str> = ours.iter().map(|h| h.uuid.as_str()).collect();
        let code = match residency::judge(listing, &places, &holds) {
            Ok(code) => code,
            Err(_) if listing == Listing::Partial && began.elapsed() < TOLD_LATE => {
                tokio::time::sleep(TOLD_LATE / 10).await;
                continue;
            }
            Err(failure) => return Err(failure.into()),
        };
        let mut on = BTreeMap::<String, u64>::new();
        for h in ours.iter().filter(|h| h.bytes > 0) {
            let bytes = on.entry(h.uuid.clone()).or_default();
            *bytes = bytes.saturating_add(h.bytes);
        }
        return Ok((code, Holds { on, pids: ours.iter().map(|h| h.pid).collect() }));
    }
}
