//! The shim as the daemon sees it: a process, its report lines, its records and its log.
#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use engine_shim::{ExitRecord, KILL, LaunchSpec, Report, StartRecord, TERMINATE};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

#[path = "parts/isolation.rs"]
mod isolation;

const LIMIT: Duration = Duration::from_secs(30);

struct Bench {
    dir: TempDir,
}

struct Shim {
    child: Child,
    reports: Receiver<Report>,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn fifo(&self, name: &str) {
        assert!(Command::new("mkfifo").arg(self.path(name)).status().unwrap().success());
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn spec(&self, program: &str, args: &[&str]) -> LaunchSpec {
        LaunchSpec {
            nonce: "nonce-1".into(),
            program: program.into(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            workdir: self.dir.path().into(),
            log: self.path("log"),
            log_max_bytes: 1 << 20,
            scrub: Vec::new(),
            exit_record: self.path("exit.json"),
            start_record: self.path("start.json"),
            start_record_copy: None,
            lock_on_stdin: false,
            shared_locks: Vec::new(),
            cgroup_procs: Vec::new(),
            limiting_cgroup_procs: Vec::new(),
            later_cgroup_procs: Vec::new(),
            nofile: None,
            run_as: None,
            secrets: Vec::new(),
            shm_dir: None,
            stop_when_parent_gone: false,
        }
    }

    fn script(&self, script: &str) -> LaunchSpec {
        self.spec("/bin/sh", &["-c", script])
    }

    fn command(&self, spec: &LaunchSpec) -> Command {
        fs::write(self.path("spec.json"), serde_json::to_vec(spec).unwrap()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine-shim"));
        command.arg("engine-shim").arg(self.path("spec.json")).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    fn start(&self, spec: &LaunchSpec) -> Shim {
        let mut child = self.command(spec).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, reports) = channel();
        std::thread::spawn(move || {
            for line in lines {
                let _test_over = sender.send(serde_json::from_str(&line.unwrap()).unwrap());
            }
        });
        Shim { child, reports }
    }
}

impl Shim {
    fn report(&self) -> Report {
        self.reports.recv_timeout(LIMIT).expect("a report in time")
    }

    fn started(&self) -> u32 {
        match self.report() {
            Report::Started { pid, .. } => pid,
            other => panic!("not started: {other:?}"),
        }
    }

    fn signal(&self, signal: i32) {
        let shim = Pid::from_raw(self.child.id().cast_signed()).unwrap();
        kill_process(shim, Signal::from_named_raw(signal).unwrap()).unwrap();
    }

    /// No further report, and this exit code.
    fn ends_with(mut self, code: i32) {
        assert_eq!(self.reports.recv_timeout(LIMIT), Err(RecvTimeoutError::Disconnected));
        assert_eq!(self.child.wait().unwrap().code(), Some(code));
    }
}

/// A test that fails must leave nothing running.
impl Drop for Shim {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.signal(KILL);
            self.child.wait().unwrap();
        }
    }
}

fn exited(code: i32) -> Report {
    Report::Exited { code: Some(code), signal: None }
}

fn killed_by(signal: i32) -> Report {
    Report::Exited { code: None, signal: Some(signal) }
}

fn record<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Reads a fifo until all its writers have gone; a thread, so that the wait has a limit.
fn until_closed(path: PathBuf) -> String {
    let (sender, text) = channel();
    std::thread::spawn(move || sender.send(fs::read_to_string(path).unwrap()));
    text.recv_timeout(LIMIT).expect("every writer of the fifo to end")
}

#[test]
fn an_exit_code_is_reported_and_recorded() {
    let bench = Bench::new();
    let shim = bench.start(&bench.script("echo out; echo err >&2; exit 7"));
    let Report::Started { pid, start_time } = shim.report() else { panic!("not started") };
    assert_eq!(shim.report(), exited(7));
    assert_eq!(bench.text("log"), "out\nerr\n", "the last words are in the log when the exit is reported");

    let start: StartRecord = record(&bench.path("start.json"));
    assert_eq!((start.nonce.as_str(), start.pid, start.start_time), ("nonce-1", pid, start_time));
    assert_eq!(start.shim_pid, shim.child.id());
    assert_eq!(start.boot_id, fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    let exit: ExitRecord = record(&bench.path("exit.json"));
    assert_eq!((exit.nonce.as_str(), exit.code, exit.signal), ("nonce-1", Some(7), None));
    assert!(exit.exited_at_ms > 1_600_000_000_000);

    assert_eq!(shim.report(), Report::Gone);
    shim.ends_with(0);
}

#[test]
fn terminate_ends_the_group() {
    let bench = Bench::new();
    bench.fifo("ready");
    // A shell that is told to end while it starts a command may leave that behind untold: it blocks signals around the
    // fork (dash does), and whoever comes into the group after the signal has not got it. So not before the child is there.
    let shim = bench.start(&bench.script("sleep 1000 & echo yes > ready; wait; echo not reached"));
    shim.started();
    assert_eq!(until_closed(bench.path("ready")), "yes\n");
    shim.signal(TERMINATE);
    assert_eq!(shim.report(), killed_by(15));
    assert_eq!(shim.report(), Report::Gone);
    assert_eq!(record::<ExitRecord>(&bench.path("exit.json")).signal, Some(15));
    shim.ends_with(0);
}

#[test]
fn an_engine_that_ignores_terminate_is_killed() {
    let bench = Bench::new();
    bench.fifo("ready");
    let shim = bench.start(&bench.script("trap '' TERM; echo yes > ready; while :; do sleep 1000; done"));
    shim.started();
    assert_eq!(until_closed(bench.path("ready")), "yes\n");
    shim.signal(TERMINATE);
    shim.signal(KILL);
    assert_eq!(shim.report(), killed_by(9));
    assert_eq!(shim.report(), Report::Gone);
    shim.ends_with(0);
}

/// Double-forked, in a session of its own; its pid comes by a fifo.
const DETACHED: &str = "(setsid sh -c 'echo $$ > pid; exec sleep 1000' &); read p < pid; echo $p; exit 3";

#[test]
fn not_gone_while_a_detached_descendant_lives() {
    let bench = Bench::new();
    bench.fifo("pid");
    let shim = bench.start(&bench.script(DETACHED));
    shim.started();
    assert_eq!(shim.report(), exited(3), "reported although a descendant lives");
    let detached = Pid::from_raw(bench.text("log").trim().parse().unwrap()).unwrap();
    kill_process(detached, Signal::STOP).unwrap();
    assert!(shim.reports.try_recv().is_err(), "not gone");
    kill_process(detached, Signal::KILL).unwrap();
    assert_eq!(shim.report(), Report::Gone);
    shim.ends_with(0);
}

#[test]
fn terminate_reaches_the_orphans_once_the_main_process_has_ended() {
    let bench = Bench::new();
    bench.fifo("pid");
    let shim = bench.start(&bench.script(DETACHED));
    shim.started();
    assert_eq!(shim.report(), exited(3));
    shim.signal(TERMINATE);
    assert_eq!(shim.report(), Report::Gone);
    shim.ends_with(0);
}

#[test]
fn kill_reaches_a_tree_of_sessions() {
    let bench = Bench::new();
    bench.fifo("ready");
    bench.fifo("life");
    let shim = bench.start(&bench.script(
        "exec 9<> life; exec 8> life; exec 9>&-; trap '' TERM
         setsid sh -c 'setsid sh -c \"setsid sleep 1000 & echo deep > ready; wait\" & wait' &
         (setsid sleep 1000 &)
         wait",
    ));
    shim.started();
    let mut life = BufReader::new(fs::File::open(bench.path("life")).unwrap());
    assert_eq!(until_closed(bench.path("ready")), "deep\n");
    shim.signal(KILL);
    assert_eq!(shim.report(), killed_by(9));
    assert_eq!(shim.report(), Report::Gone);
    assert_eq!(life.read_to_end(&mut Vec::new()).unwrap(), 0, "nobody holds the pipe");
    shim.ends_with(0);
}

#[test]
fn the_log_is_bounded_rotated_and_scrubbed() {
    let bench = Bench::new();
    let mut spec =
        bench.script("i=0; while [ $i -lt 2000 ]; do echo line $i with hunter2; i=$((i+1)); done; printf end");
    spec.log_max_bytes = 8192;
    spec.scrub = vec!["hunter2".into()];
    let shim = bench.start(&spec);
    shim.started();
    assert_eq!(shim.report(), exited(0));
    assert_eq!(shim.report(), Report::Gone);
    let (log, previous) = (bench.text("log"), bench.text("log.1"));
    assert!(log.len() <= 8192 && previous.len() <= 8192);
    let all = previous + &log;
    assert!(all.ends_with("line 1999 with [redacted]\nend") && !all.contains("hunter2"));
    let first: usize = all.split(' ').nth(1).unwrap().parse().unwrap();
    let expected: String = (first..2000).map(|i| format!("line {i} with [redacted]\n")).collect();
    assert_eq!(all, expected + "end", "no line is torn or lost by rotation");
    shim.ends_with(0);
}

#[test]
fn the_environment_is_exactly_the_one_given() {
    let bench = Bench::new();
    let mut spec = bench.spec("/usr/bin/env", &[]);
    spec.env = vec![("A".into(), "1".into()), ("B".into(), "x y".into())];
    let shim = bench.start(&spec);
    shim.started();
    assert_eq!(shim.report(), exited(0));
    assert_eq!(bench.text("log"), "A=1\nB=x y\n");
}

#[test]
fn the_engine_is_confined_before_exec() {
    let bench = Bench::new();
    fs::write(bench.path("cgroup.procs"), "").unwrap();
    let mut spec = bench.script(
        "ulimit -c; ulimit -n; umask; grep NoNewPrivs /proc/self/status; readlink /proc/self/fd/0; ls /proc/self/fd | wc -l; \
         cut -d' ' -f5 /proc/$$/stat; echo $$; pwd",
    );
    spec.nofile = Some(64);
    spec.cgroup_procs = vec![bench.path("cgroup.procs")];
    let shim = bench.start(&spec);
    let pid = shim.started();
    assert_eq!(shim.report(), exited(0));
    let dir = fs::canonicalize(bench.dir.path()).unwrap();
    // As many descriptors as a child of this test gets: the shim leaks none of its own.
    let count = Command::new("/bin/sh").args(["-c", "ls /proc/self/fd | wc -l"]).stdin(Stdio::null()).output().unwrap();
    let fds = String::from_utf8(count.stdout).unwrap();
    let expected = format!("0\n64\n0077\nNoNewPrivs:\t1\n/dev/null\n{fds}{pid}\n{pid}\n{}\n", dir.display());
    assert_eq!(bench.text("log"), expected);
    assert_eq!(bench.text("cgroup.procs"), "0");
}

/// A version 2 cgroup below this test's own, removed at the end. `None` where this process may make none.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::"))?.trim_start_matches('/').to_owned();
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().find_map(|root| {
            let parent = Path::new(root).join(&own);
            let dir = parent.join(format!("engine-shim-test-{}", std::process::id()));
            (parent.join("cgroup.procs").exists() && fs::create_dir(&dir).is_ok()).then_some(Self(dir))
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _left = fs::remove_dir(&self.0);
    }
}

#[test]
fn the_engine_is_born_in_its_cgroup() {
    let Some(cgroup) = Cgroup::new() else { return };
    let bench = Bench::new();
    let mut spec = bench.script("cat /proc/self/cgroup; grep SigBlk /proc/self/status; exit 7");
    // The second one is a plain file, which is joined by writing.
    fs::write(bench.path("cgroup.procs"), "").unwrap();
    spec.cgroup_procs = vec![cgroup.0.join("cgroup.procs"), bench.path("cgroup.procs")];
    let shim = bench.start(&spec);
    let pid = shim.started();
    assert_eq!(record::<StartRecord>(&bench.path("start.json")).pid, pid);
    assert_eq!(shim.report(), exited(7));
    assert_eq!(shim.report(), Report::Gone);
    shim.ends_with(0);
    let log = bench.text("log");
    let name = cgroup.0.file_name().unwrap().to_str().unwrap();
    assert!(log.lines().any(|line| line.starts_with("0::") && line.ends_with(name)), "{log}");
    assert!(log.contains("SigBlk:\t0000000000000000"), "{log}");
    assert_eq!(bench.text("cgroup.procs"), "0");

    let missing = LaunchSpec { program: "/no/such/engine".into(), ..spec };
    let shim = bench.start(&missing);
    let Report::Failed { step, not_found, .. } = shim.report() else { panic!("not failed") };
    assert_eq!((step.as_str(), not_found), ("exec", true));
    shim.ends_with(1);
    assert_eq!(fs::read_to_string(cgroup.0.join("cgroup.procs")).unwrap(), "", "nothing is left of it");
}

#[test]
fn a_start_that_fails_says_which_step() {
    let bench = Bench::new();
    let failure = |spec: LaunchSpec| {
        let shim = bench.start(&spec);
        let Report::Failed { step, not_found, .. } = shim.report() else { panic!("not failed") };
        shim.ends_with(1);
        (step, not_found)
    };
    assert_eq!(failure(bench.spec("/no/such/engine", &[])), ("exec".into(), true));
    assert_eq!(failure(bench.spec("/dev/null", &[])), ("exec".into(), false));
    assert_eq!(failure(bench.spec("sh", &[])), ("program".into(), false));
    assert_eq!(failure(LaunchSpec { workdir: "/no/such".into(), ..bench.script("") }), ("workdir".into(), true));
    let no_cgroup = LaunchSpec { cgroup_procs: vec!["/no/such".into()], ..bench.script("") };
    assert_eq!(failure(no_cgroup), ("cgroup".into(), true));
    let full_cgroup = LaunchSpec { cgroup_procs: vec!["/dev/full".into()], ..bench.script("") };
    assert_eq!(failure(full_cgroup), ("cgroup".into(), false));
    let no_record = LaunchSpec { start_record: "/no/such/start".into(), ..bench.script("sleep 1000") };
    assert_eq!(failure(no_record), ("start_record".into(), true));
    assert!(!bench.path("exit.json").exists());
}

#[test]
fn a_spec_that_cannot_be_read_is_reported() {
    let output = Command::new(env!("CARGO_BIN_EXE_engine-shim")).arg("/no/such/spec").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(matches!(report, Report::Failed { step, not_found: true, .. } if step == "spec"));
}

/// Starts an engine with the reports in the test's own hand, which is to drop them.
fn start_in_hand(bench: &Bench, spec: &LaunchSpec) -> (Child, BufReader<ChildStdout>) {
    let mut child = bench.command(spec).spawn().unwrap();
    let mut reports = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reports.read_line(&mut line).unwrap();
    assert!(matches!(serde_json::from_str(&line).unwrap(), Report::Started { .. }));
    (child, reports)
}

#[test]
fn when_the_parent_goes_everything_goes() {
    let bench = Bench::new();
    bench.fifo("life");
    let script = "trap '' TERM; exec > life; echo up; (setsid sleep 1000 &); while :; do sleep 1000; done";
    let spec = LaunchSpec { stop_when_parent_gone: true, ..bench.script(script) };
    let (mut shim, reports) = start_in_hand(&bench, &spec);
    let mut life = BufReader::new(fs::File::open(bench.path("life")).unwrap());
    let mut line = String::new();
    life.read_line(&mut line).unwrap();
    drop(reports);
    assert_eq!(life.read_to_end(&mut Vec::new()).unwrap(), 0, "all who held the fifo have ended");
    assert_eq!(shim.wait().unwrap().code(), Some(0));
    assert_eq!(record::<ExitRecord>(&bench.path("exit.json")).signal, Some(9));
}

#[test]
fn without_the_wish_the_engine_outlives_the_parent() {
    let bench = Bench::new();
    bench.fifo("go");
    let (mut shim, reports) = start_in_hand(&bench, &bench.script("read word < go; echo heard $word; exit 5"));
    drop(reports);
    fs::write(bench.path("go"), "it\n").unwrap();
    assert_eq!(shim.wait().unwrap().code(), Some(0));
    assert_eq!(bench.text("log"), "heard it\n");
    assert_eq!(record::<ExitRecord>(&bench.path("exit.json")).code, Some(5));
}

#[test]
fn the_engine_dies_with_the_shim() {
    let bench = Bench::new();
    bench.fifo("life");
    let mut shim = bench.start(&bench.spec("/bin/sh", &["-c", "exec > life; echo up; exec sleep 1000"]));
    shim.started();
    let mut life = BufReader::new(fs::File::open(bench.path("life")).unwrap());
    let mut line = String::new();
    life.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    shim.child.kill().unwrap();
    assert_eq!(life.read_to_end(&mut Vec::new()).unwrap(), 0);
    shim.child.wait().unwrap();
}

#[test]
fn locks_hold_while_shim_or_engine_lives_and_the_end_is_on_record() {
    let bench = Bench::new();
    bench.fifo("go");
    let (own, shared) = (bench.path("own.lock"), bench.path("shared.lock"));
    let lock = fs::File::create(&own).unwrap();
    lock.try_lock().unwrap();
    fs::write(&shared, "").unwrap();
    let spec = LaunchSpec {
        lock_on_stdin: true,
        shared_locks: vec![shared.clone()],
        start_record_copy: Some(bench.path("copy.json")),
        ..bench.script("read line < go; exit 3")
    };
    let mut command = bench.command(&spec);
    // Nobody reads the reports, as when the daemon has died.
    let mut shim = command.stdin(lock).stdout(Stdio::piped()).spawn().unwrap();
    drop(command);
    let mut reports = BufReader::new(shim.stdout.take().unwrap());
    reports.read_line(&mut String::new()).unwrap();
    drop(reports);
    let try_own = || fs::File::open(&own).unwrap().try_lock().is_ok();
    let try_shared = || fs::File::open(&shared).unwrap().try_lock().is_ok();
    assert!(!try_own() && !try_shared(), "shim and engine hold both");
    fs::File::open(&shared).unwrap().try_lock_shared().unwrap();
    let start: StartRecord = record(&bench.path("start.json"));
    assert_eq!(start, record(&bench.path("copy.json")));
    let open = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).filter(|path| *path == own || *path == shared).count()
    };
    assert_eq!(open(start.pid), 2, "the engine has both too");
    assert_eq!(start.executable, engine_shim::executable(start.pid));

