//! The config file, read again while the daemon runs: one task does it, for SIGHUP and for the API.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use pool_api::dto::{Code, ConfigReloadView, PoolChangeView, Problem};
use pool_api::server::Reconfigure;
use pool_domain::PoolId;
use pool_domain::reconcile::{Step, reconcile};
use pool_services::{ControlError, Declared, PoolControl, PoolManager, Source};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::compose;
use crate::config::{Config, ConfigError};

type Answer = Result<ConfigReloadView, Problem>;

/// Wishes that may wait; more are refused.
const QUEUE: usize = 8;

/// How the task is asked over the API, once there is one.
#[derive(Debug, Default)]
pub(crate) struct LateConfig(OnceLock<mpsc::Sender<oneshot::Sender<Answer>>>);

#[async_trait]
impl Reconfigure for LateConfig {
    async fn reload_config(&self) -> Answer {
        let starting = || ControlError::unready("the daemon is starting and waits for its GPUs");
        let wishes = self.0.get().ok_or_else(starting)?;
        let (answer, answered) = oneshot::channel();
        wishes.try_send(answer).map_err(|_| ControlError::Unreachable("the config is being read already".into()))?;
        answered.await.map_err(|_| ControlError::Unreachable("the daemon is stopping".into()))?
    }
}

/// The task's own.
pub(crate) struct Rereader {
    /// As the daemon was started with it.
    config: Config,
    manager: PoolManager,
    wishes: mpsc::Receiver<oneshot::Sender<Answer>>,
    /// Rung by SIGHUP. However often it is rung meanwhile, the file is read once more.
    hangup: Arc<Notify>,
    /// Rung with every reload, for tokens and certificates.
    renew: Arc<Notify>,
}

impl Rereader {
    pub(crate) fn new(
        config: Config,
        manager: PoolManager,
        late: &LateConfig,
        hangup: Arc<Notify>,
        renew: Arc<Notify>,
    ) -> Self {
        let (wish, wishes) = mpsc::channel(QUEUE);
        // Only one is ever made.
        let _ = late.0.set(wish);
        Self { config, manager, wishes, hangup, renew }
    }

    pub(crate) async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                wish = self.wishes.recv() => match wish {
                    Some(answer) => {
                        let done = self.reload().await;
                        // Who asked may be gone.
                        let _ = answer.send(done);
                    }
                    None => return,
                },
                // The log has told what became of it.
                () = self.hangup.notified() => drop(self.reload().await),
            }
        }
    }

    async fn reload(&self) -> Answer {
        self.renew.notify_one();
        let wanted = match self.wanted().await {
            Ok(wanted) => wanted,
            Err(error) => {
                tracing::error!(%error, hint = error.hint, "the config cannot be: nothing was changed");
                return Err(problem(&error));
            }
        };
        let view = self.apply(&wanted).await;
        let of = |change| view.pools.iter().filter(|p| p.change == change).count();
        let (new, changed, gone, unchanged) = (of("new"), of("changed"), of("gone"), view.unchanged.len());
        tracing::info!(new, changed, gone, unchanged, "the config was read again");
        for key in &view.needs_restart {
            tracing::warn!(key = key.as_str(), "this key changed and counts after a restart");
        }
        Ok(view)
    }

    /// The file as it is now, if this daemon can make it so.
    async fn wanted(&self) -> Result<Config, ConfigError> {
        let wanted = self.config.reread()?;
        let told = self.manager.node().await;
        let devices: Vec<_> = told.map(|n| n.devices.into_iter().map(|(d, _)| d).collect()).unwrap_or_default();
        compose::check_masks_patiently(&wanted, &devices)?;
        compose::check_isolation(&wanted)?;
        for (i, spec) in wanted.specs().enumerate() {
            if let Err(error) = self.manager.admits(spec) {
                let code = if let ControlError::Refused { code, .. } = &error { code.as_str() } else { "" };
                let (key, hint) = match code {
                    "ARG_DENIED" => ("args", None),
                    "MODEL_REF_DENIED" => {
                        ("model", Some("what is new in [models] counts after a restart of the daemon"))
                    }
                    _ => ("engine", Some("engines that are new in [engines] are there after a restart of the daemon")),
                };
                let wrong = wanted.pool_error(i, key, error.to_string());
                return Err(match hint {
                    Some(hint) => wrong.hinting(hint),
                    None => wrong,
                });
            }
        }
        Ok(wanted)
    }

    /// Begins what has to be done, pool by pool; what cannot be begun leaves that pool as it is.
    async fn apply(&self, wanted: &Config) -> ConfigReloadView {
        let digest = |source: &Source| source.digest().map(str::to_owned);
        let there: BTreeMap<PoolId, String> =
            self.manager.sources().into_iter().filter_map(|(id, source)| Some((id, digest(&source)?))).collect();
        let declared: BTreeMap<PoolId, &Declared> = wanted.pools.iter().map(|d| (d.spec.id.clone(), d)).collect();
        let digests = declared.iter().filter_map(|(id, d)| Some((id.clone(), digest(&d.source)?))).collect();
        let mut view = ConfigReloadView { needs_restart: self.config.differs_outside(wanted), ..Default::default() };
        for step in reconcile(&there, &digests) {
            let (id, change) = match step {
                Step::Keep(id) => {
                    view.unchanged.push(id.to_string());
                    continue;
                }
                Step::Remove(id) => (id, "gone"),
                Step::Change(id) => (id, "changed"),
                Step::Add(id) => (id, "new"),
            };
            let begun = match declared.get(&id) {
                Some(pool) => self.manager.declare((*pool).clone(), None).await,
                None => self.manager.retire(&id).await,
            };
            if let Err(error) = &begun {
                tracing::error!(pool_id = %id, change, %error, "a change of the config was not made");
            }
            view.pools.push(PoolChangeView {
                pool_id: id.to_string(),
                change: change.into(),
                problem: begun.as_ref().err().map(ToString::to_string),
                operation_id: begun.ok().map(|o| o.id),
            });
        }
        view
    }
}

/// What is wrong, without the path of the file.
fn problem(error: &ConfigError) -> Problem {
    let place = error.line.map(|line| format!("line {line}: ")).unwrap_or_default();
    let here = ConfigError { file: None, ..error.clone() };
    let mut problem = Problem::new(Code::InvalidParams, format!("the config file: {place}{here}"));
    problem.hint = error.hint.clone();
    problem
}
