//! The engine's log: bounded, rotated, free of the secrets the shim was told of and of what a terminal would obey.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::fs::OFlags;

use crate::record::with_suffix;

/// A line longer than this is written in parts.
const LONGEST_LINE: usize = 8 * 1024;
const SMALLEST_LIMIT: u64 = 4 * 1024;
const REDACTED: &[u8] = b"[redacted]";

/// Takes output as it comes and writes whole lines. It never fails: what cannot be written is dropped, so that the
/// engine never waits for a disk that is full.
pub(crate) struct EngineLog {
    path: PathBuf,
    previous: PathBuf,
    limit: u64,
    file: Option<File>,
    size: u64,
    scrubber: Scrubber,
    unfinished: Vec<u8>,
}

impl EngineLog {
    pub(crate) fn open(path: PathBuf, limit: u64, secrets: &[String]) -> io::Result<Self> {
        let mut log = Self {
            previous: with_suffix(&path, ".1"),
            path,
            limit: limit.max(SMALLEST_LIMIT),
            file: None,
            size: 0,
            scrubber: Scrubber::new(secrets),
            unfinished: Vec::new(),
        };
        log.reopen()?;
        Ok(log)
    }

    /// Takes the next bytes of output.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.unfinished.extend_from_slice(bytes);
        if let Some(newline) = self.unfinished.iter().rposition(|&byte| byte == b'\n') {
            self.flush(newline + 1, true);
        }
        if self.unfinished.len() >= LONGEST_LINE {
            self.flush(self.unfinished.len(), false);
        }
    }

    /// Writes what is left of a line that never ended.
    pub(crate) fn finish(&mut self) {
        self.flush(self.unfinished.len(), true);
    }

    /// Adds a line of the shim's own.
    pub(crate) fn note(&mut self, text: &str) {
        self.finish();
        self.write(format!("[engine-shim] {text}\n").as_bytes());
    }

    /// Scrubs, escapes and writes the first `len` unfinished bytes. Unless they are `complete`, it keeps back the end,
    /// where a secret or a character may have begun.
    fn flush(&mut self, len: usize, complete: bool) {
        let mut clean = Vec::with_capacity(len);
        let mut taken = self.scrubber.scrub(&self.unfinished[..len], complete, &mut clean);
        if !complete {
            let begun = begun_character(&clean);
            clean.truncate(clean.len() - begun);
            taken -= begun;
        }
        self.unfinished.drain(..taken);
        self.write(&escaped(&clean));
    }

    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.file.is_none() && self.reopen().is_err() {
                return;
            }
            let len = self.fitting(bytes);
            if len == 0 {
                if !self.rotate() {
                    return;
                }
                continue;
            }
            let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(&bytes[..len]));
            match written {
                Ok(()) => self.size += len as u64,
                // Part of it may be there: opening again finds the true size.
                Err(_full) => self.file = None,
            }
            bytes = &bytes[len..];
        }
    }

    /// How many of these bytes go into the present file: all, or whole lines, or (into an empty file) what fits.
    fn fitting(&self, bytes: &[u8]) -> usize {
        let room = usize::try_from(self.limit.saturating_sub(self.size)).unwrap_or(usize::MAX);
        if bytes.len() <= room {
            return bytes.len();
        }
        let whole_lines = bytes[..room].iter().rposition(|&byte| byte == b'\n').map(|newline| newline + 1);
        whole_lines.unwrap_or(if self.size == 0 { room } else { 0 })
    }

    /// Makes room: moves the file aside, or failing that empties it. False if it can do neither.
    fn rotate(&mut self) -> bool {
        self.file = None;
        fs::rename(&self.path, &self.previous).is_ok()
            || OpenOptions::new().write(true).truncate(true).open(&self.path).is_ok()
    }

    fn reopen(&mut self) -> io::Result<()> {
        let no_link = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(no_link).open(&self.path)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }
}

/// How many bytes at the end may be the beginning of a character.
fn begun_character(bytes: &[u8]) -> usize {
    match bytes.utf8_chunks().last().map(|chunk| chunk.invalid()) {
        Some(end) if !end.is_empty() && std::str::from_utf8(end).is_err_and(|e| e.error_len().is_none()) => end.len(),
        _ => 0,
    }
}

/// Text that only says something: what would move a cursor, colour a terminal or end a line early is spelled out, and so
/// are bytes that are no text. Lines keep their ends, also those of Windows, and their tabs.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n' | b'\t');
    if bytes.iter().all(plain) {
        return bytes.to_vec();
    }
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        let mut characters = chunk.valid().chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '\n' | '\t' => out.push(character),
                '\r' if characters.peek() == Some(&'\n') => {}
                control if control.is_control() || is_bidi(control) => out.extend(control.escape_default()),
                other => out.push(other),
            }
        }
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("\\x{byte:02x}")));
    }
    out.into_bytes()
}

