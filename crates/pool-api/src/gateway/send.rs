//! From a request that is complete to the head of the engine's answer.

use std::pin::Pin;
use std::task::{Context as Poller, Poll};
use std::time::Duration;

use axum::http::request::Parts;
use axum::http::uri::{Authority, PathAndQuery, Scheme};
use axum::http::{HeaderMap, Method, Request, Response, Uri, Version};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use pool_services::{ControlError, Route};
use tokio::time::Instant;

use super::relay::{Relay, Trip};
use super::{Ask, Context, Payload, Refusal, Way, engine_failed, headers};

/// How often a request is given another engine because nobody took the connection.
const TRIES: u32 = 3;
/// Until its end is noticed, slots of an engine that is gone are still given away.
const NOTICED: Duration = Duration::from_millis(50);

/// A body that is there as a whole.
#[derive(Debug, Clone, Default)]
pub(super) struct Whole {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Whole {
    fn of(payload: &Payload) -> Self {
        Self { data: Some(payload.data.clone()).filter(|d| !d.is_empty()), trailers: payload.trailers.clone() }
    }
}

impl Body for Whole {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Poller<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        let data = self.data.take().map(Frame::data);
        Poll::Ready(data.or_else(|| self.trailers.take().map(Frame::trailers)).map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let length = self.data.as_ref().map_or(0, Bytes::len) as u64;
        // With trailers it has to go out in chunks.
        if self.trailers.is_some() { SizeHint::default() } else { SizeHint::with_exact(length) }
    }
}

fn uri(endpoint: &str, path: &Uri) -> Option<Uri> {
    let authority: Authority = endpoint.strip_prefix("http://")?.parse().ok()?;
    let path = path.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    Uri::builder().scheme(Scheme::HTTP).authority(authority).path_and_query(path).build().ok()
}

async fn route(context: &Context, ask: &Ask, way: &Way) -> Result<Route, ControlError> {
    let left = ask.wait.saturating_sub(context.began.elapsed());
    match way {
        Way::Pool(pool) => context.gateway().routing.route(pool, left, &context.holder).await,
        Way::Lease(lease) => context.gateway().routing.follow(lease, &context.holder).await.map(|(_, route)| route),
    }
}

/// Takes a slot and sends the request there.
pub(super) async fn send(
    context: &std::sync::Arc<Context>,
    ask: &Ask,
    payload: &Payload,
    way: &Way,
    head: &Parts,
) -> Result<Response<Relay>, Refusal> {
    let mut tries = 1;
    loop {
        let asked = Instant::now();
        let route = route(context, ask, way).await.map_err(|e| context.refuse(e))?;
        let mut trip = Trip::begin(context, route, asked.elapsed());
        let uri = uri(&trip.route.endpoint, &head.uri)
            .ok_or_else(|| context.refuse(engine_failed("the engine has no address")))?;
        let mut request = Request::new(Whole::of(payload));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = headers::onward(&head.headers, &context.request, trip.route.api_key.as_ref());
        match context.gateway().client.request(request).await {
            Ok(response) => return Ok(Relay::answer(response, trip)),
            // Nothing was sent. Who held the address may be gone: its pool knows of another soon.
            Err(e) if e.is_connect() && tries < TRIES => {
                tracing::debug!(error = %e, pool_id = %trip.route.key.pool, "an engine takes no connection");
                trip.drop_untold();
                tries += 1;
                tokio::time::sleep(NOTICED).await;
            }
            Err(e) => {
                let detail = if e.is_connect() {
                    "the engine takes no connections"
                } else {
                    "the engine broke off before it answered"
                };
                trip.end("engine_failed");
                return Err(context.refuse(engine_failed(detail)));
            }
        }
    }
}
