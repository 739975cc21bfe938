//! Where a model comes from, parsed once and valid from then on.

mod digest;
#[cfg(test)]
mod tests;
mod url;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

pub use digest::{DigestError, Sha256Digest};
pub use url::{Host, HttpUrl, Origin, UrlError};

use crate::id::{IdError, name};

/// Longest reference, in bytes.
const MAX: usize = 4096;
/// What stands before the digest of a file at the end of a reference.
const DIGEST: &str = "#sha256=";

/// Why a text is no model reference.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ModelRefError {
    /// Nothing was given.
    #[error("the model reference is empty")]
    Empty,
    /// Too long.
    #[error("the model reference is longer than {MAX} bytes")]
    TooLong,
    /// A control character.
    #[error("the model reference has the control character {0:?}")]
    Control(char),
    /// Of no known form.
    #[error(
        "model reference `{0}` is of no known form: use /path, hf:ORG/REPO/FILE, https://HOST/FILE, s3://BUCKET/KEY, oci://REGISTRY/REPO:TAG, name:NAME or stub:NAME"
    )]
    Unknown(String),
    /// Not a name that an engine can serve.
    #[error(transparent)]
    Name(#[from] IdError),
    /// One part of it cannot be.
    #[error("model reference `{text}`: {why}")]
    Part {
        /// The reference.
        text: String,
        /// What is wrong with it, and what would be right.
        why: String,
    },
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ModelRef {
    /// A file or folder on this machine (`file:/path` or `/path`).
    File(FileRef),
    /// A name the stub engine serves (`stub:NAME`); nothing is staged.
    Stub(String),
    /// Whatever an external engine serves under this name (`name:NAME`); nothing is staged.
    Named(String),
    /// A model that is fetched where the policy allows it.
    Remote(RemoteRef),
}

/// A file on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileRef {
    /// Its absolute path.
    pub path: String,
    /// What it has to hold.
    pub digest: Option<Sha256Digest>,
}

/// A model on another machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemoteRef {
    /// Where.
    pub source: RemoteSource,
    /// What its one file has to hold.
    pub digest: Option<Sha256Digest>,
}

/// Where models are fetched from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RemoteSource {
    /// A repository of the Hugging Face hub, or one file of it.
    Hf(HfRef),
    /// A file at an address.
    Http(HttpUrl),
    /// An object, or all objects below a key that ends with `/`.
    S3 {
        /// The bucket.
        bucket: String,
        /// The key.
        key: String,
    },
    /// An artifact of a container registry.
    Oci(OciRef),
}

/// A repository of the Hugging Face hub.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HfRef {
    /// `org/repo`.
    pub repo: String,
    /// Branch, tag or commit; the hub's `main` if unset.
    pub revision: Option<String>,
    /// One file, with its folders; the whole repository if unset.
    pub file: Option<String>,
}

/// An artifact of a container registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OciRef {
    /// Host, and port if it is not the usual one.
    pub registry: String,
    /// Its name there.
    pub repo: String,
    /// Which of its versions.
    pub version: OciVersion,
}

/// A version of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum OciVersion {
    /// A name that may come to mean another version.
    Tag(String),
    /// The digest of its manifest.
    Digest(Sha256Digest),
}

impl ModelRef {
    /// A file without a digest.
    pub fn file(path: impl Into<String>) -> Self {
        Self::File(FileRef { path: path.into(), digest: None })
    }

    /// A short name for people and for the engine's alias: the file's stem, the repository's or the stub's name.
    #[must_use]
    pub fn model_id(&self) -> String {
        let stem = |path: &str| {
            let file = path.trim_end_matches('/').rsplit('/').next().unwrap_or(path);
            file.strip_suffix(".gguf").unwrap_or(file).to_owned()
        };
        match self {
            Self::Stub(n) | Self::Named(n) => n.clone(),
            Self::File(file) => stem(&file.path),
            Self::Remote(remote) => match &remote.source {
                RemoteSource::Hf(hf) => stem(hf.file.as_ref().unwrap_or(&hf.repo)),
                RemoteSource::Http(url) => stem(url.path()),
                RemoteSource::S3 { key, .. } => stem(key),
                RemoteSource::Oci(oci) => stem(&oci.repo),
            },
        }
    }

    /// What its one file has to hold, where somebody said so.
    #[must_use]
    pub fn digest(&self) -> Option<Sha256Digest> {
        match self {
            Self::File(file) => file.digest,
            Self::Remote(remote) => remote.digest,
            Self::Stub(_) | Self::Named(_) => None,
        }
    }
}

