//! gpu-sim
