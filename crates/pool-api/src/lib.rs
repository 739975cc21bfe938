//! pool-api
