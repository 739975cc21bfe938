//! Pools that are declared, changed and removed, and the config file that is read again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use pool_services::control::PlanRequest;
use pool_services::{ControlError, Declared, ReloadRequest, Source};

use super::AppState;
use super::extract::{Answer, Body, Params, Pool, PutParams, WaitParams, invalid_params};
use super::handlers::{App, answer};
use crate::dto::{
    ConfigReloadView, EmptyBody, Keys, OperationView, PlanView, Problem, ReloadBody, SpecView, declared, keys, merge,
    same_user,
};

/// No reload may take longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Reads the config file again.
#[async_trait]
pub trait Reconfigure: fmt::Debug + Send + Sync {
    /// What changed, and what is done about it.
    async fn reload_config(&self) -> Result<ConfigReloadView, Problem>;
}

/// The revision of `If-Match`, where there is one.
pub(super) struct IfMatch(Option<u64>);

impl FromRequestParts<Arc<AppState>> for IfMatch {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &Arc<AppState>) -> Result<Self, Problem> {
        if parts.headers.contains_key(header::IF_NONE_MATCH) {
            return Err(invalid_params(
                "If-None-Match is not understood here: send If-Match with a revision, or neither",
            ));
        }
        let Some(value) = parts.headers.get(header::IF_MATCH) else { return Ok(Self(None)) };
        let tag = value.to_str().unwrap_or_default().trim();
        let number = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(tag);
        match number.parse() {
            Ok(revision) => Ok(Self(Some(revision))),
            Err(_) => Err(invalid_params("If-Match is no revision: send one as GET tells it in its ETag")),
        }
    }
}

pub(super) fn etag(revision: u64) -> [(header::HeaderName, HeaderValue); 1] {
    let tag = HeaderValue::try_from(format!("\"{revision}\"")).unwrap_or(HeaderValue::from_static("\"0\""));
    [(header::ETAG, tag)]
}

/// Declare a pool, or give one that was declared so another form. With `dry_run=true`: what would be started where.
#[utoipa::path(put, path = "/v1/pools/{id}", tag = "pools",
    params(("id" = String, Path), ("dry_run" = Option<bool>, Query, description = "Only plan; starts nothing"),
    ("wait_ms" = Option<u64>, Query, description = "Answer when it is done"),
    ("If-Match" = Option<String>, Header, description = "The revision that the pool has to have")), responses(
    (status = 200, description = "Done within wait_ms; with dry_run the plan, also where nothing fits", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "POOL_IN_FILE, or CONFLICT: another revision, or a name or an engine that would be of two pools",
        body = Problem, content_type = "application/problem+json"),
    (status = 422, description = "MASK_INVALID, SPLIT_INVALID, DOES_NOT_FIT, MODEL_REF_INVALID, MODEL_REF_DENIED, ENGINE_UNKNOWN or ARG_DENIED",
        body = Problem, content_type = "application/problem+json")))]
pub(super) async fn put_pool(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<PutParams>,
    IfMatch(if_match): IfMatch,
    Body(table): Body<Keys>,
) -> Answer {
    same_user(None, &table)?;
    let (spec, document) = declared(&id, table, &s.info.defaults)?;
    if q.dry_run.unwrap_or(false) {
        let plan = s.control.plan(PlanRequest::Spec(Box::new(spec))).await?;
        return Ok(Json(PlanView::from(plan)).into_response());
    }
    let op = s.control.declare(Declared { spec, document, source: Source::Api }, if_match).await?;
    let new = op.verb == "declare";
    let response = answer(&*s.control, Ok(op), q.wait()).await?;
    if !new {
        return Ok(response);
    }
    let (revision, _) = s.control.document(&id).await?;
    Ok((etag(revision), response).into_response())
}

/// Drain a pool that was declared over the API, and forget it. It is there until nothing of it is left.
#[utoipa::path(delete, path = "/v1/pools/{id}", tag = "pools",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done"),
    ("If-Match" = Option<String>, Header, description = "The revision that the pool has to have")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "POOL_IN_FILE or CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn delete_pool(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<WaitParams>,
    IfMatch(if_match): IfMatch,
) -> Answer {
    answer(&*s.control, s.control.remove(&id, if_match).await, q.wait()).await
}

/// Give a pool another form: the new one serves in the end, or the old one as it was. On a pool of the file it holds
/// until the file says something else.
#[utoipa::path(post, path = "/v1/pools/{id}/reload", tag = "verbs", request_body = ReloadBody,
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done"),
    ("If-Match" = Option<String>, Header, description = "The revision that the pool has to have")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json"),
    (status = 422, description = "MASK_INVALID, SPLIT_INVALID, DOES_NOT_FIT, MODEL_REF_INVALID, MODEL_REF_DENIED, ENGINE_UNKNOWN or ARG_DENIED",
        body = Problem, content_type = "application/problem+json")))]
pub(super) async fn reload(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<WaitParams>,
    IfMatch(if_match): IfMatch,
    Body(mut b): Body<ReloadBody>,
) -> Answer {
    let deadline = b.deadline_ms.map(Duration::from_millis);
    if deadline.is_some_and(|d| d.is_zero() || d > LONGEST) {
        return Err(invalid_params("deadline_ms has to be at least 1, and at most a day"));
    }
    let mut request = ReloadRequest {
        declared: None,
        if_match,
        strategy: b.strategy.map(Into::into),
        deadline,
        on_deadline: b.on_deadline.map(Into::into),
    };
    let changes = b.changes()?;
    if !changes.is_empty() {
        let (revision, document) = s.control.document(&id).await?;
        let no_words = |_| ControlError::Conflict("this pool has no written form that could be changed".into());
        let old = keys(&document).map_err(no_words)?;
        let mut table = old.clone();
        merge(&mut table, changes);
        same_user(Some(&old), &table)?;
        request.declared = Some(declared(&id, table, &s.info.defaults)?);
        request.if_match = if_match.or(Some(revision));
    }
    answer(&*s.control, s.control.reload(&id, request).await, q.wait()).await
}

/// Go back to what the pool was before its last reload.
#[utoipa::path(post, path = "/v1/pools/{id}/rollback", tag = "verbs",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn rollback(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<WaitParams>,
    _: Body<EmptyBody>,
) -> Answer {
    answer(&*s.control, s.control.rollback(&id).await, q.wait()).await
}

/// The pool as it is declared.
#[utoipa::path(get, path = "/v1/pools/{id}/spec", tag = "pools", params(("id" = String, Path)), responses(
    (status = 200, body = SpecView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn spec(State(s): App, Pool(id): Pool) -> Answer {
    let source = s.control.pool(&id).await?.source.to_owned();
    let (revision, document) = s.control.document(&id).await?;
    let pool = keys(&document).map(Into::into).unwrap_or_default();
    Ok((etag(revision), Json(SpecView { revision, source, pool })).into_response())
}

/// Read the config file again: pools that are new, changed or gone there are started, reloaded or removed, the others are
/// not touched. A file that cannot be changes nothing.
#[utoipa::path(post, path = "/v1/config/reload", tag = "verbs", responses(
    (status = 200, description = "What changed, and the operations that were begun", body = ConfigReloadView),
    (status = 400, description = "INVALID_PARAMS: with line and key", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT: there is no config file", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn reload_config(State(s): App, _: Body<EmptyBody>) -> Result<Json<ConfigReloadView>, Problem> {
    let Some(config) = &s.config else {
        return Err(ControlError::Conflict("nothing here was read from a config file".into()).into());
    };
    config.reload_config().await.map(Json)
}
