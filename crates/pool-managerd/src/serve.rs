//! Runs the daemon from the first log line to an orderly end.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pool_api::gateway::Gateway;
use pool_api::metrics::Metrics;
use pool_api::server::{self, Access, AppState, Door, Flags, History, NodeInfo, SealKey, router};
use pool_services::PoolManager;
use pool_services::ports::StateLedger;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Node, OnExit, Profile};
use crate::exit::{BUG, CONFIG, Exit};
use crate::late::LateControl;
use crate::logs::LogFiles;
use crate::reread::{LateConfig, Rereader};
use crate::{access, build_info, compose, limits, logging, notify, socket, tell};

/// Time for requests that still run, and for the last log lines, once the engines are gone.
const GOODBYE: Duration = Duration::from_secs(1);

/// Most connections at once, for each way in.
const CONNECTIONS: usize = 16_384;

/// The same for probes.
const PROBES: usize = 64;

/// A daemon that has started.
#[derive(Debug, Clone)]
pub struct Started {
    /// Its verbs.
    pub manager: PoolManager,
    /// Where its API listens.
    pub addr: SocketAddr,
}

/// Runs until a signal ends it. `on_start` is told once, when the pools are there.
///
/// # Errors
/// When it cannot start, or something of an engine may be left.
pub async fn serve(config: Config, on_start: impl FnOnce(Started)) -> Result<(), Exit> {
    let mut signals = Signals::listen()?;
    logging::start(config.node.log)?;
    let state = compose::open_state(&config)?;
    let keys = access::open(&config)?;
    let (listener, addr) = bind(config.node.listen).await?;
    let closing = CancellationToken::new();
    let seal = state.seal_key().map_err(|e| Exit::new(BUG, format!("no random bytes: {e}")))?;
    let app = app(&config, keys.access, state.runtime_dir(), seal, closing.clone());
    let mut doors = vec![Door::Tcp(listener, keys.tls)];
    doors.extend(socket::bind(&config)?);
    warn_of_exposure(&config);
    if let Some(wish) = config.node.probe_listen {
        let (listener, addr) = bind(wish).await?;
        tracing::info!(%addr, "probes are answered");
        let probes = server::probes(Arc::clone(&app.state));
        tokio::spawn(server::serve(Door::Tcp(listener, None), probes, PROBES, closing.clone()));
    }
    let api = tokio::spawn(serve_api(doors, Arc::clone(&app.state), closing.clone()));
    let renew = Arc::new(Notify::new());
    tokio::spawn(keys.keeper.run(Arc::clone(&renew)));
    tracing::info!(%addr, version = build_info::VERSION, profile = config.node.profile.code(), "the API listens");

    let mut gpus = compose::begin_gpus(&config)?;
    // Engines of an earlier daemon do not wait for devices that may be long in coming, and are never left alone.
    let left = state.recorded().await.len();
    let wait = if left == 0 { compose::gpu_wait(&config) } else { Some(compose::GPUS_BESIDE_ENGINES) };
    tokio::select! {
        biased;
        found = gpus.wait(wait) => match found {
            Err(exit) if left == 0 => return Err(exit),
            Err(exit) => {
                tracing::warn!(why = exit.message, engines = left, "engines of an earlier daemon are looked after all the same");
            }
            Ok(()) => {}
        },
        name = signals.stop() => {
            tracing::info!(signal = name, "stopping before the GPUs were found");
            return Ok(());
        }
    }
    let gpus = gpus.probe;
    let inventory = gpus.inventory().borrow().clone();
    compose::check_masks_patiently(&config, &inventory.devices)?;
    compose::check_isolation(&config)?;
    let (manager, events) = compose::start(&config, state, gpus).await?;
    let told =
        tokio::spawn(tell::run(events, manager.specs(), Arc::clone(&app.state.metrics), app.history, config.node.log));
    app.late.set(manager.clone());
    app.state.flags.set_started();
    app.state.flags.set_accepting(true);
    if inventory.simulated {
        tracing::warn!("the GPUs are SIMULATED: nothing computes on them");
    }
    tracing::info!(devices = inventory.devices.len(), pools = config.pools.len(), "started");
    let rereader = Rereader::new(config.clone(), manager.clone(), &app.config, Arc::clone(&signals.hangups), renew);
    let rereader = tokio::spawn(rereader.run());
    notify::ready(config.pools.len(), inventory.devices.len());
    let watchdog = CancellationToken::new();
    tokio::spawn(notify::watch(manager.clone(), watchdog.clone()));
    on_start(Started { manager: manager.clone(), addr });

    let (name, broken) = tokio::select! {
        name = signals.stop() => (name, false),
        () = manager.broken() => ("a bug", true),
    };
    let deadline = config.node.shutdown_deadline;
    tracing::info!(signal = name, deadline_ms = deadline.as_millis() as u64, "stopping");
    app.state.flags.set_accepting(false);
    rereader.abort();
    watchdog.cancel();
    notify::stopping(deadline + GOODBYE);
    let in_time = tokio::select! {
        in_time = end(&manager, &config.node) => in_time,
        // A signal that is repeated changes nothing.
        () = signals.ignore() => false,
    };
    closing.cancel();
    finish(api).await;
    // The last events are told, too: without senders their channel ends.
    drop((manager, app.state, app.late, app.config));
    finish(told).await;
    if broken {
        Err(Exit::new(BUG, "the daemon met a bug and stopped what it could").hinting("the log has the details"))
    } else if in_time {
        tracing::info!("stopped");
        Ok(())
    } else {
        Err(Exit::new(BUG, format!("not every engine ended within {}", humantime::format_duration(deadline)))
            .hinting("look for processes of engines that are left, and raise [node] shutdown_deadline"))
    }
}

