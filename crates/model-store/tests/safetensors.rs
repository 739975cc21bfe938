//! What `config.json` and the headers of safetensors files say.
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use std::fs;
use std::path::Path;

use model_store::{ProfileError, profile, profile_safetensors};
use pool_domain::{KvShape, LayerProfile, ModelFormat, ModelProfile};

/// A file with tensors of so many BF16 numbers, without their data but of its true length.
fn file(tensors: &[(&str, u64)]) -> Vec<u8> {
    let mut at = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|(name, n)| {
            let begin = at;
            at += 2 * n;
            format!(r#""{name}":{{"dtype":"BF16","shape":[{n}],"data_offsets":[{begin},{at}]}}"#)
        })
        .collect();
    let json = format!("{{{}}}", entries.join(","));
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json.bytes());
    out.resize(out.len() + at as usize, 0);
    out
}

fn of(config: &str) -> Result<ModelProfile, ProfileError> {
    profile_safetensors(config.as_bytes(), &file(&[("model.embed_tokens.weight", 10)]))
}

fn layers(config: &str) -> Vec<LayerProfile> {
    of(config).unwrap().layers
}

fn windows(config: &str) -> Vec<Option<u64>> {
    layers(config).iter().map(|l| l.kv.unwrap().window).collect()
}

const LLAMA: &str = r#"{"model_type":"llama","num_hidden_layers":32,"hidden_size":4096,"num_attention_heads":32,
"num_key_value_heads":8,"intermediate_size":14336,"max_position_embeddings":131072,"vocab_size":128256,
"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#;
const QWEN2: &str = r#"{"model_type":"qwen2","num_hidden_layers":28,"hidden_size":3584,"num_attention_heads":28,
"num_key_value_heads":4,"sliding_window":131072,"use_sliding_window":false,"max_window_layers":28}"#;
const LLAMA_70B: &str = r#"{"model_type":"llama","num_hidden_layers":80,"hidden_size":8192,"num_attention_heads":64,
"num_key_value_heads":8}"#;

#[test]
fn bytes_per_token_are_those_of_the_published_shapes() {
    for (config, bytes) in [(LLAMA, 131_072), (QWEN2, 57_344), (LLAMA_70B, 327_680)] {
        let (k, v) = of(config).unwrap().kv_numbers_per_token();
        assert_eq!(2 * (k + v), bytes);
    }
    assert_eq!(windows(QWEN2), [None; 28], "it has a window but does not use it");
}

