//! One file, fetched into a partial one that the next try, or the next process, goes on with.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use pool_domain::download::{Ask, Held, Verdict};
use pool_domain::{Draw, RemoteSource, Sha256Digest};
use pool_services::ports::{Staging, StagingStep, StagingTold};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::http::{Http, Question, answer};
use super::listing::{At, RemoteFile};
use super::{Trouble, digest_of, disk, s3};
use crate::cache::{free_bytes, read_record};

/// Pieces that wait for the disk.
const QUEUE: usize = 16;
/// Bytes between two looks at the disk's free space.
const LOOK: u64 = 64 * 1024 * 1024;
/// Between two words about how far it is.
const TELL: Duration = Duration::from_millis(200);
/// The rate is of about so long.
const RATE_OVER: Duration = Duration::from_secs(5);

pub(crate) fn draw() -> Draw {
    Draw::new(fastrand::f64())
}

/// How far all files of a model together have come.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    told: &'a StagingTold,
    step: StagingStep,
    done: u64,
    total: Option<u64>,
    rate: f64,
    /// When the rate was looked at last, and what was done then.
    seen: (Instant, u64),
    said: Option<Instant>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(told: &'a StagingTold, step: StagingStep, total: Option<u64>) -> Self {
        Self { told, step, done: 0, total, rate: 0.0, seen: (Instant::now(), 0), said: None }
    }

    /// Bytes that were there already, or are of no use any more: they make no rate.
    pub(crate) fn set(&mut self, done: u64) {
        self.done = done;
        self.seen = (Instant::now(), done);
        self.tell();
    }

    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    pub(crate) fn expect(&mut self, total: Option<u64>) {
        self.total = total;
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        let (at, done) = self.seen;
        let passed = at.elapsed();
        if passed >= TELL {
            let now = (self.done - done) as f64 / passed.as_secs_f64();
            let weight = (passed.as_secs_f64() / RATE_OVER.as_secs_f64()).min(1.0);
            self.rate = if self.rate == 0.0 { now } else { self.rate + (now - self.rate) * weight };
            self.seen = (Instant::now(), self.done);
        }
        if self.said.is_none_or(|said| said.elapsed() >= TELL) {
            self.tell();
        }
    }

    /// The last word is the whole of it.
    pub(crate) fn tell(&mut self) {
        self.said = Some(Instant::now());
        let rate = self.rate as u64;
        self.told.send_replace(Some(Staging { step: self.step, done: self.done, total: self.total, rate }));
    }
}

/// Where a file grows.
#[derive(Debug, Clone)]
pub(crate) struct Partial {
    /// What is here of it.
    pub(crate) path: PathBuf,
    /// What that is of.
    pub(crate) record: PathBuf,
    /// Held by whoever may write it: also by a write that is still under way when nobody waits for it any more.
    pub(crate) lock: Arc<File>,
    /// Bytes that are left to others on the disk.
    pub(crate) reserve: u64,
    /// Most bytes it may come to, where its size is never told.
    pub(crate) most: u64,
    /// Makes room for so many bytes more, where they are told only now.
    pub(crate) room: MakeRoom,
}

/// Makes room on the disk, on a thread of its own.
#[derive(Clone)]
pub(crate) struct MakeRoom(pub(crate) Arc<dyn Fn(u64) -> Result<(), Trouble> + Send + Sync>);

impl std::fmt::Debug for MakeRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MakeRoom")
    }
}

/// What a partial file is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    model: String,
    name: String,
    digest: Option<String>,
    validator: Option<String>,
    total: Option<u64>,
}

/// A file that grows, and its digest.
struct Sink {
    file: File,
    hasher: Sha256,
    bytes: u64,
    _lock: Arc<File>,
    dir: PathBuf,
    reserve: u64,
}

impl Partial {
    /// What is here from an earlier try, if it is of the same.
    fn open(&self, source: &RemoteSource, wanted: &RemoteFile) -> Result<(Sink, Held), Trouble> {
        let digest = wanted.digest.map(|d| d.to_string());
        let same = |r: &Record| r.model == source.to_string() && r.name == wanted.name && r.digest == digest;
        let record = read_record::<Record>(&self.record).filter(same);
        let io = |e: std::io::Error| disk(&e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(record.is_none())
            .open(&self.path)
            .map_err(io)?;
        let (mut hasher, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    bytes += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(disk(&e)),
            }
        }
        let (validator, total) = record.map_or((None, None), |r| (r.validator, r.total));
        let held = Held { bytes, validator, total, digest_known: wanted.digest.is_some() };
        let dir = self.path.parent().unwrap_or(&self.path).to_owned();
        Ok((Sink { file, hasher, bytes, _lock: Arc::clone(&self.lock), dir, reserve: self.reserve }, held))
    }

