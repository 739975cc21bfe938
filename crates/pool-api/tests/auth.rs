//! Tokens before every route, and what tenants see of each other.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use common::{Fake, state};
use http_body_util::BodyExt;
use pool_api::server::{Access, AppState, Tokens, Via, openapi_json, router};
use serde_json::Value;
use tokio::sync::watch;
use tower::ServiceExt;

const READ: &str = "read-read-read-read-read-read-read";
const LEASE: &str = "lease-lease-lease-lease-lease-lease";
const ADMIN: &str = "admin-admin-admin-admin-admin-admin";

fn tokens() -> Tokens {
    Tokens::parse(&format!("{READ} read\n{LEASE} lease acme\n{ADMIN} admin")).unwrap()
}

fn guarded() -> (Arc<AppState>, watch::Sender<Arc<Tokens>>) {
    let (tx, rx) = watch::channel(Arc::new(tokens()));
    let open = Arc::into_inner(state(Fake::default())).unwrap();
    (Arc::new(AppState { access: Access::Tokens(rx), ..open }), tx)
}

fn ask(method: &str, path: &str, token: Option<&str>, body: &str) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    request.body(Body::from(body.to_owned())).unwrap()
}

async fn status(state: &Arc<AppState>, request: Request<Body>) -> StatusCode {
    router(Arc::clone(state)).oneshot(request).await.unwrap().status()
}

async fn json(state: &Arc<AppState>, request: Request<Body>) -> (u16, Value) {
    let response = router(Arc::clone(state)).oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap_or_default())
}

/// Every route of the document, with every method, and what nobody serves.
fn everything() -> Vec<(&'static str, String)> {
    let doc: Value = serde_json::from_str(&openapi_json()).unwrap();
    let mut paths: Vec<String> = doc["paths"].as_object().unwrap().keys().cloned().collect();
    assert!(paths.len() >= 35, "{}", paths.len());
    paths.extend(["/nowhere", "/v1/pools/", "/v1", "/v2/x", "/docs/../v1/pools"].map(str::to_owned));
    let methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"];
    let all = paths.iter().flat_map(|p| methods.map(|m| (m, p.replace("{id}", "chat").replace("{uuid}", "GPU-1"))));
    all.collect()
}

