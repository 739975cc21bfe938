//! Artifacts of container registries: a manifest names blobs, of which those with names, or the one with a model, are
//! fetched. (OCI distribution specification 1.1.)

use http::header;
use pool_domain::model_files::{RepoFile, choose};
use pool_domain::model_policy::is_loopback;
use pool_domain::model_ref::{HttpUrl, OciRef, OciVersion};
use pool_domain::{RemoteSource, Sha256Digest};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::http::{Http, Question};
use super::listing::{At, Listing, RemoteFile};
use super::secrets::Secret;
use super::{Trouble, digest_of};

const MANIFESTS: &str =
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
/// Who packs an artifact writes file names here.
const TITLE: &str = "org.opencontainers.image.title";

#[derive(Debug, Deserialize)]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    #[serde(rename = "mediaType")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

fn registry(oci: &OciRef) -> Result<HttpUrl, Trouble> {
    let wrong = |e: pool_domain::model_ref::UrlError| Trouble::Never(format!("the registry cannot be asked: {e}"));
    let url = HttpUrl::parse(&format!("https://{}", oci.registry)).map_err(wrong)?;
    // One on this machine has no certificate.
    if is_loopback(&url.origin().host) {
        return HttpUrl::parse(&format!("http://{}", oci.registry)).map_err(wrong);
    }
    Ok(url)
}

pub(super) async fn list(http: &Http, source: &RemoteSource, oci: &OciRef) -> Result<Listing, Trouble> {
    let registry = registry(oci)?;
    let version = match &oci.version {
        OciVersion::Tag(tag) => tag.clone(),
        OciVersion::Digest(digest) => format!("sha256:{digest}"),
    };
    let manifest = below(&registry, &format!("{}/manifests/{version}", oci.repo))?;
    let question = Question::default().with(header::ACCEPT, MANIFESTS);
    let (status, _, body) = http.get_whole(source, &manifest, &question).await?;
    if status != 200 {
        let why = "check the name and the tag, and whether a token is needed in `[models.tokens]`";
        return Err(Trouble::Never(format!("the registry does not give it (status {status}): {why}")));
    }
    let digest = digest_of(Sha256::new_with_prefix(&body));
    if let OciVersion::Digest(wanted) = &oci.version
        && digest != *wanted
    {
        return Err(Trouble::Never(format!("the registry gives another manifest, sha256:{digest}")));
    }
    let strange = |e: serde_json::Error| Trouble::Never(format!("the registry's manifest cannot be read: {e}"));
    let layers = serde_json::from_slice::<Manifest>(&body).map_err(strange)?.layers;
    let mut files = Vec::new();
    for (name, layer) in chosen(&layers)? {
        let digest: Sha256Digest = layer
            .digest
            .strip_prefix("sha256:")
            .and_then(|d| d.parse().ok())
            .ok_or_else(|| Trouble::Never("the registry names a file by something else than its SHA-256".into()))?;
        let at = At::Url(below(&registry, &format!("{}/blobs/sha256:{digest}", oci.repo))?);
        files.push(RemoteFile { name, bytes: Some(layer.size), digest: Some(digest), at });
    }
    Ok(Listing { files, revision: Some(format!("sha256:{digest}")) })
}

/// Names of repositories are joined as they are: their colons are not to be encoded.
fn below(registry: &HttpUrl, path: &str) -> Result<HttpUrl, Trouble> {
    registry.join(&format!("/v2/{path}")).map_err(|e| Trouble::Never(format!("the registry cannot be asked: {e}")))
}

fn chosen(layers: &[Layer]) -> Result<Vec<(String, &Layer)>, Trouble> {
    let titled: Vec<(&String, &Layer)> = layers.iter().filter_map(|l| Some((l.annotations.get(TITLE)?, l))).collect();
    if titled.is_empty() {
        let is_model = |l: &&Layer| l.media_type.contains("gguf") || l.media_type.ends_with("image.model");
        let models: Vec<&Layer> = layers.iter().filter(is_model).collect();
        return match models.as_slice() {
            [one] => Ok(vec![("model.gguf".to_owned(), one)]),
            [] => {
                Err(Trouble::Never("the artifact has no file with a name, and none that is a model by its type".into()))
            }
            _ => Err(Trouble::Never("the artifact has several models without names".into())),
        };
    }
    let all: Vec<RepoFile> =
        titled.iter().map(|(n, l)| RepoFile { name: (*n).clone(), bytes: Some(l.size), digest: None }).collect();
    let chosen = choose(&all, None).map_err(|e| Trouble::Never(e.to_string()))?;
    let of = |name: &str| titled.iter().find(|(n, _)| *n == name).map(|(_, layer)| *layer);
    let last = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    Ok(chosen.iter().filter_map(|f| Some((last(&f.name), of(&f.name)?))).collect())
}

#[derive(Debug, Deserialize)]
struct Granted {
    token: Option<String>,
    access_token: Option<String>,
}

/// What a registry wants to see, from whom it says grants it.
pub(super) async fn token(
    http: &Http,
    source: &RemoteSource,
    oci: &OciRef,
    challenge: &str,
) -> Result<Secret, Trouble> {
    let wrong = || Trouble::Never("the registry asks for credentials in a way that is not known here".to_owned());
    let challenge = challenge.strip_prefix("Bearer ").ok_or_else(wrong)?;
    let value = |key: &str| {
        let (_, rest) = challenge.split_once(&format!("{key}=\""))?;
        rest.split_once('"').map(|(value, _)| value)
    };
    let realm = value("realm").and_then(|realm| HttpUrl::parse(realm).ok()).ok_or_else(wrong)?;
    let escaped = |text: &str| text.replace('%', "%25").replace(['&', '#', ' '], "");
    let service = value("service").map(|s| format!("service={}&", escaped(s))).unwrap_or_default();
    let scope = value("scope").map_or_else(|| format!("repository:{}:pull", oci.repo), escaped);
    let url = realm.with_query(format!("{service}scope={scope}"));
    let (status, _, body) = http.get_whole(source, &url, &Question::default()).await?;
    let granted = serde_json::from_slice::<Granted>(&body).ok().filter(|_| status == 200);
    let token = granted.and_then(|g| g.token.or(g.access_token));
    token.map(Secret::new).ok_or_else(|| {
        Trouble::Never(format!(
            "the registry lets nobody in without credentials (status {status}): see `[models.tokens]`"
        ))
    })
}
