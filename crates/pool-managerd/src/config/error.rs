//! What is wrong with a config, where, and what would be right.

use std::fmt;
use std::path::PathBuf;

/// A config that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file; `None` where the command line is at fault.
    pub file: Option<PathBuf>,
    /// Line in it, from 1.
    pub line: Option<usize>,
    /// Dotted key or flag.
    pub key: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub hint: Option<String>,
}

impl ConfigError {
    /// The same with a hint, unless it has one.
    #[must_use]
    pub fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| hint.into());
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(line) = self.line {
                write!(f, ":{line}")?;
            }
            f.write_str(": ")?;
        }
        if let Some(key) = &self.key {
            write!(f, "{key}: ")?;
        }
        // One line, whatever the parser says.
        f.write_str(&self.message.replace('\n', "; "))
    }
}

impl std::error::Error for ConfigError {}
