//! Whether what a pool asks for of its engines can be kept on this machine: the user, what that user can reach, memory.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bytesize::ByteSize;
use engine_shim::{Access, AccessAnswer, AccessQuestion};
use pool_domain::Failure;
use pool_domain::isolation::{Isolation, RunAs};
use pool_services::ports::{Confinement, EngineUser};
use rustix::process::{Resource, getrlimit};
use rustix::thread::CapabilitySet;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::cgroup::Parent;
use crate::host::ShimCommand;
use crate::memory_cgroup::MemoryParent;
use crate::text::{config, file_name, tidy};
use crate::users::{self, Account};

/// How long a shim may take to look at a few files.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Open files of an engine, where nobody says.
const USUAL_NOFILE: u64 = 65_536;

/// What to start another user's process takes, to end it, and to see what it has open.
const NEEDED: [(CapabilitySet, &str); 4] = [
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::KILL, "CAP_KILL"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
];

/// Why something that a pool asks for cannot be kept. The key is one of `[pool.isolation]`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Unkept {
    /// Which key.
    pub key: &'static str,
    /// Why, for whoever may see paths of this machine.
    pub message: String,
    /// What would help.
    pub hint: String,
    /// Why, for everybody.
    pub(crate) detail: String,
}

impl Unkept {
    fn new(key: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        let message = message.into();
        Self { key, detail: message.clone(), message, hint: hint.into() }
    }

    pub(crate) fn failure(&self) -> Failure {
        config(self.detail.clone())
    }
}

/// Whether this process can keep it. Looks at users, capabilities, limits and cgroups, not at files.
///
/// # Errors
/// The first thing that it cannot keep.
pub fn can_keep(isolation: &Isolation) -> Result<(), Unkept> {
    if let Some(run_as) = &isolation.run_as {
        account(run_as)?;
    }
    if let Some(nofile) = isolation.nofile {
        nofile_within(nofile, getrlimit(Resource::Nofile).maximum, holds(CapabilitySet::SYS_RESOURCE))?;
    }
    if isolation.memory_max.is_some() && !memory_can_be_limited() {
        return Err(Unkept::new(
            "memory_max",
            "this daemon may make no cgroup that limits memory",
            "run it where it may: as root, or as a systemd service with Delegate=yes; or remove memory_max",
        ));
    }
    Ok(())
}

/// Makes an engine's cgroups as a launch would, and removes them.
fn memory_can_be_limited() -> bool {
    let by_two =
        || Parent::create().and_then(|parent| parent.engine("check")).is_ok_and(|cgroup| cgroup.limits_memory());
    by_two() || MemoryParent::create().is_some()
}

fn nofile_within(nofile: u64, hard: Option<u64>, may_raise: bool) -> Result<(), Unkept> {
    match hard.filter(|hard| nofile > *hard && !may_raise) {
        None => Ok(()),
        Some(hard) => Err(Unkept::new(
            "nofile",
            format!("{nofile} open files are more than the {hard} that this daemon may give"),
            "raise the daemon's own limit, for example by LimitNOFILE= of its systemd unit",
        )),
    }
}

/// As many open files as a pool asks for, or as is usual.
pub(crate) fn nofile(asked: Option<u64>) -> Option<u64> {
    let hard = getrlimit(Resource::Nofile).maximum;
    asked.or_else(|| Some(hard.map_or(USUAL_NOFILE, |hard| hard.min(USUAL_NOFILE))))
}

fn holds(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// The user that is meant, if this process can start something as that.
pub(crate) fn account(run_as: &RunAs) -> Result<Account, Unkept> {
    let Some(account) = users::find(run_as) else {
        return Err(Unkept::new(
            "run_as",
            format!("there is no user `{run_as}` in /etc/passwd"),
            "create it, for example with `useradd --system`, or write its numbers as \"uid:gid\"",
        ));
    };
    if account.user.uid == 0 {
        let hint = "name a user without power over this machine, or remove run_as";
        return Err(Unkept::new("run_as", format!("`{run_as}` is root"), hint));
    }
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let missing = if own == (account.user.uid, account.user.gid) {
        Vec::new()
    } else {
        missing(rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective))
    };
    if !missing.is_empty() {
        return Err(Unkept::new(
            "run_as",
            format!("to run engines as `{run_as}` this daemon lacks {}", missing.join(", ")),
            "run the daemon as root, or give it these with AmbientCapabilities= of its systemd unit",
        ));
    }
    Ok(account)
}

pub(crate) fn no_shim(run_as: &RunAs) -> Unkept {
    let message = format!("nobody can find out what `{run_as}` may reach: this program was given no shim");
    Unkept::new("run_as", message, "give the provisioner the shim that the host has")
}

pub(crate) fn no_claims(run_as: &RunAs) -> Unkept {
    let message = format!("`{run_as}` may not claim simulated memory: claims lie in the state directory");
    Unkept::new("run_as", message, "remove run_as, or --vram from args")
}

fn missing(held: CapabilitySet) -> Vec<&'static str> {
    NEEDED.iter().filter(|(needed, _)| !held.contains(*needed)).map(|(_, name)| *name).collect()
}

/// A path, what is wanted of it, and what it is to a person.
pub(crate) type Wanted<'a> = (PathBuf, Access, &'a str);

