//! What the headers of GGUF files say.

mod support;

use model_store::{ProfileError, profile};
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

#[test]
fn windows_follow_each_architectures_pattern() {
    let windows = |file: Gguf| file.layers().iter().map(|l| l.kv.unwrap().window).collect::<Vec<_>>();
    let base = |arch: &str, layers: u32| Gguf::dense(arch, layers, 64, 4, 2);
    let (w, n) = (Some(512), None);
    let stored = |arch: &str, layers: u32| base(arch, layers).n("attention.sliding_window", 512);
    assert_eq!(windows(stored("gemma3", 7)), [w, w, w, w, w, n, w]);
    assert_eq!(windows(base("gemma3", 2)), [n, n], "no window, no pattern");
    assert_eq!(windows(base("gemma2", 3)), [Some(4096), n, Some(4096)]);
    assert_eq!(windows(stored("gpt-oss", 4)), [w, n, w, n]);
    assert_eq!(windows(stored("cohere2", 5)), [w, w, w, n, w]);
    assert_eq!(windows(stored("cohere2moe", 5)), [n, w, w, w, n]);
    assert_eq!(windows(stored("olmo2", 4)), [w, w, w, n]);
    assert_eq!(windows(base("llama4", 4)), [Some(8192), Some(8192), Some(8192), n], "chunks of a fixed size");
    assert_eq!(windows(base("llama4", 2).n("attention.sliding_window", 0)), [n, n]);
    assert_eq!(windows(stored("smallthinker", 2)), [n, Some(4096)]);
    assert_eq!(windows(stored("phi3", 2)), [n, n], "the engine ignores it");
    assert_eq!(windows(stored("llama", 2)), [n, n], "the engine ignores it");
    // What the file says of the pattern goes first.
    assert_eq!(windows(stored("gemma3", 4).n("attention.sliding_window_pattern", 2)), [w, n, w, n]);
    let flags = [true, false, false, true];
    assert_eq!(windows(stored("gemma3", 4).flags("attention.sliding_window_pattern", &flags)), [w, n, n, w]);
    assert_eq!(windows(stored("mimo2", 4).flags("attention.sliding_window_pattern", &flags)), [w, n, n, w]);
    assert!(matches!(stored("mimo2", 4).profile(), Err(ProfileError::Missing(key)) if key.ends_with("window_pattern")));
    assert_eq!(windows(stored("exaone4", 64))[..5], [w, w, w, n, w]);
    assert_eq!(windows(stored("exaone4", 30)), vec![n; 30]);
}

/// Heads by layer, and heads of other sizes where a window is.
#[test]
fn heads_may_differ_by_layer() {
    let file = Gguf::new("openelm", 3, 64, 2048)
        .list("attention.head_count", &[4, 8, 8])
        .list("attention.head_count_kv", &[1, 2, 0])
        .n("attention.key_length", 24);
    let layers = file.layers();
    assert_eq!(layers.iter().map(|l| l.kv).collect::<Vec<_>>(), [kv(1, 24, 16, None), kv(2, 24, 16, None), None]);
    assert_eq!(layers.iter().map(|l| l.heads).collect::<Vec<_>>(), [4, 8, 0]);
    let gemma4 = Gguf::dense("gemma4", 4, 64, 4, 2)
        .n("attention.sliding_window", 1024)
        .flags("attention.sliding_window_pattern", &[true, false, true, false])
        .n("attention.key_length", 512)
        .n("attention.value_length", 512)
        .n("attention.key_length_swa", 256)
        .n("attention.value_length_swa", 256)
        .n("attention.shared_kv_layers", 2);
    let kept: Vec<_> = gemma4.layers().iter().map(|l| l.kv).collect();
    assert_eq!(kept, [kv(2, 256, 256, Some(1024)), kv(2, 512, 512, None), None, None]);
    let gemma3n = Gguf::dense("gemma3n", 30, 2048, 8, 2).n("attention.sliding_window", 512).layers();
    assert_eq!(gemma3n.iter().filter(|l| l.kv.is_some()).count(), 20, "later layers use what earlier ones keep");
    assert!(gemma3n.iter().all(|l| l.heads == 8));
}

/// DeepSeek-V3: 61 layers of one key of 512 + 64 numbers; without the compressed form, 128 heads of 192 and 128.
#[test]
fn mla_keeps_one_compressed_key() {
    let v3 = |heads_kv, key, value| {
        Gguf::dense("deepseek2", 61, 7168, 128, heads_kv)
            .n("attention.kv_lora_rank", 512)
            .n("attention.key_length", key)
            .n("attention.value_length", value)
            .n("expert_count", 256)
            .n("expert_used_count", 8)
            .n("leading_dense_block_count", 3)
            .n("feed_forward_length", 18432)
            .n("expert_feed_forward_length", 2048)
    };
    let compressed = v3(1, 576, 512).n("attention.key_length_mla", 192).n("attention.value_length_mla", 128);
    let model = compressed.profile().unwrap();
    assert_eq!(model.layers[0].kv, kv(1, 576, 0, None));
    assert_eq!((model.experts, model.experts_used), (256, 8));
    assert_eq!((model.layers[2].feed_forward_length, model.layers[3].feed_forward_length), (18432, 2048));
    assert_eq!((model.layers[0].heads, model.kv_numbers_per_token()), (128, (61 * 576, 0)));
    assert_eq!(v3(128, 192, 128).layers()[0].kv, kv(128, 192, 128, None), "an old file");
    // DeepSeek-V3.2 has a selector with a key of 128 besides.
    let v32 = Gguf::dense("deepseek32", 2, 7168, 128, 1)
        .n("attention.key_length", 576)
        .n("attention.value_length", 512)
        .n("attention.key_length_mla", 192)
        .n("attention.value_length_mla", 128)
        .n("attention.indexer.key_length", 128);
    assert_eq!(v32.layers()[0].kv, kv(1, 704, 0, None));
}

