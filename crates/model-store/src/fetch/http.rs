//! Questions to servers: redirects are followed by hand, each held to the policy; tokens go to their own host alone.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use pool_domain::RemoteSource;
use pool_domain::download::Answer;
use pool_domain::model_policy::{ModelPolicy, is_loopback};
use pool_domain::model_ref::{HttpUrl, Origin};
use tokio::time::timeout;

use super::connect::Connector;
use super::secrets::Secret;
use super::{Limits, Secrets, Trouble};

/// Redirects in a row.
const HOPS: usize = 8;
/// No listing is larger.
const LISTING: usize = 32 * 1024 * 1024;
const AGENT: &str = concat!("pool-managerd/", env!("CARGO_PKG_VERSION"));

/// Asks servers.
#[derive(Debug)]
pub(crate) struct Http {
    pub(crate) policy: ModelPolicy,
    pub(crate) limits: Limits,
    pub(crate) secrets: Secrets,
    /// The region of buckets.
    pub(crate) s3_region: Option<String>,
    connector: Connector,
}

/// What is asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Question {
    pub(crate) headers: Vec<(HeaderName, String)>,
}

impl Question {
    pub(crate) fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl Http {
    pub(crate) fn new(
        policy: ModelPolicy,
        limits: Limits,
        secrets: Secrets,
        s3_region: Option<String>,
        ca_file: Option<PathBuf>,
    ) -> Self {
        Self { policy, limits, secrets, s3_region, connector: Connector::new(ca_file) }
    }

    /// Asks, following redirects. Any status but those is an answer.
    pub(crate) async fn get(
        &self,
        source: &RemoteSource,
        url: &HttpUrl,
        question: &Question,
    ) -> Result<Response<Incoming>, Trouble> {
        let (mut url, mut tokens) = (url.clone(), HashMap::new());
        for _ in 0..HOPS {
            self.policy.may_ask(source, &url)?;
            let token = match tokens.get(url.origin()) {
                Some(token) => Some(Secret::clone(token)),
                None => self.token(url.origin()).await?,
            };
            let request = request(&url, question, token.as_ref())?;
            let response = self.connector.ask(&self.policy, source, url.origin(), request, &self.limits).await?;
            let status = response.status().as_u16();
            if status == 401
                && let RemoteSource::Oci(oci) = source
                && !tokens.contains_key(url.origin())
                && let Some(challenge) = header_text(response.headers(), &header::WWW_AUTHENTICATE)
            {
                let granted = Box::pin(super::oci::token(self, source, oci, &challenge)).await?;
                tokens.insert(url.origin().clone(), granted);
                continue;
            }
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let host = &url.origin().host;
            let location = header_text(response.headers(), &header::LOCATION)
                .ok_or_else(|| Trouble::Never(format!("{host} redirects to nowhere")))?;
            let next = url.join(&location);
            url =
                next.map_err(|e| Trouble::Never(format!("{host} redirects to an address that cannot be used: {e}")))?;
        }
        Err(Trouble::Never(format!("it was redirected {HOPS} times, at last to {}", url.origin())))
    }

    /// A small answer, read whole; tried again for as long as that may help.
    pub(crate) async fn get_whole(
        &self,
        source: &RemoteSource,
        url: &HttpUrl,
        question: &Question,
    ) -> Result<(u16, HeaderMap, Bytes), Trouble> {
        let mut patience = self.limits.patience();
        loop {
            let (why, after) = match self.try_whole(source, url, question).await {
                Ok(answer @ (status, ..)) if !matches!(status, 408 | 425 | 429 | 500 | 502..=504) => return Ok(answer),
                Ok((status, headers, _)) => {
                    (format!("{} answers with status {status}", url.origin().host), retry_after(&headers))
                }
                Err(Trouble::Later(why, after)) => (why, after),
                Err(other) => return Err(other),
            };
            match patience.next(0, after, super::file::draw()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(Trouble::Later(why, after)),
            }
        }
    }

    async fn try_whole(
        &self,
        source: &RemoteSource,
        url: &HttpUrl,
        question: &Question,
    ) -> Result<(u16, HeaderMap, Bytes), Trouble> {
        let response = self.get(source, url, question).await?;
        let (parts, body) = response.into_parts();
        let host = &url.origin().host;
        let body = timeout(self.limits.stall, Limited::new(body, LISTING).collect())
            .await
            .map_err(|_| Trouble::later(format!("{host} does not finish its answer")))?
            .map_err(|e| Trouble::later(format!("{host} did not finish its answer: {e}")))?;
        Ok((parts.status.as_u16(), parts.headers, body.to_bytes()))
    }

    /// The token for an origin; never sent where others could read it on the way.
    async fn token(&self, origin: &Origin) -> Result<Option<Secret>, Trouble> {
        if !origin.secure && !is_loopback(&origin.host) || self.secrets.tokens.is_empty() {
            return Ok(None);
        }
        let (secrets, authority) = (self.secrets.clone(), origin.authority());
        let read = tokio::task::spawn_blocking(move || secrets.token(&authority)).await;
        read.map_err(|_| Trouble::later("a token was not read to the end"))?
    }
}

fn request(url: &HttpUrl, question: &Question, token: Option<&Secret>) -> Result<Request<Empty<Bytes>>, Trouble> {
    let target = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
    let mut request = Request::get(target)
        .header(header::HOST, url.origin().authority())
        .header(header::USER_AGENT, AGENT)
        .header(header::ACCEPT_ENCODING, "identity");
    for (name, value) in &question.headers {
        request = request.header(name, value);
    }
    if let Some(token) = token {
        let value = HeaderValue::try_from(format!("Bearer {}", token.reveal()));
        let mut value = value.map_err(|_| Trouble::Never("a token cannot be sent".into()))?;
        value.set_sensitive(true);
        request = request.header(header::AUTHORIZATION, value);
    }
    request.body(Empty::new()).map_err(|e| Trouble::Never(e.to_string()))
}

pub(crate) fn header_text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Only the form in seconds: a date would need the server's clock to be ours.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    header_text(headers, &header::RETRY_AFTER)?.trim().parse().ok().map(Duration::from_secs)
}

/// An answer as far as it decides anything.
pub(crate) fn answer(response: &Response<Incoming>) -> Answer {
    let headers = response.headers();
    let text = |name: &HeaderName| header_text(headers, name);
    // A weak ETag names something alike, not the same bytes.
    let etag = text(&header::ETAG).filter(|tag| tag.starts_with('"'));
    let encoding = text(&header::CONTENT_ENCODING);
    Answer {
        status: response.status().as_u16(),
        validator: etag.or_else(|| text(&header::LAST_MODIFIED)),
        length: text(&header::CONTENT_LENGTH).and_then(|length| length.parse().ok()),
        range: text(&header::CONTENT_RANGE).and_then(|range| content_range(&range)),
        encoded: encoding.is_some_and(|e| !e.eq_ignore_ascii_case("identity")),
        retry_after: retry_after(headers),
    }
}

/// `bytes 4-9/10`, `bytes 4-9/*`, `bytes */10`: the first byte and the bytes of the whole.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let total = (total != "*").then(|| total.parse().ok()).flatten();
    let first = range.split_once('-').map_or(Some(0), |(first, _)| first.parse().ok())?;
    Some((first, total))
}
