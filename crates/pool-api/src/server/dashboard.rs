//! The page at `/`: three files that lie in the binary, and what a browser may do with them.

use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;
use axum::routing::get;

/// Each with its type.
const FILES: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("../../assets/dashboard.html")),
    ("/dashboard.css", "text/css; charset=utf-8", include_str!("../../assets/dashboard.css")),
    ("/dashboard.js", "text/javascript; charset=utf-8", include_str!("../../assets/dashboard.js")),
];

/// Nothing but these files and this API: text of an engine's log that looks like a script is none.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
];

/// Whether a path is of the page. It holds nothing of this node.
pub(super) fn has(path: &str) -> bool {
    FILES.iter().any(|(file, _, _)| *file == path)
}

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, &(path, kind, text)| {
        let file = move || async move { ([(header::CONTENT_TYPE, kind)], HEADERS, text).into_response() };
        router.route(path, get(file))
    })
}
