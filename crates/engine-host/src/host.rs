//! Launches engines, each below a shim of its own.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use engine_shim::{LaunchSpec, Report, SecretFile, User};
use fault_points::{Point, reached};
use pool_domain::failure::Exit;
use pool_domain::{Failure, FailureClass, Generation, ReplicaKey};
use pool_services::ports::{
    Confinement, EngineHost, EngineRecord, EngineSecret, EngineUser, NotAdopted, PreparedEngine, RunningEngine,
};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::adopt::{self, Files, NONCE_ENV};
use crate::cgroup::{Cgroup, Parent};
use crate::external::ExternalEngine;
use crate::isolation;
use crate::locks::Locks;
use crate::memory_cgroup::{MemoryCgroup, MemoryParent};
use crate::running::{Launched, Reports, ShimEngine};
use crate::text::{config, tidy};
use crate::tree::Root;

/// How long a shim may take to exec the engine.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a shim that failed to do so may take to clear up.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(5);
/// Generations whose logs are kept, beside the one that is launched.
const KEPT_GENERATIONS: usize = 2;
const LAUNCH_SPEC: &str = "launch.json";
const ENGINE_LOG: &str = "engine.log";
const SHIM_LOG: &str = "shim.log";
const WORKDIR: &str = "work";
/// Where POSIX shared memory lies (shm_overview(7)).
const SHM_DIR: &str = "/dev/shm";

/// How the shim is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimCommand {
    /// The program, for example this daemon's own.
    pub program: PathBuf,
    /// What comes before the launch spec's path, for example `engine-shim`.
    pub args: Vec<String>,
}

/// What a [`ProcessHost`] needs.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Where each generation gets a directory: `<pool>-<replica>/<generation>`.
    pub runtime_dir: PathBuf,
    /// The shim.
    pub shim: ShimCommand,
    /// The most bytes of an engine's log, and again of the part before.
    pub log_max_bytes: u64,
    /// Whether to give each engine a cgroup where that can be done.
    pub cgroup: bool,
    /// Where the locks lie that engines hold. It has to outlive `runtime_dir`, and is never removed.
    pub lock_dir: PathBuf,
    /// Whether engines live on when this process is gone, however that came about, for a later one to take over.
    pub outlive: bool,
}

/// Launches engines on this machine.
#[derive(Debug)]
pub struct ProcessHost {
    options: HostOptions,
    locks: Locks,
    cgroups: Option<Arc<Parent>>,
    /// Where version 1 counts memory.
    memory: Option<Arc<MemoryParent>>,
    /// Whether engines could not join their cgroups, though these could be made.
    cgroups_closed: AtomicBool,
    nonces: AtomicU64,
}

/// Why an engine was not launched.
enum NotLaunched {
    /// It could not join its cgroup.
    Cgroup(String),
    Failed(Failure),
}

impl From<Failure> for NotLaunched {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn dir(runtime_dir: &Path, key: &ReplicaKey, generation: Generation) -> PathBuf {
    runtime_dir.join(key.to_string()).join(generation.to_string())
}

/// Where the log of an engine is that a host with this runtime directory launched; the part before it has `.1` appended.
#[must_use]
pub fn log_path(runtime_dir: &Path, key: &ReplicaKey, generation: Generation) -> PathBuf {
    dir(runtime_dir, key, generation).join(ENGINE_LOG)
}

impl ProcessHost {
    /// A host. Without cgroups, where they are wanted, it warns and goes by process groups and parentage.
    #[must_use]
    pub fn new(mut options: HostOptions) -> Self {
        // The shim's word for an absolute path is strict.
        if let Ok(absolute) = std::path::absolute(&options.runtime_dir) {
            options.runtime_dir = absolute;
        }
        let cgroups = options.cgroup.then(Parent::create).and_then(|created| match created {
            Ok(parent) => Some(parent),
            Err(error) => {
                tracing::warn!(%error, "engines get no cgroups");
                None
            }
        });
        let memory = options.cgroup.then(MemoryParent::create).flatten();
        Self {
            locks: Locks::in_dir(&options.lock_dir),
            options,
            cgroups,
            memory,
            cgroups_closed: AtomicBool::new(false),
            nonces: AtomicU64::new(0),
        }
    }

