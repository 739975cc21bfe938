//! What a request asks for: by its headers, and by the one thing in its body that is looked at.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use pool_services::lease::MAX_WAIT;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::headers::{LEASE, PROGRESS, WAIT};
use super::{MAX_BODY, UNIT};
use crate::dto::{Code, Problem};

/// Longest pause while a body comes, and longest time for the whole of it.
const PAUSE: Duration = Duration::from_secs(30);
const WHOLE: Duration = Duration::from_secs(300);
/// A body of this size is read without asking for room.
const SMALL: usize = 64 * UNIT;

fn invalid(detail: impl Into<String>) -> Problem {
    Problem::new(Code::InvalidParams, detail)
}

/// What the headers ask for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) lease: Option<String>,
    pub(super) wait: Duration,
    pub(super) progress: bool,
}

impl Ask {
    pub(super) fn read(head: &Parts, wait: Duration) -> Result<Self, Problem> {
        let headers = &head.headers;
        let text = |name| -> Result<Option<&str>, Problem> {
            let value: Option<&HeaderValue> = headers.get(&name);
            value.map(|v| v.to_str().map_err(|_| invalid(format!("{name} is no text")))).transpose()
        };
        let wait = match text(WAIT)?.map(str::parse) {
            None => wait,
            Some(Ok(ms)) => Duration::from_millis(ms).min(MAX_WAIT),
            Some(Err(_)) => return Err(invalid("x-pool-wait-ms is to be a number of milliseconds")),
        };
        let progress = match text(PROGRESS)? {
            None | Some("0" | "false") => false,
            Some("1" | "true") => true,
            Some(_) => return Err(invalid("x-pool-progress is to be true or false")),
        };
        Ok(Self { lease: text(LEASE)?.map(str::to_owned), wait, progress })
    }
}

/// A body, complete.
#[derive(Debug)]
pub(super) struct Payload {
    pub(super) data: Bytes,
    pub(super) trailers: Option<HeaderMap>,
    /// Its part of the room for bodies.
    _room: Vec<OwnedSemaphorePermit>,
}

/// The one key that matters here. It is a slip to name it twice.
#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
}

fn too_large() -> Problem {
    invalid(format!("the body is larger than {} MiB", MAX_BODY / (1024 * 1024)))
        .with_status(StatusCode::PAYLOAD_TOO_LARGE)
}

impl Payload {
    /// Reads it. Nothing is sent on before it is there: the model it names decides where to.
    pub(super) async fn read(headers: &HeaderMap, mut body: Body, room: &Arc<Semaphore>) -> Result<Self, Problem> {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|n| n > MAX_BODY) {
            return Err(too_large());
        }
        let end = Instant::now() + WHOLE;
        let mut taken = Vec::new();
        let mut take = |bytes: usize| {
            let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
            let permit = Arc::clone(room).try_acquire_many_owned(units).map_err(|_| {
                Problem::new(Code::Unavailable, "too many large requests are being read at this moment")
            })?;
            taken.push(permit);
            Ok::<_, Problem>(())
        };
        if let Some(n) = length.filter(|n| *n > SMALL) {
            take(n)?;
        }
        let (mut first, mut all, mut trailers) = (Bytes::new(), BytesMut::new(), None);
        loop {
            let pause = (Instant::now() + PAUSE).min(end);
            let frame = timeout_at(pause, body.frame())
                .await
                .map_err(|_| invalid("the body did not come in time").with_status(StatusCode::REQUEST_TIMEOUT))?;
            let frame = match frame {
                None => break,
                Some(Ok(frame)) => frame,
                Some(Err(_)) => return Err(invalid("the body broke off")),
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(frame) => {
                    trailers = frame.into_trailers().ok();
                    continue;
                }
            };
            if first.is_empty() && all.is_empty() {
                first = data;
                continue;
            }
            // More than one piece: from here on they are put together.
            if all.is_empty() {
                all.reserve(length.unwrap_or(SMALL));
                all.extend_from_slice(&first);
            }
            if all.len() + data.len() > MAX_BODY {
                return Err(too_large());
            }
            if length.is_none() && all.len() + data.len() > SMALL {
                take(data.len())?;
            }
            all.extend_from_slice(&data);
        }
        let data = if all.is_empty() { first } else { all.freeze() };
        Ok(Self { data, trailers, _room: taken })
    }

    /// Whether it asks for events.
    pub(super) fn streams(&self) -> bool {
        #[derive(Deserialize)]
        struct Streams {
            #[serde(default)]
            stream: bool,
        }
        serde_json::from_slice(&self.data).is_ok_and(|told: Streams| told.stream)
    }

    /// The model that it names.
    pub(super) fn model(&self) -> Result<Cow<'_, str>, Problem> {
        // serde reads a struct from a list, too.
        if self.data.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
            return Err(invalid("the body is no JSON object"));
        }
        let told: Model<'_> = serde_json::from_slice(&self.data)
            .map_err(|e| invalid(format!("the body is not what it should be: {e}")))?;
        told.model
            .filter(|m| !m.is_empty())
            .ok_or_else(|| invalid("the body names no `model`").with_hint("GET /v1/models lists the models"))
    }
}
