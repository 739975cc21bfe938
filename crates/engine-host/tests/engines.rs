//! The ports against the real shim and the real stub engine.
#![expect(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::future::Future;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine_host::{EngineDecl, HostOptions, HttpProbe, Kind, Mode, ProcessHost, Provisioner, ShimCommand, StubCommand};
use pool_domain::estimate::KvType;
use pool_domain::failure::Exit;
use pool_domain::lifecycle::{OnDeadline, Policy};
use pool_domain::liveness::{SlotWork, Work};
use pool_domain::{Failure, FailureClass, Generation, ReplicaId, ReplicaKey, ResolvedMask};
use pool_services::ports::{
    Endpoint, EngineHost, EngineProbe, EngineProvisioner, EngineRecord, Listener, Phase, PrepareRequest,
    PreparedEngine, ResolvedModel, RunningEngine, Up, Worked,
};
use pool_services::{Activation, PoolSpec, Workload};
use tempfile::TempDir;
use tokio::sync::Mutex;

#[path = "parts/isolation.rs"]
mod isolation;

const LIMIT: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The shim above an engine's main process.
fn shim_of(engine: &Arc<dyn RunningEngine>) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", engine.pid().unwrap())).unwrap();
    stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().to_owned()
}

fn signal(pid: &str, name: &str) {
    assert!(std::process::Command::new("kill").args([&format!("-{name}"), pid]).status().unwrap().success());
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}

