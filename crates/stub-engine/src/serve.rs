//! The life of the engine, from start to death.

use std::future::{IntoFuture, pending};
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::Args;
use crate::death::Death;
use crate::engine::Engine;
use crate::{faults, handlers, log};

/// Serves until something ends the engine.
pub(crate) fn serve(args: Args) -> ExitCode {
    match try_serve(args) {
        Ok(death) => death.die(),
        Err(error) => {
            log::error(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn try_serve(args: Args) -> io::Result<Death> {
    faults::say_bytes(&args)?;
    if faults::start_fails(&args)? {
        return Ok(faults::crash(&args));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let death = runtime.block_on(live(args));
    // Streams in flight are cut: whoever stops an engine drains it first.
    runtime.shutdown_background();
    death
}

async fn live(args: Args) -> io::Result<Death> {
    // Before the line that says it listens: whoever has read it may send a signal.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _memory = args.host_memory.map(|size| faults::take_memory(size.as_u64()));
    let listener = TcpListener::bind((args.host, args.port)).await?;
    let _claim = faults::claim_vram(&args)?;
    let _family = faults::spawn_family(&args)?;
    let _shared_memory = faults::leave_shared_memory(&args)?;
    let api_key = faults::api_key(&args)?;
    log::info(format_args!("listening on http://{}", listener.local_addr()?));

    let load = Duration::from_millis(args.load_ms);
    let crash_after = args.crash_after_ms.map(|ms| load + Duration::from_millis(ms));
    let (engine, mut deaths) = Engine::new(args);
    let args = engine.args.clone();
    tokio::select! {
        biased;
        () = asked_to_stop(&mut terminate, args.ignore_sigterm) => Ok(Death::Exit(0)),
        _ = interrupt.recv() => Ok(Death::Exit(0)),
        Some(death) = deaths.recv() => Ok(death),
        // Before the crash, so that it is never seen to crash unready.
        () = announce(load, args.log_flood) => Ok(Death::Exit(0)),
        () = after(crash_after) => Ok(faults::crash(&args)),
        result = axum::serve(listener, handlers::router(Arc::clone(&engine), api_key)).into_future() => {
            result.map(|()| Death::Exit(1))
        }
    }
}

/// Who is deaf says how often that was of use.
async fn asked_to_stop(terminate: &mut Signal, deaf: bool) {
    while terminate.recv().await.is_some() && deaf {
        log::info(format_args!("SIGTERM is ignored"));
    }
}

/// Says when the model is loaded; never ends.
async fn announce(load: Duration, flood: bool) {
    tokio::time::sleep(load).await;
    log::info(format_args!("model loaded"));
    if flood {
        // Last, since from now on a line of ours might wait for whoever reads the flood.
        faults::flood_log();
    }
    pending::<()>().await;
}

async fn after(delay: Option<Duration>) {
    match delay {
        Some(delay) => tokio::time::sleep(delay).await,
        None => pending().await,
    }
}
