//! `PoolControl` over HTTP. Embedded and remote are one switch.

mod connect;
mod sse;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use pool_domain::PoolId;
use pool_services::control::{Lease, LeaseRequest, PlacementRequest, PlanRequest};
use pool_services::{
    ControlError, Declared, DrainOptions, NodeSnapshot, Operation, Placed, PlanReport, PoolControl, PoolSnapshot,
    ReloadRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use connect::{Connector, Trust};
pub use sse::{Follow, SseEvent, SseStream};

use crate::dto::{
    self, CapabilitiesView, ConfigReloadView, DrainBody, EmptyBody, Keys, LeaseBody, LeaseView, NodeView,
    OperationView, PlacementBody, PlacementView, PlanBody, PlanView, PoolView, Problem, ReloadBody, RenewBody,
    SpecView,
};

/// Largest answer that is read.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// Longest time for an answer that waits for nothing.
const ANSWER: Duration = Duration::from_secs(30);

/// A text that is no address of a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{0}` is no address of a daemon: write http://HOST:PORT, unix:/PATH, or https://HOST:PORT with its authorities"
)]
pub struct BadBaseUrl(pub String);

/// A text that is no token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the token holds what no token holds")]
pub struct BadToken;

/// A daemon, reached over HTTP.
#[derive(Debug, Clone)]
pub struct HttpControl {
    base: String,
    client: Client<Connector, Full<Bytes>>,
    token: Option<HeaderValue>,
}

