//! From keys and tensors to a [`ModelProfile`].

use pool_domain::{ModelFormat, ModelProfile};

use super::header::{Keys, Value};
use super::layers;
use super::limits::MAX_LAYERS;
use super::tensors::Tensors;
use super::types::file_type;
use crate::ProfileError;
use crate::profile::shown;

const ARCHITECTURE: &str = "general.architecture";

/// Architectures that keep something for each token which no [`pool_domain::KvShape`] describes (compressed blocks of
/// several lengths, drafts that use another model's cache), and those that are no language model at all.
const UNTOLD: [&str; 5] = ["clip", "deepseek4", "dflash", "gemma4-assistant", "qwen4exp"];

/// Encoders: they have no output matrix, so its absence does not mean that the embedding is used twice.
const ENCODERS: [&str; 12] = [
    "bert",
    "clef",
    "eurobert",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "t5encoder",
    "wavtokenizer-dec",
];

/// Puts together what the header says.
pub(super) fn profile(keys: &Keys, tensors: &Tensors, header_digest: String) -> Result<ModelProfile, ProfileError> {
    let meta = Meta::new(keys)?;
    let layers = layers::layers(&meta, tensors)?;
    // Tensors of layers that the header does not count. The engine would refuse them; they cost memory for whoever reads them.
    let stray: u64 = tensors.layers.range(layers::stored(&meta)?..).map(|(_, bytes)| *bytes).sum();
    let vocabulary = match keys.get("tokenizer.ggml.tokens") {
        Some(Value::Array(n)) => *n,
        _ => meta.number("vocab_size")?.unwrap_or(tensors.vocabulary),
    };
    let quantisation = match keys.number("general.file_type") {
        Ok(Some(n)) => file_type(n),
        _ => None,
    };
    let experts_used = meta.per_layer("expert_used_count", layers::stored(&meta)?)?.unwrap_or_default();
    Ok(ModelProfile {
        format: ModelFormat::Gguf,
        layers,
        input_bytes: tensors.input,
        output_bytes: tensors.output,
        other_bytes: tensors.other + stray,
        tied_embeddings: !tensors.output_matrix && tensors.embedding > 0 && !ENCODERS.contains(&meta.architecture),
        embedding_bytes: tensors.embedding,
        embedding_length: meta.need("embedding_length")?.into(),
        context_length: meta.need("context_length")?.into(),
        vocabulary,
        experts: meta.small("expert_count")?.unwrap_or(0),
        experts_used: experts_used.into_iter().max().unwrap_or(0),
        quantisation: quantisation.or_else(|| tensors.main_type()).unwrap_or_default().to_owned(),
        tensor_bytes: tensors.total,
        header_digest,
        architecture: meta.architecture.to_owned(),
    })
}

/// The keys that begin with the architecture's name.
pub(super) struct Meta<'a> {
    keys: &'a Keys,
    pub(super) architecture: &'a str,
}

impl<'a> Meta<'a> {
    fn new(keys: &'a Keys) -> Result<Self, ProfileError> {
        let architecture = match keys.get(ARCHITECTURE) {
            Some(Value::Text(name)) if !name.is_empty() => name.as_str(),
            Some(_) => return Err(ProfileError::value(ARCHITECTURE, "its value is not a short name")),
            None => return Err(ProfileError::Missing(ARCHITECTURE.to_owned())),
        };
        if UNTOLD.contains(&architecture) {
            return Err(ProfileError::Architecture(shown(architecture.as_bytes())));
        }
        Ok(Self { keys, architecture })
    }

    /// The whole key.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    pub(super) fn wrong(&self, name: &str, problem: impl Into<String>) -> ProfileError {
        ProfileError::value(shown(self.key(name).as_bytes()), problem)
    }

    fn number(&self, name: &str) -> Result<Option<u64>, ProfileError> {
        self.keys.number(&self.key(name))
    }

    /// A number as the engines hold it.
    pub(super) fn small(&self, name: &str) -> Result<Option<u32>, ProfileError> {
        let narrow = |n: u64| u32::try_from(n).map_err(|_| self.wrong(name, format!("{n} is too large")));
        self.number(name)?.map(narrow).transpose()
    }

    /// A number above zero without which there is no model.
    pub(super) fn need(&self, name: &str) -> Result<u32, ProfileError> {
        match self.small(name)? {
            Some(0) => Err(self.wrong(name, "0 is not possible")),
            Some(n) => Ok(n),
            None => Err(ProfileError::Missing(shown(self.key(name).as_bytes()))),
        }
    }

    /// A number for each layer, or one for all (`get_key_or_arr` in `llama-model-loader.cpp`).
    pub(super) fn per_layer(&self, name: &str, layers: u32) -> Result<Option<Vec<u32>>, ProfileError> {
        debug_assert!(layers <= MAX_LAYERS, "checked when it was read");
        if let Some(list) = self.list(name)? {
            if list.len() != layers as usize {
                return Err(self.wrong(name, format!("it has {} values for {layers} layers", list.len())));
            }
            return Ok(Some(list));
        }
        Ok(self.small(name)?.map(|n| vec![n; layers as usize]))
    }

    /// An array of numbers; `None` if the key is absent or holds one number.
    pub(super) fn list(&self, name: &str) -> Result<Option<Vec<u32>>, ProfileError> {
        match self.keys.get(&self.key(name)) {
            Some(Value::Numbers(list)) => {
                let narrow = list.iter().map(|n| u32::try_from(*n)).collect::<Result<_, _>>();
                narrow.map(Some).map_err(|_| self.wrong(name, "one of its values is too large"))
            }
            Some(Value::Array(_)) => Err(self.wrong(name, "it is not a list of one whole number a layer")),
            _ => Ok(None),
        }
    }
}
