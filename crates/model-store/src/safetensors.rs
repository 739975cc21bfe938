//! Folders with `config.json` and safetensors files.

use std::path::Path;

use pool_domain::ModelProfile;

use crate::ProfileError;

/// A folder as published on the Hugging Face hub.
pub(crate) fn folder(_folder: &Path) -> Result<ModelProfile, ProfileError> {
    Err(ProfileError::UnknownFormat)
}