#[test]
fn recurrent_layers_keep_a_state_for_each_sequence() {
    let ssm = |file: Gguf, kernel, inner, state| {
        file.n("ssm.conv_kernel", kernel)
            .n("ssm.inner_size", inner)
            .n("ssm.state_size", state)
            .n("ssm.time_step_rank", 8)
    };
    let states = |file: Gguf| file.layers().iter().map(|l| (l.recurrent_bytes, l.kv.is_some())).collect::<Vec<_>>();
    // Mamba-2.8B: 3 × 5120 numbers of the last tokens, 16 × 5120 of the state.
    let mamba = Gguf::new("mamba", 2, 2560, 1 << 20).n("attention.head_count", 0);
    assert_eq!(states(ssm(mamba, 4, 5120, 16)), [(4 * (3 * 5120 + 16 * 5120), false); 2]);
    let mamba2 = Gguf::new("mamba2", 1, 2560, 1 << 20).n("ssm.group_count", 1);
    assert_eq!(states(ssm(mamba2, 4, 5120, 128)), [(4 * (3 * (5120 + 256) + 128 * 5120), false)]);
    let rwkv = Gguf::new("rwkv6", 1, 2048, 1 << 20).n("wkv.head_size", 64);
    assert_eq!(states(rwkv), [(4 * (2 * 2048 + 64 * 2048), false)]);

    let hybrid = |arch: &str, kv: &[u32]| {
        Gguf::new(arch, kv.len() as u32, 4096, 1 << 18)
            .n("attention.head_count", 32)
            .list("attention.head_count_kv", kv)
    };
    let jamba = 4 * (3 * 8192 + 16 * 8192);
    assert_eq!(states(ssm(hybrid("jamba", &[0, 8]), 4, 8192, 16)), [(jamba, false), (0, true)]);
    let granite = 4 * (3 * (8192 + 2 * 128) + 128 * 8192);
    let file = ssm(hybrid("granitehybrid", &[0, 0, 8]), 4, 8192, 128).n("ssm.group_count", 1);
    assert_eq!(states(file), [(granite, false), (granite, false), (0, true)]);
    let falcon = ssm(hybrid("falcon-h1", &[8, 8]), 4, 8192, 128).n("ssm.group_count", 1);
    assert_eq!(states(falcon), [(granite, true); 2]);
    // A feed-forward layer of Nemotron-H keeps nothing.
    let nemotron = ssm(hybrid("nemotron_h", &[0, 0, 8]), 4, 8192, 128).n("ssm.group_count", 1);
    let nemotron = nemotron.list("feed_forward_length", &[0, 12288, 0]);
    assert_eq!(states(nemotron), [(granite, false), (0, false), (0, true)]);
    assert_eq!(states(hybrid("lfm2", &[0, 8]).n("shortconv.l_cache", 3)), [(4 * 2 * 4096, false), (0, true)]);
    // Qwen3-Next: each fourth layer attends; 16 key heads and 32 value heads of 128.
    let next = ssm(hybrid("qwen3next", &[2, 2, 2, 2]), 4, 4096, 128).n("ssm.group_count", 16);
    let state = 4 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096);
    assert_eq!(states(next), [(state, false), (state, false), (state, false), (0, true)]);
    let kda = hybrid("kimi-linear", &[0, 1]).n("ssm.conv_kernel", 4).n("kda.head_dim", 128);
    let kda =
        kda.n("attention.key_length", 576).n("attention.key_length_mla", 192).n("attention.value_length_mla", 128);
    assert_eq!(states(kda), [(4 * (3 * 3 * 32 * 128 + 128 * 128 * 32), false), (0, true)]);
    assert!(matches!(ssm(Gguf::new("mamba", 2, 64, 9), 0, 8, 8).profile(), Err(ProfileError::Value { .. })));
}

#[test]
fn encoders_keep_nothing_and_their_embedding_once() {
    let model = Gguf::dense("bert", 2, 64, 4, 4)
        .tensor("token_embd.weight", &[64, 100], support::F16, 12_800)
        .tensor("position_embd.weight", &[64, 10], support::F16, 1280)
        .profile()
        .unwrap();
    assert!(model.layers.iter().all(|l| l.kv.is_none() && l.heads == 4));
    assert_eq!((model.tied_embeddings, model.embedding_bytes, model.input_bytes), (false, 12_800, 14_080));
    assert_eq!((model.vocabulary, model.quantisation.as_str()), (100, "F16"));
    let llama = Gguf::dense("llama", 1, 64, 4, 4).tensor("token_embd.weight", &[64, 100], support::Q8_0, 6800);
    assert!(llama.profile().unwrap().tied_embeddings);
}

