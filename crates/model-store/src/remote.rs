//! The models of a node: local ones, and those that are fetched into the cache where the policy allows it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use pool_domain::model_policy::ModelPolicy;
use pool_domain::{Failure, FailureClass, FileRef, ModelProfile, ModelRef, RemoteRef, RemoteSource, Sha256Digest};
use pool_services::ports::{ModelStore, Presence, ResolvedModel, Staging, StagingStep, StagingTold};

use crate::LocalModels;
use crate::cache::{Cache, Entry, Keep, Look, hash_file, offline};
use crate::fetch::{
    Fetched, Http, Limits, MakeRoom, Partial, Progress, RemoteFile, Secrets, Trouble, blocking, disk, fetch_file, list,
};

/// Between two looks at whether somebody else is done.
const WAIT: Duration = Duration::from_millis(250);
/// Bytes that are left to others on the disk of the cache.
const RESERVE: u64 = 256 * 1024 * 1024;

/// What a store of models is made from.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folders, and single files, that local models may come from.
    pub roots: Vec<PathBuf>,
    /// Where fetched models are kept.
    pub cache_dir: PathBuf,
    /// Most bytes there; unset = as many as the disk holds.
    pub cache_max: Option<u64>,
    /// Read every model whole before each start, and not only where it looks changed.
    pub verify_always: bool,
    /// What may be fetched.
    pub policy: ModelPolicy,
    /// Files with a bearer token, by host (with its port where that is not the usual one).
    pub tokens: BTreeMap<String, PathBuf>,
    /// Keys for buckets, in the form of `~/.aws/credentials`.
    pub s3_credentials: Option<PathBuf>,
    /// Region of buckets.
    pub s3_region: Option<String>,
    /// Certificates of authorities beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// How long servers are waited for.
    pub limits: Limits,
}

/// The models that pools may need, asked for when room is to be made.
type InUse = Box<dyn Fn() -> Vec<ModelRef> + Send + Sync>;

/// Local and fetched models.
#[derive(Clone)]
pub struct Models {
    inner: Arc<Inner>,
}

struct Inner {
    local: LocalModels,
    /// Reads what lies in the cache.
    cached: LocalModels,
    cache: Cache,
    cache_max: Option<u64>,
    verify_always: bool,
    http: Http,
    in_use: OnceLock<InUse>,
}

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.inner;
        f.debug_struct("Models")
            .field("local", &inner.local)
            .field("policy", &inner.http.policy)
            .finish_non_exhaustive()
    }
}

