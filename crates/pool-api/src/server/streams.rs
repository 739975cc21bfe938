//! Answers that go on: events, and engines' logs.

#![allow(clippy::result_large_err, reason = "errors that become answers at once")]

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::channel::{Channel, SendError, Sender};
use pool_domain::{Generation, ReplicaKey};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::extract::{Answer, Params, Pool, invalid_params};
use super::feed::{Listening, Told};
use super::handlers::App;
use super::{AppState, Caller};
use crate::dto::{Code, EventFrame, Problem};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// After this long a silence a comment shows that the daemon is there.
const SILENCE: Duration = Duration::from_secs(15);
/// Between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(250);
/// Lines of a log where nobody says how many.
const LINES: usize = 200;
/// Most lines or events of the past that can be asked for.
const MOST: usize = 10_000;

/// A part of an engine's log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogPart {
    /// Whole lines, each with where it ends, counted in bytes from the beginning of the file that it is in.
    pub lines: Vec<(u64, String)>,
    /// Where to go on.
    pub next: u64,
}

/// Engines' logs, free of secrets.
#[async_trait]
pub trait Logs: fmt::Debug + Send + Sync {
    /// The last lines, at most so many. Nothing where there is no log.
    async fn last(&self, key: &ReplicaKey, generation: Generation, lines: usize) -> LogPart;
    /// What came after this place. Where the log was begun anew meanwhile, also what is left of it before that.
    async fn after(&self, key: &ReplicaKey, generation: Generation, place: u64) -> LogPart;
}

type Out = Sender<Bytes, Infallible>;

/// An event stream that this goes on writing, until it is done, nobody reads, or the daemon ends.
fn stream<W>(state: &AppState, write: impl FnOnce(Out) -> W) -> Response
where
    W: Future<Output = Result<(), SendError>> + Send + 'static,
{
    let (sender, body) = Channel::new(16);
    let (writing, closing) = (write(sender), state.closing.clone());
    tokio::spawn(async move {
        tokio::select! {
            biased;
            () = closing.cancelled() => {}
            // Whoever read it is gone.
            _ = writing => {}
        }
    });
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn last_event_id(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let text = |v: &HeaderValue| v.to_str().map(str::to_owned).map_err(|_| invalid_params("Last-Event-ID is no text"));
    headers.get(LAST_EVENT_ID).map(text).transpose()
}

/// What events are wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventParams {
    follow: Option<bool>,
    tail: Option<usize>,
    pool_id: Option<String>,
}

/// What happens, as it happens. With `Last-Event-ID`, what was missed comes first; an event `gap` says that not all of it
/// is kept any more.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(
    ("follow" = Option<bool>, Query, description = "Go on with what happens; true unless told otherwise"),
    ("tail" = Option<usize>, Query, description = "How many events of the past come first; none with follow, else all that are kept"),
    ("pool_id" = Option<String>, Query, description = "Only of this pool"),
    ("Last-Event-ID" = Option<String>, Header, description = "The last event that is known")), responses(
    (status = 200, description = "Server-sent events, each with one EventView", body = EventFrame, content_type = "text/event-stream"),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 503, description = "UNAVAILABLE: too many listen", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn events(
    State(s): App,
    caller: Caller,
    Params(q): Params<EventParams>,
    headers: HeaderMap,
) -> Answer {
    let after = last_event_id(&headers)?;
    let (follow, back) = (q.follow.unwrap_or(true), after.is_some());
    let listening = s.feed.listen(after).await;
    let mut listening = listening.ok_or_else(|| Problem::new(Code::Unavailable, "too many listen to events"))?;
    let tail = q.tail.map_or(if follow && !back { 0 } else { MOST }, |n| n.min(MOST));
    let own = caller.kept_to().cloned();
    let shown = move |told: &Told| {
        let of_pool = q.pool_id.as_ref().is_none_or(|pool| *pool == told.pool);
        let of_tenant = own.as_ref().is_none_or(|own| told.tenant.as_ref().is_none_or(|t| **t == **own));
        of_pool && of_tenant
    };
    listening.past.retain(|told| shown(told));
    let first = listening.past.len().saturating_sub(tail);
    listening.past.drain(..first);
    Ok(stream(&s, move |out| tell(listening, follow, shown, out)))
}

async fn tell(
    listening: Listening,
    follow: bool,
    shown: impl Fn(&Told) -> bool,
    mut out: Out,
) -> Result<(), SendError> {
    let Listening { past, gap, mut coming } = listening;
    // Something goes out at once, so that who connects knows that it did.
    out.send_data(Bytes::from_static(b": events\n\n")).await?;
    if gap {
        out.send_data(Bytes::from_static(b"event: gap\ndata: {\"human\":\"Some events are not kept any more\"}\n\n"))
            .await?;
    }
    for told in past {
        out.send_data(told.frame.clone()).await?;
    }
    if !follow {
        return Ok(());
    }
    loop {
        match timeout(SILENCE, coming.recv()).await {
            Ok(Some(told)) if shown(&told) => out.send_data(told.frame.clone()).await?,
            Ok(Some(_)) => {}
            // Too slow, or the daemon ends.
            Ok(None) => return Ok(()),
            Err(_) => out.send_data(Bytes::from_static(b":\n\n")).await?,
        }
    }
}

/// What part of a log is wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogParams {
    follow: Option<bool>,
    tail: Option<usize>,
    replica: Option<String>,
}

