//! Runs the real daemon and talks to it as a user would: over HTTP and with signals.
#![allow(dead_code, unreachable_pub, missing_debug_implementations, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a test outside the daemon has no tokio clock; bounds are wall time"
)]

pub mod browser;
pub mod nvml;
pub mod stream;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest any wait may take; nothing is measured by it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The daemon's binary.
pub fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pool-managerd"));
    // Where the locks of engines lie, by the name of each state directory.
    command.env("XDG_RUNTIME_DIR", concat!(env!("CARGO_TARGET_TMPDIR"), "/runtime"));
    command
}

/// Every engine that was started in a directory; a test that fails leaves none of them.
pub struct Engines {
    run: PathBuf,
    /// Also when the directory is gone by then.
    seen: std::cell::RefCell<Vec<Value>>,
}

impl Engines {
    pub fn of(daemon: &Daemon) -> Self {
        Self { run: daemon.dir().join("state/run"), seen: Default::default() }
    }

    /// What the shims say that they started.
    pub fn starts(&self) -> Vec<Value> {
        let below =
            |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
        let generations = below(&self.run).into_iter().flat_map(|replica| below(&replica));
        let read = |dir: PathBuf| serde_json::from_slice(&fs::read(dir.join("start.json")).ok()?).ok();
        let starts: Vec<Value> = generations.filter_map(read).collect();
        self.seen.borrow_mut().extend(starts.iter().cloned());
        starts
    }

    /// Main processes that live.
    pub fn running(&self) -> Vec<u32> {
        let mains = self.starts().into_iter().filter_map(|s| s["pid"].as_u64()?.try_into().ok());
        mains.filter(|pid| alive(*pid)).collect()
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        self.starts();
        for start in self.seen.take() {
            let shim = u32::try_from(start["shim_pid"].as_u64().unwrap_or(0)).unwrap_or(0);
            let environment = fs::read(format!("/proc/{shim}/environ")).unwrap_or_default();
            let nonce = start["nonce"].as_str().unwrap_or("none");
            if alive(shim) && String::from_utf8_lossy(&environment).contains(nonce) {
                signal(shim, "USR1");
            }
        }
    }
}

