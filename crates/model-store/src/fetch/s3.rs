//! Buckets. Addresses are signed; nothing is asked by the library that signs them.

use std::time::Duration;

use pool_domain::RemoteSource;
use pool_domain::model_files::{RepoFile, choose, split};
use pool_domain::model_ref::HttpUrl;
use rusty_s3::actions::ListObjectsV2;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};

use super::Trouble;
use super::http::{Http, Question};
use super::listing::{At, Listing, RemoteFile, named_beside};
use super::secrets::S3Keys;

/// How long a signature holds; each try has its own.
const HOLDS: Duration = Duration::from_secs(3600);
/// No folder of a model has more files.
const MOST: usize = 10_000;
const REGION: &str = "us-east-1";

fn bucket(http: &Http, name: &str) -> Result<Bucket, Trouble> {
    let region = http.s3_region.clone().unwrap_or_else(|| REGION.to_owned());
    let (endpoint, style) = match &http.policy.s3_endpoint {
        Some(endpoint) => (endpoint.to_string(), UrlStyle::Path),
        // A dot in the name would be outside of Amazon's certificate.
        None if name.contains('.') => (format!("https://s3.{region}.amazonaws.com"), UrlStyle::Path),
        None => (format!("https://s3.{region}.amazonaws.com"), UrlStyle::VirtualHost),
    };
    let wrong = |why: String| Trouble::Never(format!("the address of the bucket cannot be: {why}"));
    let endpoint = endpoint.parse().map_err(|_| wrong("`[models] s3_endpoint` is none".into()))?;
    Bucket::new(endpoint, style, name.to_owned(), region).map_err(|e| wrong(e.to_string()))
}

async fn keys(http: &Http) -> Result<Option<Credentials>, Trouble> {
    let secrets = http.secrets.clone();
    let read = tokio::task::spawn_blocking(move || secrets.s3_keys()).await;
    let keys = read.map_err(|_| Trouble::later("the keys for buckets were not read to the end"))??;
    Ok(keys.map(|S3Keys { id, secret, session }| match session {
        Some(session) => Credentials::new_with_token(id, secret.reveal(), session.reveal()),
        None => Credentials::new(id, secret.reveal()),
    }))
}

fn signed(url: &str) -> Result<HttpUrl, Trouble> {
    HttpUrl::parse(url).map_err(|e| Trouble::Never(format!("the address of the object cannot be: {e}")))
}

/// The address of an object, signed where there are keys.
pub(super) async fn address(http: &Http, name: &str, key: &str) -> Result<HttpUrl, Trouble> {
    let (bucket, keys) = (bucket(http, name)?, keys(http).await?);
    signed(bucket.get_object(keys.as_ref(), key).sign(HOLDS).as_str())
}

pub(super) async fn list(http: &Http, source: &RemoteSource, name: &str, key: &str) -> Result<Listing, Trouble> {
    let at = |key: &str| At::S3 { bucket: name.to_owned(), key: key.to_owned() };
    let Some(folder) = key.ends_with('/').then_some(key) else {
        let file = |key: String| {
            let name = key.rsplit('/').next().unwrap_or(&key).to_owned();
            RemoteFile { name, bytes: None, digest: None, at: at(&key) }
        };
        let keys = split(key).unwrap_or_else(|| vec![key.to_owned()]);
        return Ok(Listing { files: keys.into_iter().map(file).collect(), revision: None });
    };
    let (bucket, keys) = (bucket(http, name)?, keys(http).await?);
    let (mut found, mut next) = (Vec::new(), None::<String>);
    loop {
        let mut action = bucket.list_objects_v2(keys.as_ref());
        action.with_prefix(folder);
        if let Some(token) = next.take() {
            action.with_continuation_token(token);
        }
        let url = signed(action.sign(HOLDS).as_str())?;
        let (status, _, body) = http.get_whole(source, &url, &Question::default()).await?;
        if status != 200 {
            return Err(Trouble::Never(format!(
                "the bucket cannot be listed (status {status}): check its name, `[models] s3_region` and `s3_credentials`"
            )));
        }
        let text = std::str::from_utf8(&body).map_err(|_| Trouble::Never("the bucket's list is no text".into()))?;
        let page = ListObjectsV2::parse_response(text)
            .map_err(|e| Trouble::Never(format!("the bucket's list cannot be read: {e}")))?;
        for object in page.contents {
            let Some(name) = object.key.strip_prefix(folder).filter(|name| !name.is_empty()) else { continue };
            found.push(RepoFile { name: name.to_owned(), bytes: object.size, digest: None });
        }
        next = page.next_continuation_token;
        if next.is_none() {
            break;
        }
        if found.len() > MOST {
            return Err(Trouble::Never(format!("there are more than {MOST} objects below that key")));
        }
    }
    let chosen = choose(&found, None).map_err(|e| Trouble::Never(e.to_string()))?;
    Ok(Listing { files: named_beside(chosen, |name| at(&format!("{folder}{name}"))), revision: None })
}
