//! The config as it is written. Nothing here is checked beyond its shape.

use std::collections::BTreeMap;

use pool_api::spec::{Defaults, SizeText};
use pool_services::Activation;
use schemars::JsonSchema;
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "pool-managerd config")]
pub struct RawConfig {
    /// The node and its API.
    pub node: RawNode,
    /// The devices.
    pub gpu: RawGpu,
    /// Where models come from.
    pub models: RawModels,
    /// Engines by name. They are declared here only, never over HTTP. `llama.cpp` (from PATH) and `stub` are built in.
    pub engines: BTreeMap<String, RawEngine>,
    /// Who may use the API. Without this section whoever reaches it may do everything.
    pub auth: Option<RawAuth>,
    /// Serves the API with TLS.
    pub tls: Option<RawTls>,
    /// The pools.
    pub pool: Vec<pool_api::spec::PoolSpec>,
}

/// A set of defaults.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// A person's machine: pools start on demand, the log is for people.
    #[default]
    Home,
    /// A server: pools are preloaded, the log is JSON.
    Cloud,
}

impl Profile {
    /// What a pool gets when it does not say.
    pub(crate) fn defaults(self) -> Defaults {
        let activation = match self {
            Self::Home => Activation::OnDemand,
            Self::Cloud => Activation::Preload,
        };
        Defaults { activation }
    }

    /// The profile as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Cloud => "cloud",
        }
    }
}

/// How the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// What happens to engines when the daemon is asked to stop.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnExit {
    /// They end before it does.
    #[default]
    Stop,
    /// They serve on, and the next daemon takes them over.
    Keep,
    /// They end with it also when it is killed: for a daemon whose state directory nobody opens again.
    #[serde(skip)]
    Bound,
}

/// When engines get API keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineKeys {
    /// Where others than this machine's own can reach them.
    #[default]
    Auto,
    /// Everywhere.
    Always,
}

/// `[node]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RawNode {
    /// Sets defaults: `home` starts pools on demand and logs for people, `cloud` preloads, logs JSON and requires `[auth]`.
    pub profile: Profile,
    /// Where the API listens. Anything but loopback needs `[auth]` and `[tls]`, or `insecure = true`.
    pub listen: String,
    /// A further address that answers probes alone (`/livez`, `/readyz`, `/startupz`), also while the API is flooded. None by
    /// default.
    pub probe_listen: Option<String>,
    /// A socket that serves the same API to this user and root alone, who need no token there. None by default.
    pub socket: Option<String>,
    /// Serve without tokens where the cloud profile or a listener beyond loopback requires them, or without TLS there.
    pub insecure: bool,
    /// Further Host names that requests may carry.
    pub hosts: Vec<String>,
    /// Origins whose web pages may talk to the API.
    pub origins: Vec<String>,
    /// Where facts are kept that outlive the daemon; by default `~/.local/state/pool-managerd`.
    pub state_dir: Option<String>,
    /// Where engines listen: an address of this machine. Beyond loopback each of them gets an API key, which leases and
    /// handoffs tell.
    pub engine_listen: String,
    /// When engines get API keys: `auto`, where others than this machine's own can reach them, or `always`, also on loopback,
    /// where every user of this machine can. The gateway and the daemon itself have them.
    pub engine_keys: EngineKeys,
    /// Ports engines are given, first and last.
    pub engine_ports: String,
    /// What happens to engines when the daemon is asked to stop: `stop` ends them, `keep` leaves them serving for the next
    /// daemon, as for an upgrade. When it is killed, or dies, they serve on in either case, and the next one takes them over.
    pub on_exit: OnExit,
    /// Time for an orderly stop.
    pub shutdown_deadline: String,
    /// How much of that time leases have that run when the daemon is asked to stop; new ones are refused at once. Ten seconds of
    /// it are the engines' to end. Nothing is waited for where `on_exit` keeps them.
    pub shutdown_drain: String,
    /// Longest time a lease can be asked for at once; it can be renewed. As long, at most, slots of an engine that outlived
    /// the daemon count as taken.
    pub max_lease_ttl: String,
    /// How long a request to the gateway waits for a slot, also while an engine starts; a request may say otherwise.
    pub gateway_wait: String,
    /// An engine that became ready less than this ago neither stops because nobody uses it nor gives way to another pool: two
    /// pools that take turns must not load all the time.
    pub min_ready_time: String,
    /// `pretty` or `json`; by default what the profile says.
    pub log: Option<LogFormat>,
}

impl Default for RawNode {
    fn default() -> Self {
        Self {
            profile: Profile::Home,
            listen: "127.0.0.1:9200".into(),
            probe_listen: None,
            socket: None,
            insecure: false,
            hosts: Vec::new(),
            origins: Vec::new(),
            state_dir: None,
            engine_listen: "127.0.0.1".into(),
            engine_keys: EngineKeys::Auto,
            engine_ports: "42000-42999".into(),
            on_exit: OnExit::Stop,
            shutdown_deadline: "60s".into(),
            shutdown_drain: "0s".into(),
            max_lease_ttl: "1h".into(),
            gateway_wait: "5m".into(),
            min_ready_time: "60s".into(),
            log: None,
        }
    }
}

