//! The one place where config becomes adapters, and adapters a manager.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engine_host::{
    EngineDecl, HostOptions, HttpProbe, Kind, Mode, ProcessHost, Provisioner, ShimCommand, StubCommand, Unkept,
};
use gpu_nvml::{NvmlError, NvmlGpus, Opening};
use gpu_sim::SimulatedGpus;
use model_store::{Limits, Models, Options};
use pool_domain::DeviceSnapshot;
use pool_domain::mask::MaskError;
use pool_services::ports::GpuProbe;
use pool_services::{BuildError, Event, PoolManager};
use state_dir::{StateDir, StateDirError};
use tokio::sync::{mpsc, watch};

use crate::config::{Config, ConfigError, Engine, EngineKind, EngineMode, Gpu, OnExit};
use crate::exit::{BUG, CONFIG, Exit, IN_USE, NO_GPU};
use crate::restore;

/// Most bytes of one engine's log, and again of the part before.
const LOG_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// How long the first answer whether there are devices may take, however short they are waited for.
const FIRST_ANSWER: Duration = Duration::from_secs(60);
/// How long devices are waited for where engines of an earlier daemon are to be looked after.
pub(crate) const GPUS_BESIDE_ENGINES: Duration = Duration::from_secs(5);
/// No topology is larger.
const TOPOLOGY_MAX_BYTES: u64 = 1024 * 1024;

/// Opens the state directory for this daemon alone.
///
/// # Errors
/// Exit 75 when another daemon has it, 78 when it cannot be used.
pub fn open_state(config: &Config) -> Result<StateDir, Exit> {
    StateDir::open(&config.node.state_dir).map_err(|e| match &e {
        StateDirError::InUse { .. } => Exit::new(IN_USE, e.to_string())
            .hinting("stop the other daemon, or give this one a directory of its own with --state-dir"),
        StateDirError::Io { source, .. } => Exit::new(CONFIG, format!("{e}: {source}"))
            .hinting("make the directory writable for this user, or name another one with --state-dir"),
    })
}

/// Where engines on simulated devices make their claims.
#[must_use]
pub fn sim_dir(config: &Config) -> Option<PathBuf> {
    match config.gpu {
        Gpu::Simulated { .. } => Some(config.node.state_dir.join("run").join("sim")),
        Gpu::Nvml { .. } => None,
    }
}

/// The devices, and what may still be waited for before they are there.
#[derive(Debug)]
pub struct Gpus {
    /// The port over them, which tells why there are none as long as there are none.
    pub probe: Arc<dyn GpuProbe>,
    opening: Option<watch::Receiver<Opening>>,
}

/// Begins to open the devices. Needs a tokio runtime.
///
/// # Errors
/// Exit 78 when the topology is none.
pub fn begin_gpus(config: &Config) -> Result<Gpus, Exit> {
    match &config.gpu {
        Gpu::Simulated { topology } => {
            let dir = sim_dir(config).unwrap_or_default();
            let wrong = |why: String| Exit::from(config.section_error("gpu", "topology", why));
            let size = fs::metadata(topology).map_err(|e| wrong(format!("{}: {e}", topology.display())))?;
            if !size.is_file() || size.len() > TOPOLOGY_MAX_BYTES {
                return Err(wrong(format!("{}: is no file of at most 1 MiB", topology.display())));
            }
            let text = fs::read_to_string(topology).map_err(|e| wrong(format!("{}: {e}", topology.display())))?;
            let mut gpus =
                SimulatedGpus::from_toml(&text, dir).map_err(|e| wrong(format!("{}: {e}", topology.display())))?;
            gpus.start();
            Ok(Gpus { probe: Arc::new(gpus), opening: None })
        }
        Gpu::Nvml { .. } => {
            let gpus = NvmlGpus::start(gpu_nvml::Options::default()).map_err(|e| Exit::new(BUG, e.to_string()))?;
            let opening = Some(gpus.opening());
            Ok(Gpus { probe: Arc::new(gpus), opening })
        }
    }
}

