//! A request whose answer is still on its way.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use super::{PATIENCE, request};

/// A request of which the engine streams the answer for longer than the test takes.
pub struct Stream {
    addr: String,
    lines: BufReader<TcpStream>,
}

impl Stream {
    pub fn open(pool: &Value) -> Self {
        let addr = pool["replicas"][0]["endpoint"].as_str().unwrap().trim_start_matches("http://").to_owned();
        let mut socket = TcpStream::connect(&addr).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = json!({ "prompt": "go on", "n_predict": 20000, "stream": true }).to_string();
        write!(
            socket,
            "POST /completion HTTP/1.1\r\nHost: {addr}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut stream = Self { addr, lines: BufReader::new(socket) };
        stream.goes_on();
        stream
    }

    /// The engine is at work on it, and more of it comes.
    pub fn goes_on(&mut self) {
        let slots = request(&self.addr, "GET", "/slots", None).json();
        let busy = || slots.as_array().unwrap().iter().any(|slot| slot["is_processing"] == true);
        for _ in 0..20 {
            let mut line = String::new();
            while !line.starts_with("data: ") {
                line.clear();
                assert!(self.lines.read_line(&mut line).unwrap() > 0, "the stream was cut off");
            }
        }
        assert!(busy() || request(&self.addr, "GET", "/slots", None).body.contains("\"is_processing\":true"));
    }
}

/// Streams this many tokens to their end and gives the last event. `begun` is called at the first token.
pub fn whole(endpoint: &str, tokens: u64, begun: impl FnOnce()) -> Value {
    let addr = endpoint.trim_start_matches("http://");
    let mut socket = TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = json!({ "prompt": "go on", "n_predict": tokens, "stream": true }).to_string();
    write!(
        socket,
        "POST /completion HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let (mut begun, mut seen, mut last) = (Some(begun), 0, Value::Null);
    for line in BufReader::new(socket).lines() {
        let line = line.unwrap_or_else(|e| panic!("the stream broke after {seen} tokens: {e}"));
        let Some(data) = line.strip_prefix("data: ") else { continue };
        assert_ne!(last["stop"], true, "something came after the end");
        last = serde_json::from_str(data).unwrap();
        seen += u64::from(last["stop"] == false);
        if let Some(begun) = begun.take() {
            begun();
        }
    }
    assert_eq!((&last["stop"], seen), (&json!(true), tokens), "the stream was cut off");
    last
}
