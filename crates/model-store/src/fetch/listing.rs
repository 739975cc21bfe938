//! Which files a reference means, and where each of them is.

use http::header::{self, HeaderName};
use pool_domain::model_files::{RepoFile, choose, split};
use pool_domain::model_ref::{HfRef, HttpUrl};
use pool_domain::{RemoteSource, Sha256Digest};
use serde::Deserialize;

use super::http::{Http, Question, header_text};
use super::{Trouble, oci, s3};

/// One file to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Its name in the model's folder.
    pub(crate) name: String,
    /// Bytes, where that is told.
    pub(crate) bytes: Option<u64>,
    /// Its digest, where that is told.
    pub(crate) digest: Option<Sha256Digest>,
    pub(crate) at: At,
}

/// Where a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum At {
    Url(HttpUrl),
    /// Signed anew each time.
    S3 {
        bucket: String,
        key: String,
    },
}

/// All files of a model, the one that an engine is given first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) files: Vec<RemoteFile>,
    /// What the repository calls this state of it, where it does so.
    pub(crate) revision: Option<String>,
}

impl Listing {
    /// Bytes of all files together, where each is told.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.files.iter().map(|f| f.bytes).sum()
    }
}

/// Asks where that is necessary.
pub(crate) async fn list(http: &Http, source: &RemoteSource) -> Result<Listing, Trouble> {
    match source {
        RemoteSource::Hf(hf_ref) => hf(http, source, hf_ref).await,
        RemoteSource::Http(url) => Ok(plain(url)),
        RemoteSource::S3 { bucket, key } => s3::list(http, source, bucket, key).await,
        RemoteSource::Oci(oci_ref) => oci::list(http, source, oci_ref).await,
    }
}

/// A file, or all parts of a split, beside each other.
fn plain(url: &HttpUrl) -> Listing {
    let (folder, name) = url.path().rsplit_once('/').unwrap_or(("", url.path()));
    let names = split(name).unwrap_or_else(|| vec![name.to_owned()]);
    let file = |name: String| {
        // Both are of a reference, which has neither percent signs at its end nor a query.
        let at = url.join(&format!("{folder}/{name}")).unwrap_or_else(|_| url.clone());
        RemoteFile { name, bytes: None, digest: None, at: At::Url(at) }
    };
    Listing { files: names.into_iter().map(file).collect(), revision: None }
}

/// What the hub tells of a repository.
#[derive(Debug, Deserialize)]
struct HubModel {
    sha: String,
    siblings: Vec<HubFile>,
}

#[derive(Debug, Deserialize)]
struct HubFile {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<HubLfs>,
}

#[derive(Debug, Deserialize)]
struct HubLfs {
    sha256: Option<String>,
    size: Option<u64>,
}

async fn hf(http: &Http, source: &RemoteSource, hf: &HfRef) -> Result<Listing, Trouble> {
    let endpoint = http.policy.hf_endpoint.clone();
    let revision = hf.revision.as_deref().unwrap_or("main");
    let url = endpoint.below(&format!("api/models/{}/revision/{revision}", hf.repo)).with_query("blobs=true");
    let question = Question::default().with(header::ACCEPT, "application/json");
    let (status, headers, body) = http.get_whole(source, &url, &question).await?;
    if status != 200 {
        let code = header_text(&headers, &HeaderName::from_static("x-error-code")).unwrap_or_default();
        return Err(Trouble::Never(refused(status, &code, revision)));
    }
    let strange = |e: serde_json::Error| Trouble::Never(format!("the hub's answer cannot be read: {e}"));
    let model: HubModel = serde_json::from_slice(&body).map_err(strange)?;
    if model.sha.is_empty() || !model.sha.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(Trouble::Never("the hub's answer names no commit".into()));
    }
    let file = |f: HubFile| {
        let (digest, size) = f.lfs.map_or((None, None), |lfs| (lfs.sha256.and_then(|d| d.parse().ok()), lfs.size));
        RepoFile { name: f.rfilename, bytes: size.or(f.size), digest }
    };
    let all: Vec<RepoFile> = model.siblings.into_iter().map(file).collect();
    let chosen = choose(&all, hf.file.as_deref()).map_err(|e| Trouble::Never(e.to_string()))?;
    // By the commit, so that what is fetched is what was listed.
    let at = |name: &str| At::Url(endpoint.below(&format!("{}/resolve/{}/{name}", hf.repo, model.sha)));
    let files = named_beside(chosen, at);
    Ok(Listing { files, revision: Some(model.sha) })
}

/// Files of one folder of a repository, under their names there.
pub(super) fn named_beside(files: Vec<RepoFile>, at: impl Fn(&str) -> At) -> Vec<RemoteFile> {
    let last = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let file = |f: RepoFile| RemoteFile { name: last(&f.name), bytes: f.bytes, digest: f.digest, at: at(&f.name) };
    files.into_iter().map(file).collect()
}

fn refused(status: u16, code: &str, revision: &str) -> String {
    match (status, code) {
        (_, "GatedRepo") => {
            "the hub gives this repository only to those whom its owner admitted: set their token in `[models.tokens]`"
                .into()
        }
        (_, "RevisionNotFound") => format!("the hub knows no revision `{revision}` of this repository"),
        (401 | 403 | 404, _) => {
            format!(
                "the hub has no such repository, or not for everybody (status {status}): check its name, and whether it needs a token in `[models.tokens]`"
            )
        }
        _ => format!("the hub answers with status {status}"),
    }
}