/// Where in which log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    generation: Generation,
    at: u64,
}

impl Place {
    fn parse(text: &str) -> Option<Self> {
        let (generation, at) = text.strip_prefix('g')?.split_once('-')?;
        Some(Self { generation: Generation(generation.parse().ok()?), at: at.parse().ok()? })
    }
}

/// The engine's log, a line an event. With `follow`, what it writes, also the next engine in its place: an event
/// `generation` says so.
#[utoipa::path(get, path = "/v1/pools/{id}/logs", tag = "events", params(
    ("id" = String, Path, description = "The pool"),
    ("follow" = Option<bool>, Query, description = "Go on with what is written; false unless told otherwise"),
    ("tail" = Option<usize>, Query, description = "How many lines of the past come first; 200 unless told otherwise"),
    ("replica" = Option<String>, Query, description = "Of this replica; unless told otherwise the first that is ready, else the first"),
    ("Last-Event-ID" = Option<String>, Header, description = "The last line that is known")), responses(
    (status = 200, description = "Server-sent events, each with one line", body = EventFrame, content_type = "text/event-stream"),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn logs(State(s): App, Pool(id): Pool, Params(q): Params<LogParams>, headers: HeaderMap) -> Answer {
    let known = last_event_id(&headers)?;
    let known = known.map(|t| Place::parse(&t).ok_or_else(|| invalid_params("Last-Event-ID is no line of a log")));
    let known = known.transpose()?;
    let pool = s.control.pool(&id).await?;
    let shown = match &q.replica {
        Some(name) => pool.replicas.iter().find(|r| r.id.to_string() == *name),
        None => pool.lead(),
    };
    let Some(shown) = shown else {
        return Err(invalid_params("the pool has no such replica")
            .with_hint("GET /v1/pools/{id} lists its replicas, such as r0"));
    };
    let key = ReplicaKey { pool: id, replica: shown.id };
    let (generation, lines) = (shown.generation, q.tail.unwrap_or(LINES).min(MOST));
    let state = Arc::clone(&s);
    let follow = q.follow.unwrap_or(false);
    Ok(stream(&s, move |out| log(state, key, generation, known, lines, follow, out)))
}

async fn log(
    state: Arc<AppState>,
    key: ReplicaKey,
    mut generation: Generation,
    known: Option<Place>,
    lines: usize,
    follow: bool,
    mut out: Out,
) -> Result<(), SendError> {
    out.send_data(Bytes::from_static(b": log\n\n")).await?;
    let (mut part, known) = match known.filter(|k| k.generation == generation) {
        Some(Place { at, .. }) => (state.logs.after(&key, generation, at).await, true),
        None => (state.logs.last(&key, generation, lines).await, known.is_none()),
    };
    if !known {
        begun(&mut out, generation).await?;
    }
    let mut quiet = Duration::ZERO;
    loop {
        write(&mut out, generation, &part).await?;
        if !follow {
            return Ok(());
        }
        quiet = if part.lines.is_empty() { quiet + LOOK } else { Duration::ZERO };
        if quiet >= SILENCE {
            out.send_data(Bytes::from_static(b":\n\n")).await?;
            quiet = Duration::ZERO;
        }
        sleep(LOOK).await;
        let Ok(pool) = state.control.pool(&key.pool).await else { return Ok(()) };
        let now = pool.replicas.iter().find(|r| r.id == key.replica).map(|r| r.generation);
        part = state.logs.after(&key, generation, part.next).await;
        if let Some(now) = now.filter(|now| *now != generation) {
            // What the old one wrote last, then the new one from its first line.
            write(&mut out, generation, &part).await?;
            generation = now;
            begun(&mut out, generation).await?;
            part = state.logs.after(&key, generation, 0).await;
        }
    }
}

async fn begun(out: &mut Out, generation: Generation) -> Result<(), SendError> {
    out.send_data(format!("event: generation\ndata: {}\n\n", generation.0).into()).await
}

async fn write(out: &mut Out, generation: Generation, part: &LogPart) -> Result<(), SendError> {
    for (end, line) in &part.lines {
        // A line break of another kind would end the event.
        let line = line.replace(['\r', '\n'], " ");
        out.send_data(format!("id: g{}-{end}\ndata: {line}\n\n", generation.0).into()).await?;
    }
    Ok(())
}