impl FromStr for ModelRef {
    type Err = ModelRefError;
    fn from_str(s: &str) -> Result<Self, ModelRefError> {
        if s.is_empty() {
            return Err(ModelRefError::Empty);
        }
        if s.len() > MAX {
            return Err(ModelRefError::TooLong);
        }
        if let Some(found) = s.chars().find(|c| c.is_control()) {
            return Err(ModelRefError::Control(found));
        }
        if let Some(n) = s.strip_prefix("stub:") {
            return Ok(Self::Stub(name("stub model name", n)?));
        }
        if let Some(n) = s.strip_prefix("name:") {
            return if n.is_empty() {
                Err(IdError::Empty { what: "model name" }.into())
            } else {
                Ok(Self::Named(n.to_owned()))
            };
        }
        let part = |why: String| ModelRefError::Part { text: s.to_owned(), why };
        let (text, digest) = match s.rsplit_once(DIGEST) {
            Some((text, digits)) => (text, Some(digits.parse().map_err(|e: DigestError| part(e.to_string()))?)),
            None => (s, None),
        };
        let path = text.strip_prefix("file:").unwrap_or(text);
        if path.starts_with('/') {
            return Ok(Self::File(FileRef { path: path.to_owned(), digest }));
        }
        let source = match RemoteSource::parse(text) {
            Some(source) => source.map_err(part)?,
            None => return Err(ModelRefError::Unknown(s.to_owned())),
        };
        if digest.is_some() && !source.one_file() {
            return Err(part(
                "a digest is of one file: name one, or pin a repository with @COMMIT and an artifact with @sha256:DIGEST"
                    .into(),
            ));
        }
        Ok(Self::Remote(RemoteRef { source, digest }))
    }
}

impl RemoteSource {
    /// `None` if the text is of no such form.
    fn parse(text: &str) -> Option<Result<Self, String>> {
        Some(match text.split_once(':')? {
            ("hf", rest) => hf(rest).map(Self::Hf),
            ("http" | "https", _) => http(text).map(Self::Http),
            ("s3", rest) => s3(rest),
            ("oci", rest) => oci(rest).map(Self::Oci),
            _ => return None,
        })
    }

    /// Whether it names one file and not several.
    #[must_use]
    pub fn one_file(&self) -> bool {
        let file = match self {
            Self::Hf(hf) => hf.file.as_deref(),
            Self::Http(url) => Some(url.path()),
            Self::S3 { key, .. } => (!key.ends_with('/')).then_some(key.as_str()),
            Self::Oci(_) => None,
        };
        file.is_some_and(|file| crate::model_files::split(file).is_none())
    }

    /// The scheme, for people.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Hf(_) => "hf",
            Self::Http(url) if url.origin().secure => "https",
            Self::Http(_) => "http",
            Self::S3 { .. } => "s3",
            Self::Oci(_) => "oci",
        }
    }
}