impl HttpControl {
    /// A daemon at `base_url`: `http://127.0.0.1:9200`, `unix:/run/pool-managerd.sock`, or `https://HOST:PORT` with
    /// [`Self::trusting`]. Nothing is connected yet.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn new(base_url: &str) -> Result<Self, BadBaseUrl> {
        Self::connecting(base_url, None)
    }

    /// The same, where the daemon proves itself with a certificate that one of these (PEM) stands for.
    ///
    /// # Errors
    /// When the address is none, or the text holds no certificate.
    pub fn trusting(base_url: &str, authorities: &[u8]) -> Result<Self, BadBaseUrl> {
        let trust = connect::trust(authorities).ok_or_else(|| BadBaseUrl("the file of authorities".into()))?;
        Self::connecting(base_url, Some(trust))
    }

    /// Shows this token with every request.
    ///
    /// # Errors
    /// When it is none: it goes into a header.
    pub fn with_token(mut self, token: &str) -> Result<Self, BadToken> {
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| BadToken)?;
        value.set_sensitive(true);
        self.token = Some(value);
        Ok(self)
    }

    fn connecting(base_url: &str, trust: Option<Trust>) -> Result<Self, BadBaseUrl> {
        let bad = || BadBaseUrl(base_url.to_owned());
        if let Some(path) = base_url.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(bad());
            }
            let connector = Connector::Unix(path.into());
            return Ok(Self::over(connector, "http://localhost"));
        }
        let base = base_url.trim_end_matches('/');
        let uri: Uri = base.parse().map_err(|_| bad())?;
        let plain = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let named = uri.authority().is_some_and(|a| !a.as_str().contains('@') && !a.host().is_empty());
        let connector = match (uri.scheme_str(), trust) {
            (Some("http"), _) => Connector::tcp(),
            (Some("https"), Some(trust)) => Connector::tls(trust),
            _ => return Err(bad()),
        };
        if !plain || !named {
            return Err(bad());
        }
        Ok(Self::over(connector, base))
    }

    fn over(connector: Connector, base: &str) -> Self {
        Self { base: base.to_owned(), client: Client::builder(TokioExecutor::new()).build(connector), token: None }
    }

    fn unreachable(&self, why: &str) -> ControlError {
        ControlError::Unreachable(format!(
            "the daemon at {} {why}: is `pool-managerd serve` running, and is --server right?",
            self.base
        ))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        if_match: Option<u64>,
        wait: Duration,
    ) -> Result<(StatusCode, Bytes), ControlError> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, token);
        }
        if let Some(revision) = if_match {
            request = request.header(header::IF_MATCH, format!("\"{revision}\""));
        }
        let request = request
            .body(Full::from(body.unwrap_or_default()))
            .map_err(|_| ControlError::Unreachable(format!("`{path}` is no path")))?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|e| {
                self.unreachable(if e.is_connect() { "does not take connections" } else { "broke the connection" })
            })?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(|_| self.unreachable("broke off its answer"))?.to_bytes()))
        };
        tokio::time::timeout(ANSWER.saturating_add(wait), exchange)
            .await
            .unwrap_or_else(|_| Err(self.unreachable("does not answer")))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        wait: Duration,
        subject: &str,
    ) -> Result<Bytes, ControlError> {
        self.exchange_if(None, method, path, body, wait, subject).await
    }

    async fn exchange_if(
        &self,
        if_match: Option<u64>,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        wait: Duration,
        subject: &str,
    ) -> Result<Bytes, ControlError> {
        let (status, bytes) = self.send(method, path, body, if_match, wait).await?;
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<Problem>(&bytes) {
            Ok(problem) => Err(problem.into_control(subject)),
            Err(_) => Err(self.unreachable(&format!("answers {status} without a reason, so it may be something else"))),
        }
    }

    fn read<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, ControlError> {
        serde_json::from_slice(bytes)
            .map_err(|_| self.unreachable("answers what this version does not understand, so it may be something else"))
    }

    fn convert<V, T>(&self, view: V) -> Result<T, ControlError>
    where
        T: TryFrom<V, Error = crate::dto::DtoError>,
    {
        T::try_from(view).map_err(|e| self.unreachable(&format!("answers what this version does not understand ({e})")))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, wait: Duration, subject: &str) -> Result<T, ControlError> {
        let bytes = self.exchange(Method::GET, path, None, wait, subject).await?;
        self.read(&bytes)
    }

    async fn post(&self, path: &str, body: &impl Serialize, subject: &str) -> Result<Bytes, ControlError> {
        self.post_and_wait(path, body, Duration::ZERO, subject).await
    }

    async fn post_and_wait(
        &self,
        path: &str,
        body: &impl Serialize,
        wait: Duration,
        subject: &str,
    ) -> Result<Bytes, ControlError> {
        let body = serde_json::to_vec(body).map_err(|e| ControlError::Unreachable(e.to_string()))?;
        self.exchange(Method::POST, path, Some(body), wait, subject).await
    }

    async fn verb(&self, id: &PoolId, verb: &str, body: &impl Serialize) -> Result<Operation, ControlError> {
        let bytes = self.post(&format!("/v1/pools/{id}/{verb}"), body, id.as_str()).await?;
        self.convert(self.read::<OperationView>(&bytes)?)
    }

    async fn change(
        &self,
        id: &PoolId,
        if_match: Option<u64>,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Operation, ControlError> {
        let bytes = self.exchange_if(if_match, method, path, body, Duration::ZERO, id.as_str()).await?;
        self.convert(self.read::<OperationView>(&bytes)?)
    }

    /// Gives a pool another form by a body as it goes over the wire.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn reload_by(
        &self,
        id: &PoolId,
        body: &ReloadBody,
        if_match: Option<u64>,
    ) -> Result<Operation, ControlError> {
        let body = serde_json::to_vec(body).map_err(|e| ControlError::Unreachable(e.to_string()))?;
        self.change(id, if_match, Method::POST, &format!("/v1/pools/{id}/reload"), Some(body)).await
    }

    /// Has the daemon read its config file again.
    ///
    /// # Errors
    /// When the daemon is out of reach or the file cannot be.
    pub async fn reload_config(&self) -> Result<ConfigReloadView, ControlError> {
        let bytes = self.post("/v1/config/reload", &EmptyBody {}, "config").await?;
        self.read(&bytes)
    }

    /// The node as it came over the wire.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn node_view(&self) -> Result<NodeView, ControlError> {
        self.get("/v1/node", Duration::ZERO, "node").await
    }

    /// What the node can do, as it came over the wire.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn capabilities(&self) -> Result<CapabilitiesView, ControlError> {
        self.get("/v1/capabilities", Duration::ZERO, "capabilities").await
    }

    /// The pools as they came over the wire.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn pool_views(&self) -> Result<Vec<PoolView>, ControlError> {
        self.get("/v1/pools", Duration::ZERO, "pools").await
    }

    /// One pool as it came over the wire.
    ///
    /// # Errors
    /// When the daemon is out of reach or refuses.
    pub async fn pool_view(&self, id: &PoolId) -> Result<PoolView, ControlError> {
        self.get(&format!("/v1/pools/{id}"), Duration::ZERO, id.as_str()).await
    }
}

