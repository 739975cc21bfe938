//! The project's own tools. Run as `cargo xtask COMMAND`.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool: its output is for people")]

mod browser;
mod charts;
mod ci;
mod clients;
mod codegen;
mod deny;
mod dist;
mod engine;
mod error;
mod estimates;
mod faults;
mod gguf;
mod metadata;
mod process;
mod soak;
mod tests_run;
mod tidy;
mod tiny_gguf;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Result;

/// The project's own tools.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put llama.cpp's real server and two models under target/engine (cached).
    Engine {
        /// Build llama-server and llama-fit-params from source as well (some ten minutes on two cores).
        #[arg(long)]
        from_source: bool,
    },
    /// Put OpenAI's Python client and an API tester under target/clients (cached).
    Clients,
    /// Install a headless Chromium for the dashboard's tests, where it is missing (Debian, as root).
    Browser,
    /// Write a tiny random-weight model that llama.cpp really loads.
    TinyGguf {
        /// The file to write.
        out: PathBuf,
        /// Grow the file to about this many MiB.
        #[arg(long)]
        target_mb: Option<u32>,
    },
    /// Check the layering, the lints and the house rules.
    Tidy,
    /// Check docs/traceability.md against the tests that exist.
    Trace {
        /// Output of `cargo nextest list --message-format oneline`; without it the command is run.
        #[arg(long)]
        list_file: Option<PathBuf>,
    },
    /// Write the generated files.
    Codegen {
        /// Change nothing; fail when a file is stale.
        #[arg(long)]
        check: bool,
    },
    /// Lint, render and check the Helm chart; write the manifests beside it.
    Charts {
        /// Change nothing; fail when a file is stale.
        #[arg(long)]
        check: bool,
    },
    /// Compare memory estimates with what the real engine says, in docs/estimates.md (needs `engine --from-source`).
    Estimates {
        /// Change nothing; fail when the document is stale or a goal is missed.
        #[arg(long)]
        check: bool,
    },
    /// Write docs/faults.md from the report of the last run of all tests.
    Faults {
        /// Change nothing; fail when it is stale.
        #[arg(long)]
        check: bool,
    },
    /// Run all tests, with a real engine at hand.
    Test {
        /// Passed to `cargo nextest run`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run many seeds of the simulation, on all cores and with optimisation.
    Soak {
        /// How many.
        #[arg(long, default_value_t = 100_000)]
        seeds: u64,
        /// The first.
        #[arg(long, default_value_t = 0)]
        from: u64,
    },
    /// Make the Debian package and the tarball of a release build, in target/dist.
    Dist {
        /// Version of the Debian package instead of the workspace's.
        #[arg(long, value_name = "VERSION")]
        deb_version: Option<String>,
        /// Package this program instead of building it.
        #[arg(long, value_name = "FILE")]
        program: Option<PathBuf>,
        /// Install, upgrade and purge the packages in a clean root instead (Debian, as root; needs debootstrap).
        #[arg(long, conflicts_with_all = ["deb_version", "program"])]
        try_package: bool,
    },
    /// Check dependencies' bans, licences and sources.
    Deny,
    /// Everything that CI runs.
    Ci,
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Engine { from_source } => engine::run(from_source),
        Command::Clients => clients::run(),
        Command::Browser => browser::run().map(|_| ()),
        Command::TinyGguf { out, target_mb } => {
            let options = tiny_gguf::Options { target_mb, ..tiny_gguf::Options::default() };
            tiny_gguf::write(&out, &options).map_err(error::io(&out))
        }
        Command::Tidy => tidy::run(),
        Command::Trace { list_file } => trace::run(list_file.as_deref()),
        Command::Codegen { check } => codegen::run(check),
        Command::Charts { check } => charts::run(check),
        Command::Estimates { check } => estimates::run(check),
        Command::Faults { check } => faults::run(check),
        Command::Test { args } => tests_run::run(&args),
        Command::Soak { seeds, from } => soak::run(seeds, from),
        Command::Dist { try_package: true, .. } => dist::try_package(),
        Command::Dist { deb_version, program, .. } => dist::run(deb_version.as_deref(), program.as_deref()),
        Command::Deny => deny::run(),
        Command::Ci => ci::run(),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
