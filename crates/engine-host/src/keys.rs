//! API keys for engines that others than this machine's own can reach: a new one for each generation, told to the engine by
//! a file or by its environment, never as an argument, which everybody can read.

use pool_domain::Failure;
use pool_services::ApiKey;
use pool_services::ports::{EngineSecret, PreparedEngine};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::decl::Kind;
use crate::discover::Program;
use crate::text::config;

/// Bytes of a key, each of which is two characters of it.
const BYTES: usize = 32;
/// Name of the file in the engine's working directory.
const FILE: &str = "api-key";

/// How a kind of engine is told its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ToldBy {
    /// A file that this flag names.
    File(&'static str),
    /// A variable of its environment.
    Env(&'static str),
}

/// How an engine of this kind, and this version of it, is told.
///
/// # Errors
/// When it cannot be.
pub(crate) fn told_by(kind: Kind, program: &Program) -> Result<ToldBy, Failure> {
    let by = match kind {
        Kind::LlamaCpp | Kind::Stub => ToldBy::File("--api-key-file"),
        Kind::Vllm => ToldBy::Env("VLLM_API_KEY"),
    };
    match by {
        ToldBy::File(flag) if !program.knows_or_says_nothing(flag) => Err(config(format!(
            "this version of {} takes no API key, which engines here must have: it does not know `{flag}`",
            kind.code()
        ))),
        by => Ok(by),
    }
}

/// A key that nobody had before.
///
/// # Errors
/// When the kernel has nothing random.
pub(crate) fn random() -> Result<ApiKey, Failure> {
    let mut bytes = [0; BYTES];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(BYTES) => Ok(ApiKey::new(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())),
        // So few bytes come whole or not at all.
        Ok(_) | Err(_) => Err(config("the kernel gives no random bytes for an API key")),
    }
}

/// Has the engine want this key.
pub(crate) fn give(engine: &mut PreparedEngine, key: ApiKey, by: ToldBy) {
    match by {
        ToldBy::File(flag) => {
            engine.args.extend([flag.to_owned(), FILE.to_owned()]);
            let value = key.reveal().to_owned();
            engine.confinement.secrets.push(EngineSecret { file: FILE.to_owned(), value });
        }
        ToldBy::Env(name) => engine.confinement.secret_env.push((name.to_owned(), key.clone())),
    }
    engine.endpoint.api_key = Some(key);
}

#[cfg(test)]
mod tests {
    use pool_services::Workload;
    use pool_services::ports::{Confinement, Endpoint};

    use super::*;

    fn engine() -> PreparedEngine {
        PreparedEngine {
            entry: None,
            args: vec!["--port".into(), "1".into()],
            env: Vec::new(),
            confinement: Confinement::default(),
            endpoint: Endpoint {
                addr: "192.0.2.7:1".parse().unwrap(),
                kind: "stub".into(),
                model: "m".into(),
                model_path: None,
                workload: Workload::Generate,
                api_key: None,
            },
            engine_version: "1".into(),
        }
    }

    #[test]
    fn a_key_is_in_a_file_or_in_the_environment_and_in_no_argument_nor_in_what_is_printed() {
        let key = random().unwrap();
        assert_ne!(key, random().unwrap());
        assert_eq!(key.reveal().len(), 2 * BYTES);
        let told = |by| {
            let mut engine = engine();
            give(&mut engine, key.clone(), by);
            assert_eq!(engine.endpoint.api_key.as_ref(), Some(&key));
            assert!(!engine.args.iter().any(|arg| arg.contains(key.reveal())), "everybody can read arguments");
            assert!(!format!("{engine:?}").contains(key.reveal()), "{engine:?}");
            engine
        };
        let by_file = told(ToldBy::File("--api-key-file"));
        assert_eq!(by_file.args[2..], ["--api-key-file", FILE]);
        assert_eq!(by_file.confinement.secrets[0].value, key.reveal());
        let by_env = told(ToldBy::Env("VLLM_API_KEY"));
        assert_eq!(by_env.confinement.secret_env, [("VLLM_API_KEY".to_owned(), key.clone())]);
        assert_eq!((by_env.args.len(), by_env.env.len()), (2, 0));
    }

    #[test]
    fn a_version_that_takes_no_key_is_refused() {
        let knows = |flags: &[&str]| Program {
            path: "/e".into(),
            version: "1".into(),
            flags: flags.iter().map(|&f| f.to_owned()).collect(),
        };
        assert_eq!(told_by(Kind::LlamaCpp, &knows(&["--api-key-file"])), Ok(ToldBy::File("--api-key-file")));
        let old = told_by(Kind::LlamaCpp, &knows(&["--port"])).unwrap_err();
        assert!(old.class == pool_domain::FailureClass::Config && old.detail.contains("takes no API key"), "{old}");
        assert!(told_by(Kind::Vllm, &knows(&[])).is_ok());
    }
}
