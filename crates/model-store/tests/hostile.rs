//! Headers made to harm: each is a typed error, quickly and in little memory.

mod support;

use model_store::{ProfileError, profile_safetensors};
use proptest::prelude::*;
use support::{F16, F32, Gguf, Q4_K, profile_bytes, string};
use tokio::time::{Duration, Instant};

fn small() -> Gguf {
    Gguf::dense("llama", 2, 64, 4, 2)
        .u32("general.alignment", 32)
        .list("rope.dimension_sections", &[1, 2, 3])
        .strings("tokenizer.ggml.tokens", ["a", "bc"].into_iter())
        .text("tokenizer.chat_template", &"x".repeat(100))
        .weights(2, 10, 64, 16)
}

fn problem(file: &Gguf) -> String {
    file.profile().expect_err("a bad header").to_string()
}

#[test]
fn a_header_cut_anywhere_is_cut_short() {
    let header = small().header();
    for end in 4..header.len() {
        let error = profile_bytes(&header[..end]).expect_err("a header cut short");
        assert!(matches!(error, ProfileError::CutShort { .. }), "{end}: {error}");
    }
    assert!(matches!(profile_bytes(&header), Err(ProfileError::CutShort { what: "the last tensor", .. })), "no data");
    let mut sparse = small().sparse();
    sparse.length -= 1;
    assert!(matches!(model_store::profile_gguf(sparse), Err(ProfileError::CutShort { what: "the last tensor", .. })));
    small().profile().unwrap();
}

#[test]
fn counts_that_no_model_has_are_refused_before_anything_is_read() {
    let started = Instant::now();
    let with = |at: usize, value: u64| {
        let mut header = small().header();
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        profile_bytes(&header).unwrap_err()
    };
    for count in [1u64 << 63, u64::MAX, 1 << 40, 32_769] {
        for at in [8, 16, 24] {
            assert!(matches!(with(at, count), ProfileError::TooLarge { .. }), "{at}: {count}");
        }
    }
    let array = |kind: u32, count: u64| {
        let value = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
        Gguf::dense("llama", 1, 64, 4, 2).raw("x", 9, &value).profile().unwrap_err()
    };
    for kind in [0, 4, 8, 10] {
        for count in [1u64 << 63, u64::MAX, 1 << 61, (1 << 61) + 1] {
            assert!(matches!(array(kind, count), ProfileError::TooLarge { .. }), "{kind}: {count}");
        }
        assert!(matches!(array(kind, 1 << 23), ProfileError::CutShort { .. }), "{kind}");
    }
    assert!(matches!(array(9, 1), ProfileError::Malformed(_)), "arrays of arrays");
    assert!(matches!(array(13, 1), ProfileError::Malformed(_)));
    let text = Gguf::dense("llama", 1, 64, 4, 2).raw("x", 8, &u64::MAX.to_le_bytes());
    assert!(matches!(text.profile(), Err(ProfileError::CutShort { .. })));
    assert!(started.elapsed() < Duration::from_millis(100), "{:?}", started.elapsed());
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let base = || Gguf::dense("llama", 1, 64, 4, 2);
    let of = |shape: &[u64], kind: u32, offset: u64| problem(&base().raw_tensor("t", shape, kind, offset));
    assert!(of(&[1 << 62, 4], F32, 0).contains("larger than any file"));
    assert!(of(&[u64::MAX], F32, 0).contains("larger than any file"));
    assert!(of(&[1 << 63, 0], F32, 0).contains("larger than any file"));
    assert!(of(&[32], F32, i64::MAX as u64 & !31).contains("larger than any file"));
    assert!(of(&[32], F32, !31).contains("larger than any file"));
    assert!(of(&[1 << 40], F32, 0).contains("cut short"));
    assert!(of(&[32], F32, 1 << 40).contains("cut short"));
    assert!(of(&[32], F32, 8).contains("odd place"));
    assert!(of(&[100], Q4_K, 0).contains("rows of 100, which type Q4_K cannot store"));
    assert!(of(&[1, 1, 1, 1, 1], F32, 0).contains("5 dimensions"));
    for removed in [4, 31, 43, u32::MAX] {
        assert!(of(&[32], removed, 0).contains("is not known"), "{removed}");
    }
    assert_eq!(problem(&base().tensor("t", &[1], F32, 4).tensor("t", &[1], F32, 4)), "has the tensor `t` twice");
    let long = "x".repeat(64);
    assert!(problem(&base().raw_tensor(&long, &[1], F32, 0)).contains("a tensor name length of 64; at most 63"));
    assert_eq!(base().tensor("t", &[0, 5], F16, 0).profile().unwrap().tensor_bytes, 0, "nothing is something");
}