fn graphic(text: &str, more: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

/// A name that may stand in a path: of a repository, a revision, a tag.
fn plain(text: &str, longest: usize) -> bool {
    let start = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    start && text.len() <= longest && graphic(text, "-_.") && !text.contains("..")
}

/// A relative path whose parts are names; nothing in it leads elsewhere, however it is read.
#[must_use]
pub fn is_relative_path(path: &str) -> bool {
    let part = |p: &str| !matches!(p, "" | "." | "..") && p.len() <= 255;
    let bad = |c: char| c.is_control() || matches!(c, '\\' | '%' | '?' | '#' | '*' | ':');
    !path.contains(bad) && path.split('/').all(part)
}

fn hf(text: &str) -> Result<HfRef, String> {
    const FORM: &str = "write hf:ORG/REPO, hf:ORG/REPO/FILE or hf:ORG/REPO@REVISION/FILE";
    let (org, rest) = text.split_once('/').ok_or_else(|| FORM.to_owned())?;
    let (repo, file) = rest.split_once('/').map_or((rest, None), |(repo, file)| (repo, Some(file)));
    let (repo, revision) = repo.split_once('@').map_or((repo, None), |(repo, revision)| (repo, Some(revision)));
    if !plain(org, 96) || !plain(repo, 96) {
        return Err(format!("`{org}/{repo}` is no repository: {FORM}"));
    }
    if let Some(revision) = revision.filter(|r| !plain(r, 128)) {
        return Err(format!("`{revision}` is no branch, tag or commit: {FORM}"));
    }
    if let Some(file) = file.filter(|f| !is_relative_path(f)) {
        return Err(format!("`{file}` is no file of a repository: {FORM}"));
    }
    Ok(HfRef { repo: format!("{org}/{repo}"), revision: revision.map(str::to_owned), file: file.map(str::to_owned) })
}

fn http(text: &str) -> Result<HttpUrl, String> {
    if text.contains('#') {
        return Err("behind `#` only sha256=DIGEST may stand".into());
    }
    let url = HttpUrl::parse(text).map_err(|e| e.to_string())?;
    if url.query().is_some() {
        return Err("a query is often a secret, and such an address does not last: leave it out".into());
    }
    let file = url.path().rsplit('/').next().unwrap_or_default();
    if file.is_empty() || file.contains('%') || !is_relative_path(file) {
        return Err("it has to end with the plain name of a file".into());
    }
    Ok(url)
}

fn s3(text: &str) -> Result<RemoteSource, String> {
    const FORM: &str = "write s3://BUCKET/KEY, or s3://BUCKET/FOLDER/ for all that is below";
    let (bucket, key) = text.strip_prefix("//").and_then(|t| t.split_once('/')).ok_or_else(|| FORM.to_owned())?;
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let inner = |c: char| edge(c) || c == '-' || c == '.';
    let named = (3..=63).contains(&bucket.len()) && bucket.chars().all(inner) && !bucket.contains("..");
    if !named || !bucket.starts_with(edge) || !bucket.ends_with(edge) || bucket.parse::<std::net::Ipv4Addr>().is_ok() {
        return Err(format!("`{bucket}` is no bucket: {FORM}"));
    }
    if !is_relative_path(key.strip_suffix('/').unwrap_or(key)) {
        return Err(format!("`{key}` is no key of a model: {FORM}"));
    }
    Ok(RemoteSource::S3 { bucket: bucket.to_owned(), key: key.to_owned() })
}

fn oci(text: &str) -> Result<OciRef, String> {
    const FORM: &str = "write oci://REGISTRY/REPO:TAG or oci://REGISTRY/REPO@sha256:DIGEST";
    let (registry, rest) = text.strip_prefix("//").and_then(|t| t.split_once('/')).ok_or_else(|| FORM.to_owned())?;
    let url = HttpUrl::parse(&format!("https://{registry}/")).map_err(|e| format!("{e}: {FORM}"))?;
    let (repo, version) = if let Some((repo, digest)) = rest.split_once('@') {
        let digest = digest.strip_prefix("sha256:").and_then(|d| d.parse().ok());
        (repo, OciVersion::Digest(digest.ok_or_else(|| format!("the digest cannot be: {DigestError}: {FORM}"))?))
    } else {
        let (repo, tag) = rest.rsplit_once(':').ok_or_else(|| format!("it has no tag: {FORM}"))?;
        if !plain(tag, 128) {
            return Err(format!("`{tag}` is no tag: {FORM}"));
        }
        (repo, OciVersion::Tag(tag.to_owned()))
    };
    let lower = |part: &str| plain(part, 128) && !part.contains(|c: char| c.is_ascii_uppercase());
    if !repo.split('/').all(lower) {
        return Err(format!("`{repo}` is no name of a repository: {FORM}"));
    }
    Ok(OciRef { registry: url.origin().authority(), repo: repo.to_owned(), version })
}

impl fmt::Display for RemoteSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hf(hf) => {
                write!(f, "hf:{}", hf.repo)?;
                hf.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))?;
                hf.file.iter().try_for_each(|file| write!(f, "/{file}"))
            }
            Self::Http(url) => url.fmt(f),
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::Oci(OciRef { registry, repo, version }) => match version {
                OciVersion::Tag(tag) => write!(f, "oci://{registry}/{repo}:{tag}"),
                OciVersion::Digest(digest) => write!(f, "oci://{registry}/{repo}@sha256:{digest}"),
            },
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "file:{}", file.path)?,
            Self::Stub(n) => write!(f, "stub:{n}")?,
            Self::Named(n) => write!(f, "name:{n}")?,
            Self::Remote(remote) => remote.source.fmt(f)?,
        }
        self.digest().iter().try_for_each(|digest| write!(f, "{DIGEST}{digest}"))
    }
}
