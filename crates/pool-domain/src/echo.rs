//! The driver's library and the kernel's log tell of the same errors, each in its own time: what both say happened once.

use std::collections::VecDeque;
use std::time::Duration;

use crate::Tick;

/// Who said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// The driver's library.
    #[default]
    Driver,
    /// The kernel's log.
    KernelLog,
}

/// The other one may be as much later: events of the library are heard by waits, and calls of it may hang.
pub const ECHO_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Heard {
    gpu: String,
    xid: u64,
    source: Source,
    at: Tick,
}

/// What one of them said, and the other did not yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Echoes(VecDeque<Heard>);

impl Echoes {
    /// Says whether an error of a GPU is news. It is not if the other one has told of it: then that is done with, so that of
    /// two errors that are alike, two are heard.
    pub fn is_news(&mut self, gpu: &str, xid: u64, source: Source, now: Tick) -> bool {
        self.0.retain(|heard| now.since(heard.at) < ECHO_WITHIN);
        let same = |heard: &Heard| heard.gpu == gpu && heard.xid == xid && heard.source != source;
        match self.0.iter().position(same) {
            Some(at) => {
                self.0.remove(at);
                false
            }
            None => {
                self.0.push_back(Heard { gpu: gpu.to_owned(), xid, source, at: now });
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Source::{Driver, KernelLog};
    use super::*;

    fn at(secs: u64) -> Tick {
        Tick(secs * 1_000)
    }

    #[test]
    fn what_both_say_is_heard_once_whoever_comes_first() {
        for (first, second) in [(Driver, KernelLog), (KernelLog, Driver)] {
            let mut e = Echoes::default();
            assert!(e.is_news("a", 79, first, at(0)));
            assert!(!e.is_news("a", 79, second, at(29)));
            // The next one is another.
            assert!(e.is_news("a", 79, second, at(29)));
        }
    }

    #[test]
    fn other_gpus_other_errors_and_later_ones_are_news() {
        let mut e = Echoes::default();
        assert!(e.is_news("a", 79, Driver, at(0)));
        assert!(e.is_news("b", 79, KernelLog, at(0)));
        assert!(e.is_news("a", 31, KernelLog, at(0)));
        assert!(e.is_news("a", 79, KernelLog, at(30)));
    }

    #[test]
    fn of_two_that_are_alike_two_are_heard() {
        let mut e = Echoes::default();
        let heard = [Driver, Driver, KernelLog, KernelLog].map(|source| e.is_news("a", 13, source, at(1)));
        assert_eq!(heard, [true, true, false, false]);
        assert_eq!([KernelLog, KernelLog].map(|source| e.is_news("a", 13, source, at(2))), [true, true]);
    }
}
