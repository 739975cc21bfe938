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
    /// A model reference of no known form.
    #[error("model reference `{0}` is of no known form: use file:/path, /path or stub:NAME")]
    UnknownModelRef(String),
}

fn name(what: &'static str, text: &str) -> Result<String, IdError> {
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

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ModelRef {
    /// A file on this machine (`file:/path` or `/path`).
    File(String),
    /// A name the stub engine serves (`stub:NAME`); nothing is staged.
    Stub(String),
    /// Whatever an external engine serves under this name (`name:NAME`); nothing is staged.
    Named(String),
}

impl ModelRef {
    /// A short name for people and for the engine's alias: the file's stem or the stub's name.
    #[must_use]
    pub fn model_id(&self) -> String {
        match self {
            Self::Stub(n) | Self::Named(n) => n.clone(),
            Self::File(p) => {
                let file = p.rsplit('/').next().unwrap_or(p);
                file.strip_suffix(".gguf").unwrap_or(file).to_owned()
            }
        }
    }
}

impl FromStr for ModelRef {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        const MAX: usize = 4096;
        let what = "model reference";
        if s.is_empty() {
            return Err(IdError::Empty { what });
        }
        if s.len() > MAX {
            return Err(IdError::TooLong { what, max: MAX });
        }
        if let Some(found) = s.chars().find(|c| c.is_control()) {
            return Err(IdError::BadChar { what, text: s.escape_debug().to_string(), found });
        }
        if let Some(n) = s.strip_prefix("stub:") {
            return name("stub model name", n).map(Self::Stub);
        }
        if let Some(n) = s.strip_prefix("name:") {
            return if n.is_empty() {
                Err(IdError::Empty { what: "model name" })
            } else {
                Ok(Self::Named(n.to_owned()))
            };
        }
        let path = s.strip_prefix("file:").unwrap_or(s);
        if path.starts_with('/') {
            Ok(Self::File(path.to_owned()))
        } else {
            Err(IdError::UnknownModelRef(s.to_owned()))
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(p) => write!(f, "file:{p}"),
            Self::Stub(n) => write!(f, "stub:{n}"),
            Self::Named(n) => write!(f, "name:{n}"),
        }
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

    #[test]
    fn model_refs() {
        assert_eq!("file:/m/a.gguf".parse::<ModelRef>().unwrap().model_id(), "a");
        assert_eq!("/m/a.gguf".parse(), Ok(ModelRef::File("/m/a.gguf".into())));
        assert_eq!("stub:tiny".parse(), Ok(ModelRef::Stub("tiny".into())));
        for bad in ["", "a.gguf", "../x", "http://169.254.169.254/", "hf://", "-m", "/a\n", "stub:"] {
            assert!(bad.parse::<ModelRef>().is_err(), "{bad:?}");
        }
        assert!(format!("/{}", "a".repeat(4097)).parse::<ModelRef>().is_err());
    }
}
