//! Runs the real binary and speaks HTTP to it by hand.

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

/// A command that runs the binary in a process group of its own.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stub-engine"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    command.env_remove("CUDA_VISIBLE_DEVICES").env_remove(sim_claims::SIM_DIR_ENV);
    command
}

/// A running stub, killed together with its children at the end of the test.
pub(crate) struct Stub {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    address: String,
    /// Lines printed before the one that says it listens.
    pub(crate) early: Vec<String>,
}

impl Stub {
    /// Starts the stub on a free port, without waiting between tokens, and waits until it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::from(command(&["--tokens-per-second", "0", "--port", "0"]).args(args))
    }

    pub(crate) fn from(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut stub = Self { child, lines, address: String::new(), early: Vec::new() };
        loop {
            let line = stub.line().expect("the stub listens before it ends");
            match line.strip_prefix("listening on http://") {
                Some(address) => {
                    stub.address = address.to_owned();
                    return stub;
                }
                None => stub.early.push(line),
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line on stdout.
    pub(crate) fn line(&mut self) -> Option<String> {
        self.lines.next().map(Result::unwrap)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a request and leaves the answer to be read.
    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: stub\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    /// The status and the text of an answer.
    pub(crate) fn text(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        read_answer(&mut self.send(method, path, body))
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let (status, text) = self.text("GET", path, "");
        (status, serde_json::from_str(&text).unwrap())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.text("POST", path, &body.to_string());
        (status, serde_json::from_str(&text).unwrap())
    }

    /// The data of every event of a stream.
    pub(crate) fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let (status, text) = self.text("POST", path, &body.to_string());
        assert_eq!(status, 200);
        text.split("\n\n").filter_map(|event| Some(event.strip_prefix("data: ")?.to_owned())).collect()
    }

    /// Reads `/slots` until that many are busy.
    pub(crate) fn await_busy(&self, wanted: usize) {
        self.poll("/slots", |slots| {
            slots.as_array().unwrap().iter().filter(|slot| slot["is_processing"] == true).count() == wanted
        });
    }

    /// Asks again until the answer is as wanted; a stub that never gets there fails at the test runner's time limit.
    pub(crate) fn poll(&self, path: &str, done: impl Fn(&Value) -> bool) {
        while !done(&self.get(path).1) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // The group is gone already where the test has ended everything in it.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

/// Reads a whole answer, which may be chunked.
pub(crate) fn read_answer(stream: &mut TcpStream) -> (u16, String) {
    let mut raw = String::new();
    stream.read_to_string(&mut raw).unwrap();
    let (head, body) = raw.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = if head.contains("transfer-encoding: chunked") { unchunk(body) } else { body.to_owned() };
    (status, body)
}

fn unchunk(mut rest: &str) -> String {
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            break;
        }
        body.push_str(&after[..size]);
        rest = &after[size + 2..];
    }
    body
}
