//! Event streams of a daemon: read one event after the other.

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use pool_domain::PoolId;
use pool_services::ControlError;

use super::{HttpControl, segment};
use crate::dto::{EventView, Problem};

/// Longest event that is read.
const MAX_EVENT: usize = 1024 * 1024;
/// Most of a refusal that is read.
const MAX_REFUSAL: usize = 64 * 1024;

/// One event as it came.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SseEvent {
    /// Its name, for going on after it.
    pub id: Option<String>,
    /// Its kind; `message` where none is told.
    pub kind: String,
    /// Its data.
    pub data: String,
}

/// What to follow.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Follow {
    /// Go on with what comes.
    pub follow: bool,
    /// How much of the past comes first; unset is as the daemon has it.
    pub tail: Option<usize>,
    /// The last that is known.
    pub after: Option<String>,
}

/// A stream of events. It ends where the daemon ends it.
#[derive(Debug)]
pub struct SseStream {
    body: Incoming,
    parser: Parser,
    /// Whom to blame.
    control: HttpControl,
}

impl SseStream {
    /// The next event; nothing at the end.
    ///
    /// # Errors
    /// When the connection broke off.
    pub async fn next(&mut self) -> Result<Option<SseEvent>, ControlError> {
        loop {
            if let Some(event) = self.parser.next() {
                return Ok(Some(event));
            }
            if self.parser.pending() > MAX_EVENT {
                return Err(self.control.unreachable("sends an event that is too long, so it may be something else"));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.push(&data);
                    }
                }
                Some(Err(_)) => return Err(self.control.unreachable("broke off its answer")),
                None => return Ok(None),
            }
        }
    }
}

impl SseEvent {
    /// The event of the daemon that it is, unless it is something else, as `gap` is.
    #[must_use]
    pub fn view(&self) -> Option<EventView> {
        serde_json::from_str(&self.data).ok()
    }
}

#[derive(Debug, Default)]
struct Parser {
    bytes: Vec<u8>,
    event: SseEvent,
    any: bool,
}

impl Parser {
    fn push(&mut self, data: &[u8]) {
        self.bytes.extend_from_slice(data);
    }

    fn pending(&self) -> usize {
        self.bytes.len() + self.event.data.len()
    }

    /// The next whole event. Comments are passed over.
    fn next(&mut self) -> Option<SseEvent> {
        while let Some(end) = self.bytes.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if std::mem::take(&mut self.any) {
                    let kind = if event.kind.is_empty() { "message".to_owned() } else { event.kind };
                    return Some(SseEvent { kind, ..event });
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.event.id = Some(value.to_owned()),
                "event" => self.event.kind = value.to_owned(),
                "data" => {
                    if self.any {
                        self.event.data.push('\n');
                    }
                    self.event.data.push_str(value);
                    self.any = true;
                }
                _ => {}
            }
        }
        None
    }
}

impl HttpControl {
    /// What happens at the daemon.
    ///
    /// # Errors
    /// When it is out of reach or refuses.
    pub async fn events(&self, what: &Follow, pool: Option<&PoolId>) -> Result<SseStream, ControlError> {
        let pool = pool.map(|id| format!("&pool_id={id}")).unwrap_or_default();
        self.stream(&format!("/v1/events?follow={}{pool}", what.follow), what, "events").await
    }

    /// What an engine of a pool writes: of this replica (`r0`), else of the one that speaks for the pool.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn logs(&self, id: &PoolId, replica: Option<&str>, what: &Follow) -> Result<SseStream, ControlError> {
        let replica = replica.map(|r| format!("&replica={}", segment(r))).unwrap_or_default();
        self.stream(&format!("/v1/pools/{id}/logs?follow={}{replica}", what.follow), what, id.as_str()).await
    }

    async fn stream(&self, path: &str, what: &Follow, subject: &str) -> Result<SseStream, ControlError> {
        let tail = what.tail.map(|n| format!("&tail={n}")).unwrap_or_default();
        let mut request = Request::builder().method(Method::GET).uri(format!("{}{path}{tail}", self.base));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        if let Some(after) = &what.after {
            request = request.header("last-event-id", after);
        }
        let request = request
            .body(Full::<Bytes>::default())
            .map_err(|_| ControlError::Unreachable(format!("`{path}` is no path")))?;
        let asked = tokio::time::timeout(super::ANSWER, self.client.request(request)).await;
        let response = match asked {
            Ok(Ok(response)) => response,
            Ok(Err(e)) if e.is_connect() => return Err(self.unreachable("does not take connections")),
            Ok(Err(_)) => return Err(self.unreachable("broke the connection")),
            Err(_) => return Err(self.unreachable("does not answer")),
        };
        if response.status().is_success() {
            return Ok(SseStream { body: response.into_body(), parser: Parser::default(), control: self.clone() });
        }
        let status = response.status();
        let told = http_body_util::Limited::new(response.into_body(), MAX_REFUSAL).collect().await;
        let told = told.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        match serde_json::from_slice::<Problem>(&told) {
            Ok(problem) => Err(problem.into_control(subject)),
            Err(_) => Err(self.unreachable(&format!("answers {status} without a reason, so it may be something else"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_however_they_are_cut() {
        let text =
            ": hello\n\nid: e-1\nevent: started\ndata: {\"a\":\ndata: 1}\n\n:\n\ndata:x\r\n\r\nid: 2\n\ndata: cut";
        let whole = |kind: &str, id: Option<&str>, data: &str| SseEvent {
            id: id.map(str::to_owned),
            kind: kind.to_owned(),
            data: data.to_owned(),
        };
        let want = [whole("started", Some("e-1"), "{\"a\":\n1}"), whole("message", None, "x")];
        for size in [1, 2, 7, 1000] {
            let (mut parser, mut got) = (Parser::default(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                parser.push(piece);
                while let Some(event) = parser.next() {
                    got.push(event);
                }
            }
            assert_eq!(got, want, "{size}");
        }
    }
}
