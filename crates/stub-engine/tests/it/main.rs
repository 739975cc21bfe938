//! The real binary, from outside.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod api;
mod common;
mod faults;