    /// Written before the first byte, so that whoever comes after a sudden end knows what is here.
    fn note(&self, source: &RemoteSource, wanted: &RemoteFile, held: &Held) -> Result<(), Trouble> {
        let record = Record {
            model: source.to_string(),
            name: wanted.name.clone(),
            digest: wanted.digest.map(|d| d.to_string()),
            validator: held.validator.clone(),
            total: held.total,
        };
        let text = serde_json::to_vec(&record).unwrap_or_default();
        fs::write(&self.record, text).map_err(|e| disk(&e))
    }

    pub(crate) fn remove(&self) {
        // What is left takes room and does no harm: it is looked at before it is used.
        let _ = (fs::remove_file(&self.path), fs::remove_file(&self.record));
    }
}

impl Sink {
    fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), Trouble> {
        let before = self.bytes / LOOK;
        self.file.write_all(piece).map_err(|e| disk(&e))?;
        self.hasher.update(piece);
        self.bytes += piece.len() as u64;
        if self.bytes / LOOK != before && free_bytes(&self.dir).is_ok_and(|free| free < self.reserve) {
            return Err(Trouble::Node("the disk of the model cache is almost full".into()));
        }
        Ok(())
    }
}

/// A file that is here and whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fetched {
    pub(crate) bytes: u64,
    pub(crate) digest: Sha256Digest,
}

/// Fetches a file, for as long as that brings something, and compares it with its digest.
pub(crate) async fn fetch_file(
    http: &Http,
    source: &RemoteSource,
    wanted: &RemoteFile,
    partial: &Partial,
    progress: &mut Progress<'_>,
) -> Result<Fetched, Trouble> {
    let (there, source_, wanted_) = (partial.clone(), source.clone(), wanted.clone());
    let opened = blocking(move || there.open(&source_, &wanted_)).await?;
    let (mut sink, mut held) = opened?;
    let (mut patience, base) = (http.limits.patience(), progress.done());
    let mut resumed = held.bytes > 0;
    progress.set(base + held.bytes);
    loop {
        let before = held.bytes;
        let (back, tried) = attempt(http, source, wanted, partial, sink, &mut held, progress, base).await?;
        sink = back;
        let (why, after) = match tried {
            Ok(Tried::Whole) => {
                let digest = digest_of(std::mem::take(&mut sink.hasher));
                if wanted.digest.is_none_or(|expected| expected == digest) {
                    let bytes = sink.bytes;
                    let synced = blocking(move || sink.file.sync_all()).await?;
                    synced.map_err(|e| disk(&e))?;
                    return Ok(Fetched { bytes, digest });
                }
                sink.restart().map_err(|e| disk(&e))?;
                held.bytes = 0;
                progress.set(base);
                if !std::mem::take(&mut resumed) {
                    partial.remove();
                    let why = format!("its content is not what its digest says: it is sha256:{digest}");
                    return Err(Trouble::Never(why));
                }
                // What was here before may have been the wrong part of it.
                continue;
            }
            Ok(Tried::Short(why)) => (why, None),
            Ok(Tried::Again) => (format!("{} keeps changing it", host(wanted)), None),
            Err(Trouble::Later(why, after)) => (why, after),
            Err(other) => return Err(other),
        };
        resumed |= held.bytes > 0;
        match patience.next(held.bytes.saturating_sub(before), after, draw()) {
            Some(wait) => {
                tracing::debug!(model = %source, %why, wait_ms = wait.as_millis() as u64, "trying again to fetch a model");
                tokio::time::sleep(wait).await;
            }
            None => return Err(Trouble::Later(why, after)),
        }
    }
}

fn host(wanted: &RemoteFile) -> String {
    match &wanted.at {
        At::Url(url) => url.origin().host.to_string(),
        At::S3 { bucket, .. } => format!("bucket {bucket}"),
    }
}

/// How a try ended that is no trouble of its own.
enum Tried {
    Whole,
    /// What is here was of another content.
    Again,
    /// Not all of it came.
    Short(String),
}

