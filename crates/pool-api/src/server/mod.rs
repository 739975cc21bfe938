//! The router: handlers over a `PoolControl`, behind a guard that looks at Host and Origin of every request.

mod auth;
mod extract;
mod feed;
mod guard;
mod handlers;
mod health;
mod leases;
mod listen;
mod openapi;
mod overview;
mod pages;
mod seal;
mod specs;
mod streams;
pub mod tls;

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use pool_domain::Holder;
use pool_services::{Lease, PoolControl};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::dto::{Code, EngineView, LeaseView, Problem};
use crate::gateway::{self, Gateway};
use crate::metrics::Metrics;
use crate::spec::Defaults;

pub use auth::{Access, Caller, MIN_TOKEN, Scope, Tokens, TokensError};
pub use feed::{Feed, History};
pub use listen::{Door, serve};
pub use openapi::openapi_json;
pub use seal::SealKey;
pub use specs::Reconfigure;
pub use streams::{LogPart, Logs};

/// Largest body that is read.
pub const MAX_BODY: usize = 64 * 1024;
/// Longest wait that a request can ask for.
pub const MAX_WAIT: std::time::Duration = std::time::Duration::from_secs(600);

/// What the router knows of the node by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeInfo {
    /// Version of the daemon.
    pub version: String,
    /// `home` or `cloud`.
    pub profile: String,
    /// Further Host names that are allowed: `name` with any port, or `name:port`.
    pub hosts: Vec<String>,
    /// Origins that are allowed: `https://name[:port]`.
    pub origins: Vec<String>,
    /// What pools get when they do not say.
    pub defaults: Defaults,
    /// Engines that pools may name.
    pub engines: Vec<EngineView>,
}

/// How far the daemon itself is. Both flags start false.
#[derive(Debug, Default)]
pub struct Flags {
    started: AtomicBool,
    accepting: AtomicBool,
}

impl Flags {
    /// The start is over.
    pub fn set_started(&self) {
        self.started.store(true, Ordering::Release);
    }
    /// Whether commands are taken.
    pub fn set_accepting(&self, yes: bool) {
        self.accepting.store(yes, Ordering::Release);
    }
    /// Whether the start is over.
    #[must_use]
    pub fn started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }
    /// Whether commands are taken.
    #[must_use]
    pub fn accepting(&self) -> bool {
        self.accepting.load(Ordering::Acquire)
    }
}

/// What handlers work on.
#[derive(Debug)]
pub struct AppState {
    /// The verbs.
    pub control: Arc<dyn PoolControl>,
    /// The node.
    pub info: NodeInfo,
    /// The config file, where there is one.
    pub config: Option<Arc<dyn Reconfigure>>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How far the daemon is.
    pub flags: Arc<Flags>,
    /// The way to engines.
    pub gateway: Gateway,
    /// Who may do what.
    pub access: Access,
    /// What the names of leases are sealed with; without it anybody who may lease can bring one back.
    pub seal: Option<SealKey>,
    /// What happens.
    pub feed: Feed,
    /// What engines write.
    pub logs: Arc<dyn Logs>,
    /// Ends what would go on for ever.
    pub closing: CancellationToken,
}

impl AppState {
    /// A tenant as metrics show it: only those that tokens are of, so that nobody makes up labels.
    pub(crate) fn tenant_label<'a>(&self, tenant: Option<&'a str>) -> &'a str {
        let Some(tenant) = tenant else { return "" };
        match &self.access {
            Access::Tokens(tokens) if tokens.borrow().tenants().any(|t| t == tenant) => tenant,
            _ => "other",
        }
    }

    /// Tenants that tokens are of.
    fn tenants(&self) -> Vec<Arc<str>> {
        match &self.access {
            Access::Tokens(tokens) => tokens.borrow().tenants().map(Arc::from).collect(),
            Access::Open => Vec::new(),
        }
    }

    /// A lease as it is told to who asks: its name has a seal, by which it is known again after a restart.
    pub(crate) fn shown_lease(&self, caller: &Caller, lease: &Lease) -> LeaseView {
        let mut view = LeaseView::from(lease);
        if let Some(key) = &self.seal {
            let of_a_token = lease.holder.tenant_id.as_ref().filter(|t| self.tenants().contains(t));
            view.lease_id = key.sealed(&lease.id, of_a_token.or(caller.tenant.as_ref()).map(|t| &**t));
        }
        view
    }

    /// The lease that a request names, and for whom it goes on should the daemon not know of it. One that the caller may
    /// not use is as if it was not there, and so is one whose name somebody made up.
    pub(crate) async fn own_lease(&self, caller: &Caller, text: &str) -> Result<(String, Holder), Problem> {
        let unknown = || pool_services::ControlError::LeaseNotFound(text.to_owned()).into();
        let (name, seal) = seal::split(text);
        let tenants = self.tenants();
        let owner = self.seal.as_ref().zip(seal).and_then(|(key, seal)| match caller.kept_to() {
            Some(own) => key.owner((name, seal), [Some(own)]),
            None => key.owner((name, seal), std::iter::once(None).chain(tenants.iter().map(Some))),
        });
        if owner.is_none() && self.seal.is_some() && !caller.may_all() {
            return Err(unknown());
        }
        if let Some(tenant) = caller.kept_to() {
            let all = self.control.leases().await?;
            if all.iter().any(|l| l.id == name && l.holder.tenant_id.as_ref() != Some(tenant)) {
                return Err(unknown());
            }
        }
        Ok((name.to_owned(), Holder { tenant_id: owner.flatten(), ..Holder::default() }))
    }
}