impl Gpus {
    /// Waits for devices, for as long as it is told; `None` is for ever.
    ///
    /// # Errors
    /// Exit 69 when there are none by then, or when waiting is pointless.
    pub async fn wait(&mut self, wait: Option<Duration>) -> Result<(), Exit> {
        let Some(opening) = &mut self.opening else { return Ok(()) };
        let began = tokio::time::Instant::now();
        let mut told = None;
        loop {
            let error = match opening.borrow_and_update().clone() {
                Opening::Done => return Ok(()),
                Opening::Trying(error) => error,
            };
            // The first answer is waited for in any case: to initialise the devices may take long.
            let until = wait.map(|wait| began + if error.is_some() { wait } else { wait.max(FIRST_ANSWER) });
            let over = until.is_some_and(|until| until <= tokio::time::Instant::now());
            match &error {
                // A library that is missing does not come by waiting, unless somebody said that it will.
                Some(error) if over || wait.is_some() && error.is_hopeless() => return Err(no_gpu(error)),
                None if over => return Err(no_gpu(&NvmlError::Silent)),
                Some(error) if told.as_ref() != Some(error) => {
                    tracing::warn!(%error, hint = error.hint(), "waiting for GPUs");
                    told = Some(error.clone());
                }
                _ => {}
            }
            let in_time = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Its sender lives as long as the port.
                _ = opening.changed() => {}
                () = in_time => {}
            }
        }
    }
}

fn no_gpu(error: &NvmlError) -> Exit {
    Exit::new(NO_GPU, format!("no usable GPU: {error}")).hinting(error.hint())
}

/// Opens the devices, waiting for them as long as the config says if `patient`. Needs a tokio runtime.
///
/// # Errors
/// Exit 69 when there is no usable GPU, 78 when the topology is none.
pub async fn open_gpus(config: &Config, patient: bool) -> Result<Arc<dyn GpuProbe>, Exit> {
    let mut gpus = begin_gpus(config)?;
    gpus.wait(if patient { gpu_wait(config) } else { Some(Duration::ZERO) }).await?;
    Ok(gpus.probe)
}

/// How long devices are waited for at boot; `None` is for ever.
#[must_use]
pub fn gpu_wait(config: &Config) -> Option<Duration> {
    match config.gpu {
        Gpu::Simulated { .. } => None,
        Gpu::Nvml { wait, .. } => wait,
    }
}

/// Checks that every mask can be one of this node. What names a device that is not there, and may come, is returned.
///
/// # Errors
/// The first that cannot be, whatever comes.
pub fn check_masks(config: &Config, devices: &[DeviceSnapshot]) -> Result<Vec<ConfigError>, ConfigError> {
    let mut absent = Vec::new();
    for (i, pool) in config.specs().enumerate() {
        for mask in &pool.devices {
            let Err(e) = mask.validate_against_discovered(devices) else { continue };
            let wrong = config.pool_error(i, "devices", e.to_string()).hinting(format!(
                "`pool-managerd check` lists the devices of this node; pool `{}` can also use \"auto\"",
                pool.id
            ));
            match e {
                MaskError::Absent { .. } => absent.push(wrong),
                _ => return Err(wrong),
            }
        }
    }
    Ok(absent)
}

/// The same for a daemon: a pool waits for its devices, and nobody else waits for that pool.
///
/// # Errors
/// The first mask that cannot be.
pub fn check_masks_patiently(config: &Config, devices: &[DeviceSnapshot]) -> Result<(), ConfigError> {
    for error in check_masks(config, devices)? {
        tracing::warn!(%error, hint = error.hint, "a pool waits for a device that is not there");
    }
    Ok(())
}

fn own_program() -> Result<PathBuf, Exit> {
    std::env::current_exe().map_err(|e| Exit::new(BUG, format!("this program cannot be found: {e}")))
}

fn shim() -> Result<ShimCommand, Exit> {
    Ok(ShimCommand { program: own_program()?, args: vec![engine_shim::SUBCOMMAND.to_owned()] })
}

/// Checks that engines can be kept from what the pools say they are to be kept from.
///
/// # Errors
/// The first that cannot.
pub fn check_isolation(config: &Config) -> Result<(), ConfigError> {
    for (i, pool) in config.specs().enumerate() {
        engine_host::can_keep(&pool.isolation).map_err(|unkept| unkept_error(config, i, &unkept))?;
    }
    Ok(())
}