/// `[auth]`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RawAuth {
    /// A file that only the daemon may read, with one token a line: `TOKEN SCOPES [TENANT]`. Scopes, with commas between
    /// them: `read` looks, `lease` uses engines, `admin` does everything. What leases and requests of a tenant's token are
    /// named after is the tenant. It is read again when it changes.
    pub tokens_file: Option<String>,
    /// A variable of the environment that holds such lines; by default `POOL_MANAGERD_TOKENS`, unless there is a file.
    pub tokens_env: Option<String>,
}

/// `[tls]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawTls {
    /// The chain of certificates, PEM, the server's own first. It is read again when it changes.
    pub cert: String,
    /// The private key, PEM, in a file that only the daemon may read.
    pub key: String,
}

/// Where devices come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The NVIDIA driver.
    #[default]
    Nvml,
    /// A topology file; nothing computes on such devices.
    Simulated,
}

/// `[gpu]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RawGpu {
    /// `nvml`, or `simulated` with a topology (loopback and home profile only).
    pub backend: Backend,
    /// The topology file of a simulated node.
    pub topology: Option<String>,
    /// How long to wait for devices at boot; `forever` for services.
    pub wait: String,
    /// Where the kernel's log is read, in which the driver tells of errors (XIDs) too; `off`: it is not.
    pub kernel_log: String,
    /// Whether anything follows from what the driver says of a device: errors (XIDs), memory that cannot be corrected, its
    /// verdict that it has to be reset. Without it these are counted, and that is all.
    pub health_checks: bool,
    /// What follows from an XID, by its number, where NVIDIA's catalogue is not to decide: `ignore`, `restart_engine` (the
    /// engines on the device start again), `suspect` (nothing new starts there for a while), `drain` (its engines end in
    /// order, and it waits for a reset), `lost` (its engines end at once).
    pub xid: BTreeMap<String, String>,
}

impl Default for RawGpu {
    fn default() -> Self {
        Self {
            backend: Backend::Nvml,
            topology: None,
            wait: "30s".into(),
            kernel_log: gpu_nvml::KERNEL_LOG.into(),
            health_checks: true,
            xid: BTreeMap::new(),
        }
    }
}

/// When a model of the cache is read whole before a start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Where a file looks otherwise than it did when it was verified.
    #[default]
    Changed,
    /// Each time.
    Always,
}

/// `[models]`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RawModels {
    /// Directories that local model files may come from.
    pub roots: Vec<String>,
    /// What may be fetched; without an entry nothing is. `hf:ORG/*`, `https://models.example.org/*`, `s3://bucket/*`,
    /// `oci://registry.example.org/*`; `*` stands at the end. Redirects are held to it as well, and a host of a private
    /// network is asked only if it is named here in full.
    pub allow: Vec<String>,
    /// Fetch nothing at all, whatever is allowed: only what is in the cache is used.
    pub offline: bool,
    /// Where fetched models are kept; by default `~/.cache/models`.
    pub cache_dir: Option<String>,
    /// Most bytes there. To make room, models that no pool names are removed, the one not used for longest first. Without
    /// it nothing is removed.
    pub cache_max: Option<SizeText>,
    /// `changed` reads a model of the cache whole before a start only where it looks otherwise than when it was verified,
    /// `always` each time.
    pub verify: Verify,
    /// What stands in for the Hugging Face hub; by default what `HF_ENDPOINT` says, else `https://huggingface.co`.
    pub hf_endpoint: Option<String>,
    /// What stands in for Amazon's S3.
    pub s3_endpoint: Option<String>,
    /// Region of buckets; by default `us-east-1`.
    pub s3_region: Option<String>,
    /// A file in the form of `~/.aws/credentials`, with the lines `aws_access_key_id` and `aws_secret_access_key`. Without
    /// it only buckets that are for everybody can be read.
    pub s3_credentials: Option<String>,
    /// A file with certificates (PEM) of authorities beside those of the system.
    pub ca_file: Option<String>,
    /// Files that hold a bearer token alone, by host: `"huggingface.co" = "/etc/pool-managerd/hf-token"`. A token goes to
    /// its own host only.
    pub tokens: BTreeMap<String, String>,
}

/// `[engines.NAME]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RawEngine {
    /// `llama.cpp` or `stub`.
    pub kind: String,
    /// `binary` (the daemon starts it) or `external` (somebody else does, and it is only used).
    #[serde(default = "binary")]
    pub mode: String,
    /// The program, for mode `binary`: a path, or a name that is looked for in PATH.
    #[serde(default)]
    pub path: Option<String>,
    /// Where it listens, for mode `external`: `http://127.0.0.1:8080`.
    #[serde(default)]
    pub endpoint: Option<String>,
}

fn binary() -> String {
    "binary".into()
}
