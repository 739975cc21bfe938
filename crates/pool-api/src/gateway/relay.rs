//! The answer's body on its way from the engine to the client, and what is noted of it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Poller, Poll, ready};
use std::time::Duration;

use axum::http::{HeaderMap, Response, header};
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use pool_services::{EventKind, Route};

use super::usage::{Ear, Usage};
use super::{Context, engine_failed, headers};

/// One request on its way: holds the slot, and tells at the end how it went, also when it is dropped.
#[derive(Debug)]
pub(super) struct Trip {
    context: Arc<Context>,
    pub(super) route: Route,
    waited: Duration,
    first_byte: Option<Duration>,
    /// From the request to the first part of the answer, where it streams.
    first_token: Option<Duration>,
    bytes: u64,
    streams: bool,
    /// Listens for tokens; not to what it cannot read.
    ear: Option<Ear>,
    told: bool,
}

impl Trip {
    pub(super) fn begin(context: &Arc<Context>, route: Route, waited: Duration) -> Self {
        let (context, now) = (Arc::clone(context), None);
        Self {
            context,
            route,
            waited,
            first_byte: now,
            first_token: None,
            bytes: 0,
            streams: false,
            ear: None,
            told: false,
        }
    }

    fn answered(&mut self, streams: bool) {
        self.first_byte = Some(self.context.began.elapsed());
        self.streams = streams;
        self.route.flow.moved();
        if streams {
            let (request, holder) = (Arc::clone(&self.context.request), self.context.holder.clone());
            self.tell(EventKind::StreamStarted { request, holder });
        }
    }

    fn moved(&mut self, part: &[u8]) {
        self.bytes += part.len() as u64;
        self.route.flow.moved();
        if self.ear.as_mut().is_some_and(|ear| ear.hear(part)) && self.streams {
            let took = self.context.began.elapsed();
            self.first_token = Some(took);
            self.route.flow.began(took.saturating_sub(self.waited));
        }
    }

    /// What it says of tokens; the engine's speed is learnt from it.
    fn usage(&self) -> Usage {
        let usage = self.ear.as_ref().map(|ear| ear.usage(self.streams)).unwrap_or_default();
        if let (Some(took), Some(after_first)) =
            (usage.decode.filter(|d| !d.is_zero()), usage.tokens_out.and_then(|n| n.checked_sub(1)))
        {
            self.route.flow.decoded(took, after_first);
        }
        usage
    }

    fn tell(&self, kind: EventKind) {
        self.context.gateway().routing.tell(&self.route.key, self.route.generation, kind);
    }

    /// It is over; its slot is free. Only the first word counts.
    pub(super) fn end(&mut self, outcome: &'static str) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        self.route.slot = None;
        let (context, took) = (&self.context, self.context.began.elapsed());
        let Usage { tokens_in, tokens_out, decode } = self.usage();
        let trip = crate::metrics::GatewayTrip {
            waited: self.waited,
            first_byte: self.first_byte,
            first_token: self.first_token,
            bytes: self.bytes,
            tokens_in,
            tokens_out,
            decode,
            took,
        };
        context.metrics().gateway_trip(&self.route.key.pool, context.tenant(), outcome, &trip);
        if self.streams {
            let (request, holder) = (Arc::clone(&context.request), context.holder.clone());
            let first_byte = self.first_byte.unwrap_or(took);
            let bytes = self.bytes;
            self.tell(EventKind::StreamEnded {
                request,
                holder,
                outcome,
                took,
                first_byte,
                bytes,
                tokens_in,
                tokens_out,
                decode,
            });
        }
    }

    /// It did not come to anything, and another one is tried.
    pub(super) fn drop_untold(mut self) {
        self.told = true;
    }
}

impl Drop for Trip {
    fn drop(&mut self) {
        self.end("cancelled");
    }
}

/// The body of the answer.
#[derive(Debug)]
pub(super) struct Relay {
    inner: Incoming,
    trip: Trip,
    /// An event of ours can be added to it.
    events: bool,
    broken: bool,
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    kind.get(..17).is_some_and(|k| k.eq_ignore_ascii_case("text/event-stream"))
}

impl Relay {
    /// The engine's answer as it goes on to the client.
    pub(super) fn answer(response: Response<Incoming>, mut trip: Trip) -> Response<Self> {
        let (mut head, inner) = response.into_parts();
        headers::strip(&mut head.headers);
        let streams = is_event_stream(&head.headers);
        trip.answered(streams);
        let plain = !head.headers.contains_key(header::CONTENT_ENCODING);
        trip.ear = (plain && head.status.is_success()).then(Ear::default);
        let open = plain && !head.headers.contains_key(header::CONTENT_LENGTH);
        if inner.is_end_stream() {
            trip.end("done");
        }
        Response::from_parts(head, Self { inner, trip, events: streams && open, broken: false })
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if self.broken {
            return Poll::Ready(None);
        }
        match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
            Some(Ok(frame)) => {
                self.trip.moved(frame.data_ref().map_or(&[], |data| data));
                if self.inner.is_end_stream() {
                    self.trip.end("done");
                }
                Poll::Ready(Some(Ok(frame)))
            }
            None => {
                self.trip.end("done");
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                self.broken = true;
                self.trip.end("engine_failed");
                if !self.events {
                    return Poll::Ready(Some(Err(error)));
                }
                let problem = engine_failed("the engine broke off in the middle of its answer");
                Poll::Ready(Some(Ok(Frame::data(self.trip.context.dialect.event(&problem)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.broken || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.events { SizeHint::default() } else { self.inner.size_hint() }
    }
}
