//! Writes a tiny llama-architecture GGUF (v3, F32, random weights) that llama.cpp really loads.
//!
//! The same options give the same bytes on every machine: the weights come from integer arithmetic, no libm.
//! Vocabulary: `<unk>`, `<s>`, `</s>`, 256 byte tokens (so any text tokenises) and some 150 English words. The output
//! rows of everything but the words are zero while those of the words are large, so what is generated is always
//! printable, and the end token is practically never drawn: a request for N tokens yields N tokens.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::gguf::{self, ALIGN, FLOAT32, INT32, Kind, Metadata};

const WORDS: &str = "the of and to in is was he for it with as his on be at by had not are but from or have an they \
which one you were all her she there would their we him been has when who will no more if out so up said what its about \
than into them can only other time new some could these two may first then do any like my now over such our man me even \
most made after also did many off before must well back through years much where your way down should because long each \
just state those people too mr how little good world make very year still see own work men day get here between life \
being under three never know same last another while us might great old come since against go came right used take";
const TEMPLATE: &str = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}";

/// The shape of the model.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// Transformer blocks.
    pub(crate) layers: u32,
    /// Embedding length.
    pub(crate) dim: u32,
    /// Feed-forward length; `target_mb` overrides it.
    pub(crate) feed_forward: u32,
    /// Attention heads.
    pub(crate) heads: u32,
    /// Trained context length.
    pub(crate) context: u32,
    /// Seed of the weights.
    pub(crate) seed: u64,
    /// `general.name`.
    pub(crate) name: String,
    /// Grows the file to about this many MiB by widening the feed-forward layers.
    pub(crate) target_mb: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            layers: 2,
            dim: 64,
            feed_forward: 128,
            heads: 4,
            context: 4096,
            seed: 1,
            name: "tiny-random".to_owned(),
            target_mb: None,
        }
    }
}

/// How a tensor is filled.
#[derive(Debug, Clone, Copy)]
enum Fill {
    Ones,
    /// Gaussian with this deviation.
    Gauss(f32),
    /// Gaussian, with the rows of all tokens but the words zero.
    Head,
}

struct Tensor {
    info: gguf::Tensor,
    fill: Fill,
}

impl Tensor {
    fn new(name: impl Into<String>, dims: &[u64], fill: Fill) -> Self {
        Self { info: gguf::Tensor { name: name.into(), dims: dims.to_vec(), kind: Kind::F32 }, fill }
    }

    fn elements(&self) -> u64 {
        self.info.elements()
    }
}

/// Writes the model to `path`.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write(path: &Path, options: &Options) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    write_to(&mut out, options)?;
    out.flush()
}

fn write_to(out: &mut impl Write, options: &Options) -> io::Result<()> {
    let vocabulary = Vocabulary::new();
    let feed_forward = feed_forward(options, vocabulary.len());
    let tensors = tensors(options, vocabulary.len(), feed_forward);
    let metadata = metadata(options, &vocabulary, feed_forward);

    let table: Vec<_> = tensors.iter().map(|t| t.info.clone()).collect();
    let (header, _) = gguf::header(&metadata, &table);
    out.write_all(&header)?;

    let mut noise = Noise::new(options.seed);
    for tensor in &tensors {
        match tensor.fill {
            Fill::Ones => (0..tensor.elements()).try_for_each(|_| out.write_all(&1_f32.to_le_bytes()))?,
            Fill::Gauss(deviation) => noise.write(out, tensor.elements(), deviation)?,
            Fill::Head => {
                let width = tensor.info.dims[0];
                for token in 0..tensor.info.dims[1] {
                    if vocabulary.is_word(token) {
                        noise.write(out, width, 0.5)?;
                    } else {
                        (0..width).try_for_each(|_| out.write_all(&[0; 4]))?;
                    }
                }
            }
        }
        let size = tensor.elements() * 4;
        out.write_all(&vec![0; (size.next_multiple_of(ALIGN) - size) as usize])?;
    }
    Ok(())
}

/// The feed-forward length that makes the file as big as asked.
fn feed_forward(options: &Options, vocabulary: u64) -> u64 {
    let Some(target) = options.target_mb else { return u64::from(options.feed_forward) };
    let (layers, dim) = (u64::from(options.layers), u64::from(options.dim));
    let fixed = 2 * vocabulary * dim + layers * (4 * dim * dim + 2 * dim) + dim;
    let wanted = (u64::from(target) << 18).saturating_sub(fixed) / (3 * layers * dim).max(1);
    (wanted / 32 * 32).max(32)
}

fn tensors(options: &Options, vocabulary: u64, feed_forward: u64) -> Vec<Tensor> {
    let dim = u64::from(options.dim);
    let by_dim = Fill::Gauss((dim as f32).sqrt().recip());
    let mut all = vec![
        Tensor::new("token_embd.weight", &[dim, vocabulary], Fill::Gauss(1.0)),
        Tensor::new("output_norm.weight", &[dim], Fill::Ones),
        Tensor::new("output.weight", &[dim, vocabulary], Fill::Head),
    ];
    for layer in 0..options.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        all.push(Tensor::new(name("attn_norm"), &[dim], Fill::Ones));
        all.push(Tensor::new(name("ffn_norm"), &[dim], Fill::Ones));
        for part in ["attn_q", "attn_k", "attn_v", "attn_output"] {
            all.push(Tensor::new(name(part), &[dim, dim], by_dim));
        }
        all.push(Tensor::new(name("ffn_gate"), &[dim, feed_forward], by_dim));
        all.push(Tensor::new(name("ffn_up"), &[dim, feed_forward], by_dim));
        let by_feed_forward = Fill::Gauss((feed_forward as f32).sqrt().recip());
        all.push(Tensor::new(name("ffn_down"), &[feed_forward, dim], by_feed_forward));
    }
    all
}

