//! Fetches one model into a cache as the daemon does, and says how long that took: `fetch CACHE_DIR REFERENCE`.
#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;

use model_store::{Limits, Models, Options};
use pool_domain::model_policy::{Allowed, HF_ENDPOINT, ModelPolicy};
use pool_domain::model_ref::HttpUrl;
use pool_domain::{Failure, ModelRef};
use pool_services::ports::ModelStore;
use tokio::sync::watch;
use tokio::time::Instant;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(cache), Some(text)) = (args.next(), args.next()) else { return Err("fetch CACHE_DIR REFERENCE".into()) };
    let model: ModelRef = text.parse()?;
    let ModelRef::Remote(remote) = &model else { return Err("name a model that has to be fetched".into()) };
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| HF_ENDPOINT.into());
    let models = Models::new(Options {
        roots: Vec::new(),
        cache_dir: cache.into(),
        cache_max: None,
        verify_always: false,
        policy: ModelPolicy {
            allow: vec![Allowed::exactly(&remote.source)?],
            offline: false,
            hf_endpoint: HttpUrl::parse(&endpoint)?,
            s3_endpoint: std::env::var("S3_ENDPOINT").ok().map(|url| HttpUrl::parse(&url)).transpose()?,
        },
        tokens: BTreeMap::new(),
        s3_credentials: std::env::var_os("S3_CREDENTIALS").map(Into::into),
        s3_region: None,
        ca_file: None,
        limits: Limits::default(),
    });
    let (told, _) = watch::channel(None);
    let began = Instant::now();
    let found = models.ensure_present(&model, &told).await.map_err(|f: Failure| f.to_string())?;
    let (path, bytes) = (found.local_path.unwrap_or_default(), found.bytes);
    println!(r#"{{"seconds": {:.6}, "bytes": {bytes}, "path": "{}"}}"#, began.elapsed().as_secs_f64(), path.display());
    Ok(())
}
