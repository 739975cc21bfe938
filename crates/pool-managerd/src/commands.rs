//! Commands that ask a daemon over its API.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use pool_api::client::{BadBaseUrl, HttpControl};
use pool_api::dto::{OperationView, ReloadBody};
use pool_api::spec::StrategyText;
use pool_domain::PoolId;
use pool_domain::lifecycle;
use pool_services::{ControlError, DrainOptions, Operation, OperationState, PoolControl};
use serde::Serialize;

use crate::cli::{ClientArgs, OnDeadline, Strategy, VerbArgs};
use crate::exit::{BUG, Exit, REFUSED, USAGE, print};
use crate::progress::{self, Progress};
use crate::tables;

/// Where the token to show is looked for.
const TOKEN: &str = "POOL_MANAGERD_TOKEN";
/// One look at a long operation.
const LOOK: Duration = Duration::from_secs(2);

/// A verb on a pool.
#[derive(Debug, Clone, PartialEq)]
pub enum Verb {
    /// Start every engine.
    Preload,
    /// Wait for leases, stop, hold.
    Drain {
        /// Time for leases.
        deadline: Option<Duration>,
        /// What happens then.
        on_deadline: Option<OnDeadline>,
    },
    /// Give up a drain, or lift the hold.
    Resume,
    /// Stop at once, hold.
    Stop,
    /// Another form.
    Reload(Box<ReloadBody>),
    /// Back to the form before.
    Rollback,
}

impl Verb {
    /// A reload as it is asked for on the command line.
    #[must_use]
    pub fn reload(
        model: Option<String>,
        engine_version: Option<String>,
        strategy: Option<Strategy>,
        deadline: Option<Duration>,
        on_deadline: Option<OnDeadline>,
    ) -> Self {
        Self::Reload(Box::new(ReloadBody {
            new_model_ref: model,
            new_engine_version: engine_version,
            deadline_ms: deadline.map(|d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
            on_deadline: on_deadline.map(|d| lifecycle::OnDeadline::from(d).into()),
            strategy: strategy.map(|s| match s {
                Strategy::Auto => StrategyText::Auto,
                Strategy::InPlace => StrategyText::InPlace,
                Strategy::Overlap => StrategyText::Overlap,
                Strategy::Rolling => StrategyText::Rolling,
            }),
            ..ReloadBody::default()
        }))
    }
}

impl From<OnDeadline> for lifecycle::OnDeadline {
    fn from(d: OnDeadline) -> Self {
        match d {
            OnDeadline::Force => Self::Force,
            OnDeadline::Abort => Self::Abort,
        }
    }
}

pub(crate) fn connect(args: &ClientArgs) -> Result<HttpControl, Exit> {
    let read = |path: &Path, flag: &str| {
        std::fs::read(path).map_err(|e| Exit::new(USAGE, format!("{flag} {}: {e}", path.display())))
    };
    let wrong = |e: BadBaseUrl| {
        Exit::new(USAGE, format!("--server: {e}")).hinting("https needs --ca with a file of certificates")
    };
    let control = match &args.ca {
        Some(ca) => HttpControl::trusting(&args.server, &read(ca, "--ca")?).map_err(wrong)?,
        None => HttpControl::new(&args.server).map_err(wrong)?,
    };
    // Never an argument: those are everybody's to see.
    let token = match &args.token_file {
        Some(path) => Some(String::from_utf8_lossy(&read(path, "--token-file")?).into_owned()),
        None => std::env::var(TOKEN).ok(),
    };
    // The daemon's own file of tokens will do, too: the first word of its first line.
    let line =
        token.as_deref().and_then(|text| text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with('#')));
    let token = line.and_then(|line| line.split_whitespace().next());
    match token {
        Some(token) => control.with_token(token).map_err(|e| Exit::new(USAGE, e.to_string())),
        None => Ok(control),
    }
}

pub(crate) fn refused(error: ControlError) -> Exit {
    let exit = Exit::new(REFUSED, error.to_string());
    match error {
        ControlError::PoolNotFound(_) => exit.hinting("`pool-managerd status` lists the pools"),
        ControlError::Refused { code, .. } if code == "UNAUTHORIZED" => {
            exit.hinting(format!("set {TOKEN}, or name a file with --token-file"))
        }
        ControlError::DeviceNotFound(_) => exit.hinting("`pool-managerd devices` lists the devices"),
        _ => exit,
    }
}

pub(crate) fn pool_id(text: &str) -> Result<PoolId, Exit> {
    text.parse().map_err(|e: pool_domain::id::IdError| Exit::new(USAGE, e.to_string()))
}

fn json(value: &impl Serialize) -> Result<String, Exit> {
    serde_json::to_string_pretty(value).map(|s| s + "\n").map_err(|e| Exit::new(BUG, e.to_string()))
}

/// Between two pictures of the devices.
const WATCH: Duration = Duration::from_secs(1);

