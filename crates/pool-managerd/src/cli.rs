//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::Overrides;

/// Keeps pools of inference engines running on the GPUs of this machine.
#[derive(Debug, Parser)]
#[command(name = "pool-managerd", version = crate::build_info::VERSION, arg_required_else_help = true, subcommand_required = true)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// Everything that can be asked for.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Serve(ServeArgs),
    /// Show it all on simulated GPUs with stub engines; needs nothing but this binary
    Demo {
        /// Address of the API
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9200")]
        listen: std::net::SocketAddr,
    },
    /// Check the config and the machine, and print what would happen; starts nothing
    Check(ConfigArgs),
    /// Look whether this machine has what engines need, and print what to do about the rest; starts nothing
    Doctor {
        /// Where the config is
        #[command(flatten)]
        config: ConfigArgs,
        /// Answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what a model needs on the GPUs of this machine, and what would fit instead; starts nothing
    Plan(PlanArgs),
    /// Print the GPUs of the node: memory, who uses it, health, and what to do
    Devices {
        /// Print them anew every second until it is interrupted
        #[arg(long, conflicts_with = "json")]
        watch: bool,
        /// Whom to ask and how to answer
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Print the pools, or one of them
    Status {
        /// The pool
        pool: Option<String>,
        /// Whom to ask and how to answer
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Watch devices, pools and their countdowns until a key ends it
    Top(ClientArgs),
    /// Start every engine of a pool, and lift its hold
    Preload(VerbArgs),
    /// Refuse new leases, wait for the running ones, stop, and hold the pool
    Drain {
        /// Which pool
        #[command(flatten)]
        verb: VerbArgs,
        /// Time for running leases, such as 30s; by default what the pool says
        #[arg(long, value_name = "TIME", value_parser = duration)]
        deadline: Option<Duration>,
        /// What happens to leases after that
        #[arg(long, value_enum, value_name = "WHAT")]
        on_deadline: Option<OnDeadline>,
    },
    /// Give up a running drain, or lift the hold
    Resume(VerbArgs),
    /// Stop a pool at once, and hold it
    Stop(VerbArgs),
    /// Give a pool another model, engine version or strategy: the new one serves in the end, or the old one as it was
    Reload {
        /// Which pool
        #[command(flatten)]
        verb: VerbArgs,
        /// The new model
        #[arg(long, value_name = "REF")]
        model: Option<String>,
        /// The engine version that it must be from now on
        #[arg(long, value_name = "VERSION")]
        engine_version: Option<String>,
        /// How engines are replaced; by default what the pool says
        #[arg(long, value_enum, value_name = "HOW")]
        strategy: Option<Strategy>,
        /// Time for all of it, such as 5m; by default what the pool says
        #[arg(long, value_name = "TIME", value_parser = duration)]
        deadline: Option<Duration>,
        /// What happens after that
        #[arg(long, value_enum, value_name = "WHAT")]
        on_deadline: Option<OnDeadline>,
    },
    /// Go back to what a pool was before its last reload
    Rollback(VerbArgs),
    /// The circuit breaker of a pool
    Breaker {
        /// What to do with it
        #[command(subcommand)]
        command: BreakerCommand,
    },
    /// Say that nothing of an engine is left on a device, so that it is used again
    Unfence {
        /// UUID, index or PCI bus id
        device: String,
        /// Whom to ask and how to answer
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Print what the node can do: engines, models, contexts, slots
    Capabilities(ClientArgs),
    /// Print what happened, and with -f what happens
    Events {
        /// Only of this pool
        pool: Option<String>,
        /// How much
        #[command(flatten)]
        follow: FollowArgs,
        /// Whom to ask and how to answer
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Print what a pool's engine wrote, and with -f what it writes
    Logs {
        /// The pool
        pool: String,
        /// Of this replica, such as r1; by default the first that is ready
        #[arg(long, value_name = "REPLICA")]
        replica: Option<String>,
        /// How much
        #[command(flatten)]
        follow: FollowArgs,
        /// Whom to ask and how to answer
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Print the OpenAPI document
    Openapi,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages, one for the program and one for each command
    Man {
        /// The directory that they go to
        dir: PathBuf,
    },
}

/// What can be done with a circuit breaker.
#[derive(Debug, Subcommand)]
pub enum BreakerCommand {
    /// Forget failures and close it
    Reset(VerbArgs),
}

/// How a reload replaces engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Strategy {
    /// The best that fits
    Auto,
    /// Stop the old, start the new
    InPlace,
    /// Start the new beside the old, then stop the old
    Overlap,
    /// Replica by replica
    Rolling,
}

/// What happens at a deadline, to leases that outlive a drain or to a reload that is not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnDeadline {
    /// Leases are revoked
    Force,
    /// The drain or reload is given up
    Abort,
}

/// Where the config is.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Config file; without one the defaults hold
    #[arg(long, value_name = "FILE", env = "POOL_MANAGERD_CONFIG")]
    pub config: Option<PathBuf>,
}

/// How the daemon is run.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the config is
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Serve this model as a pool of its own: a file, or stub:NAME
    #[arg(long = "model", value_name = "REF")]
    pub models: Vec<String>,
    /// Address of the API, instead of the config's
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Where durable facts are kept, instead of the config's place
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

impl ServeArgs {
    /// What this says on top of the config.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        Overrides { listen: self.listen.clone(), state_dir: self.state_dir.clone(), models: self.models.clone() }
    }
}

/// What to plan.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The model: a file
    pub model: String,
    /// Where the config is
    #[command(flatten)]
    pub config: ConfigArgs,
    /// An engine of the config; by default llama.cpp
    #[arg(long, value_name = "NAME")]
    pub engine: Option<String>,
    /// Devices, such as 0,1 or all; by default the one that fits best
    #[arg(long, value_name = "MASK", allow_hyphen_values = true)]
    pub devices: Option<String>,
    /// Tokens over all slots; by default the most that fit, at most 8192
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<u32>,
    /// Concurrent requests
    #[arg(long, value_name = "N")]
    pub slots: Option<u16>,
    /// Type of the K and V caches, such as q8_0
    #[arg(long, value_name = "TYPE")]
    pub kv_type: Option<String>,
    /// Bytes on each device instead of an estimate, such as 20GiB
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub vram: Option<String>,
    /// Spread layers over the devices: auto, or ratios such as 3,1
    #[arg(long, value_name = "RATIOS", allow_hyphen_values = true)]
    pub tensor_split: Option<String>,
    /// A further argument of the engine; may be repeated
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
    pub args: Vec<String>,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// Whom to ask and how to answer.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// The daemon's API: http://HOST:PORT, https://HOST:PORT, or unix:/PATH of its socket
    #[arg(long, value_name = "URL", env = "POOL_MANAGERD_SERVER", default_value = "http://127.0.0.1:9200")]
    pub server: String,
    /// A file that holds the token to show; without it, POOL_MANAGERD_TOKEN is shown where it is set
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) that stand for the daemon's own, for https
    #[arg(long, value_name = "FILE", env = "POOL_MANAGERD_CA")]
    pub ca: Option<PathBuf>,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// How much of something that goes on.
