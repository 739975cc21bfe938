//! The text of a config and where its keys stand.

use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// One step from the top of a config to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    /// Into a table.
    Key(&'a str),
    /// Into a list.
    Index(usize),
}

/// Who said what is wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum At<'a> {
    /// A key of the file.
    Key(&'a [Step<'a>]),
    /// A flag of the command line.
    Flag(&'a str),
}

/// A config file's text. Without a file it is empty, and nothing in it can be at fault.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source {
    pub(crate) file: Option<PathBuf>,
    pub(crate) text: String,
}

impl Source {
    /// The directory relative paths start from.
    pub(crate) fn dir(&self) -> &Path {
        self.file.as_deref().and_then(Path::parent).unwrap_or(Path::new(""))
    }

    /// An error about a key or a flag.
    pub(crate) fn error(&self, at: At<'_>, message: impl Into<String>) -> ConfigError {
        let (file, line, key) = match at {
            At::Key(path) => (self.file.clone(), self.line_of(path), dotted(path)),
            At::Flag(flag) => (None, None, flag.to_owned()),
        };
        ConfigError { file, line, key: Some(key), message: message.into(), hint: None }
    }

    /// The line, from 1, of a byte of the text.
    pub(crate) fn line_at(&self, offset: usize) -> usize {
        let end = offset.min(self.text.len());
        self.text.as_bytes()[..end].iter().filter(|b| **b == b'\n').count() + 1
    }

    /// The line of a key, or of the nearest table above it that is there.
    pub(crate) fn line_of(&self, path: &[Step<'_>]) -> Option<usize> {
        let root = DeTable::parse(&self.text).ok()?;
        let mut offset = None;
        let mut table = Some(root.get_ref());
        let mut value: Option<&Spanned<DeValue<'_>>> = None;
        for step in path {
            match *step {
                Step::Key(key) => {
                    let Some((k, v)) = table.and_then(|t| t.iter().find(|(k, _)| k.get_ref() == key)) else { break };
                    offset = Some(k.span().start);
                    value = Some(v);
                }
                Step::Index(i) => {
                    let Some(DeValue::Array(list)) = value.map(Spanned::get_ref) else { break };
                    let Some(v) = list.get(i) else { break };
                    offset = Some(v.span().start);
                    value = Some(v);
                }
            }
            table = match value.map(Spanned::get_ref) {
                Some(DeValue::Table(t)) => Some(t),
                _ => None,
            };
        }
        offset.map(|o| self.line_at(o))
    }

    /// The dotted key that a byte of the text belongs to.
    pub(crate) fn key_at(&self, offset: usize) -> Option<String> {
        let root = DeTable::parse(&self.text).ok()?;
        in_table(root.get_ref(), offset).map(|mut steps| {
            steps.reverse();
            steps.join(".").replace(".[", "[")
        })
    }
}

/// `pool[1].devices`.
fn dotted(path: &[Step<'_>]) -> String {
    let mut out = String::new();
    for step in path {
        match step {
            Step::Index(i) => out.push_str(&format!("[{i}]")),
            Step::Key(k) => {
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(&quoted(k));
            }
        }
    }
    out
}

fn quoted(key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if bare { key.to_owned() } else { format!("{key:?}") }
}

/// The way to `offset`, last step first. What lies deeper wins, because the span of a table may be its header alone.
fn in_table(table: &DeTable<'_>, offset: usize) -> Option<Vec<String>> {
    let mut shallow = None;
    for (key, value) in table {
        let name = quoted(key.get_ref());
        if let Some(mut steps) = in_value(value.get_ref(), offset) {
            steps.push(name);
            return Some(steps);
        }
        if key.span().contains(&offset) || value.span().contains(&offset) {
            shallow = Some(vec![name]);
        }
    }
    shallow
}

fn in_value(value: &DeValue<'_>, offset: usize) -> Option<Vec<String>> {
    match value {
        DeValue::Table(table) => in_table(table, offset),
        DeValue::Array(list) => {
            let mut shallow = None;
            for (i, item) in list.iter().enumerate() {
                let name = format!("[{i}]");
                if let Some(mut steps) = in_value(item.get_ref(), offset) {
                    steps.push(name);
                    return Some(steps);
                }
                if item.span().contains(&offset) {
                    shallow = Some(vec![name]);
                }
            }
            shallow
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source { file: None, text: text.to_owned() }
    }

    #[test]
    fn keys_are_found() {
        let s = source(
            "[node]\nlisten = 1\n[engines.\"llama.cpp\"]\nkind = 2\n[[pool]]\nid=\"a\"\n[[pool]]\nid=\"b\"\n[pool.drain]\ndeadline = 3\n",
        );
        use Step::{Index, Key};
        assert_eq!(s.line_of(&[Key("node"), Key("listen")]), Some(2));
        assert_eq!(s.line_of(&[Key("engines"), Key("llama.cpp"), Key("kind")]), Some(4));
        assert_eq!(s.line_of(&[Key("pool"), Index(1), Key("id")]), Some(8));
        assert_eq!(s.line_of(&[Key("pool"), Index(1), Key("drain"), Key("deadline")]), Some(10));
        assert_eq!(s.line_of(&[Key("pool"), Index(1), Key("model")]), Some(7));
        assert_eq!(s.line_of(&[Key("gpu")]), None);
        assert_eq!(s.key_at(s.text.find("deadline").unwrap()).unwrap(), "pool[1].drain.deadline");
        assert_eq!(s.key_at(s.text.find("kind").unwrap()).unwrap(), "engines.\"llama.cpp\".kind");
    }
}
