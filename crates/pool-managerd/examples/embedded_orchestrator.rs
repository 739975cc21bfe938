//! A small orchestrator: jobs in a queue, a place for each by what the pool publishes, a lease for as long as it runs, and
//! a drain of everything in the end. It knows `PoolControl` and not whether a daemon is behind it.
//!
//! `cargo run -p pool-managerd --example embedded_orchestrator` has the pools in this process;
//! `… -- --over http --server http://127.0.0.1:9200` uses a daemon (`pool-managerd demo` is one).
#![allow(clippy::print_stdout, reason = "a program for people")]

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use engine_host::{HostOptions, HttpProbe, ProcessHost, Provisioner, ShimCommand, StubCommand};
use gpu_sim::SimulatedGpus;
use model_store::LocalModels;
use pool_api::client::HttpControl;
use pool_api::spec::{Defaults, PoolSpec};
use pool_domain::{Holder, PoolId, ReplicaId};
use pool_services::{
    Activation, ControlError, Declared, DrainOutcome, DrainRequest, Lease, LeaseRequest, PoolControl, PoolManager,
    PoolSnapshot, PreloadOutcome, ReplicaSnapshot, Source, execute_drain,
};
use state_dir::StateDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// One wait for a slot.
const WAIT: Duration = Duration::from_secs(10);
/// All waits of a job together.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time for an answer. A lease lasts longer.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest time until it is known that an engine is gone.
const NEWS: Duration = Duration::from_secs(5);
/// A job whose engine went away is tried again so often.
const ATTEMPTS: u32 = 3;

/// Something to be done by an engine.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: String,
    /// Jobs of a session are best done where the one before was: the engine may still know its beginning.
    pub(crate) session: String,
    pub(crate) prompt: String,
}

/// What became of a job.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) job: Job,
    /// Where it was done, if it was.
    pub(crate) replica: Option<ReplicaId>,
    pub(crate) answer: Result<String, String>,
}

/// Where a job is best done, by what the pool publishes: where its session is at home, else where there is the least to do.
/// Nowhere if every slot is taken, or nothing is ready.
pub(crate) fn place(pool: &PoolSnapshot, home: Option<ReplicaId>) -> Option<ReplicaId> {
    let able = || pool.replicas.iter().filter(|r| r.ready && r.active_leases < r.slots_total);
    let at_home = able().find(|r| Some(r.id) == home);
    at_home.or_else(|| able().min_by_key(|r| (r.active_leases, r.id))).map(|r| r.id)
}

/// When it is worth asking again, if it is.
fn again_in(refused: &ControlError) -> Option<Duration> {
    const SOON: Duration = Duration::from_secs(1);
    match refused {
        ControlError::Saturated { retry_after } | ControlError::Unavailable { retry_after } => Some(*retry_after),
        ControlError::Unready { retry_after, .. } | ControlError::InsufficientVram { retry_after, .. } => {
            Some(retry_after.unwrap_or(SOON))
        }
        _ => None,
    }
}

/// Does jobs on one pool.
#[derive(Debug, Clone)]
pub(crate) struct Orchestrator {
    pub(crate) control: Arc<dyn PoolControl>,
    pub(crate) pool: PoolId,
}

impl Orchestrator {
    /// Does every job; as many at once as the pool has slots.
    pub(crate) async fn run(&self, jobs: Vec<Job>) -> Vec<Done> {
        let mut queue: VecDeque<(Job, u32)> = jobs.into_iter().map(|job| (job, 1)).collect();
        let mut homes = BTreeMap::new();
        let mut running = JoinSet::new();
        let mut all = Vec::new();
        loop {
            let ended = if queue.is_empty() { running.join_next().await } else { running.try_join_next() };
            match ended {
                Some(Ok((Done { job, answer: Err(why), .. }, attempt))) if attempt < ATTEMPTS => {
                    println!("{}: {why}; once more", job.id);
                    queue.push_front((job, attempt + 1));
                    continue;
                }
                Some(Ok((done, _))) => {
                    all.push(done);
                    continue;
                }
                // A bug in the work.
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => {}
            }
            let Some((job, attempt)) = queue.pop_front() else { return all };
            match self.lease(&job, homes.get(&job.session).copied()).await {
                Ok(lease) => {
                    homes.insert(job.session.clone(), lease.replica_id);
                    let this = self.clone();
                    running.spawn(async move { (this.work(job, lease).await, attempt) });
                }
                Err(refused) => all.push(Done { job, replica: None, answer: Err(refused.to_string()) }),
            }
        }
    }

