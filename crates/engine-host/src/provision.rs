//! Turns specs into engines that can be launched.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use engine_shim::Access;
use pool_domain::isolation::RunAs;
use pool_domain::plan::EngineMemory;
use pool_domain::{EngineName, Failure, ModelRef};
use pool_services::PoolSpec;
use pool_services::ports::{Confinement, Endpoint, EngineProvisioner, NotAdmitted, PrepareRequest, PreparedEngine};

use crate::decl::{EngineDecl, Kind, Mode, StubCommand};
use crate::discover::{Discovery, Program};
use crate::host::ShimCommand;
use crate::isolation::{self, Unkept, Wanted, can_keep};
use crate::keys;
use crate::kinds;
use crate::text::{config, file_name};
use crate::users::Account;

/// The engine that is there without being declared.
const STUB: &str = "stub";

/// The declared engines.
#[derive(Debug)]
pub struct Provisioner {
    engines: HashMap<EngineName, (Kind, Mode)>,
    stub: StubCommand,
    sim_dir: Option<PathBuf>,
    /// Finds out what other users may reach; without it no engine runs as one.
    shim: Option<ShimCommand>,
    /// Whether engines have to be told a key.
    keyed: bool,
    discovery: Discovery,
}

impl Provisioner {
    /// Provides the engines of `decls`, and one named `stub` unless they have it. `sim_dir` is where engines on
    /// simulated devices make their claims.
    #[must_use]
    pub fn new(decls: Vec<EngineDecl>, stub: StubCommand, sim_dir: Option<PathBuf>) -> Self {
        let engines = decls.into_iter().map(|decl| (decl.name, (decl.kind, decl.mode))).collect();
        Self { engines, stub, sim_dir, shim: None, keyed: false, discovery: Discovery::default() }
    }

    /// The same, and it finds out by this shim what other users may reach, so that engines can run as them.
    #[must_use]
    pub fn proving_by(self, shim: ShimCommand) -> Self {
        Self { shim: Some(shim), ..self }
    }

    /// The same, and if `keyed`, each engine that it starts gets an API key of its own and serves nobody without it. What
    /// cannot be told one is not started.
    #[must_use]
    pub fn with_keys(self, keyed: bool) -> Self {
        Self { keyed, ..self }
    }

    /// Whether the engines of a spec can be kept from what it says, and can reach what they need all the same: proved by a
    /// process of their user.
    ///
    /// # Errors
    /// The first thing that stands in the way.
    pub async fn prove(&self, spec: &PoolSpec) -> Result<(), Unkept> {
        match self.engine(spec) {
            // Somebody else's, or nobody's.
            Ok((_, Some(Mode::External { .. }))) | Err(_) => return Ok(()),
            Ok(_) => {}
        }
        can_keep(&spec.isolation)?;
        let Some(run_as) = &spec.isolation.run_as else { return Ok(()) };
        let (account, shim) = self.account(run_as)?;
        let mut wanted: Vec<Wanted<'_>> = Vec::new();
        if let Ok((kind, mode)) = self.engine(spec) {
            if kind == Kind::Stub && kinds::has_flag(&spec.args, "--vram") {
                return Err(isolation::no_claims(run_as));
            }
            // One that is not there, or cannot be run at all, is told of by the preflight.
            if let Ok(program) = self.program(spec, kind, mode).await {
                wanted.push((program.path.clone(), Access::Execute, "the engine"));
            }
        }
        if let ModelRef::File(file) = &spec.model
            && Path::new(&file.path).exists()
        {
            wanted.push(((&file.path).into(), Access::Read, "the model"));
        }
        isolation::prove_access(shim, &account, &wanted).await
    }

    fn account(&self, run_as: &RunAs) -> Result<(Account, &ShimCommand), Unkept> {
        let account = isolation::account(run_as)?;
        let shim = self.shim.as_ref().ok_or_else(|| isolation::no_shim(run_as))?;
        Ok((account, shim))
    }

