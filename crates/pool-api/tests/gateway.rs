//! The gateway before engines that say exactly what they are told to.
#![allow(clippy::unwrap_used, reason = "a helper of tests may fail them")]

mod common;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use axum::http::{Request, header};
use common::{Fake, id, state};
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use pool_api::gateway::Gateway;
use pool_api::server::{self, AppState, Door, router};
use pool_domain::{Generation, Holder, PoolId, ReplicaId, ReplicaKey};
use pool_services::admission::Admission;
use pool_services::control::Lease;
use pool_services::{ControlError, EventKind, Flow, Route, Routing};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Sends each request to the next of these addresses.
#[derive(Debug)]
struct Script {
    admission: Arc<Admission>,
    endpoints: Vec<String>,
    routed: AtomicUsize,
    told: mpsc::UnboundedSender<EventKind>,
}

#[async_trait]
impl Routing for Script {
    fn named(&self, model: &str) -> Result<Vec<PoolId>, ControlError> {
        Ok((model == "chat").then(|| id("chat")).into_iter().collect())
    }
    async fn route(&self, pool: &PoolId, _: Duration, _: &Holder) -> Result<Route, ControlError> {
        let n = self.routed.fetch_add(1, Ordering::Relaxed);
        Ok(Route {
            key: ReplicaKey { pool: pool.clone(), replica: ReplicaId(0) },
            generation: Generation(7),
            endpoint: self.endpoints[n.min(self.endpoints.len() - 1)].clone(),
            api_key: None,
            flow: Flow::of(Arc::clone(&self.admission)),
            slot: Some(self.admission.acquire().map_err(|_| ControlError::Draining)?),
        })
    }
    async fn follow(&self, lease: &str, _: &pool_domain::Holder) -> Result<(Lease, Route), ControlError> {
        Err(ControlError::LeaseNotFound(lease.to_owned()))
    }
    fn tell(&self, _: &ReplicaKey, _: Generation, kind: EventKind) {
        let _ = self.told.send(kind);
    }
}

struct Site {
    addr: String,
    script: Arc<Script>,
    told: mpsc::UnboundedReceiver<EventKind>,
}