/// An id as one path segment.
fn segment(id: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(id.len());
    for (i, b) in id.bytes().enumerate() {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_') || (b == b'.' && i > 0 && !id.starts_with('.')) {
            out.push(char::from(b));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[async_trait]
impl PoolControl for HttpControl {
    async fn node(&self) -> Result<NodeSnapshot, ControlError> {
        self.convert(self.node_view().await?)
    }

    async fn pools(&self) -> Result<Vec<PoolSnapshot>, ControlError> {
        self.pool_views().await?.into_iter().map(|p| self.convert(p)).collect()
    }

    async fn pool(&self, id: &PoolId) -> Result<PoolSnapshot, ControlError> {
        self.convert(self.pool_view(id).await?)
    }

    async fn wait_pool(&self, id: &PoolId, after: u64, wait: Duration) -> Result<PoolSnapshot, ControlError> {
        let path = format!("/v1/pools/{id}?wait_for_snapshot={after}&wait_ms={}", millis(wait));
        let view: PoolView = self.get(&path, wait, id.as_str()).await?;
        self.convert(view)
    }

    async fn preload(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.verb(id, "preload", &EmptyBody {}).await
    }

    async fn drain(&self, id: &PoolId, options: DrainOptions) -> Result<Operation, ControlError> {
        let body =
            DrainBody { deadline_ms: options.deadline.map(millis), on_deadline: options.on_deadline.map(Into::into) };
        self.verb(id, "drain", &body).await
    }

    async fn resume(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.verb(id, "resume", &EmptyBody {}).await
    }

    async fn stop(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.verb(id, "stop", &EmptyBody {}).await
    }

    async fn declare(&self, declared: Declared, if_match: Option<u64>) -> Result<Operation, ControlError> {
        let id = &declared.spec.id;
        let body = Some(declared.document.into_bytes());
        self.change(id, if_match, Method::PUT, &format!("/v1/pools/{id}"), body).await
    }

    async fn remove(&self, id: &PoolId, if_match: Option<u64>) -> Result<Operation, ControlError> {
        self.change(id, if_match, Method::DELETE, &format!("/v1/pools/{id}"), None).await
    }

    async fn reload(&self, id: &PoolId, request: ReloadRequest) -> Result<Operation, ControlError> {
        let (mut changes, mut if_match) = (Keys::new(), request.if_match);
        if let Some((_, document)) = &request.declared {
            let unread = |_| self.unreachable("declares pools in a way that this version does not understand");
            let (revision, current) = self.document(id).await?;
            changes = dto::patch(&dto::keys(&current).map_err(unread)?, &dto::keys(document).map_err(unread)?);
            if_match = if_match.or(Some(revision));
        }
        let body = ReloadBody {
            deadline_ms: request.deadline.map(millis),
            on_deadline: request.on_deadline.map(Into::into),
            strategy: request.strategy.map(Into::into),
            keys: changes,
            ..ReloadBody::default()
        };
        self.reload_by(id, &body, if_match).await
    }

    async fn rollback(&self, id: &PoolId) -> Result<Operation, ControlError> {
        self.verb(id, "rollback", &EmptyBody {}).await
    }

    async fn document(&self, id: &PoolId) -> Result<(u64, String), ControlError> {
        let view: SpecView = self.get(&format!("/v1/pools/{id}/spec"), Duration::ZERO, id.as_str()).await?;
        Ok((view.revision, view.pool.to_string()))
    }

    async fn reset_breaker(&self, id: &PoolId) -> Result<(), ControlError> {
        self.post(&format!("/v1/pools/{id}/breaker/reset"), &EmptyBody {}, id.as_str()).await.map(drop)
    }

    async fn unfence(&self, device: &str) -> Result<(), ControlError> {
        self.post(&format!("/v1/devices/{}/unfence", segment(device)), &EmptyBody {}, device).await.map(drop)
    }

    async fn operations(&self) -> Result<Vec<Operation>, ControlError> {
        let views: Vec<OperationView> = self.get("/v1/operations", Duration::ZERO, "operations").await?;
        views.into_iter().map(|o| self.convert(o)).collect()
    }

    async fn operation(&self, id: &str) -> Result<Operation, ControlError> {
        let view: OperationView = self.get(&format!("/v1/operations/{}", segment(id)), Duration::ZERO, id).await?;
        self.convert(view)
    }

    async fn wait_operation(&self, id: &str, wait: Duration) -> Result<Operation, ControlError> {
        let path = format!("/v1/operations/{}?wait_ms={}", segment(id), millis(wait));
        let view: OperationView = self.get(&path, wait, id).await?;
        self.convert(view)
    }

    async fn lease(&self, id: &PoolId, request: LeaseRequest) -> Result<Lease, ControlError> {
        let wait = request.wait;
        let (path, body) = (format!("/v1/pools/{id}/leases"), LeaseBody::from(request));
        let bytes = self.post_and_wait(&path, &body, wait, id.as_str()).await?;
        self.convert(self.read::<LeaseView>(&bytes)?)
    }

    /// The daemon knows from the token whose it is.
    async fn renew_for(
        &self,
        lease_id: &str,
        ttl: Option<Duration>,
        _: pool_domain::Holder,
    ) -> Result<Lease, ControlError> {
        let (path, body) = (format!("/v1/leases/{}/renew", segment(lease_id)), RenewBody { ttl_ms: ttl.map(millis) });
        let bytes = self.post(&path, &body, lease_id).await?;
        self.convert(self.read::<LeaseView>(&bytes)?)
    }

    async fn leases(&self) -> Result<Vec<Lease>, ControlError> {
        let views: Vec<LeaseView> = self.get("/v1/leases", Duration::ZERO, "leases").await?;
        views.into_iter().map(|l| self.convert(l)).collect()
    }

    async fn plan(&self, what: PlanRequest) -> Result<PlanReport, ControlError> {
        let subject = match &what {
            PlanRequest::Pool(id) => id.to_string(),
            PlanRequest::Spec(spec) => spec.id.to_string(),
        };
        let bytes = self.post("/v1/plan", &PlanBody::from(what), &subject).await?;
        Ok(self.read::<PlanView>(&bytes)?.into())
    }

    async fn placements(&self, request: PlacementRequest) -> Result<Vec<Placed>, ControlError> {
        let bytes = self.post("/v1/placements", &PlacementBody::from(request), "placements").await?;
        self.read::<Vec<PlacementView>>(&bytes)?.into_iter().map(|p| self.convert(p)).collect()
    }

    async fn release(&self, lease_id: &str) -> Result<(), ControlError> {
        let path = format!("/v1/leases/{}", segment(lease_id));
        self.exchange(Method::DELETE, &path, None, Duration::ZERO, lease_id).await.map(drop)
    }
}
