//! Tokens and keys, read from their files when they are needed, so that they can be changed there.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Trouble;

/// No such file is larger.
const MAX: u64 = 16 * 1024;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Where tokens and keys are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Secrets {
    /// Files with a bearer token, by host (with its port where that is not the usual one).
    pub(crate) tokens: BTreeMap<String, PathBuf>,
    /// A file in the form of `~/.aws/credentials`.
    pub(crate) s3: Option<PathBuf>,
}

/// Keys for a bucket.
#[derive(Debug, Clone)]
pub(crate) struct S3Keys {
    pub(crate) id: String,
    pub(crate) secret: Secret,
    pub(crate) session: Option<Secret>,
}

impl Secrets {
    /// The token for a host, where there is one.
    pub(crate) fn token(&self, authority: &str) -> Result<Option<Secret>, Trouble> {
        let Some(path) = self.tokens.get(authority) else { return Ok(None) };
        let wrong = |why: String| Trouble::Never(format!("the token file for {authority} {why}"));
        let text = read(path).map_err(wrong)?;
        let token = text.trim();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Trouble::Never(format!("the token file for {authority} has to hold the token alone")));
        }
        Ok(Some(Secret::new(token)))
    }

    /// The keys for buckets, where there are any.
    pub(crate) fn s3_keys(&self) -> Result<Option<S3Keys>, Trouble> {
        let Some(path) = &self.s3 else { return Ok(None) };
        let text = read(path).map_err(|why| Trouble::Never(format!("the file of `[models] s3_credentials` {why}")))?;
        let value = |key: &str| {
            let lines = text.lines().filter_map(|line| line.split_once('='));
            lines.map(|(k, v)| (k.trim(), v.trim())).find(|(k, _)| *k == key).map(|(_, v)| v.to_owned())
        };
        let (Some(id), Some(secret)) = (value("aws_access_key_id"), value("aws_secret_access_key")) else {
            let lines = "has to have the lines `aws_access_key_id = …` and `aws_secret_access_key = …`";
            return Err(Trouble::Never(format!("the file of `[models] s3_credentials` {lines}")));
        };
        Ok(Some(S3Keys { id, secret: Secret::new(secret), session: value("aws_session_token").map(Secret::new) }))
    }
}

fn read(path: &Path) -> Result<String, String> {
    let problem = |e: std::io::Error| format!("cannot be read: {}", e.kind());
    let file = File::open(path).map_err(problem)?;
    let metadata = fs::metadata(path).map_err(problem)?;
    if metadata.permissions().mode() & 0o007 != 0 {
        return Err("can be read by everybody on this machine: chmod 600 it".to_owned());
    }
    let mut text = String::new();
    file.take(MAX).read_to_string(&mut text).map_err(problem)?;
    Ok(text)
}
