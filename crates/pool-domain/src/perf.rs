//! How fast an engine is, for whoever chooses where to send a request: means in which what is newer counts for more.

use crate::meters::{Growth, Spent};

/// After so many first tokens what was known before counts for half.
const HALF_LIFE_REQUESTS: f64 = 20.0;
/// The same for tokens.
const HALF_LIFE_TOKENS: f64 = 2_000.0;
/// Fewer tokens than these between two readings say nothing: some engines count the first token of a request, but not the
/// time until it.
const LEAST_TOKENS: u64 = 16;
/// What is remembered of a pool.
const KNOWN_MAX: usize = 16;
/// A tenth more or less is worth being written down.
const WORTH_WRITING: f64 = 0.1;

/// A mean in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// Milliseconds.
    pub ms: f64,
    /// Over how many; 0 = a first guess, which gives way to whatever is measured.
    pub samples: u64,
}

impl Mean {
    /// As `count` more of `ms` each make it. The first ones count alike, so that it is a plain mean until it has seen enough.
    #[expect(clippy::cast_precision_loss, reason = "weights")]
    fn and(before: Option<Self>, ms: f64, count: u64, half_life: f64) -> Self {
        let Some(before) = before.filter(|b| b.samples > 0) else { return Self { ms, samples: count } };
        let samples = before.samples.saturating_add(count);
        let plain = count as f64 / samples as f64;
        let fading = 1.0 - (-(count as f64) / half_life).exp2();
        let share = plain.max(fading);
        Self { ms: before.ms + share * (ms - before.ms), samples }
    }

    fn differs(self, other: Self) -> bool {
        (self.ms - other.ms).abs() > WORTH_WRITING * other.ms.abs() || (self.samples == 0) != (other.samples == 0)
    }
}

/// How fast one engine is with one model on its devices.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Perf {
    /// From a request to its first token.
    pub first_token: Option<Mean>,
    /// From a token of a request to its next.
    pub token: Option<Mean>,
}

/// The same in the units that are shown.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PerfHints {
    /// Tokens a second of one request.
    pub tokens_per_s: Option<f64>,
    /// Milliseconds to the first token.
    pub first_token_ms: Option<u64>,
}

impl Perf {
    /// A first guess from the time that the proof's one token took, of a prompt of a word or two: to read that and to
    /// generate a token is about the same work. Where something was measured, that stands.
    #[must_use]
    pub fn seeded(self, first_unit_ms: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "milliseconds")]
        let guess = Mean { ms: first_unit_ms.max(1) as f64, samples: 0 };
        let or_guess = |known: Option<Mean>| Some(known.filter(|m| m.samples > 0).unwrap_or(guess));
        Self { first_token: or_guess(self.first_token), token: or_guess(self.token) }
    }

    /// With what was measured since.
    #[must_use]
    pub fn and(self, growth: &Growth) -> Self {
        let of = |before, spent: Spent, least, half_life| match spent.mean_ms() {
            Some(ms) if spent.count >= least && ms > 0.0 => Some(Mean::and(before, ms, spent.count, half_life)),
            _ => before,
        };
        Self {
            first_token: of(self.first_token, growth.first_token, 1, HALF_LIFE_REQUESTS),
            token: of(self.token, growth.decode, LEAST_TOKENS, HALF_LIFE_TOKENS),
        }
    }

    /// In the units that are shown.
    #[must_use]
    pub fn hints(&self) -> PerfHints {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is not negative")]
        let millis = |m: Mean| m.ms.round() as u64;
        PerfHints {
            // A tenth of a token is exact enough.
            tokens_per_s: self.token.filter(|m| m.ms > 0.0).map(|m| (1e4 / m.ms).round() / 10.0),
            first_token_ms: self.first_token.map(millis),
        }
    }

    /// Whether it tells something else than what was written down.
    #[must_use]
    pub fn worth_writing(&self, written: &Self) -> bool {
        let differs = |now: Option<Mean>, then: Option<Mean>| match (now, then) {
            (Some(now), Some(then)) => now.differs(then),
            (now, then) => now.is_some() != then.is_some(),
        };
        differs(self.first_token, written.first_token) || differs(self.token, written.token)
    }
}

/// What a speed belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerfKey {
    /// Engine and its version.
    pub engine: String,
    /// Short name of the model.
    pub model: String,
    /// Its devices, as `CUDA_VISIBLE_DEVICES` has them.
    pub mask: String,
}

/// The speeds that are known of a pool, oldest first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Speeds(Vec<(PerfKey, Perf)>);

impl Speeds {
    /// These, oldest first.
    #[must_use]
    pub fn new(known: Vec<(PerfKey, Perf)>) -> Self {
        Self(known)
    }