impl Models {
    /// A store. Nothing is made or asked before a model is needed.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let cache = Cache::new(options.cache_dir);
        let secrets = Secrets { tokens: options.tokens, s3: options.s3_credentials };
        let http = Http::new(options.policy, options.limits, secrets, options.s3_region, options.ca_file);
        let inner = Inner {
            local: LocalModels::new(options.roots),
            cached: LocalModels::new(vec![cache.models()]),
            cache,
            cache_max: options.cache_max,
            verify_always: options.verify_always,
            http,
            in_use: OnceLock::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Which models are never removed to make room, asked each time. Counts once; until then none is removed.
    pub fn keep(&self, in_use: impl Fn() -> Vec<ModelRef> + Send + Sync + 'static) {
        // Whoever says so again is not heard: there is one manager.
        let _ = self.inner.in_use.set(Box::new(in_use));
    }

    fn keeps(&self) -> Keep {
        let remote = |model: ModelRef| match model {
            ModelRef::Remote(remote) => Some(Cache::key(&remote.source)),
            _ => None,
        };
        let in_use = self.inner.in_use.get();
        let keys = in_use.map(|in_use| in_use().into_iter().filter_map(remote).collect()).unwrap_or_default();
        Keep {
            keys,
            contents: BTreeSet::new(),
            cap: self.inner.cache_max.filter(|_| in_use.is_some()),
            reserve: RESERVE,
        }
    }

    /// The record of a model that is here and, as far as can be told without reading it, whole.
    async fn present(&self, remote: &RemoteRef) -> Result<Option<Entry>, Trouble> {
        let (this, remote) = (Arc::clone(&self.inner), remote.clone());
        blocking(move || {
            let entry = this.cache.entry(&remote.source).filter(|entry| holds(entry, remote.digest))?;
            this.cache.changed(&remote.source, &entry).is_empty().then_some(entry)
        })
        .await
    }

    /// A model of the cache as engines are given it.
    async fn resolved(&self, model: &ModelRef, source: &RemoteSource, entry: &Entry) -> Result<ResolvedModel, Failure> {
        let Some(first) = entry.files.first() else {
            return Err(Failure::new(FailureClass::Artifact, "the model in the cache has no files"));
        };
        let path = self.inner.cache.file(source, &first.name);
        // A folder with a config is given as a whole, and so are others by their first file.
        let is_folder = first.name == crate::CONFIG;
        let place = if is_folder { path.parent().unwrap_or(&path).to_owned() } else { path };
        let text = place.to_str().ok_or_else(|| Failure::new(FailureClass::Config, "the cache's path is not UTF-8"))?;
        let (cached, file) = (self.inner.cached.clone(), ModelRef::file(text));
        let checked = tokio::task::spawn_blocking(move || cached.resolve(&file)).await;
        let checked =
            checked.map_err(|_| Failure::new(FailureClass::Fetch, "the check of the model did not finish"))??;
        Ok(ResolvedModel { id: model.model_id(), bytes: entry.bytes(), ..checked })
    }

    async fn ensure_remote(&self, remote: &RemoteRef, told: &StagingTold) -> Result<Entry, Trouble> {
        let (inner, source) = (&*self.inner, &remote.source);
        inner.http.policy.may_name(source)?;
        if !inner.verify_always
            && let Some(entry) = self.present(remote).await?
        {
            return Ok(entry);
        }
        let lock = self.locked(remote, told).await?;
        // Whoever had the lock may have fetched it.
        if let Some(entry) = self.verified(remote, told).await? {
            return Ok(entry);
        }
        if inner.http.policy.offline {
            return Err(Trouble::Never(offline()));
        }
        self.fetch(remote, Arc::new(lock), told).await
    }

    /// Waits until nobody else fetches the model.
    async fn locked(&self, remote: &RemoteRef, told: &StagingTold) -> Result<std::fs::File, Trouble> {
        let key = Cache::key(&remote.source);
        loop {
            let (cache, name) = (self.inner.cache.clone(), key.clone());
            let tried = blocking(move || {
                cache.prepare()?;
                cache.try_lock(&name).map(|lock| lock.ok_or_else(|| cache.partial_bytes(&name)))
            });
            match tried.await?.map_err(|e| disk(&e))? {
                Ok(lock) => return Ok(lock),
                Err(done) => {
                    told.send_replace(Some(Staging { step: StagingStep::Waiting, done, total: None, rate: 0 }));
                    tokio::time::sleep(WAIT).await;
                }
            }
        }
    }

    /// The model if it is here, read whole where it looks otherwise than it did; removed if it is another.
    async fn verified(&self, remote: &RemoteRef, told: &StagingTold) -> Result<Option<Entry>, Trouble> {
        let (inner, source) = (&*self.inner, &remote.source);
        let Some(entry) = inner.cache.entry(source).filter(|entry| holds(entry, remote.digest)) else {
            return Ok(None);
        };
        let unsure =
            if inner.verify_always { entry.files.iter().collect() } else { inner.cache.changed(source, &entry) };
        if unsure.is_empty() {
            return Ok(Some(entry));
        }
        let mut progress = Progress::new(told, StagingStep::Verifying, Some(unsure.iter().map(|f| f.look.bytes).sum()));
        for file in unsure {
            let path = inner.cache.file(source, &file.name);
            let digest = hash_file(path, &mut progress).await.ok().map(|digest| digest.to_string());
            if digest.as_ref() != Some(&file.sha256) {
                tracing::warn!(model = %source, file = file.name, "a file in the model cache is not what it was: it is fetched again");
                let spoilt = inner.cache.spoilt(&file.sha256).and_then(|()| inner.cache.remove(&Cache::key(source)));
                spoilt.map_err(|e| disk(&e))?;
                return Ok(None);
            }
        }
        inner.cache.looked_again(source, entry).map(Some).map_err(|e| disk(&e))
    }

    async fn fetch(&self, remote: &RemoteRef, lock: Arc<std::fs::File>, told: &StagingTold) -> Result<Entry, Trouble> {
        let (inner, source, key) = (&*self.inner, &remote.source, Cache::key(&remote.source));
        let mut progress = Progress::new(told, StagingStep::Fetching, None);
        progress.set(inner.cache.partial_bytes(&key));
        let mut listing = list(&inner.http, source).await?;
        pin(&mut listing.files, remote.digest)?;
        progress.expect(listing.bytes());
        progress.set(0);
        let mut keep = self.keeps();
        keep.contents = listing.files.iter().filter_map(|f| f.digest).collect();
        let here = inner.cache.partial_bytes(&key);
        let missing: u64 =
            listing.files.iter().filter(|f| inner.cache.has(f).is_none()).map(|f| f.bytes.unwrap_or(0)).sum();
        self.room(source, missing.saturating_sub(here), &keep).await?;
        let mut contents = Vec::new();
        for (n, file) in listing.files.iter().enumerate() {
            let fetched = match inner.cache.has(file) {
                Some(here) => {
                    progress.set(progress.done() + here.bytes);
                    here
                }
                None => self.fetch_one(source, &key, n, file, &lock, &keep, &mut progress).await?,
            };
            if file.digest.is_none() {
                tracing::warn!(
                    model = %source, file = file.name, sha256 = %fetched.digest,
                    "fetched without a digest to compare it with: `#sha256=…` behind the reference pins it"
                );
            }
            contents.push((file.name.clone(), fetched.digest));
        }
        let (cache, to) = (inner.cache.clone(), source.clone());
        // The lock is held until it is there.
        let published = blocking(move || {
            let published = cache.publish(&to, listing.revision, &contents);
            drop(lock);
            published
        });
        published.await?.map_err(|e| disk(&e))
    }

    #[expect(clippy::too_many_arguments, reason = "one step of the loop above")]
    async fn fetch_one(
        &self,
        source: &RemoteSource,
        key: &str,
        n: usize,
        file: &RemoteFile,
        lock: &Arc<std::fs::File>,
        keep: &Keep,
        progress: &mut Progress<'_>,
    ) -> Result<Fetched, Trouble> {
        let cache = &self.inner.cache;
        let (path, record) = cache.partial(key, n);
        let most = file.bytes.unwrap_or(keep.cap.unwrap_or(u64::MAX));
        let (roomy, of, kept) = (cache.clone(), source.clone(), keep.clone());
        let room = MakeRoom(Arc::new(move |need| roomy.make_room(&of, need, &kept)));
        let partial = Partial { path, record, lock: Arc::clone(lock), reserve: keep.reserve, most, room };
        let fetched = fetch_file(&self.inner.http, source, file, &partial, progress).await?;
        let cache = cache.clone();
        let taken = blocking(move || {
            let taken = cache.take_in(&partial.path, fetched.digest);
            partial.remove();
            taken
        });
        taken.await?.map_err(|e| disk(&e))?;
        Ok(fetched)
    }

    async fn room(&self, source: &RemoteSource, need: u64, keep: &Keep) -> Result<(), Trouble> {
        let (cache, source, keep) = (self.inner.cache.clone(), source.clone(), keep.clone());
        blocking(move || cache.make_room(&source, need, &keep)).await?
    }

    /// A local file against its digest: read whole once, and again when it looks otherwise.
    async fn local_digest(
        &self,
        model: &ResolvedModel,
        digest: Sha256Digest,
        told: &StagingTold,
    ) -> Result<(), Failure> {
        let wrong = |why: String| Failure::new(FailureClass::Artifact, format!("model file `{}` {why}", model.id));
        let path = model.local_path.clone().filter(|path| path.is_file());
        let path = path.ok_or_else(|| wrong("is a folder: a digest is of one file".into()))?;
        let known = if self.inner.verify_always { None } else { self.inner.cache.verified(&path) };
        let found = match known {
            Some(known) => known,
            None => {
                let unread = |e: std::io::Error| wrong(format!("cannot be read: {}", e.kind()));
                let look = Look::at(&path).map_err(unread)?;
                let mut progress = Progress::new(told, StagingStep::Verifying, Some(look.bytes));
                let found = hash_file(path.clone(), &mut progress).await.map_err(unread)?;
                if let Err(error) = self.inner.cache.note_verified(&path, look, found) {
                    tracing::warn!(%error, "the digest of a model is not remembered: it is read again at the next start");
                }
                found
            }
        };
        if found == digest { Ok(()) } else { Err(wrong(format!("is not what its digest says: it is sha256:{found}"))) }
    }
}

/// Whether it is of this digest, where one is asked for.
fn holds(entry: &Entry, digest: Option<Sha256Digest>) -> bool {
    digest.is_none_or(|digest| entry.files.first().is_some_and(|f| f.sha256 == digest.to_string()))
}

/// A digest that somebody named is that of the one file, whatever the repository says.
fn pin(files: &mut [RemoteFile], digest: Option<Sha256Digest>) -> Result<(), Trouble> {
    let (Some(digest), [file]) = (digest, files) else { return Ok(()) };
    if let Some(told) = file.digest.filter(|told| *told != digest) {
        return Err(Trouble::Never(format!("its repository has it with another digest, sha256:{told}")));
    }
    file.digest = Some(digest);
    Ok(())
}

#[async_trait]
impl ModelStore for Models {
    fn permits(&self, model: &ModelRef) -> Result<(), String> {
        match model {
            ModelRef::Remote(remote) => self.inner.http.policy.may_name(&remote.source).map_err(|e| e.to_string()),
            ModelRef::File(_) | ModelRef::Stub(_) | ModelRef::Named(_) => Ok(()),
        }
    }