#[test]
fn a_folder_is_summed_up_by_place() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let config = LLAMA.replace(":32,\"hidden", ":2,\"hidden");
    write("config.json", config.as_bytes());
    assert_eq!(profile(dir.path()), Err(ProfileError::UnknownFormat));
    write(
        "model-00001-of-00002.safetensors",
        &file(&[
            ("model.embed_tokens.weight", 10),
            ("model.layers.0.self_attn.q_proj.weight", 20),
            ("vision_tower.encoder.layers.0.q_proj.weight", 3),
        ]),
    );
    let second = [("model.layers.1.mlp.up_proj.weight", 30), ("model.norm.weight", 1), ("lm_head.weight", 40)];
    write("model-00002-of-00002.safetensors", &file(&second));
    write("consolidated.safetensors", &file(&[("layers.0.wq", 1000)]));
    let model = profile(dir.path()).unwrap();
    assert_eq!((model.format, model.architecture.as_str()), (ModelFormat::Safetensors, "llama"));
    assert_eq!(model.layers.iter().map(|l| l.bytes).collect::<Vec<_>>(), [40, 60]);
    assert_eq!((model.input_bytes, model.embedding_bytes, model.output_bytes, model.other_bytes), (20, 20, 82, 6));
    assert_eq!((model.tensor_bytes, model.weights(), model.tied_embeddings), (208, 208, false));
    assert_eq!((model.context_length, model.vocabulary, model.quantisation.as_str()), (131_072, 128_256, "BF16"));
    assert_eq!(model.layers[0].feed_forward_length, 14336);
    assert_eq!(profile(&dir.path().join("config.json")).unwrap(), model);

    // The index says which files are meant.
    write("model.safetensors.index.json", br#"{"metadata":{},"weight_map":{"a":"model-00001-of-00002.safetensors"}}"#);
    assert_eq!(profile(dir.path()).unwrap().tensor_bytes, 66);
    write("model.safetensors.index.json", br#"{"weight_map":{"a":"../../secret.safetensors"}}"#);
    let error = profile(dir.path()).unwrap_err().to_string();
    assert!(error.contains("part `model.safetensors.index.json` has a malformed header"), "{error}");
    write("model.safetensors.index.json", br#"{"weight_map":{"a":"gone.safetensors"}}"#);
    assert!(profile(dir.path()).unwrap_err().to_string().ends_with("part `gone.safetensors` does not exist"));
    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();

    // A part cut short, a tensor in two parts.
    let whole = file(&second);
    write("model-00002-of-00002.safetensors", &whole[..whole.len() - 1]);
    let error = profile(dir.path()).unwrap_err().to_string();
    assert!(error.contains("part `model-00002-of-00002.safetensors` is cut short: the last tensor"), "{error}");
    write("model-00002-of-00002.safetensors", &file(&[("model.embed_tokens.weight", 10)]));
    assert!(profile(dir.path()).unwrap_err().to_string().ends_with("has the tensor `model.embed_tokens.weight` twice"));
    assert!(!error.contains(dir.path().to_str().unwrap()));
    assert_eq!(profile(Path::new("/nowhere/config.json")), Err(ProfileError::UnknownFormat));
}

#[test]
fn windows_follow_the_config() {
    let config = |kind: &str, layers: u32, more: &str| {
        format!(
            r#"{{"model_type":"{kind}","num_hidden_layers":{layers},"hidden_size":64,"num_attention_heads":4{more}}}"#
        )
    };
    let (w, n) = (Some(512), None);
    let window = r#","sliding_window":512"#;
    assert_eq!(windows(&config("mistral", 2, window)), [w, w]);
    assert_eq!(windows(&config("mistral", 2, r#","sliding_window":null"#)), [n, n]);
    assert_eq!(windows(&config("gemma3_text", 7, window)), [w, w, w, w, w, n, w]);
    assert_eq!(windows(&config("gemma2", 2, window)), [w, n]);
    let types = r#","sliding_window":512,"layer_types":["full_attention","sliding_attention"]"#;
    assert_eq!(windows(&config("gpt_oss", 2, types)), [n, w]);
    assert!(matches!(of(&config("gpt_oss", 3, types)), Err(ProfileError::Value { .. })));
    let used = r#","sliding_window":512,"use_sliding_window":true,"max_window_layers":1"#;
    assert_eq!(windows(&config("qwen2", 2, used)), [n, w]);
    let chunks = r#","attention_chunk_size":512"#;
    assert_eq!(windows(&config("llama4_text", 4, chunks)), [w, w, w, n]);
    // What a model with several senses says of its language part goes first.
    let nested = r#"{"model_type":"gemma3","text_config":{"model_type":"gemma3_text","num_hidden_layers":2,"hidden_size":64,
        "num_attention_heads":4,"num_key_value_heads":1,"head_dim":256,"sliding_window":512},"hidden_size":1}"#;
    let model = of(nested).unwrap();
    assert_eq!((model.architecture.as_str(), model.embedding_length), ("gemma3_text", 64));
    let kv = KvShape { heads_kv: 1, key_length: 256, value_length: 256, window: w };
    assert_eq!(model.layers[0].kv, Some(kv));
}

#[test]
fn mla_mixtures_and_states() {
    let v3 = r#"{"model_type":"deepseek_v3","num_hidden_layers":61,"hidden_size":7168,"num_attention_heads":128,
        "num_key_value_heads":128,"kv_lora_rank":512,"qk_rope_head_dim":64,"v_head_dim":128,"n_routed_experts":256,
        "num_experts_per_tok":8,"first_k_dense_replace":3,"intermediate_size":18432,"moe_intermediate_size":2048,
        "num_nextn_predict_layers":1,"quantization_config":{"quant_method":"fp8"}}"#;
    let header = file(&[("model.layers.60.a", 5), ("model.layers.61.a", 7)]);
    let model = profile_safetensors(v3.as_bytes(), &header).unwrap();
    assert_eq!(model.kv_numbers_per_token(), (61 * 576, 0));
    assert_eq!((model.experts, model.experts_used, model.quantisation.as_str()), (256, 8, "FP8"));
    assert_eq!((model.layers[2].feed_forward_length, model.layers[3].feed_forward_length), (18432, 2048));
    assert_eq!((model.layers[60].bytes, model.weights(), model.tensor_bytes), (10, 10, 24), "no layer 61 is read");

    let next = r#"{"model_type":"qwen3_next","num_hidden_layers":4,"hidden_size":2048,"num_attention_heads":16,
        "num_key_value_heads":2,"head_dim":256,"linear_num_value_heads":32,"linear_num_key_heads":16,
        "linear_key_head_dim":128,"linear_value_head_dim":128,"linear_conv_kernel_dim":4}"#;
    let state = 4 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096);
    let kept: Vec<_> = layers(next).iter().map(|l| (l.recurrent_bytes, l.kv.is_some())).collect();
    assert_eq!(kept, [(state, false), (state, false), (state, false), (0, true)]);
    let nemotron = r#"{"model_type":"nemotron_h","num_hidden_layers":3,"hidden_size":4096,"num_attention_heads":32,
        "hybrid_override_pattern":"M-*","mamba_num_heads":128,"mamba_head_dim":64,"ssm_state_size":128,"n_groups":8,
        "conv_kernel":4}"#;
    let kept: Vec<_> = layers(nemotron).iter().map(|l| (l.recurrent_bytes, l.kv.is_some())).collect();
    assert_eq!(kept, [(4 * (3 * (8192 + 2 * 8 * 128) + 8192 * 128), false), (0, false), (0, true)]);
    let mamba = r#"{"model_type":"mamba","num_hidden_layers":1,"hidden_size":2560,"state_size":16,"conv_kernel":4,
        "expand":2}"#;
    assert_eq!(layers(mamba)[0].recurrent_bytes, 4 * (3 * 5120 + 16 * 5120));
    let shared = r#"{"model_type":"gemma3n_text","num_hidden_layers":4,"hidden_size":64,"num_attention_heads":4,
        "num_kv_shared_layers":2,"intermediate_size":[1,2,3,4]}"#;
    assert_eq!(layers(shared).iter().filter(|l| l.kv.is_some()).count(), 2);
}

