//! The models of this node: local files below the allowed folders, names that need no file, and models that are fetched
//! into a cache where the policy allows it.
//!
//! A file is checked before any engine sees it: where it really lies, what it is, and whether its first bytes are those
//! of the format its name promises. Details name the file alone, never its path.

#![forbid(unsafe_code)]

mod cache;
mod fetch;
mod gguf;
mod profile;
mod remote;
mod safetensors;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use pool_domain::{Failure, FailureClass, FileRef, ModelProfile, ModelRef};
use pool_services::ports::{ModelStore, Presence, ResolvedModel, StagingTold};
use rustix::fs::OFlags;

pub use self::fetch::Limits;
pub use self::profile::{ProfileError, profile, profile_gguf, profile_safetensors};
pub use self::remote::{Models, Options};

/// What is said of models that are nowhere on this machine.
const NO_FETCHING: &str = "models are not fetched here: name a local file";
/// What makes a folder a model.
const CONFIG: &str = "config.json";
/// GGUF versions the engines read.
const GGUF_VERSIONS: [u32; 2] = [2, 3];

/// Models that are on this machine already.
#[derive(Debug, Clone)]
pub struct LocalModels {
    roots: Arc<[PathBuf]>,
}

impl LocalModels {
    /// Models from the given folders and below; none, and no file may be used.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self { roots: roots.into() }
    }

    /// Checks that a model can be used, on the calling thread. Never waits on a FIFO.
    ///
    /// # Errors
    /// A failure of class `artifact` that says why not.
    pub fn validate_ref(&self, model: &ModelRef) -> Result<(), Failure> {
        self.resolve(model).map(|_| ())
    }

    fn resolve(&self, model: &ModelRef) -> Result<ResolvedModel, Failure> {
        let id = model.model_id();
        let path = match model {
            ModelRef::File(FileRef { path, .. }) => path,
            ModelRef::Stub(_) | ModelRef::Named(_) => return Ok(ResolvedModel { id, local_path: None, bytes: 0 }),
            ModelRef::Remote(_) => return Err(Failure::new(FailureClass::Artifact, NO_FETCHING)),
        };
        let path = Path::new(path);
        let name = path.file_name().map_or_else(|| id.clone(), |n| n.to_string_lossy().into_owned());
        let told = |problem: String| Failure::new(FailureClass::Artifact, format!("model file `{name}` {problem}"));
        let (local_path, bytes) = self.check(path).map_err(told)?;
        Ok(ResolvedModel { id, local_path: Some(local_path), bytes })
    }

    /// Where the file really lies and how large it is, or what is wrong with it.
    fn check(&self, path: &Path) -> Result<(PathBuf, u64), String> {
        let real = match fs::canonicalize(path) {
            Ok(real) => real,
            // Whether something exists outside is nobody's business.
            Err(_) if !self.lexically_inside(path) => return Err(self.outside()),
            Err(error) => return Err(file_problem(&error)),
        };
        if !self.roots.iter().filter_map(|root| fs::canonicalize(root).ok()).any(|root| real.starts_with(root)) {
            return Err(self.outside());
        }
        let metadata = fs::metadata(&real).map_err(|e| file_problem(&e))?;
        if metadata.is_dir() {
            let bytes = self.folder(&real)?;
            return Ok((real, bytes));
        }
        regular(&metadata)?;
        // The file may have become a FIFO since: opening one must not wait.
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(&real)
            .map_err(|e| file_problem(&e))?;
        let opened = file.metadata().map_err(|e| file_problem(&e))?;
        regular(&opened)?;
        if opened.len() == 0 {
            return Err("is empty".to_owned());
        }
        let is_gguf = [path, &real].iter().any(|p| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")));
        if is_gguf {
            check_gguf(&mut file)?;
        }
        Ok((real, opened.len()))
    }

    /// The bytes of a folder as engines other than llama.cpp read one: `config.json`, and weights beside it.
    fn folder(&self, folder: &Path) -> Result<u64, String> {
        if !folder.join(CONFIG).is_file() {
            return Err(format!("is a directory without a {CONFIG}, not a model"));
        }
        let mut bytes = 0_u64;
        for entry in fs::read_dir(folder).map_err(|e| file_problem(&e))? {
            let path = entry.map_err(|e| file_problem(&e))?.path();
            if !path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
                continue;
            }
            // A file of a cache is often a link to where it really lies: that counts.
            bytes = bytes.saturating_add(self.check(&path)?.1);
        }
        if bytes == 0 { Err("is a directory without safetensors files".to_owned()) } else { Ok(bytes) }
    }

    fn lexically_inside(&self, path: &Path) -> bool {
        !path.components().any(|c| c == Component::ParentDir) && self.roots.iter().any(|root| path.starts_with(root))
    }

    fn outside(&self) -> String {
        if self.roots.is_empty() {
            "may not be used: no folder is allowed, name one in `[models] roots`".to_owned()
        } else {
            "lies outside of the folders in `[models] roots`".to_owned()
        }
    }
}

