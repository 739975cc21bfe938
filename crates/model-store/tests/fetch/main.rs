//! Fetching from real servers on loopback.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod child;
mod files;
mod hub;
mod server;
mod trouble;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model_store::{Limits, Models, Options};
use pool_domain::model_policy::ModelPolicy;
use pool_domain::model_ref::HttpUrl;
use pool_domain::{BackoffPolicy, Failure, FailureClass, ModelRef};
use pool_services::ports::{ModelStore, ResolvedModel, Staging};
use tempfile::TempDir;
use tokio::sync::watch;

/// As a GGUF begins, and then something that is nowhere the same.
pub(crate) fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut content = b"GGUF\x03\0\0\0".to_vec();
    let mut state = seed | 1;
    while content.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes);
    content
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Servers on loopback answer at once or not at all.
pub(crate) fn limits() -> Limits {
    let ms = Duration::from_millis;
    Limits {
        connect: Duration::from_secs(10),
        stall: ms(400),
        stall_bytes: 1,
        backoff: BackoffPolicy::new(ms(1), ms(4), 2.0, 0.5, ms(1)).unwrap(),
        tries: 4,
    }
}

pub(crate) fn options(cache: &Path, allow: &[&str]) -> Options {
    Options {
        roots: Vec::new(),
        cache_dir: cache.to_owned(),
        cache_max: None,
        verify_always: false,
        policy: ModelPolicy {
            allow: allow.iter().map(|a| a.parse().unwrap()).collect(),
            offline: false,
            hf_endpoint: HttpUrl::parse("https://huggingface.co").unwrap(),
            s3_endpoint: None,
        },
        tokens: BTreeMap::new(),
        s3_credentials: None,
        s3_region: None,
        ca_file: None,
        limits: limits(),
    }
}

/// A cache of its own, which may be filled from one server.
pub(crate) struct Bench {
    pub(crate) dir: TempDir,
    pub(crate) options: Options,
}

impl Bench {
    pub(crate) fn new(server: &server::Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir.path().join("cache"), &[&server.url("/*")]);
        Self { dir, options }
    }

    pub(crate) fn models(&self) -> Models {
        Models::new(self.options.clone())
    }

    pub(crate) async fn fetch(&self, model: &str) -> Result<ResolvedModel, Failure> {
        fetch(&self.models(), model).await
    }

    pub(crate) fn cache(&self, below: &str) -> PathBuf {
        self.options.cache_dir.join(below)
    }

    /// Names of what is in a part of the cache.
    pub(crate) fn names(&self, below: &str) -> Vec<String> {
        let Ok(found) = std::fs::read_dir(self.cache(below)) else { return Vec::new() };
        found.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Nothing is there that could be used as a model, or be taken for one.
    #[track_caller]
    pub(crate) fn assert_nothing_usable(&self) {
        for part in ["refs", "models", "blobs"] {
            assert_eq!(self.names(part), Vec::<String>::new(), "{part}");
        }
    }
}

pub(crate) fn model(text: &str) -> ModelRef {
    text.parse().unwrap()
}

pub(crate) async fn fetch(models: &Models, text: &str) -> Result<ResolvedModel, Failure> {
    let (told, _) = watch::channel(None);
    models.ensure_present(&model(text), &told).await
}

/// The last that was told of a fetch, too.
pub(crate) async fn fetch_telling(models: &Models, text: &str) -> (Result<ResolvedModel, Failure>, Option<Staging>) {
    let (told, heard) = watch::channel(None);
    let done = models.ensure_present(&model(text), &told).await;
    let last = *heard.borrow();
    (done, last)
}

#[track_caller]
pub(crate) fn holds(found: &ResolvedModel, content: &[u8]) {
    let path = found.local_path.as_ref().unwrap();
    assert!(std::fs::read(path).unwrap() == content, "{} holds something else", path.display());
    assert_eq!(found.bytes, content.len() as u64);
}

#[track_caller]
pub(crate) fn failed(done: Result<ResolvedModel, Failure>, class: &FailureClass, because: &str) {
    let failure = done.unwrap_err();
    assert_eq!(&failure.class, class, "{failure}");
    assert!(failure.detail.contains(because), "{failure}");
    assert!(!failure.detail.contains("/tmp"), "no paths: {failure}");
}
