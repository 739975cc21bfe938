//! The shapes that estimates are compared on: published models, as GGUF headers without weights.

use super::builder::{Builder, Shape};
use crate::gguf::Kind;

/// A transformer with the same heads in every layer.
struct Plain {
    name: &'static str,
    kind: &'static str,
    arch: &'static str,
    /// Layers, embedding length, vocabulary, trained context.
    base: [u32; 4],
    /// Query heads, KV heads, length.
    heads: [u32; 3],
    ff: u64,
    tied: bool,
    bias: bool,
    /// Further norms: of the hidden state's width, and of a head's.
    norms: &'static [&'static str],
    head_norms: &'static [&'static str],
    window: Option<u32>,
    /// Experts, experts used.
    experts: Option<[u32; 2]>,
}

const PLAIN: Plain = Plain {
    name: "",
    kind: "",
    arch: "llama",
    base: [0; 4],
    heads: [0; 3],
    ff: 0,
    tied: false,
    bias: false,
    norms: &[],
    head_norms: &[],
    window: None,
    experts: None,
};

fn plain(p: &Plain) -> Shape {
    let mut b = Builder::new(p.name, p.kind, p.arch, p.base);
    let ([layers, embd, ..], [heads, kv, length]) = (p.base.map(u64::from), p.heads);
    b.heads(heads, kv, length).u("rope.dimension_count", length);
    b.u(if p.arch == "qwen3moe" { "expert_feed_forward_length" } else { "feed_forward_length" }, p.ff as u32);
    if let Some(window) = p.window {
        b.u("attention.sliding_window", window);
    }
    if let Some([experts, used]) = p.experts {
        b.u("expert_count", experts).u("expert_used_count", used);
    }
    if !p.tied {
        b.untied();
    }
    let (q, kv) = (u64::from(heads * length), u64::from(kv * length));
    for layer in 0..layers as usize {
        b.attention(layer, q, kv).norms(layer, &["attn_norm", "ffn_norm"], embd).norms(layer, p.norms, embd);
        b.norms(layer, p.head_norms, u64::from(length));
        if p.bias {
            for (part, width) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
                b.w(&format!("blk.{layer}.{part}.bias"), &[width]);
            }
        }
        match p.experts {
            Some([experts, _]) => b.experts(layer, p.ff, u64::from(experts)),
            None => b.feed_forward(layer, p.ff),
        };
    }
    b.done()
}

const POST: &[&str] = &["post_attention_norm", "post_ffw_norm"];
const QK: &[&str] = &["attn_q_norm", "attn_k_norm"];

/// All shapes.
#[rustfmt::skip]
pub(super) fn all() -> Vec<Shape> {
    let mut all: Vec<Shape> = [
        Plain { name: "Llama-2-7B", kind: "dense, MHA", base: [32, 4096, 32_000, 4096], heads: [32, 32, 128], ff: 11_008, ..PLAIN },
        Plain { name: "Llama-3.1-8B", kind: "dense, GQA", base: [32, 4096, 128_256, 131_072], heads: [32, 8, 128], ff: 14_336, ..PLAIN },
        Plain { name: "Llama-3-70B", kind: "dense, GQA", base: [80, 8192, 128_256, 8192], heads: [64, 8, 128], ff: 28_672, ..PLAIN },
        Plain { name: "Qwen2.5-0.5B", kind: "dense, GQA, tied", arch: "qwen2", base: [24, 896, 151_936, 32_768], heads: [14, 2, 64], ff: 4864, tied: true, bias: true, ..PLAIN },
        Plain { name: "Qwen2.5-7B", kind: "dense, GQA, biases", arch: "qwen2", base: [28, 3584, 152_064, 131_072], heads: [28, 4, 128], ff: 18_944, bias: true, ..PLAIN },
        Plain { name: "Qwen3-8B", kind: "dense, GQA, normed heads", arch: "qwen3", base: [36, 4096, 151_936, 40_960], heads: [32, 8, 128], ff: 12_288, head_norms: QK, ..PLAIN },
        Plain { name: "Gemma-2B", kind: "dense, MQA, tied", arch: "gemma", base: [18, 2048, 256_000, 8192], heads: [8, 1, 256], ff: 16_384, tied: true, ..PLAIN },
        Plain { name: "Gemma-2-9B", kind: "sliding window 1:1, tied", arch: "gemma2", base: [42, 3584, 256_000, 8192], heads: [16, 8, 256], ff: 14_336, tied: true, norms: POST, window: Some(4096), ..PLAIN },
        Plain { name: "Gemma-3-4B", kind: "sliding window 5:1, tied", arch: "gemma3", base: [34, 2560, 262_144, 131_072], heads: [8, 4, 256], ff: 10_240, tied: true, norms: POST, head_norms: QK, window: Some(1024), ..PLAIN },
        Plain { name: "Gemma-3-27B", kind: "sliding window 5:1, tied", arch: "gemma3", base: [62, 5376, 262_144, 131_072], heads: [32, 16, 128], ff: 21_504, tied: true, norms: POST, head_norms: QK, window: Some(1024), ..PLAIN },
        Plain { name: "Mixtral-8x7B", kind: "MoE, 2 of 8", base: [32, 4096, 32_000, 32_768], heads: [32, 8, 128], ff: 14_336, experts: Some([8, 2]), ..PLAIN },
        Plain { name: "Qwen3-30B-A3B", kind: "MoE, 8 of 128", arch: "qwen3moe", base: [48, 2048, 151_936, 40_960], heads: [32, 4, 128], ff: 768, head_norms: QK, experts: Some([128, 8]), ..PLAIN },
    ]
    .iter()
    .map(plain)
    .collect();
    all.extend([gpt_oss(), openelm(), deci(), phi3(), deepseek2(), mamba(), mamba2(), rwkv7(), jamba(), falcon_h1()]);
    all.extend([nemotron_h(), granite_hybrid(), qwen3next(), lfm2()]);
    all
}