    /// Where the log of a generation is; the part before it has `.1` appended.
    #[must_use]
    pub fn log_path(&self, key: &ReplicaKey, generation: Generation) -> PathBuf {
        log_path(&self.options.runtime_dir, key, generation)
    }

    fn dir(&self, key: &ReplicaKey, generation: Generation) -> PathBuf {
        dir(&self.options.runtime_dir, key, generation)
    }

    fn cgroup(&self, record: &EngineRecord) -> Option<Cgroup> {
        let parent = self.cgroups.as_ref().filter(|_| !self.cgroups_closed.load(Ordering::Relaxed))?;
        match parent.engine(&cgroup_name(record)) {
            Ok(cgroup) => Some(cgroup),
            Err(error) => {
                self.close_cgroups(&error.to_string());
                None
            }
        }
    }

    fn memory_cgroup(&self, record: &EngineRecord) -> Option<MemoryCgroup> {
        self.memory.as_ref()?.engine(&cgroup_name(record))
    }

    fn close_cgroups(&self, error: &str) {
        if !self.cgroups_closed.swap(true, Ordering::Relaxed) {
            tracing::warn!(error, "engines get no cgroups");
        }
    }

    async fn start(
        &self,
        record: &EngineRecord,
        program: &Path,
        engine: &PreparedEngine,
        lock: fs::File,
        cgroup: Option<Cgroup>,
        memory: Option<MemoryCgroup>,
    ) -> Result<ShimEngine, NotLaunched> {
        let dir = &self.dir(&record.key, record.generation);
        let confinement = &engine.confinement;
        if let Some(bytes) = confinement.memory_max {
            limit_memory(bytes, cgroup.as_ref(), memory.as_ref())
                .map_err(|error| isolation::unlimited(bytes, &error))?;
        }
        // To join one that only counts can wait; one that limits cannot.
        let limited = confinement.memory_max.is_some();
        let memory_procs: Vec<PathBuf> = memory.iter().map(MemoryCgroup::procs).collect();
        let workdir = make_workdir(dir, confinement.user.as_ref())
            .map_err(|error| cannot("make the engine's working directory", &error))?;
        let Files { start, exit, log } = files(dir);
        let shared_locks = self.locks.of_devices(&record.devices.uuids);
        let shared_locks = shared_locks.map_err(|error| cannot("make the locks of the devices", &error))?;
        let spec = LaunchSpec {
            nonce: record.nonce.clone(),
            program: program.to_path_buf(),
            args: engine.args.clone(),
            env: engine.env.iter().cloned().chain(secret_env(confinement)).collect(),
            workdir,
            log: log.clone(),
            log_max_bytes: self.options.log_max_bytes,
            scrub: (confinement.secrets.iter().map(|secret| secret.value.clone()))
                .chain(secret_env(confinement).map(|(_, value)| value))
                .collect(),
            exit_record: exit,
            start_record: start,
            start_record_copy: Some(self.locks.start_record(&record.key.to_string())),
            lock_on_stdin: true,
            shared_locks,
            cgroup_procs: cgroup.iter().map(Cgroup::procs).collect(),
            limiting_cgroup_procs: if limited { memory_procs.clone() } else { Vec::new() },
            later_cgroup_procs: if limited { Vec::new() } else { memory_procs },
            nofile: isolation::nofile(confinement.nofile),
            run_as: run_as(confinement),
            secrets: confinement.secrets.iter().map(secret_file).collect(),
            shm_dir: Some(SHM_DIR.into()),
            stop_when_parent_gone: !self.options.outlive,
        };
        let (spec_path, shim_log) = (dir.join(LAUNCH_SPEC), dir.join(SHIM_LOG));
        let stderr = write_launch(&spec_path, &spec, &shim_log).map_err(|error| cannot("write the launch", &error))?;
        reached(Point::AfterSpecWritten);

        let mut command = Command::new(&self.options.shim.program);
        command.args(&self.options.shim.args).arg(&spec_path).env_clear().env(NONCE_ENV, &record.nonce);
        command.stdin(lock).stdout(Stdio::piped()).stderr(stderr);
        let spawned = command.spawn();
        // The lock is the shim's from here on.
        drop(command);
        reached(Point::AfterSpawnShim);
        let mut shim = spawned.map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied => config(format!("the shim cannot be run: {error}")),
            _ => cannot("start the shim", &error),
        })?;
        // Not waited for yet, so the pid is its.
        let pid = shim.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let handle = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
        let (Some(Ok(handle)), Some(stdout)) = (handle, shim.stdout.take()) else {
            let _ended = shim.start_kill();
            let _reaped = shim.wait().await;
            return Err(Failure::new(FailureClass::Crash(Exit::Unknown), "the shim cannot be watched").into());
        };
        let root = shim.id().and_then(Root::of);
        let mut reports: Reports = BufReader::new(stdout).lines();
        let first = timeout(START_TIMEOUT, reports.next_line()).await;
        let report = match &first {
            Ok(Ok(Some(line))) => serde_json::from_str(line).ok(),
            _ => None,
        };
        if let Some(Report::Started { pid: main, .. }) = report {
            reached(Point::AfterStartedReport);
            // It has been read, and it may hold secrets.
            let _left = fs::remove_file(&spec_path);
            let kind = engine.endpoint.kind.clone();
            let launched = Launched { shim: Some(handle), root, main: Some(main), kind, log, cgroup, memory };
            return Ok(ShimEngine::supervise(launched, shim, reports));
        }