const OPEN: &[&str] =
    &["/livez", "/readyz", "/startupz", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs"];

#[tokio::test]
async fn without_a_token_that_is_taken_nothing_but_probes_and_the_document_is_answered() {
    let (state, _tx) = guarded();
    for (method, path) in everything() {
        let open = OPEN.contains(&path.as_str()) && ["GET", "HEAD"].contains(&method);
        for token in [None, Some("wrong-wrong-wrong-wrong-wrong-wrong"), Some(&READ[1..]), Some("")] {
            let got = status(&state, ask(method, &path, token, "")).await;
            assert_eq!(got == StatusCode::UNAUTHORIZED, !open, "{method} {path} {token:?}: {got}");
        }
    }
    let (got, told) = json(&state, ask("GET", "/v1/node", None, "")).await;
    assert_eq!((got, told["code"].as_str(), told["hint"].is_string()), (401, Some("UNAUTHORIZED"), true));
    let (got, told) = json(&state, ask("POST", "/v1/chat/completions", None, "{}")).await;
    assert_eq!((got, told["error"]["type"].as_str()), (401, Some("authentication_error")));
    let response = router(Arc::clone(&state)).oneshot(ask("GET", "/v1/node", None, "")).await.unwrap();
    assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
}

#[tokio::test]
async fn a_token_opens_what_its_scope_is_for_and_no_more() {
    let (state, _tx) = guarded();
    let allowed = async |method: &str, path: &str, token: &str| {
        let got = status(&state, ask(method, path, Some(token), "")).await;
        assert_ne!(got, StatusCode::UNAUTHORIZED, "{method} {path}");
        got != StatusCode::FORBIDDEN
    };
    let gateway = |path: &str| {
        ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank"]
            .contains(&path)
    };
    for (method, path) in everything() {
        let (looks, leases) =
            (["GET", "HEAD"].contains(&method), path.ends_with("leases") || path.starts_with("/v1/leases"));
        let open = looks && OPEN.contains(&path.as_str());
        let plans = method == "POST" && ["/v1/plan", "/v1/placements"].contains(&path.as_str());
        assert!(allowed(method, &path, ADMIN).await, "{method} {path}");
        assert_eq!(allowed(method, &path, READ).await, looks || plans, "{method} {path}");
        let uses = match method {
            "GET" | "HEAD" => leases || path == "/v1/models" || open,
            "POST" => leases || plans || gateway(&path),
            "DELETE" => leases,
            _ => false,
        };
        assert_eq!(allowed(method, &path, LEASE).await, uses, "{method} {path}");
    }
}

#[tokio::test]
async fn a_lease_is_its_tenants_own() {
    let (state, _tx) = guarded();
    let take = |token, body: &str| ask("POST", "/v1/pools/chat/leases", Some(token), body);
    let (got, lease) = json(&state, take(LEASE, "{}")).await;
    assert_eq!((got, lease["tenant_id"].as_str()), (201, Some("acme")));
    assert_eq!(json(&state, take(LEASE, r#"{"tenant_id":"other"}"#)).await.0, 403);
    assert_eq!(json(&state, take(ADMIN, r#"{"tenant_id":"other"}"#)).await.1["tenant_id"], "other");
    // The lease that is there is of nobody.
    let (got, mine) = json(&state, ask("GET", "/v1/leases", Some(LEASE), "")).await;
    assert_eq!((got, mine.as_array().unwrap().len()), (200, 0));
    assert_eq!(json(&state, ask("GET", "/v1/leases", Some(ADMIN), "")).await.1.as_array().unwrap().len(), 1);
    for (method, path) in [("DELETE", "/v1/leases/l-1"), ("POST", "/v1/leases/l-1/renew")] {
        let (got, told) = json(&state, ask(method, path, Some(LEASE), "")).await;
        assert_eq!((got, told["code"].as_str()), (404, Some("LEASE_NOT_FOUND")), "{method}");
        assert!(status(&state, ask(method, path, Some(ADMIN), "")).await.is_success());
    }
    let mut named = ask("POST", "/v1/chat/completions", Some(LEASE), "{}");
    named.headers_mut().insert("x-pool-lease", "l-1".parse().unwrap());
    assert_eq!(json(&state, named).await.1["error"]["code"], "LEASE_NOT_FOUND");
}

#[tokio::test]
async fn tokens_can_be_replaced_and_the_users_own_socket_needs_none() {
    let (state, tx) = guarded();
    let next = "next-next-next-next-next-next-next-next";
    assert_eq!(status(&state, ask("GET", "/v1/node", Some(next), "")).await, 401);
    tx.send_replace(Arc::new(Tokens::parse(&format!("{READ} read\n{next} read")).unwrap()));
    assert_eq!(status(&state, ask("GET", "/v1/node", Some(next), "")).await, 200);
    assert_eq!(status(&state, ask("GET", "/v1/node", Some(READ), "")).await, 200);
    tx.send_replace(Arc::new(Tokens::parse(&format!("{next} read")).unwrap()));
    assert_eq!(status(&state, ask("GET", "/v1/node", Some(READ), "")).await, 401);
    let mut inside = ask("POST", "/v1/pools/chat/stop", None, "");
    inside.extensions_mut().insert(Via::Unix);
    assert_eq!(status(&state, inside).await, 202);
    // There, too, a page of a browser has no business.
    let mut page = ask("GET", "/v1/node", None, "");
    page.extensions_mut().insert(Via::Unix);
    page.headers_mut().insert(header::ORIGIN, "http://evil.test".parse().unwrap());
    assert_eq!(status(&state, page).await, 403);
}
