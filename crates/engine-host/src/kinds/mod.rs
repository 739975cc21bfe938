//! What is particular to a kind of engine: its flags.

pub(crate) mod allowed;
pub(crate) mod llama_cpp;
pub(crate) mod stub;
pub(crate) mod vllm;

use std::ffi::OsStr;
use std::path::Path;

use pool_domain::{Failure, ResolvedMask};

use crate::decl::Kind;
use crate::text::config;
use crate::users::Account;

const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// For every kind: no engine fetches anything, and none tells anybody of us.
const OFFLINE: [(&str, &str); 7] = [
    ("HF_HUB_OFFLINE", "1"),
    ("TRANSFORMERS_OFFLINE", "1"),
    ("HF_DATASETS_OFFLINE", "1"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_DO_NOT_TRACK", "1"),
    ("DO_NOT_TRACK", "1"),
];
/// The home of a user who has none: wherever its process works. Its own directory cannot be named by its path, which leads
/// through the daemon's.
const HOMELESS: &str = "/proc/self/cwd";

/// The environment every engine gets; of the daemon's own only these three are handed on, and to another user only the
/// one that says where libraries are.
pub(crate) fn base_env(account: Option<&Account>) -> Result<Vec<(String, String)>, Failure> {
    let own = |key: &str| std::env::var(key).ok().filter(|value| !value.is_empty());
    let mut env = vec![("LANG".to_owned(), "C.UTF-8".to_owned())];
    match account {
        None => {
            env.push(("PATH".to_owned(), own("PATH").unwrap_or_else(|| DEFAULT_PATH.to_owned())));
            env.extend(own("HOME").map(|home| ("HOME".to_owned(), home)));
        }
        Some(account) => {
            let home =
                account.home.as_ref().map_or(Ok(HOMELESS.to_owned()), |home| utf8(home.as_os_str(), "a home"))?;
            let name = &account.name;
            let of_user = [("PATH", DEFAULT_PATH), ("HOME", &home), ("USER", name), ("LOGNAME", name)];
            env.extend(of_user.map(|(key, value)| (key.to_owned(), value.to_owned())));
        }
    }
    env.extend(own("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH".to_owned(), path)));
    env.extend(OFFLINE.map(|(key, value)| (key.to_owned(), value.to_owned())));
    Ok(env)
}

/// The whole environment of an engine on these devices.
pub(crate) fn engine_env(
    devices: &ResolvedMask,
    sim_dir: Option<&Path>,
    account: Option<&Account>,
) -> Result<Vec<(String, String)>, Failure> {
    let mut env = base_env(account)?;
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
        Kind::Vllm => vllm::OWNED,
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
        let env = engine_env(&mask, Some(Path::new("/sim")), None).unwrap();
        let get = |key: &str| env.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        assert_eq!(get("CUDA_VISIBLE_DEVICES"), Some("GPU-a,GPU-b"));
        assert_eq!(get("CUDA_DEVICE_ORDER"), Some("PCI_BUS_ID"));
        assert_eq!(get("POOL_SIM_DIR"), Some("/sim"));
        assert_eq!(get("CARGO_MANIFEST_DIR"), None, "nothing else is inherited");
        assert_eq!(
            (get("HF_HUB_OFFLINE"), get("VLLM_NO_USAGE_STATS"), get("DO_NOT_TRACK")),
            (Some("1"), Some("1"), Some("1"))
        );
    }

    #[test]
    fn another_user_has_a_home_and_a_path_of_its_own() {
        let user = engine_shim::User { uid: 990, gid: 990, groups: Vec::new() };
        let mut account = Account { user, name: "llm".into(), home: Some("/var/lib/llm".into()) };
        let get = |account: &Account, key: &str| {
            let env = engine_env(&ResolvedMask::default(), None, Some(account)).unwrap();
            env.into_iter().find(|(name, _)| name == key).map(|(_, value)| value)
        };
        let wanted = [("PATH", DEFAULT_PATH), ("HOME", "/var/lib/llm"), ("USER", "llm"), ("LOGNAME", "llm")];
        for (key, value) in wanted {
            assert_eq!(get(&account, key).as_deref(), Some(value), "{key}");
        }
        account.home = None;
        assert_eq!(get(&account, "HOME").as_deref(), Some(HOMELESS));
    }
}
