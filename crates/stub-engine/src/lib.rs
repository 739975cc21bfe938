//! stub-engine
