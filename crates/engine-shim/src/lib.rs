//! engine-shim
