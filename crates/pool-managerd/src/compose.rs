//! The one place where config becomes adapters, and adapters a manager.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use engine_host::{
    EngineDecl, HostOptions, HttpProbe, Kind, Mode, ProcessHost, Provisioner, ShimCommand, StubCommand, Unkept,
};
use gpu_nvml::{NvmlError, NvmlGpus};
use gpu_sim::SimulatedGpus;
use model_store::{Limits, Models, Options};
use pool_domain::DeviceSnapshot;
use pool_domain::mask::MaskError;
use pool_services::ports::GpuProbe;
use pool_services::{BuildError, Event, PoolManager};
use state_dir::{StateDir, StateDirError};
use tokio::sync::mpsc;

use crate::config::{Config, ConfigError, Engine, EngineKind, EngineMode, Gpu, OnExit};
use crate::exit::{BUG, CONFIG, Exit, IN_USE, NO_GPU};
use crate::restore;

/// Most bytes of one engine's log, and again of the part before.
const LOG_MAX_BYTES: u64 = 16 * 1024 * 1024;
/// Between two looks for devices at boot.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
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

/// Opens the devices, waiting for them as long as the config says if `patient`. Needs a tokio runtime.
///
/// # Errors
/// Exit 69 when there is no usable GPU, 78 when the topology is none.
pub async fn open_gpus(config: &Config, patient: bool) -> Result<Arc<dyn GpuProbe>, Exit> {
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
            Ok(Arc::new(gpus))
        }
        Gpu::Nvml { wait } => open_nvml(if patient { *wait } else { Some(Duration::ZERO) }).await,
    }
}

async fn open_nvml(wait: Option<Duration>) -> Result<Arc<dyn GpuProbe>, Exit> {
    let began = tokio::time::Instant::now();
    let mut told = false;
    loop {
        let opened = tokio::task::spawn_blocking(NvmlGpus::open).await;
        let error = match opened.map_err(|e| Exit::new(BUG, format!("the search for GPUs ended: {e}")))? {
            Ok(gpus) => return Ok(Arc::new(gpus)),
            Err(error) => error,
        };
        // A library that is missing does not come by waiting, unless somebody said that it will.
        let hopeless = matches!(error, NvmlError::LibraryMissing(_) | NvmlError::VersionMismatch);
        if wait.is_some_and(|w| hopeless || began.elapsed() >= w) {
            return Err(Exit::new(NO_GPU, format!("no usable GPU: {error}")).hinting(error.hint()));
        }
        if !told {
            tracing::warn!(%error, hint = error.hint(), "waiting for GPUs");
            told = true;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
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
    let mut decls = Vec::new();
    for (name, engine) in &config.engines {
        decls.push(declaration(name, engine)?);
    }
    let stub = StubCommand { program: own_program()?, args: vec![stub_engine::SUBCOMMAND.to_owned()] };
    Ok(Provisioner::new(decls, stub, sim_dir(config)).proving_by(shim()?))
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
