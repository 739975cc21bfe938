//! Fetching: a listing of the files that a reference means, and each of them, piece by piece.

mod connect;
mod file;
mod http;
mod listing;
mod oci;
mod s3;
mod secrets;

use std::time::Duration;

use pool_domain::download::{Patience, Refusal};
use pool_domain::model_policy::Denied;
use pool_domain::{BackoffPolicy, Failure, FailureClass, Sha256Digest};

pub(crate) use self::file::{Fetched, MakeRoom, Partial, Progress, blocking, fetch_file};
pub(crate) use self::http::Http;
pub(crate) use self::listing::{RemoteFile, list};
pub(crate) use self::secrets::Secrets;

/// How long servers are waited for. The defaults suit the internet; tests make it short.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Until a connection stands, TLS included.
    pub connect: Duration,
    /// Until an answer begins, and the time in which some of its body has to come.
    pub stall: Duration,
    /// Bytes that have to come in that time.
    pub stall_bytes: u64,
    /// Delays between tries.
    pub backoff: BackoffPolicy,
    /// Tries in a row that bring nothing.
    pub tries: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            stall_bytes: 16 * 1024,
            backoff: BackoffPolicy::default(),
            tries: 8,
        }
    }
}

impl Limits {
    fn patience(&self) -> Patience {
        Patience::new(self.backoff, self.tries)
    }
}

/// Why something was not fetched.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// Trying again is of no use until somebody changes something.
    Never(String),
    /// It may come later, perhaps not before this is over.
    Later(String, Option<Duration>),
    /// This node has no room for it.
    Node(String),
}

impl Trouble {
    pub(crate) fn later(why: impl Into<String>) -> Self {
        Self::Later(why.into(), None)
    }

    /// As a failure of a start. `what` names what was to be fetched.
    pub(crate) fn failure(self, what: &str) -> Failure {
        let (class, why) = match self {
            Self::Never(why) => (FailureClass::Artifact, why),
            Self::Later(why, _) => (FailureClass::Fetch, why),
            Self::Node(why) => (FailureClass::Node, why),
        };
        Failure::new(class, format!("`{what}` cannot be fetched: {why}"))
    }
}

impl From<Denied> for Trouble {
    fn from(denied: Denied) -> Self {
        Self::Never(denied.to_string())
    }
}

impl From<Refusal> for Trouble {
    fn from(refusal: Refusal) -> Self {
        Self::Never(refusal.to_string())
    }
}

/// Something about the disk of the cache.
pub(crate) fn disk(error: &std::io::Error) -> Trouble {
    use std::io::ErrorKind;
    Trouble::Node(match error.kind() {
        ErrorKind::StorageFull => "the disk of the model cache is full".to_owned(),
        ErrorKind::QuotaExceeded => "the quota for the model cache is used up".to_owned(),
        ErrorKind::FileTooLarge => "the model cache may not hold files as large".to_owned(),
        _ => format!("the model cache cannot be used: {error}"),
    })
}

/// A digest as hashing gives it.
pub(crate) fn digest_of(hasher: sha2::Sha256) -> Sha256Digest {
    Sha256Digest(sha2::Digest::finalize(hasher).into())
}
