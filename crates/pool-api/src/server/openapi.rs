//! The OpenAPI document, generated from the handlers.

mod complete;

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{handlers, health, leases, overview, specs, streams};
use crate::dto::EventView;
use crate::gateway::{self, docs};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "pool-managerd",
        description = "Runs inference engines on the GPUs of one node. Errors are application/problem+json; times are \
                       RFC 3339, lengths milliseconds, sizes bytes.",
        license(name = "MIT OR Apache-2.0")
    ),
    modifiers(&Token),
    // Nothing, or a token: whether one is asked for says the daemon's config.
    security((), ("token" = [])),
    components(schemas(EventView)),
    paths(
        health::livez,
        health::readyz,
        health::startupz,
        health::model_ready,
        handlers::node,
        handlers::pools,
        handlers::pool,
        handlers::pool_health,
        specs::put_pool,
        specs::delete_pool,
        specs::spec,
        specs::reload,
        specs::rollback,
        specs::reload_config,
        handlers::plan,
        handlers::placements,
        handlers::preload,
        handlers::drain,
        handlers::resume,
        handlers::stop,
        handlers::reset_breaker,
        handlers::unfence,
        leases::lease,
        leases::renew,
        leases::leases,
        leases::release,
        handlers::operations,
        handlers::operation,
        handlers::metrics,
        overview::capabilities,
        overview::autoscale,
        overview::prometheus,
        streams::events,
        streams::logs,
        gateway::models,
        docs::chat,
        docs::completions,
        docs::embeddings,
        docs::responses,
        docs::messages,
        docs::rerank,
        document
    )
)]
struct Document;

/// How a request shows its token.
struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let mut scheme = Http::new(HttpAuthScheme::Bearer);
        scheme.description =
            Some("Where the daemon has `[auth]`: a token of its file, with the scope that the route needs".into());
        document.components.get_or_insert_default().add_security_scheme("token", SecurityScheme::Http(scheme));
    }
}

/// The document as pretty JSON, the same on every run.
#[must_use]
pub fn openapi_json() -> String {
    let mut document = serde_json::to_value(Document::openapi()).unwrap_or_default();
    complete::complete(&mut document);
    serde_json::to_string_pretty(&document).unwrap_or_default()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "node", responses((status = 200, description = "OpenAPI 3.1")))]
pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json())
}
