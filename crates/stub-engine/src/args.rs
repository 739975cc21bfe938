//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use bytesize::ByteSize;
use clap::Parser;

use crate::death::DeathSignal;

/// An engine without a model: llama-server's API, made-up words, and faults on request.
///
/// As with llama-server, the last of a repeated flag counts.
#[derive(Clone, Debug, Parser)]
#[command(name = "stub-engine", version, no_binary_name = true, args_override_self = true)]
pub(crate) struct Args {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one and prints it
    #[arg(long, default_value_t = 8080)]
    pub(crate) port: u16,
    /// Path or name of the model; nothing is read
    #[arg(long, default_value = "stub:model")]
    pub(crate) model: String,
    /// Name the model goes by; by default the last part of --model
    #[arg(long)]
    pub(crate) alias: Option<String>,
    /// Requests that run at a time; further ones queue
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) slots: u32,
    /// Context in tokens, shared evenly by the slots
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) ctx_size: u32,
    /// Speed of each slot; 0 does not wait at all
    #[arg(long, default_value_t = 200)]
    pub(crate) tokens_per_second: u32,

    /// Take this long to load, answering 503 with the progress
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) load_ms: u64,
    /// Claim this much memory (such as "2 GiB") on every device in CUDA_VISIBLE_DEVICES
    #[arg(long, value_name = "SIZE")]
    pub(crate) vram: Option<ByteSize>,
    /// Claim it on these devices instead of those it was given
    #[arg(long, value_name = "UUIDS", requires = "vram")]
    pub(crate) vram_on: Option<String>,
    /// Leave the claim in this directory; by default in the one that POOL_SIM_DIR names
    #[arg(long, value_name = "PATH", requires = "vram")]
    pub(crate) vram_dir: Option<PathBuf>,
    /// Answer as this model, whatever --model and --alias say
    #[arg(long, value_name = "NAME")]
    pub(crate) serve_model: Option<String>,
    /// Crash this long after becoming ready
    #[arg(long, value_name = "N")]
    pub(crate) crash_after_ms: Option<u64>,
    /// Crash when the Nth request that needs the model arrives
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) crash_on_request: Option<u64>,
    /// Exit code of a crash
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) exit_code: u8,
    /// Crash by this signal (such as SEGV) instead of an exit
    #[arg(long, value_name = "NAME")]
    pub(crate) signal: Option<DeathSignal>,
    /// Crash at start this many times, counted in --state-file
    #[arg(long, value_name = "N", requires = "state_file")]
    pub(crate) fail_start_times: Option<u64>,
    /// File that counts failed starts
    #[arg(long, value_name = "PATH")]
    pub(crate) state_file: Option<PathBuf>,
    /// Decode this many requests, then hang in every further one while /health stays ok; 0 never decodes
    #[arg(long, value_name = "N")]
    pub(crate) hang_after_requests: Option<u64>,
    /// Answer /health with 503 from this long after becoming ready
    #[arg(long, value_name = "N")]
    pub(crate) unhealthy_after_ms: Option<u64>,
    /// Do not stop on SIGTERM
    #[arg(long)]
    pub(crate) ignore_sigterm: bool,
    /// Start this many child processes, which outlive this one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) fork_children: u32,
    /// Leave a process behind in a session of its own, its parent gone
    #[arg(long)]
    pub(crate) double_fork: bool,
    /// Write to stdout and stderr without end
    #[arg(long)]
    pub(crate) log_flood: bool,

    /// Serve only whoever sends the key in this file, except for /health and /models
    #[arg(long, value_name = "PATH")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Take this much memory of the host (such as "1 GiB") before listening
    #[arg(long, value_name = "SIZE")]
    pub(crate) host_memory: Option<ByteSize>,
    /// Make a file of this name in /dev/shm, hold it open and never remove it
    #[arg(long, value_name = "NAME", value_parser = shm_name)]
    pub(crate) shm_file: Option<String>,
    /// Write the bytes of this hexadecimal number to stderr before anything else
    #[arg(long, value_name = "HEX", value_parser = hex)]
    pub(crate) log_bytes: Option<Bytes>,

    /// What a child process does
    #[arg(long, hide = true)]
    pub(crate) sleep_forever: bool,
    /// What the parent of a left-behind process does
    #[arg(long, hide = true)]
    pub(crate) daemonize_sleep: bool,
    /// Die by this signal at once
    #[arg(long, hide = true)]
    pub(crate) raise: Option<DeathSignal>,
}

/// Bytes of an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

fn hex(text: &str) -> Result<Bytes, String> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return Err("not an even number of hexadecimal digits".to_owned());
    }
    let digits = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16));
    digits.collect::<Result<_, _>>().map(Bytes).map_err(|error| error.to_string())
}

fn shm_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with('.') || text.contains('/') {
        return Err("not the name of a file".to_owned());
    }
    Ok(text.to_owned())
}

impl Args {
    /// The name the model goes by.
    pub(crate) fn served_name(&self) -> &str {
        if let Some(name) = self.serve_model.as_deref().or(self.alias.as_deref()) {
            return name;
        }
        let name = self.model.strip_prefix("stub:").unwrap_or(&self.model);
        name.rsplit('/').next().unwrap_or(name)
    }

    /// Where the model is said to come from.
    pub(crate) fn served_path(&self) -> &str {
        self.serve_model.as_deref().unwrap_or(&self.model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(line)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_name_served_is_the_most_particular_one() {
        let name = |line: &[&str]| parse(line).unwrap().served_name().to_owned();
        assert_eq!(name(&["--model", "/models/tiny.gguf"]), "tiny.gguf");
        assert_eq!(name(&["--model", "stub:chat"]), "chat");
        assert_eq!(name(&["--model", "stub:chat", "--alias", "a"]), "a");
        assert_eq!(name(&["--model", "stub:chat", "--alias", "a", "--serve-model", "b"]), "b");
    }

    #[test]
    fn sizes_have_units_and_bad_values_are_refused() {
        assert_eq!(parse(&["--vram", "2 GiB"]).unwrap().vram, Some(ByteSize::gib(2)));
        for bad in [
            &["--vram", "lots"] as &[&str],
            &["--slots", "0"],
            &["--crash-on-request", "0"],
            &["--signal", "WINCH"],
            &["--exit-code", "256"],
            &["--fail-start-times", "1"],
            &["--no-such-flag"],
            &["--log-bytes", "1"],
            &["--log-bytes", "xx"],
            &["--shm-file", "../x"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
