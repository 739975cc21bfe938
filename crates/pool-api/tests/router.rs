//! The router over a control that is told what to answer.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use common::{Fake, state};
use http_body_util::BodyExt;
use pool_api::server::router;
use pool_services::ControlError;
use serde_json::Value;
use tower::ServiceExt;

const GATEWAY: &[&str] =
    &["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank"];

const ROUTES: &[(&str, &str)] = &[
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/startupz"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2/models/chat/ready"),
    ("GET", "/v1/node"),
    ("GET", "/v1/pools"),
    ("GET", "/v1/pools/chat"),
    ("GET", "/v1/pools/chat?wait_for_snapshot=3&wait_ms=99999999"),
    ("GET", "/v1/pools/chat/health"),
    ("PUT", "/v1/pools/chat?dry_run=true"),
    ("PUT", "/v1/pools/chat"),
    ("DELETE", "/v1/pools/chat"),
    ("GET", "/v1/pools/chat/spec"),
    ("POST", "/v1/pools/chat/reload"),
    ("POST", "/v1/pools/chat/rollback"),
    ("POST", "/v1/config/reload"),
    ("POST", "/v1/plan"),
    ("POST", "/v1/placements"),
    ("POST", "/v1/pools/chat/preload"),
    ("POST", "/v1/pools/chat/drain"),
    ("POST", "/v1/pools/chat/resume"),
    ("POST", "/v1/pools/chat/stop?wait_ms=1"),
    ("POST", "/v1/pools/chat/breaker/reset"),
    ("POST", "/v1/devices/GPU-51000000-0000-4000-8000-000000000001/unfence"),
    ("POST", "/v1/pools/chat/leases"),
    ("GET", "/v1/leases"),
    ("DELETE", "/v1/leases/l-1"),
    ("POST", "/v1/leases/l-1/renew"),
    ("GET", "/v1/operations"),
    ("GET", "/v1/operations/op-1"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/capabilities"),
    ("GET", "/v1/autoscale"),
    ("GET", "/v1/sd/prometheus"),
    ("GET", "/v1/events?follow=false"),
    ("GET", "/v1/pools/chat/logs?tail=3&replica=r1"),
];

async fn send(fake: Fake, request: Request<Body>) -> Response {
    router(state(fake)).oneshot(request).await.unwrap()
}

fn request(method: &str, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).header(header::HOST, "localhost").body(Body::empty()).unwrap()
}

fn post(path: &str, kind: &str, body: impl Into<Body>) -> Request<Body> {
    let mut r = request("POST", path);
    *r.body_mut() = body.into();
    if !kind.is_empty() {
        r.headers_mut().insert(header::CONTENT_TYPE, kind.parse().unwrap());
    }
    r
}

