//! Identifiers, parsed once and valid from then on.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IdError {
    /// Nothing was given.
    #[error("{what} is empty")]
    Empty {
        /// What was being read.
        what: &'static str,
    },
    /// Too many characters.
    #[error("{what} is longer than {max} characters")]
    TooLong {
        /// What was being read.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A character that is not allowed.
    #[error(
        "{what} `{text}` has the character {found:?}: only a-z, A-Z, 0-9, '-', '_' and '.' are allowed, and it starts with a letter or digit"
    )]
    BadChar {
        /// What was being read.
        what: &'static str,
        /// The text.
        text: String,
        /// The first offender.
        found: char,
    },
}

pub(crate) fn name(what: &'static str, text: &str) -> Result<String, IdError> {
    const MAX: usize = 64;
    if text.is_empty() {
        return Err(IdError::Empty { what });
    }
    if text.chars().count() > MAX {
        return Err(IdError::TooLong { what, max: MAX });
    }
    let bad =
        text.char_indices().find(|&(i, c)| !(c.is_ascii_alphanumeric() || (i > 0 && matches!(c, '-' | '_' | '.'))));
    match bad {
        Some((_, found)) => Err(IdError::BadChar { what, text: text.to_owned(), found }),
        None => Ok(text.to_owned()),
    }
}

macro_rules! names {
    ($($(#[$doc:meta])* $ty:ident = $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $ty(Arc<str>);

        impl $ty {
            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $ty {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                name($what, s).map(|name| Self(name.into()))
            }
        }

        impl fmt::Display for $ty {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    )*};
}

names! {
    /// The name of a pool; safe as a file name and as a metric label.
    PoolId = "pool id";
    /// The name of an engine as declared in `[engines]`.
    EngineName = "engine name";
}

/// A replica's place in its pool: `r0`, `r1`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub u16);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// A replica, named across the node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaKey {
    /// The pool.
    pub pool: PoolId,
    /// The place in it.
    pub replica: ReplicaId,
}

impl fmt::Display for ReplicaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.pool, self.replica)
    }
}

/// Counts the start attempts of a replica, growing for ever, also across restarts of the daemon.
/// A late answer that carries an old generation changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// The one after this.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_file_names() {
        for bad in ["", ".", "..", "../x", "a/b", "-m", "a b", "a\0", "é"] {
            assert!(bad.parse::<PoolId>().is_err(), "{bad:?}");
        }
        assert_eq!("chat-1.5_b".parse::<PoolId>().unwrap().as_str(), "chat-1.5_b");
        assert!("a".repeat(65).parse::<PoolId>().is_err());
    }
}
