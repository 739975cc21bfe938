//! The models there are, in OpenAI's list.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::Dialect;
use crate::dto::ModelsView;
use crate::server::AppState;

/// The models, each with the state of its pool.
#[utoipa::path(get, path = "/v1/models", tag = "gateway", responses((status = 200, body = ModelsView)))]
pub(crate) async fn models(State(s): State<Arc<AppState>>) -> Response {
    match s.control.pools().await {
        Ok(pools) => {
            let data = pools.iter().map(Into::into).collect();
            Json(ModelsView { object: "list".into(), data }).into_response()
        }
        Err(e) => Dialect::OpenAi.refuse(&e.into()),
    }
}
