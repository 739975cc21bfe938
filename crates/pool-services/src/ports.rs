//! What the services need from the outside, as small traits. Adapters implement them, `pool-testkit` fakes them.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::charges::{Charge, Said};
use pool_domain::echo::Source;
use pool_domain::estimate::{Correction, CorrectionKey};
use pool_domain::lifecycle::{OnDeadline, Past, Proof};
use pool_domain::liveness::Work;
use pool_domain::meters::Reading;
use pool_domain::perf::{Perf, PerfKey, Speeds};
use pool_domain::plan::EngineMemory;
use pool_domain::rollout::Probation;
use pool_domain::suspicion::Suspicions;
use pool_domain::{
    DeviceSnapshot, Failure, Generation, ModelProfile, ModelRef, PoolId, ReplicaKey, ResolvedMask, Tick,
};
use thiserror::Error;
use tokio::sync::watch;

use crate::api_key::ApiKey;
use crate::snapshot::LastError;
use crate::spec::{PoolSpec, Workload};

/// The devices of the node at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inventory {
    /// Whether these devices exist only in a file.
    pub simulated: bool,
    /// Driver version, where known.
    pub driver: Option<String>,
    /// CUDA version of the driver such as `13.0`, where known.
    pub cuda: Option<String>,
    /// Every GPU and MIG slice.
    pub devices: Vec<DeviceSnapshot>,
    /// Why there are none, or why this is old.
    pub problem: Option<String>,
}

/// Memory of one process on one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The device.
    pub uuid: String,
    /// The process.
    pub pid: u32,
    /// Bytes.
    pub bytes: u64,
}

/// What is known of who holds memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Residency {
    /// Every holder is listed, so that absence is proof of absence.
    Provable(Vec<Holder>),
    /// Holders as the driver names them, which need not be as they are named here: whoever is found is there, but who is
    /// not found may be listed under another name, or not at all.
    Partial(Vec<Holder>),
    /// Holders on simulated devices: only engines that made a claim are listed.
    Simulated(Vec<Holder>),
    /// Nobody can say now.
    Unknown(String),
}

/// How much of a device something is said of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// All of it.
    Device,
    /// One slice of it, which is not known.
    UnknownSlice,
}

/// Something that a driver said of a device, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incident {
    /// UUID of the GPU or slice.
    pub device: String,
    /// How much of it is meant.
    pub reach: Reach,
    /// What.
    pub said: Said,
    /// The process that it is about, where that is told.
    pub pid: Option<u32>,
    /// Who said it.
    pub source: Source,
}

/// The newest incidents, oldest first, and how many there were before them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Incidents {
    /// That are not among the newest any more.
    pub earlier: u64,
    /// The newest.
    pub newest: VecDeque<Incident>,
}

impl Incidents {
    /// How many are kept.
    const KEPT: usize = 256;

    /// Adds one.
    pub fn push(&mut self, incident: Incident) {
        self.newest.push_back(incident);
        if self.newest.len() > Self::KEPT {
            self.newest.pop_front();
            self.earlier += 1;
        }
    }

    /// Those after the first `seen`, as far as they are kept; and how many there are by now.
    #[must_use]
    pub fn after(&self, seen: u64) -> (Vec<Incident>, u64) {
        let skip = usize::try_from(seen.saturating_sub(self.earlier)).unwrap_or(usize::MAX);
        (self.newest.iter().skip(skip).cloned().collect(), self.earlier + self.newest.len() as u64)
    }
}

/// The GPUs.
#[async_trait]
pub trait GpuProbe: fmt::Debug + Send + Sync {
    /// The newest inventory; the receiver is told of every change. Never blocks.
    fn inventory(&self) -> watch::Receiver<Inventory>;
    /// What the driver said; nothing, where there is none that says anything. Never blocks.
    fn incidents(&self) -> watch::Receiver<Incidents> {
        watch::channel(Incidents::default()).1
    }
    /// Who holds memory now.
    async fn residency(&self) -> Residency;
}

/// A model that is present and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// Short name; engines serve it under this name.
    pub id: String,
    /// Where it lies, if it is a file.
    pub local_path: Option<PathBuf>,
    /// Size on disk in bytes.
    pub bytes: u64,
}

