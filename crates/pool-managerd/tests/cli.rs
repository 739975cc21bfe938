//! Exit codes and messages of the built program.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use tempfile::TempDir;

/// The ports of engines lie below those that the system gives away: a test that takes one of these must not meet them.
const NODE: &str = "[node]\nlisten = \"127.0.0.1:0\"\nstate_dir = \"state\"\nengine_ports = \"20000-20063\"\n";

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pool-managerd"));
    command.env_remove("POOL_MANAGERD_LOG").env_remove("POOL_MANAGERD_CONFIG").env_remove("POOL_MANAGERD_SERVER");
    command.stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

/// A directory with a config and a topology of two simulated devices.
fn site(config: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    fs::write(&file, config).unwrap();
    fs::write(dir.path().join("two-gpus.toml"), gpu_sim::TWO_GPUS).unwrap();
    (dir, file)
}

fn simulated(pools: &str) -> String {
    format!("{NODE}[gpu]\nbackend = \"simulated\"\ntopology = \"two-gpus.toml\"\n{pools}")
}

fn serve(config: &Path) -> Output {
    run(&["serve", "--config", config.to_str().unwrap()])
}

#[test]
fn wrong_use_is_64_and_help_is_0() {
    for args in [&[] as &[&str], &["serv"], &["serve", "--no-such"], &["drain"], &["status", "--server"]] {
        assert_eq!(code(&run(args)), Some(64), "{args:?}");
    }
    let bad = run(&["status", "../x"]);
    assert_eq!(code(&bad), Some(64), "{}", stderr(&bad));
    assert_eq!(code(&run(&["status", "--server", "ftp://x"])), Some(64));
    for args in [["--help"], ["--version"], ["openapi"]] {
        let output = run(&args);
        assert_eq!((code(&output), output.stdout.is_empty()), (Some(0), false), "{args:?}");
    }
    assert!(String::from_utf8(run(&["completions", "bash"]).stdout).unwrap().contains("preload"));
    let level = program().args(["serve"]).env("POOL_MANAGERD_LOG", "loud=very").output().unwrap();
    assert_eq!(code(&level), Some(64), "{}", stderr(&level));
}

#[test]
fn an_invalid_config_is_78_with_line_and_hint() {
    let (_dir, file) = site("[node]\nlistne = \"127.0.0.1:0\"\n");
    let output = serve(&file);
    assert_eq!(code(&output), Some(78));
    let text = stderr(&output);
    assert!(text.contains("c.toml:2: node.listne: unknown field `listne`"), "{text}");
    assert!(text.contains("\nhint: did you mean `listen`?\n"), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
    assert_eq!(code(&run(&["check", "--config", file.to_str().unwrap()])), Some(78));
    assert_eq!(code(&run(&["serve", "--config", "/no/such.toml"])), Some(78));
}

#[test]
fn a_mask_that_cannot_be_is_78_and_check_says_which_device_is_not_there() {
    let pool =
        "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\nactivation = \"preload\"\ndevices = \"7\"\n";
    let (dir, file) = site(&simulated(pool));
    let output = run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("c.toml:13: pool[0].devices: `7` is not on this node"), "{}", stderr(&output));
    fs::write(&file, fs::read_to_string(&file).unwrap().replace("\"7\"", "\"0,gpu7\"")).unwrap();
    for command in ["serve", "check"] {
        let output = run(&[command, "--config", file.to_str().unwrap()]);
        assert_eq!(code(&output), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains("c.toml:13: pool[0].devices: `gpu7`"), "{}", stderr(&output));
    }
    // Nothing was launched.
    assert!(!dir.path().join("state/run/a-r0").exists());
}

#[test]
fn a_topology_that_is_none_is_78() {
    let (dir, file) = site(&simulated(""));
    fs::write(dir.path().join("two-gpus.toml"), "[[devise]]\n").unwrap();
    let output = serve(&file);
    assert_eq!(code(&output), Some(78));
    assert!(stderr(&output).contains("c.toml:7: gpu.topology: "), "{}", stderr(&output));
    fs::remove_file(dir.path().join("two-gpus.toml")).unwrap();
    assert_eq!(code(&serve(&file)), Some(78));
}