/// Has a process of that user try it; says what stands in the way, if anything does.
pub(crate) async fn prove_access(shim: &ShimCommand, account: &Account, wanted: &[Wanted<'_>]) -> Result<(), Unkept> {
    // By the name it is given, and by the one it has: links lead elsewhere.
    let both = wanted.iter().flat_map(|(path, access, what)| {
        let real = std::fs::canonicalize(path).ok().filter(|real| real != path);
        std::iter::once(path.clone()).chain(real).map(move |path| (path, *access, *what))
    });
    let all: Vec<Wanted<'_>> = both.collect();
    let question = AccessQuestion {
        user: account.user.clone(),
        wanted: all.iter().map(|(path, access, _)| (path.clone(), *access)).collect(),
    };
    let unproved = |why: String| {
        let message = format!("what `{}` may reach cannot be found out: {}", account.name, tidy(&why));
        Unkept::new("run_as", message, "see the daemon's log")
    };
    let barriers = match ask(shim, &question).await {
        Ok(AccessAnswer::Barriers(barriers)) if barriers.len() == all.len() => barriers,
        Ok(AccessAnswer::Barriers(_)) => return Err(unproved("a wrong answer".to_owned())),
        Ok(AccessAnswer::Failed(why)) => return Err(unproved(why)),
        Err(error) => return Err(unproved(error.to_string())),
    };
    let first =
        all.iter().zip(barriers).find_map(|((path, access, what), barrier)| Some((path, *access, *what, barrier?)));
    match first {
        None => Ok(()),
        Some((path, access, what, barrier)) => Err(closed(&account.name, path, access, what, &barrier)),
    }
}

fn closed(user: &str, path: &Path, access: Access, what: &str, barrier: &Path) -> Unkept {
    let (verb, letters) = match access {
        _ if barrier != path => ("search", "x"),
        Access::Read => ("read", "rX"),
        Access::Execute => ("run", "x"),
        Access::Work => ("work in", "rwx"),
    };
    let says = |barrier: &str| match barrier {
        _ if path == Path::new(barrier) || file_name(path) == barrier => {
            format!("user `{user}` may not {verb} {what} {barrier}")
        }
        above => format!("user `{user}` may not {verb} the directory {above}, in which {what} lies"),
    };
    Unkept {
        key: "run_as",
        detail: says(&file_name(barrier)),
        message: says(&barrier.display().to_string()),
        hint: format!("move it elsewhere, or allow it: setfacl -m u:{user}:{letters} {}", barrier.display()),
    }
}

async fn ask(shim: &ShimCommand, question: &AccessQuestion) -> std::io::Result<AccessAnswer> {
    let mut command = Command::new(&shim.program);
    command.args(&shim.args).arg(engine_shim::ACCESS).env_clear().kill_on_drop(true);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let text = serde_json::to_vec(question)?;
    let conversation = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&text).await?;
        }
        let output = child.wait_with_output().await?;
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    match tokio::time::timeout(ASK_TIMEOUT, conversation).await {
        Ok(answer) => answer,
        Err(_late) => Err(std::io::ErrorKind::TimedOut.into()),
    }
}

/// What goes with a launch.
pub(crate) fn confinement(isolation: &Isolation, account: Option<&Account>) -> Confinement {
    let user =
        account.map(|Account { user, .. }| EngineUser { uid: user.uid, gid: user.gid, groups: user.groups.clone() });
    Confinement { user, memory_max: isolation.memory_max, nofile: isolation.nofile, ..Confinement::default() }
}

/// Why an engine is not started without its limit.
pub(crate) fn unlimited(bytes: u64, error: &std::io::Error) -> Failure {
    config(format!("memory_max of {} cannot be kept on this machine: {}", ByteSize::b(bytes), error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert!(missing(CapabilitySet::all()).is_empty());
        let some = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
        assert_eq!(missing(some), ["CAP_KILL", "CAP_SYS_PTRACE"]);
    }

    #[test]
    fn open_files_beyond_the_hard_limit_take_a_privilege() {
        assert!(nofile_within(100, Some(100), false).is_ok() && nofile_within(100, None, false).is_ok());
        assert!(nofile_within(101, Some(100), true).is_ok());
        assert_eq!(nofile_within(101, Some(100), false).unwrap_err().key, "nofile");
        assert!(nofile(None).is_some_and(|n| n <= USUAL_NOFILE));
        assert_eq!(nofile(Some(7)), Some(7));
    }

    #[test]
    fn unknown_users_and_root_are_refused_with_a_hint() {
        let refused = |text: &str| account(&text.parse().unwrap()).unwrap_err();
        let unknown = refused("no-such-user");
        assert!(unknown.message.contains("no user `no-such-user`") && unknown.hint.contains("uid:gid"), "{unknown:?}");
        assert!(refused("root").message.contains("is root"));
        assert!(refused("0:5").message.contains("is root"));
    }

    #[test]
    fn what_goes_out_names_no_path_and_what_stays_here_does() {
        let above = closed("llm", Path::new("/srv/a/m.gguf"), Access::Read, "the model", Path::new("/srv/a"));
        assert_eq!(above.message, "user `llm` may not search the directory /srv/a, in which the model lies");
        assert_eq!(above.detail, "user `llm` may not search the directory a, in which the model lies");
        assert!(above.hint.ends_with("setfacl -m u:llm:x /srv/a"), "{}", above.hint);
        let itself = closed("llm", Path::new("/srv/m.gguf"), Access::Read, "the model", Path::new("/srv/m.gguf"));
        assert_eq!(itself.message, "user `llm` may not read the model /srv/m.gguf");
        assert_eq!(itself.detail, "user `llm` may not read the model m.gguf");
    }
}
