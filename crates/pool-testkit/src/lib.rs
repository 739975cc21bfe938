//! Fakes that can be told to fail, hang or lie.
#![forbid(unsafe_code)]