    /// A slot for a job, where it is best done or anywhere.
    async fn lease(&self, job: &Job, home: Option<ReplicaId>) -> Result<Lease, ControlError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let prefer = place(&self.control.pool(&self.pool).await?, home);
            let (job_id, session_id) = (Some(job.id.as_str().into()), Some(job.session.as_str().into()));
            let holder = Holder { job_id, session_id, tenant_id: None };
            let wish = LeaseRequest { holder, prefer, ..LeaseRequest::default() }.waiting(WAIT);
            match self.control.lease(&self.pool, wish).await {
                Err(refused) => match again_in(&refused) {
                    Some(pause) if Instant::now() + pause < end => sleep(pause).await,
                    _ => return Err(refused),
                },
                granted => return granted,
            }
        }
    }

    /// Has the engine do the job, and gives the slot back whatever comes of it.
    async fn work(&self, job: Job, lease: Lease) -> Done {
        let answer = match timeout(ANSWER, complete(&lease.endpoint, &job.prompt)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the engine does not answer".to_owned()),
        };
        // Where nobody can be told, the lease ends with its time.
        if let Err(error) = self.control.release(&lease.id).await {
            println!("{}: {error}", lease.id);
        }
        if answer.is_err() {
            self.wait_for_news(&lease).await;
        }
        Done { job, replica: Some(lease.replica_id), answer }
    }

    /// An engine that died is Ready until that is noticed: who asks again before gets the same one.
    async fn wait_for_news(&self, lease: &Lease) {
        let end = Instant::now() + NEWS;
        let mut picture = self.control.pool(&self.pool).await;
        while let Ok(pool) = &picture {
            let as_before =
                |r: &ReplicaSnapshot| r.id == lease.replica_id && r.generation == lease.generation && r.ready;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !pool.replicas.iter().any(as_before) {
                return;
            }
            picture = self.control.wait_pool(&self.pool, pool.snapshot, left).await;
        }
    }

    /// Drains every pool of the node, all at once, and says which did not end.
    pub(crate) async fn shutdown(&self, deadline: Duration) -> Result<Vec<PoolId>, ControlError> {
        let mut drains = JoinSet::new();
        for pool in self.control.pools().await? {
            let control = Arc::clone(&self.control);
            drains.spawn(async move {
                let request = DrainRequest::new(pool.pool_id.clone(), deadline);
                (pool.pool_id, execute_drain(&request, &*control).await)
            });
        }
        let ended = drains.join_all().await;
        Ok(ended.into_iter().filter(|(_, end)| *end != Ok(DrainOutcome::Drained)).map(|(pool, _)| pool).collect())
    }
}

/// One request to an engine, and its answer.
async fn complete(endpoint: &str, prompt: &str) -> Result<String, Box<dyn Error + Send + Sync>> {
    let addr = endpoint.trim_start_matches("http://");
    let body = serde_json::json!({ "prompt": prompt, "n_predict": 8 }).to_string();
    let head = format!("POST /completion HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n");
    let head = format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut socket = TcpStream::connect(addr).await?;
    socket.write_all((head + &body).as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the engine broke off its answer")?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(head.lines().next().unwrap_or_default().into());
    }
    let answer: serde_json::Value = serde_json::from_str(body)?;
    Ok(answer["content"].as_str().ok_or("the engine answered something else")?.to_owned())
}

/// Declares a pool from its wire form and waits until it serves.
pub(crate) async fn declare(control: &dyn PoolControl, pool: &str) -> Result<PoolId, Box<dyn Error>> {
    let wire: PoolSpec = serde_json::from_str(pool)?;
    let document = serde_json::to_string(&wire)?;
    let spec = wire.check(&Defaults { activation: Activation::OnDemand })?;
    let id = spec.id.clone();
    control.declare(Declared { spec, document, source: Source::Api }, None).await?;
    match PreloadOutcome::execute(&id, control).await? {
        PreloadOutcome::Ready => Ok(id),
        PreloadOutcome::NotReady(why) => Err(why.into()),
    }
}

