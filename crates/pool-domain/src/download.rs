//! What to ask for when a part of a file is here already, what to make of the answer, and when to try again.

use std::time::Duration;

use thiserror::Error;

use crate::{Backoff, BackoffPolicy, Draw};

/// What is here of a file, and how the server named what it is of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Held {
    /// Bytes from its beginning.
    pub bytes: u64,
    /// Names that content: a strong ETag, or a time of change.
    pub validator: Option<String>,
    /// Bytes of the whole, where that was told.
    pub total: Option<u64>,
    /// Its digest is known, so that a mixture of two contents would be found out.
    pub digest_known: bool,
}

/// What to ask the server for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// All of it.
    Whole,
    /// What is missing.
    From {
        /// The first byte.
        first: u64,
        /// Only if the content is still this one.
        if_range: Option<String>,
    },
}

/// A server's answer, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Names the content, where the server does so.
    pub validator: Option<String>,
    /// Bytes of this answer, where that was told.
    pub length: Option<u64>,
    /// Of a partial answer: its first byte, and the bytes of the whole.
    pub range: Option<(u64, Option<u64>)>,
    /// It is not the content itself but some encoding of it.
    pub encoded: bool,
    /// When to come back.
    pub retry_after: Option<Duration>,
}

/// What to do with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its body is what is missing.
    Append,
    /// Its body is all of it: what is here is dropped.
    StartOver {
        /// Bytes of the whole, where that was told.
        total: Option<u64>,
    },
    /// What is here is of another content: drop it and ask again.
    Drop,
    /// What is here is all of it.
    Complete,
    /// The server cannot now.
    Later(Option<Duration>),
    /// Asking again is of no use.
    Refused(Refusal),
}

/// Why a server does not give a file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It wants to know who asks.
    #[error("the server refuses it (status {0}): a token for its host in `[models.tokens]` may help")]
    NotAuthorised(u16),
    /// It has no such file.
    #[error("the server has no such file (status {0})")]
    NotFound(u16),
    /// Something else.
    #[error("the server answers with status {0}")]
    Status(u16),
    /// Not the content itself.
    #[error("the server sends it encoded, although it was asked not to")]
    Encoded,
    /// Another size than its repository tells.
    #[error("the server would send {told} bytes, but the file has {expected}")]
    Length {
        /// What the repository tells.
        expected: u64,
        /// What the server tells.
        told: u64,
    },
}

impl Held {
    /// What to ask for. Without a name for its content, nothing can be added to it safely unless its digest is known.
    #[must_use]
    pub fn ask(&self) -> Ask {
        if self.bytes == 0 || (self.validator.is_none() && !self.digest_known) {
            return Ask::Whole;
        }
        Ask::From { first: self.bytes, if_range: self.validator.clone() }
    }

    /// What an answer to that means. `expected`: bytes of the whole, as its repository tells.
    #[must_use]
    pub fn judge(&self, expected: Option<u64>, answer: &Answer) -> Verdict {
        let differs = |told: Option<u64>, known: Option<u64>| matches!((told, known), (Some(a), Some(b)) if a != b);
        match answer.status {
            200 | 206 if answer.encoded => Verdict::Refused(Refusal::Encoded),
            200 => match (expected, answer.length) {
                (Some(expected), Some(told)) if expected != told => {
                    Verdict::Refused(Refusal::Length { expected, told })
                }
                (_, told) => Verdict::StartOver { total: told.or(expected) },
            },
            206 => {
                let asked = matches!(self.ask(), Ask::From { .. });
                let fits = answer.range.is_some_and(|(first, total)| {
                    first == self.bytes && !differs(total, self.total) && !differs(total, expected)
                });
                let other = matches!((&answer.validator, &self.validator), (Some(a), Some(b)) if a != b);
                if asked && fits && !other { Verdict::Append } else { Verdict::Drop }
            }
            416 if self.bytes > 0 && answer.range.is_some_and(|(_, total)| total == Some(self.bytes)) => {
                Verdict::Complete
            }
            416 if self.bytes > 0 => Verdict::Drop,
            408 | 425 | 429 | 500 | 502..=504 => Verdict::Later(answer.retry_after),
            status @ (401 | 403) => Verdict::Refused(Refusal::NotAuthorised(status)),
            status @ (404 | 410) => Verdict::Refused(Refusal::NotFound(status)),
            status => Verdict::Refused(Refusal::Status(status)),
        }
    }
}

/// How often something is tried that brings nothing.
#[derive(Debug, Clone)]
pub struct Patience {
    policy: BackoffPolicy,
    most: u32,
    backoff: Backoff,
}

/// No server is waited for longer because it says so.
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// So many bytes are worth another try.
const WORTH: u64 = 1024 * 1024;

impl Patience {
    /// `most` tries in a row that bring nothing.
    #[must_use]
    pub fn new(policy: BackoffPolicy, most: u32) -> Self {
        Self { policy, most, backoff: Backoff::default() }
    }

