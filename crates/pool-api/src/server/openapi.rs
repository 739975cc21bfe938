//! The OpenAPI document, generated from the handlers.

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::OpenApi;

use super::{handlers, health, leases, overview, specs, streams};
use crate::gateway::{self, docs};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "pool-managerd",
        description = "Runs inference engines on the GPUs of one node. Errors are application/problem+json; times are \
                       RFC 3339, lengths milliseconds, sizes bytes.",
        license(name = "MIT OR Apache-2.0")
    ),
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

/// The document as pretty JSON, the same on every run.
#[must_use]
pub fn openapi_json() -> String {
    Document::openapi().to_pretty_json().unwrap_or_default()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "node", responses((status = 200, description = "OpenAPI 3.1")))]
pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json())
}
