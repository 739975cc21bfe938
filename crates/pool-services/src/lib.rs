//! pool-services
