//! Headers: ours, those that end here, and those that go on.

use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use pool_services::ApiKey;

/// Names a lease to use instead of taking one.
pub const LEASE: HeaderName = HeaderName::from_static("x-pool-lease");
/// How many milliseconds to wait for a slot.
pub const WAIT: HeaderName = HeaderName::from_static("x-pool-wait-ms");
/// Asks for comments in the stream that tell how far a start is.
pub const PROGRESS: HeaderName = HeaderName::from_static("x-pool-progress");
/// Names the request.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Those that are of one connection only.
fn hop_by_hop(name: &HeaderName) -> bool {
    *name == header::CONNECTION
        || *name == header::TRANSFER_ENCODING
        || *name == header::TE
        || *name == header::UPGRADE
        || *name == header::PROXY_AUTHORIZATION
        || *name == header::PROXY_AUTHENTICATE
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

/// Those that are for us: the engine's host is another one, and our tokens are nothing to it.
fn ours(name: &HeaderName) -> bool {
    *name == header::HOST
        || *name == header::AUTHORIZATION
        || *name == header::COOKIE
        || *name == header::ORIGIN
        || *name == header::EXPECT
        || *name == header::CONTENT_LENGTH
        || *name == REQUEST_ID
        || *name == LEASE
        || *name == WAIT
        || *name == PROGRESS
        || name.as_str() == "x-api-key"
}

fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let all = headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    all.filter_map(|name| name.trim().parse().ok()).collect()
}

/// What goes on to the engine.
pub(super) fn onward(from: &HeaderMap, request: &str, key: Option<&ApiKey>) -> HeaderMap {
    let named = named_by_connection(from);
    let mut to = HeaderMap::with_capacity(from.len() + 1);
    for (name, value) in from {
        if !hop_by_hop(name) && !ours(name) && !named.contains(name) {
            to.append(name.clone(), value.clone());
        }
    }
    let trailers = |v: &HeaderValue| v.to_str().is_ok_and(|t| t.split(',').any(|p| p.trim() == "trailers"));
    if from.get_all(header::TE).iter().any(trailers) {
        to.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Ok(value) = HeaderValue::from_str(request) {
        to.insert(REQUEST_ID, value);
    }
    if let Some(mut value) = key.and_then(|key| HeaderValue::from_str(&key.bearer()).ok()) {
        value.set_sensitive(true);
        to.insert(header::AUTHORIZATION, value);
    }
    to
}

/// Takes out of an answer what was of the connection to the engine.
pub(super) fn strip(headers: &mut HeaderMap) {
    for name in named_by_connection(headers) {
        headers.remove(name);
    }
    for name in [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        KEEP_ALIVE,
        PROXY_CONNECTION,
    ] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(all: &[(&'static str, &'static str)]) -> HeaderMap {
        all.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn what_is_of_one_connection_or_for_us_ends_here() {
        let from = map(&[
            ("host", "gateway"),
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("x-pool-lease", "l"),
            ("x-request-id", "theirs"),
            ("accept", "text/event-stream"),
            ("openai-beta", "a"),
        ]);
        let to = onward(&from, "ours", None);
        let want =
            map(&[("accept", "text/event-stream"), ("openai-beta", "a"), ("te", "trailers"), ("x-request-id", "ours")]);
        assert_eq!(to, want);
        // The client's token is for us, and the engine's key is for the engine.
        let to = onward(&from, "ours", Some(&ApiKey::new("of-the-engine")));
        assert_eq!(to["authorization"], "Bearer of-the-engine");
        assert!(!format!("{to:?}").contains("of-the-engine"));
        let mut answer =
            map(&[("connection", "x-b"), ("x-b", "1"), ("keep-alive", "5"), ("trailer", "x-t"), ("x-c", "2")]);
        strip(&mut answer);
        assert_eq!(answer, map(&[("trailer", "x-t"), ("x-c", "2")]));
    }
}