fn gpt_oss() -> Shape {
    let (layers, e, vocab) = (24, 2880, 201_088);
    let mut b = Builder::new("gpt-oss-20B", "MoE, window 1:1, sinks", "gpt-oss", [layers, e, vocab, 131_072]);
    b.heads(64, 8, 64).u("rope.dimension_count", 64).u("attention.sliding_window", 128).u("feed_forward_length", 2880);
    b.u("expert_count", 32).u("expert_used_count", 4).u("expert_feed_forward_length", 2880);
    let (e, x) = (u64::from(e), 2880_u64);
    b.typed("output.weight", &[e, u64::from(vocab)], Kind::Q8_0);
    for i in 0..layers as usize {
        b.attention(i, 4096, 512).norms(i, &["attn_norm", "post_attention_norm"], e).l(i, "attn_sinks", &[64]);
        b.l(i, "ffn_gate_inp", &[e, 32]);
        for (part, dims) in [("ffn_gate_exps", [e, x, 32]), ("ffn_up_exps", [e, x, 32]), ("ffn_down_exps", [x, e, 32])]
        {
            b.typed(&format!("blk.{i}.{part}.weight"), &dims, Kind::Mxfp4);
            b.w(&format!("blk.{i}.{part}.bias"), &[dims[1], 32]);
        }
        for (part, width) in
            [("attn_q", 4096), ("attn_k", 512), ("attn_v", 512), ("attn_output", e), ("ffn_gate_inp", 32)]
        {
            b.w(&format!("blk.{i}.{part}.bias"), &[width]);
        }
    }
    b.done()
}

fn openelm() -> Shape {
    let layers = 36;
    let mut b = Builder::new("OpenELM-3B", "per-layer heads, tied", "openelm", [layers, 3072, 32_000, 2048]);
    let kv: Vec<u32> = (0..layers).map(|i| 3 + i * 3 / (layers - 1)).collect();
    let heads: Vec<u32> = kv.iter().map(|n| n * 4).collect();
    let ff: Vec<u32> = (0..layers).map(|i| (1536 + i * 10_752 / (layers - 1)) / 256 * 256).collect();
    b.us("attention.head_count", &heads).us("attention.head_count_kv", &kv).us("feed_forward_length", &ff);
    b.lengths(128, 128).u("rope.dimension_count", 128);
    b.shape.ollama = [u64::from(layers), 3, 3072, 24];
    for i in 0..layers as usize {
        let (q, n) = (u64::from(heads[i]) * 128, u64::from(kv[i]) * 128);
        b.l(i, "attn_qkv", &[3072, q + 2 * n]).l(i, "attn_output", &[q, 3072]).norms(i, QK, 128);
        b.norms(i, &["attn_norm", "ffn_norm"], 3072).feed_forward(i, u64::from(ff[i]));
    }
    b.done()
}

