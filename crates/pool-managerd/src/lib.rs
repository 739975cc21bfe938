//! The daemon: config, command line, and the one place where every part is put together. It decides nothing.
#![forbid(unsafe_code)]

mod access;
pub mod build_info;
pub mod check_command;
pub mod cli;
pub mod commands;
pub mod compose;
pub mod config;
pub mod demo;
pub mod doctor_command;
pub mod exit;
pub mod fault;
pub mod follow_commands;
mod late;
mod limits;
pub mod logging;
mod logs;
mod notify;
pub mod plan_command;
mod progress;
mod reread;
mod restore;
pub mod serve;
mod socket;
pub mod tables;
mod tell;
pub mod top;

// Where the project's first users looked for these.
pub use pool_domain::health;
pub use pool_services::registry;