#[async_trait]
impl ModelStore for LocalModels {
    fn permits(&self, model: &ModelRef) -> Result<(), String> {
        match model {
            ModelRef::Remote(_) => Err(NO_FETCHING.to_owned()),
            ModelRef::File(_) | ModelRef::Stub(_) | ModelRef::Named(_) => Ok(()),
        }
    }

    async fn look(&self, model: &ModelRef) -> Result<Presence, Failure> {
        let (this, model) = (self.clone(), model.clone());
        tokio::task::spawn_blocking(move || this.resolve(&model))
            .await
            .map_err(|_| Failure::new(FailureClass::Artifact, "the check of the model did not finish"))?
            .map(Presence::Here)
    }

    async fn ensure_present(&self, model: &ModelRef, _: &StagingTold) -> Result<ResolvedModel, Failure> {
        match self.look(model).await? {
            Presence::Here(model) => Ok(model),
            Presence::Remote => Err(Failure::new(FailureClass::Artifact, NO_FETCHING)),
        }
    }

    async fn profile(&self, model: &ResolvedModel) -> Result<Option<ModelProfile>, Failure> {
        let Some(path) = model.local_path.clone() else { return Ok(None) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let wrong = |why: String| Failure::new(FailureClass::Artifact, format!("model file `{name}` {why}"));
        match tokio::task::spawn_blocking(move || profile(&path)).await {
            Ok(Ok(profile)) => Ok(Some(profile)),
            Ok(Err(ProfileError::Architecture(_) | ProfileError::UnknownFormat)) => Ok(None),
            Ok(Err(error)) => Err(wrong(error.to_string())),
            Err(_) => Err(wrong("could not be read".into())),
        }
    }
}

fn regular(metadata: &fs::Metadata) -> Result<(), String> {
    let kind = metadata.file_type();
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(format!("is {what}, not a regular file"))
}

fn check_gguf(file: &mut File) -> Result<(), String> {
    const NOT_GGUF: &str = "is not a GGUF file";
    let mut magic = [0; 4];
    let mut version = [0; 4];
    for part in [&mut magic, &mut version] {
        file.read_exact(part).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => format!("{NOT_GGUF}: it ends too early"),
            _ => file_problem(&e),
        })?;
    }
    if magic != *b"GGUF" {
        return Err(NOT_GGUF.to_owned());
    }
    let version = u32::from_le_bytes(version);
    if !GGUF_VERSIONS.contains(&version) {
        return Err(format!("is GGUF of version {version}; versions 2 and 3 can be read"));
    }
    Ok(())
}

fn file_problem(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => "does not exist".to_owned(),
        ErrorKind::PermissionDenied => "may not be read by the user the daemon runs as".to_owned(),
        _ => format!("cannot be read: {error}"),
    }
}

#[cfg(test)]
mod tests;
