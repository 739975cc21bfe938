//! Why NVML cannot be used, and what to do about it.

use nvml_wrapper::error::NvmlError as Raw;
use thiserror::Error;

/// Why the GPUs of this node cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NvmlError {
    /// `libnvidia-ml.so.1` is not there.
    #[error("the NVIDIA driver library libnvidia-ml.so.1 was not found: {0}")]
    LibraryMissing(String),
    /// It is there and is no library that can be loaded.
    #[error("the NVIDIA driver library libnvidia-ml.so.1 cannot be loaded: {0}")]
    LibraryBroken(String),
    /// The library is there, the kernel module is not.
    #[error("the NVIDIA kernel driver is not loaded")]
    DriverNotLoaded,
    /// The user or the container may not use the GPUs.
    #[error("the NVIDIA driver refused access to the GPUs")]
    NoPermission,
    /// The driver was updated and the old one still runs.
    #[error("the NVIDIA driver library and the loaded kernel driver have different versions")]
    VersionMismatch,
    /// The driver works, but there is nothing to drive.
    #[error("the NVIDIA driver reports no GPU")]
    NoDevice,
    /// The driver counts GPUs, and none of them can be used.
    #[error("the NVIDIA driver counts {count} GPU(s), none of which can be used: {why}")]
    Unusable {
        /// How many.
        count: u32,
        /// What it says of the last of them.
        why: String,
    },
    /// The driver did not answer.
    #[error("the NVIDIA driver did not answer")]
    Silent,
    /// Anything else.
    #[error("the NVIDIA driver library failed: {0}")]
    Other(String),
}

impl NvmlError {
    /// Whether it does not pass by waiting.
    #[must_use]
    pub fn is_hopeless(&self) -> bool {
        matches!(self, Self::LibraryMissing(_) | Self::LibraryBroken(_) | Self::VersionMismatch)
    }

    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::LibraryMissing(_) => {
                "install the NVIDIA driver (Debian: apt install nvidia-driver; Ubuntu: ubuntu-drivers install), in a \
                 container use the NVIDIA container toolkit, or use `[gpu] backend = \"simulated\"`"
            }
            Self::LibraryBroken(_) => {
                "the file is damaged or of another architecture: install the driver's packages again, in a container \
                 look at what is mounted there"
            }
            Self::DriverNotLoaded => {
                "load the kernel driver with `modprobe nvidia`, or reboot after an installation; see `dmesg` if that \
                 fails (Secure Boot refuses unsigned modules)"
            }
            Self::NoPermission => {
                "let the user of the daemon read and write /dev/nvidia* (groups video and render), or in a container \
                 pass the GPUs in"
            }
            Self::VersionMismatch => "the driver was updated under the running kernel: reboot",
            Self::NoDevice => {
                "check that `nvidia-smi -L` lists a GPU and that it is passed into this container or machine, or use \
                 `[gpu] backend = \"simulated\"`"
            }
            Self::Unusable { .. } => {
                "look for `NVRM` in `dmesg`; such a GPU often needs a reset (`nvidia-smi --gpu-reset`) or a reboot of \
                 the node"
            }
            Self::Silent => "look for `NVRM: Xid` in `dmesg`; a GPU in this state often needs a reboot",
            Self::Other(_) => "check that `nvidia-smi` works for the user of the daemon",
        }
    }
}

impl From<Raw> for NvmlError {
    fn from(raw: Raw) -> Self {
        match raw {
            Raw::LibloadingError(e) => {
                let why = e.to_string();
                // The loader has only words for it.
                if why.contains("No such file") { Self::LibraryMissing(why) } else { Self::LibraryBroken(why) }
            }
            Raw::LibraryNotFound => Self::LibraryMissing("NVML could not load it".to_owned()),
            Raw::DriverNotLoaded | Raw::Uninitialized => Self::DriverNotLoaded,
            Raw::NoPermission | Raw::OperatingSystem => Self::NoPermission,
            Raw::LibRmVersionMismatch => Self::VersionMismatch,
            Raw::NotFound => Self::NoDevice,
            Raw::Timeout => Self::Silent,
            other => Self::Other(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_told_apart_and_has_a_hint() {
        for (raw, kind) in [
            (Raw::LibraryNotFound, NvmlError::LibraryMissing("NVML could not load it".into())),
            (Raw::DriverNotLoaded, NvmlError::DriverNotLoaded),
            (Raw::NoPermission, NvmlError::NoPermission),
            (Raw::OperatingSystem, NvmlError::NoPermission),
            (Raw::LibRmVersionMismatch, NvmlError::VersionMismatch),
            (Raw::NotFound, NvmlError::NoDevice),
            (Raw::Timeout, NvmlError::Silent),
            (Raw::Unknown, NvmlError::Other("an internal driver error occurred".into())),
        ] {
            let got = NvmlError::from(raw);
            assert_eq!(got, kind);
            assert!(!got.hint().is_empty());
        }
    }
}
