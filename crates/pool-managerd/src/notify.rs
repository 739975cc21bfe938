//! Tells a service manager how the daemon does (sd_notify(3)). Without one this does nothing.

use std::time::Duration;

use pool_services::PoolManager;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

/// The daemon serves.
pub(crate) fn ready(pools: usize, devices: usize) {
    tell(&[NotifyState::Ready, NotifyState::Status(&format!("{pools} pools on {devices} devices"))]);
}

/// The daemon ends, and needs this long for it.
pub(crate) fn stopping(deadline: Duration) {
    let micros = u32::try_from(deadline.as_micros()).unwrap_or(u32::MAX);
    tell(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros), NotifyState::Status("stopping")]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Keeps the service manager's watchdog quiet for as long as the loops answer that everything depends on. It ends with
/// `closing`.
pub(crate) async fn watch(manager: PoolManager, closing: CancellationToken) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    // Half of it, as sd_watchdog_enabled(3) advises.
    let mut pings = tokio::time::interval(period / 2);
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled() => return,
            _ = pings.tick() => {}
        }
        // Who does not answer is waited for: the service manager ends the wait.
        tokio::select! {
            biased;
            () = closing.cancelled() => return,
            alive = manager.answers() => if !alive { return },
        }
        tell(&[NotifyState::Watchdog]);
    }
}
