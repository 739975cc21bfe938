//! state-dir