fn metadata(options: &Options, vocabulary: &Vocabulary, feed_forward: u64) -> Metadata {
    let mut meta = Metadata::default();
    meta.string("general.architecture", "llama");
    meta.string("general.name", &options.name);
    meta.u32("general.file_type", 0);
    meta.u32("general.alignment", ALIGN as u32);
    meta.u32("llama.block_count", options.layers);
    meta.u32("llama.context_length", options.context);
    meta.u32("llama.embedding_length", options.dim);
    meta.u32("llama.feed_forward_length", u32::try_from(feed_forward).unwrap_or(u32::MAX));
    meta.u32("llama.attention.head_count", options.heads);
    meta.u32("llama.attention.head_count_kv", options.heads);
    meta.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    meta.u32("llama.rope.dimension_count", options.dim / options.heads.max(1));
    meta.u32("llama.vocab_size", vocabulary.len() as u32);
    meta.string("tokenizer.ggml.model", "llama");
    meta.strings("tokenizer.ggml.tokens", &vocabulary.tokens);
    meta.array("tokenizer.ggml.scores", FLOAT32, vocabulary.scores().map(f32::to_le_bytes));
    meta.array("tokenizer.ggml.token_type", INT32, vocabulary.types().map(i32::to_le_bytes));
    meta.u32("tokenizer.ggml.unknown_token_id", 0);
    meta.u32("tokenizer.ggml.bos_token_id", 1);
    meta.u32("tokenizer.ggml.eos_token_id", 2);
    meta.bool("tokenizer.ggml.add_bos_token", true);
    meta.bool("tokenizer.ggml.add_space_prefix", true);
    meta.string("tokenizer.chat_template", TEMPLATE);
    meta
}

/// The tokens: three special ones, the bytes, the words, the lone space.
struct Vocabulary {
    tokens: Vec<String>,
}

impl Vocabulary {
    const BYTES_START: usize = 3;
    const WORDS_START: usize = 259;

    fn new() -> Self {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        let mut seen = BTreeSet::new();
        tokens.extend(WORDS.split_whitespace().filter(|word| seen.insert(*word)).map(|word| format!("\u{2581}{word}")));
        tokens.push("\u{2581}".to_owned());
        Self { tokens }
    }

    fn len(&self) -> u64 {
        self.tokens.len() as u64
    }

    fn is_word(&self, token: u64) -> bool {
        token >= Self::WORDS_START as u64 && token + 1 < self.len()
    }

    fn scores(&self) -> impl ExactSizeIterator<Item = f32> {
        (0..self.tokens.len()).map(|token| -(token.saturating_sub(Self::WORDS_START) as f32))
    }

    /// 2 unknown, 3 control, 6 byte, 1 normal.
    fn types(&self) -> impl ExactSizeIterator<Item = i32> {
        (0..self.tokens.len()).map(|token| match token {
            0 => 2,
            _ if token < Self::BYTES_START => 3,
            _ if token < Self::WORDS_START => 6,
            _ => 1,
        })
    }
}

/// Gaussian noise cut from one pool at random places: fast enough for files of hundreds of MiB.
struct Noise {
    random: SplitMix,
    pool: Vec<f32>,
}

impl Noise {
    const POOL: usize = 1 << 16;

    fn new(seed: u64) -> Self {
        let mut random = SplitMix(seed);
        let pool = (0..Self::POOL).map(|_| random.gauss()).collect();
        Self { random, pool }
    }

    fn write(&mut self, out: &mut impl Write, count: u64, deviation: f32) -> io::Result<()> {
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        while left > 0 {
            let start = (self.random.next() % Self::POOL as u64) as usize;
            let piece = &self.pool[start..(start + left).min(Self::POOL)];
            bytes.clear();
            bytes.extend(piece.iter().flat_map(|value| (value * deviation).to_le_bytes()));
            out.write_all(&bytes)?;
            left -= piece.len();
        }
        Ok(())
    }
}

/// `SplitMix64`.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Near enough to a standard normal: the sum of twelve uniforms less six.
    fn gauss(&mut self) -> f32 {
        let sum: u64 = (0..12).map(|_| self.next() >> 44).sum();
        sum as f32 / (1 << 20) as f32 - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(options: &Options) -> Vec<u8> {
        let mut out = Vec::new();
        write_to(&mut out, options).unwrap();
        out
    }

    #[test]
    fn same_options_same_bytes() {
        let first = bytes(&Options::default());
        assert_eq!(first, bytes(&Options::default()));
        assert_ne!(first, bytes(&Options { seed: 2, ..Options::default() }));
        assert_eq!(&first[..4], b"GGUF");
        assert_eq!(first.len() as u64 % ALIGN, 0);
    }

    #[test]
    fn target_size_is_met_within_a_tenth() {
        let size = bytes(&Options { target_mb: Some(8), ..Options::default() }).len() as f64 / f64::from(1 << 20);
        assert!((7.2..=8.8).contains(&size), "{size} MiB");
    }

    #[test]
    fn noise_is_centred_with_deviation_one() {
        let pool = Noise::new(1).pool;
        let mean = pool.iter().map(|x| f64::from(*x)).sum::<f64>() / pool.len() as f64;
        let variance = pool.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / pool.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.05, "mean {mean}, variance {variance}");
    }
}