/// What is being done to make a model present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagingStep {
    /// Somebody else fetches the same model, and is waited for.
    Waiting,
    /// It is being fetched.
    Fetching,
    /// What is there is being read and compared with its digest.
    Verifying,
}

impl StagingStep {
    /// The step as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Fetching => "fetching",
            Self::Verifying => "verifying",
        }
    }
}

/// How far the staging of a model has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staging {
    /// What is being done.
    pub step: StagingStep,
    /// Bytes done of all files together.
    pub done: u64,
    /// Bytes of all files together, where that is known.
    pub total: Option<u64>,
    /// Bytes a second, of late; 0 where nothing is known yet.
    pub rate: u64,
}

impl Staging {
    /// Time left at the present rate, where that can be said.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        let left = self.total?.saturating_sub(self.done);
        (self.rate > 0).then(|| Duration::from_secs(left.div_ceil(self.rate)))
    }
}

/// Where a store tells how far it has come. It may tell as often as it likes: who listens looks now and then.
pub type StagingTold = watch::Sender<Option<Staging>>;

/// What is known of a model without fetching anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// It can be used.
    Here(ResolvedModel),
    /// It has to be fetched first.
    Remote,
}

/// The models.
#[async_trait]
pub trait ModelStore: fmt::Debug + Send + Sync {
    /// Whether a pool may name this model, wherever it is; else why not. Looks at nothing.
    fn permits(&self, model: &ModelRef) -> Result<(), String>;
    /// Whether it is here. Fetches nothing.
    async fn look(&self, model: &ModelRef) -> Result<Presence, Failure>;
    /// Makes a model present and verified, and tells how far that has come. Whoever drops it stops it; what was fetched is
    /// kept for the next time.
    async fn ensure_present(&self, model: &ModelRef, told: &StagingTold) -> Result<ResolvedModel, Failure>;
    /// What its header says about memory; `None` where no formula is known for what it is.
    async fn profile(&self, model: &ResolvedModel) -> Result<Option<ModelProfile>, Failure>;
}

/// Everything an engine is prepared from.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    /// The pool.
    pub spec: PoolSpec,
    /// Its model.
    pub model: ResolvedModel,
    /// Its devices.
    pub devices: ResolvedMask,
    /// Where it will listen.
    pub listen: SocketAddr,
    /// How it is spread over its devices, as the engine takes it, where the planner decided.
    pub tensor_split: Option<String>,
    /// Context in tokens over all slots, where the planner decided or was told.
    pub context: Option<u64>,
}

/// How to reach an engine and what to expect there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Kind of engine, for example `llama.cpp`.
    pub kind: String,
    /// Model name it must serve.
    pub model: String,
    /// Model file it must serve, where the kind tells.
    pub model_path: Option<PathBuf>,
    /// What it is for.
    pub workload: Workload,
    /// What it wants to hear from whoever asks it, where others than this machine's own can.
    pub api_key: Option<ApiKey>,
}

impl Endpoint {
    /// The base URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// An engine ready to be launched. Nothing was spawned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedEngine {
    /// Program to run; `None` for an external engine, which is attached to instead.
    pub entry: Option<PathBuf>,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// What it is kept from, and what only it is told.
    pub confinement: Confinement,
    /// Where it will be reached.
    pub endpoint: Endpoint,
    /// Version that was discovered.
    pub engine_version: String,
}

/// Who an engine runs as, by the numbers of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineUser {
    /// The user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its further groups.
    pub groups: Vec<u32>,
}

/// A secret for an engine. It reaches the engine as a file that only the engine's user may read, and is taken out of its
/// log.
#[derive(Clone, PartialEq, Eq)]
pub struct EngineSecret {
    /// Name of the file in the engine's working directory.
    pub file: String,
    /// What it holds.
    pub value: String,
}

/// Leaves out the value.
impl fmt::Debug for EngineSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineSecret").field("file", &self.file).finish_non_exhaustive()
    }
}

