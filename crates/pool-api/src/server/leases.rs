//! The routes about leases.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;

use pool_services::Lease;

use super::Caller;
use super::extract::{Answer, Body, Id, Pool, invalid_params};
use super::handlers::App;
use crate::dto::{Code, LeaseBody, LeaseView, Problem, RenewBody};

/// Take a slot, or wait for one; who asked first is served first. A pool at rest that starts on demand is started. The
/// place is lost when the connection is.
#[utoipa::path(post, path = "/v1/pools/{id}/leases", tag = "leases", request_body = LeaseBody,
    params(("id" = String, Path)), responses(
    (status = 201, description = "Granted, or granted before with this idempotency key", body = LeaseView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "POOL_NOT_FOUND", body = Problem, content_type = "application/problem+json"),
    (status = 409, description = "CONFLICT: the idempotency key stands for another wish, or for a lease that is over",
        body = Problem, content_type = "application/problem+json"),
    (status = 429, description = "POOL_SATURATED", body = Problem, content_type = "application/problem+json"),
    (status = 503, description = "POOL_UNREADY, POOL_DRAINING, POOL_UNAVAILABLE, INSUFFICIENT_VRAM or UNAVAILABLE", body = Problem,
        content_type = "application/problem+json")))]
pub(super) async fn lease(State(s): App, caller: Caller, Pool(id): Pool, Body(mut b): Body<LeaseBody>) -> Answer {
    if let Some(own) = &caller.tenant {
        match &b.tenant_id {
            Some(other) if **other != **own && caller.kept_to().is_some() => {
                return Err(Problem::new(Code::Forbidden, "the token is of another tenant")
                    .with_hint("leave tenant_id out: the token's is taken"));
            }
            Some(_) => {}
            None => b.tenant_id = Some(own.to_string()),
        }
    }
    let request = b.request(&id).map_err(|e| invalid_params(e.to_string()))?;
    let lease = s.control.lease(&id, request).await?;
    let shown = s.shown_lease(&caller, &lease);
    let location = format!("/v1/leases/{}", shown.lease_id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(shown)).into_response())
}

/// Let a lease go on. One of before a restart of the daemon goes on, too, while its engine serves and a slot is there for
/// it.
#[utoipa::path(post, path = "/v1/leases/{id}/renew", tag = "leases", request_body = RenewBody,
    params(("id" = String, Path)), responses(
    (status = 200, description = "It ends later", body = LeaseView),
    (status = 400, description = "INVALID_PARAMS", body = Problem, content_type = "application/problem+json"),
    (status = 404, description = "LEASE_NOT_FOUND: it is over, or never was", body = Problem,
        content_type = "application/problem+json")))]
pub(super) async fn renew(
    State(s): App,
    caller: Caller,
    Id(id): Id,
    Body(b): Body<RenewBody>,
) -> Result<Json<LeaseView>, Problem> {
    let (name, holder) = s.own_lease(&caller, &id).await?;
    let lease = s.control.renew_for(&name, b.ttl_ms.map(Duration::from_millis), holder).await?;
    Ok(Json(s.shown_lease(&caller, &lease)))
}

/// Every lease that is held; with a token of a tenant, those of the tenant.
#[utoipa::path(get, path = "/v1/leases", tag = "leases", responses((status = 200, body = Vec<LeaseView>)))]
pub(super) async fn leases(State(s): App, caller: Caller) -> Result<Json<Vec<LeaseView>>, Problem> {
    let all = s.control.leases().await?;
    let shown = |l: &&Lease| caller.kept_to().is_none_or(|own| l.holder.tenant_id.as_ref() == Some(own));
    Ok(Json(all.iter().filter(shown).map(|lease| s.shown_lease(&caller, lease)).collect()))
}

/// Give a slot back; releasing what is over is fine.
#[utoipa::path(delete, path = "/v1/leases/{id}", tag = "leases", params(("id" = String, Path)), responses(
    (status = 204, description = "Given back, or not held any more"),
    (status = 404, description = "LEASE_NOT_FOUND: it never was", body = Problem,
        content_type = "application/problem+json")))]
pub(super) async fn release(State(s): App, caller: Caller, Id(id): Id) -> Result<StatusCode, Problem> {
    let (name, _) = s.own_lease(&caller, &id).await?;
    s.control.release(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
