//! The node at a glance.

use axum::Json;
use axum::extract::State;

use super::handlers::App;
use crate::dto::{AutoscaleView, CapabilitiesView, Problem, TargetsView, targets};

/// What the node can do.
#[utoipa::path(get, path = "/v1/capabilities", tag = "node", responses((status = 200, body = CapabilitiesView)))]
pub(super) async fn capabilities(State(s): App) -> Result<Json<CapabilitiesView>, Problem> {
    let pools = s.control.pools().await?;
    Ok(Json(CapabilitiesView::new(&s.info.version, s.info.engines.clone(), &pools)))
}

/// Numbers for autoscalers.
#[utoipa::path(get, path = "/v1/autoscale", tag = "metrics", responses((status = 200, body = AutoscaleView)))]
pub(super) async fn autoscale(State(s): App) -> Result<Json<AutoscaleView>, Problem> {
    Ok(Json(s.control.pools().await?.as_slice().into()))
}

/// The engines that can be scraped, for Prometheus's http_sd.
#[utoipa::path(get, path = "/v1/sd/prometheus", tag = "metrics", responses((status = 200, body = Vec<TargetsView>)))]
pub(super) async fn prometheus(State(s): App) -> Result<Json<Vec<TargetsView>>, Problem> {
    Ok(Json(targets(&s.control.pools().await?)))
}
