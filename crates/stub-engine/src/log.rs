//! Log lines. A closed output is no reason to die, so failures to write are passed over.

use std::fmt;
use std::io::{self, Write};

/// A line on stdout.
pub(crate) fn info(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// A line on stderr.
pub(crate) fn error(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "error: {text}");
}
