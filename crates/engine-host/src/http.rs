//! One HTTP exchange on a connection of its own: an engine that took over a port must not be asked over the connection
//! of the one before. Redirects are not followed.

use std::error::Error as _;
use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use pool_services::ports::Endpoint;
use serde_json::Value;
use tokio::net::TcpStream;

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The body, if it is JSON.
    pub(crate) json: Option<Value>,
    /// The body, whatever it is.
    pub(crate) text: String,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum NoAnswer {
    /// Nobody listens.
    Refused,
    /// Not within the time.
    TimedOut(Duration),
    /// More than may be.
    TooLong,
    /// The connection failed, or what came is no HTTP.
    Broken(String),
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("the connection was refused"),
            Self::TimedOut(limit) => write!(f, "no answer within {} ms", limit.as_millis()),
            Self::TooLong => f.write_str("the answer is too long"),
            Self::Broken(why) => f.write_str(why),
        }
    }
}

/// What to ask.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) of: &'a Endpoint,
    pub(crate) path: &'a str,
    /// `Some` makes it a POST.
    pub(crate) body: Option<Value>,
    /// For all of it, from connect to the last byte.
    pub(crate) timeout: Duration,
    /// The most bytes of the answer's body.
    pub(crate) limit: usize,
}

impl Ask<'_> {
    pub(crate) async fn send(self) -> Result<Answer, NoAnswer> {
        let timeout = self.timeout;
        tokio::time::timeout(timeout, self.exchange()).await.unwrap_or(Err(NoAnswer::TimedOut(timeout)))
    }

    async fn exchange(self) -> Result<Answer, NoAnswer> {
        let addr = self.of.addr;
        let stream = TcpStream::connect(addr).await.map_err(|error| from_io(&error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let method = if self.body.is_some() { Method::POST } else { Method::GET };
        let body = self.body.map(|json| Bytes::from(json.to_string())).unwrap_or_default();
        let mut request = Request::builder()
            .method(method)
            .uri(self.path)
            .header(HOST, addr.to_string())
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "close");
        if let Some(key) = &self.of.api_key {
            request = request.header(AUTHORIZATION, key.bearer());
        }
        let request = request.body(Full::new(body)).map_err(|error| NoAnswer::Broken(error.to_string()))?;
        let limit = self.limit;
        let answer = async move {
            let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), limit).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() { NoAnswer::TooLong } else { NoAnswer::Broken(error.to_string()) }
            })?;
            let body = body.to_bytes();
            let text = String::from_utf8_lossy(&body).into_owned();
            Ok(Answer { status, json: serde_json::from_slice(&body).ok(), text })
        };
        tokio::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            // The connection may end with the answer still to be taken from it.
            _ended = connection => answer.await,
        }
    }
}

fn from_io(error: &io::Error) -> NoAnswer {
    match error.kind() {
        ErrorKind::ConnectionRefused => NoAnswer::Refused,
        _ => NoAnswer::Broken(error.to_string()),
    }
}

fn broken(error: &hyper::Error) -> NoAnswer {
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(error) => from_io(error),
        None => NoAnswer::Broken(error.to_string()),
    }
}
