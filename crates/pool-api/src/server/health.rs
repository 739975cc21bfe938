//! The daemon's own health, for probes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use serde_json::json;

use super::AppState;
use super::extract::{Answer, Pool};
use crate::dto::{Code, Problem};

/// The daemon runs; also while it drains.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, description = "It runs")))]
pub(super) async fn livez() -> impl IntoResponse {
    Json(json!({ "live": true }))
}

/// The daemon takes commands. It never follows one engine.
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "It takes commands"),
    (status = 503, description = "It is starting or stopping", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn readyz(State(s): State<Arc<AppState>>) -> Answer {
    if s.flags.accepting() {
        Ok(Json(json!({ "ready": true })).into_response())
    } else {
        Err(Problem::new(Code::Unavailable, "the daemon takes no commands: it is starting or stopping"))
    }
}

/// The start is over.
#[utoipa::path(get, path = "/startupz", tag = "health", responses(
    (status = 200, description = "The start is over"),
    (status = 503, description = "It is starting", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn startupz(State(s): State<Arc<AppState>>) -> Answer {
    if s.flags.started() {
        Ok(Json(json!({ "started": true })).into_response())
    } else {
        Err(Problem::new(Code::Unavailable, "the daemon is starting"))
    }
}

/// A pool is ready, in the words of KServe's protocol.
#[utoipa::path(get, path = "/v2/models/{id}/ready", tag = "health", params(("id" = String, Path)), responses(
    (status = 200, description = "It serves"),
    (status = 503, description = "It does not", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn model_ready(State(s): State<Arc<AppState>>, Pool(id): Pool) -> Answer {
    let pool = s.control.pool(&id).await?;
    if pool.ready() {
        Ok(Json(json!({ "name": id.as_str(), "ready": true })).into_response())
    } else {
        let why = pool.lead().map(|l| l.state).unwrap_or_default();
        Err(Problem::new(Code::PoolUnready, format!("the pool is not ready: {why}")))
    }
}
