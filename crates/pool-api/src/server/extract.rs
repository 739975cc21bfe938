//! Extractors whose refusals are problems.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use pool_domain::PoolId;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{MAX_BODY, MAX_WAIT};
use crate::dto::{Code, Problem};

/// Time for a body, which is small.
const IN_TIME: Duration = Duration::from_secs(30);

pub(super) fn invalid_params(detail: impl Into<String>) -> Problem {
    Problem::new(Code::InvalidParams, detail)
}

/// A JSON body. No body at all is the default.
pub(super) struct Body<T>(pub(super) T);

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|k| k.trim().eq_ignore_ascii_case("application/json"))
}

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for Body<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let typed = request.headers().contains_key(header::CONTENT_TYPE);
        let json = is_json(request.headers());
        let bytes = timeout(IN_TIME, Bytes::from_request(request, state))
            .await
            .map_err(|_| invalid_params("the body did not come in time").with_status(StatusCode::REQUEST_TIMEOUT))?;
        let bytes = bytes.map_err(|e| match e {
            BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
                invalid_params(format!("the body is larger than {MAX_BODY} bytes"))
                    .with_status(StatusCode::PAYLOAD_TOO_LARGE)
            }
            _ => invalid_params("the body could not be read"),
        })?;
        if bytes.is_empty() && (!typed || json) {
            return Ok(Self(T::default()));
        }
        if !json {
            return Err(invalid_params("the body is not JSON").with_hint("send Content-Type: application/json"));
        }
        // serde reads a struct from a list, too; a list here is a slip that must not drain a pool.
        if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
            return Err(invalid_params("the body is no JSON object"));
        }
        serde_json::from_slice(&bytes).map(Self).map_err(|e| invalid_params(format!("the body does not fit: {e}")))
    }
}

/// A query string without unknown keys.
pub(super) struct Params<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(e) => Err(invalid_params(e.body_text())),
        }
    }
}

/// The `{id}` of a path.
pub(super) struct Id(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) if id.len() <= 256 => Ok(Self(id)),
            _ => Err(invalid_params("the id in the path is no id")),
        }
    }
}

/// The `{id}` of a path, as a pool.
pub(super) struct Pool(pub(super) PoolId);

impl<S: Send + Sync> FromRequestParts<S> for Pool {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Id(id) = Id::from_request_parts(parts, state).await?;
        id.parse().map(Self).map_err(|e: pool_domain::id::IdError| invalid_params(e.to_string()))
    }
}

/// `?wait_ms=`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitParams {
    wait_ms: Option<u64>,
}

impl WaitParams {
    pub(super) fn wait(&self) -> Option<Duration> {
        self.wait_ms.filter(|ms| *ms > 0).map(capped)
    }
}

/// `?wait_for_snapshot=&wait_ms=`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolParams {
    wait_for_snapshot: Option<u64>,
    wait_ms: Option<u64>,
}

impl PoolParams {
    /// The number to wait for and how long, where both say something.
    #[allow(clippy::result_large_err, reason = "an error that becomes an answer at once")]
    pub(super) fn wait(&self) -> Result<Option<(u64, Duration)>, Problem> {
        match (self.wait_for_snapshot, self.wait_ms) {
            (Some(after), ms) => Ok(Some((after, capped(ms.unwrap_or(30_000))))),
            (None, None) => Ok(None),
            (None, Some(_)) => {
                Err(invalid_params("wait_ms needs wait_for_snapshot: the number of the last picture you have"))
            }
        }
    }
}

fn capped(ms: u64) -> Duration {
    Duration::from_millis(ms).min(MAX_WAIT)
}

pub(super) type Answer = Result<Response, Problem>;

/// What a declaration of a pool may ask for.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PutParams {
    pub(super) dry_run: Option<bool>,
    wait_ms: Option<u64>,
}

impl PutParams {
    pub(super) fn wait(&self) -> Option<Duration> {
        WaitParams { wait_ms: self.wait_ms }.wait()
    }
}