    /// All of them, oldest first.
    #[must_use]
    pub fn known(&self) -> &[(PerfKey, Perf)] {
        &self.0
    }

    /// Of exactly this.
    #[must_use]
    pub fn of(&self, key: &PerfKey) -> Option<Perf> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, perf)| *perf)
    }

    /// The newest of this model: the best that can be said of an engine that is not there.
    #[must_use]
    pub fn of_model(&self, model: &str) -> Option<Perf> {
        self.0.iter().rev().find(|(k, _)| k.model == model).map(|(_, perf)| *perf)
    }

    /// Remembers one, as the newest; what is too old is forgotten.
    pub fn keep(&mut self, key: PerfKey, perf: Perf) {
        self.0.retain(|(k, _)| *k != key);
        self.0.push((key, perf));
        let superfluous = self.0.len().saturating_sub(KNOWN_MAX);
        self.0.drain(..superfluous);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(seconds: f64, count: u64) -> Growth {
        Growth { decode: Spent { seconds, count }, ..Growth::default() }
    }

    fn first(ms: f64) -> Growth {
        Growth { first_token: Spent { seconds: ms / 1e3, count: 1 }, ..Growth::default() }
    }

    #[test]
    fn a_guess_gives_way_to_the_first_measurement() {
        let guess = Perf::default().seeded(20);
        assert_eq!(guess.hints(), PerfHints { tokens_per_s: Some(50.0), first_token_ms: Some(20) });
        let measured = guess.and(&decoded(1.0, 100)).and(&first(300.0));
        assert_eq!(measured.hints(), PerfHints { tokens_per_s: Some(100.0), first_token_ms: Some(300) });
        assert_eq!(measured.seeded(5), measured, "a later proof is no better");
        assert_eq!(guess.seeded(40).hints().first_token_ms, Some(40), "than a guess it is");
        assert_eq!(Perf::default().seeded(0).hints().tokens_per_s, Some(1000.0), "no time is none that was measured");
    }

    #[test]
    fn few_tokens_say_nothing() {
        let known = Perf::default().seeded(10);
        assert_eq!(known.and(&decoded(0.000_001, 2)), known, "one token that was not timed");
        assert_eq!(known.and(&Growth::default()), known);
    }

    #[test]
    fn the_newer_counts_for_more_and_half_is_forgotten_in_a_half_life() {
        let mut perf = Perf::default();
        for _ in 0..100 {
            perf = perf.and(&decoded(1.0, 100));
        }
        assert!((perf.hints().tokens_per_s.unwrap() - 100.0).abs() < 0.1);
        // 2,000 tokens at 20 ms each, in pieces or at once.
        let (mut pieces, whole) = (perf, perf.and(&decoded(40.0, 2_000)));
        for _ in 0..20 {
            pieces = pieces.and(&decoded(2.0, 100));
        }
        for now in [pieces, whole] {
            assert!((now.token.unwrap().ms - 15.0).abs() < 0.01, "{now:?}");
        }
    }

    #[test]
    fn the_first_measurements_count_alike() {
        let perf = Perf::default().and(&first(100.0)).and(&first(200.0)).and(&first(300.0));
        assert_eq!(perf.hints().first_token_ms, Some(200));
    }

    #[test]
    fn what_hardly_changed_is_not_written_again() {
        let perf = Perf::default().and(&decoded(1.0, 100));
        assert!(perf.worth_writing(&Perf::default()));
        assert!(perf.worth_writing(&perf.seeded(10)), "the one has a first token, and the other has not");
        assert!(!perf.and(&decoded(1.05, 100)).worth_writing(&perf));
        assert!(perf.and(&decoded(9.0, 100)).worth_writing(&perf));
        let guess = Perf::default().seeded(10);
        assert!(Perf { token: Some(Mean { ms: 10.0, samples: 16 }), ..guess }.worth_writing(&guess), "it was a guess");
    }

    #[test]
    fn speeds_are_remembered_by_what_they_belong_to_and_not_without_end() {
        let key = |n: usize| PerfKey { engine: format!("stub {n}"), model: "m".into(), mask: "GPU-a".into() };
        let mut speeds = Speeds::default();
        for n in 0..20 {
            speeds.keep(key(n), Perf::default().seeded(n as u64 + 1));
        }
        assert_eq!((speeds.known().len(), speeds.of(&key(3))), (KNOWN_MAX, None));
        assert_eq!(speeds.of_model("m"), speeds.of(&key(19)));
        speeds.keep(key(5), Perf::default().seeded(99));
        assert_eq!(speeds.of_model("m").unwrap().hints().first_token_ms, Some(99));
        assert_eq!((speeds.of_model("other"), speeds.known().len()), (None, KNOWN_MAX));
    }
}