#[test]
fn check_says_what_would_happen() {
    let pool = "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\ndevices = \"1\"\n";
    let (dir, file) = site(&simulated(pool));
    let output = run(&["check", "--config", file.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(code(&output), Some(0), "{text}{}", stderr(&output));
    assert!(text.contains("SIMULATED") && text.contains("pool a:") && text.contains("the config is valid"), "{text}");
    assert!(!dir.path().join("state").exists(), "check leaves nothing behind");
}

#[test]
fn doctor_says_what_is_missing_and_what_would_help() {
    // What a pool needs is broken, what none needs is not.
    let pool = |engine: &str| {
        format!(
            "[engines.mine]\nkind = \"llama.cpp\"\nmode = \"binary\"\npath = \"/no/llama-server\"\n\
             [[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"{engine}\"\n"
        )
    };
    for (engine, exit, mark) in [("mine", 1, "NO"), ("stub", 0, "!")] {
        let (dir, file) = site(&simulated(&pool(engine)));
        let file = file.to_str().unwrap();
        let output = run(&["doctor", "--config", file]);
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        assert_eq!(code(&output), Some(exit), "{text}{}", stderr(&output));
        let line = text.lines().find(|l| l.contains("engine mine") && l.contains("there is no `llama-server`"));
        assert!(line.is_some_and(|l| l.starts_with(mark)), "{text}");
        assert!(text.contains("engine mine: ") && text.contains("llama.cpp/releases"), "{text}");
        assert!(text.contains("SIMULATED") && text.contains("disk for models"), "{text}");
        let json = run(&["doctor", "--config", file, "--json"]).stdout;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert!(json.as_array().unwrap().iter().any(|f| f["what"] == "engine mine" && f["remedy"] != ""), "{json:#}");
        assert!(!dir.path().join("state").exists(), "doctor leaves nothing behind");
    }
    // Without a driver there is nothing to run on, whatever else there is: this library is none.
    let (dir, file) = site(&format!("{NODE}[gpu]\nbackend = \"nvml\"\n"));
    fs::write(dir.path().join("libnvidia-ml.so.1"), "").unwrap();
    let mut doctor = program();
    doctor.args(["doctor", "--config", file.to_str().unwrap()]).env("LD_LIBRARY_PATH", dir.path());
    let output = doctor.output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(code(&output), Some(69), "{text}");
    assert!(text.lines().any(|l| l.starts_with("NO") && l.contains("GPU driver")), "{text}");
}

#[test]
fn check_tells_of_every_model_that_is_missing() {
    let pool = |id| format!("[[pool]]\nid = \"{id}\"\nmodel = \"/no/such.gguf\"\nengine = \"stub\"\n");
    let (_dir, file) = site(&simulated(&(pool("a") + &pool("b"))));
    let output = run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code(&output), Some(78));
    let text = stderr(&output);
    assert!(text.contains("pool[0].model: ") && text.contains("pool[1].model: "), "{text}");
}

#[test]
fn check_tells_of_what_could_never_start() {
    for (wrong, key, word) in [
        ("vram = \"25 GiB\"", "pool[0].vram", "no GPU of this node is as large"),
        ("args = [\"--bogus\"]", "pool[0].engine", "`--bogus`"),
        ("slots = 40000", "pool[0].slots", "1 to 32767"),
    ] {
        let pool = format!("[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\n{wrong}\n");
        let (_dir, file) = site(&simulated(&pool));
        let output = run(&["check", "--config", file.to_str().unwrap()]);
        let text = stderr(&output);
        assert_eq!(code(&output), Some(78), "{wrong}: {text}");
        assert!(text.contains(key) && text.contains(word), "{wrong}: {text}");
    }
}

#[test]
fn with_a_driver_library_that_is_none_it_is_69() {
    let (dir, file) = site(NODE);
    // Found before any that this machine has.
    std::fs::write(dir.path().join("libnvidia-ml.so.1"), "no library").unwrap();
    let serve = program().env("LD_LIBRARY_PATH", dir.path()).args(["serve", "--config"]).arg(&file).output();
    let output = serve.unwrap();
    assert_eq!(code(&output), Some(69), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(text.contains("libnvidia-ml.so.1 cannot be loaded"), "{text}");
    assert!(text.contains("\nhint: the file is damaged"), "{text}");
}

#[test]
fn without_the_driver_library_it_is_69() {
    let (_dir, file) = site(NODE);
    let library = std::env::split_paths("/lib:/usr/lib:/lib64:/usr/lib64:/lib/x86_64-linux-gnu:/lib/aarch64-linux-gnu")
        .map(|dir| dir.join("libnvidia-ml.so.1"));
    if library.into_iter().any(|path| path.exists()) {
        // The loader's own folders come last and cannot be hidden from it: here it is found.
        return;
    }
    let serve = program().env_remove("LD_LIBRARY_PATH").args(["serve", "--config"]).arg(&file).output();
    let output = serve.unwrap();
    assert_eq!(code(&output), Some(69), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(text.contains("libnvidia-ml.so.1 was not found"), "{text}");
    assert!(text.contains("\nhint: install the NVIDIA driver"), "{text}");
}

/// A daemon that is killed when the test ends early.
struct Daemon {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Daemon {
    fn start(file: &Path) -> Self {
        let mut child =
            program().args(["serve", "--config", file.to_str().unwrap()]).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// The next line of its log that has `part`.
    fn line(&mut self, part: &str) -> String {
        let mut line = String::new();
        while self.log.read_line(&mut line).unwrap() > 0 {
            if line.contains(part) {
                return line;
            }
            line.clear();
        }
        panic!("the daemon ended without saying {part:?}");
    }

    fn stop(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        for _ in 0..2 {
            // Twice, because a repeated signal changes nothing.
            let _ = Command::new("kill").args(["-TERM", &pid]).status();
        }
        self.child.wait().unwrap().code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_second_daemon_on_one_state_directory_is_75() {
    let (_dir, file) = site(&simulated(""));
    let mut first = Daemon::start(&file);
    first.line(" started ");
    let output = serve(&file);
    assert_eq!(code(&output), Some(75), "{}", stderr(&output));
    assert!(stderr(&output).contains("\nhint: stop the other daemon"), "{}", stderr(&output));
    assert_eq!(first.stop(), Some(0));
    // The lock went with it.
    let mut third = Daemon::start(&file);
    third.line(" started ");
    assert_eq!(third.stop(), Some(0));
}

#[test]
fn an_address_that_is_taken_is_78() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (_dir, file) = site(&simulated(""));
    let addr = taken.local_addr().unwrap().to_string();
    let output = run(&["serve", "--config", file.to_str().unwrap(), "--listen", &addr]);
    assert_eq!(code(&output), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("hint: choose another address with --listen"), "{}", stderr(&output));
}

#[test]
fn a_live_view_without_a_terminal_is_64() {
    let top = run(&["top"]);
    assert_eq!(code(&top), Some(64));
    assert!(stderr(&top).contains("needs a terminal") && stderr(&top).contains("hint: "), "{}", stderr(&top));
}

#[test]
fn commands_say_when_nobody_answers() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    for args in [&["status"] as &[&str], &["devices"], &["preload", "a"], &["breaker", "reset", "a"]] {
        let output = program().args(args).args(["--server", &url]).output().unwrap();
        assert_eq!(code(&output), Some(1), "{args:?}");
        assert!(stderr(&output).contains("is `pool-managerd serve` running"), "{}", stderr(&output));
    }
}

#[test]
fn commands_talk_to_a_daemon() {
    let pool = "[[pool]]\nid = \"a\"\nmodel = \"stub:a\"\nengine = \"stub\"\nvram = \"1 GiB\"\n";
    let (_dir, file) = site(&simulated(pool));
    let mut daemon = Daemon::start(&file);
    let line = daemon.line("the API listens");
    let addr = line.split("addr=").nth(1).unwrap().split_whitespace().next().unwrap();
    let url = format!("http://{addr}");
    daemon.line(" started ");
    let ask = |args: &[&str]| program().args(args).args(["--server", &url]).output().unwrap();
    let text = |args: &[&str]| {
        let output = ask(args);
        assert_eq!(code(&output), Some(0), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text(&["devices"]).contains("SIMULATED"));
    assert!(text(&["status"]).contains("idle"));
    text(&["preload", "a"]);
    assert!(text(&["status", "a"]).contains("ready"));
    let json: serde_json::Value = serde_json::from_str(&text(&["status", "a", "--json"])).unwrap();
    assert_eq!((json["ready"].as_bool(), json["state"].as_str()), (Some(true), Some("ready")));
    text(&["drain", "a", "--deadline", "2s", "--on-deadline", "force"]);
    assert!(text(&["status"]).contains("(held)"));
    text(&["breaker", "reset", "a"]);
    let missing = ask(&["stop", "b"]);
    assert_eq!(code(&missing), Some(1));
    assert!(stderr(&missing).contains("there is no pool `b`") && stderr(&missing).contains("\nhint: "));
    assert_eq!(daemon.stop(), Some(0));
}