    /// The user of an engine, with a home that it can work in.
    async fn resident(&self, run_as: &RunAs) -> Result<Account, Failure> {
        let (mut account, shim) = self.account(run_as).map_err(|unkept| unkept.failure())?;
        if let Some(home) = account.home.take() {
            let proof = isolation::prove_access(shim, &account, &[(home.clone(), Access::Work, "its home")]).await;
            account.home = proof.is_ok().then_some(home);
        }
        Ok(account)
    }

    fn engine(&self, spec: &PoolSpec) -> Result<(Kind, Option<&Mode>), Failure> {
        match self.engines.get(&spec.engine) {
            Some((kind, mode)) => Ok((*kind, Some(mode))),
            None if spec.engine.as_str() == STUB => Ok((Kind::Stub, None)),
            None => Err(config(format!("engine `{}` is not declared", spec.engine))),
        }
    }

    /// The program of an engine that is not external.
    async fn program(&self, spec: &PoolSpec, kind: Kind, mode: Option<&Mode>) -> Result<Arc<Program>, Failure> {
        kinds::check_args(kind, &spec.args)?;
        let program = match (kind, mode) {
            (Kind::LlamaCpp, Some(Mode::Binary { path })) => self.discovery.program(path, &[]).await?,
            (Kind::Vllm, Some(Mode::Binary { path })) => {
                Arc::new(Discovery::unasked(path, kinds::vllm::version_beside).await?)
            }
            _ => self.discovery.program(&self.stub.program, &self.stub.args).await?,
        };
        if let Some(unknown) = kinds::flags(&spec.args).find(|flag| !program.knows_or_says_nothing(flag)) {
            let name = file_name(&program.path);
            return Err(config(format!("engine `{name}` does not know the argument `{unknown}`")));
        }
        if self.keyed {
            keys::told_by(kind, &program)?;
        }
        if !spec.version.is_empty() && !is_version(&spec.version, &program.version) {
            return Err(config(format!(
                "engine `{}` is version {}, but the pool wants {}",
                file_name(&program.path),
                program.version,
                spec.version
            )));
        }
        Ok(program)
    }
}

/// A kind reads files, or folders of them.
async fn fits(kind: Kind, model: Option<&Path>) -> Result<(), Failure> {
    let Some(model) = model else { return Ok(()) };
    let is_folder = tokio::fs::metadata(model).await.is_ok_and(|metadata| metadata.is_dir());
    match kind {
        Kind::LlamaCpp if is_folder => Err(config("llama.cpp serves GGUF files, and this model is a folder")),
        Kind::Vllm if !is_folder => Err(config("vLLM serves folders with a config.json, and this model is a file")),
        _ => Ok(()),
    }
}

/// Whether the version found is the one wanted: all of it, or the number that leads it (`4567`, also as `b4567`).
fn is_version(wanted: &str, found: &str) -> bool {
    let number = found.split_whitespace().next().unwrap_or(found);
    wanted == found || wanted == number || wanted.strip_prefix('b') == Some(number)
}

#[async_trait]
impl EngineProvisioner for Provisioner {
    async fn preflight(&self, spec: &PoolSpec) -> Result<(), Failure> {
        match self.engine(spec)? {
            (_, Some(Mode::External { .. })) => Ok(()),
            (kind, mode) => {
                self.program(spec, kind, mode).await?;
                self.prove(spec).await.map_err(|unkept| {
                    tracing::warn!(pool_id = %spec.id, hint = unkept.hint, "{unkept}");
                    unkept.failure()
                })
            }
        }
    }

    fn external(&self, spec: &PoolSpec) -> Option<SocketAddr> {
        match self.engine(spec) {
            Ok((_, Some(Mode::External { addr }))) => Some(*addr),
            _ => None,
        }
    }