/// The engine counts layers for prediction of further tokens, but neither loads them nor gives them a cache by default.
#[test]
fn layers_for_further_tokens_keep_their_number_and_cost_nothing() {
    let file = Gguf::dense("glm4moe", 3, 64, 4, 2).n("nextn_predict_layers", 1).weights(3, 10, 64, 100);
    let model = file.profile().unwrap();
    assert_eq!(
        model.layers.iter().map(|l| (l.bytes, l.kv.is_some())).collect::<Vec<_>>(),
        [(400, true), (400, true), (0, false)]
    );
    assert_eq!(model.tensor_bytes, model.weights() + 400);
    // Tensors beyond the counted layers are told, wherever they are to go.
    let stray = Gguf::dense("llama", 1, 64, 4, 2).weights(2, 10, 64, 100).profile().unwrap();
    assert_eq!((stray.layers.len(), stray.other_bytes), (1, 400));
}

#[test]
fn all_parts_of_a_split_are_read_whichever_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let part = |file: Gguf, n: u16, count: u16| {
        file.raw("split.no", 2, &n.to_le_bytes()).raw("split.count", 2, &count.to_le_bytes())
    };
    let rest = |n: u32| Gguf::default().tensor(&format!("blk.{n}.attn_q.weight"), &[100], support::F32, 400);
    let first = part(Gguf::dense("llama", 2, 64, 4, 2), 0, 3);
    first.write(dir.path(), "m-00001-of-00003.gguf");
    part(rest(0), 1, 3).write(dir.path(), "m-00002-of-00003.gguf");
    let last = part(rest(1), 2, 3).write(dir.path(), "m-00003-of-00003.gguf");
    let model = profile(&last).unwrap();
    assert_eq!(model, profile(&dir.path().join("m-00001-of-00003.gguf")).unwrap());
    assert_eq!(model.layers.iter().map(|l| l.bytes).collect::<Vec<_>>(), [400, 400]);

    // A name that is taken twice, a part that is another one's, a part that is gone.
    part(rest(0), 2, 3).write(dir.path(), "m-00003-of-00003.gguf");
    let error = profile(&last).unwrap_err().to_string();
    assert!(error.contains("part `m-00003-of-00003.gguf` has the tensor `blk.0.attn_q.weight` twice"), "{error}");
    part(rest(1), 1, 3).write(dir.path(), "m-00003-of-00003.gguf");
    assert!(profile(&last).unwrap_err().to_string().contains("`split.no`"));
    std::fs::remove_file(dir.path().join("m-00002-of-00003.gguf")).unwrap();
    let error = profile(&last).unwrap_err().to_string();
    assert!(error.ends_with("part `m-00002-of-00003.gguf` does not exist"), "{error}");
    assert!(!error.contains(dir.path().to_str().unwrap()));
    // A part under a name of its own.
    let alone = first.write(dir.path(), "alone.gguf");
    assert!(matches!(profile(&alone), Err(ProfileError::Value { key, .. }) if key == "split.count"));
}

#[test]
fn the_digest_names_shape_and_metadata_only() {
    let file = Gguf::dense("llama", 1, 64, 4, 2).weights(1, 10, 64, 100);
    let dir = tempfile::tempdir().unwrap();
    let path = file.write(dir.path(), "a.gguf");
    let digest = profile(&path).unwrap().header_digest;
    assert_eq!(digest, file.profile().unwrap().header_digest);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(digest, profile(&path).unwrap().header_digest);
    assert_ne!(digest, file.n("rope.dimension_count", 16).profile().unwrap().header_digest);
}

#[test]
fn both_versions_are_read_and_a_file_is_told_by_what_it_is() {
    let file = Gguf::dense("llama", 1, 64, 4, 2);
    assert!(support::profile_bytes(&file.header_of(2)).is_ok());
    assert_eq!(support::profile_bytes(&file.header_of(1)), Err(ProfileError::Version(1)));
    assert_eq!(support::profile_bytes(&file.header_of(4)), Err(ProfileError::Version(4)));
    assert_eq!(support::profile_bytes(&file.header_of(3u32.swap_bytes())), Err(ProfileError::BigEndian));
    assert_eq!(support::profile_bytes(b"GGML\x03\0\0\0"), Err(ProfileError::NotGguf));
    assert_eq!(support::profile_bytes(b""), Err(ProfileError::NotGguf));
    let clip = Gguf::new("clip", 1, 64, 9).profile().unwrap_err();
    assert_eq!(clip.to_string(), "is of architecture `clip`, whose memory cannot be told from its header");
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(profile(&dir.path().join("none.gguf")), Err(ProfileError::Unreadable("does not exist".into())));
    assert_eq!(profile(dir.path()), Err(ProfileError::UnknownFormat));
}
