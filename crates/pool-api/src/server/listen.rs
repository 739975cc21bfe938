//! Connections: how they come in, and what none of them may do to the others.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::Via;

/// Time for the head of a request, also for the first byte of the next one on a connection that is kept.
const HEAD: Duration = Duration::from_secs(30);
/// Time for the handshake of TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long an answer is kept for a client that takes none of it.
const STALL: Duration = Duration::from_secs(60);
/// Most headers of a request, and most bytes of its head.
const HEADERS: usize = 100;
pub(super) const HEAD_BYTES: usize = 64 * 1024;
/// After this, what could not be accepted for want of something is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// Where connections come in.
#[derive(Debug)]
pub enum Door {
    /// TCP; with TLS where there is a config, which is looked at for each connection.
    Tcp(TcpListener, Option<watch::Receiver<Arc<ServerConfig>>>),
    /// A socket that only the user of this id, and root, may use.
    Unix(UnixListener, u32),
}

enum Came {
    Tcp(TcpStream),
    Unix(tokio::net::UnixStream),
}

impl Door {
    async fn accept(&self) -> io::Result<Came> {
        match self {
            Self::Tcp(listener, _) => listener.accept().await.map(|(stream, _)| Came::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Came::Unix(stream)),
        }
    }
}

/// Serves until `closing`, and then until what runs is done. At most `most` connections are there at once; more wait to be
/// accepted.
pub async fn serve(door: Door, router: Router, most: usize, closing: CancellationToken) {
    let (room, mut connections) = (Arc::new(Semaphore::new(most)), JoinSet::new());
    loop {
        let came = tokio::select! {
            biased;
            () = closing.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            came = accept(&door, &room) => came,
        };
        let Some((came, permit)) = came else { continue };
        let (router, closing) = (router.clone(), closing.clone());
        let (tls, user) = match &door {
            Door::Tcp(_, Some(config)) => (Some(TlsAcceptor::from(Arc::clone(&config.borrow()))), 0),
            Door::Tcp(_, None) => (None, 0),
            Door::Unix(_, user) => (None, *user),
        };
        connections.spawn(async move {
            let _permit = permit;
            match came {
                Came::Tcp(stream) => tcp(stream, tls, router, closing).await,
                Came::Unix(stream) if ours(&stream, user) => connection(stream, Via::Unix, router, closing).await,
                Came::Unix(_) => tracing::warn!("a connection of another user to the socket was refused"),
            }
        });
    }
    drop(door);
    while connections.join_next().await.is_some() {}
}

async fn accept(door: &Door, room: &Arc<Semaphore>) -> Option<(Came, tokio::sync::OwnedSemaphorePermit)> {
    // Never closed.
    let permit = Arc::clone(room).acquire_owned().await.ok()?;
    match door.accept().await {
        Ok(came) => Some((came, permit)),
        Err(error) => {
            // One that was given up before it was taken, or too many open files: the door stays open.
            tracing::debug!(%error, "a connection was not accepted");
            sleep(AGAIN).await;
            None
        }
    }
}

/// The file's mode says so, too; this is also true of who opened it before it had that mode.
fn ours(stream: &tokio::net::UnixStream, user: u32) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == user || peer.uid() == 0)
}

async fn tcp(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, closing: CancellationToken) {
    let via = Via::Tcp(stream.local_addr().ok());
    // Events are small and wanted at once.
    let _ = stream.set_nodelay(true);
    match tls {
        None => connection(stream, via, router, closing).await,
        // The state of TLS takes kilobytes, which a connection without it is not to hold.
        Some(tls) => Box::pin(encrypted(stream, tls, via, router, closing)).await,
    }
}

async fn encrypted(stream: TcpStream, tls: TlsAcceptor, via: Via, router: Router, closing: CancellationToken) {
    match timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => connection(stream, via, router, closing).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    via: Via,
    router: Router,
    closing: CancellationToken,
) {
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(via);
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(HEADERS)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(Patient { stream, stalled: None }), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

/// A stream that breaks when the far side takes nothing for [`STALL`], so that whoever never reads holds nothing for ever.
struct Patient<S> {
    stream: S,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: Unpin> Patient<S> {
    fn judge<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(STALL)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judge(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.judge(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.judge(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use tokio::io::AsyncWriteExt;

    /// What a connection is told that says this and then nothing, and after how long.
    async fn told(said: &str) -> (String, Duration) {
        let (near, mut far) = tokio::io::duplex(1024 * 1024);
        let router = Router::new().route("/", axum::routing::get(async || "here"));
        tokio::spawn(connection(near, Via::Unix, router, CancellationToken::new()));
        let began = tokio::time::Instant::now();
        far.write_all(said.as_bytes()).await.unwrap();
        let mut all = String::new();
        let _ = tokio::io::AsyncReadExt::read_to_string(&mut far, &mut all).await;
        (all, began.elapsed())
    }

    #[tokio::test]
    async fn a_connection_without_tls_takes_little() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let task = tcp(stream, None, Router::new(), CancellationToken::new());
        // A thousand of them wait beside each other; hyper's buffers come on top.
        let bytes = std::mem::size_of_val(&task);
        assert!(bytes < 3072, "{bytes}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_a_time_a_size_and_a_number_of_headers() {
        for half in ["", "G", "GET / HTTP/1.1\r\nhost: localhost\r\nx: "] {
            let (answer, took) = told(half).await;
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{half}: {answer}");
            assert_eq!(took.as_secs(), HEAD.as_secs(), "{half}");
        }
        let (answer, took) = told("GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
        assert_eq!(took.as_secs(), HEAD.as_secs(), "one that is kept for nothing is closed, too");
        let many = "x: 1\r\n".repeat(HEADERS + 1);
        let (answer, took) = told(&format!("GET / HTTP/1.1\r\nhost: localhost\r\n{many}\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        assert_eq!(took, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_given_up_and_who_takes_a_little_is_not() {
        let (near, mut far) = tokio::io::duplex(4);
        let mut near = Patient { stream: near, stalled: None };
        near.write_all(b"full").await.unwrap();
        let slow = tokio::spawn(async move {
            let mut one = [0];
            for _ in 0..4 {
                sleep(STALL - Duration::from_secs(1)).await;
                tokio::io::AsyncReadExt::read_exact(&mut far, &mut one).await.unwrap();
            }
            far
        });
        near.write_all(b"more").await.unwrap();
        let _far = slow.await.unwrap();
        let error = near.write_all(b"and more").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let unread = poll_fn(|cx| Poll::Ready(Pin::new(&mut near).poll_write(cx, b"x").is_pending())).await;
        assert!(!unread, "once given up it stays so until something is taken");
    }
}