#[test]
fn keys_that_cannot_be_are_refused() {
    let base = || Gguf::dense("llama", 2, 64, 4, 2);
    assert_eq!(problem(&base().n("block_count", 3)), "has the key `llama.block_count` twice");
    for alignment in [0, 3, 48, 1 << 30] {
        assert!(problem(&base().u32("general.alignment", alignment)).contains("not a power of two"), "{alignment}");
    }
    assert_eq!(problem(&Gguf::default()), "does not say `general.architecture`");
    assert_eq!(problem(&Gguf::default().text("general.architecture", "llama")), "does not say `llama.block_count`");
    for (layers, embedding) in [(0, 64), (513, 64), (u32::MAX, 64), (2, 0)] {
        Gguf::dense("llama", layers, embedding, 4, 2).profile().expect_err("no such model");
    }
    // Without heads any context would seem free.
    for (heads, heads_kv) in [(0, 0), (0, 4), (4, 0)] {
        let error = Gguf::dense("llama", 2, 64, heads, heads_kv).profile().unwrap_err();
        assert!(matches!(&error, ProfileError::Value { .. }), "{heads} {heads_kv}: {error}");
    }
    let without = Gguf::new("llama", 2, 64, 9).profile();
    assert_eq!(without, Err(ProfileError::Missing("llama.attention.head_count".into())));
    let list = Gguf::new("llama", 2, 64, 9).list("attention.head_count", &[4, 4, 4]);
    assert!(problem(&list).contains("3 values for 2 layers"));
    let negative = base().raw("llama.attention.key_length", 5, &(-1i32).to_le_bytes());
    assert!(problem(&negative).contains("not a whole number"));
    let wide = base().raw("llama.attention.key_length", 10, &(1u64 << 32).to_le_bytes());
    assert!(problem(&wide).contains("too large"));
    let huge = Gguf::new("mamba", 1, u32::MAX, 9).n("ssm.conv_kernel", u32::MAX).n("ssm.inner_size", u32::MAX);
    assert!(problem(&huge.n("ssm.state_size", u32::MAX)).contains("larger than any memory"));
    let name = Gguf::default().raw("general.architecture", 8, &string(&"x".repeat(4000)));
    assert!(problem(&name).contains("not a short name"));
    let control = Gguf::default().text("general.architecture", "\x1b[2J").u32("\x1b[2J", 1);
    assert!(!problem(&control).contains('\x1b'));
}

const CONFIG: &[u8] = br#"{"model_type":"llama","num_hidden_layers":2,"hidden_size":64,"num_attention_heads":4,
"num_key_value_heads":2,"layer_types":["full_attention","sliding_attention"],"sliding_window":8}"#;

fn safetensors() -> Vec<u8> {
    let json =
        br#"{"__metadata__":{"format":"pt"},"model.layers.0.a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},
"lm_head.weight":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;
    [&(json.len() as u64).to_le_bytes()[..], json, &[0; 12]].concat()
}

#[test]
fn a_safetensors_file_cut_anywhere_is_an_error() {
    let file = safetensors();
    profile_safetensors(CONFIG, &file).unwrap();
    for end in 0..file.len() {
        let error = profile_safetensors(CONFIG, &file[..end]).unwrap_err();
        assert!(matches!(error, ProfileError::CutShort { .. }), "{end}: {error}");
    }
    for end in 0..CONFIG.len() {
        profile_safetensors(&CONFIG[..end], &file).expect_err("half a config");
    }
    for size in [u64::MAX, 1 << 63, 5 << 20] {
        let mut long = file.clone();
        long[..8].copy_from_slice(&size.to_le_bytes());
        assert!(matches!(profile_safetensors(CONFIG, &long), Err(ProfileError::TooLarge { .. })));
    }
}

/// Reads anything; what matters is that it comes back.
fn both(bytes: &[u8]) {
    if let Ok(model) = profile_bytes(bytes) {
        assert!(model.weights() <= model.tensor_bytes && model.layers.len() <= 513);
        let _ = model.kv_numbers_per_token();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), keys in 0u64..20, tensors in 0u64..20) {
        both(&bytes);
        both(&[b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &keys.to_le_bytes(), &bytes].concat());
    }

    #[test]
    fn changed_headers_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        arch in prop::sample::select(&["llama", "gemma3", "mamba", "jamba", "qwen3next", "glm-dsa", "nemotron_h", "minimax-m3"][..]),
        numbers in prop::collection::vec(prop_oneof![0u32..9, any::<u32>()], 14),
    ) {
        let names = [
            "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.sliding_window",
            "attention.sliding_window_pattern", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count",
            "nextn_predict_layers", "attention.indexer.key_length", "full_attention_interval", "expert_count",
            "feed_forward_length",
        ];
        let file = names.iter().zip(&numbers).fold(Gguf::new(arch, 6, 64, 4096), |f, (name, n)| f.n(name, *n)).weights(6, 4, 8, 4);
        let mut bytes = file.header();
        bytes.resize(file.length() as usize, 0);
        both(&bytes);
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        both(&bytes);
    }

    #[test]
    fn changed_safetensors_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_config in any::<bool>(),
    ) {
        let (mut config, mut file) = (CONFIG.to_vec(), safetensors());
        let bytes = if in_config { &mut config } else { &mut file };
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        let _ = profile_safetensors(&config, &file);
    }
}
