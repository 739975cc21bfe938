//! Starts the engine.
#![expect(unsafe_code, reason = "what must happen between fork and exec can only be said with pre_exec")]

use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::born::{self, Birth};
use crate::report::Report;
use crate::secrets::{self, SecretText};
use crate::spec::LaunchSpec;
use crate::user::{self, Change};

/// An engine that has been started.
pub(crate) struct Engine {
    pub(crate) pid: Pid,
    /// Its stdout and stderr. Reading never blocks.
    pub(crate) output: PipeReader,
}

/// Starts the engine, or says what stood in the way. On failure nothing is left running.
pub(crate) fn spawn(spec: &LaunchSpec) -> Result<Engine, Report> {
    if !spec.program.is_absolute() {
        return Err(Report::failed("program", &io::Error::new(ErrorKind::InvalidInput, "not an absolute path")));
    }
    // "dir/." is found only if it is a directory that may be entered.
    if let Err(error) = std::fs::metadata(spec.workdir.join(".")) {
        return Err(Report::failed("workdir", &error));
    }
    let open = |paths: &[PathBuf], step| {
        let files = paths.iter().map(|path| File::options().write(true).open(path));
        files.collect::<io::Result<Vec<_>>>().map_err(|error| Report::failed(step, &error))
    };
    let cgroups = open(&spec.cgroup_procs, "cgroup")?;
    let limits = open(&spec.limiting_cgroup_procs, "memory_limit")?;
    let at_pipe = |error| Report::failed("shim", &error);
    let (output, engine_output) = io::pipe().map_err(at_pipe)?;
    rustix::io::ioctl_fionbio(&output, true).map_err(|errno| at_pipe(errno.into()))?;
    let (mut failed_step, step_report) = io::pipe().map_err(at_pipe)?;

    let shim = rustix::process::getpid();
    let secrets = secrets::files(spec).map_err(|error| Report::failed("secret", &error))?;
    let user = spec.run_as.as_ref().map(Change::to);
    let child = Child { shim, cgroups, limits, nofile: spec.nofile, user, secrets };

    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .env_clear()
        .envs(spec.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&spec.workdir)
        .stdin(Stdio::null())
        .stdout(engine_output.try_clone().map_err(at_pipe)?)
        .stderr(engine_output)
        .process_group(0);
    let born_in_first = Arc::new(AtomicBool::new(false));
    let first_is_joined = Arc::clone(&born_in_first);
    let before_exec = move || {
        child.prepare(first_is_joined.load(Ordering::Relaxed)).map_err(|(step, errno)| {
            let _told = rustix::io::write(&step_report, &[step as u8]);
            errno.into()
        })
    };
    // SAFETY: the closure runs in the forked child and makes only system calls on values prepared before the fork:
    // it does not allocate, take a lock, or touch anything the parent relies on.
    unsafe { command.pre_exec(before_exec) };

    let directory = spec.cgroup_procs.first().and_then(|procs| born::cgroup2_of(procs));
    let birth = directory
        .map(|cgroup| born::into_cgroup(&cgroup, &mut command, || born_in_first.store(true, Ordering::Relaxed)));
    let spawned = match birth {
        Some(Birth::Alive(pid)) => Ok(pid),
        Some(Birth::Failed(error)) => Err(error),
        Some(Birth::NotHere) | None => command
            .spawn()
            .and_then(|process| Pid::from_raw(process.id().cast_signed()).ok_or_else(|| ErrorKind::InvalidData.into())),
    };
    // Closes this side's copies of the writing ends, so that both pipes can end.
    drop(command);
    match spawned {
        Ok(pid) => Ok(Engine { pid, output }),
        Err(error) => {
            let mut step = [0];
            let told = failed_step.read(&mut step).is_ok_and(|count| count == 1);
            Err(Report::failed(if told { Step::name(step[0]) } else { "exec" }, &error))
        }
    }
}

/// A pid as the records and reports have it.
pub(crate) fn raw_pid(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().cast_unsigned()
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Cgroup,
    MemoryLimit,
    CoreLimit,
    NofileLimit,
    User,
    Secret,
    ParentDeath,
    NoNewPrivs,
}

impl Step {
    fn name(step: u8) -> &'static str {
        ["cgroup", "memory_limit", "core_limit", "nofile_limit", "user", "secret", "parent_death", "no_new_privs"]
            .get(usize::from(step))
            .unwrap_or(&"exec")
    }
}

/// What the child does to itself between fork and exec.
struct Child {
    shim: Pid,
    cgroups: Vec<File>,
    limits: Vec<File>,
    nofile: Option<u64>,
    user: Option<Change>,
    secrets: Vec<SecretText>,
}

impl Child {
    /// In the first of its cgroups it may have been born.
    fn prepare(&self, born_in_first: bool) -> Result<(), (Step, Errno)> {
        for procs in self.cgroups.iter().skip(usize::from(born_in_first)) {
            rustix::io::write(procs, b"0").map_err(|errno| (Step::Cgroup, errno))?;
        }
        for procs in &self.limits {
            rustix::io::write(procs, b"0").map_err(|errno| (Step::MemoryLimit, errno))?;
        }
        let limit = |bound| Rlimit { current: Some(bound), maximum: Some(bound) };
        rustix::process::setrlimit(Resource::Core, limit(0)).map_err(|errno| (Step::CoreLimit, errno))?;
        if let Some(nofile) = self.nofile {
            rustix::process::setrlimit(Resource::Nofile, limit(nofile)).map_err(|errno| (Step::NofileLimit, errno))?;
        }
        match &self.user {
            Some(change) => change.make(),
            None => user::keep_nothing_over_exec(),
        }
        .map_err(|errno| (Step::User, errno))?;
        // By the engine's user, whose they are then.
        self.secrets.iter().try_for_each(SecretText::write).map_err(|errno| (Step::Secret, errno))?;
        self.die_with_shim().map_err(|errno| (Step::ParentDeath, errno))?;
        rustix::thread::set_no_new_privs(true).map_err(|errno| (Step::NoNewPrivs, errno))
    }

    /// After the change of user, which would clear it. A shim that died before the call sends no signal: look again.
    fn die_with_shim(&self) -> Result<(), Errno> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() == Some(self.shim) { Ok(()) } else { Err(Errno::SRCH) }
    }
}
