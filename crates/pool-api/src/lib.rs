//! The edge that speaks HTTP and JSON: wire types, router, metrics, and a client that is a `PoolControl` like any other.
//!
//! Wire types exist only here. Inner types carry no serde; they are converted by hand, and errors name the field.
//!
//! - [`spec`]: a pool as it is written in TOML and JSON
//! - [`dto`]: what the API answers
//! - [`server`] (feature `server`): the router, its guard and the OpenAPI document
//! - [`metrics`] (feature `server`): names, counters and the scrape
//! - [`client`] (feature `client`): `PoolControl` over HTTP
#![forbid(unsafe_code)]

#[cfg(feature = "client")]
pub mod client;
pub mod dto;
#[cfg(feature = "server")]
pub mod gateway;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod server;
pub mod spec;