        let _ended = pidfd_send_signal(&handle, Signal::USR1);
        clear_up(&mut shim, cgroup.as_ref()).await;
        Err(match report {
            Some(Report::Failed { step, message, .. }) if step == "cgroup" && cgroup.is_some() => {
                NotLaunched::Cgroup(message)
            }
            Some(Report::Failed { step, message, errno, .. }) => refused(&step, &message, errno).into(),
            _ if first.is_err() => {
                let detail = format!("the shim did not start the engine within {} s", START_TIMEOUT.as_secs());
                Failure::new(FailureClass::StartTimeout, detail).into()
            }
            _ => {
                let said = fs::read_to_string(&shim_log).unwrap_or_default();
                let detail = format!("the shim ended without a report: {}", tidy(said.lines().last().unwrap_or("")));
                Failure::new(FailureClass::Crash(Exit::Unknown), detail).into()
            }
        })
    }
}

/// By its nonce a later daemon tells it from any other.
fn cgroup_name(record: &EngineRecord) -> String {
    let EngineRecord { key, generation, nonce, .. } = record;
    format!("{key}-{generation}-{nonce}")
}

#[async_trait]
impl EngineHost for ProcessHost {
    fn port_free(&self, addr: SocketAddr) -> bool {
        TcpListener::bind(addr).is_ok()
    }

