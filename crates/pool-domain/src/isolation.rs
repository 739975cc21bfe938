//! What an engine is kept from.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Who an engine runs as, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunAs {
    /// A user of this machine, with all its groups: by name, or by number where the machine knows it.
    User(UserName),
    /// This user in this group and in no other, whether the machine knows them or not.
    Ids {
        /// The user.
        uid: u32,
        /// Its one group.
        gid: u32,
    },
}

/// How a user is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserName {
    /// By its name.
    Name(String),
    /// By its number.
    Uid(u32),
}

/// Text that names no user.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` names no user: write a user name, a uid, or uid:gid such as \"1000:1000\"")]
pub struct RunAsError(String);

impl FromStr for RunAs {
    type Err = RunAsError;

    fn from_str(text: &str) -> Result<Self, RunAsError> {
        let wrong = || RunAsError(text.chars().filter(|c| !c.is_control()).take(64).collect());
        // The number after the last is the kernel's "nobody in particular".
        let id = |number: &str| number.parse::<u32>().ok().filter(|id| *id != u32::MAX).ok_or_else(wrong);
        if let Some((uid, gid)) = text.split_once(':') {
            return Ok(Self::Ids { uid: id(uid)?, gid: id(gid)? });
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(Self::User(UserName::Uid(id(text)?)));
        }
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '$');
        let starts = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if starts && text.len() <= 64 && text.chars().all(named) {
            Ok(Self::User(UserName::Name(text.to_owned())))
        } else {
            Err(wrong())
        }
    }
}

impl fmt::Display for RunAs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(UserName::Name(name)) => f.write_str(name),
            Self::User(UserName::Uid(uid)) => write!(f, "{uid}"),
            Self::Ids { uid, gid } => write!(f, "{uid}:{gid}"),
        }
    }
}

/// What an engine is kept from, beside what every engine is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Isolation {
    /// Who it runs as; unset = as the daemon does.
    pub run_as: Option<RunAs>,
    /// Most bytes of the host's memory; unset = as much as there is.
    pub memory_max: Option<u64>,
    /// Most open files; unset = 65,536, or the daemon's own hard limit if that is less.
    pub nofile: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_as_they_are_written() {
        for text in ["nobody", "_svc-1.a", "1000", "1000:1001", "0:0"] {
            assert_eq!(text.parse::<RunAs>().unwrap().to_string(), text);
        }
        for text in ["", ":", "1:", ":1", "a:b", "1:a", "-1", "4294967295", "1 2", "a b", "a/b", "-a", "1000x"] {
            assert!(text.parse::<RunAs>().is_err(), "{text:?}");
        }
    }
}
