//! How a pool is replaced by another form of itself.

use std::fmt;

/// How a reload replaces engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// The best that fits.
    #[default]
    Auto,
    /// Stop the old, start the new.
    InPlace,
    /// Start the new beside the old, then stop the old.
    Overlap,
    /// Replica by replica.
    Rolling,
}

impl Strategy {
    /// The strategy as one word.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::InPlace => "in_place",
            Self::Overlap => "overlap",
            Self::Rolling => "rolling",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}
