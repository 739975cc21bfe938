//! A server on loopback that can be told to do anything a server can do wrong: it writes what it is told, byte for byte.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: BTreeMap<String, String>,
    /// How many came before it.
    pub(crate) nth: usize,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The first byte asked for.
    pub(crate) fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What becomes of the connection after an answer was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    Close,
    /// Nothing more is said, and nothing closed.
    Stall,
}

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    pub(crate) then: Then,
}

impl Reply {
    pub(crate) fn status(line: &str) -> Self {
        Self { head: format!("HTTP/1.1 {line}\r\ncontent-length: 0\r\n"), body: Vec::new(), then: Then::Close }
    }

    pub(crate) fn to(location: &str) -> Self {
        Self::status("302 Found").with("location", location)
    }

    pub(crate) fn json(text: &str) -> Self {
        Self::whole(text.as_bytes())
    }

    pub(crate) fn whole(body: &[u8]) -> Self {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n", body.len());
        Self { head, body: body.to_vec(), then: Then::Close }
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.head += &format!("{name}: {value}\r\n");
        self
    }

    /// Only so many bytes of the body are sent.
    pub(crate) fn only(mut self, bytes: usize) -> Self {
        self.body.truncate(bytes);
        self
    }

    pub(crate) fn then(mut self, then: Then) -> Self {
        self.then = then;
        self
    }
}

/// A file as a good server gives it: whole, or from a byte on if it is still the same.
pub(crate) fn file(seen: &Seen, content: &[u8], etag: &str) -> Reply {
    let same = seen.header("if-range").is_none_or(|tag| tag == etag);
    match seen.from().filter(|_| same) {
        Some(from) if from >= content.len() => {
            Reply::status("416 Range Not Satisfiable").with("content-range", &format!("bytes */{}", content.len()))
        }
        Some(from) => {
            let (last, total) = (content.len() - 1, content.len());
            let head = format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{last}/{total}\r\n",
                total - from
            );
            Reply { head, body: content[from..].to_vec(), then: Then::Close }.with("etag", etag)
        }
        None => Reply::whole(content).with("etag", etag),
    }
}

pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    seen: mpsc::UnboundedReceiver<Seen>,
    count: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::with_tls(None, answer).await
    }

    pub(crate) async fn with_tls(
        tls: Option<TlsAcceptor>,
        answer: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (tx, seen) = mpsc::unbounded_channel();
        let (answer, count) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&count);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, tx, count, tls) = (Arc::clone(&answer), tx.clone(), Arc::clone(&counter), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, &*answer, &tx, &count).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, &*answer, &tx, &count).await;
                            }
                        }
                    }
                });
            }
        });
        Self { addr, seen, count, task }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub(crate) fn requests(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// The requests since the last look.
    pub(crate) fn seen(&mut self) -> Vec<Seen> {
        std::iter::from_fn(|| self.seen.try_recv().ok()).collect()
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    answer: &(dyn Fn(&Seen) -> Reply + Send + Sync),
    tx: &mpsc::UnboundedSender<Seen>,
    count: &AtomicUsize,
) {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let target = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
    let headers = lines[1..].iter().filter_map(|l| l.split_once(": "));
    let headers = headers.map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect();
    let seen = Seen { target, headers, nth: count.fetch_add(1, Ordering::SeqCst) };
    let reply = answer(&seen);
    let _ = tx.send(seen);
    if reply.head.is_empty() {
        return std::future::pending().await;
    }
    let _ = stream.write_all(format!("{}connection: close\r\n\r\n", reply.head).as_bytes()).await;
    let _ = stream.write_all(&reply.body).await;
    let _ = stream.flush().await;
    match reply.then {
        Then::Close => drop(stream.shutdown().await),
        Then::Stall => std::future::pending().await,
    }
}