/// `devices`. With `watch` until it is interrupted.
///
/// # Errors
/// When the daemon is out of reach or refuses.
pub async fn devices(watch: bool, args: &ClientArgs) -> Result<(), Exit> {
    let control = connect(args)?;
    if args.json {
        return print(&json(&control.node_view().await.map_err(refused)?)?);
    }
    loop {
        let (node, pools) = (control.node().await.map_err(refused)?, control.pools().await.map_err(refused)?);
        let text = tables::devices(&node, &pools);
        if !watch {
            return print(&text);
        }
        // A terminal is cleared; a file gets one picture after the other.
        let clear = if std::io::stdout().is_terminal() { "\u{1b}[2J\u{1b}[H" } else { "" };
        print(&format!("{clear}{text}"))?;
        tokio::time::sleep(WATCH).await;
    }
}

/// `capabilities`
///
/// # Errors
/// When the daemon is out of reach or refuses.
pub async fn capabilities(args: &ClientArgs) -> Result<(), Exit> {
    let told = connect(args)?.capabilities().await.map_err(refused)?;
    print(&if args.json { json(&told)? } else { tables::capabilities(&told) })
}

/// `status`
///
/// # Errors
/// When the daemon is out of reach or there is no such pool.
pub async fn status(pool: Option<&str>, args: &ClientArgs) -> Result<(), Exit> {
    let control = connect(args)?;
    let text = match (pool, args.json) {
        (None, true) => json(&control.pool_views().await.map_err(refused)?)?,
        (None, false) => tables::pools(&control.pools().await.map_err(refused)?),
        (Some(id), true) => json(&control.pool_view(&pool_id(id)?).await.map_err(refused)?)?,
        (Some(id), false) => tables::pool(&control.pool(&pool_id(id)?).await.map_err(refused)?),
    };
    print(&text)
}

/// `preload`, `drain`, `resume`, `stop`, `reload`, `rollback`
///
/// # Errors
/// When the daemon refuses, or the work fails.
pub async fn verb(verb: Verb, args: &VerbArgs) -> Result<(), Exit> {
    let control = connect(&args.client)?;
    let id = pool_id(&args.pool)?;
    let begun = match verb {
        Verb::Preload => control.preload(&id).await,
        Verb::Resume => control.resume(&id).await,
        Verb::Stop => control.stop(&id).await,
        Verb::Drain { deadline, on_deadline } => {
            control.drain(&id, DrainOptions { deadline, on_deadline: on_deadline.map(Into::into) }).await
        }
        Verb::Reload(body) => control.reload_by(&id, &body, None).await,
        Verb::Rollback => control.rollback(&id).await,
    };
    let mut operation = begun.map_err(refused)?;
    if !args.no_wait {
        operation = follow(&control, operation, !args.client.json).await?;
    }
    let text = if args.client.json { json(&OperationView::from(&operation))? } else { tables::operation(&operation) };
    print(&text)?;
    match operation.state {
        OperationState::Failed(reason) => Err(Exit::new(REFUSED, format!("{} failed: {reason}", operation.verb))
            .hinting(format!("`pool-managerd status {id}` shows how the pool stands"))),
        _ => Ok(()),
    }
}

/// Waits until the operation is over, telling a person how far it is.
async fn follow(control: &HttpControl, mut operation: Operation, tell: bool) -> Result<Operation, Exit> {
    let bar = (tell && std::io::stderr().is_terminal()).then(Progress::begin);
    while operation.state == OperationState::Running {
        let pool = operation.pool_id.clone();
        let id = operation.id.clone();
        operation = tokio::select! {
            biased;
            told = control.wait_operation(&id, LOOK) => told.map_err(refused)?,
            () = show(control, &pool, &operation, bar.as_ref()) => operation,
        };
    }
    Ok(operation)
}

/// Shows, for as long as it is waited for, how far a pool is. One that cannot be seen is not shown; the operation says why.
async fn show(control: &HttpControl, pool: &PoolId, operation: &Operation, bar: Option<&Progress>) {
    let Some(bar) = bar else { return std::future::pending().await };
    loop {
        if let Ok(pool) = control.pool(pool).await {
            bar.show(&pool, operation);
        }
        tokio::time::sleep(progress::PICTURE).await;
    }
}

/// `breaker reset`
///
/// # Errors
/// When the daemon is out of reach or there is no such pool.
pub async fn reset_breaker(args: &VerbArgs) -> Result<(), Exit> {
    let control = connect(&args.client)?;
    let id = pool_id(&args.pool)?;
    control.reset_breaker(&id).await.map_err(refused)?;
    print(&if args.client.json { "{}\n".to_owned() } else { format!("the breaker of {id} is closed\n") })
}

/// `unfence`
///
/// # Errors
/// When the daemon is out of reach or there is no such device.
pub async fn unfence(device: &str, args: &ClientArgs) -> Result<(), Exit> {
    let control = connect(args)?;
    control.unfence(device).await.map_err(refused)?;
    print(&if args.json { "{}\n".to_owned() } else { format!("nothing is fenced on {device} any more\n") })
}
