//! One function per route: read, ask the control, convert.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use pool_services::{ControlError, DrainOptions, Operation, OperationState, PoolControl};

use super::AppState;
use super::extract::{Answer, Body, Id, Params, Pool, PoolParams, WaitParams, invalid_params};
use super::specs::etag;
use crate::dto::{
    DrainBody, EmptyBody, HealthView, NodeView, OperationView, PlacementBody, PlacementView, PlanBody, PlanView,
    PoolView, Problem,
};

pub(super) type App = State<Arc<AppState>>;

/// The longest deadline of a drain: a week.
const MAX_DEADLINE_MS: u64 = 7 * 24 * 3600 * 1000;

/// The node and its devices.
#[utoipa::path(get, path = "/v1/node", tag = "node", responses((status = 200, body = NodeView)))]
pub(super) async fn node(State(s): App) -> Result<Json<NodeView>, Problem> {
    let node = s.control.node().await?;
    Ok(Json(NodeView::new(&node, &s.info.version, &s.info.profile)))
}

/// Every pool.
#[utoipa::path(get, path = "/v1/pools", tag = "pools", responses((status = 200, body = Vec<PoolView>)))]
pub(super) async fn pools(State(s): App) -> Result<Json<Vec<PoolView>>, Problem> {
    let (pools, node) = (s.control.pools().await?, s.control.node().await?);
    Ok(Json(pools.iter().map(|p| PoolView::from(p).on(&node)).collect()))
}

