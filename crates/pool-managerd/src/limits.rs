//! How many files the daemon may have open, and so how many connections.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Kept for everything that is no connection.
const OTHERS: u64 = 128;

/// Raises the limit of open files to what is allowed, and says how many connections there may be, at most `most`. One that
/// goes on to an engine takes two files.
pub(crate) fn connections(most: usize) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = most as u64 * 2 + OTHERS;
    let raised = maximum.map_or(wanted, |m| m.min(wanted)).max(current.unwrap_or(u64::MAX));
    let now = match setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }) {
        Ok(()) => raised,
        Err(error) => {
            tracing::debug!(%error, "the limit of open files stays as it is");
            current.unwrap_or(u64::MAX)
        }
    };
    let connections = now.saturating_sub(OTHERS) / 2;
    usize::try_from(connections).unwrap_or(most).clamp(16, most)
}
