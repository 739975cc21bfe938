//! The log: one line an event on stderr, for people or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;
use crate::exit::{Exit, USAGE};

/// Chooses what is logged, like `RUST_LOG`: `debug`, or `info,pool_services=trace`.
pub const LOG_ENV: &str = "POOL_MANAGERD_LOG";

/// Starts the log.
///
/// # Errors
/// When the environment asks for a level that does not exist.
pub fn start(format: LogFormat) -> Result<(), Exit> {
    let wish = std::env::var(LOG_ENV).unwrap_or_default();
    let filter: Targets = if wish.trim().is_empty() { "info" } else { wish.trim() }.parse().map_err(|e| {
        Exit::new(USAGE, format!("{LOG_ENV}: {e}")).hinting("write a level (error, warn, info, debug, trace)")
    })?;
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        LogFormat::Pretty => layer.with_target(false).with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    // A log that was started before (by an embedding test) stays.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
    Ok(())
}
