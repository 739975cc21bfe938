//! Commands that print what happens, as it happens.

use std::time::Duration;

use pool_api::client::{Follow, HttpControl, SseEvent, SseStream};
use pool_domain::PoolId;
use pool_services::ControlError;

use crate::cli::{ClientArgs, FollowArgs};
use crate::commands::{connect, pool_id, refused};
use crate::exit::{Exit, is_read, tell};

/// Between two tries to reach a daemon that broke off.
const AGAIN: Duration = Duration::from_secs(1);

/// What is followed.
enum What {
    Events(Option<PoolId>),
    Logs(PoolId, Option<String>),
}

impl What {
    async fn open(&self, control: &HttpControl, follow: &Follow) -> Result<SseStream, ControlError> {
        match self {
            Self::Events(pool) => control.events(follow, pool.as_ref()).await,
            Self::Logs(pool, replica) => control.logs(pool, replica.as_deref(), follow).await,
        }
    }

    /// A line for people, or for programs. Nothing where there is nothing to say.
    fn line(&self, event: &SseEvent, json: bool) -> Option<String> {
        match self {
            Self::Events(_) if json => Some(event.data.clone()),
            Self::Events(_) => match event.view() {
                Some(view) => Some(format!("{}  {}", view.at, view.human)),
                None => (event.kind == "gap").then(|| "(some events are not kept any more)".to_owned()),
            },
            Self::Logs(..) if event.kind == "generation" => (!json).then(|| format!("(engine {} begins)", event.data)),
            Self::Logs(..) if json => Some(serde_json::json!({ "id": event.id, "line": event.data }).to_string()),
            Self::Logs(..) => Some(event.data.clone()),
        }
    }
}

async fn run(what: What, follow: &FollowArgs, args: &ClientArgs) -> Result<(), Exit> {
    let control = connect(args)?;
    let mut wish = Follow { follow: follow.follow, tail: follow.tail, after: None };
    let mut stream = what.open(&control, &wish).await.map_err(refused)?;
    loop {
        let broken = match stream.next().await {
            Ok(Some(event)) => {
                if let Some(line) = what.line(&event, args.json)
                    && !is_read(&(line + "\n"))?
                {
                    return Ok(());
                }
                wish.after = event.id.or(wish.after);
                continue;
            }
            Ok(None) if !follow.follow => return Ok(()),
            Err(error) if !follow.follow => return Err(refused(error)),
            Ok(None) => "the daemon ended the stream".to_owned(),
            Err(error) => error.to_string(),
        };
        tell(&format!("{broken}; trying again\n"));
        stream = loop {
            tokio::time::sleep(AGAIN).await;
            match what.open(&control, &wish).await {
                Ok(stream) => break stream,
                // It may be starting again.
                Err(ControlError::Unreachable(_) | ControlError::Unready { .. }) => {}
                Err(error) => return Err(refused(error)),
            }
        };
    }
}

/// `events`
///
/// # Errors
/// When the daemon is out of reach at first, or refuses.
pub async fn events(pool: Option<&str>, follow: &FollowArgs, args: &ClientArgs) -> Result<(), Exit> {
    run(What::Events(pool.map(pool_id).transpose()?), follow, args).await
}

/// `logs`
///
/// # Errors
/// When the daemon is out of reach at first, or refuses.
pub async fn logs(pool: &str, replica: Option<&str>, follow: &FollowArgs, args: &ClientArgs) -> Result<(), Exit> {
    run(What::Logs(pool_id(pool)?, replica.map(str::to_owned)), follow, args).await
}
