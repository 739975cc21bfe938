//! Finds a program and learns its version and flags by asking it. What was learnt holds while the file is the same.

use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pool_domain::Failure;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

use crate::text::{config, file_name, tidy};

/// How long a program may take to tell about itself.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes read of what it tells, of each stream.
const ASK_BYTES: u64 = 256 * 1024;
/// How often, and how long, to wait for a program that is being written.
const BUSY_TRIES: u32 = 10;
const BUSY_WAIT: Duration = Duration::from_millis(20);
/// The shell's and the dynamic linker's "cannot be run".
const CANNOT_RUN: i32 = 127;

/// What a program told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    /// Where it lies, absolute.
    pub(crate) path: PathBuf,
    /// Its version, or `unknown`.
    pub(crate) version: String,
    /// The flags its help names; empty if it has no help.
    pub(crate) flags: BTreeSet<String>,
}

impl Program {
    pub(crate) fn knows(&self, flag: &str) -> bool {
        self.flags.contains(flag)
    }

    /// Whether nothing speaks against the flag.
    pub(crate) fn knows_or_says_nothing(&self, flag: &str) -> bool {
        self.flags.is_empty() || self.knows(flag)
    }
}

/// When a file was last written, and its size.
type Stamp = (Option<SystemTime>, u64);

/// Asks programs, and remembers.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    known: Mutex<HashMap<PathBuf, (Stamp, Arc<Program>)>>,
}

impl Discovery {
    /// Finds `program` without asking it, where that would take it too long; `version` looks for its version elsewhere.
    pub(crate) async fn unasked(program: &Path, version: fn(&Path) -> Option<String>) -> Result<Program, Failure> {
        let (path, _) = find(program).await?;
        let beside = path.clone();
        let version = tokio::task::spawn_blocking(move || version(&beside)).await.ok().flatten();
        Ok(Program { path, version: version.unwrap_or_else(|| "unknown".to_owned()), flags: BTreeSet::new() })
    }

    /// Finds `program` and asks it; `leading` are the arguments that come before its own flags.
    pub(crate) async fn program(&self, program: &Path, leading: &[String]) -> Result<Arc<Program>, Failure> {
        let (path, stamp) = find(program).await?;
        if let Some((known, found)) = self.known.lock().await.get(&path)
            && *known == stamp
        {
            return Ok(Arc::clone(found));
        }
        let version = ask(&path, leading, "--version").await?;
        let help = ask(&path, leading, "--help").await?;
        let version = version_in(&version);
        // Who said nothing this time, perhaps for want of time, is asked again.
        let told = version.is_some() && !help.trim().is_empty();
        let version = version.unwrap_or_else(|| "unknown".to_owned());
        let found = Arc::new(Program { path: path.clone(), version, flags: flags_in(&help) });
        if told {
            self.known.lock().await.insert(path, (stamp, Arc::clone(&found)));
        }
        Ok(found)
    }
}

async fn find(program: &Path) -> Result<(PathBuf, Stamp), Failure> {
    let name = file_name(program);
    let candidates = if program.components().count() > 1 || program.is_absolute() {
        vec![std::path::absolute(program).map_err(|error| config(format!("engine `{name}`: {error}")))?]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(program)).collect()
    };
    let mut unfit = None;
    for candidate in candidates {
        match tokio::fs::metadata(&candidate).await {
            Ok(meta) if !meta.is_file() => {
                unfit.get_or_insert_with(|| format!("engine not executable: `{name}` is not a regular file"));
            }
            Ok(meta) if meta.permissions().mode() & 0o111 == 0 => {
                unfit.get_or_insert_with(|| format!("engine not executable: `{name}` has no execute permission"));
            }
            Ok(meta) => return Ok((candidate, (meta.modified().ok(), meta.len()))),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(error) => {
                unfit.get_or_insert_with(|| format!("engine `{name}` cannot be looked at: {}", error.kind()));
            }
        }
    }
    Err(config(unfit.unwrap_or_else(|| format!("engine missing: there is no `{name}`"))))
}

