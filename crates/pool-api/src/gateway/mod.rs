//! The gateway: requests in the words of OpenAI and Anthropic, sent on to an engine that serves their model and answered
//! with what it says, byte for byte. A slot is held as long as the answer flows.

#![allow(clippy::result_large_err, reason = "errors that become answers at once")]

mod ask;
pub(crate) mod docs;
mod headers;
mod models;
mod progress;
mod refusal;
mod relay;
mod send;
mod usage;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use pool_domain::{Holder, PoolId};
use pool_services::Routing;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::dto::{Code, Problem};
use crate::metrics::Metrics;
use crate::server::{AppState, Caller};

use ask::{Ask, Payload};
pub use headers::{LEASE, PROGRESS, REQUEST_ID, WAIT};
pub(crate) use models::{__path_models, models};
pub(crate) use refusal::Dialect;
use refusal::Refusal;
use send::Whole;

/// Largest body of a request.
pub const MAX_BODY: usize = 32 * 1024 * 1024;
/// What the bodies that are read at the same moment may take together, in units of [`UNIT`].
const ROOM: usize = 16 * MAX_BODY / UNIT;
const UNIT: usize = 1024;
/// How long a connection to an engine is kept for the next request: less than any engine keeps it, so that none is sent
/// into a connection that is being closed.
const KEPT: Duration = Duration::from_secs(3);
/// Engines are on this machine or beside it.
const CONNECT: Duration = Duration::from_secs(5);

/// The paths it serves, and what the answers to failures look like there.
pub(crate) const PATHS: &[(&str, Dialect)] = &[
    ("/v1/chat/completions", Dialect::OpenAi),
    ("/v1/completions", Dialect::OpenAi),
    ("/v1/embeddings", Dialect::OpenAi),
    ("/v1/responses", Dialect::OpenAi),
    ("/v1/messages", Dialect::Anthropic),
    ("/v1/rerank", Dialect::OpenAi),
];

/// Sends requests on to engines.
#[derive(Debug)]
pub struct Gateway {
    routing: Arc<dyn Routing>,
    client: Client<HttpConnector, Whole>,
    /// How long a request waits for a slot unless it says so itself.
    wait: Duration,
    room: Arc<Semaphore>,
    /// What the names of requests begin with, so that those of two daemons differ.
    prefix: u32,
    named: AtomicU64,
}

impl Gateway {
    /// One whose requests wait at most `wait` for a slot unless they say otherwise.
    #[must_use]
    pub fn new(routing: Arc<dyn Routing>, wait: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT)
            .build(connector);
        let prefix = (RandomState::new().hash_one(std::process::id()) >> 32) as u32;
        let (room, named) = (Arc::new(Semaphore::new(ROOM)), AtomicU64::new(0));
        Self { routing, client, wait, room, prefix, named }
    }

    /// The name of a request: the client's if it gave a decent one.
    fn name(&self, given: Option<&HeaderValue>) -> Arc<str> {
        let decent = |v: &HeaderValue| {
            let text = v.to_str().ok()?;
            ((1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())).then(|| Arc::from(text))
        };
        given.and_then(decent).unwrap_or_else(|| {
            let n = self.named.fetch_add(1, Ordering::Relaxed);
            format!("req-{:08x}-{n:x}", self.prefix).into()
        })
    }
}

/// What is known of a request once it has a name.
#[derive(Debug)]
struct Context {
    state: Arc<AppState>,
    request: Arc<str>,
    dialect: Dialect,
    holder: Holder,
    began: Instant,
}

impl Context {
    fn gateway(&self) -> &Gateway {
        &self.state.gateway
    }

    fn metrics(&self) -> &Metrics {
        &self.state.metrics
    }

    fn refuse(&self, problem: impl Into<Problem>) -> Refusal {
        Refusal { problem: problem.into(), dialect: self.dialect }
    }

    /// The tenant as metrics show it.
    fn tenant(&self) -> &str {
        self.state.tenant_label(self.holder.tenant_id.as_deref())
    }
}

/// One request, from its head to the answer's head; the answer's body goes on by itself.
pub(crate) async fn handle(State(state): State<Arc<AppState>>, request: Request) -> Response {
    let began = Instant::now();
    let dialect = Dialect::of(request.uri().path()).unwrap_or(Dialect::OpenAi);
    let name = state.gateway.name(request.headers().get(&REQUEST_ID));
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let holder = Holder { tenant_id: caller.tenant.clone(), ..Holder::default() };
    let context = Arc::new(Context { state, request: Arc::clone(&name), dialect, holder, began });
    let mut response = match serve(&context, &caller, request).await {
        Ok(response) => response,
        Err(refusal) => {
            context.metrics().gateway_refused(&refusal.problem.code, context.tenant());
            refusal.into_response()
        }
    };
    if let Ok(value) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn serve(context: &Arc<Context>, caller: &Caller, request: Request) -> Result<Response, Refusal> {
    let (head, body) = request.into_parts();
    let ask = Ask::read(&head, context.gateway().wait).map_err(|p| context.refuse(p))?;
    let payload = Payload::read(&head.headers, body, &context.gateway().room).await.map_err(|p| context.refuse(p))?;
    let way = match &ask.lease {
        Some(lease) => {
            let (name, _) = context.state.own_lease(caller, lease).await.map_err(|p| context.refuse(p))?;
            Way::Lease(name)
        }
        None => {
            let model = payload.model().map_err(|p| context.refuse(p))?;
            Way::Pool(pool_of(context, &model)?)
        }
    };
    // Comments are nothing only to who reads events.
    if ask.progress
        && payload.streams()
        && let Way::Pool(pool) = &way
    {
        return Ok(progress::answer(Arc::clone(context), ask, payload, pool.clone(), head));
    }
    let response = send::send(context, &ask, &payload, &way, &head).await?;
    Ok(response.map(Body::new))
}

/// Where a request goes.
#[derive(Debug, Clone)]
enum Way {
    /// To any engine of this pool.
    Pool(PoolId),
    /// To the engine of this lease.
    Lease(String),
}

fn pool_of(context: &Context, model: &str) -> Result<PoolId, Refusal> {
    let pools = context.gateway().routing.named(model).map_err(|e| context.refuse(e))?;
    pools.into_iter().next().ok_or_else(|| {
        let shown: String = model.chars().filter(|c| !c.is_control()).take(64).collect();
        context.refuse(
            Problem::new(Code::ModelNotFound, format!("no pool serves the model `{shown}`"))
                .with_hint("GET /v1/models lists the models"),
        )
    })
}

/// A body that the engine broke off before it began, or an engine that is not there.
fn engine_failed(detail: &str) -> Problem {
    Problem::new(Code::EngineFailed, detail)
        .with_hint("the engine may have seen the request, so it was not sent again; GET /v1/pools shows how it is")
}