fn deci() -> Shape {
    let layers = 80;
    let mut b = Builder::new("Nemotron-51B", "layers without attention", "deci", [layers, 8192, 128_256, 131_072]);
    // Every fourth layer of the second half has no attention, every fifth fewer KV heads, as the published model's kind.
    let kv: Vec<u32> = (0..layers)
        .map(|i| {
            if i > 40 && i % 4 == 0 {
                0
            } else if i % 5 == 0 {
                4
            } else {
                8
            }
        })
        .collect();
    let heads: Vec<u32> = kv.iter().map(|n| if *n == 0 { 0 } else { 64 }).collect();
    let ff: Vec<u32> = (0..layers).map(|i| if i % 3 == 0 { 14_336 } else { 28_672 }).collect();
    b.us("attention.head_count", &heads).us("attention.head_count_kv", &kv).us("feed_forward_length", &ff);
    b.lengths(128, 128).u("rope.dimension_count", 128).untied();
    b.shape.ollama = [u64::from(layers), 0, 8192, 64];
    for i in 0..layers as usize {
        if kv[i] > 0 {
            b.attention(i, 8192, u64::from(kv[i]) * 128).norms(i, &["attn_norm"], 8192);
        }
        b.norms(i, &["ffn_norm"], 8192).feed_forward(i, u64::from(ff[i]));
    }
    b.done()
}

fn phi3() -> Shape {
    let mut b = Builder::new("Phi-3-mini", "dense, fused projections", "phi3", [32, 3072, 32_064, 131_072]);
    b.heads(32, 32, 96).u("rope.dimension_count", 96).u("feed_forward_length", 8192).untied();
    for i in 0..32 {
        b.l(i, "attn_qkv", &[3072, 9216]).l(i, "attn_output", &[3072, 3072]);
        b.norms(i, &["attn_norm", "ffn_norm"], 3072).l(i, "ffn_up", &[3072, 16_384]).l(i, "ffn_down", &[8192, 3072]);
    }
    b.done()
}

fn deepseek2() -> Shape {
    let (layers, e, heads) = (27, 2048, 16_u64);
    let mut b = Builder::new("DeepSeek-V2-Lite", "MLA, MoE 6 of 64", "deepseek2", [layers, 2048, 102_400, 163_840]);
    b.heads(16, 1, 576).u("attention.key_length_mla", 192).u("attention.value_length_mla", 128);
    b.u("attention.kv_lora_rank", 512).u("rope.dimension_count", 64).u("leading_dense_block_count", 1);
    b.u("feed_forward_length", 10_944).u("expert_feed_forward_length", 1408).u("expert_count", 64);
    b.u("expert_used_count", 6).u("expert_shared_count", 2).untied();
    for i in 0..layers as usize {
        b.norms(i, &["attn_norm", "ffn_norm"], e).l(i, "attn_kv_a_norm", &[512]).l(i, "attn_q", &[e, heads * 192]);
        b.l(i, "attn_kv_a_mqa", &[e, 576]).l(i, "attn_k_b", &[128, 512, heads]).l(i, "attn_v_b", &[512, 128, heads]);
        b.l(i, "attn_output", &[heads * 128, e]);
        if i == 0 {
            b.feed_forward(i, 10_944);
        } else {
            b.experts(i, 1408, 64).shared_expert(i, 2816);
        }
    }
    b.done()
}

fn mamba() -> Shape {
    let mut b = Builder::new("Mamba-2.8B", "recurrent, tied", "mamba", [64, 2560, 50_280, 1_048_576]);
    b.ssm(4, 5120, 16, 160, None).u("feed_forward_length", 0).u("attention.head_count", 0);
    for i in 0..64 {
        b.norms(i, &["attn_norm"], 2560).mamba(i, [4, 5120, 16, 160]);
    }
    b.done()
}

fn mamba2() -> Shape {
    let mut b = Builder::new("Mamba2-2.7B", "recurrent, tied", "mamba2", [64, 2560, 50_288, 1_048_576]);
    b.ssm(4, 5120, 128, 80, Some(1)).u("feed_forward_length", 0).u("attention.head_count", 0);
    for i in 0..64 {
        b.norms(i, &["attn_norm"], 2560).mamba2(i, [4, 5120, 128, 80, 1]);
    }
    b.done()
}