    /// A try ended early and brought so many bytes: how long to wait for the next one, or that enough were made.
    /// `told`: when the server wants to be asked again.
    pub fn next(&mut self, brought: u64, told: Option<Duration>, draw: Draw) -> Option<Duration> {
        if brought >= WORTH {
            self.backoff = Backoff::default();
        }
        if self.backoff.failures() + 1 >= self.most || told.is_some_and(|t| t > LONGEST_WAIT) {
            return None;
        }
        let own = self.backoff.next_delay(&self.policy, 1.0, draw);
        Some(told.map_or(own, |told| told.max(own)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(bytes: u64) -> Held {
        Held { bytes, validator: Some("\"a\"".into()), total: Some(10), digest_known: false }
    }

    fn part(first: u64, total: u64, validator: &str) -> Answer {
        let range = Some((first, Some(total)));
        Answer {
            status: 206,
            range,
            validator: Some(validator.into()),
            length: Some(total - first),
            ..Answer::default()
        }
    }

    fn whole(length: Option<u64>) -> Answer {
        Answer { status: 200, length, ..Answer::default() }
    }

    fn status(status: u16) -> Answer {
        Answer { status, ..Answer::default() }
    }

    #[test]
    fn what_is_missing_is_asked_for_only_of_the_same_content() {
        assert_eq!(held(0).ask(), Ask::Whole);
        assert_eq!(held(4).ask(), Ask::From { first: 4, if_range: Some("\"a\"".into()) });
        let nameless = Held { validator: None, ..held(4) };
        assert_eq!(nameless.ask(), Ask::Whole);
        let known = Held { digest_known: true, ..nameless };
        assert_eq!(known.ask(), Ask::From { first: 4, if_range: None });
    }

    #[test]
    fn an_answer_is_added_only_where_it_belongs() {
        let judge = |answer: &Answer| held(4).judge(None, answer);
        assert_eq!(judge(&part(4, 10, "\"a\"")), Verdict::Append);
        assert_eq!(judge(&Answer { validator: None, ..part(4, 10, "") }), Verdict::Append);
        // Another place, another length, another content.
        for other in [part(3, 10, "\"a\""), part(4, 11, "\"a\""), part(4, 10, "\"b\"")] {
            assert_eq!(judge(&other), Verdict::Drop);
        }
        assert_eq!(judge(&Answer { range: None, ..part(4, 10, "\"a\"") }), Verdict::Drop);
        assert_eq!(held(4).judge(Some(11), &part(4, 10, "\"a\"")), Verdict::Drop);
        // The whole of what is another content by now.
        assert_eq!(judge(&whole(Some(12))), Verdict::StartOver { total: Some(12) });
        assert_eq!(held(0).judge(None, &part(0, 10, "\"a\"")), Verdict::Drop, "nobody asked for a part");
    }

    #[test]
    fn a_length_that_is_not_the_files_is_refused() {
        let lie = Verdict::Refused(Refusal::Length { expected: 10, told: 11 });
        assert_eq!(held(0).judge(Some(10), &whole(Some(11))), lie);
        assert_eq!(held(0).judge(Some(10), &whole(None)), Verdict::StartOver { total: Some(10) });
        let zipped = Answer { encoded: true, ..whole(Some(10)) };
        assert_eq!(held(0).judge(None, &zipped), Verdict::Refused(Refusal::Encoded));
    }

    #[test]
    fn a_range_that_cannot_be_is_the_end_or_another_content() {
        let at = |total| Answer { range: Some((0, Some(total))), ..status(416) };
        assert_eq!(held(10).judge(None, &at(10)), Verdict::Complete);
        assert_eq!(held(10).judge(None, &at(9)), Verdict::Drop);
        assert_eq!(held(10).judge(None, &status(416)), Verdict::Drop);
        assert_eq!(held(0).judge(None, &status(416)), Verdict::Refused(Refusal::Status(416)));
    }

    #[test]
    fn who_cannot_now_is_asked_again_and_who_does_not_want_to_is_not() {
        for later in [408, 425, 429, 500, 502, 503, 504] {
            let answer = Answer { retry_after: Some(Duration::from_secs(7)), ..status(later) };
            assert_eq!(held(0).judge(None, &answer), Verdict::Later(Some(Duration::from_secs(7))));
        }
        assert_eq!(held(0).judge(None, &status(403)), Verdict::Refused(Refusal::NotAuthorised(403)));
        assert_eq!(held(0).judge(None, &status(404)), Verdict::Refused(Refusal::NotFound(404)));
        for never in [204, 304, 400, 418, 501] {
            assert_eq!(held(0).judge(None, &status(never)), Verdict::Refused(Refusal::Status(never)));
        }
    }

    #[test]
    fn patience_ends_unless_something_is_brought() {
        let mut patience = Patience::new(BackoffPolicy::default(), 4);
        let draw = || Draw::new(1.0);
        let waits: Vec<_> = (0..4).map(|_| patience.next(0, None, draw()).map(|d| d.as_secs())).collect();
        assert_eq!(waits, [Some(1), Some(2), Some(4), None]);
        // A mebibyte is worth all of them again.
        assert_eq!(patience.next(WORTH, None, draw()), Some(Duration::from_secs(1)));
        assert_eq!(patience.next(0, Some(Duration::from_secs(60)), draw()), Some(Duration::from_secs(60)));
        assert_eq!(patience.next(0, Some(Duration::from_secs(301)), draw()), None);
    }
}