async fn end(manager: &PoolManager, node: &Node) -> bool {
    match node.on_exit {
        OnExit::Keep => manager.leave(node.shutdown_deadline).await,
        OnExit::Stop | OnExit::Bound => manager.shutdown_drained(node.shutdown_drain, node.shutdown_deadline).await,
    }
}

async fn bind(wish: SocketAddr) -> Result<(TcpListener, SocketAddr), Exit> {
    let failed = |e: std::io::Error| {
        Exit::new(CONFIG, format!("cannot listen on {wish}: {e}"))
            .hinting("choose another address with --listen, for example 127.0.0.1:0 for any free port")
    };
    let listener = TcpListener::bind(wish).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    Ok((listener, addr))
}

struct App {
    state: Arc<AppState>,
    late: Arc<LateControl>,
    config: Arc<LateConfig>,
    history: History,
}

fn app(config: &Config, access: Access, runtime_dir: PathBuf, seal: [u8; 32], closing: CancellationToken) -> App {
    let (history, feed) = History::begin(format!("{:08x}", RandomState::new().hash_one(std::process::id()) >> 32));

    let (late, reread) = (Arc::new(LateControl::default()), Arc::new(LateConfig::default()));
    let state = Arc::new(AppState {
        control: Arc::clone(&late) as Arc<_>,
        info: NodeInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            profile: config.node.profile.code().to_owned(),
            hosts: config.node.hosts.clone(),
            origins: config.node.origins.clone(),
            defaults: config.defaults(),
            engines: config.engines.iter().map(|(name, engine)| engine.view(name)).collect(),
        },
        config: Some(Arc::clone(&reread) as _),
        metrics: Arc::new(Metrics::default()),
        flags: Arc::new(Flags::default()),
        gateway: Gateway::new(Arc::clone(&late) as Arc<_>, config.node.gateway_wait),
        access,
        seal: Some(SealKey::new(seal)),
        feed,
        logs: Arc::new(LogFiles { runtime_dir }),
        closing,
    });
    App { state, late, config: reread, history }
}

/// Said at every start: it must not be forgotten.
fn warn_of_exposure(config: &Config) {
    let beyond = !config.node.listen.ip().is_loopback();
    let listen = config.node.listen;
    if config.node.insecure && config.auth.is_none() && (beyond || config.node.profile == Profile::Cloud) {
        tracing::warn!(%listen, "INSECURE: everyone who reaches the API can do everything, because [node] insecure is true");
    }
    if beyond && config.tls.is_none() {
        tracing::warn!(%listen, "INSECURE: requests, answers and tokens cross the network for everybody to read");
    }
}

async fn serve_api(doors: Vec<Door>, state: Arc<AppState>, closing: CancellationToken) {
    let router = router(state);
    let most = limits::connections(CONNECTIONS);
    let mut open = JoinSet::new();
    for door in doors {
        open.spawn(server::serve(door, router.clone(), most, closing.clone()));
    }
    open.join_all().await;
}

async fn finish(mut task: JoinHandle<()>) {
    if tokio::time::timeout(GOODBYE, &mut task).await.is_err() {
        task.abort();
    }
}

/// The signals that end the daemon.
#[derive(Debug)]
struct Signals {
    term: Signal,
    int: Signal,
    hangup: Signal,
    /// Rung by each that asks for the config to be read again.
    hangups: Arc<Notify>,
    /// Whether it was started from a terminal. When SIGHUP tells that the terminal is gone, it is too late to ask.
    terminal: bool,
}

impl Signals {
    fn listen() -> Result<Self, Exit> {
        let on = |kind| signal(kind).map_err(|e| Exit::new(BUG, format!("cannot wait for signals: {e}")));
        Ok(Self {
            term: on(SignalKind::terminate())?,
            int: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
            hangups: Arc::new(Notify::new()),
            terminal: File::open("/dev/tty").is_ok(),
        })
    }

    /// Waits for one that asks for an end, and names it.
    async fn stop(&mut self) -> &'static str {
        loop {
            tokio::select! {
                biased;
                _ = self.term.recv() => return "SIGTERM",
                _ = self.int.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    // Without a terminal it is a wish to read the config again.
                    if self.terminal {
                        return "SIGHUP";
                    }
                    self.hangups.notify_one();
                }
            }
        }
    }

    async fn ignore(&mut self) {
        loop {
            let name = self.stop().await;
            tracing::info!(signal = name, "already stopping");
        }
    }
}