#[expect(clippy::too_many_arguments, reason = "one step of the loop above")]
async fn attempt(
    http: &Http,
    source: &RemoteSource,
    wanted: &RemoteFile,
    partial: &Partial,
    mut sink: Sink,
    held: &mut Held,
    progress: &mut Progress<'_>,
    base: u64,
) -> Result<(Sink, Result<Tried, Trouble>), Trouble> {
    let url = match &wanted.at {
        At::Url(url) => url.clone(),
        At::S3 { bucket, key } => s3::address(http, bucket, key).await?,
    };
    let mut question = Question::default();
    if let Ask::From { first, if_range } = held.ask() {
        question = question.with(header::RANGE, format!("bytes={first}-"));
        if let Some(validator) = if_range {
            question = question.with(header::IF_RANGE, validator);
        }
    }
    let response = match http.get(source, &url, &question).await {
        Ok(response) => response,
        Err(trouble) => return Ok((sink, Err(trouble))),
    };
    let answer = answer(&response);
    let total = match held.judge(wanted.bytes, &answer) {
        Verdict::Complete => return Ok((sink, Ok(Tried::Whole))),
        Verdict::Refused(refusal) => return Ok((sink, Err(refusal.into()))),
        Verdict::Later(after) => {
            let why = format!("{} answers with status {}", url.origin().host, answer.status);
            return Ok((sink, Err(Trouble::Later(why, after))));
        }
        Verdict::Drop => {
            sink.restart().map_err(|e| disk(&e))?;
            (held.bytes, held.validator, held.total) = (0, None, None);
            progress.set(base);
            return Ok((sink, Ok(Tried::Again)));
        }
        Verdict::Append => held.total.or(wanted.bytes),
        Verdict::StartOver { total } => {
            sink.restart().map_err(|e| disk(&e))?;
            (held.bytes, held.validator, held.total) = (0, answer.validator, total);
            partial.note(source, wanted, held)?;
            progress.set(base);
            if wanted.bytes.is_none() {
                progress.expect(total.map(|total| base + total));
            }
            total
        }
    };
    // Whose size the repository told has its room by now.
    if let (Some(total), None) = (total, wanted.bytes) {
        let (room, missing) = (partial.room.clone(), total.saturating_sub(sink.bytes));
        if let Err(none) = blocking(move || (room.0)(missing)).await? {
            return Ok((sink, Err(none)));
        }
    }
    let body = response.into_body();
    let (sink, came) = pour(http, body, sink, total.unwrap_or(partial.most), progress).await?;
    held.bytes = sink.bytes;
    let tried = match came {
        Err(Trouble::Later(why, _)) => Ok(Tried::Short(format!("{} {why}", url.origin().host))),
        Err(other) => Err(other),
        Ok(()) => match total {
            Some(total) if sink.bytes < total => {
                Ok(Tried::Short(format!("{} sent {} of {total} bytes", url.origin().host, sink.bytes)))
            }
            _ => Ok(Tried::Whole),
        },
    };
    Ok((sink, tried))
}

/// From the wire to the disk, at the speed of the slower one.
async fn pour(
    http: &Http,
    mut body: Incoming,
    mut sink: Sink,
    most: u64,
    progress: &mut Progress<'_>,
) -> Result<(Sink, Result<(), Trouble>), Trouble> {
    let (tx, mut rx) = mpsc::channel::<Bytes>(QUEUE);
    let mut room = most.saturating_sub(sink.bytes);
    let writer = tokio::task::spawn_blocking(move || {
        let mut written = Ok(());
        while let Some(piece) = rx.blocking_recv() {
            written = sink.write(&piece);
            if written.is_err() {
                break;
            }
        }
        (sink, written)
    });
    let limits = &http.limits;
    let (mut since, mut came) = (Instant::now(), 0u64);
    let mut heard = since;
    let read = loop {
        let frame = match timeout(TELL.min(limits.stall), body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                break Err(Trouble::later(format!("cut the connection: {}", super::connect::words(&error))));
            }
            Ok(None) => break Ok(()),
            Err(_) if heard.elapsed() >= limits.stall => break Err(Trouble::later("sends nothing any more")),
            Err(_) => {
                progress.add(0);
                continue;
            }
        };
        heard = Instant::now();
        let Ok(piece) = frame.into_data() else { continue };
        let bytes = piece.len() as u64;
        if bytes > room {
            break Err(Trouble::Never("the server sends more than it said, or than there is room for".into()));
        }
        room -= bytes;
        // The writer ends before only if it cannot write.
        if tx.send(piece).await.is_err() {
            break Ok(());
        }
        progress.add(bytes);
        came += bytes;
        if since.elapsed() >= limits.stall {
            if came < limits.stall_bytes {
                break Err(Trouble::later("sends almost nothing any more"));
            }
            (since, came) = (Instant::now(), 0);
        }
    };
    drop(tx);
    progress.tell();
    let (sink, written) = writer.await.map_err(|_| Trouble::later("the writing of the model did not end"))?;
    Ok((sink, written.and(read)))
}

/// Off the threads that others wait on.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Trouble> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Trouble::later("work on the model cache did not end"))
}
