//! What is particular to a kind of engine: its flags.

pub(crate) mod allowed;
pub(crate) mod llama_cpp;
pub(crate) mod stub;

use std::ffi::OsStr;
use std::path::Path;

use pool_domain::{Failure, ResolvedMask};

use crate::decl::Kind;
use crate::text::config;

const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The environment every engine gets; of the daemon's own only these three are handed on.
pub(crate) fn base_env() -> Vec<(String, String)> {
    let own = |key: &str| std::env::var(key).ok().filter(|value| !value.is_empty());
    let mut env = vec![
        ("PATH".to_owned(), own("PATH").unwrap_or_else(|| DEFAULT_PATH.to_owned())),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ];
    env.extend(["HOME", "LD_LIBRARY_PATH"].into_iter().filter_map(|key| Some((key.to_owned(), own(key)?))));
    env
}

/// The whole environment of an engine on these devices.
pub(crate) fn engine_env(devices: &ResolvedMask, sim_dir: Option<&Path>) -> Result<Vec<(String, String)>, Failure> {
    let mut env = base_env();
    env.push(("CUDA_VISIBLE_DEVICES".to_owned(), devices.to_cuda_visible_devices()));
    env.push(("CUDA_DEVICE_ORDER".to_owned(), "PCI_BUS_ID".to_owned()));
    if let Some(dir) = sim_dir {
        env.push((sim_claims::SIM_DIR_ENV.to_owned(), utf8(dir.as_os_str(), "the simulation directory")?));
    }
    Ok(env)
}

/// Refuses arguments that the daemon gives itself.
pub(crate) fn check_args(kind: Kind, args: &[String]) -> Result<(), Failure> {
    let owned: &[&str] = match kind {
        Kind::LlamaCpp => llama_cpp::OWNED,
        Kind::Stub => stub::OWNED,
    };
    match args.iter().map(|arg| flag_of(arg)).find(|flag| owned.contains(flag)) {
        Some(flag) => Err(config(format!("argument `{flag}` is set by the daemon and cannot be given in `args`"))),
        None => Ok(()),
    }
}

/// Whether `args` has this flag.
pub(crate) fn has_flag(args: &[String], flag: &str) -> bool {
    args.iter().any(|arg| flag_of(arg) == flag)
}

/// The long flags of `args`. (A short one cannot be told from a negative number.)
pub(crate) fn flags(args: &[String]) -> impl Iterator<Item = &str> {
    args.iter().map(|arg| flag_of(arg)).filter(|flag| flag.starts_with("--") && flag.len() > 2)
}

fn flag_of(arg: &str) -> &str {
    match arg.split_once('=') {
        Some((flag, _)) if flag.starts_with('-') => flag,
        _ => arg,
    }
}

pub(crate) fn utf8(text: &OsStr, what: &str) -> Result<String, Failure> {
    text.to_str().map(str::to_owned).ok_or_else(|| config(format!("{what} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_the_daemon_are_refused() {
        let check = |kind, arg: &str| check_args(kind, &["--threads".to_owned(), arg.to_owned()]);
        for arg in ["--host", "--port=1", "-m", "--model", "--alias", "--api-key"] {
            let failure = check(Kind::LlamaCpp, arg).unwrap_err();
            assert_eq!(failure.class, pool_domain::FailureClass::Config);
        }
        assert!(check(Kind::Stub, "--port=1").is_err());
        assert!(check(Kind::Stub, "--slots=1").is_ok());
        assert!(check(Kind::LlamaCpp, "--flash-attn").is_ok());
    }

    #[test]
    fn the_environment_pins_the_devices() {
        let mask = ResolvedMask { uuids: vec!["GPU-a".into(), "GPU-b".into()] };
        let env = engine_env(&mask, Some(Path::new("/sim"))).unwrap();
        let get = |key: &str| env.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        assert_eq!(get("CUDA_VISIBLE_DEVICES"), Some("GPU-a,GPU-b"));
        assert_eq!(get("CUDA_DEVICE_ORDER"), Some("PCI_BUS_ID"));
        assert_eq!(get("POOL_SIM_DIR"), Some("/sim"));
        assert_eq!(get("CARGO_MANIFEST_DIR"), None, "nothing else is inherited");
    }
}