/// What it writes when run with `flag`. Nothing, if it says nothing in time.
async fn ask(program: &Path, leading: &[String], flag: &str) -> Result<String, Failure> {
    let name = file_name(program);
    let mut command = Command::new(program);
    // No device: to say its version it needs none, and the devices may be somebody's.
    command.args(leading).arg(flag).env_clear().envs(crate::kinds::base_env(None)?).env("CUDA_VISIBLE_DEVICES", "");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = spawn(&mut command)
        .await
        .map_err(|error| config(format!("engine not executable: `{name}` cannot be run: {}", error.kind())))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let conversation = async {
        tokio::join!(read_some(stdout, &mut out), read_some(stderr, &mut err));
        child.wait().await.ok().and_then(|status| status.code())
    };
    let code = tokio::time::timeout(ASK_TIMEOUT, conversation).await.ok().flatten();
    let said = format!("{}\n{}", String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    if code == Some(CANNOT_RUN) {
        let line = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(config(format!("engine not executable: `{name}` cannot be run: {}", tidy(line))));
    }
    Ok(said)
}

/// A file that is being installed, or that a fork of somebody still holds open, is free again in a moment.
async fn spawn(command: &mut Command) -> std::io::Result<Child> {
    for _ in 0..BUSY_TRIES {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => tokio::time::sleep(BUSY_WAIT).await,
            spawned => return spawned,
        }
    }
    command.spawn()
}

async fn read_some(stream: Option<impl tokio::io::AsyncRead + Unpin>, into: &mut Vec<u8>) {
    if let Some(stream) = stream {
        // Whatever came is used, also when the rest does not.
        let _partial = stream.take(ASK_BYTES).read_to_end(into).await;
    }
}

/// `version: 4567 (abcdef)`, or else the first word that looks like `1.2`.
fn version_in(said: &str) -> Option<String> {
    let after_label = |line: &str| {
        let at = line.to_ascii_lowercase().find("version")?;
        let value = line[at + "version".len()..].trim_start_matches([':', '=', ' ', '\t']).trim();
        value.contains(|c: char| c.is_ascii_digit()).then(|| tidy(value))
    };
    let dotted = |word: &str| {
        let word = word.strip_prefix('v').unwrap_or(word);
        let major = word.split('.').next()?;
        (word.contains('.') && !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit())).then(|| word.to_owned())
    };
    said.lines().find_map(after_label).or_else(|| said.split_whitespace().find_map(dotted))
}

/// Every word of a help text that is a flag.
fn flags_in(help: &str) -> BTreeSet<String> {
    let words = help.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_')));
    words.filter(|word| word.len() > 1 && word.starts_with('-')).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let version = |said| version_in(said);
        let cuda = "ggml_cuda_init: found 1 CUDA devices:\n  Device 0: compute capability 8.9\nversion: 4567 (abcdef)\nbuilt with cc 12.2";
        assert_eq!(version(cuda).as_deref(), Some("4567 (abcdef)"));
        assert_eq!(version("stub-engine 0.1.0\n").as_deref(), Some("0.1.0"));
        assert_eq!(version("version unknown\n"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn flags_are_the_words_with_a_dash() {
        let flags = flags_in("-h,    --help, --usage    print\n--slots-debug X (env: LLAMA)\n[--no-ui]");
        assert_eq!(flags.into_iter().collect::<Vec<_>>(), ["--help", "--no-ui", "--slots-debug", "--usage", "-h"]);
    }

    #[tokio::test]
    async fn what_is_missing_or_unfit_is_a_config_failure_without_a_path() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("plain"), "x").unwrap();
        let failure = async |name: &str| Discovery::default().program(&dir.path().join(name), &[]).await.unwrap_err();
        for (name, start) in
            [("absent", "engine missing"), ("plain", "engine not executable"), (".", "engine not executable")]
        {
            let failure = failure(name).await;
            assert_eq!(failure.class, pool_domain::FailureClass::Config);
            assert!(failure.detail.starts_with(start), "{failure}");
        }
        assert!(!failure("absent").await.detail.contains('/'));
        let nowhere = Discovery::default().program(Path::new("no-such-engine-anywhere"), &[]).await.unwrap_err();
        assert_eq!(nowhere.detail, "engine missing: there is no `no-such-engine-anywhere`");
    }
}
