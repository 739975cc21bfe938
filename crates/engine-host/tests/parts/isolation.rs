//! What engines are kept from, and what only they are told.

use std::fs::Permissions;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

use engine_host::Unkept;
use pool_domain::isolation::Isolation;
use pool_services::ports::EngineSecret;

use super::*;

/// To become somebody else takes root.
#[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: only root may become another user");
    }
    root
}

fn as_nobody(spec: PoolSpec) -> PoolSpec {
    PoolSpec { isolation: Isolation { run_as: Some("65534:65534".parse().unwrap()), ..Isolation::default() }, ..spec }
}

/// The status that an engine answers with.
fn status(addr: SocketAddr, path: &str, key: &str) -> u16 {
    let mut stream = TcpStream::connect(addr).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: stub\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_secret_reaches_the_engine_and_nothing_else() {
    let canary = "canary-7c01d5";
    let hex: String = canary.bytes().map(|byte| format!("{byte:02x}")).collect();
    let bench = Bench::new(true);
    let mut engine = bench.prepare(spec("stub", &["--log-bytes", &hex, "--crash-on-request", "1"])).await;
    // As the daemon would: `--api-key-file` is not for a pool to give.
    engine.args.extend(["--api-key-file".into(), "api-key".into()]);
    engine.confinement.secrets = vec![EngineSecret { file: "api-key".into(), value: canary.into() }];
    assert!(!format!("{engine:?}").contains(canary), "not even where it is shown for debugging");
    let running = bench.launch(&engine).await.unwrap();
    let addr = engine.endpoint.addr;
    in_time(async {
        while bench.probe.up(&engine.endpoint).await != Up::Serving {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    let answers = tokio::task::spawn_blocking(move || [status(addr, "/props", canary), status(addr, "/props", "x")]);
    assert_eq!(answers.await.unwrap(), [200, 401]);
    for place in ["cmdline", "environ"] {
        let text = std::fs::read(format!("/proc/{}/{place}", running.pid().unwrap())).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(canary), "{place}");
    }
    running.terminate();
    let failure = in_time(running.exited()).await;
    running.kill();
    in_time(running.gone()).await;
    let mut files = vec![bench.dir.path().to_path_buf()];
    let (mut texts, mut redacted) = (0, false);
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        assert!(!text.contains(canary), "it is left in {}", path.display());
        redacted |= text.contains("[redacted]");
        texts += 1;
    }
    assert!(redacted && texts > 2, "the log is among the {texts} files");
    assert!(!failure.detail.contains(canary), "{failure}");
}

#[tokio::test]
async fn the_last_words_of_an_engine_are_told_without_secrets_and_escapes() {
    let bench = Bench::new(true);
    let mut engine = bench.prepare(spec("stub", &[])).await;
    engine.confinement.secrets = vec![EngineSecret { file: "key".into(), value: "canary-11".into() }];
    engine.entry = Some("/bin/sh".into());
    engine.args = vec!["-c".into(), "printf 'died with canary-11 \\033[2J\\233 \\377\\n'; exit 3".into()];
    let running = bench.launch(&engine).await.unwrap();
    let failure = in_time(running.exited()).await;
    in_time(running.gone()).await;
    assert_eq!(failure.class, FailureClass::Crash(Exit::Code(3)));
    let detail = "the engine ended with exit status 3; last in its log: died with [redacted] \\u{1b}[2J\\x9b \\xff";
    assert_eq!(failure.detail, detail);
}

#[tokio::test]
async fn a_limit_that_cannot_be_kept_is_no_limit_to_start_with() {
    let bench = Bench::new(false);
    let mut engine = bench.prepare(spec("stub", &[])).await;
    engine.confinement.memory_max = Some(64 << 20);
    let failure = bench.launch(&engine).await.unwrap_err();
    assert_eq!(failure.class, FailureClass::Config);
    assert!(failure.detail.contains("memory_max of 64.0 MiB cannot be kept"), "{failure}");
    assert!(!bench.dir.path().join("run/chat-r0/1").exists(), "nothing is left");
}

fn provisioner(model_dir: &Path) -> Provisioner {
    let llama = Mode::Binary { path: model_dir.join("engine") };
    let decl = EngineDecl { name: "mine".parse().unwrap(), kind: Kind::LlamaCpp, mode: llama };
    Bench::provisioner(vec![decl]).proving_by(ShimCommand { program: testbin(), args: vec!["engine-shim".into()] })
}

#[tokio::test]
async fn what_the_user_of_an_engine_cannot_reach_is_found_before_it_is_started() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mode = |name: &str, mode: u32| {
        std::fs::set_permissions(dir.path().join(name), Permissions::from_mode(mode)).unwrap();
    };
    std::fs::create_dir(dir.path().join("closed")).unwrap();
    std::fs::write(dir.path().join("closed/m.gguf"), "GGUF").unwrap();
    std::fs::write(dir.path().join("engine"), "#!/bin/sh\necho version: 1\n").unwrap();
    mode("", 0o755);
    mode("closed", 0o700);
    mode("engine", 0o755);
    let model = dir.path().join("closed/m.gguf");
    let pool = PoolSpec { model: model.to_str().unwrap().parse().unwrap(), ..as_nobody(spec("mine", &[])) };
    let provisioner = provisioner(dir.path());

    let Unkept { key, message, hint, .. } = provisioner.prove(&pool).await.unwrap_err();
    let closed = dir.path().join("closed");
    let wanted = format!("user `nobody` may not search the directory {}, in which the model lies", closed.display());
    assert_eq!((key, message.as_str()), ("run_as", wanted.as_str()));
    assert!(hint.contains("setfacl -m u:nobody:x"), "{hint}");
    let failure = provisioner.preflight(&pool).await.unwrap_err();
    assert_eq!(failure.class, FailureClass::Config);
    let public = "user `nobody` may not search the directory closed, in which the model lies";
    assert_eq!(failure.detail, public, "without a path");

    mode("closed", 0o711);
    mode("closed/m.gguf", 0o600);
    assert!(provisioner.prove(&pool).await.unwrap_err().message.contains("may not read the model"));
    mode("closed/m.gguf", 0o644);
    mode("engine", 0o750);
    assert!(provisioner.prove(&pool).await.unwrap_err().message.contains("may not run the engine"));
    mode("engine", 0o755);
    provisioner.prove(&pool).await.unwrap();
    provisioner.preflight(&pool).await.unwrap();

    // Claims on simulated memory are made in the daemon's directory.
    let claims = as_nobody(spec("stub", &["--vram", "1 GiB"]));
    assert!(provisioner.prove(&claims).await.unwrap_err().message.contains("claim"));
    // Without a shim nobody can say.
    assert!(Bench::provisioner(Vec::new()).prove(&as_nobody(spec("stub", &[]))).await.is_err());
}

#[tokio::test]
async fn another_user_gets_a_home_it_can_work_in() {
    if !is_root() {
        return;
    }
    let request = PrepareRequest {
        spec: as_nobody(spec("stub", &[])),
        model: ResolvedModel { id: "tiny".into(), local_path: None, bytes: 0 },
        devices: ResolvedMask::default(),
        listen: free_port(),
        tensor_split: None,
        context: None,
    };
    let shim = ShimCommand { program: testbin(), args: vec!["engine-shim".into()] };
    let engine = Bench::provisioner(Vec::new()).proving_by(shim).prepare(&request).await.unwrap();
    let user = engine.confinement.user.as_ref().unwrap();
    assert_eq!((user.uid, user.gid, user.groups.as_slice()), (65534, 65534, [].as_slice()));
    let get = |key: &str| engine.env.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
    // It has none, so it is where it works.
    assert_eq!((get("HOME"), get("USER")), (Some("/proc/self/cwd"), Some("nobody")));
}
