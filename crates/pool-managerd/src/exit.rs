//! How the program ends when it does not end well.

use std::io::Write;
use std::process::ExitCode;

use crate::config::ConfigError;

/// The daemon refused, is out of reach, or the work failed.
pub const REFUSED: u8 = 1;
/// Wrong use of the command line.
pub const USAGE: u8 = 64;
/// No usable GPU.
pub const NO_GPU: u8 = 69;
/// A bug, or a failure nobody planned for.
pub const BUG: u8 = 70;
/// Another instance holds the state directory.
pub const IN_USE: u8 = 75;
/// The config cannot be used.
pub const CONFIG: u8 = 78;

/// An end with a message, what might help, and a code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// What the process ends with.
    pub code: u8,
    /// One line.
    pub message: String,
    /// What might help, a line each.
    pub hints: Vec<String>,
}

impl Exit {
    /// An end without hints.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hints: Vec::new() }
    }

    /// With one more hint.
    #[must_use]
    pub fn hinting(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Tells it on stderr.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        let mut text = format!("pool-managerd: {}\n", self.message.replace('\n', "; "));
        for hint in &self.hints {
            text.push_str(&format!("hint: {}\n", hint.replace('\n', " ")));
        }
        tell(&text);
        ExitCode::from(self.code)
    }
}

impl From<ConfigError> for Exit {
    fn from(error: ConfigError) -> Self {
        Self { code: CONFIG, message: error.to_string(), hints: error.hint.into_iter().collect() }
    }
}

/// Writes to stdout. A reader that has gone away is no error.
///
/// # Errors
/// Whatever else keeps the text from being written.
pub fn print(text: &str) -> Result<(), Exit> {
    is_read(text).map(drop)
}

/// The same; says whether somebody still reads, for what would go on for ever.
///
/// # Errors
/// Whatever else keeps the text from being written.
pub fn is_read(text: &str) -> Result<bool, Exit> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Exit::new(BUG, format!("cannot write: {e}"))),
    }
}

/// Writes to stderr. If that is gone there is nobody to tell.
pub fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