/// The shim and the stub engine; cargo builds examples before it runs tests.
fn testbin() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    profile.join("examples/engine_host_testbin")
}

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn spec(engine: &str, args: &[&str]) -> PoolSpec {
    PoolSpec {
        id: "chat".parse().unwrap(),
        model: "stub:tiny".parse().unwrap(),
        engine: engine.parse().unwrap(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        version: String::new(),
        workload: Workload::Generate,
        devices: Vec::new(),
        replicas: 1,
        activation: Activation::OnDemand,
        idle_ttl: None,
        pin: false,
        context: Some(4096),
        kv_type: Default::default(),
        tensor_split: Default::default(),
        slots: 3,
        vram: None,
        aliases: Vec::new(),
        policy: Policy::default(),
        isolation: Default::default(),
        drain_deadline: Duration::from_secs(1),
        on_deadline: OnDeadline::Force,
        reload: Default::default(),
    }
}

struct Bench {
    dir: TempDir,
    host: ProcessHost,
    probe: HttpProbe,
    /// Every engine launched: a test that fails must leave nothing running.
    launched: Mutex<Vec<Arc<dyn RunningEngine>>>,
}

impl Bench {
    fn new(cgroup: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shim = ShimCommand { program: testbin(), args: vec!["engine-shim".into()] };
        let options = HostOptions {
            runtime_dir: dir.path().join("run"),
            shim,
            log_max_bytes: 1 << 20,
            cgroup,
            lock_dir: dir.path().join("locks"),
            outlive: false,
        };
        Self { dir, host: ProcessHost::new(options), probe: HttpProbe::new(), launched: Mutex::default() }
    }

    fn key() -> ReplicaKey {
        ReplicaKey { pool: "chat".parse().unwrap(), replica: ReplicaId(0) }
    }

    fn provisioner(decls: Vec<EngineDecl>) -> Provisioner {
        Provisioner::new(decls, StubCommand { program: testbin(), args: vec!["stub-engine".into()] }, None)
    }

    async fn prepare(&self, spec: PoolSpec) -> PreparedEngine {
        let model = ResolvedModel { id: "tiny".into(), local_path: None, bytes: 0 };
        let request = PrepareRequest {
            spec,
            model,
            devices: ResolvedMask::default(),
            listen: free_port(),
            tensor_split: None,
            context: None,
        };
        Self::provisioner(Vec::new()).prepare(&request).await.unwrap()
    }

    async fn launch(&self, engine: &PreparedEngine) -> Result<Arc<dyn RunningEngine>, Failure> {
        let mut launched = self.launched.lock().await;
        let generation = Generation(launched.len() as u64 + 1);
        // Each is a replica of its own: some of them live side by side.
        let record = EngineRecord {
            key: ReplicaKey { pool: "chat".parse().unwrap(), replica: ReplicaId(launched.len() as u16) },
            generation,
            nonce: self.host.nonce(),
            fingerprint: String::new(),
            endpoint: engine.endpoint.clone(),
            engine_version: engine.engine_version.clone(),
            devices: ResolvedMask::default(),
            bytes: Vec::new(),
            unlisted: None,
            executable: None,
            phase: Phase::Starting,
        };
        let running = in_time(self.host.launch(&record, engine)).await?;
        launched.push(Arc::clone(&running));
        Ok(running)
    }

    async fn start(&self, args: &[&str]) -> (Endpoint, Arc<dyn RunningEngine>) {
        let engine = self.prepare(spec("stub", args)).await;
        let running = self.launch(&engine).await.unwrap();
        (engine.endpoint, running)
    }

    async fn serving(&self, endpoint: &Endpoint) {
        in_time(async {
            while self.probe.up(endpoint).await != Up::Serving {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        })
        .await;
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.launched.get_mut().iter().for_each(|engine| engine.kill());
    }
}

fn alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[tokio::test]
async fn an_engine_lives_from_launch_to_gone() {
    let bench = Bench::new(true);
    let engine = bench.prepare(spec("stub", &["--load-ms", "50"])).await;
    assert_eq!(engine.engine_version, env!("CARGO_PKG_VERSION"));
    let endpoint = engine.endpoint.clone();
    assert_eq!(bench.probe.up(&endpoint).await, Up::Refused);
    assert!(bench.host.port_free(endpoint.addr));

    let running = bench.launch(&engine).await.unwrap();
    bench.serving(&endpoint).await;
    assert!(!bench.host.port_free(endpoint.addr));
    assert_eq!(running.listener(endpoint.addr), Listener::Own);
    assert_eq!(running.pids(), [running.pid().unwrap()]);
    let before = running.progress();
    let identity = bench.probe.identify(&endpoint).await.unwrap();
    assert_eq!((identity.model.as_str(), identity.slots), ("tiny", 3));
    for workload in [Workload::Generate, Workload::Embed, Workload::Rerank] {
        bench.probe.work(&Endpoint { workload, ..endpoint.clone() }).await.unwrap();
    }
    let Work::Told(idle) = bench.probe.signals(&endpoint).await else { panic!("it does not say") };
    assert_eq!((idle.running, idle.waiting, idle.slots.len()), (0, 0, 0));
    assert_eq!(bench.probe.work(&endpoint).await.unwrap(), Worked::Done);
    let Work::Told(later) = bench.probe.signals(&endpoint).await else { panic!("it does not say") };
    assert!(later.counters != idle.counters, "what was done between two questions shows: {later:?}");
    in_time(async {
        while running.progress() == before {
            bench.probe.work(&endpoint).await.unwrap();
        }
    })
    .await;

    running.terminate();
    assert_eq!(in_time(running.exited()).await.class, FailureClass::Crash(Exit::Code(0)));
    in_time(running.gone()).await;
    assert!(running.pids().is_empty());
    assert_eq!(running.listener(endpoint.addr), Listener::None);
    assert_eq!(bench.probe.up(&endpoint).await, Up::Refused);
    assert!(bench.host.log_path(&Bench::key(), Generation(1)).is_file());
    // After the end, signals reach nobody.
    running.terminate();
    running.kill();
}

async fn nothing_survives_a_kill(cgroup: bool) {
    let bench = Bench::new(cgroup);
    let (endpoint, running) = bench.start(&["--ignore-sigterm", "--double-fork", "--fork-children", "2"]).await;
    bench.serving(&endpoint).await;
    // Main, two children, one that has left its session and its parent.
    in_time(async {
        while running.pids().len() < 4 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    let pids = running.pids();
    running.terminate();
    bench.serving(&endpoint).await;
    running.kill();
    assert_eq!(in_time(running.exited()).await.class, FailureClass::Crash(Exit::Signal(9)));
    in_time(running.gone()).await;
    assert!(!pids.into_iter().any(alive), "all are gone, also those that hid");
}

#[tokio::test]
async fn nothing_survives_a_kill_by_cgroup() {
    nothing_survives_a_kill(true).await;
}

#[tokio::test]
async fn nothing_survives_a_kill_by_parentage() {
    nothing_survives_a_kill(false).await;
}

#[tokio::test]
async fn a_shim_that_dies_takes_the_engine_along() {
    let bench = Bench::new(true);
    let (endpoint, running) = bench.start(&["--double-fork"]).await;
    bench.serving(&endpoint).await;
    let main = running.pid().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{main}/stat")).unwrap();
    let shim: i32 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap();
    let in_cgroup = std::fs::read_to_string(format!("/proc/{main}/cgroup")).unwrap().contains("/pool-managerd-");
    let pids = running.pids();
    rustix::process::kill_process(rustix::process::Pid::from_raw(shim).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    assert_eq!(in_time(running.exited()).await.class, FailureClass::Crash(Exit::Unknown));
    if in_cgroup {
        in_time(running.gone()).await;
        assert!(!pids.into_iter().any(alive_and_running), "the cgroup was emptied");
    } else {
        // Nothing can be proved, so nothing is said; but the test must not leave the others behind.
        for pid in pids.into_iter().filter(|&pid| alive(pid)) {
            let _ended = rustix::process::kill_process(
                rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(),
                rustix::process::Signal::KILL,
            );
        }
    }
}

/// An orphan that ended may wait for a slow init to take note.
fn alive_and_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[tokio::test]
async fn another_model_is_the_wrong_server() {
    let bench = Bench::new(true);
    let (endpoint, _running) = bench.start(&["--serve-model", "other"]).await;
    bench.serving(&endpoint).await;
    let failure = bench.probe.identify(&endpoint).await.unwrap_err();
    assert_eq!(failure.class, FailureClass::WrongServer);
    assert!(failure.detail.contains("`other`"), "{failure}");

    let named = Endpoint { model: "other".into(), ..endpoint };
    bench.probe.identify(&named).await.unwrap();
    let elsewhere = Endpoint { model_path: Some("/models/tiny.gguf".into()), ..named };
    assert_eq!(bench.probe.identify(&elsewhere).await.unwrap_err().class, FailureClass::WrongServer);
}

#[tokio::test]
async fn the_way_it_ended_is_told() {
    let bench = Bench::new(true);
    let (_, by_code) = bench.start(&["--crash-after-ms", "0", "--exit-code", "7"]).await;
    assert_eq!(in_time(by_code.exited()).await.class, FailureClass::Crash(Exit::Code(7)));
    let (_, by_signal) = bench.start(&["--crash-after-ms", "0", "--signal", "SEGV"]).await;
    assert_eq!(in_time(by_signal.exited()).await.class, FailureClass::Crash(Exit::Signal(11)));
    let (_, bad_flag) = bench.start(&["--fork-children", "many"]).await;
    assert_eq!(in_time(bad_flag.exited()).await.class, FailureClass::Config);
    for engine in [by_code, by_signal, bad_flag] {
        in_time(engine.gone()).await;
    }
}

#[tokio::test]
async fn a_disk_that_takes_no_start_record_is_the_nodes_fault_and_leaves_nothing() {
    let bench = Bench::new(true);
    let engine = bench.prepare(spec("stub", &[])).await;
    // Where the second start record is written before it gets its name.
    let record = bench.dir.path().join("locks/replica-chat-r0.json.tmp");
    std::os::unix::fs::symlink("/dev/full", &record).unwrap();
    let failure = bench.launch(&engine).await.unwrap_err();
    assert_eq!(failure.class, FailureClass::Node, "{failure}");
    assert!(failure.detail.contains("start_record") && failure.detail.contains("free some space"), "{failure}");
    assert!(!bench.host.log_path(&Bench::key(), Generation(1)).parent().unwrap().exists());
    std::fs::remove_file(&record).unwrap();
    let running = bench.launch(&engine).await.unwrap();
    bench.serving(&engine.endpoint).await;
    running.kill();
    in_time(running.gone()).await;
}

#[tokio::test]
async fn a_stolen_port_is_a_port_conflict() {
    let bench = Bench::new(true);
    let thief = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut engine = bench.prepare(spec("stub", &[])).await;
    let port = engine.endpoint.addr.port().to_string();
    let stolen = thief.local_addr().unwrap();
    for arg in engine.args.iter_mut().filter(|arg| **arg == port) {
        *arg = stolen.port().to_string();
    }
    assert!(!bench.host.port_free(stolen));
    let running = bench.launch(&engine).await.unwrap();
    let failure = in_time(running.exited()).await;
    assert_eq!(failure.class, FailureClass::PortConflict, "{failure}");
    assert_eq!(running.listener(stolen), Listener::Foreign);
    in_time(running.gone()).await;
}

#[tokio::test]
async fn a_hang_and_an_illness_are_told_apart_from_loading() {
    let bench = Bench::new(true);
    let (loading, _engine) = bench.start(&["--load-ms", "3600000"]).await;
    in_time(async {
        while !matches!(bench.probe.up(&loading).await, Up::Loading(Some(_))) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    let (ill, _engine) = bench.start(&["--unhealthy-after-ms", "0"]).await;
    in_time(async {
        while !matches!(bench.probe.up(&ill).await, Up::Overloaded(_)) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
    // It says that it is well and that it has something to do, and gets nowhere.
    let (hung, _engine) = bench.start(&["--hang-after-requests", "0"]).await;
    bench.serving(&hung).await;
    let asked = tokio::spawn({
        let (probe, hung) = (bench.probe, hung.clone());
        async move { probe.work(&hung).await }
    });
    let busy = in_time(async {
        loop {
            match bench.probe.signals(&hung).await {
                Work::Told(signals) if signals.running > 0 => break signals,
                _ => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    })
    .await;
    assert_eq!(busy.slots, [SlotWork { slot: 0, task: 1, prompt: 0, decoded: 0 }]);
    assert_eq!((bench.probe.up(&hung).await, bench.probe.signals(&hung).await), (Up::Serving, Work::Told(busy)));
    asked.abort();
}

#[tokio::test]
async fn an_engine_that_cannot_be_run_leaves_nothing() {
    let bench = Bench::new(true);
    let mut engine = bench.prepare(spec("stub", &[])).await;
    engine.entry = Some(bench.dir.path().join("missing"));
    let failure = bench.launch(&engine).await.unwrap_err();
    assert_eq!(failure.class, FailureClass::Config, "{failure}");
    assert!(!bench.host.log_path(&Bench::key(), Generation(1)).parent().unwrap().exists());
}

fn declared(name: &str, mode: Mode) -> Provisioner {
    Bench::provisioner(vec![EngineDecl { name: name.parse().unwrap(), kind: Kind::LlamaCpp, mode }])
}

#[tokio::test]
async fn preflight_names_what_stands_in_the_way() {
    let refusal = async |provisioner: &Provisioner, spec: &PoolSpec| {
        let failure = provisioner.preflight(spec).await.unwrap_err();
        assert_eq!(failure.class, FailureClass::Config);
        failure.detail
    };
    let missing = declared("llama.cpp", Mode::Binary { path: "/no/such/llama-server".into() });
    assert_eq!(refusal(&missing, &spec("llama.cpp", &[])).await, "engine missing: there is no `llama-server`");
    assert_eq!(refusal(&missing, &spec("vllm", &[])).await, "engine `vllm` is not declared");
    missing.preflight(&spec("stub", &[])).await.unwrap();
    assert!(refusal(&missing, &spec("stub", &["--port", "1"])).await.contains("--port"));
    let pinned = PoolSpec { version: "9.9".into(), ..spec("stub", &[]) };
    let pin = refusal(&missing, &pinned).await;
    assert!(pin.contains("9.9") && pin.contains(env!("CARGO_PKG_VERSION")), "{pin}");
}

#[tokio::test]
async fn llama_cpp_gets_only_flags_it_knows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("llama-server");
    let script = "#!/bin/sh\ncase $1 in\n--version) echo 'version: 4567 (abcdef)' >&2;;\n--help) echo '--metrics --no-ui --flash-attn';;\nesac\n";
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path).unwrap();
    file.write_all(script.as_bytes()).unwrap();
    drop(file);
    let provisioner = declared("llama.cpp", Mode::Binary { path });
    let request = PrepareRequest {
        spec: PoolSpec {
            version: "b4567".into(),
            kv_type: (KvType::Q8_0, KvType::Q8_0),
            ..spec("llama.cpp", &["--flash-attn", "on"])
        },
        model: ResolvedModel { id: "tiny".into(), local_path: Some("/models/tiny.gguf".into()), bytes: 1 },
        devices: ResolvedMask { uuids: vec!["GPU-a".into()] },
        listen: "127.0.0.1:4242".parse().unwrap(),
        tensor_split: Some("3,1".into()),
        context: Some(2048),
    };
    let engine = provisioner.prepare(&request).await.unwrap();
    assert_eq!(engine.engine_version, "4567 (abcdef)");
    let expected = "--model /models/tiny.gguf --alias tiny --host 127.0.0.1 --port 4242 --parallel 3 --ctx-size 2048 \
                    -ngl 999 --tensor-split 3,1 --cache-type-k q8_0 --cache-type-v q8_0 --metrics --no-ui --flash-attn on";
    assert_eq!(engine.args.join(" "), expected);
    assert!(engine.env.contains(&("CUDA_VISIBLE_DEVICES".into(), "GPU-a".into())));
    let unknown = PoolSpec { args: vec!["--flash-atn".into()], ..request.spec };
    let told = provisioner.preflight(&unknown).await.unwrap_err().detail;
    assert_eq!(told, "engine `llama-server` does not know the argument `--flash-atn`");
}

/// `bin/vllm` of an environment is not asked for its version: that takes it many seconds.
#[tokio::test]
async fn vllm_is_told_model_place_and_limits_and_says_how_much_memory_it_takes() {
    let dir = tempfile::tempdir().unwrap();
    let (path, model) = (dir.path().join("bin/vllm"), dir.path().join("m"));
    let package = dir.path().join("lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info");
    for folder in [path.parent().unwrap(), &model, &package] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path).unwrap();
    file.write_all(b"#!/bin/sh\nexit 1\n").unwrap();
    drop(file);
    let decl = EngineDecl { name: "vllm".parse().unwrap(), kind: Kind::Vllm, mode: Mode::Binary { path } };
    let provisioner = Bench::provisioner(vec![decl]);
    let request = |args: &[&str]| PrepareRequest {
        spec: spec("vllm", args),
        model: ResolvedModel { id: "m".into(), local_path: Some(model.clone()), bytes: 1 },
        devices: ResolvedMask { uuids: vec!["GPU-a".into()] },
        listen: "127.0.0.1:4242".parse().unwrap(),
        tensor_split: None,
        context: Some(3072),
    };
    let engine = provisioner.prepare(&request(&["--gpu-memory-utilization", "0.4"])).await.unwrap();
    let expected = format!(
        "serve {} --served-model-name m chat --host 127.0.0.1 --port 4242 --max-num-seqs 3 --max-model-len 1024 \
         --gpu-memory-utilization 0.4",
        model.display()
    );
    assert_eq!((engine.args.join(" "), engine.engine_version.as_str()), (expected, "0.32.0+cpu"));
    let greedy = provisioner.prepare(&request(&[])).await.unwrap_err();
    assert!(greedy.class == FailureClass::Config && greedy.detail.contains("--gpu-memory-utilization"), "{greedy}");
    let owned = provisioner.preflight(&spec("vllm", &["--max-num-seqs", "9"])).await.unwrap_err();
    assert!(owned.detail.contains("--max-num-seqs"), "{owned}");
}

#[tokio::test]
async fn an_external_engine_is_left_not_ended() {
    let bench = Bench::new(true);
    let (served, own) = bench.start(&[]).await;
    bench.serving(&served).await;
    let provisioner = declared("theirs", Mode::External { addr: served.addr });
    let spec = spec("theirs", &[]);
    provisioner.preflight(&spec).await.unwrap();
    assert_eq!(provisioner.external(&spec), Some(served.addr));
    let model = ResolvedModel { id: "tiny".into(), local_path: None, bytes: 0 };
    let request = PrepareRequest {
        spec,
        model,
        devices: ResolvedMask::default(),
        listen: free_port(),
        tensor_split: None,
        context: None,
    };
    let engine = provisioner.prepare(&request).await.unwrap();
    let running = bench.launch(&engine).await.unwrap();
    bench.probe.identify(&engine.endpoint).await.unwrap();
    assert_eq!((running.pid(), running.listener(served.addr)), (None, Listener::Own));
    running.terminate();
    in_time(running.gone()).await;
    bench.probe.work(&served).await.unwrap();
    own.kill();
    in_time(own.gone()).await;
}

/// A shim that cannot act stands for whatever keeps an engine from ending, such as a driver that does not return.
#[tokio::test]
async fn what_could_not_be_ended_is_proved_gone_later_with_and_without_cgroups() {
    for cgroup in [false, true] {
        let bench = Bench::new(cgroup);
        let (_, engine) = bench.start(&["--fork-children", "1"]).await;
        let shim = shim_of(&engine);
        signal(&shim, "STOP");
        engine.kill();
        let gone = engine.gone();
        tokio::pin!(gone);
        for _ in 0..10 {
            tokio::task::yield_now().await;
            assert!(poll_once(gone.as_mut()).await.is_none(), "gone while its shim is held");
        }
        signal(&shim, "CONT");
        in_time(gone).await;
    }
}

/// Looks once whether it is done.
async fn poll_once<F: Future + Unpin>(mut future: F) -> Option<F::Output> {
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut future).poll(cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
