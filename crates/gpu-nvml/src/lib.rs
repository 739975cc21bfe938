//! gpu-nvml