fn rwkv7() -> Shape {
    let (e, ff) = (2560, 10_240);
    let mut b = Builder::new("RWKV7-2.9B", "recurrent", "rwkv7", [32, 2560, 65_536, 1_048_576]);
    b.f("attention.layer_norm_epsilon", 1e-5).u("wkv.head_size", 64).u("attention.decay_lora_rank", 96);
    b.u("attention.iclr_lora_rank", 96).u("attention.value_residual_mix_lora_rank", 64);
    b.u("attention.gate_lora_rank", 320).u("token_shift_count", 2).u("feed_forward_length", 10_240);
    b.u("attention.head_count", 0).untied().w("output_norm.bias", &[e]);
    b.w("token_embd_norm.weight", &[e]).w("token_embd_norm.bias", &[e]);
    for i in 0..32 {
        for norm in ["attn_norm", "attn_norm_2", "time_mix_ln"] {
            b.l(i, norm, &[e]).w(&format!("blk.{i}.{norm}.bias"), &[e]);
        }
        for (part, rank) in [("w", 96), ("a", 96), ("v", if i == 0 { 96 } else { 64 })] {
            b.l(i, &format!("time_mix_{part}0"), &[e]).l(i, &format!("time_mix_{part}1"), &[e, rank]);
            b.l(i, &format!("time_mix_{part}2"), &[rank, e]);
        }
        b.l(i, "time_mix_g1", &[e, 320]).l(i, "time_mix_g2", &[320, e]).l(i, "time_mix_lerp_fused", &[e, 1, 1, 6]);
        b.norms(i, &["time_mix_k_k", "time_mix_k_a", "time_mix_r_k", "channel_mix_lerp_k"], e);
        for part in ["key", "value", "receptance", "output"] {
            b.l(i, &format!("time_mix_{part}"), &[e, e]);
        }
        b.l(i, "channel_mix_key", &[e, ff]).l(i, "channel_mix_value", &[ff, e]);
    }
    b.done()
}

fn jamba() -> Shape {
    let (layers, e) = (32_u32, 4096);
    let mut b = Builder::new("Jamba-52B", "hybrid, MoE 2 of 16", "jamba", [layers, 4096, 65_536, 262_144]);
    let kv: Vec<u32> = (0..layers).map(|i| if i % 8 == 4 { 8 } else { 0 }).collect();
    b.u("attention.head_count", 32).us("attention.head_count_kv", &kv).ssm(4, 8192, 16, 256, None);
    b.u("feed_forward_length", 14_336).u("expert_count", 16).u("expert_used_count", 2).untied();
    b.shape.ollama = [u64::from(layers), 0, e, 32];
    for (i, kv) in kv.into_iter().enumerate() {
        b.norms(i, &["attn_norm", "ffn_norm"], e);
        if kv > 0 {
            b.attention(i, e, 1024);
        } else {
            b.mamba(i, [4, 8192, 16, 256]).l(i, "ssm_dt_norm", &[256]).norms(i, &["ssm_b_norm", "ssm_c_norm"], 16);
        }
        if i % 2 == 1 {
            b.experts(i, 14_336, 16);
        } else {
            b.feed_forward(i, 14_336);
        }
    }
    b.done()
}

fn falcon_h1() -> Shape {
    let mut b =
        Builder::new("Falcon-H1-7B", "attention and state in each layer", "falcon-h1", [44, 3072, 130_048, 262_144]);
    b.heads(12, 2, 128).u("rope.dimension_count", 128).ssm(4, 3072, 256, 24, Some(1));
    b.u("feed_forward_length", 12_288).untied();
    for i in 0..44 {
        b.norms(i, &["attn_norm"], 3072).w(&format!("blk.{i}.ffn_norm"), &[3072]).attention(i, 1536, 256);
        b.mamba2(i, [4, 3072, 256, 24, 1]).feed_forward(i, 12_288);
    }
    b.done()
}

fn nemotron_h() -> Shape {
    let layers = 52_u32;
    let mut b =
        Builder::new("Nemotron-H-8B", "hybrid, three kinds of layers", "nemotron_h", [layers, 4096, 131_072, 8192]);
    let attention = [7, 18, 29, 40];
    let kv: Vec<u32> = (0..layers).map(|i| if attention.contains(&i) { 8 } else { 0 }).collect();
    let ff: Vec<u32> = (0..layers).map(|i| if kv[i as usize] == 0 && i % 2 == 1 { 21_504 } else { 0 }).collect();
    b.u("attention.head_count", 32).us("attention.head_count_kv", &kv).lengths(128, 128).us("feed_forward_length", &ff);
    b.f("attention.layer_norm_epsilon", 1e-5).ssm(4, 8192, 128, 128, Some(8)).untied();
    b.u("rope.dimension_count", 128);
    b.shape.ollama = [u64::from(layers), 0, 4096, 32];
    for i in 0..layers as usize {
        b.norms(i, &["attn_norm"], 4096);
        if kv[i] > 0 {
            b.attention(i, 4096, 1024);
        } else if ff[i] > 0 {
            b.l(i, "ffn_up", &[4096, 21_504]).l(i, "ffn_down", &[21_504, 4096]);
        } else {
            b.mamba2(i, [4, 8192, 128, 128, 8]);
        }
    }
    b.done()
}