#[derive(Debug, Clone, Args)]
pub struct FollowArgs {
    /// Go on with what comes, until it is interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// How much of the past comes first
    #[arg(short = 'n', long, value_name = "N")]
    pub tail: Option<usize>,
}

/// A verb on one pool.
#[derive(Debug, Clone, Args)]
pub struct VerbArgs {
    /// The pool
    pub pool: String,
    /// Return at once instead of following the work to its end
    #[arg(long)]
    pub no_wait: bool,
    /// Whom to ask and how to answer
    #[command(flatten)]
    pub client: ClientArgs,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e}: write a number with a unit, such as 30s or 10m"))
}

/// The completions for a shell.
#[must_use]
pub fn completions(shell: clap_complete::Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pool-managerd", &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// Writes the man pages to a directory.
///
/// # Errors
/// When a file cannot be written.
pub fn man_pages(dir: &Path) -> std::io::Result<()> {
    clap_mangen::generate_to(Cli::command(), dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lines_parse() {
        for line in [
            "serve",
            "serve --config a.toml --model x.gguf --model stub:a --listen 127.0.0.1:1",
            "demo --listen 127.0.0.1:9300",
            "check --config a.toml",
            "plan a.gguf --context 32768 --kv-type q8_0 --tensor-split 3,-1 --devices -1 --arg --swa-full",
            "status",
            "status chat --json",
            "devices --server http://127.0.0.1:1",
            "drain chat --deadline 2s --on-deadline abort",
            "breaker reset chat",
            "top --server http://127.0.0.1:1",
            "unfence 0",
            "stop chat --no-wait",
            "reload chat --model stub:b --engine-version 4567 --strategy in_place --deadline 5m --on-deadline abort",
            "rollback chat --json",
            "capabilities --json",
            "events",
            "events chat -f -n 5 --json",
            "logs chat --follow --replica r1 --tail 0",
            "completions bash",
            "doctor --config a.toml --json",
            "man /tmp",
        ] {
            assert!(Cli::try_parse_from(format!("pool-managerd {line}").split(' ')).is_ok(), "{line}");
        }
        for line in ["", "serv", "drain", "drain chat --deadline -2s", "drain chat --deadline=-2s", "breaker chat"] {
            assert!(Cli::try_parse_from(format!("pool-managerd {line}").split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn there_is_a_man_page_of_each_command() {
        let dir = tempfile::tempdir().unwrap();
        man_pages(dir.path()).unwrap();
        let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("pool-managerd.1").contains("doctor"));
        assert!(page("pool-managerd-drain.1").contains("on\\-deadline"));
    }

    #[test]
    fn completions_name_the_commands() {
        assert!(completions(clap_complete::Shell::Bash).contains("preload"));
    }
}
