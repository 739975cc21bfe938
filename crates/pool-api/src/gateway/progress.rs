//! For clients that ask for it: a stream that begins at once, with comments that tell how far the start of the engine is,
//! and goes on with the engine's answer. Comments are nothing to who reads events.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::channel::{Channel, SendError, Sender};
use http_body_util::{BodyExt, Collected, Limited};
use hyper::body::Frame;
use pool_domain::PoolId;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Ask, Context, Payload, Way, send};
use crate::dto::{Code, Problem};

/// Longest silence before a comment is repeated.
const REPEAT: Duration = Duration::from_secs(5);
/// Most of an engine's refusal that is passed on as an event.
const REFUSAL: usize = 64 * 1024;

/// An answer that begins now.
pub(super) fn answer(context: Arc<Context>, ask: Ask, payload: Payload, pool: PoolId, head: Parts) -> Response {
    let (sender, body) = Channel::<Bytes, hyper::Error>::new(1);
    let gone = CancellationToken::new();
    let read = Read { body, _gone: gone.clone().drop_guard() };
    tokio::spawn(async move {
        tokio::select! {
            biased;
            // Whoever reads is gone, and an engine that is silent for minutes would not show it.
            () = gone.cancelled() => {}
            () = run(context, ask, payload, pool, head, sender) => {}
        }
    });
    let mut response = Response::new(Body::new(read));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// The body of the answer, which tells when nobody reads it any more.
struct Read {
    body: Channel<Bytes, hyper::Error>,
    _gone: DropGuard,
}

impl hyper::body::Body for Read {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }
}

async fn run(
    context: Arc<Context>,
    ask: Ask,
    payload: Payload,
    pool: PoolId,
    head: Parts,
    mut sender: Sender<Bytes, hyper::Error>,
) {
    let way = Way::Pool(pool.clone());
    let sent = tokio::select! {
        biased;
        sent = send::send(&context, &ask, &payload, &way, &head) => sent,
        _ = comments(&context, &pool, &mut sender) => return,
    };
    let response = match sent {
        Ok(response) => response,
        Err(refusal) => {
            context.metrics().gateway_refused(&refusal.problem.code, context.tenant());
            let _ = sender.send_data(refusal.dialect.event(&refusal.problem)).await;
            return;
        }
    };
    let streams = response.status().is_success();
    let mut body = response.into_body();
    if !streams {
        let told = Limited::new(body, REFUSAL).collect().await.map(Collected::to_bytes).unwrap_or_default();
        let line = String::from_utf8_lossy(&told).split_whitespace().collect::<Vec<_>>().join(" ");
        let event = if line.starts_with('{') {
            format!("data: {line}\n\n").into()
        } else {
            let problem = Problem::new(Code::EngineFailed, "the engine refused the request");
            context.dialect.event(&problem)
        };
        let _ = sender.send_data(event).await;
        return;
    }
    while let Some(frame) = body.frame().await {
        let sent = match frame {
            Ok(frame) => sender.send(frame).await,
            Err(error) => {
                sender.abort(error);
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Tells how the pool is, whenever that changes, until nobody listens.
async fn comments(context: &Context, pool: &PoolId, sender: &mut Sender<Bytes, hyper::Error>) -> Result<(), SendError> {
    let mut seen = 0;
    loop {
        let comment = match context.state.control.wait_pool(pool, seen, REPEAT).await {
            Ok(shown) => {
                seen = shown.snapshot;
                let lead = shown.lead();
                let (state, reason) = lead.map_or(("", ""), |r| (r.state, r.reason.as_str()));
                let reason: String = reason.chars().filter(|c| !c.is_control()).collect();
                let waiting = shown.leases_waiting;
                format!(": {pool} {state}{}{reason}; {waiting} waiting\n\n", if reason.is_empty() { "" } else { ", " })
            }
            // The pool is going; the request will say so.
            Err(_) => {
                tokio::time::sleep(REPEAT).await;
                ": waiting\n\n".to_owned()
            }
        };
        sender.send(Frame::data(Bytes::from(comment))).await?;
    }
}