    fn admits(&self, spec: &PoolSpec) -> Result<(), NotAdmitted> {
        match self.engine(spec) {
            Err(failure) => Err(NotAdmitted::Engine(failure.detail)),
            Ok((_, Some(Mode::External { .. }))) => Ok(()),
            Ok((kind, _)) => kinds::check_args(kind, &spec.args).map_err(|f| NotAdmitted::Argument(f.detail)),
        }
    }

    fn admits_from_api(&self, spec: &PoolSpec) -> Result<(), NotAdmitted> {
        self.admits(spec)?;
        match self.engine(spec) {
            Ok((kind, None | Some(Mode::Binary { .. }))) => {
                kinds::allowed::check(kind, &spec.args).map_err(|f| NotAdmitted::Argument(f.detail))
            }
            _ => Ok(()),
        }
    }

    fn memory(&self, spec: &PoolSpec) -> EngineMemory {
        match self.engine(spec) {
            Ok((_, Some(Mode::External { .. }))) => EngineMemory::Fixed(0),
            Ok((Kind::Stub, _)) => kinds::stub::memory(&spec.args),
            Ok((Kind::LlamaCpp, _)) => kinds::llama_cpp::memory(spec),
            Ok((Kind::Vllm, _)) | Err(_) => EngineMemory::Unknown,
        }
    }

    async fn prepare(&self, request: &PrepareRequest) -> Result<PreparedEngine, Failure> {
        let spec = &request.spec;
        let (kind, mode) = self.engine(spec)?;
        let endpoint = |addr, model_path| Endpoint {
            addr,
            kind: kind.code().to_owned(),
            model: request.model.id.clone(),
            model_path,
            workload: spec.workload,
            api_key: None,
        };
        if let Some(Mode::External { addr }) = mode {
            return Ok(PreparedEngine {
                entry: None,
                args: Vec::new(),
                env: Vec::new(),
                confinement: Confinement::default(),
                // What is a file here need not have the same path where it runs.
                endpoint: endpoint(*addr, None),
                engine_version: "unknown".to_owned(),
            });
        }
        let program = self.program(spec, kind, mode).await?;
        let account = match &spec.isolation.run_as {
            Some(run_as) => Some(self.resident(run_as).await?),
            None => None,
        };
        fits(kind, request.model.local_path.as_deref()).await?;
        let args = match kind {
            Kind::LlamaCpp => kinds::llama_cpp::args(request, &program)?,
            Kind::Vllm => kinds::vllm::args(request)?,
            Kind::Stub => kinds::stub::args(request, &self.stub.args)?,
        };
        let mut engine = PreparedEngine {
            entry: Some(program.path.clone()),
            args,
            env: kinds::engine_env(&request.devices, self.sim_dir.as_deref(), account.as_ref())?,
            confinement: isolation::confinement(&spec.isolation, account.as_ref()),
            endpoint: endpoint(request.listen, request.model.local_path.clone()),
            engine_version: program.version.clone(),
        };
        if self.keyed {
            keys::give(&mut engine, keys::random()?, keys::told_by(kind, &program)?);
        }
        Ok(engine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_for_one_kind_and_folders_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.gguf");
        std::fs::write(&file, "GGUF").unwrap();
        assert!(fits(Kind::LlamaCpp, Some(&file)).await.is_ok());
        assert!(fits(Kind::LlamaCpp, Some(dir.path())).await.is_err());
        assert!(fits(Kind::Vllm, Some(dir.path())).await.is_ok());
        assert!(fits(Kind::Vllm, Some(&file)).await.is_err());
        assert!(fits(Kind::Stub, Some(&file)).await.is_ok());
    }

    #[test]
    fn a_pin_names_a_version_or_its_leading_number() {
        for wanted in ["4567", "b4567", "4567 (abcdef)"] {
            assert!(is_version(wanted, "4567 (abcdef)"), "{wanted}");
        }
        assert!(!is_version("456", "4567 (abcdef)"));
        assert!(is_version("0.1.0", "0.1.0"));
    }
}
