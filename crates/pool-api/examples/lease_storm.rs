//! 10,000 lease calls at once against 64 slots, over HTTP, beside a bare axum handler in the same run.
//!
//! `cargo run --release -p pool-api --example lease_storm`
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench may panic, and prints its table")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::post;
use pool_api::gateway::Gateway;
use pool_api::metrics::Metrics;
use pool_api::server::{self, Access, AppState, Door, Flags, History, LogPart, Logs, NodeInfo, router};
use pool_domain::{Generation, ReplicaKey};
use pool_services::{PoolControl, PoolManager, PoolSnapshot, PoolSpec};
use pool_testkit::{FakeNode, spec, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Barrier;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const CALLS: usize = 10_000;
const REPLICAS: u16 = 16;
const SLOTS: usize = 64;
/// A call that takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);

struct Reply {
    status: u16,
    head: String,
    body: String,
    took: Duration,
}

async fn call(socket: &mut TcpStream, request: &str) -> Reply {
    let began = Instant::now();
    socket.write_all(request.as_bytes()).await.unwrap();
    let (mut text, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let n = socket.read(&mut part).await.unwrap();
        assert!(n > 0, "the connection was closed");
        text.extend_from_slice(&part[..n]);
        let seen = String::from_utf8_lossy(&text);
        let Some((head, body)) = seen.split_once("\r\n\r\n") else { continue };
        let head = head.to_ascii_lowercase();
        let length = head.split("content-length: ").nth(1).and_then(|l| l.split("\r\n").next()?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            return Reply { status, body: body.to_owned(), head: head.clone(), took: began.elapsed() };
        }
    }
}

fn request(addr: SocketAddr, method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Every connection is open before the first call; then all call at once. `hold`: a lease is given back after this.
async fn storm(addr: SocketAddr, path: &'static str, body: String, hold: Option<Duration>) -> (Vec<Reply>, usize) {
    let mut sockets = Vec::new();
    for _ in 0..CALLS {
        sockets.push(TcpStream::connect(addr).await.unwrap());
    }
    let (start, held, most) =
        (Arc::new(Barrier::new(CALLS)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut tasks = Vec::new();
    for mut socket in sockets {
        let (start, held, most, body) = (Arc::clone(&start), Arc::clone(&held), Arc::clone(&most), body.clone());
        tasks.push(tokio::spawn(async move {
            start.wait().await;
            let reply = tokio::time::timeout(HANGS, call(&mut socket, &request(addr, "POST", path, &body))).await;
            let reply = reply.expect("no call hangs");
            if reply.status == 201 {
                most.fetch_max(held.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                if let Some(hold) = hold {
                    let id = reply.body.split("\"lease_id\":\"").nth(1).unwrap().split('"').next().unwrap();
                    tokio::time::sleep(hold).await;
                    held.fetch_sub(1, Ordering::SeqCst);
                    let gone = request(addr, "DELETE", &format!("/v1/leases/{id}"), "");
                    assert_eq!(call(&mut socket, &gone).await.status, 204);
                }
            }
            (reply, socket)
        }));
    }
    let mut replies = Vec::new();
    let mut sockets = Vec::new();
    for c in tasks {
        let (reply, socket) = c.await.unwrap();
        replies.push(reply);
        sockets.push(socket);
    }
    (replies, most.load(Ordering::SeqCst))
}

fn row(what: &str, replies: &[Reply], most: usize) {
    let mut took: Vec<Duration> = replies.iter().map(|r| r.took).collect();
    took.sort_unstable();
    let ms = |share: usize| took[took.len() * share / 1000 - 1].as_secs_f64() * 1e3;
    let count = |status| replies.iter().filter(|r| r.status == status).count();
    println!(
        "| {what} | {} | {} | {} | {most} | {:.0} | {:.0} | {:.0} |",
        count(201) + count(200),
        count(429),
        count(503),
        ms(500),
        ms(990),
        ms(1000)
    );
    for r in replies.iter().filter(|r| r.status >= 400) {
        assert!(matches!(r.status, 429 | 503) && r.head.contains("retry-after: "), "{}\n{}", r.head, r.body);
    }
}

async fn serve(app: Router) -> SocketAddr {
    let listener = tokio::net::TcpSocket::new_v4().unwrap();
    listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = listener.listen(4096).unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(server::serve(Door::Tcp(listener, None), app, 2 * CALLS, CancellationToken::new()));
    addr
}

#[derive(Debug)]
struct NoLogs;

#[async_trait::async_trait]
impl Logs for NoLogs {
    async fn last(&self, _: &ReplicaKey, _: Generation, _: usize) -> LogPart {
        LogPart::default()
    }
    async fn after(&self, _: &ReplicaKey, _: Generation, _: u64) -> LogPart {
        LogPart::default()
    }
}

async fn pool() -> PoolManager {
    let node = FakeNode::default();
    let spec = PoolSpec { replicas: REPLICAS, vram: Some(1 << 29), ..spec("chat") };
    let (manager, mut events) = node.manage(vec![spec]).await;
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let ready = until(&manager, &"chat".parse().unwrap(), |p: &PoolSnapshot| p.replicas.iter().all(|r| r.ready)).await;
    assert_eq!(ready.replicas.iter().map(|r| r.slots_total as usize).sum::<usize>(), SLOTS);
    manager
}

/// The clients have a process of their own: each end of a connection is an open file.
async fn storm_elsewhere(what: &str, addr: SocketAddr, body: &str, hold_ms: u64) {
    let args = [what, &addr.to_string(), body, &hold_ms.to_string()].map(str::to_owned);
    let program = std::env::current_exe().unwrap();
    let ended = tokio::task::spawn_blocking(move || std::process::Command::new(program).args(args).status());
    assert!(ended.await.unwrap().unwrap().success());
}

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [what, addr, body, hold_ms] = &args[..] {
        let hold = Some(Duration::from_millis(hold_ms.parse().unwrap())).filter(|h| !h.is_zero());
        let (replies, most) = storm(addr.parse().unwrap(), "/v1/pools/chat/leases", body.clone(), hold).await;
        row(what, &replies, most);
        let granted = replies.iter().filter(|r| r.status == 201).count();
        assert!(most <= SLOTS, "more leases than slots");
        assert!(hold.is_some() || granted == 0 || granted == SLOTS, "{granted} were granted");
        return;
    }
    println!(
        "| {CALLS} calls at once, {SLOTS} slots | granted | 429 | 503 | held at once | p50 ms | p99 ms | worst ms |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let bare = serve(Router::new().route("/v1/pools/chat/leases", post(|_: String| async { "{}" }))).await;
    storm_elsewhere("bare axum handler", bare, "{}", 0).await;
    for (what, body, hold_ms) in
        [("no wait, nothing given back", "{}", 0), ("wait 10 s, given back after 5 ms", r#"{"wait_ms":10000}"#, 5)]
    {
        let manager = pool().await;
        let state = AppState {
            config: None,
            control: Arc::new(manager.clone()) as Arc<dyn PoolControl>,
            info: NodeInfo::default(),
            metrics: Arc::new(Metrics::default()),
            flags: Arc::new(Flags::default()),
            gateway: Gateway::new(Arc::new(manager.clone()), Duration::ZERO),
            seal: None,
            access: Access::Open,
            feed: History::begin(String::new()).1,
            logs: Arc::new(NoLogs),
            closing: CancellationToken::new(),
        };
        let addr = serve(router(Arc::new(state))).await;
        storm_elsewhere(what, addr, body, hold_ms).await;
        assert!(manager.shutdown(Duration::from_secs(10)).await);
    }
}
