//! What the headers of GGUF files say.

mod support;

use pool_domain::{KvShape, ModelFormat};
use support::Gguf;

fn kv(heads_kv: u32, key_length: u32, value_length: u32, window: Option<u64>) -> Option<KvShape> {
    Some(KvShape { heads_kv, key_length, value_length, window })
}

/// Llama-3.1-8B, Qwen2.5-7B and Llama-3-70B with f16 keys and values, from their published shapes.
#[test]
fn bytes_per_token_are_those_of_the_published_shapes() {
    for (arch, layers, embedding, heads, heads_kv, bytes) in
        [("llama", 32, 4096, 32, 8, 131_072), ("qwen2", 28, 3584, 28, 4, 57_344), ("llama", 80, 8192, 64, 8, 327_680)]
    {
        let model = Gguf::dense(arch, layers, embedding, heads, heads_kv).profile().unwrap();
        let (k, v) = model.kv_numbers_per_token();
        assert_eq!(2 * (k + v), bytes, "{arch}");
        assert_eq!(model.layers[0].kv, kv(heads_kv, 128, 128, None));
    }
}

#[test]
fn a_dense_model_is_summed_up_by_place() {
    let file = Gguf::dense("llama", 2, 64, 4, 2)
        .u32("general.file_type", 15)
        .n("feed_forward_length", 256)
        .strings("tokenizer.ggml.tokens", ["a", "bc", ""].into_iter())
        .weights(2, 10, 64, 1000)
        .tensor("rope_freqs.weight", &[32], support::F32, 128);
    let model = file.profile().unwrap();
    assert_eq!(model.format, ModelFormat::Gguf);
    assert_eq!((model.architecture.as_str(), model.quantisation.as_str()), ("llama", "Q4_K_M"));
    assert_eq!((model.input_bytes, model.embedding_bytes), (1280, 1280));
    assert_eq!((model.output_bytes, model.other_bytes, model.tied_embeddings), (1280 + 256, 128, false));
    assert_eq!(
        model.layers.iter().map(|l| (l.bytes, l.heads, l.feed_forward_length)).collect::<Vec<_>>(),
        [(4000, 4, 256); 2]
    );
    assert_eq!((model.embedding_length, model.context_length, model.vocabulary), (64, 131_072, 3));
    assert_eq!(model.tensor_bytes, model.weights());
    assert!(model.header_digest.starts_with("sha256:") && model.header_digest.len() == 71, "{}", model.header_digest);
}
