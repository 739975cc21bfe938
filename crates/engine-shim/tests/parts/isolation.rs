//! What an engine is kept from, and what it leaves behind.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use engine_shim::{ACCESS, Access, AccessAnswer, AccessQuestion, SecretFile, User};

use super::*;

const NOBODY: u32 = 65534;

fn nobody() -> User {
    User { uid: NOBODY, gid: 65533, groups: vec![65532] }
}

/// To become somebody else takes root.
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root may become another user");
    }
    root
}

/// As the daemon makes it: a directory of the daemon's, with one in it to work in.
fn workdir(bench: &Bench, user: &User) -> PathBuf {
    let dir = bench.path("work");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(user.uid), Some(user.gid)).unwrap();
    dir
}

#[test]
fn another_user_has_no_power_left_and_works_where_it_cannot_look_around() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    fs::set_permissions(bench.dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let mut spec = bench.script(
        "id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; echo made > file && cat file; \
         cat \"$PWD/file\" 2> /dev/null || echo closed; ls .. 2> /dev/null || echo closed",
    );
    spec.run_as = Some(nobody());
    spec.workdir = workdir(&bench, &nobody());
    let shim = bench.start(&spec);
    shim.started();
    assert!(matches!(shim.report(), Report::Exited { .. }));
    let none = "0000000000000000";
    let sets = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}:\t{none}\n")).concat();
    let expected = format!("65534\n65533\n65533 65532\n{sets}NoNewPrivs:\t1\nmade\nclosed\nclosed\n");
    assert_eq!(bench.text("log"), expected);
}

#[test]
fn without_another_user_nothing_changes_but_what_is_handed_on() {
    let bench = Bench::new();
    let shim = bench.start(&bench.script("id -u; grep CapAmb /proc/self/status"));
    shim.started();
    assert_eq!(shim.report(), exited(0));
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(bench.text("log"), format!("{own}\nCapAmb:\t0000000000000000\n"));
}

#[test]
fn a_secret_is_a_file_for_the_engine_alone_and_goes_with_it() {
    let bench = Bench::new();
    bench.fifo("go");
    let canary = "canary-5f2d";
    let mut spec = bench.script("cat key; echo; read line < ../go; exit 3");
    spec.secrets = vec![SecretFile { name: "key".into(), value: canary.into() }];
    spec.scrub = vec![canary.into()];
    spec.env.push(("PATH".into(), "/usr/bin:/bin".into()));
    let user = if rustix::process::geteuid().is_root() {
        spec.run_as = Some(nobody());
        fs::set_permissions(bench.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        nobody()
    } else {
        User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw(), groups: Vec::new() }
    };
    spec.workdir = workdir(&bench, &user);
    fs::set_permissions(bench.path("go"), fs::Permissions::from_mode(0o644)).unwrap();
    let shim = bench.start(&spec);
    let pid = shim.started();
    let file = fs::metadata(bench.path("work/key")).unwrap();
    assert_eq!((file.uid(), file.mode() & 0o777), (user.uid, 0o400));
    for place in ["cmdline", "environ"] {
        let text = fs::read(format!("/proc/{pid}/{place}")).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(canary), "{place}");
    }
    fs::write(bench.path("go"), "now\n").unwrap();
    assert_eq!(shim.report(), exited(3));
    assert_eq!(shim.report(), Report::Gone);
    assert_eq!(bench.text("log"), "[redacted]\n");
    assert!(!bench.path("work/key").exists());

    // What is no name of a file in that directory is no secret.
    for name in ["", "../key", ".."] {
        let secrets = vec![SecretFile { name: name.into(), value: canary.into() }];
        let shim = bench.start(&LaunchSpec { secrets, ..spec.clone() });
        let Report::Failed { step, .. } = shim.report() else { panic!("not failed") };
        assert_eq!(step, "secret");
        shim.ends_with(1);
    }
}