/// What an engine is kept from, and what only it is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Confinement {
    /// Who it runs as, without any capability; unset = as the daemon does.
    pub user: Option<EngineUser>,
    /// Most bytes of the host's memory.
    pub memory_max: Option<u64>,
    /// Most open files; unset = what is usual.
    pub nofile: Option<u64>,
    /// What it is told.
    pub secrets: Vec<EngineSecret>,
    /// The same as variables of its environment, for kinds that read no file.
    pub secret_env: Vec<(String, ApiKey)>,
}

/// Why a spec cannot be for any engine here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAdmitted {
    /// There is no such engine.
    Engine(String),
    /// An argument is not for a pool to give.
    Argument(String),
}

/// Turns specs into engines that can be launched.
#[async_trait]
pub trait EngineProvisioner: fmt::Debug + Send + Sync {
    /// Checks that the engine of a spec is there and can run, without starting it.
    async fn preflight(&self, spec: &PoolSpec) -> Result<(), Failure>;
    /// Whether the engine of a spec is run by somebody else, and where.
    fn external(&self, spec: &PoolSpec) -> Option<SocketAddr>;
    /// Whether there is such an engine and whether it may be given the spec's arguments. Asks no program.
    fn admits(&self, spec: &PoolSpec) -> Result<(), NotAdmitted>;
    /// The same for one that is declared over the API, which may be given fewer.
    fn admits_from_api(&self, spec: &PoolSpec) -> Result<(), NotAdmitted> {
        self.admits(spec)
    }
    /// How the memory of the spec's engine is known.
    fn memory(&self, spec: &PoolSpec) -> EngineMemory;
    /// Plans the launch. Never spawns an engine.
    async fn prepare(&self, request: &PrepareRequest) -> Result<PreparedEngine, Failure>;
}

/// Whose socket listens at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// The engine's own tree.
    Own,
    /// Somebody else.
    Foreign,
    /// Nobody.
    None,
}

/// How far an engine had come when its record was written.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// It has proved nothing yet.
    Starting,
    /// It serves.
    Ready {
        /// Since when, in ticks of this boot.
        since: Tick,
        /// What it proved.
        proof: Proof,
    },
    /// It serves those that are there.
    Draining {
        /// Ready since when.
        ready_since: Tick,
        /// What it proved.
        proof: Proof,
        /// Absolute end of the drain.
        deadline: Tick,
        /// What happens then.
        on_deadline: OnDeadline,
    },
    /// It is being ended.
    Stopping,
}

/// What has to be known of an engine to find it again and go on with it: written down before its launch.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRecord {
    /// Its replica.
    pub key: ReplicaKey,
    /// Its generation.
    pub generation: Generation,
    /// Names this one launch, here and for ever.
    pub nonce: String,
    /// What of the spec it was made from, as [`PoolSpec::fingerprint`] tells it.
    pub fingerprint: String,
    /// Where it is reached.
    pub endpoint: Endpoint,
    /// Engine version.
    pub engine_version: String,
    /// Its devices.
    pub devices: ResolvedMask,
    /// Bytes promised on each of them.
    pub bytes: Vec<u64>,
    /// What no process was listed for on each of them before the launch; unset where nobody could say.
    pub unlisted: Option<Vec<u64>>,
    /// The program it runs, as [`RunningEngine::executable`] told; unset = whatever it was launched as.
    pub executable: Option<String>,
    /// How far it had come.
    pub phase: Phase,
}

/// Why an engine that is on record is not taken over.
#[derive(Debug)]
pub struct NotAdopted {
    /// What does not match.
    pub why: Failure,
    /// What can still be done about it: `kill` reaches only what is provably its own, `gone` tells when nothing is left.
    /// `None`: nothing is left.
    pub rest: Option<Arc<dyn RunningEngine>>,
}

