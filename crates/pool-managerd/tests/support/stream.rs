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