    async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure> {
        let Some(program) = &engine.entry else {
            return Ok(Arc::new(ExternalEngine::new()));
        };
        let lock = self.locks.take(&record.key).await.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => {
                let detail = "something of an earlier engine of this replica still holds its lock";
                Failure::new(FailureClass::Crash(Exit::Unknown), detail)
            }
            _ => cannot("lock the replica", &error),
        })?;
        reached(Point::AfterReplicaLock);
        let again = lock.try_clone().map_err(|error| cannot("lock the replica", &error))?;
        let dir = self.dir(&record.key, record.generation);
        make_dir(&dir).map_err(|error| cannot("make the engine's directory", &error))?;
        let memory = || self.memory_cgroup(record);
        let mut started = self.start(record, program, engine, lock, self.cgroup(record), memory()).await;
        if let Err(NotLaunched::Cgroup(error)) = &started {
            self.close_cgroups(error);
            started = self.start(record, program, engine, again, None, memory()).await;
        }
        match started {
            Ok(engine) => Ok(Arc::new(engine)),
            Err(not_launched) => {
                let _left = fs::remove_dir_all(&dir);
                Err(match not_launched {
                    NotLaunched::Failed(failure) => failure,
                    NotLaunched::Cgroup(error) => refused("cgroup", &error, None),
                })
            }
        }
    }

    fn nonce(&self) -> String {
        match fs::read_to_string("/proc/sys/kernel/random/uuid") {
            Ok(uuid) => uuid.trim().to_owned(),
            Err(_) => {
                let n = self.nonces.fetch_add(1, Ordering::Relaxed);
                let boot = engine_shim::boot_id().unwrap_or_default();
                let own = Root::of(std::process::id());
                format!("{boot}-{}-{n}", own.map(Root::name).unwrap_or_default())
            }
        }
    }

    async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted> {
        let files = files(&self.dir(&record.key, record.generation));
        let engine = adopt::find(&self.locks, &files, record).await?;
        Ok(Arc::new(engine))
    }

    async fn end_unknown(&self, known: &[EngineRecord], devices: &[String]) -> Vec<String> {
        let nonces: Vec<&str> = known.iter().map(|record| record.nonce.as_str()).collect();
        if let Some(parent) = &self.cgroups {
            parent.sweep(&nonces);
        }
        if let Some(parent) = &self.memory {
            parent.sweep(&nonces);
        }
        let keys: Vec<String> = known.iter().map(|record| record.key.to_string()).collect();
        let mut left = false;
        for key in self.locks.replicas() {
            if !keys.contains(&key) && self.locks.replica_held(&key) {
                left |= !adopt::end_holder(&self.locks, &key).await;
            }
        }
        // The engines on record hold the locks of their devices, so there only what was found otherwise counts.
        let on_record = |uuid: &String| known.iter().any(|record| record.devices.uuids.contains(uuid));
        devices.iter().filter(|uuid| (left || !on_record(uuid)) && self.locks.device_held(uuid)).cloned().collect()
    }

    fn device_clear(&self, device: &str) -> bool {
        !self.locks.device_held(device)
    }
}

fn files(dir: &Path) -> Files {
    Files { start: dir.join("start.json"), exit: dir.join("exit.json"), log: dir.join(ENGINE_LOG) }
}

fn run_as(confinement: &Confinement) -> Option<User> {
    let user = confinement.user.as_ref()?;
    Some(User { uid: user.uid, gid: user.gid, groups: user.groups.clone() })
}

fn secret_env(confinement: &Confinement) -> impl Iterator<Item = (String, String)> {
    confinement.secret_env.iter().map(|(name, key)| (name.clone(), key.reveal().to_owned()))
}

fn secret_file(secret: &EngineSecret) -> SecretFile {
    SecretFile { name: secret.file.clone(), value: secret.value.clone() }
}

/// By version 2 where that counts memory, else by version 1.
fn limit_memory(bytes: u64, cgroup: Option<&Cgroup>, memory: Option<&MemoryCgroup>) -> io::Result<()> {
    match (cgroup.filter(|cgroup| cgroup.limits_memory()), memory) {
        (Some(cgroup), _) => cgroup.limit_memory(bytes),
        (None, Some(memory)) => memory.limit(bytes),
        (None, None) => Err(ErrorKind::Unsupported.into()),
    }
}

