//! Folders with `config.json` and safetensors files, as published on the Hugging Face hub.

mod config;
mod header;
mod kinds;
mod tensors;

use std::collections::BTreeSet;
use std::fs;
use std::io::BufReader;
use std::path::Path;

use pool_domain::{LayerProfile, ModelFormat, ModelProfile};
use sha2::{Digest, Sha256};

use self::config::Config;
use self::tensors::Tensors;
use crate::profile::{digest_text, open, shown, small_file};
use crate::{ProfileError, file_problem};

/// Bytes of `config.json`. Real ones have 1 to 60 KiB; as a tree of values one may take forty times its size.
const MAX_CONFIG: u64 = 256 << 10;
/// Bytes of the index. That of DeepSeek-V3 has 9 MiB; it is not kept.
const MAX_INDEX: u64 = 32 << 20;
/// Files of a model. DeepSeek-V3 comes in 163.
const MAX_FILES: usize = 1024;
/// Entries of the folder that are looked at.
const MAX_ENTRIES: usize = 16_384;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const WHOLE: &str = "model.safetensors";

/// Reads the config and the headers of all files of the model.
pub(crate) fn folder(folder: &Path) -> Result<ModelProfile, ProfileError> {
    let text = match small_file(&folder.join(CONFIG), "a config", MAX_CONFIG) {
        Err(ProfileError::Unreadable(_)) if !folder.join(CONFIG).exists() => return Err(ProfileError::UnknownFormat),
        text => text.map_err(|e| e.in_part(CONFIG.to_owned()))?,
    };
    let config = Config::read(&text).map_err(|e| e.in_part(CONFIG.to_owned()))?;
    let mut digest = Sha256::new();
    digest.update(&text);
    drop(text);
    let mut tensors = Tensors::new(config.layers.len(), config.further_layers);
    for name in files(folder)? {
        open(&folder.join(&name))
            .and_then(|(file, length)| header::read(file, length, &mut digest, &mut tensors))
            .map_err(|e| e.in_part(shown(name.as_bytes())))?;
    }
    Ok(put_together(config, &tensors, digest))
}

/// The same for one file that is at hand, and its config.
pub(crate) fn single(config: &[u8], file: &[u8]) -> Result<ModelProfile, ProfileError> {
    if config.len() as u64 > MAX_CONFIG {
        return Err(ProfileError::TooLarge { what: "a config", value: config.len() as u64, limit: MAX_CONFIG });
    }
    let known = Config::read(config)?;
    let mut digest = Sha256::new();
    digest.update(config);
    let mut tensors = Tensors::new(known.layers.len(), known.further_layers);
    header::read(file, file.len() as u64, &mut digest, &mut tensors)?;
    Ok(put_together(known, &tensors, digest))
}

fn put_together(config: Config, tensors: &Tensors, digest: Sha256) -> ModelProfile {
    let layers = config.layers.into_iter().zip(&tensors.layers);
    ModelProfile {
        format: ModelFormat::Safetensors,
        architecture: config.architecture,
        layers: layers.map(|(layer, bytes)| LayerProfile { bytes: *bytes, ..layer }).collect(),
        input_bytes: tensors.input,
        output_bytes: tensors.output,
        other_bytes: tensors.other,
        tied_embeddings: config.tied.unwrap_or(!tensors.output_matrix),
        embedding_bytes: tensors.embedding,
        embedding_length: config.embedding_length,
        context_length: config.context_length,
        vocabulary: config.vocabulary,
        experts: config.experts,
        experts_used: config.experts_used,
        quantisation: config.quantisation.or_else(|| tensors.main_type()).unwrap_or_default(),
        tensor_bytes: tensors.total,
        header_digest: digest_text(digest),
    }
}

/// Names of the files, in order: those that the index names, or the one that needs no index, or all there are.
fn files(folder: &Path) -> Result<BTreeSet<String>, ProfileError> {
    match open(&folder.join(INDEX)) {
        Ok((file, length)) => {
            let too_large = ProfileError::TooLarge { what: "an index", value: length, limit: MAX_INDEX };
            let index =
                if length > MAX_INDEX { Err(too_large) } else { header::index(BufReader::new(file), MAX_FILES) };
            return index.map_err(|e| e.in_part(INDEX.to_owned()));
        }
        Err(_) if !folder.join(INDEX).exists() => {}
        Err(error) => return Err(error.in_part(INDEX.to_owned())),
    }
    if folder.join(WHOLE).exists() {
        return Ok(BTreeSet::from([WHOLE.to_owned()]));
    }
    let told = |e: std::io::Error| ProfileError::Unreadable(file_problem(&e));
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(told)?.take(MAX_ENTRIES) {
        let name = entry.map_err(told)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.insert(name);
        }
        if names.len() > MAX_FILES {
            let (value, limit) = (names.len() as u64, MAX_FILES as u64);
            return Err(ProfileError::TooLarge { what: "a number of files", value, limit });
        }
    }
    // The same weights once more, in another layout.
    if names.iter().any(|n| !n.starts_with("consolidated")) {
        names.retain(|n| !n.starts_with("consolidated"));
    }
    if names.is_empty() { Err(ProfileError::UnknownFormat) } else { Ok(names) }
}