/// How a request came; an extension of each. Without it, nothing is known of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Over TCP to this address, whose literal form is an allowed Host.
    Tcp(Option<SocketAddr>),
    /// Over the socket of the daemon's own user.
    Unix,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        let mut response = (status, [kind], body).into_response();
        self.retry_after(&mut response);
        response
    }
}

impl Problem {
    /// Says when it is worth asking again, where it is.
    pub(crate) fn retry_after(&self, response: &mut Response) {
        if let Some(ms) = self.retry_after_ms.filter(|_| self.retriable) {
            // Whole seconds on the wire, never early, never zero.
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000).max(1)));
        }
    }
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    // The panic hook has told the log; the answer carries nothing of it.
    Problem::new(Code::Internal, "the request met a bug").with_hint("the daemon's log has the details").into_response()
}

async fn no_route(uri: Uri) -> Problem {
    Problem::new(Code::NotFound, format!("there is no `{}`", uri.path()))
        .with_hint("GET /openapi.json lists the routes")
}

async fn no_method() -> Problem {
    Problem::new(Code::MethodNotAllowed, "this path does not take this method")
        .with_hint("the Allow header lists those it takes")
}

fn gateway_routes() -> Router<Arc<AppState>> {
    gateway::PATHS.iter().fold(Router::new(), |router, (path, _)| router.route(path, post(gateway::handle)))
}

/// Only what probes ask, for a way in of their own that stays free while the API is flooded.
pub fn probes(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), guard::check))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}

/// The whole API. Every route, also the unknown ones, is behind the guard.
pub fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/startupz", get(health::startupz))
        .route("/v2/health/live", get(health::livez))
        .route("/v2/health/ready", get(health::readyz))
        .route("/v2/models/{id}/ready", get(health::model_ready))
        .route("/v1/node", get(handlers::node))
        .route("/v1/pools", get(handlers::pools))
        .route("/v1/pools/{id}", get(handlers::pool).put(specs::put_pool).delete(specs::delete_pool))
        .route("/v1/pools/{id}/spec", get(specs::spec))
        .route("/v1/pools/{id}/reload", post(specs::reload))
        .route("/v1/pools/{id}/rollback", post(specs::rollback))
        .route("/v1/config/reload", post(specs::reload_config))
        .route("/v1/plan", post(handlers::plan))
        .route("/v1/placements", post(handlers::placements))
        .route("/v1/pools/{id}/health", get(handlers::pool_health))
        .route("/v1/pools/{id}/preload", post(handlers::preload))
        .route("/v1/pools/{id}/drain", post(handlers::drain))
        .route("/v1/pools/{id}/resume", post(handlers::resume))
        .route("/v1/pools/{id}/stop", post(handlers::stop))
        .route("/v1/pools/{id}/breaker/reset", post(handlers::reset_breaker))
        .route("/v1/devices/{uuid}/unfence", post(handlers::unfence))
        .route("/v1/pools/{id}/leases", post(leases::lease))
        .route("/v1/leases", get(leases::leases))
        .route("/v1/leases/{id}", delete(leases::release))
        .route("/v1/leases/{id}/renew", post(leases::renew))
        .route("/v1/operations", get(handlers::operations))
        .route("/v1/operations/{id}", get(handlers::operation))
        .route("/metrics", get(handlers::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/models", get(gateway::models))
        .route("/v1/capabilities", get(overview::capabilities))
        .route("/v1/autoscale", get(overview::autoscale))
        .route("/v1/sd/prometheus", get(overview::prometheus))
        .route("/v1/events", get(streams::events))
        .route("/v1/pools/{id}/logs", get(streams::logs))
        .merge(gateway_routes())
        .merge(pages::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), auth::check))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), guard::check))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}
