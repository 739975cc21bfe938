//! The arguments that a pool may be given over the API: none that reads or writes a file, opens a connection, or names a
//! device. In the config file a pool may have any that its engine knows.

use pool_domain::Failure;

use super::flag_of;
use crate::decl::Kind;
use crate::text::config;

const LLAMA_CPP: &[&str] = &[
    "--batch-size",
    "-b",
    "--ubatch-size",
    "-ub",
    "--threads",
    "-t",
    "--threads-batch",
    "-tb",
    "--prio",
    "--poll",
    "--flash-attn",
    "-fa",
    "--cont-batching",
    "-cb",
    "--no-cont-batching",
    "-nocb",
    "--mlock",
    "--no-mmap",
    "--numa",
    "--no-warmup",
    "--swa-full",
    "--no-kv-offload",
    "-nkvo",
    "--kv-unified",
    "-kvu",
    "--cache-reuse",
    "--cache-ram",
    "--context-shift",
    "--no-context-shift",
    "--keep",
    "--n-predict",
    "--predict",
    "-n",
    "--ignore-eos",
    "--special",
    "--rope-scaling",
    "--rope-scale",
    "--rope-freq-base",
    "--rope-freq-scale",
    "--yarn-orig-ctx",
    "--yarn-ext-factor",
    "--yarn-attn-factor",
    "--yarn-beta-slow",
    "--yarn-beta-fast",
    "--jinja",
    "--no-jinja",
    "--chat-template",
    "--reasoning-format",
    "--reasoning-budget",
    "--pooling",
    "--seed",
    "-s",
    "--temp",
    "--top-k",
    "--top-p",
    "--min-p",
    "--typical",
    "--repeat-last-n",
    "--repeat-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--dry-multiplier",
    "--dry-base",
    "--dry-allowed-length",
    "--mirostat",
    "--mirostat-lr",
    "--mirostat-ent",
    "--verbosity",
    "-lv",
];

const VLLM: &[&str] = &[
    "--dtype",
    "--quantization",
    "--kv-cache-dtype",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--max-num-batched-tokens",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enable-chunked-prefill",
    "--no-enable-chunked-prefill",
    "--enforce-eager",
    "--block-size",
    "--seed",
    "--reasoning-parser",
    "--tool-call-parser",
    "--enable-auto-tool-choice",
    "--scheduling-policy",
];

const STUB: &[&str] = &[
    "--load-ms",
    "--slots",
    "--tokens-per-second",
    "--vram",
    "--serve-model",
    "--crash-after-ms",
    "--crash-on-request",
    "--exit-code",
    "--signal",
    "--hang-after-requests",
    "--unhealthy-after-ms",
    "--ignore-sigterm",
    "--fork-children",
    "--double-fork",
    "--log-flood",
];

/// Refuses what is not allowed over the API.
pub(crate) fn check(kind: Kind, args: &[String]) -> Result<(), Failure> {
    let allowed = match kind {
        Kind::LlamaCpp => LLAMA_CPP,
        Kind::Vllm => VLLM,
        Kind::Stub => STUB,
    };
    // A negative number is a value; whatever else begins with a dash is an argument.
    let number = |arg: &str| arg.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let is_flag = |arg: &&str| arg.starts_with('-') && !number(arg);
    match args.iter().map(|arg| flag_of(arg)).filter(is_flag).find(|flag| !allowed.contains(flag)) {
        Some(flag) => {
            Err(config(format!("argument `{flag}` is not for a pool of the API: declare it in the config file")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::llama_cpp;

    #[test]
    fn what_reaches_beyond_the_engine_is_refused() {
        let ok = |kind, args: &[&str]| check(kind, &args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>()).is_ok();
        assert!(ok(Kind::LlamaCpp, &["--flash-attn", "on", "--seed", "-1", "--batch-size=512"]));
        assert!(ok(Kind::Stub, &["--load-ms", "5", "--vram", "1 GiB"]));
        for arg in [
            "--lora",
            "--mmproj=/etc/passwd",
            "--log-file",
            "--slot-save-path",
            "-md",
            "--path",
            "-",
            "--rpc",
            "--tools",
        ] {
            assert!(!ok(Kind::LlamaCpp, &[arg, "/etc/passwd"]), "{arg}");
        }
        assert!(!ok(Kind::Stub, &["--state-file", "/tmp/x"]));
        assert!(LLAMA_CPP.iter().all(|flag| !llama_cpp::OWNED.contains(flag)), "the daemon gives it itself");
    }
}
