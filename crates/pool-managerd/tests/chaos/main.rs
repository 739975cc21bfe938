//! Faults on the real daemon with real processes. What became of it is judged from outside: by `/proc`, by cgroups and
//! over HTTP, as anybody on the machine could. Each test that stands for a fault is in docs/faults.toml.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a test outside the daemon has no tokio clock; bounds are wall time"
)]

#[path = "../support/mod.rs"]
mod support;

mod checker;
mod daemons;
mod engines;
mod namespaces;
mod node;
mod points;
mod reloads;