/// A running daemon in a directory of its own.
pub struct Daemon {
    child: Child,
    addr: String,
    dir: tempfile::TempDir,
    log: mpsc::Receiver<String>,
    seen: Vec<String>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// One request on a connection of its own.
pub fn request(addr: &str, method: &str, path: &str, body: Option<&str>) -> Answer {
    request_with(addr, method, path, "", body)
}

/// The same with further headers, each with its end of line.
pub fn request_with(addr: &str, method: &str, path: &str, headers: &str, body: Option<&str>) -> Answer {
    let mut s = TcpStream::connect(addr).unwrap();
    s.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = body.unwrap_or("");
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    write!(
        s,
        "{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{headers}{kind}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = Vec::new();
    let mut part = [0; 16 * 1024];
    // Not every server closes a connection when it is asked to.
    while !is_whole(&text) {
        match s.read(&mut part).unwrap() {
            0 => break,
            n => text.extend_from_slice(&part[..n]),
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let body =
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_owned() };
    Answer { status, head: head.to_owned(), body }
}

/// Whether an answer that says how long it is is there.
fn is_whole(text: &[u8]) -> bool {
    let Some(end) = text.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&text[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| text.len() >= end + 4 + length)
}

fn unchunk(mut text: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let n = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if n == 0 || rest.len() < n {
            break;
        }
        out.push_str(&rest[..n]);
        text = rest[n..].trim_start_matches("\r\n");
    }
    out
}

impl Daemon {
    /// Starts `serve` on simulated GPUs with these pools (and whatever else the text declares).
    pub fn start(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, config)
    }

    pub fn start_in(dir: tempfile::TempDir, config: &str) -> Self {
        write_config(dir.path(), config);
        Self::start_in_place(dir)
    }

    /// With the config that lies in the directory.
    pub fn start_in_place(dir: tempfile::TempDir) -> Self {
        Self::start_as(binary(), dir)
    }

    /// In a session of its own: SIGHUP means another thing to a daemon that was started from a terminal, as a person's
    /// tests are.
    pub fn start_without_terminal(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), config);
        let daemon = binary();
        let mut command = Command::new("setsid");
        command.arg(daemon.get_program()).envs(daemon.get_envs().filter_map(|(k, v)| Some((k, v?))));
        Self::start_as(command, dir)
    }

    /// By a command of the caller's, to which what it serves is added.
    pub fn start_as(mut command: Command, dir: tempfile::TempDir) -> Self {
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(dir.path().join("pool-managerd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tx, log) = mpsc::channel();
        let stderr = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if tx.send(line).is_err() {
                    return;
                }
            }
        });
        let mut daemon = Self { child, addr: String::new(), dir, log, seen: Vec::new() };
        let line = daemon.wait_log("the API listens");
        // In the log for people and in that for programs.
        let port = line.split("127.0.0.1:").nth(1).unwrap().split(|c: char| !c.is_ascii_digit()).next().unwrap();
        daemon.addr = format!("127.0.0.1:{port}");
        daemon
    }

    /// Kills it as `kill -9` does, and gives its directory back.
    pub fn kill(mut self, engines: &Engines) -> tempfile::TempDir {
        engines.starts();
        self.signal("KILL");
        self.child.wait().unwrap();
        self.into_dir()
    }

    /// Asks it to stop, and gives its exit code and its directory back.
    pub fn end(mut self, engines: &Engines) -> (Option<i32>, tempfile::TempDir) {
        engines.starts();
        self.signal("TERM");
        let code = self.child.wait().unwrap().code();
        (code, self.into_dir())
    }

    pub fn into_dir(mut self) -> tempfile::TempDir {
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    /// The next log line that holds `part`.
    pub fn wait_log(&mut self, part: &str) -> String {
        if let Some(l) = self.seen.iter().find(|l| l.contains(part)) {
            return l.clone();
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.log.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(e) => panic!("{part:?} was never logged ({e}):\n{}", self.seen.join("\n")),
            }
        }
    }

    pub fn addr(&self) -> &str {
        &self.addr
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn get(&self, path: &str) -> Answer {
        request(&self.addr, "GET", path, None)
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        request(&self.addr, "POST", path, Some(body))
    }

    pub fn delete(&self, path: &str) -> Answer {
        request(&self.addr, "DELETE", path, None)
    }

    pub fn pool(&self, id: &str) -> Value {
        self.get(&format!("/v1/pools/{id}")).json()
    }

    /// Long-polls until the pool looks as wanted; every picture on the way is shown to `wanted`.
    pub fn until(&self, id: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        // The API answers before the pools are there.
        let mut pool = eventually(|| {
            let answer = self.get(&format!("/v1/pools/{id}"));
            (answer.status == 200).then(|| answer.json())
        });
        let end = Instant::now() + PATIENCE;
        while !wanted(&pool) {
            assert!(Instant::now() < end, "never came: {pool:#}");
            let n = &pool["snapshot"];
            pool = self.get(&format!("/v1/pools/{id}?wait_for_snapshot={n}&wait_ms=5000")).json();
        }
        pool
    }

    /// A client command of the same binary; its standard output.
    pub fn cli(&self, args: &[&str]) -> String {
        let out = binary().args(args).args(["--server", &format!("http://{}", self.addr)]).output().unwrap();
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
    }

    /// The same of another server, or with another token.
    pub fn cli_with(&self, args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
        let out = binary().args(args).envs(env.iter().copied()).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
    }

    /// Every line of its log so far.
    pub fn log_so_far(&mut self) -> String {
        self.seen.extend(self.log.try_iter());
        self.seen.join("\n")
    }

    /// SIGTERM, and the exit code.
    pub fn stop(mut self) -> Option<i32> {
        self.signal("TERM");
        self.child.wait().unwrap().code()
    }

    /// Ends it by this signal, and leaves its directory for another one.
    pub fn end_by(mut self, name: &str) -> tempfile::TempDir {
        self.signal(name);
        self.wait();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            signal(self.child.id(), "TERM");
            // It may have been stopped, and would not hear.
            signal(self.child.id(), "CONT");
            let _ = self.child.wait();
        }
    }
}

/// What is there at last, or never: for what is told nowhere.
pub fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Writes the config with simulated GPUs and a state directory beside it.
pub fn write_config(dir: &Path, config: &str) -> PathBuf {
    fs::write(dir.join("two-gpus.toml"), gpu_sim::TWO_GPUS).unwrap();
    write_config_on(dir, "backend = \"simulated\"\ntopology = \"two-gpus.toml\"\n", config)
}

/// The same with GPUs of one's own.
pub fn write_config_on(dir: &Path, gpu: &str, config: &str) -> PathBuf {
    let file = dir.join("pool-managerd.toml");
    let node = if config.contains("[node]") {
        String::new()
    } else {
        format!("[node]\nstate_dir = \"state\"\nengine_ports = \"{}\"\n", engine_ports())
    };
    fs::write(&file, format!("{node}[gpu]\n{gpu}{config}")).unwrap();
    file
}

/// A range of ports per test process below the ephemeral ones, so that daemons side by side rarely meet; where they do,
/// the daemon tries another port, as it would anywhere.
pub fn engine_ports() -> String {
    let first = 10_000 + (std::process::id() % 340) * 64;
    format!("{first}-{}", first + 63)
}

/// Sends a signal to a process that this test started, or that the daemon it started names as its engine.
pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

/// Pids of processes whose command line holds `part`.
pub fn processes_with(part: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&cmdline).contains(part) {
            found.push(pid);
        }
    }
    found
}

/// Whether a process exists and is no zombie.
pub fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}
