//! What engines are kept from, and what they leave behind: the real daemon and stub engines.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and says why it is skipped")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{Daemon, Engines, binary, eventually, request, signal, write_config};

const NOBODY: u32 = 65534;

/// Whether this test may become another user, who can run the daemon's program as an engine.
fn can_be_somebody_else() -> bool {
    let program = Path::new(env!("CARGO_BIN_EXE_pool-managerd"));
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("skipped: only root may become another user");
        return false;
    }
    let closed = program.ancestors().find(|path| fs::metadata(path).unwrap().permissions().mode() & 0o001 == 0);
    if let Some(closed) = closed {
        eprintln!("skipped: other users cannot run the program below {}", closed.display());
    }
    closed.is_none()
}

fn pool(isolation: &str, args: &str) -> String {
    format!(
        "[[pool]]\nid = \"kept\"\nmodel = \"stub:kept\"\nengine = \"stub\"\nactivation = \"preload\"\nargs = [{args}]\n\
         [pool.backoff]\ninitial = \"1h\"\nmax = \"1h\"\n[pool.isolation]\n{isolation}"
    )
}

/// The engine's main process.
fn main_pid(pool: &Value) -> u32 {
    pool["replicas"][0]["pid"].as_u64().unwrap().try_into().unwrap()
}

/// Where its generation lies. Not always the first: a port may have been somebody's.
fn generation(daemon: &Daemon, pool: &Value) -> PathBuf {
    daemon.dir().join("state/run/kept-r0").join(pool["replicas"][0]["generation"].to_string())
}