    fs::write(bench.path("go"), "now\n").unwrap();
    assert_eq!(shim.wait().unwrap().code(), Some(0));
    let exit: ExitRecord = record(&bench.path("exit.json"));
    assert_eq!((exit.nonce.as_str(), exit.code, exit.gone), ("nonce-1", Some(3), true));
    assert!(try_own() && try_shared());
}

#[test]
fn a_cgroup_that_only_counts_holds_up_no_start() {
    let bench = Bench::new();
    bench.fifo("go");
    // Takes whatever is written, as cgroup.procs does.
    let procs = bench.path("procs");
    fs::write(&procs, "").unwrap();
    let spec = LaunchSpec {
        later_cgroup_procs: vec!["/dev/full".into(), procs.clone()],
        ..bench.script("read line < go; exit 3")
    };
    let mut shim = bench.command(&spec).stdout(Stdio::piped()).spawn().unwrap();
    let mut reports = BufReader::new(shim.stdout.take().unwrap());
    reports.read_line(&mut String::new()).unwrap();
    let start: StartRecord = record(&bench.path("start.json"));
    assert_eq!(start.later_cgroup_procs, spec.later_cgroup_procs);
    fs::write(bench.path("go"), "now\n").unwrap();
    assert_eq!(shim.wait().unwrap().code(), Some(0));
    assert!(bench.text("log").contains("could not be moved by /dev/full"), "{}", bench.text("log"));
    assert!(fs::read_to_string(procs).unwrap().starts_with(&start.pid.to_string()));
    assert_eq!(record::<ExitRecord>(&bench.path("exit.json")).code, Some(3), "it ran on");
}
