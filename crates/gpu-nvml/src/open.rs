//! Opens the library.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;

use crate::Options;
use crate::error::NvmlError;

/// Loads the library and counts the devices.
pub(crate) fn open(options: &Options) -> Result<Nvml, NvmlError> {
    let mut builder = Nvml::builder();
    if let Some(path) = &options.library {
        builder.lib_path(OsStr::new(path));
    }
    let nvml = builder.init()?;
    if nvml.device_count()? == 0 {
        return Err(NvmlError::NoDevice);
    }
    Ok(nvml)
}