/// Launches engines.
#[async_trait]
pub trait EngineHost: fmt::Debug + Send + Sync {
    /// Whether a port could be bound now.
    fn port_free(&self, addr: SocketAddr) -> bool;
    /// A name for one launch that no other ever has.
    fn nonce(&self) -> String;
    /// Launches what is on record; a failure leaves nothing behind.
    async fn launch(&self, record: &EngineRecord, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure>;
    /// Finds the engine of an earlier daemon, before anything is launched. One that ended meanwhile is found too, and
    /// tells so.
    async fn adopt(&self, record: &EngineRecord) -> Result<Arc<dyn RunningEngine>, NotAdopted>;
    /// Ends whatever engines of earlier daemons no record names, before anything is launched, and tells the devices, of
    /// all these, on which some may be left.
    async fn end_unknown(&self, known: &[EngineRecord], devices: &[String]) -> Vec<String>;
    /// Whether no engine of an earlier daemon is left on a device, as far as is known of those that no record names.
    fn device_clear(&self, device: &str) -> bool;
}

/// A launched engine. Signals are fire and forget; what became of them is told by `exited` and `gone`.
#[async_trait]
pub trait RunningEngine: fmt::Debug + Send + Sync {
    /// Its main process, if it is ours.
    fn pid(&self) -> Option<u32>;
    /// Every process of it.
    fn pids(&self) -> Vec<u32>;
    /// Resolves when the main process ended, with the class of that end.
    async fn exited(&self) -> Failure;
    /// Resolves when it is proved that nothing of it is left. May never.
    async fn gone(&self);
    /// Asks it to end.
    fn terminate(&self);
    /// Ends all of it.
    fn kill(&self);
    /// A number that changes whenever the engine got somewhere (log written, time used).
    fn progress(&self) -> u64;
    /// Whose socket listens at its address.
    fn listener(&self, addr: SocketAddr) -> Listener;
    /// Names the program that its main process runs now.
    fn executable(&self) -> Option<String>;
    /// Whether the questions above are answered from memory, so that no other thread is needed for them. A simulation
    /// is repeatable only on one thread.
    fn answers_at_once(&self) -> bool {
        false
    }
}

/// An engine's answer about itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Up {
    /// Nobody listens.
    Refused,
    /// Not yet; with a progress from 0 to 1 where the engine tells.
    Loading(Option<f32>),
    /// It says that it serves.
    Serving,
    /// It says that it has too much to do, or cannot now.
    Overloaded(String),
    /// Something answers that is not the engine.
    Wrong(String),
    /// No usable answer.
    Failed(String),
}

/// What an engine says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Model it serves.
    pub model: String,
    /// Requests it takes at once.
    pub slots: u16,
    /// Version, where it tells.
    pub version: Option<String>,
}

/// What an engine made of a unit of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worked {
    /// It is done.
    Done,
    /// It has no room for it now.
    Declined,
}

/// What a look at a busy or idle engine shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// What it is working on and how far it came.
    pub work: Work,
    /// What it publishes in numbers.
    pub reading: Reading,
}

impl From<Work> for Observed {
    fn from(work: Work) -> Self {
        Self { work, reading: Reading::default() }
    }
}

/// Asks engines over their own protocol.
#[async_trait]
pub trait EngineProbe: fmt::Debug + Send + Sync {
    /// Whether it says that it serves.
    async fn up(&self, endpoint: &Endpoint) -> Up;
    /// What it is; a failure of class `wrong_server` if it serves something else.
    async fn identify(&self, endpoint: &Endpoint) -> Result<Identity, Failure>;
    /// Has it do one unit of its workload. Whoever drops the question takes it back.
    async fn work(&self, endpoint: &Endpoint) -> Result<Worked, Failure>;
    /// What it is working on and how far it came, where it tells. `Silent` is for the caller to say, who has the time.
    async fn signals(&self, endpoint: &Endpoint) -> Work;
    /// The same, with what it publishes in numbers, where that costs no further question.
    async fn observe(&self, endpoint: &Endpoint) -> Observed {
        self.signals(endpoint).await.into()
    }
}

/// What a Ready replica tells consumers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handoff {
    /// The replica.
    pub key: ReplicaKey,
    /// Its generation.
    pub generation: Generation,
    /// Where it is reached.
    pub endpoint: String,
    /// What it wants to hear.
    pub api_key: Option<ApiKey>,
    /// Engine name.
    pub engine: String,
    /// Engine version.
    pub engine_version: String,
    /// Model.
    pub model: String,
    /// Devices.
    pub device_mask: String,
    /// Slots.
    pub slots: u16,
    /// Bytes reserved on its devices together.
    pub vram: u64,
}

/// Why a durable fact could not be written.
#[derive(Debug, Error)]
#[error("could not write {what}")]
pub struct LedgerError {
    /// What was to be written.
    pub what: &'static str,
    /// Why not.
    #[source]
    pub source: std::io::Error,
}