fn granite_hybrid() -> Shape {
    let layers = 40_u32;
    let mut b = Builder::new(
        "Granite-4-H-tiny",
        "hybrid, MoE 6 of 64, tied",
        "granitehybrid",
        [layers, 1536, 100_352, 131_072],
    );
    let kv: Vec<u32> = (0..layers).map(|i| if i % 10 == 5 { 4 } else { 0 }).collect();
    b.u("attention.head_count", 12).us("attention.head_count_kv", &kv).ssm(4, 3072, 128, 48, Some(1));
    b.u("feed_forward_length", 512).u("expert_count", 64).u("expert_used_count", 6);
    b.u("expert_shared_feed_forward_length", 1024).u("rope.dimension_count", 128);
    b.shape.ollama = [u64::from(layers), 0, 1536, 12];
    for (i, kv) in kv.into_iter().enumerate() {
        b.norms(i, &["attn_norm", "ffn_norm"], 1536);
        if kv > 0 {
            b.attention(i, 1536, 512);
        } else {
            b.mamba2(i, [4, 3072, 128, 48, 1]);
        }
        b.experts(i, 512, 64).shared_expert(i, 1024);
    }
    b.done()
}

fn qwen3next() -> Shape {
    let mut b = Builder::new(
        "Qwen3-Next-80B-A3B",
        "hybrid, delta net, MoE 10 of 512",
        "qwen3next",
        [48, 2048, 151_936, 262_144],
    );
    b.heads(16, 2, 256).u("rope.dimension_count", 64).ssm(4, 4096, 128, 32, Some(16)).u("full_attention_interval", 4);
    b.u("expert_count", 512).u("expert_used_count", 10).u("expert_feed_forward_length", 512);
    b.u("expert_shared_feed_forward_length", 512).u("feed_forward_length", 5120).untied();
    for i in 0..48 {
        b.norms(i, &["attn_norm", "post_attention_norm"], 2048);
        if i % 4 == 3 {
            b.l(i, "attn_q", &[2048, 8192]).l(i, "attn_k", &[2048, 512]).l(i, "attn_v", &[2048, 512]);
            b.l(i, "attn_output", &[4096, 2048]).norms(i, QK, 256);
        } else {
            b.l(i, "attn_qkv", &[2048, 8192]).l(i, "attn_gate", &[2048, 4096]).l(i, "ssm_conv1d", &[4, 8192]);
            b.w(&format!("blk.{i}.ssm_dt.bias"), &[32]).w(&format!("blk.{i}.ssm_a"), &[32]);
            b.l(i, "ssm_ba", &[2048, 64]).l(i, "ssm_norm", &[128]).l(i, "ssm_out", &[4096, 2048]);
        }
        b.experts(i, 512, 512).shared_expert(i, 512).l(i, "ffn_gate_inp_shexp", &[2048]);
    }
    b.done()
}

fn lfm2() -> Shape {
    let mut b = Builder::new("LFM2-1.2B", "hybrid, short convolutions, tied", "lfm2", [16, 2048, 65_536, 128_000]);
    let kv: Vec<u32> = (0..16).map(|i| if [2, 5, 8, 10, 12, 14].contains(&i) { 8 } else { 0 }).collect();
    b.u("attention.head_count", 32).us("attention.head_count_kv", &kv).u("shortconv.l_cache", 3);
    b.u("feed_forward_length", 8192).u("rope.dimension_count", 64);
    b.shape.ollama = [16, 0, 2048, 32];
    // This architecture calls its output norm by another name.
    b.shape.tensors.retain(|t| t.name != "output_norm.weight");
    b.w("token_embd_norm.weight", &[2048]);
    for (i, kv) in kv.into_iter().enumerate() {
        b.norms(i, &["attn_norm", "ffn_norm"], 2048).feed_forward(i, 8192);
        if kv > 0 {
            b.attention(i, 2048, 512).norms(i, QK, 64);
        } else {
            b.l(i, "shortconv.conv", &[3, 2048]).l(i, "shortconv.in_proj", &[2048, 6144]);
            b.l(i, "shortconv.out_proj", &[2048, 2048]);
        }
    }
    b.done()
}
