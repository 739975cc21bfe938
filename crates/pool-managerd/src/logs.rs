//! Engines' logs, read from where their shims write them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use pool_api::server::{LogPart, Logs};
use pool_domain::{Generation, ReplicaKey};

/// Most that is read at once; the rest comes with the next look.
const MOST: u64 = 1024 * 1024;

/// The logs of engines that were launched below a directory.
#[derive(Debug)]
pub(crate) struct LogFiles {
    pub(crate) runtime_dir: PathBuf,
}

#[async_trait]
impl Logs for LogFiles {
    async fn last(&self, key: &ReplicaKey, generation: Generation, lines: usize) -> LogPart {
        self.read(key, generation, move |log| last(log, lines)).await
    }

    async fn after(&self, key: &ReplicaKey, generation: Generation, place: u64) -> LogPart {
        // What cannot be read now can be later.
        let unread = LogPart { next: place, ..LogPart::default() };
        self.read(key, generation, move |log| Ok(after(log, place).unwrap_or(unread))).await
    }
}

impl LogFiles {
    async fn read(
        &self,
        key: &ReplicaKey,
        generation: Generation,
        how: impl FnOnce(&Path) -> io::Result<LogPart> + Send + 'static,
    ) -> LogPart {
        let log = engine_host::log_path(&self.runtime_dir, key, generation);
        let read = tokio::task::spawn_blocking(move || how(&log)).await;
        read.ok().and_then(Result::ok).unwrap_or_default()
    }
}

fn before(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The whole lines of a file from a place on.
fn part(log: &Path, from: u64) -> io::Result<LogPart> {
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    // Of a line that is longer than all that is read at once, a part is a line.
    let end = match bytes.iter().rposition(|b| *b == b'\n') {
        Some(newline) => newline + 1,
        None if bytes.len() as u64 == MOST => bytes.len(),
        None => 0,
    };
    let (mut lines, mut at) = (Vec::new(), from);
    for line in bytes[..end].split_inclusive(|b| *b == b'\n') {
        at += line.len() as u64;
        lines.push((at, String::from_utf8_lossy(line).trim_end_matches(['\n', '\r']).to_owned()));
    }
    Ok(LogPart { lines, next: at })
}

fn last(log: &Path, lines: usize) -> io::Result<LogPart> {
    let size = File::open(log)?.metadata()?.len();
    let from = size.saturating_sub(MOST);
    let mut told = part(log, from)?;
    if from > 0 && !told.lines.is_empty() {
        // It began in the middle.
        told.lines.remove(0);
    }
    if told.lines.len() < lines && from == 0 {
        let older = last_of_older(&before(log), lines - told.lines.len());
        told.lines.splice(0..0, older);
    }
    let first = told.lines.len().saturating_sub(lines);
    told.lines.drain(..first);
    Ok(told)
}

/// The end of the part before; its lines end where the next part begins.
fn last_of_older(log: &Path, lines: usize) -> Vec<(u64, String)> {
    let read = || {
        let size = File::open(log)?.metadata()?.len();
        part(log, size.saturating_sub(MOST))
    };
    let older = read().map(|p: LogPart| p.lines).unwrap_or_default();
    let first = older.len().saturating_sub(lines);
    older.into_iter().skip(first).map(|(_, line)| (0, line)).collect()
}

fn after(log: &Path, place: u64) -> io::Result<LogPart> {
    if File::open(log)?.metadata()?.len() >= place {
        return part(log, place);
    }
    // It was begun anew: first what is left of the part before.
    let mut told = part(&before(log), place).unwrap_or_default();
    let new = part(log, 0)?;
    told.lines.extend(new.lines);
    Ok(LogPart { lines: told.lines, next: new.next })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn texts(part: &LogPart) -> Vec<&str> {
        part.lines.iter().map(|(_, line)| line.as_str()).collect()
    }

    #[test]
    fn lines_come_whole_once_and_over_a_new_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("engine.log");
        assert!(last(&log, 5).is_err() && after(&log, 0).is_err());
        fs::write(&log, "one\ntwo\nthr").unwrap();
        let first = last(&log, 5).unwrap();
        assert_eq!((texts(&first), first.next), (vec!["one", "two"], 8));
        assert_eq!(texts(&last(&log, 1).unwrap()), ["two"]);
        assert_eq!(after(&log, 8).unwrap(), LogPart { lines: vec![], next: 8 });
        fs::write(&log, "one\ntwo\nthree\n").unwrap();
        let second = after(&log, first.next).unwrap();
        assert_eq!(second, LogPart { lines: vec![(14, "three".into())], next: 14 });
        fs::write(&log, "one\ntwo\nthree\nfour\n").unwrap();
        fs::rename(&log, before(&log)).unwrap();
        fs::write(&log, "five\n").unwrap();
        let third = after(&log, second.next).unwrap();
        assert_eq!((texts(&third), third.next), (vec!["four", "five"], 5));
        assert_eq!(texts(&last(&log, 3).unwrap()), ["three", "four", "five"]);
    }

    #[test]
    fn a_line_without_an_end_is_read_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("engine.log");
        fs::write(&log, "x".repeat(3 * MOST as usize) + "\nend\n").unwrap();
        let (mut at, mut lines) = (0, Vec::new());
        loop {
            let part = after(&log, at).unwrap();
            if part.lines.is_empty() {
                break;
            }
            at = part.next;
            lines.extend(part.lines);
        }
        assert_eq!((lines.len(), lines.last().unwrap().1.as_str()), (5, "end"));
    }
}