/// Where the engine works: the one place in its generation's directory that is its own.
///
/// The directory above is the daemon's alone. An engine of another user is put into its own and can neither look at what
/// lies beside it nor come back by way of the path.
fn make_workdir(dir: &Path, user: Option<&EngineUser>) -> io::Result<PathBuf> {
    let workdir = dir.join(WORKDIR);
    match fs::DirBuilder::new().mode(0o700).create(&workdir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let Some(user) = user else { return Ok(workdir) };
    match std::os::unix::fs::chown(&workdir, Some(user.uid), Some(user.gid)) {
        // To give something away takes CAP_CHOWN. Nobody else gets as far as this.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            fs::set_permissions(&workdir, fs::Permissions::from_mode(0o777))?;
        }
        done => done?,
    }
    Ok(workdir)
}

/// Waits for a shim that was told to end everything, and ends it if it does not.
async fn clear_up(shim: &mut Child, cgroup: Option<&Cgroup>) {
    if let Some(cgroup) = cgroup {
        cgroup.kill();
    }
    if timeout(CLEAR_TIMEOUT, shim.wait()).await.is_err() {
        tracing::warn!("a shim does not end: ending it");
        if let Err(error) = shim.kill().await {
            tracing::warn!(%error, "the shim cannot be ended");
        }
    }
    if let Some(cgroup) = cgroup {
        cgroup.kill();
        if timeout(CLEAR_TIMEOUT, cgroup.emptied()).await.is_err() {
            tracing::error!("processes of an engine that did not start cannot be ended");
        }
    }
}

/// What the shim's refusal means.
fn refused(step: &str, message: &str, errno: Option<i32>) -> Failure {
    let detail = format!("the engine was not started ({step}): {}", tidy(message));
    if let Some(failure) = errno.and_then(|errno| of_the_node(&io::Error::from_raw_os_error(errno), &detail)) {
        return failure;
    }
    let class = match step {
        "exec" | "program" | "user" | "nofile_limit" | "memory_limit" => FailureClass::Config,
        _ => FailureClass::Crash(Exit::Unknown),
    };
    Failure::new(class, detail)
}

fn cannot(what: &str, error: &io::Error) -> Failure {
    let detail = format!("cannot {what}: {error}");
    of_the_node(error, &detail).unwrap_or_else(|| Failure::new(FailureClass::Crash(Exit::Unknown), detail))
}

/// The failure of a node that has no room for a launch, with what helps; `None` for what may well be the engine's own.
fn of_the_node(error: &io::Error, detail: &str) -> Option<Failure> {
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space where its state or runtime directory lies"
        }
        ErrorKind::ReadOnlyFilesystem => "the file system of its state or runtime directory is read-only: remount it",
        ErrorKind::OutOfMemory => "the node is out of memory",
        ErrorKind::WouldBlock => "the node has no more processes to give: raise the limit of tasks",
        _ => match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => "the node has no more open files to give: raise the limit",
            _ => return None,
        },
    };
    Some(Failure::new(FailureClass::Node, format!("{detail} ({hint})")))
}

/// Makes the directory of a generation, for nobody else, and removes those of long ago.
fn make_dir(dir: &Path) -> io::Result<()> {
    if let Some(replica) = dir.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(replica)?;
        let mut old: Vec<(u64, PathBuf)> = fs::read_dir(replica)?
            .flatten()
            .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
            .filter(|(_, path)| path != dir)
            .collect();
        old.sort_unstable();
        for (_, path) in old.iter().rev().skip(KEPT_GENERATIONS) {
            let _left = fs::remove_dir_all(path);
        }
    }
    // A generation is never used twice: what lies there is of a daemon that lost its memory.
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(dir)
}

/// Writes the launch spec and opens the shim's own log.
fn write_launch(spec_path: &Path, spec: &LaunchSpec, shim_log: &Path) -> io::Result<fs::File> {
    let open = |path| fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open(spec_path)?.write_all(&serde_json::to_vec(spec)?)?;
    open(shim_log)
}