/// One pool; with `wait_for_snapshot`, once its picture is newer than that or the time is over.
#[utoipa::path(get, path = "/v1/pools/{id}", tag = "pools", params(
    ("id" = String, Path, description = "The pool"),
    ("wait_for_snapshot" = Option<u64>, Query, description = "Answer when the picture is newer than this"),
    ("wait_ms" = Option<u64>, Query, description = "But wait no longer; at most ten minutes")), responses(
    (status = 200, body = PoolView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn pool(State(s): App, Pool(id): Pool, Params(q): Params<PoolParams>) -> Answer {
    let pool = match q.wait()? {
        Some((after, wait)) => s.control.wait_pool(&id, after, wait).await?,
        None => s.control.pool(&id).await?,
    };
    let node = s.control.node().await?;
    Ok((etag(pool.revision), Json(PoolView::from(&pool).on(&node))).into_response())
}

/// The health of one pool.
#[utoipa::path(get, path = "/v1/pools/{id}/health", tag = "pools", params(("id" = String, Path)), responses(
    (status = 200, body = HealthView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn pool_health(State(s): App, Pool(id): Pool) -> Result<Json<HealthView>, Problem> {
    Ok(Json((&s.control.pool(&id).await?).into()))
}

pub(super) async fn answer(
    control: &dyn PoolControl,
    op: Result<Operation, ControlError>,
    wait: Option<Duration>,
) -> Answer {
    let mut op = op?;
    if let Some(wait) = wait
        && op.state == OperationState::Running
    {
        op = control.wait_operation(&op.id, wait).await?;
    }
    let status = if op.state == OperationState::Running { StatusCode::ACCEPTED } else { StatusCode::OK };
    // Without a wait the answer is always "accepted", however fast the work was.
    let status = if wait.is_none() { StatusCode::ACCEPTED } else { status };
    let location = format!("/v1/operations/{}", op.id);
    Ok((status, [(header::LOCATION, location)], Json(OperationView::from(&op))).into_response())
}

/// Start every replica and lift the hold.
#[utoipa::path(post, path = "/v1/pools/{id}/preload", tag = "verbs",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn preload(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<WaitParams>,
    _: Body<EmptyBody>,
) -> Answer {
    answer(&*s.control, s.control.preload(&id).await, q.wait()).await
}

/// Refuse new leases, wait for those held, stop.
#[utoipa::path(post, path = "/v1/pools/{id}/drain", tag = "verbs", request_body = DrainBody,
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn drain(
    State(s): App,
    Pool(id): Pool,
    Params(q): Params<WaitParams>,
    Body(b): Body<DrainBody>,
) -> Answer {
    if b.deadline_ms.is_some_and(|ms| ms > MAX_DEADLINE_MS) {
        return Err(invalid_params("deadline_ms is longer than a week"));
    }
    let options =
        DrainOptions { deadline: b.deadline_ms.map(Duration::from_millis), on_deadline: b.on_deadline.map(Into::into) };
    answer(&*s.control, s.control.drain(&id, options).await, q.wait()).await
}

/// Give up a running drain or lift the hold.
#[utoipa::path(post, path = "/v1/pools/{id}/resume", tag = "verbs",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn resume(State(s): App, Pool(id): Pool, Params(q): Params<WaitParams>, _: Body<EmptyBody>) -> Answer {
    answer(&*s.control, s.control.resume(&id).await, q.wait()).await
}

/// A drain with deadline 0 and force.
#[utoipa::path(post, path = "/v1/pools/{id}/stop", tag = "verbs",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, description = "Done within wait_ms", body = OperationView),
    (status = 202, description = "Under way", body = OperationView),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn stop(State(s): App, Pool(id): Pool, Params(q): Params<WaitParams>, _: Body<EmptyBody>) -> Answer {
    answer(&*s.control, s.control.stop(&id).await, q.wait()).await
}

/// Forget failures and close the breaker.
#[utoipa::path(post, path = "/v1/pools/{id}/breaker/reset", tag = "verbs", params(("id" = String, Path)), responses(
    (status = 204, description = "Done"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn reset_breaker(State(s): App, Pool(id): Pool, _: Body<EmptyBody>) -> Result<StatusCode, Problem> {
    s.control.reset_breaker(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Believe that nothing of an engine is left on a device: what is fenced there goes on, with all of its devices. Doing so
/// twice is fine.
#[utoipa::path(post, path = "/v1/devices/{uuid}/unfence", tag = "verbs",
    params(("uuid" = String, Path, description = "UUID, index or PCI bus id")), responses(
    (status = 204, description = "Done, or not fenced"),
    (status = 404, description = "DEVICE_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn unfence(State(s): App, Id(device): Id, _: Body<EmptyBody>) -> Result<StatusCode, Problem> {
    s.control.unfence(&device).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What would be started where, and what would fit instead; starts nothing.
#[utoipa::path(post, path = "/v1/plan", tag = "planning", request_body = PlanBody, responses(
    (status = 200, description = "The plan, also where nothing fits", body = PlanView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 422, description = "MASK_INVALID, SPLIT_INVALID, MODEL_REF_INVALID, MODEL_REF_DENIED, ENGINE_UNKNOWN or ARG_DENIED", body = Problem,
        content_type = "application/problem+json")))]
pub(super) async fn plan(State(s): App, Body(b): Body<PlanBody>) -> Result<Json<PlanView>, Problem> {
    Ok(Json(s.control.plan(b.request()?).await?.into()))
}

/// Every replica, the best for the request first, each with its reason.
#[utoipa::path(post, path = "/v1/placements", tag = "planning", request_body = PlacementBody, responses(
    (status = 200, body = Vec<PlacementView>),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 422, description = "MASK_INVALID", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn placements(
    State(s): App,
    Body(b): Body<PlacementBody>,
) -> Result<Json<Vec<PlacementView>>, Problem> {
    Ok(Json(s.control.placements(b.request()?).await?.into_iter().map(Into::into).collect()))
}

/// Recent operations, newest first.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", responses((status = 200, body = Vec<OperationView>)))]
pub(super) async fn operations(State(s): App) -> Result<Json<Vec<OperationView>>, Problem> {
    Ok(Json(s.control.operations().await?.iter().map(Into::into).collect()))
}

/// One operation; with `wait_ms`, once it is done or the time is over.
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations",
    params(("id" = String, Path), ("wait_ms" = Option<u64>, Query, description = "Answer when it is done")), responses(
    (status = 200, body = OperationView),
    (status = 404, description = "OPERATION_NOT_FOUND", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn operation(
    State(s): App,
    Id(id): Id,
    Params(q): Params<WaitParams>,
) -> Result<Json<OperationView>, Problem> {
    let op = match q.wait() {
        Some(wait) => s.control.wait_operation(&id, wait).await?,
        None => s.control.operation(&id).await?,
    };
    Ok(Json((&op).into()))
}

const OPENMETRICS: &str = "application/openmetrics-text";
const OPENMETRICS_TYPE: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8"), (header::VARY, "accept")];
const PLAIN_TYPE: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"), (header::VARY, "accept")];

/// Metrics: in the OpenMetrics text format for those who accept it, as Prometheus does, else in Prometheus' own.
#[utoipa::path(get, path = "/metrics", tag = "metrics", responses(
    (status = 200, content((String = "application/openmetrics-text"), (String = "text/plain")))))]
pub(super) async fn metrics(State(s): App, headers: HeaderMap) -> Result<Response, Problem> {
    let (pools, node) = (s.control.pools().await?, s.control.node().await?);
    let accepted = |value: &HeaderValue| value.to_str().is_ok_and(|kinds| kinds.contains(OPENMETRICS));
    Ok(if headers.get_all(header::ACCEPT).iter().any(accepted) {
        (OPENMETRICS_TYPE, s.metrics.render(&pools, &node)).into_response()
    } else {
        (PLAIN_TYPE, s.metrics.render_plain(&pools, &node)).into_response()
    })
}
