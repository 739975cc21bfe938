//! Services with a scheme of their own, by their real addresses: the hub, buckets, registries.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use model_store::Models;
use pool_domain::FailureClass;
use pool_domain::model_ref::HttpUrl;

use crate::server::{Reply, Seen, Server, file};
use crate::{Bench, content, failed, fetch, holds, options, sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one repository, whatever its name: the API, and files that it redirects to its storage.
pub(crate) struct Hub {
    pub(crate) server: Server,
    files: Arc<AtomicUsize>,
}

impl Hub {
    pub(crate) async fn start(files: Vec<(&'static str, Vec<u8>)>) -> Self {
        Self::telling(files, |told| told).await
    }

    /// `lie` changes what the API says.
    pub(crate) async fn telling(
        files: Vec<(&'static str, Vec<u8>)>,
        lie: impl Fn(String) -> String + Send + Sync + 'static,
    ) -> Self {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let server = Server::start(move |seen: &Seen| {
            if seen.target.starts_with("/api/models/") {
                assert!(seen.target.ends_with("/revision/main?blobs=true"), "{}", seen.target);
                let one = |(name, bytes): &(&str, Vec<u8>)| {
                    let lfs = if name.ends_with(".json") {
                        String::new()
                    } else {
                        let sum = sha256(bytes);
                        format!(r#","lfs":{{"sha256":"{sum}","size":{},"pointerSize":134}}"#, bytes.len())
                    };
                    format!(r#"{{"rfilename":"{name}","size":{},"blobId":"x"{lfs}}}"#, bytes.len())
                };
                let all = files.iter().map(one).collect::<Vec<_>>().join(",");
                return Reply::json(&lie(format!(r#"{{"id":"org/repo","sha":"{COMMIT}","siblings":[{all}]}}"#)));
            }
            if let Some((_, name)) = seen.target.split_once(&format!("/resolve/{COMMIT}/")) {
                return Reply::to(&format!("/storage/{name}?X-Signature=secret")).with("x-repo-commit", COMMIT);
            }
            let name = seen.target.strip_prefix("/storage/").and_then(|t| t.split_once('?')).map(|(name, _)| name);
            match files.iter().find(|(n, _)| Some(*n) == name) {
                Some((_, bytes)) => {
                    counter.fetch_add(1, Ordering::SeqCst);
                    file(seen, bytes, "\"1\"")
                }
                None => Reply::status("404 Not Found").with("x-error-code", "EntryNotFound"),
            }
        })
        .await;
        Self { server, files: count }
    }

    pub(crate) fn endpoint(&self) -> HttpUrl {
        HttpUrl::parse(&self.server.url("")).unwrap()
    }

    pub(crate) fn file_requests(&self) -> usize {
        self.files.load(Ordering::SeqCst)
    }

    fn bench(&self) -> Bench {
        let mut b = Bench::new(&self.server);
        b.options.policy.allow = vec!["hf:org/*".parse().unwrap()];
        b.options.policy.hf_endpoint = self.endpoint();
        b
    }
}

#[tokio::test]
async fn a_file_of_the_hub_is_fetched_from_its_storage() {
    let model = content(1, 1 << 20);
    let hub = Hub::start(vec![("README.md", b"x".to_vec()), ("q4/a.gguf", model.clone())]).await;
    let b = hub.bench();
    let found = b.fetch("hf:org/repo/q4/a.gguf").await.unwrap();
    holds(&found, &model);
    assert_eq!(found.id, "a");
    // The only model of the repository: the same content, which is not fetched again.
    holds(&b.fetch("hf:org/repo").await.unwrap(), &model);
    assert_eq!(hub.file_requests(), 1);
    failed(b.fetch("hf:org/repo/b.gguf").await, &FailureClass::Artifact, "no file `b.gguf`");
    failed(b.fetch("hf:other/repo").await, &FailureClass::Artifact, "no entry of `[models] allow`");
}

#[tokio::test]
async fn all_parts_of_a_split_lie_beside_each_other() {
    let parts = [content(2, 300_000), content(3, 200_000), content(4, 100_000)];
    let names = ["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf"];
    let hub = Hub::start(names.into_iter().zip(parts.clone()).collect()).await;
    let b = hub.bench();
    let found = b.fetch("hf:org/repo").await.unwrap();
    assert_eq!(found.bytes, 600_000);
    let first = found.local_path.unwrap();
    for (name, part) in names.iter().zip(&parts) {
        assert!(fs::read(first.parent().unwrap().join(name)).unwrap() == *part);
    }
    assert_eq!(first.file_name().unwrap(), names[0]);
}

#[tokio::test]
async fn a_folder_of_safetensors_is_given_as_a_folder() {
    let weights = content(5, 100_000);
    let files = vec![
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", weights.clone()),
        ("pytorch_model.bin", b"x".to_vec()),
        ("modeling_x.py", b"x".to_vec()),
    ];
    let hub = Hub::start(files).await;
    let b = hub.bench();
    let found = b.fetch("hf:org/repo").await.unwrap();
    let folder = found.local_path.unwrap();
    let mut names: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(found.id, "repo");
}

#[tokio::test]
async fn what_the_hub_says_is_what_comes_or_nothing_does() {
    let model = content(6, 100_000);
    let sum = sha256(&model);
    let files = || vec![("a.gguf", model.clone())];
    let other = sha256(b"other");
    let lying = Hub::telling(files(), move |told| told.replace(&sum, &other)).await;
    let b = lying.bench();
    failed(b.fetch("hf:org/repo").await, &FailureClass::Artifact, "not what its digest says");
    b.assert_nothing_usable();
    let longer = Hub::telling(files(), |told| told.replace("100000", "100001")).await;
    failed(longer.bench().fetch("hf:org/repo").await, &FailureClass::Artifact, "but the file has 100001");
    let leading = Hub::telling(files(), |told| told.replace("a.gguf", "../a.gguf")).await;
    failed(leading.bench().fetch("hf:org/repo").await, &FailureClass::Artifact, "cannot be used here");
    let nonsense = Hub::telling(files(), |_| "<html>".to_owned()).await;
    failed(nonsense.bench().fetch("hf:org/repo").await, &FailureClass::Artifact, "cannot be read");
    let pinned = format!("hf:org/repo/a.gguf#sha256={}", sha256(b"mine"));
    let honest = Hub::start(files()).await;
    failed(honest.bench().fetch(&pinned).await, &FailureClass::Artifact, "with another digest");
    assert_eq!(honest.file_requests(), 0);
}

#[tokio::test]
async fn a_token_goes_to_its_own_host_alone_and_is_never_shown() {
    const TOKEN: &str = "hf_verysecret";
    let model = content(7, 100_000);
    let served = model.clone();
    let mut storage = Server::start(move |seen| file(seen, &served, "\"1\"")).await;
    let to = storage.url("/x");
    let (size, sum) = (model.len(), sha256(&model));
    let mut gate = Server::start(move |seen| {
        if seen.header("authorization") != Some("Bearer hf_verysecret") {
            return Reply::status("401 Unauthorized").with("x-error-code", "GatedRepo");
        }
        if seen.target.starts_with("/api") {
            let lfs = format!(r#"{{"sha256":"{sum}","size":{size}}}"#);
            return Reply::json(&format!(r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"a.gguf","lfs":{lfs}}}]}}"#));
        }
        Reply::to(&to)
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let mut options = options(&dir.path().join("cache"), &["hf:*", &storage.url("/*")]);
    options.policy.hf_endpoint = HttpUrl::parse(&gate.url("")).unwrap();
    failed(
        fetch(&Models::new(options.clone()), "hf:org/repo").await,
        &FailureClass::Artifact,
        "whom its owner admitted",
    );
    options.tokens = [(gate.addr.to_string(), file.clone())].into();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    failed(fetch(&Models::new(options.clone()), "hf:org/repo").await, &FailureClass::Artifact, "chmod 600");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    gate.seen();
    let models = Models::new(options);
    holds(&fetch(&models, "hf:org/repo").await.unwrap(), &model);
    assert!(gate.seen().iter().all(|s| s.header("authorization").is_some()));
    assert!(storage.seen().iter().all(|s| s.header("authorization").is_none()));
    assert!(!format!("{models:?}").contains(TOKEN));
}

#[tokio::test]
async fn an_artifact_of_a_registry_is_fetched_by_its_digests() {
    let model = content(8, 200_000);
    let (sum, served) = (sha256(&model), model.clone());
    let layer = format!(
        r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{sum}","size":{},"annotations":{{"org.opencontainers.image.title":"a.gguf"}}}}"#,
        model.len()
    );
    let manifest = format!(r#"{{"schemaVersion":2,"layers":[{layer}]}}"#);
    let digest = sha256(manifest.as_bytes());
    let told = manifest.clone();
    let mut server = Server::start(move |seen| {
        let path = seen.target.split('?').next().unwrap_or_default();
        if path == "/token" {
            assert!(seen.target.contains("scope=repository:models/tiny:pull"), "{}", seen.target);
            return Reply::json(r#"{"token":"granted"}"#);
        }
        if seen.header("authorization") != Some("Bearer granted") {
            let host = seen.header("host").unwrap();
            let challenge =
                format!(r#"Bearer realm="http://{host}/token",service="r",scope="repository:models/tiny:pull""#);
            return Reply::status("401 Unauthorized").with("www-authenticate", &challenge);
        }
        if path.starts_with("/v2/models/tiny/manifests/") {
            return Reply::json(&told);
        }
        assert_eq!(path, format!("/v2/models/tiny/blobs/sha256:{sum}"));
        file(seen, &served, "\"1\"")
    })
    .await;
    let mut b = Bench::new(&server);
    b.options.policy.allow = vec![format!("oci://{}/*", server.addr).parse().unwrap()];
    let reference = format!("oci://{}/models/tiny", server.addr);
    let found = b.fetch(&format!("{reference}:q4")).await.unwrap();
    holds(&found, &model);
    assert_eq!(found.local_path.unwrap().file_name().unwrap(), "a.gguf");
    holds(&b.fetch(&format!("{reference}@sha256:{digest}")).await.unwrap(), &model);
    let wrong = sha256(b"x");
    failed(b.fetch(&format!("{reference}@sha256:{wrong}")).await, &FailureClass::Artifact, "gives another manifest");
    assert!(!server.seen().is_empty());
}

#[tokio::test]
async fn objects_of_a_bucket_are_signed_for_where_there_are_keys() {
    let parts = [content(9, 50_000), content(10, 60_000)];
    let served = parts.clone();
    let mut server = Server::start(move |seen| {
        let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        if query.contains("list-type=2") {
            assert!(query.contains("prefix=m%2F"), "{query}");
            let one = |n: usize| {
                format!("<Contents><Key>m/a-0000{n}-of-00002.gguf</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>", served[n - 1].len())
            };
            // In two pages.
            let second = query.contains("continuation-token=more");
            let more = if second { "" } else { "<NextContinuationToken>more</NextContinuationToken>" };
            let n = if second { 2 } else { 1 };
            return Reply::whole(format!(r#"<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>m/</Prefix><IsTruncated>{}</IsTruncated><MaxKeys>1000</MaxKeys>{more}{}</ListBucketResult>"#, !second, one(n)).as_bytes());
        }
        let n = usize::from(path.contains("00002-of"));
        file(seen, &served[n], "\"1\"")
    })
    .await;
    let mut b = Bench::new(&server);
    b.options.policy.allow = vec!["s3://bucket/*".parse().unwrap()];
    b.options.policy.s3_endpoint = Some(HttpUrl::parse(&server.url("")).unwrap());
    // Without keys, as of a bucket that is for everybody.
    holds(&b.fetch("s3://bucket/m/one.gguf").await.unwrap(), &parts[0]);
    let asked = server.seen();
    assert_eq!(asked[0].target, "/bucket/m/one.gguf");
    let keys = b.dir.path().join("keys");
    fs::write(&keys, "[default]\naws_access_key_id = AKID\naws_secret_access_key = verysecret\n").unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    b.options.s3_credentials = Some(keys);
    let found = b.fetch("s3://bucket/m/").await.unwrap();
    assert_eq!(found.bytes, 110_000);
    for seen in server.seen() {
        assert!(seen.target.contains("X-Amz-Signature=") && seen.target.contains("X-Amz-Credential=AKID"), "{seen:?}");
        assert!(!seen.target.contains("verysecret"));
    }
}