/// A pool whose spec is not what the config file says, written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPool {
    /// Its name.
    pub pool: PoolId,
    /// Revision of its spec.
    pub revision: u64,
    /// The pool in its wire form. Opaque here.
    pub document: String,
    /// Set: it stands in for a pool of the file as long as that one's table has this digest. Unset: a pool of the API.
    pub file_digest: Option<String>,
    /// The document before the last reload.
    pub previous: Option<String>,
    /// How long a failure brings that back, in ticks of this boot; after a reboot nothing does.
    pub probation: Option<Probation>,
}

/// What is held against devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgainstDevices {
    /// Because engines of several pools failed there.
    pub suspicions: Suspicions,
    /// Because of what the driver said, by UUID.
    pub charges: BTreeMap<String, Charge>,
}

/// Facts that outlive the daemon.
#[async_trait]
pub trait StateLedger: fmt::Debug + Send + Sync {
    /// The last generation ever used by a replica.
    async fn last_generation(&self, key: &ReplicaKey) -> Generation;
    /// Writes down that a generation is about to be launched.
    async fn intend(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError>;
    /// What is held against a replica, in ticks of this boot, of which it is `now`.
    async fn past(&self, key: &ReplicaKey, now: Tick) -> Past;
    /// Remembers that at `now`, in place of what was remembered before.
    async fn note_past(
        &self,
        key: &ReplicaKey,
        past: Past,
        last_error: Option<&LastError>,
        now: Tick,
    ) -> Result<(), LedgerError>;
    /// The last failure of a replica, as it was told to people.
    async fn last_error(&self, key: &ReplicaKey) -> Option<LastError>;
    /// What is held against devices, in ticks of this boot; after a reboot nothing is.
    async fn against_devices(&self) -> AgainstDevices;
    /// Remembers that, in place of what was remembered before.
    async fn note_against_devices(&self, held: &AgainstDevices) -> Result<(), LedgerError>;
    /// Whether demand must not wake the pool.
    async fn held(&self, pool: &PoolId) -> bool;
    /// Sets or lifts the hold.
    async fn set_hold(&self, pool: &PoolId, held: bool) -> Result<(), LedgerError>;
    /// Writes down an engine, before its launch and whenever it has come further.
    async fn record(&self, record: &EngineRecord) -> Result<(), LedgerError>;
    /// Strikes an engine out, once nothing of it is left.
    async fn forget(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError>;
    /// The engines that were not struck out.
    async fn recorded(&self) -> Vec<EngineRecord>;
    /// Tells consumers of a Ready replica.
    async fn publish_handoff(&self, handoff: &Handoff) -> Result<(), LedgerError>;
    /// Takes that back, of this generation or of one before it.
    async fn withdraw_handoff(&self, key: &ReplicaKey, generation: Generation) -> Result<(), LedgerError>;
    /// What such an engine of the pool took before.
    async fn learnt(&self, pool: &PoolId, key: &CorrectionKey) -> Option<Correction>;
    /// Remembers what it took.
    async fn learn(&self, pool: &PoolId, key: &CorrectionKey, correction: Correction) -> Result<(), LedgerError>;
    /// How fast engines of the pool were.
    async fn speeds(&self, pool: &PoolId) -> Speeds;
    /// Remembers how fast one is.
    async fn note_speed(&self, pool: &PoolId, key: &PerfKey, perf: Perf) -> Result<(), LedgerError>;
    /// Every pool that was stored, by name.
    async fn stored_pools(&self) -> Vec<StoredPool>;
    /// Writes a pool down in place of what was stored of it: all of it or nothing, also when the power fails.
    async fn store_pool(&self, pool: &StoredPool) -> Result<(), LedgerError>;
    /// Takes that back; one that is not stored is taken back already.
    async fn drop_pool(&self, pool: &PoolId) -> Result<(), LedgerError>;
    /// Forgets hold, past, and what engines took and how fast they were, of a pool that is no more. Its generations stay: none is used twice.
    async fn forget_pool(&self, pool: &PoolId) -> Result<(), LedgerError>;
}

/// How long one question to an engine may take.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
