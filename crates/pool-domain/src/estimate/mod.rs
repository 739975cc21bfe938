//! How much memory a model needs on each device.
