//! What a test may have happen to the daemon at a named point. In a build that is not for tests nothing of this is used.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use fault_points::Point;
use rustix::process::{Signal, getpid, kill_process};

/// Names the file of orders: `POINT ACTION NTH`, where the action is `kill` or `stop` (by SIGKILL, by SIGSTOP) and the
/// order is for the nth time that the daemon comes to the point while the order lies there. It is gone once carried out.
pub const ORDERS_ENV: &str = "POOL_MANAGERD_FAULT_ORDERS";

static ORDERS: OnceLock<PathBuf> = OnceLock::new();
static TIMES: AtomicU32 = AtomicU32::new(0);

/// Looks for orders at every point from now on, if the environment names a place for them.
pub fn arm() {
    if let Some(path) = std::env::var_os(ORDERS_ENV) {
        let _first = ORDERS.set(path.into());
        fault_points::on_reach(reach);
    }
}

fn reach(point: Point) {
    let Some(path) = ORDERS.get() else { return };
    let orders = fs::read_to_string(path).unwrap_or_default();
    let mut words = orders.split_whitespace();
    if words.next() != Some(point.name()) {
        return;
    }
    let signal = match words.next() {
        Some("kill") => Signal::KILL,
        Some("stop") => Signal::STOP,
        _ => return,
    };
    let nth = words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    if TIMES.fetch_add(1, Ordering::SeqCst) + 1 != nth {
        return;
    }
    // Gone before it is carried out: who goes on after a stop must not stop again, and who asks knows that it was met.
    let _left = fs::remove_file(path);
    TIMES.store(0, Ordering::SeqCst);
    let _sent = kill_process(getpid(), signal);
}