/// The same as an error about a key of the pool.
pub(crate) fn unkept_error(config: &Config, index: usize, unkept: &Unkept) -> ConfigError {
    let key = format!("isolation.{}", unkept.key);
    config.pool_error(index, &key, unkept.message.clone()).hinting(unkept.hint.clone())
}

/// The engine plans.
///
/// # Errors
/// When this program cannot be found.
pub fn provisioner(config: &Config) -> Result<Provisioner, Exit> {
    let decls = declarations(config)?;
    let stub = StubCommand { program: own_program()?, args: vec![stub_engine::SUBCOMMAND.to_owned()] };
    Ok(Provisioner::new(decls, stub, sim_dir(config)).proving_by(shim()?))
}

/// The engines that pools may name.
///
/// # Errors
/// When a name is none.
pub fn declarations(config: &Config) -> Result<Vec<EngineDecl>, Exit> {
    config.engines.iter().map(|(name, engine)| declaration(name, engine)).collect()
}

fn declaration(name: &str, engine: &Engine) -> Result<EngineDecl, Exit> {
    let kind = match engine.kind {
        EngineKind::LlamaCpp => Kind::LlamaCpp,
        EngineKind::Vllm => Kind::Vllm,
        EngineKind::Stub => Kind::Stub,
    };
    let own = if kind == Kind::Vllm { "vllm" } else { "llama-server" };
    let mode = match &engine.mode {
        EngineMode::External(addr) => Mode::External { addr: *addr },
        EngineMode::Binary(path) => Mode::Binary { path: path.clone().unwrap_or_else(|| PathBuf::from(own)) },
    };
    let name = name.parse().map_err(|e: pool_domain::id::IdError| Exit::new(CONFIG, e.to_string()))?;
    Ok(EngineDecl { name, kind, mode })
}

/// The models.
#[must_use]
pub fn models(config: &Config) -> Models {
    let models = config.models.clone();
    Models::new(Options {
        roots: models.roots,
        cache_dir: models.cache_dir,
        cache_max: models.cache_max,
        verify_always: models.verify_always,
        policy: models.policy,
        tokens: models.tokens,
        s3_credentials: models.s3_credentials,
        s3_region: models.s3_region,
        ca_file: models.ca_file,
        limits: Limits::default(),
    })
}

/// Puts a manager together and starts it.
///
/// # Errors
/// When this program cannot be found, or a part is missing.
pub async fn start(
    config: &Config,
    state: StateDir,
    gpus: Arc<dyn GpuProbe>,
) -> Result<(PoolManager, mpsc::Receiver<Event>), Exit> {
    let host = HostOptions {
        runtime_dir: state.runtime_dir(),
        shim: shim()?,
        log_max_bytes: LOG_MAX_BYTES,
        cgroup: true,
        lock_dir: state.lock_dir(),
        outlive: config.node.on_exit != OnExit::Bound,
    };
    let pools = restore::pools(config, &state).await;
    let models = models(config);
    let started = PoolManager::builder()
        .min_ready_time(config.node.min_ready_time)
        .gpu(gpus)
        .xids(config.xids.clone())
        .models(Arc::new(models.clone()))
        .provisioner(Arc::new(provisioner(config)?))
        .host(Arc::new(ProcessHost::new(host)))
        .probe(Arc::new(HttpProbe::new()))
        .ledger(Arc::new(state))
        .engine_ports(config.node.engine_ports.clone())
        .engine_listen(config.node.engine_listen)
        .declared(pools)
        .seed(RandomState::new().hash_one(std::process::id()))
        .boot_ms(boot_ms())
        .max_lease_ttl(config.node.max_lease_ttl)
        .start()
        .await;
    let (manager, events) = started.map_err(|e| match e {
        BuildError::DuplicatePool(_) => Exit::new(CONFIG, e.to_string()),
        _ => Exit::new(BUG, e.to_string()),
    })?;
    let specs = manager.specs();
    models.keep(move || specs.all().iter().map(|spec| spec.model.clone()).collect());
    Ok((manager, events))
}

/// Milliseconds since the machine was started, so that ticks of one boot can be compared.
fn boot_ms() -> u64 {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split_whitespace().next().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0);
    u64::try_from(Duration::try_from_secs_f64(seconds).unwrap_or_default().as_millis()).unwrap_or(0)
}
