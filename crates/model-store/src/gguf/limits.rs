//! How much of a header is believed. Each limit is well above what real models have and low enough that a file made to
//! harm costs less than 100 ms and 16 MiB.

/// The buffer; also the longest string whose text is looked at.
pub(super) const PIECE: usize = 64 << 10;
/// Bytes taken from the headers of one model. The largest vocabularies (Gemma: 262,144 tokens and twice as many merges)
/// come to about 16 MiB.
pub(super) const MAX_READ: u64 = 32 << 20;
/// Where a header has to end. Skipped arrays and texts cost no reading, a tokenizer as JSON may be 30 MiB.
pub(super) const MAX_HEADER: u64 = 256 << 20;
/// Keys of a header. Models have 20 to 100.
pub(super) const MAX_KEYS: u64 = 4096;
/// Bytes of a key. Known keys have fewer than 70; the format would allow 65,535.
pub(super) const MAX_KEY: usize = 256;
/// Bytes of a tensor's name: the engine's own limit (`GGML_MAX_NAME` in `ggml.h`, with the final zero).
pub(super) const MAX_TENSOR_NAME: usize = 63;
/// Tensors of a model, all parts together. Kimi-K2 has about 1,100, a model with its experts apart some 10,000.
pub(super) const MAX_TENSORS: u64 = 32_768;
/// Dimensions of a tensor (`GGML_MAX_DIMS` in `ggml.h`).
pub(super) const MAX_DIMS: u32 = 4;
/// Elements of an array. Vocabularies have up to 300,000, their merges twice as many.
pub(super) const MAX_ARRAY: u64 = 1 << 24;
/// Elements of an array that is kept, which is one number a layer at most.
pub(super) const MAX_KEPT_ARRAY: u64 = MAX_LAYERS as u64;
/// Elements of all arrays that are kept; real headers come to a few thousand.
pub(super) const MAX_KEPT: usize = 64 << 10;
/// Bytes of a text that is kept; it is only asked for the architecture's name.
pub(super) const MAX_KEPT_TEXT: u64 = 64;
/// Layers (`LLAMA_MAX_LAYERS` in `llama-hparams.h`).
pub(super) const MAX_LAYERS: u32 = 512;
/// Alignment of the data. 32 is usual; a page is the most that makes sense, a huge one leaves room.
pub(super) const MAX_ALIGNMENT: u64 = 1 << 21;
/// Parts of a split. The largest models come in fewer than 200.
pub(super) const MAX_PARTS: u32 = 1024;