#[test]
fn configs_that_cannot_be_are_refused() {
    let error = |config: &str| of(config).unwrap_err().to_string();
    assert!(error("[]").contains("not an object"));
    assert!(error("{").contains("malformed"));
    assert_eq!(error("{}"), "does not say `model_type`");
    let with = |what: &str| LLAMA.replace("\"num_attention_heads\":32", what);
    assert!(error(&with("\"num_attention_heads\":0")).contains("0 is not possible"));
    assert!(error(&with("\"num_attention_heads\":-1")).contains("not a whole number"));
    assert!(error(&with("\"num_attention_heads\":9223372036854775808")).contains("not a whole number"));
    assert!(error(&LLAMA.replace(":8,", ":0,")).contains("0 is not possible"));
    assert!(error(&LLAMA.replace(":32,\"hidden", ":4000000000,\"hidden")).contains("at most 512"));
    assert!(error(&LLAMA.replace("llama", "rwkv")).contains("cannot be told"));
    assert!(matches!(of(&" ".repeat(300 << 10)), Err(ProfileError::TooLarge { .. })));
    assert!(error(&"[".repeat(10_000)).contains("malformed"), "deep nesting");
    let tensor = |entry: &str| {
        let json = format!(r#"{{"a":{entry}}}"#);
        let bytes = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 64]].concat();
        profile_safetensors(LLAMA.as_bytes(), &bytes).map(|m| m.tensor_bytes).map_err(|e| e.to_string())
    };
    assert_eq!(tensor(r#"{"dtype":"F16","shape":[2,4],"data_offsets":[0,16]}"#), Ok(16));
    assert_eq!(tensor(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,2]}"#), Ok(2));
    assert_eq!(tensor(r#"{"dtype":"NEW","shape":[3],"data_offsets":[0,9]}"#), Ok(9));
    for bad in [
        r#"{"dtype":"F16","shape":[2,4],"data_offsets":[0,15]}"#,
        r#"{"dtype":"F16","shape":[2,4],"data_offsets":[16,0]}"#,
        r#"{"dtype":"F16","shape":[9223372036854775808,4],"data_offsets":[0,16]}"#,
        r#"{"dtype":"F16","shape":[-1],"data_offsets":[0,16]}"#,
        r#"{"dtype":"F16","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,2]}"#,
        r#"{"dtype":"F16","shape":[64],"data_offsets":[0,128]}"#,
        r#"{"dtype":"NEW","shape":[3],"data_offsets":[0,18446744073709551615]}"#,
        r#"{"dtype":"F16","shape":[1]}"#,
        r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}"#,
        "7",
    ] {
        tensor(bad).expect_err(bad);
    }
}