fn ask(question: &AccessQuestion) -> AccessAnswer {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine-shim"));
    let mut shim = command.args(["engine-shim", ACCESS]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    shim.stdin.take().unwrap().write_all(&serde_json::to_vec(question).unwrap()).unwrap();
    serde_json::from_slice(&shim.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn what_a_user_may_not_reach_is_named() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    fs::set_permissions(bench.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let make = |name: &str, mode: u32| {
        let path = bench.path(name);
        if name.ends_with('d') {
            fs::create_dir(&path).unwrap();
        } else {
            fs::write(&path, "x").unwrap();
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    let (open, closed) = (make("open.d", 0o711), make("closed.d", 0o700));
    let (model, program) = (make("open.d/model", 0o644), make("open.d/program", 0o755));
    let private = make("open.d/private", 0o600);
    let inner = make("closed.d/inner.d", 0o755);
    let hidden = make("closed.d/inner.d/model", 0o644);
    // Its one further group opens this.
    let group = make("group.d", 0o710);
    std::os::unix::fs::chown(&group, None, Some(65532)).unwrap();
    let shared = make("group.d/model", 0o644);
    let link = bench.path("link");
    std::os::unix::fs::symlink(&hidden, &link).unwrap();
    let wanted = vec![
        (model.clone(), Access::Read),
        (program, Access::Execute),
        (model.clone(), Access::Execute),
        (private.clone(), Access::Read),
        (hidden, Access::Read),
        (inner, Access::Read),
        (shared, Access::Read),
        (link.clone(), Access::Read),
        (open.clone(), Access::Work),
        (bench.path("missing"), Access::Read),
    ];
    let missing = bench.path("missing");
    let barriers = [
        None,
        None,
        Some(model),
        Some(private),
        Some(closed.clone()),
        Some(closed),
        None,
        Some(link),
        Some(open),
        Some(missing),
    ];
    assert_eq!(ask(&AccessQuestion { user: nobody(), wanted }), AccessAnswer::Barriers(barriers.into()));
}

/// A file in the shared memory of this machine, removed at the end.
struct Shm(PathBuf);

impl Shm {
    fn name(what: &str) -> Self {
        Self(Path::new("/dev/shm").join(format!("psm_test_{}_{what}", std::process::id())))
    }

    fn made(what: &str) -> Self {
        let shm = Self::name(what);
        fs::write(&shm.0, "of somebody").unwrap();
        shm
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        let _gone = fs::remove_file(&self.0);
    }
}

#[test]
fn shared_memory_that_a_killed_engine_left_is_removed_and_nobody_elses() {
    let bench = Bench::new();
    // Who writes into it waits for a reader: nothing in the log has to be waited for.
    bench.fifo("log");
    bench.fifo("go");
    let before = Shm::made("before");
    let [own, child, shared] = ["own", "child", "shared"].map(Shm::name);
    let path = |shm: &Shm| shm.0.to_str().unwrap().to_owned();
    let script = format!(
        "exec 5>> {before} 6> {own} 7> {shared}; rm -f /nothing; (exec 6> {child}; echo made; exec sleep 1000) & wait",
        before = path(&before),
        own = path(&own),
        child = path(&child),
        shared = path(&shared),
    );
    let spec = LaunchSpec { shm_dir: Some("/dev/shm".into()), ..bench.script(&script) };
    let mut command = bench.command(&spec);
    let mut process = command.spawn().unwrap();
    let mut log = BufReader::new(fs::File::open(bench.path("log")).unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    assert_eq!(line, "made\n");
    // Of the same user, with a like name, made while the engine runs, and in nobody's hands by now.
    let stranger = Shm::made("stranger");
    let held = fs::File::open(&shared.0).unwrap();
    let shim = Pid::from_raw(process.id().cast_signed()).unwrap();
    kill_process(shim, Signal::from_named_raw(KILL).unwrap()).unwrap();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    assert_eq!(rest, "[engine-shim] removed 2 file(s) of shared memory that the engine left\n");
    let left = [&before, &own, &child, &shared, &stranger].map(|shm| shm.0.exists());
    assert_eq!(left, [true, false, false, true, true], "before, own, child's, in use, stranger's");
    drop(held);
}

/// Not a test of its own: the engine of the test below, which makes a segment and is attached to nothing.
#[test]
fn an_engine_that_makes_a_segment() {
    if std::env::var_os("MAKES_A_SEGMENT").is_none() {
        return;
    }
    println!("segment {}", segment());
    loop {
        std::thread::park();
    }
}

#[expect(unsafe_code, reason = "no safe interface makes a segment")]
fn segment() -> i32 {
    // SAFETY: shmget touches no memory of this process.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600) };
    assert!(id >= 0, "{}", std::io::Error::last_os_error());
    id
}

#[expect(unsafe_code, reason = "no safe interface removes a segment")]
fn remove_segment(id: i32) -> bool {
    // SAFETY: IPC_RMID takes no buffer.
    unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) == 0 }
}

#[test]
fn a_segment_that_a_killed_engine_left_is_removed_and_nobody_elses() {
    let (before, bench) = (segment(), Bench::new());
    bench.fifo("log");
    let name = "isolation::an_engine_that_makes_a_segment";
    let program = std::env::current_exe().unwrap();
    let spec = LaunchSpec {
        program,
        args: vec!["--exact".into(), name.into(), "--nocapture".into()],
        env: vec![("MAKES_A_SEGMENT".into(), "1".into())],
        ..bench.script("")
    };
    let mut process = bench.command(&spec).spawn().unwrap();
    let mut log = BufReader::new(fs::File::open(bench.path("log")).unwrap());
    let mut line = String::new();
    let own: i32 = loop {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it never said so");
        if let Some((_, id)) = line.trim().split_once("segment ") {
            break id.parse().unwrap();
        }
    };
    // Made by somebody else of the same user while it runs.
    let stranger = segment();
    let shim = Pid::from_raw(process.id().cast_signed()).unwrap();
    kill_process(shim, Signal::from_named_raw(KILL).unwrap()).unwrap();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    assert!(rest.contains("removed 1 System V segment(s)"), "{rest}");
    assert_eq!([own, before, stranger].map(remove_segment), [false, true, true], "its own, before, a stranger's");
}