    async fn look(&self, model: &ModelRef) -> Result<Presence, Failure> {
        let ModelRef::Remote(remote) = model else { return self.inner.local.look(model).await };
        let failed = |trouble: Trouble| trouble.failure(&model.model_id());
        self.inner.http.policy.may_name(&remote.source).map_err(|e| failed(e.into()))?;
        match self.present(remote).await.map_err(failed)? {
            Some(entry) => self.resolved(model, &remote.source, &entry).await.map(Presence::Here),
            None => Ok(Presence::Remote),
        }
    }

    async fn ensure_present(&self, model: &ModelRef, told: &StagingTold) -> Result<ResolvedModel, Failure> {
        match model {
            ModelRef::Remote(remote) => {
                let entry = self.ensure_remote(remote, told).await.map_err(|t| t.failure(&model.model_id()))?;
                let (cache, source) = (self.inner.cache.clone(), remote.source.clone());
                let _touched = blocking(move || cache.touch(&source)).await;
                self.resolved(model, &remote.source, &entry).await
            }
            ModelRef::File(FileRef { digest: Some(digest), .. }) => {
                let resolved = self.inner.local.ensure_present(model, told).await?;
                self.local_digest(&resolved, *digest, told).await?;
                Ok(resolved)
            }
            ModelRef::File(_) | ModelRef::Stub(_) | ModelRef::Named(_) => {
                self.inner.local.ensure_present(model, told).await
            }
        }
    }

    async fn profile(&self, model: &ResolvedModel) -> Result<Option<ModelProfile>, Failure> {
        self.inner.local.profile(model).await
    }
}
