//! What engines say of themselves in numbers, in one set for every kind, and totals that outlive the engines.

/// Time that was spent, and on how many.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Spent {
    /// Seconds.
    pub seconds: f64,
    /// First tokens, or tokens.
    pub count: u64,
}

impl Spent {
    /// Milliseconds on one of them.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    pub fn mean_ms(self) -> Option<f64> {
        (self.count > 0).then(|| self.seconds * 1e3 / self.count as f64)
    }

    fn since(self, before: Self) -> Self {
        // Either of them smaller than before: it counts anew.
        if self.count < before.count || self.seconds < before.seconds {
            return self;
        }
        Self { seconds: self.seconds - before.seconds, count: self.count - before.count }
    }

    fn and(self, more: Self) -> Self {
        Self { seconds: self.seconds + more.seconds, count: self.count.saturating_add(more.count) }
    }
}

/// The numbers of one engine at one moment. What its kind does not tell is unset. Totals count since the engine began.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Reading {
    /// Requests that it works on.
    pub running: Option<u32>,
    /// Requests that wait within it.
    pub waiting: Option<u32>,
    /// Share of its KV cache that is taken, 0 to 1.
    pub kv_used: Option<f64>,
    /// Prompt tokens read.
    pub prompt_tokens: Option<u64>,
    /// Tokens generated.
    pub generated_tokens: Option<u64>,
    /// Time from a request to its first token.
    pub first_token: Option<Spent>,
    /// Time from each token to the next.
    pub decode: Option<Spent>,
}

/// What was added between two readings.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Growth {
    /// Times to first tokens.
    pub first_token: Spent,
    /// Times between tokens.
    pub decode: Spent,
}

/// What the totals of an engine are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
enum Base {
    /// It began to count when it was started here.
    #[default]
    Nothing,
    /// What it counted before it was taken over is not ours to count again: its first reading only says where it is.
    Unknown,
    /// The reading before.
    Last(Reading),
}

/// The numbers of one replica over all its engines: gauges of the one that runs, and totals that never fall.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Meters {
    base: Base,
    shown: Reading,
}

impl Meters {
    /// An engine begins that was started here: it counts from nothing.
    pub fn begin(&mut self) {
        self.end();
        self.base = Base::Nothing;
    }

    /// An engine is taken over that counts since before.
    pub fn take_over(&mut self) {
        self.end();
        self.base = Base::Unknown;
    }

    /// Nothing runs: totals stay, gauges go.
    pub fn end(&mut self) {
        (self.shown.running, self.shown.waiting, self.shown.kv_used) = (None, None, None);
    }

    /// Takes in a reading of the engine that runs.
    pub fn read(&mut self, now: Reading) -> Growth {
        let before = match std::mem::replace(&mut self.base, Base::Last(now)) {
            Base::Nothing => Reading::default(),
            Base::Unknown => now,
            Base::Last(before) => before,
        };
        let spent = |now: Option<Spent>, before: Option<Spent>| now.map(|n| n.since(before.unwrap_or_default()));
        let first_token = spent(now.first_token, before.first_token);
        let decode = spent(now.decode, before.decode);
        let shown = &mut self.shown;
        (shown.running, shown.waiting, shown.kv_used) = (now.running, now.waiting, now.kv_used);
        add(&mut shown.prompt_tokens, now.prompt_tokens, before.prompt_tokens);
        add(&mut shown.generated_tokens, now.generated_tokens, before.generated_tokens);
        for (total, grown) in [(&mut shown.first_token, first_token), (&mut shown.decode, decode)] {
            if let Some(grown) = grown {
                *total = Some(total.unwrap_or_default().and(grown));
            }
        }
        Growth { first_token: first_token.unwrap_or_default(), decode: decode.unwrap_or_default() }
    }

    /// Gauges of the engine that runs, and totals over all that ran.
    #[must_use]
    pub fn shown(&self) -> Reading {
        self.shown
    }
}

/// A counter that fell counts anew.
fn add(total: &mut Option<u64>, now: Option<u64>, before: Option<u64>) {
    let Some(now) = now else { return };
    let grown = now.checked_sub(before.unwrap_or(0)).unwrap_or(now);
    *total = Some(total.unwrap_or(0).saturating_add(grown));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(generated: u64) -> Reading {
        Reading { generated_tokens: Some(generated), running: Some(1), ..Reading::default() }
    }

    fn spent(seconds: f64, count: u64) -> Reading {
        Reading { decode: Some(Spent { seconds, count }), ..Reading::default() }
    }

    #[test]
    fn totals_go_on_when_an_engine_is_started_again_or_counts_anew() {
        let mut meters = Meters::default();
        meters.read(tokens(10));
        meters.read(tokens(25));
        meters.read(tokens(5));
        assert_eq!(meters.shown().generated_tokens, Some(30), "5 after it had begun anew");
        meters.begin();
        assert_eq!((meters.shown().generated_tokens, meters.shown().running), (Some(30), None));
        meters.read(tokens(7));
        assert_eq!((meters.shown().generated_tokens, meters.shown().running), (Some(37), Some(1)));
    }

    #[test]
    fn what_an_engine_counted_before_it_was_taken_over_is_not_counted_again() {
        let mut meters = Meters::default();
        meters.take_over();
        meters.read(tokens(1_000));
        assert_eq!(meters.shown().generated_tokens, Some(0));
        meters.read(tokens(1_010));
        assert_eq!(meters.shown().generated_tokens, Some(10));
    }

    #[test]
    fn what_a_kind_does_not_tell_stays_unset() {
        let mut meters = Meters::default();
        meters.read(tokens(1));
        let shown = meters.shown();
        assert_eq!((shown.prompt_tokens, shown.kv_used, shown.decode), (None, None, None));
    }

    #[test]
    fn a_reading_shows_what_was_added_since_the_one_before() {
        let mut meters = Meters::default();
        assert_eq!(meters.read(spent(1.0, 100)).decode.mean_ms(), Some(10.0));
        assert_eq!(meters.read(spent(3.0, 200)).decode, Spent { seconds: 2.0, count: 100 });
        assert_eq!(meters.read(spent(3.0, 200)).decode.mean_ms(), None, "nothing was done");
        assert_eq!(meters.read(spent(0.5, 10)).decode, Spent { seconds: 0.5, count: 10 }, "it counts anew");
        assert_eq!(meters.shown().decode, Some(Spent { seconds: 3.5, count: 210 }));
    }

    proptest! {
        #[test]
        fn totals_never_fall(steps in prop::collection::vec((0_u8..8, 0_u64..u64::MAX, prop::option::of(0.0_f64..1e12)), 0..60)) {
            let mut meters = Meters::default();
            let mut before = meters.shown();
            for (what, count, seconds) in steps {
                match what {
                    0 => meters.begin(),
                    1 => meters.take_over(),
                    2 => meters.end(),
                    _ => {
                        let reading = Reading {
                            generated_tokens: Some(count),
                            decode: seconds.map(|seconds| Spent { seconds, count }),
                            ..Reading::default()
                        };
                        let grown = meters.read(reading);
                        prop_assert!(grown.decode.seconds >= 0.0);
                    }
                }
                let now = meters.shown();
                prop_assert!(now.generated_tokens >= before.generated_tokens);
                prop_assert!(now.decode.map_or(0, |d| d.count) >= before.decode.map_or(0, |d| d.count));
                prop_assert!(now.decode.map_or(0.0, |d| d.seconds) >= before.decode.map_or(0.0, |d| d.seconds));
                before = now;
            }
        }
    }
}
