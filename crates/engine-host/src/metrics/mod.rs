//! Reads what engines publish for Prometheus, and only the few numbers that every kind has under another name.
//!
//! A page of it may be of any size up to the bound on an answer, and say anything: what is no sample is passed over, and
//! nothing is kept of what was not asked for.

mod tables;

use pool_domain::meters::{Reading, Spent};

pub(crate) use tables::of_kind;

/// The most bytes of a page: a hundred metrics with a line for each bucket of each histogram.
pub(crate) const PAGE_BYTES: usize = 16 * 1024 * 1024;

/// One metric, or of one that counts several things apart, one of these.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name {
    name: &'static str,
    /// The label that it has to have.
    label: Option<(&'static str, &'static str)>,
}

/// Times and how many there were.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Times {
    /// A histogram in seconds.
    Histogram(&'static str),
    /// The same in milliseconds.
    Millis(&'static str),
    /// A total of seconds, and one of what took them.
    Totals { seconds: &'static str, count: &'static str },
}

/// What a kind calls its numbers. Of several names the first that is there counts: engines rename their metrics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    running: &'static [Name],
    waiting: &'static [Name],
    /// From 0 to 1; of several (one for each rank) the mean counts.
    kv_used: &'static [Name],
    prompt_tokens: &'static [Name],
    generated_tokens: &'static [Name],
    first_token: &'static [Times],
    decode: &'static [Times],
}

/// One line of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample<'a> {
    name: &'a str,
    /// What stands between the braces.
    labels: &'a str,
    value: f64,
}

/// Sum and number of the samples of one metric.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    total: f64,
    samples: u32,
}

/// The samples of a page in Prometheus' text form, or OpenMetrics'. Values that are none, or below nothing, are no numbers
/// of anything here.
fn samples(page: &str) -> impl Iterator<Item = Sample<'_>> {
    page.lines().filter_map(sample).filter(|s| s.value.is_finite() && s.value >= 0.0)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let line = line.trim_start();
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => {
            let end = end_of_labels(rest)?;
            (&rest[..end], &rest[end + 1..])
        }
        None => ("", rest),
    };
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample { name, labels, value })
}

/// Where the brace is that closes the labels: one within quotes is part of a value.
fn end_of_labels(rest: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    rest.bytes().position(|byte| {
        let closes = byte == b'}' && !quoted;
        if byte == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = byte == b'\\' && !escaped;
        closes
    })
}

impl Sample<'_> {
    fn has(&self, label: (&str, &str)) -> bool {
        let (key, value) = label;
        let mut rest = self.labels;
        // Label values hold no quotes that are not escaped, so the pieces between quotes alternate: key, value, key, …
        while let Some((before, after)) = rest.split_once("=\"") {
            let name = before.rsplit([',', ' ']).next().unwrap_or(before);
            let Some(end) = end_of_value(after) else { return false };
            if name == key && &after[..end] == value {
                return true;
            }
            rest = &after[end + 1..];
        }
        false
    }
}

fn end_of_value(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })
}

fn sum(page: &str, name: &str, label: Option<(&str, &str)>) -> Option<Sum> {
    let ours = samples(page).filter(|s| s.name == name && label.is_none_or(|label| s.has(label)));
    let sum = ours.fold(Sum::default(), |sum, s| Sum { total: sum.total + s.value, samples: sum.samples + 1 });
    (sum.samples > 0).then_some(sum)
}

/// A metric over all its labels, in whole numbers.
pub(crate) fn total(page: &str, name: &str) -> Option<u64> {
    sum(page, name, None).map(|sum| whole(sum.total))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "samples are not negative; what is too big stays at the biggest"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

fn first<T: Copy, R>(names: &[T], read: impl Fn(T) -> Option<R>) -> Option<R> {
    names.iter().copied().find_map(read)
}

impl Table {
    /// What a page says.
    pub(crate) fn read(&self, page: &str) -> Reading {
        let number = |names: &[Name]| first(names, |n| sum(page, n.name, n.label));
        let count = |names: &[Name]| number(names).map(|sum| whole(sum.total));
        let small = |names: &[Name]| count(names).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let times = |names: &[Times]| first(names, |t| spent(page, t));
        Reading {
            running: small(self.running),
            waiting: small(self.waiting),
            kv_used: number(self.kv_used).map(|sum| (sum.total / f64::from(sum.samples)).min(1.0)),
            prompt_tokens: count(self.prompt_tokens),
            generated_tokens: count(self.generated_tokens),
            first_token: times(self.first_token),
            decode: times(self.decode),
        }
    }
}

fn spent(page: &str, times: Times) -> Option<Spent> {
    let both = |seconds: &str, count: &str, unit: f64| {
        Some(Spent { seconds: sum(page, seconds, None)?.total * unit, count: total(page, count)? })
    };
    let of_histogram = |name: &str, unit| both(&format!("{name}_sum"), &format!("{name}_count"), unit);
    match times {
        Times::Histogram(name) => of_histogram(name, 1.0),
        Times::Millis(name) => of_histogram(name, 1e-3),
        Times::Totals { seconds, count } => both(seconds, count, 1.0),
    }
}

#[cfg(test)]
mod tests;