/// Serves the gateway before these engines.
async fn site(endpoints: Vec<String>) -> Site {
    let admission = Arc::new(<Admission>::default());
    admission.open(Generation(7), 4);
    let (tx, told) = mpsc::unbounded_channel();
    let script = Arc::new(Script { admission, endpoints, routed: AtomicUsize::new(0), told: tx });
    let gateway = Gateway::new(Arc::clone(&script) as Arc<_>, Duration::from_secs(1));
    let state = Arc::new(AppState { gateway, ..Arc::into_inner(state(Fake::default())).unwrap() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    tokio::spawn(server::serve(Door::Tcp(listener, None), router(state), 64, CancellationToken::new()));
    Site { addr, script, told }
}

/// An engine that takes connections, reads one request on each, says the next of these, and hangs up. What it read comes
/// out of the channel.
async fn engine(answers: &[&'static str]) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (tx, requests) = mpsc::unbounded_channel();
    let mut answers: VecDeque<_> = answers.iter().copied().collect();
    tokio::spawn(async move {
        while let Some(answer) = answers.pop_front() {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = tx.send(read_request(&mut socket).await);
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (endpoint, requests)
}

/// A request whose body is announced, or ends with trailers or without.
async fn read_request(socket: &mut TcpStream) -> String {
    let mut all = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&all).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse::<usize>().ok());
            if length.map_or_else(|| body.ends_with("\r\n\r\n"), |n| body.len() >= n) {
                return text;
            }
        }
        assert!(socket.read_buf(&mut all).await.unwrap() > 0, "{text}");
    }
}

const BODY: &str = r#"{"model":"chat"}"#;

/// Says this and reads until the end.
async fn ask(addr: &str, headers: &str, body: &str) -> String {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    let length =
        if headers.contains("chunked") { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let request = format!(
        "POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n{headers}{length}\r\n{body}"
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    // Who broke off may have reset the connection.
    let _ = socket.read_to_end(&mut all).await;
    String::from_utf8(all).unwrap()
}

fn nobody() -> String {
    // Nobody listens on an address that was just given up.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn who_takes_no_connection_is_passed_over_but_who_took_one_is_not_asked_twice() {
    let (good, _requests) = engine(&["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]).await;
    let mut site = site(vec![nobody(), nobody(), good]).await;
    assert!(ask(&site.addr, "", BODY).await.ends_with("\r\n\r\n{}"));
    assert_eq!(site.script.routed.load(Ordering::Relaxed), 3);
    assert_eq!(site.script.admission.in_use(), 0);
    assert!(site.script.admission.flow() > 0, "what comes from an engine shows that it lives");
    assert!(site.told.try_recv().is_err(), "it was no stream");

    let site = self::site(vec![nobody()]).await;
    let given_up = ask(&site.addr, "", BODY).await;
    assert!(given_up.starts_with("HTTP/1.1 502") && given_up.contains("ENGINE_FAILED"), "{given_up}");
    assert!(given_up.contains("retry-after: 1"), "{given_up}");
    assert_eq!((site.script.routed.load(Ordering::Relaxed), site.script.admission.in_use()), (3, 0));

    let (mute, mut requests) = engine(&["", ""]).await;
    let site = self::site(vec![mute]).await;
    let lost = ask(&site.addr, "", BODY).await;
    assert!(lost.starts_with("HTTP/1.1 502"), "{lost}");
    assert!(requests.recv().await.is_some());
    assert_eq!(site.script.routed.load(Ordering::Relaxed), 1, "it may have seen it");
    assert!(requests.try_recv().is_err());
}

#[tokio::test]
async fn headers_of_one_connection_end_here_and_trailers_pass_both_ways() {
    let answer = "HTTP/1.1 201 Fine\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\nconnection: x-hop\r\nx-hop: 1\r\n\
        x-request-id: theirs\r\nx-kept: yes\r\n\r\n2\r\n{}\r\n0\r\nx-sum: 7\r\n\r\n";
    let (endpoint, mut requests) = engine(&[answer]).await;
    let site = site(vec![endpoint]).await;
    let headers = "transfer-encoding: chunked\r\ntrailer: x-check\r\nte: trailers\r\nauthorization: Bearer secret\r\n\
        x-pool-wait-ms: 5\r\nx-request-id: mine\r\nopenai-organization: o\r\n";
    let body = "6\r\n{\"mode\r\na\r\nl\":\"chat\"}\r\n0\r\nx-check: 9\r\n\r\n";
    let answer = ask(&site.addr, headers, body).await.to_ascii_lowercase();
    assert!(
        answer.starts_with("http/1.1 201") && answer.contains("x-kept: yes") && answer.contains("x-sum: 7"),
        "{answer}"
    );
    assert!(!answer.contains("x-hop") && answer.contains("x-request-id: mine"), "{answer}");
    let seen = requests.recv().await.unwrap().to_ascii_lowercase();
    assert!(seen.starts_with("post /v1/chat/completions?a=b http/1.1\r\n"), "{seen}");
    for part in ["{\"model\":\"chat\"}", "x-check: 9", "te: trailers", "x-request-id: mine", "openai-organization: o"] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    for part in ["secret", "x-pool-wait-ms", "connection: close", &site.addr] {
        assert!(!seen.contains(part), "{part}: {seen}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_broken_off_unless_an_event_can_tell() {
    const HALF: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{\"half\":";
    const EVENTS: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n\
        b\r\ndata: {}\n\n\n\r\n";
    let (endpoint, _requests) = engine(&[HALF, EVENTS, EVENTS]).await;
    let mut site = site(vec![endpoint]).await;
    let half = ask(&site.addr, "", BODY).await;
    assert!(half.ends_with("{\"half\":"), "nothing is added to it: {half}");
    let events = ask(&site.addr, "", BODY).await;
    assert!(events.contains("data: {}") && events.contains("\"code\":\"ENGINE_FAILED\""), "{events}");
    assert!(events.ends_with("0\r\n\r\n"), "{events}");
    let mut kinds = Vec::new();
    while let Ok(kind) = site.told.try_recv() {
        kinds.push(kind);
    }
    let [EventKind::StreamStarted { request, .. }, EventKind::StreamEnded { outcome, bytes, request: same, .. }] =
        &kinds[..]
    else {
        panic!("{kinds:?}");
    };
    assert_eq!((*outcome, *bytes, request), ("engine_failed", 11, same));
    assert_eq!(site.script.admission.in_use(), 0);

    let request = BODY.to_owned();
    let mut socket = TcpStream::connect(&site.addr).await.unwrap();
    let head = format!(
        "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        request.len()
    );
    socket.write_all((head + &request).as_bytes()).await.unwrap();
    let mut text = String::new();
    let _ = socket.read_to_string(&mut text).await;
    assert!(text.contains("event: error\ndata: {\"error\":{") && text.contains("\"type\":\"api_error\""), "{text}");
}

#[tokio::test]
async fn a_body_in_pieces_goes_on_whole_and_one_without_end_does_not() {
    let large = format!("{{\"prompt\":\"{}\",\"model\":\"chat\"}}", "x".repeat(3_000_000));
    let (endpoint, mut requests) = engine(&["HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]).await;
    let site = site(vec![endpoint]).await;
    assert!(ask(&site.addr, "", &large).await.starts_with("HTTP/1.1 200"));
    let seen = requests.recv().await.unwrap();
    assert!(seen.split_once("\r\n\r\n").unwrap().1 == large, "another body");

    let endless = "100000\r\n".to_owned() + &"x".repeat(0x10_0000) + "\r\n";
    let mut socket = TcpStream::connect(&site.addr).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..33 {
        if socket.write_all(endless.as_bytes()).await.is_err() {
            break;
        }
    }
    let mut status = [0; 12];
    socket.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}

fn slow(body: Body) -> Request<Body> {
    Request::post("/v1/completions").header(header::HOST, "localhost").body(body).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for_for_ever() {
    let (mut sender, body) = Channel::<axum::body::Bytes, std::convert::Infallible>::new(1);
    let router = router(state(Fake::default()));
    let drip = async {
        while sender.send_data("x".into()).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(29)).await;
        }
    };
    let asked = router.clone().oneshot(slow(Body::new(body)));
    let (response, ()) = tokio::join!(asked, drip);
    let response = response.unwrap();
    assert_eq!(response.status(), 408);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).contains("\"type\":\"invalid_request_error\""));
    let (_sender, body) = Channel::<axum::body::Bytes, std::convert::Infallible>::new(1);
    assert_eq!(router.oneshot(slow(Body::new(body))).await.unwrap().status(), 408);
}