async fn json(response: Response) -> Value {
    serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

async fn problem(response: Response) -> (u16, Value) {
    let status = response.status();
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
    let retry = response.headers().contains_key(header::RETRY_AFTER);
    let p = json(response).await;
    assert_eq!(p["status"], status.as_u16());
    assert_eq!(p["retriable"], retry, "{p}");
    assert_eq!(p["type"], "about:blank");
    assert!(!p["title"].as_str().unwrap().is_empty() && !p["detail"].as_str().unwrap().is_empty());
    (status.as_u16(), p)
}

#[tokio::test]
async fn every_route_answers() {
    for (method, path) in ROUTES {
        let body = match *path {
            "/v1/plan" => r#"{"pool":"chat"}"#,
            _ if *method == "PUT" => r#"{"model":"stub:a","engine":"stub"}"#,
            _ => "",
        };
        let mut request = request(method, path);
        if !body.is_empty() {
            *request.body_mut() = body.into();
            request.headers_mut().insert(header::CONTENT_TYPE, "application/json".parse().unwrap());
        }
        let status = send(Fake::default(), request).await.status();
        assert!(status.is_success(), "{method} {path}: {status}");
    }
}

#[tokio::test]
async fn every_error_has_its_status_and_code() {
    let cases = [
        (ControlError::PoolNotFound("chat".into()), 404, "POOL_NOT_FOUND"),
        (ControlError::OperationNotFound("x".into()), 404, "OPERATION_NOT_FOUND"),
        (ControlError::LeaseNotFound("x".into()), 404, "LEASE_NOT_FOUND"),
        (ControlError::DeviceNotFound("x".into()), 404, "DEVICE_NOT_FOUND"),
        (ControlError::Conflict("busy".into()), 409, "CONFLICT"),
        (ControlError::PoolInFile("chat".into()), 409, "POOL_IN_FILE"),
        (ControlError::Refused { code: "DOES_NOT_FIT".into(), detail: "d".into() }, 422, "DOES_NOT_FIT"),
        (ControlError::Saturated { retry_after: Duration::from_millis(6001) }, 429, "POOL_SATURATED"),
        (ControlError::unready("starting"), 503, "POOL_UNREADY"),
        (ControlError::Draining, 503, "POOL_DRAINING"),
        (ControlError::Unavailable { retry_after: Duration::from_millis(1500) }, 503, "POOL_UNAVAILABLE"),
        (ControlError::Unreachable("stopping".into()), 503, "UNAVAILABLE"),
        (ControlError::Refused { code: "POOL_SATURATED".into(), detail: "d".into() }, 429, "POOL_SATURATED"),
        (ControlError::Refused { code: "NEW".into(), detail: "d".into() }, 502, "NEW"),
    ];
    for (error, status, code) in cases {
        let fake = || Fake { error: Some(error.clone()), ..Fake::default() };
        for verb in ["preload", "drain", "resume", "stop", "reload", "rollback", "breaker/reset", "leases"] {
            let response = send(fake(), request("POST", &format!("/v1/pools/chat/{verb}"))).await;
            let wait = response.headers().get(header::RETRY_AFTER).cloned();
            let (s, p) = problem(response).await;
            assert_eq!((s, p["code"].as_str().unwrap()), (status, code), "{verb}");
            assert_eq!(wait.is_some(), status == 429 || status == 503, "{code}");
            if matches!(error, ControlError::Saturated { .. }) {
                assert_eq!(wait.as_ref().unwrap(), "7", "never early");
            }
            if code == "POOL_UNAVAILABLE" {
                assert_eq!(wait.unwrap(), "2");
                assert_eq!(p["retry_after_ms"], 1500);
            }
        }
    }
}

#[tokio::test]
async fn strangers_are_turned_away_on_every_route_and_method() {
    let methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"];
    let mut paths: Vec<&str> = ROUTES.iter().map(|(_, p)| *p).collect();
    paths.extend(GATEWAY);
    paths.extend(["/", "/dashboard.js", "/nowhere", "/v1/pools/", "/v1/pools/%ff"]);
    for path in paths {
        for method in methods {
            for (hosts, origin) in [
                (&["evil.test"][..], None),
                (&["localhost.evil.test:9200"], None),
                (&[], None),
                (&["localhost", "evil.test"], None),
                (&["localhost"], Some("http://localhost:9201")),
                (&["localhost:9200"], Some("http://localhost")),
                (&["localhost:9200"], Some("http://127.0.0.1:9200")),
                (&["evil.test"], Some("http://evil.test")),
                (&["localhost"], Some("null")),
                (&["localhost"], Some("")),
            ] {
                let mut r = Request::builder().method(method).uri(path);
                for h in hosts {
                    r = r.header(header::HOST, *h);
                }
                if let Some(o) = origin {
                    r = r.header(header::ORIGIN, o);
                }
                let response = send(Fake::default(), r.body(Body::empty()).unwrap()).await;
                assert_eq!(response.status(), StatusCode::FORBIDDEN, "{method} {path} {hosts:?} {origin:?}");
                if method != "HEAD" {
                    assert_eq!(problem(response).await.1["code"], "FORBIDDEN_HOST");
                }
            }
        }
    }
}

#[tokio::test]
async fn known_hosts_and_origins_pass() {
    for host in ["gpu.lan", "gpu.lan:9200", "127.0.0.1:9200", "[::1]:9200", "LocalHost:1"] {
        let mut r = request("GET", "/v1/node");
        r.headers_mut().insert(header::HOST, host.parse().unwrap());
        r.headers_mut().insert(header::ORIGIN, "https://ui.lan".parse().unwrap());
        let response = send(Fake::default(), r).await;
        assert_eq!(response.status(), 200, "{host}");
        assert!(!response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
    }
    // What a browser says of the daemon's own page.
    for (host, origin) in [("127.0.0.1:9200", "http://127.0.0.1:9200"), ("gpu.lan", "https://gpu.lan")] {
        let mut r = request("GET", "/v1/node");
        r.headers_mut().insert(header::HOST, host.parse().unwrap());
        r.headers_mut().insert(header::ORIGIN, origin.parse().unwrap());
        assert_eq!(send(Fake::default(), r).await.status(), 200, "{origin}");
    }
    let foreign = send(Fake::default(), request("GET", "http://evil.test/v1/node")).await;
    assert_eq!(foreign.status(), 403);
}

#[tokio::test]
async fn a_page_elsewhere_that_sends_no_origin_gets_nothing_but_a_link_followed() {
    for (path, site, status) in [
        ("/v1/events", "cross-site", 403),
        ("/v1/node", "same-site", 403),
        ("/v1/node", "same-origin", 200),
        ("/v1/node", "none", 200),
        ("/", "cross-site", 200),
    ] {
        let mut r = request("GET", path);
        r.headers_mut().insert("sec-fetch-site", site.parse().unwrap());
        assert_eq!(send(Fake::default(), r).await.status(), status, "{path} {site}");
    }
    let mut listed = request("GET", "/v1/node");
    listed.headers_mut().insert("sec-fetch-site", "cross-site".parse().unwrap());
    listed.headers_mut().insert(header::ORIGIN, "https://ui.lan".parse().unwrap());
    assert_eq!(send(Fake::default(), listed).await.status(), 200);
}

#[tokio::test]
async fn the_page_may_do_nothing_but_ask_this_daemon() {
    for (path, kind) in [("/", "text/html"), ("/dashboard.css", "text/css"), ("/dashboard.js", "text/javascript")] {
        let response = send(Fake::default(), request("GET", path)).await;
        assert_eq!(response.status(), 200, "{path}");
        let header = |name: header::HeaderName| response.headers()[name].to_str().unwrap().to_owned();
        assert!(header(header::CONTENT_TYPE).starts_with(kind), "{path}");
        let policy = header(header::CONTENT_SECURITY_POLICY);
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
    }
}

#[tokio::test]
async fn metrics_come_in_the_format_that_is_accepted() {
    for (accept, kind, eof) in [
        (None, "text/plain; version=0.0.4", false),
        (Some("*/*"), "text/plain; version=0.0.4", false),
        (
            Some("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2"),
            "application/openmetrics-text",
            true,
        ),
    ] {
        let mut r = request("GET", "/metrics");
        if let Some(accept) = accept {
            r.headers_mut().insert(header::ACCEPT, accept.parse().unwrap());
        }
        let response = send(Fake::default(), r).await;
        assert!(response.headers()[header::CONTENT_TYPE].to_str().unwrap().starts_with(kind), "{accept:?}");
        let text = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(text.ends_with(b"# EOF\n"), eof, "{accept:?}");
    }
}

#[tokio::test]
async fn bad_bodies() {
    let large = format!("{{\"deadline_ms\":1{}}}", " ".repeat(70_000));
    let cases: &[(&str, &str, &str, u16)] = &[
        ("drain", "application/json", "{", 400),
        ("drain", "application/json", "[1]", 400),
        ("drain", "application/json", r#"{"deadline":1}"#, 400),
        ("drain", "application/json", r#"{"deadline_ms":-1}"#, 400),
        ("drain", "application/json", r#"{"deadline_ms":18446744073709551615}"#, 400),
        ("drain", "application/json", r#"{"on_deadline":"maybe"}"#, 400),
        ("drain", "application/json", &large, 413),
        ("drain", "text/plain", r#"{"deadline_ms":1}"#, 400),
        ("drain", "", r#"{"deadline_ms":1}"#, 400),
        ("drain", "application/x-www-form-urlencoded", "", 400),
        ("stop", "application/json", r#"{"force":true}"#, 400),
        ("leases", "application/json", r#"{"ttl_ms":0}"#, 400),
        ("leases", "application/json", r#"{"ttl_ms":-1}"#, 400),
        ("leases", "application/json", r#"{"wait_ms":-1}"#, 400),
        ("leases", "application/json", r#"{"prefer_replica":"one"}"#, 400),
        ("leases", "application/json", r#"{"nope":"x"}"#, 400),
    ];
    for (verb, kind, body, status) in cases {
        let response = send(Fake::default(), post(&format!("/v1/pools/chat/{verb}"), kind, (*body).to_owned())).await;
        let (s, p) = problem(response).await;
        assert_eq!((s, p["code"].as_str().unwrap()), (*status, "INVALID_PARAMS"), "{verb} {kind} {}", p["detail"]);
    }
    for query in ["?wait_ms=x", "?wait_ms=-1", "?nope=1"] {
        let r = request("POST", &format!("/v1/pools/chat/stop{query}"));
        assert_eq!(problem(send(Fake::default(), r).await).await.1["code"], "INVALID_PARAMS", "{query}");
    }
    for path in ["/v1/pools/..%2fetc", "/v1/pools/%ff", "/v1/pools/-x/health", "/v1/pools/chat?wait_ms=5"] {
        assert_eq!(problem(send(Fake::default(), request("GET", path)).await).await.0, 400, "{path}");
    }
}

#[tokio::test]
async fn good_bodies() {
    let body = r#"{"deadline_ms":250,"on_deadline":"abort"}"#;
    let r = post("/v1/pools/chat/drain", "application/json; charset=utf-8", body);
    let response = send(Fake::default(), r).await;
    assert_eq!(response.status(), 202);
    assert_eq!(response.headers()[header::LOCATION], "/v1/operations/op-1");
    let op = json(response).await;
    assert_eq!((op["progress"].as_str(), op["state"].as_str()), (Some("Some(250ms) true"), Some("running")));
    assert_eq!(op["started_at"], "2023-11-14T22:13:20.000Z");

    let done = send(Fake::default(), request("POST", "/v1/pools/chat/drain?wait_ms=99999999999")).await;
    assert_eq!(done.status(), 200);
    let done = json(done).await;
    assert_eq!((done["state"].as_str(), done["outcome"].as_str()), (Some("succeeded"), Some("drained")));

    let r = post("/v1/pools/chat/leases", "application/json", r#"{"prefer_replica":"other/one","wait_ms":5000}"#);
    let elsewhere = json(send(Fake::default(), r).await).await;
    assert_eq!(
        (&elsewhere["engine_version"], &elsewhere["slot"]),
        (&"".into(), &5.into()),
        "a hint that leads nowhere"
    );
    let lease = send(Fake::default(), request("POST", "/v1/pools/chat/leases")).await;
    assert_eq!(lease.status(), 201);
    assert_eq!(json(lease).await["expires_at"], "2023-11-14T22:14:20.000Z");
    let gone = send(Fake::default(), request("DELETE", "/v1/leases/l-1")).await;
    assert_eq!(gone.status(), 204);
    let unknown = send(Fake::default(), request("DELETE", "/v1/leases/l-2")).await;
    assert_eq!(problem(unknown).await.1["code"], "LEASE_NOT_FOUND");
}

#[tokio::test]
async fn unknown_routes_and_methods() {
    for path in ["/nowhere", "/v1", "/v1/pools/chat/nothing", "/v1/pools/chat/"] {
        let (s, p) = problem(send(Fake::default(), request("GET", path)).await).await;
        assert_eq!((s, p["code"].as_str().unwrap()), (404, "NOT_FOUND"), "{path}");
    }
    for (method, path) in [("PUT", "/v1/node"), ("OPTIONS", "/v1/pools"), ("GET", "/v1/pools/chat/stop")] {
        let response = send(Fake::default(), request(method, path)).await;
        assert!(response.headers().contains_key(header::ALLOW), "{method} {path}");
        assert_eq!(problem(response).await.1["code"], "METHOD_NOT_ALLOWED");
    }
}

#[tokio::test]
async fn a_bug_tells_nothing() {
    let fake = Fake { panics: true, ..Fake::default() };
    let (s, p) = problem(send(fake, request("GET", "/v1/pools/chat")).await).await;
    assert_eq!((s, p["code"].as_str().unwrap()), (500, "INTERNAL"));
    assert!(!p.to_string().contains("secret"));
}

#[tokio::test]
async fn the_daemons_own_health() {
    let s = state(Fake::default());
    s.flags.set_accepting(false);
    for (path, status) in [("/livez", 200), ("/readyz", 503), ("/v2/health/ready", 503), ("/startupz", 200)] {
        let response = router(s.clone()).oneshot(request("GET", path)).await.unwrap();
        assert_eq!(response.status(), status, "{path}");
    }
}

#[tokio::test]
async fn a_pool_on_the_wire() {
    let p = json(send(Fake::default(), request("GET", "/v1/pools/chat")).await).await;
    for key in [
        "pool_id",
        "snapshot",
        "revision",
        "source",
        "engine",
        "engine_version",
        "model_id",
        "device_mask",
        "devices",
        "vram_total_bytes",
        "vram_free_bytes",
        "compute_capability",
        "workload",
        "slots_total",
        "slots_free",
        "active_leases",
        "live",
        "ready",
        "draining",
        "hold",
        "state",
        "reason",
        "last_error",
        "last_heartbeat_ms",
        "restart_count",
        "breaker",
        "backoff",
        "proof",
        "perf",
        "replicas",
    ] {
        assert!(p.get(key).is_some(), "{key}");
    }
    assert_eq!((p["slots_total"].as_u64(), p["slots_free"].as_u64()), (Some(8), Some(6)));
    assert_eq!(p["devices"].as_array().unwrap().len(), 2);
    assert_eq!(p["last_error"]["at"], "2023-11-14T22:13:20.123Z");
    assert_eq!(p["last_heartbeat_ms"], 1_700_000_001_000u64);
    assert_eq!((&p["perf"]["first_token_ms"], &p["perf"]["tokens_per_s"]), (&31.into(), &52.5.into()));
    let waited = request("GET", "/v1/pools/chat?wait_for_snapshot=41");
    assert_eq!(json(send(Fake::default(), waited).await).await["snapshot"], 42);
}

#[tokio::test]
async fn the_document_names_every_route() {
    let text = pool_api::server::openapi_json();
    assert_eq!(text, pool_api::server::openapi_json());
    let doc: Value = serde_json::from_str(&text).unwrap();
    assert!(doc["openapi"].as_str().unwrap().starts_with("3.1"));
    let gateway = GATEWAY.iter().map(|path| ("POST", *path));
    for (method, path) in ROUTES.iter().copied().chain(gateway) {
        // Two paths of another protocol lead to the same two handlers.
        if path.starts_with("/v2/health") {
            continue;
        }
        let path = path.split('?').next().unwrap().replace("/l-1", "/{id}");
        let path = path.replace("/pools/chat", "/pools/{id}").replace("/models/chat", "/models/{id}");
        let path = path.replace("/op-1", "/{id}").replace("/GPU-51000000-0000-4000-8000-000000000001", "/{uuid}");
        assert!(doc["paths"][&path][method.to_lowercase()].is_object(), "{method} {path}");
    }
    let schemas = doc["components"]["schemas"].as_object().unwrap();
    for name in ["PoolView", "ReplicaView", "Problem", "DrainBody", "OnDeadlineText", "DeviceView"] {
        assert!(schemas.contains_key(name), "{name}");
    }
}

async fn ask(method: &str, path: &str, body: &'static str) -> (u16, Value) {
    let mut request = post(path, "application/json", body);
    *request.method_mut() = method.parse().unwrap();
    let response = send(Fake::default(), request).await;
    (response.status().as_u16(), json(response).await)
}

#[tokio::test]
async fn plans_and_placements() {
    let plan = ask("POST", "/v1/plan", r#"{"pool":"chat"}"#).await;
    assert_eq!((plan.0, &plan.1["devices"][0]["free_after_bytes"], &plan.1["fits"]), (200, &5.into(), &true.into()));
    let keys = ask("POST", "/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":"3,1","vram":"1 GiB"}"#).await;
    assert_eq!(keys.1["remedies"][0], r#"file:/m/a.gguf Ratios("3,1") Some(1073741824)"#);
    let dry = ask("PUT", "/v1/pools/new?dry_run=true", r#"{"model":"stub:a","engine":"stub"}"#).await;
    assert_eq!((dry.0, &dry.1["remedies"][0]), (200, &"stub:a Off None".into()));
    for (path, body, status, code) in [
        ("/v1/plan", "{}", 400, "INVALID_PARAMS"),
        ("/v1/plan", r#"{"pool":"chat","slots":1}"#, 400, "INVALID_PARAMS"),
        ("/v1/plan", r#"{"pool":"nobody"}"#, 404, "POOL_NOT_FOUND"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":"3,-1"}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":"nan"}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":"0,0"}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":""}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","devices":"0,0"}"#, 422, "MASK_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":[3,-1]}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":["a"]}"#, 422, "SPLIT_INVALID"),
        ("/v1/plan", r#"{"model":"file:/m/a.gguf","tensor_split":[]}"#, 422, "SPLIT_INVALID"),
        ("/v1/placements", r#"{"prefer_replica":"chat"}"#, 400, "INVALID_PARAMS"),
        ("/v1/placements", r#"{"devices":["GPU-nope"]}"#, 422, "MASK_INVALID"),
    ] {
        let (got, told) = ask("POST", path, body).await;
        assert_eq!((got, told["code"].as_str()), (status, Some(code)), "{path} {body}: {told}");
    }
    assert_eq!(ask("PUT", "/v1/pools/new?dry_run=true", r#"{"id":"other","model":"stub:a"}"#).await.0, 400);
    let (status, placed) = ask("POST", "/v1/placements", r#"{"model":"chat","prefer_replica":"chat/r1"}"#).await;
    assert_eq!((status, &placed[0]["serves"], &placed[0]["replica_id"]), (200, &true.into(), &"r1".into()));
}

async fn ask_if(tag: &str, method: &str, path: &str, body: &'static str) -> (u16, Value) {
    let mut request = post(path, "application/json", body);
    *request.method_mut() = method.parse().unwrap();
    request.headers_mut().insert(header::IF_MATCH, tag.parse().unwrap());
    let response = send(Fake::default(), request).await;
    (response.status().as_u16(), json(response).await)
}

#[tokio::test]
async fn a_pool_is_declared_by_its_keys_and_a_revision() {
    let body = r#"{"slots":2,"model":"stub:a","engine":"stub"}"#;
    let (status, op) = ask_if("\"7\"", "PUT", "/v1/pools/chat", body).await;
    assert_eq!((status, op["verb"].as_str()), (202, Some("declare")));
    let document = r#"{"id":"chat","model":"stub:a","engine":"stub","slots":2}"#;
    assert_eq!(op["progress"], format!("Api Some(7) {document}"));
    let (_, op) = ask_if("8", "DELETE", "/v1/pools/chat", "").await;
    assert_eq!((op["verb"].as_str(), op["progress"].as_str()), (Some("remove"), Some("Some(8)")));
    let read = send(Fake::default(), request("GET", "/v1/pools/chat")).await;
    assert_eq!(read.headers()[header::ETAG], "\"1\"");
    let spec = send(Fake::default(), request("GET", "/v1/pools/chat/spec")).await;
    assert_eq!(spec.headers()[header::ETAG], "\"3\"");
    let spec = json(spec).await;
    assert_eq!((&spec["revision"], &spec["source"], &spec["pool"]["slots"]), (&3.into(), &"file".into(), &2.into()));
}

#[tokio::test]
async fn a_reload_is_a_patch_of_what_the_pool_is() {
    for (tag, body, expected) in [
        (
            None,
            r#"{"new_model_ref":"stub:b","new_engine_version":"9","deadline_ms":5,"strategy":"in_place","on_deadline":"force"}"#,
            r#"Some("{\"id\":\"chat\",\"model\":\"stub:b\",\"engine\":\"stub\",\"version\":\"9\",\"slots\":2,\"drain\":{\"deadline\":\"5s\"}}") Some(3) Some(InPlace) Some(5ms) Some(Force)"#,
        ),
        (
            Some("2"),
            r#"{"slots":null,"drain":{"stop_grace":"1s"}}"#,
            r#"Some("{\"id\":\"chat\",\"model\":\"stub:tiny\",\"engine\":\"stub\",\"drain\":{\"deadline\":\"5s\",\"stop_grace\":\"1s\"}}") Some(2) None None None"#,
        ),
        (None, r#"{"strategy":"overlap"}"#, "None None Some(Overlap) None None"),
    ] {
        let path = "/v1/pools/chat/reload";
        let (status, op) = match tag {
            Some(tag) => ask_if(tag, "POST", path, body).await,
            None => ask("POST", path, body).await,
        };
        assert_eq!((status, op["progress"].as_str().unwrap()), (202, expected), "{body}");
    }
}

#[tokio::test]
async fn what_cannot_be_declared_has_a_code_and_a_hint() {
    for (method, path, body, status, code) in [
        ("PUT", "chat", r#"{"id":"other","model":"stub:a","engine":"stub"}"#, 400, "INVALID_PARAMS"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"stub","slotz":1}"#, 400, "INVALID_PARAMS"),
        ("PUT", "chat", r#"{"engine":"stub"}"#, 400, "INVALID_PARAMS"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"stub","slots":0}"#, 400, "INVALID_PARAMS"),
        ("PUT", "chat", r#"{"model":"http://169.254.169.254/","engine":"stub"}"#, 422, "MODEL_REF_INVALID"),
        ("PUT", "chat", r#"{"model":"stub:a"}"#, 422, "MODEL_REF_INVALID"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"../x"}"#, 422, "ENGINE_UNKNOWN"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"stub","devices":"0,0"}"#, 422, "MASK_INVALID"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"stub","devices":["0"],"replicas":2}"#, 422, "MASK_INVALID"),
        ("PUT", "chat", r#"{"model":"stub:a","engine":"stub","tensor_split":"x"}"#, 422, "SPLIT_INVALID"),
        ("PUT", "chat?dry_run=perhaps", "{}", 400, "INVALID_PARAMS"),
        ("PUT", "other", r#"{"model":"stub:a","engine":"stub"}"#, 409, "POOL_IN_FILE"),
        ("POST", "chat/reload", r#"{"new_model_ref":"nonsense://x"}"#, 422, "MODEL_REF_INVALID"),
        ("POST", "chat/reload", r#"{"new_model_ref":"stub:a","model":"stub:a"}"#, 400, "INVALID_PARAMS"),
        ("POST", "chat/reload", r#"{"id":"other"}"#, 400, "INVALID_PARAMS"),
        ("POST", "chat/reload", r#"{"model":null}"#, 400, "INVALID_PARAMS"),
        ("POST", "chat/reload", r#"{"deadline_ms":0}"#, 400, "INVALID_PARAMS"),
        ("POST", "chat/reload", r#"{"deadline_ms":99999999999}"#, 400, "INVALID_PARAMS"),
        ("POST", "chat/reload", r#"{"strategy":"magic"}"#, 400, "INVALID_PARAMS"),
        ("POST", "none/reload", r#"{"slots":1}"#, 404, "POOL_NOT_FOUND"),
        ("DELETE", "none", "", 404, "POOL_NOT_FOUND"),
    ] {
        let (given, p) = ask(method, &format!("/v1/pools/{path}"), body).await;
        assert_eq!((given, p["code"].as_str()), (status, Some(code)), "{method} {path} {body}: {p}");
        assert!(status != 422 || p["hint"].is_string(), "{p}");
    }
    for tag in ["*", "W/\"1\"", "\"-1\"", "\"1\", \"2\""] {
        let (status, p) = ask_if(tag, "DELETE", "/v1/pools/chat", "").await;
        assert_eq!((status, p["code"].as_str()), (400, Some("INVALID_PARAMS")), "{tag}: {p}");
    }
}

async fn text(path: &str, after: Option<&str>) -> (u16, String) {
    let mut r = request("GET", path);
    if let Some(after) = after {
        r.headers_mut().insert("last-event-id", after.parse().unwrap());
    }
    let response = send(Fake::default(), r).await;
    let status = response.status().as_u16();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().into()).unwrap())
}

#[tokio::test]
async fn events_and_logs_are_streams_that_go_on_where_they_were_left() {
    let (status, all) = text("/v1/events?follow=false", None).await;
    assert_eq!(status, 200);
    assert!(all.contains("id: e-1\nevent: started\ndata: {\"event\":\"started\""), "{all}");
    for (path, after, there, gap) in [
        ("/v1/events?follow=false&tail=0", None, false, false),
        ("/v1/events?follow=false&pool_id=other", None, false, false),
        ("/v1/events?follow=false&pool_id=chat", Some("e-0"), true, false),
        ("/v1/events?follow=false", Some("e-1"), false, false),
        ("/v1/events?follow=false", Some("d-1"), true, true),
    ] {
        let (status, text) = text(path, after).await;
        assert_eq!(
            (status, text.contains("e-1"), text.contains("event: gap")),
            (200, there, gap),
            "{path} {after:?}: {text}"
        );
    }
    let (_, log) = text("/v1/pools/chat/logs?tail=2", None).await;
    assert!(log.contains("id: g7-2\ndata: chat-r0 7 line 2\n\nid: g7-3\n"), "{log}");
    assert!(!log.contains("line 1") && log.contains("line 3"), "{log}");
    let (_, rest) = text("/v1/pools/chat/logs?replica=r1", Some("g7-3")).await;
    assert!(rest.contains("id: g7-4\n") && !rest.contains("g7-3") && !rest.contains("event: generation"), "{rest}");
    let (_, older) = text("/v1/pools/chat/logs", Some("g6-3")).await;
    assert!(older.contains("event: generation\ndata: 7") && older.contains("id: g7-1\n"), "{older}");
    for (path, after, status) in [
        ("/v1/events?follow=perhaps", None, 400),
        ("/v1/events?since=1", None, 400),
        ("/v1/pools/chat/logs?replica=r9", None, 400),
        ("/v1/pools/chat/logs", Some("nonsense"), 400),
        ("/v1/pools/none/logs", None, 404),
    ] {
        assert_eq!(text(path, after).await.0, status, "{path}");
    }
}

#[tokio::test]
async fn the_node_at_a_glance() {
    let get = async |path: &str| json(send(Fake::default(), request("GET", path)).await).await;
    let can = get("/v1/capabilities").await;
    assert_eq!(
        (&can["models"][0], &can["slots_total"], &can["max_context"]),
        (&"tiny".into(), &8.into(), &8192.into())
    );
    assert_eq!((&can["workloads"][0], &can["version"]), (&"generate".into(), &"1.2.3".into()));
    let load = get("/v1/autoscale").await;
    assert_eq!((&load["pools"]["chat"]["demand"], &load["total"]["utilisation_percent"]), (&4.into(), &25.into()));
    // As two engines say.
    let told = |key: &str| load["pools"]["chat"][key].clone();
    assert_eq!(
        (told("engine_running"), told("engine_waiting"), told("kv_used_percent")),
        (4.into(), 2.into(), 25.into())
    );
    let targets = get("/v1/sd/prometheus").await;
    assert_eq!(
        (&targets[1]["targets"][0], &targets[1]["labels"]["replica_id"]),
        (&"127.0.0.1:42000".into(), &"r1".into())
    );
}
