//! From bytes to [`RawConfig`], with a helpful word where that fails.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::raw::RawConfig;
use super::source::Source;
use super::{ConfigError, MAX_BYTES};

/// Reads a file of bounded size as UTF-8. A byte order mark is passed over.
pub(crate) fn read(path: &Path) -> Result<Source, ConfigError> {
    let error = |message: String| ConfigError { file: Some(path.into()), line: None, key: None, message, hint: None };
    let meta = std::fs::metadata(path).map_err(|e| error(format!("cannot be read: {e}")))?;
    if !meta.is_file() {
        return Err(error("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| error(format!("cannot be read: {e}")))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| error(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(error(format!("is larger than {} KiB", MAX_BYTES / 1024)));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        ConfigError { line: Some(line), ..error("is not UTF-8".into()) }.hinting("save the file as UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    Ok(Source { file: Some(path.into()), text })
}

/// Parses the text.
pub(crate) fn parse(source: &Source) -> Result<RawConfig, ConfigError> {
    toml::from_str(&source.text).map_err(|e| explain(source, &e))
}

fn explain(source: &Source, error: &toml::de::Error) -> ConfigError {
    let message = error.message().trim();
    let at = error.span().map(|s| s.start);
    let (short, expected) = split(message);
    ConfigError {
        file: source.file.clone(),
        line: at.map(|o| source.line_at(o)),
        key: at.and_then(|o| source.key_at(o)),
        message: short.to_owned(),
        hint: nearest(message, &expected),
    }
}

/// Takes "…, expected one of `a`, `b`" apart.
fn split(message: &str) -> (&str, Vec<&str>) {
    for lead in [", expected one of ", ", expected `"] {
        if let Some(i) = message.find(lead) {
            return (&message[..i], backticked(&message[i..]));
        }
    }
    (message, Vec::new())
}

fn backticked(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The expected word that is most like the one that was found, or all of them if none is.
fn nearest(message: &str, expected: &[&str]) -> Option<String> {
    let found = *backticked(message).first()?;
    if expected.is_empty() {
        return None;
    }
    Some(match similar(found, expected.iter().copied()) {
        Some(word) => format!("did you mean `{word}`?"),
        None => format!("known here: {}", expected.join(", ")),
    })
}

/// The candidate that is most like `found`, if any is like it at all.
pub(crate) fn similar<'a>(found: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (strsim::jaro_winkler(&found.to_lowercase(), c), c))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}