/// The pools of this process: every port with what stands behind it. `program` is what engines are started through, as
/// `program engine-shim …` and `program stub-engine …`; here this program itself, see `main`.
pub(crate) async fn embedded(dir: &Path, program: PathBuf, ports: &str) -> Result<PoolManager, Box<dyn Error>> {
    let state = StateDir::open(dir)?;
    let sim = state.runtime_dir().join("sim");
    let mut gpus = SimulatedGpus::from_toml(gpu_sim::TWO_GPUS, sim.clone())?;
    gpus.start();
    let stub = StubCommand { program: program.clone(), args: vec![stub_engine::SUBCOMMAND.to_owned()] };
    let shim = ShimCommand { program, args: vec![engine_shim::SUBCOMMAND.to_owned()] };
    let host = HostOptions {
        runtime_dir: state.runtime_dir(),
        shim: shim.clone(),
        log_max_bytes: 1 << 20,
        cgroup: true,
        lock_dir: state.lock_dir(),
        outlive: false,
    };
    let (first, last) = ports.split_once('-').ok_or("ports are FIRST-LAST")?;
    let (manager, mut events) = PoolManager::builder()
        .gpu(Arc::new(gpus))
        .models(Arc::new(LocalModels::new(Vec::new())))
        .provisioner(Arc::new(Provisioner::new(Vec::new(), stub, Some(sim)).proving_by(shim)))
        .host(Arc::new(ProcessHost::new(host)))
        .probe(Arc::new(HttpProbe::new()))
        .ledger(Arc::new(state))
        .engine_ports(first.parse()?..=last.parse()?)
        .start()
        .await?;
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            println!("  {}", event.human());
        }
    });
    Ok(manager)
}

/// What is behind `PoolControl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Over {
    /// The pools are in this process.
    InProcess,
    /// A daemon.
    Http,
}

#[derive(Debug, Parser)]
struct Args {
    /// Where the pools are
    #[arg(long, value_enum, default_value = "in-process")]
    over: Over,
    /// The daemon
    #[arg(long, default_value = "http://127.0.0.1:9200")]
    server: String,
}

/// Two engines with two slots each.
const POOL: &str = r#"{
    "id": "jobs", "model": "stub:jobs", "engine": "stub", "replicas": 2, "slots": 2, "vram": "4 GiB",
    "args": ["--vram", "3 GiB"]
}"#;

fn main() -> ExitCode {
    // Both must come before the first thread.
    if let Some(code) = engine_shim::run_if_asked().or_else(stub_engine::run_if_asked) {
        return code;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(jobs(&Args::parse()))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn jobs(args: &Args) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let mut embedded_here = None;
    let control: Arc<dyn PoolControl> = match args.over {
        Over::Http => Arc::new(HttpControl::new(&args.server)?),
        Over::InProcess => {
            let manager = embedded(dir.path(), std::env::current_exe()?, "42000-42999").await?;
            Arc::new(embedded_here.insert(manager).clone())
        }
    };
    let pool = declare(&*control, POOL).await?;
    let orchestrator = Orchestrator { control: Arc::clone(&control), pool: pool.clone() };
    let job =
        |n: u32| Job { id: format!("job-{n}"), session: format!("session-{}", n % 4), prompt: format!("Job {n}") };
    for done in orchestrator.run((0..12).map(job).collect()).await {
        println!("{} on {:?}: {:?}", done.job.id, done.replica, done.answer);
    }
    match embedded_here {
        Some(manager) => {
            let left = orchestrator.shutdown(Duration::from_secs(10)).await?;
            println!("not drained: {left:?}; nothing left: {}", manager.shutdown(Duration::from_secs(10)).await);
        }
        // Somebody else's daemon may have other pools.
        None => println!("{:?}", execute_drain(&DrainRequest::new(pool, Duration::from_secs(10)), &*control).await?),
    }
    Ok(())
}
