//! The same facts as everywhere in the API, in the words that clients of OpenAI and Anthropic know.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use super::PATHS;
use crate::dto::Problem;

/// Clients know this one by a name of its own.
const NO_MODEL: &str = "MODEL_NOT_FOUND";

/// Whose words a path speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
}

impl Dialect {
    /// Of a path of the gateway.
    pub(crate) fn of(path: &str) -> Option<Self> {
        if path == "/v1/models" {
            return Some(Self::OpenAi);
        }
        PATHS.iter().find(|(p, _)| *p == path).map(|(_, dialect)| *dialect)
    }

    fn kind(self, status: u16) -> &'static str {
        match (self, status) {
            (_, 401) => "authentication_error",
            (_, 403) => "permission_error",
            (_, 429) => "rate_limit_error",
            (Self::Anthropic, 404) => "not_found_error",
            (Self::Anthropic, 413) => "request_too_large",
            (Self::Anthropic, 503) => "overloaded_error",
            (Self::Anthropic, 500..) => "api_error",
            (Self::OpenAi, 500..) => "server_error",
            _ => "invalid_request_error",
        }
    }

    pub(super) fn body(self, problem: &Problem) -> Value {
        let mut error = json!({
            "message": problem.detail,
            "type": self.kind(problem.status),
            "code": if problem.code == NO_MODEL { "model_not_found" } else { &problem.code },
            "param": null,
            "retriable": problem.retriable,
        });
        if problem.code == NO_MODEL {
            error["param"] = json!("model");
        }
        if let Some(ms) = problem.retry_after_ms {
            error["retry_after_ms"] = json!(ms);
        }
        if let Some(hint) = &problem.hint {
            error["hint"] = json!(hint);
        }
        match self {
            Self::OpenAi => json!({ "error": error }),
            Self::Anthropic => json!({ "type": "error", "error": error }),
        }
    }

    /// The same as an event of a stream that is under way. The first line break ends what may have been cut off.
    pub(super) fn event(self, problem: &Problem) -> Bytes {
        let body = self.body(problem);
        match self {
            Self::OpenAi => format!("\n\ndata: {body}\n\n").into(),
            Self::Anthropic => format!("\n\nevent: error\ndata: {body}\n\n").into(),
        }
    }

    /// An answer that says why there is no other.
    pub(crate) fn refuse(self, problem: &Problem) -> Response {
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = (status, [kind], self.body(problem).to_string()).into_response();
        problem.retry_after(&mut response);
        response
    }
}

/// Why a request is not sent on.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) problem: Problem,
    pub(super) dialect: Dialect,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.dialect.refuse(&self.problem)
    }
}
