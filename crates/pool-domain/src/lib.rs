//! pool-domain