#[test]
fn an_engine_of_another_user_has_its_limits_no_power_and_no_sight_of_the_daemons_files() {
    if !can_be_somebody_else() {
        return;
    }
    let daemon = Daemon::start(&pool("run_as = \"65534:65533\"\nnofile = 512\n", ""));
    let ready = daemon.until("kept", |p| p["ready"] == true);
    let pid = main_pid(&ready);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!((field("Uid"), field("Gid")), ("65534 65534 65534 65534".into(), "65533 65533 65533 65533".into()));
    assert_eq!((field("Groups"), field("NoNewPrivs")), (String::new(), "1".into()));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max open files"), ["512", "512"]);
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    let work = generation(&daemon, &ready).join("work");
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), work.canonicalize().unwrap());
    assert_eq!(fs::metadata(&work).unwrap().uid(), NOBODY);

    // Everything else is the daemon's alone.
    let mut left = vec![daemon.dir().join("state")];
    let mut files = 0;
    while let Some(path) = left.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        // Of an earlier generation, too.
        if path.ends_with("work") {
            continue;
        }
        assert_eq!(found.uid(), 0, "{}", path.display());
        assert_eq!(found.mode() & 0o077, 0, "others get at {}", path.display());
        files += 1;
        if found.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    assert!(files > 10, "{files}");

    // The next daemon finds it again, whoever it runs as.
    let engines = Engines::of(&daemon);
    let daemon = Daemon::start_in_place(daemon.kill(&engines));
    let pool = daemon.until("kept", |p| p["ready"] == true);
    assert_eq!((generation(&daemon, &pool), main_pid(&pool)), (generation(&daemon, &ready), pid), "{pool:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn an_engine_that_takes_more_memory_than_it_may_ran_out_of_host_memory() {
    let daemon_can = || {
        let dir = tempfile::tempdir().unwrap();
        let file = write_config(dir.path(), &pool("memory_max = \"64 MiB\"\n", ""));
        let out = binary().args(["check", "--config"]).arg(file).output().unwrap();
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let said = daemon_can();
    if said.contains("may make no cgroup that limits memory") {
        eprintln!("skipped: {said}");
        return;
    }
    let daemon = Daemon::start(&pool("memory_max = \"64 MiB\"\n", "\"--host-memory\", \"1 GiB\""));
    let pool = daemon.until("kept", |p| p["state"] == "waiting" && p["last_error"]["class"] != "port_conflict");
    assert_eq!(pool["last_error"]["class"], "host_oom", "{pool:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_cannot_be_kept_or_reached_is_said_by_check_and_nothing_is_started() {
    let check = |dir: &Path, config: &str| {
        let out = binary().args(["check", "--config"]).arg(write_config(dir, config)).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let dir = tempfile::tempdir().unwrap();
    let unknown = pool("run_as = \"no-such-user\"\n", "");
    let (code, said) = check(dir.path(), &unknown);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("pool[0].isolation.run_as: there is no user `no-such-user`"), "{said}");
    assert!(said.contains("uid:gid"), "{said}");
    let out = binary().args(["serve", "--config"]).arg(dir.path().join("pool-managerd.toml")).output().unwrap();
    assert_eq!(out.status.code(), Some(78), "{out:?}");

    if !can_be_somebody_else() {
        return;
    }
    let models = dir.path().join("models");
    fs::create_dir(&models).unwrap();
    fs::write(models.join("m.gguf"), [b"GGUF\x03\0\0\0".as_slice(), &[0; 16]].concat()).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&models, fs::Permissions::from_mode(0o700)).unwrap();
    let closed = pool("run_as = \"nobody\"\n", "").replace("stub:kept", &format!("file:{}/m.gguf", models.display()));
    let closed = format!("[models]\nroots = [\"{}\"]\n{closed}", models.display());
    let (code, said) = check(dir.path(), &closed);
    assert_eq!(code, Some(78), "{said}");
    let place = format!("user `nobody` may not search the directory {}, in which the model lies", models.display());
    assert!(said.contains(&place) && said.contains("setfacl"), "{said}");

    let daemon = Daemon::start_in(dir, &closed);
    let pool = daemon.until("kept", |p| p["state"] == "failed");
    assert_eq!(pool["last_error"]["class"], "config", "{pool:#}");
    let detail = pool["last_error"]["detail"].as_str().unwrap();
    assert!(detail.contains("directory models") && !detail.contains('/'), "{detail}");
    assert!(!daemon.dir().join("state/run/kept-r0").exists(), "something was launched");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn over_http_nobody_chooses_the_user_of_an_engine_or_takes_one_away() {
    let own = rustix::process::geteuid().as_raw();
    let own = format!("run_as = \"{own}:{}\"\n", rustix::process::getegid().as_raw());
    // The daemon's own user takes no privilege, unless that is root.
    let table = if own.contains("\"0:") { "nofile = 512\n".to_owned() } else { own };
    let daemon = Daemon::start(&pool(&table, ""));
    daemon.until("kept", |p| p["ready"] == true);
    let put = r#"{"model":"stub:new","engine":"stub","isolation":{"run_as":"nobody"}}"#;
    let reload = r#"{"isolation":{"run_as":"nobody"}}"#;
    for answer in
        [request(daemon.addr(), "PUT", "/v1/pools/new", Some(put)), daemon.post("/v1/pools/kept/reload", reload)]
    {
        assert_eq!((answer.status, answer.json()["code"].as_str()), (422, Some("ARG_DENIED")), "{answer:?}");
        assert!(answer.body.contains("config file"), "{answer:?}");
    }
    assert_eq!(daemon.get("/v1/pools/new").status, 404);
    // What is not changed stands in nobody's way.
    let same = daemon.post("/v1/pools/kept/reload?wait_ms=60000", r#"{"isolation":{"nofile":1024}}"#);
    assert_eq!((same.status, same.json()["state"].as_str()), (200, Some("succeeded")), "{same:?}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn what_an_engine_says_moves_no_cursor_wherever_it_is_told() {
    // "bye", ESC [2J, CSI in eight bits, and a byte that is no text.
    let said =
        "\"--log-bytes\", \"627965201b5b324ac29bff\", \"--fail-start-times\", \"1\", \"--state-file\", \"starts\"";
    let daemon = Daemon::start(&pool("", said));
    let pool = daemon.until("kept", |p| p["last_error"]["class"] == "crash");
    let log = fs::read(generation(&daemon, &pool).join("engine.log")).unwrap();
    let log = String::from_utf8(log).unwrap();
    assert!(log.contains("bye \\u{1b}[2J\\u{9b}\\xff\n"), "{log}");
    let tame = |text: &str| text.chars().all(|c| c == '\n' || c == '\r' || !c.is_control());
    assert!(tame(&log), "{log}");
    for path in ["/v1/pools", "/v1/pools/kept", "/v1/pools/kept/health", "/metrics"] {
        assert!(tame(&daemon.get(path).body), "{path}");
    }
    assert!(tame(pool["last_error"]["detail"].as_str().unwrap()), "{pool:#}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn shared_memory_of_a_killed_engine_is_swept_and_a_strangers_stays() {
    let name = |what: &str| format!("psm_e2e_{}_{what}", std::process::id());
    let path = |what: &str| Path::new("/dev/shm").join(name(what));
    let daemon = Daemon::start(&pool("", &format!("\"--shm-file\", \"{}\"", name("own"))));
    let ready = daemon.until("kept", |p| p["ready"] == true);
    // Once it stands in the log, the shim has seen who made the file.
    eventually(|| {
        fs::read_to_string(generation(&daemon, &ready).join("engine.log")).ok()?.contains("made shared").then_some(())
    });
    fs::write(path("stranger"), "not yours").unwrap();
    assert!(path("own").exists());
    signal(main_pid(&ready), "KILL");
    daemon.until("kept", |p| p["state"] == "waiting");
    let (own, stranger) = (path("own").exists(), path("stranger").exists());
    fs::remove_file(path("stranger")).unwrap();
    let _left = fs::remove_file(path("own"));
    assert_eq!((own, stranger), (false, true));
    assert_eq!(daemon.stop(), Some(0));
}

/// Neither root nor the user of its engines.
const CAPABLE: u32 = 65532;

/// A daemon that has nothing but the four capabilities that `run_as` takes.
fn capable() -> std::process::Command {
    let daemon = binary();
    let mut command = std::process::Command::new("setpriv");
    let only = "-all,+setuid,+setgid,+kill,+sys_ptrace";
    command.args([&format!("--reuid={CAPABLE}"), &format!("--regid={CAPABLE}"), "--clear-groups"]);
    command.args([&format!("--inh-caps={only}"), &format!("--ambient-caps={only}"), &format!("--bounding-set={only}")]);
    command.arg("--").arg(daemon.get_program());
    command.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

#[test]
fn a_daemon_that_is_not_root_runs_engines_as_another_user_with_four_capabilities() {
    if !can_be_somebody_else() {
        return;
    }
    if !std::process::Command::new("setpriv").arg("--version").output().is_ok_and(|told| told.status.success()) {
        eprintln!("skipped: setpriv is not here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &pool("run_as = \"65534:65533\"\n", ""));
    let runtime = dir.path().join("runtime");
    fs::create_dir(&runtime).unwrap();
    for path in ["", "runtime", "two-gpus.toml", "pool-managerd.toml"] {
        std::os::unix::fs::chown(dir.path().join(path), Some(CAPABLE), Some(CAPABLE)).unwrap();
    }
    let start = |dir| {
        let mut command = capable();
        command.env("XDG_RUNTIME_DIR", &runtime);
        Daemon::start_as(command, dir)
    };
    let status = |pid: u32, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
        line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let daemon = start(dir);
    let engines = Engines::of(&daemon);
    let ready = daemon.until("kept", |p| p["ready"] == true);
    let pid = main_pid(&ready);
    assert_eq!((status(daemon.pid(), "Uid"), status(daemon.pid(), "CapEff")), {
        let four = (1_u64 << 5) | (1 << 6) | (1 << 7) | (1 << 19);
        (format!("{CAPABLE} {CAPABLE} {CAPABLE} {CAPABLE}"), format!("{four:016x}"))
    });
    assert_eq!(status(pid, "Uid"), "65534 65534 65534 65534");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    // It is known again, which takes a look at another user's process, and ended.
    let daemon = start(daemon.kill(&engines));
    let adopted = daemon.until("kept", |p| p["ready"] == true);
    assert_eq!(main_pid(&adopted), pid);
    let (code, _dir) = daemon.end(&engines);
    assert_eq!((code, support::alive(pid)), (Some(0), false));
}