/// Makes text look as if it stood elsewhere in its line.
fn is_bidi(character: char) -> bool {
    matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Replaces secret values. A secret of several lines is replaced line by line, so none spans a newline.
struct Scrubber {
    /// Longest first: a secret that begins with another is replaced whole.
    secrets: Vec<Vec<u8>>,
}

impl Scrubber {
    fn new(values: &[String]) -> Self {
        let mut secrets: Vec<Vec<u8>> = Vec::new();
        for value in values {
            if value.contains('\n') {
                // Very short lines ("}") are no secret by themselves and would blot out everything.
                secrets.extend(value.lines().filter(|line| line.len() >= 4).map(|line| line.as_bytes().to_vec()));
            } else if !value.is_empty() {
                secrets.push(value.as_bytes().to_vec());
            }
        }
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self { secrets }
    }

    /// Appends the clean text to `clean` and says how much of `text` it covers: all of a `complete` text, else all
    /// but the last bytes, in which a secret may have begun.
    fn scrub(&self, text: &[u8], complete: bool, clean: &mut Vec<u8>) -> usize {
        let longest = self.secrets.first().map_or(0, Vec::len);
        let end = if complete { text.len() } else { text.len().saturating_sub(longest.saturating_sub(1)) };
        let mut at = 0;
        while at < end {
            let rest = &text[at..];
            if let Some(secret) = self.secrets.iter().find(|secret| rest.starts_with(secret)) {
                clean.extend_from_slice(REDACTED);
                at += secret.len();
            } else {
                clean.push(rest[0]);
                at += 1;
            }
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::{EngineLog, LONGEST_LINE, Scrubber};

    fn log_of(secrets: &[&str], pushes: &[&[u8]]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let secrets: Vec<String> = secrets.iter().map(|&secret| secret.to_owned()).collect();
        let mut log = EngineLog::open(path.clone(), 1 << 20, &secrets).unwrap();
        for bytes in pushes {
            log.push(bytes);
        }
        log.finish();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_secret_split_over_two_reads_is_replaced() {
        assert_eq!(log_of(&["hunter2"], &[b"key hun", b"ter2.\nend"]), "key [redacted].\nend");
    }

    #[test]
    fn a_secret_across_the_longest_line_is_replaced() {
        let before = "x".repeat(LONGEST_LINE - 3);
        let first = format!("{before}hun");
        assert_eq!(log_of(&["hunter2"], &[first.as_bytes(), b"ter2\n"]), format!("{before}[redacted]\n"));
    }

    #[test]
    fn the_longer_of_two_secrets_wins_and_lines_of_one_are_replaced_apart() {
        assert_eq!(log_of(&["abc", "abcdef", ""], &[b"abcdef abcd\n"]), "[redacted] [redacted]d\n");
        assert_eq!(log_of(&["{\nprivate\n}"], &[b"{ private }\n"]), "{ [redacted] }\n");
    }

    #[test]
    fn what_a_terminal_would_obey_is_spelled_out() {
        assert_eq!(log_of(&[], &[b"\x1b[31mred\x07\r\n\ttab 50%\r60%\n"]), "\\u{1b}[31mred\\u{7}\n\ttab 50%\\r60%\n");
        assert_eq!(log_of(&[], &["ö \u{9b}2J \u{202e}x\n".as_bytes()]), "ö \\u{9b}2J \\u{202e}x\n");
        assert_eq!(log_of(&[], &[b"\xff\xfe\n\xc3\n"]), "\\xff\\xfe\n\\xc3\n");
    }

    #[test]
    fn a_character_across_the_longest_line_stays_whole() {
        let before = "x".repeat(LONGEST_LINE - 1);
        let first = [before.as_bytes(), &"ö".as_bytes()[..1]].concat();
        assert_eq!(log_of(&[], &[&first, &"ö\n".as_bytes()[1..]]), format!("{before}ö\n"));
        // With a secret, more is kept back.
        assert_eq!(
            log_of(&["hunter2"], &["ö".repeat(LONGEST_LINE).as_bytes(), b"\n"]),
            "ö".repeat(LONGEST_LINE) + "\n"
        );
    }

    #[test]
    fn without_secrets_nothing_is_kept_back() {
        let mut clean = Vec::new();
        assert_eq!(Scrubber::new(&[]).scrub(b"abc", false, &mut clean), 3);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/log");
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let mut log = EngineLog::open(path.clone(), 4096, &[]).unwrap();
        std::fs::remove_dir_all(dir.path().join("sub")).unwrap();
        for _ in 0..1000 {
            log.push(b"a line that has nowhere to go\n");
        }
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        log.push(b"back\n");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "back\n");
    }
}
