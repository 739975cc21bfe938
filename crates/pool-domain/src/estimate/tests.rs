//! Oracles: published figures, and what the real engine said.

use proptest::prelude::*;

use super::llama_cpp::{context_layout, estimate, estimate_single, layer_loads, output_load};
use super::*;
use crate::model::{KvShape, LayerProfile, ModelFormat, ModelProfile};

fn model(architecture: &str, embedding_length: u64, vocabulary: u64, layers: Vec<LayerProfile>) -> ModelProfile {
    ModelProfile {
        format: ModelFormat::Gguf,
        architecture: architecture.into(),
        layers,
        input_bytes: 300 * MIB,
        output_bytes: 400 * MIB,
        other_bytes: 0,
        tied_embeddings: false,
        embedding_bytes: 300 * MIB,
        embedding_length,
        context_length: 131_072,
        vocabulary,
        experts: 0,
        experts_used: 0,
        quantisation: "Q4_K_M".into(),
        tensor_bytes: 0,
        header_digest: String::new(),
    }
}

fn attention(heads: u32, heads_kv: u32, length: u32, feed_forward_length: u64) -> LayerProfile {
    let kv = Some(KvShape { heads_kv, key_length: length, value_length: length, window: None });
    LayerProfile { bytes: 100 * MIB, heads, kv, recurrent_bytes: 0, feed_forward_length }
}

fn llama_3_8b() -> ModelProfile {
    model("llama", 4096, 128_256, vec![attention(32, 8, 128, 14_336); 32])
}

fn gemma_2_9b() -> ModelProfile {
    let mut layers = vec![attention(16, 8, 256, 14_336); 42];
    layers.iter_mut().step_by(2).filter_map(|l| l.kv.as_mut()).for_each(|kv| kv.window = Some(4096));
    model("gemma2", 3584, 256_000, layers)
}

fn qwen3_30b_a3b() -> ModelProfile {
    let layers = vec![attention(32, 4, 128, 768); 48];
    ModelProfile { experts: 128, experts_used: 8, ..model("qwen3moe", 2048, 151_936, layers) }
}

fn deepseek_v2_lite() -> ModelProfile {
    let kv = Some(KvShape { heads_kv: 1, key_length: 576, value_length: 0, window: None });
    let mut layers = vec![LayerProfile { kv, bytes: 400 * MIB, ..attention(16, 1, 576, 1408) }; 27];
    layers[0] = LayerProfile { bytes: 50 * MIB, feed_forward_length: 10_944, ..layers[0] };
    ModelProfile { experts: 64, experts_used: 6, ..model("deepseek2", 2048, 102_400, layers) }
}

fn jamba_52b() -> ModelProfile {
    let of = |i: usize| {
        let layer = if i % 8 == 4 {
            attention(32, 8, 128, 14_336)
        } else {
            LayerProfile {
                recurrent_bytes: 4 * (3 * 8192 + 16 * 8192),
                feed_forward_length: 14_336,
                ..LayerProfile::default()
            }
        };
        LayerProfile { bytes: if i % 2 == 1 { 1600 * MIB } else { 160 * MIB }, ..layer }
    };
    ModelProfile { experts: 16, experts_used: 2, ..model("jamba", 4096, 65_536, (0..32).map(of).collect()) }
}

fn mamba_2_8b() -> ModelProfile {
    let recurrent_bytes = 4 * (3 * 5120 + 16 * 5120);
    let layer = LayerProfile { bytes: 20 * MIB, recurrent_bytes, ..LayerProfile::default() };
    model("mamba", 2560, 50_280, vec![layer; 64])
}

/// Keys and values of `context` tokens and the compute buffer, in whole MiB, of a CPU build.
fn measured(profile: &ModelProfile, context: u64, slots: u32, kv: KvType, flash: bool) -> (u64, u64) {
    let settings = LlamaCppSettings {
        context,
        slots,
        kv_type_k: kv,
        kv_type_v: kv,
        flash_attention: if flash { FlashAttention::On } else { FlashAttention::Off },
        gpu_layers: Some(0),
        outputs: Outputs::Batch,
        ..LlamaCppSettings::default()
    };
    let host = estimate_single(profile, &settings, Overheads::NONE).unwrap().host;
    (host.kv / MIB, host.compute / MIB)
}

/// `llama-fit-params -m FILE -c CONTEXT -np SLOTS -ctk TYPE -ctv TYPE -fa FLASH --no-repack --fit-print on` of llama.cpp
/// b11434 printed these; FILE has the shape and no weights (`cargo xtask estimates` makes such files and the whole table).
#[test]
fn what_the_real_engine_said() {
    use KvType::{F16, Q4_0, Q8_0};
    let rows: &[(&ModelProfile, u64, u32, KvType, bool, u64, u64)] = &[
        (&llama_3_8b(), 4096, 1, F16, true, 512, 294),
        (&llama_3_8b(), 4096, 1, F16, false, 512, 316),
        (&llama_3_8b(), 8192, 1, F16, true, 1024, 298),
        (&llama_3_8b(), 8192, 1, Q8_0, true, 544, 298),
        (&llama_3_8b(), 32_768, 4, Q8_0, true, 2176, 298),
        (&llama_3_8b(), 131_072, 1, F16, true, 16_384, 418),
        (&gemma_2_9b(), 4096, 1, F16, true, 1344, 543),
        (&gemma_2_9b(), 32_768, 1, F16, true, 6132, 579),
        (&gemma_2_9b(), 32_768, 1, F16, false, 6132, 1164),
        (&gemma_2_9b(), 32_768, 4, Q4_0, true, 2362, 548),
        (&qwen3_30b_a3b(), 32_768, 1, F16, true, 3072, 348),
        (&qwen3_30b_a3b(), 32_768, 1, F16, false, 3072, 2150),
        (&deepseek_v2_lite(), 32_768, 1, F16, true, 972, 252),
        (&deepseek_v2_lite(), 32_768, 1, Q8_0, true, 516, 252),
        (&deepseek_v2_lite(), 32_768, 1, F16, false, 972, 1180),
        (&jamba_52b(), 4096, 1, F16, true, 80, 212),
        (&jamba_52b(), 32_768, 4, F16, true, 578, 216),
        (&jamba_52b(), 131_072, 1, Q4_0, true, 592, 336),
        (&mamba_2_8b(), 131_072, 1, F16, true, 23, 123),
    ];
    for (profile, context, slots, kv, flash, keys_and_values, compute) in rows.iter().copied() {
        let ours = measured(profile, context, slots, kv, flash);
        let case = format!("{} {context} {slots} {kv} {flash}", profile.architecture);
        assert_eq!(ours.0, keys_and_values, "{case}");
        assert!(ours.1.abs_diff(compute) <= 8, "{case}: engine {compute}, estimate {}", ours.1);
    }
}

/// A layer without heads gets values as wide as the widest, but only where attention is not fused
/// (80 layers, every fourth of the second half without attention: 1016 and 1148 MiB).
#[test]
fn values_are_padded_without_flash_attention() {
    let of = |i: u32| {
        let heads_kv = if i.is_multiple_of(5) { 4 } else { 8 };
        let layer = attention(64, heads_kv, 128, 28_672);
        if i > 40 && i.is_multiple_of(4) { LayerProfile { heads: 0, kv: None, ..layer } } else { layer }
    };
    let deci = model("deci", 8192, 128_256, (0..80).map(of).collect());
    assert_eq!(measured(&deci, 4096, 1, KvType::F16, true).0, 1016);
    assert_eq!(measured(&deci, 4096, 1, KvType::F16, false).0, 1148);
}

/// llama-server itself, SmolLM2-135M, `-c 8192 -np 4 -fa on --no-repack -lv 5`: "CPU KV buffer size = 180.00 MiB",
/// "CPU compute buffer size = 16.64 MiB": logits for one token of each slot only.
#[test]
fn a_server_needs_logits_for_its_slots_only() {
    let smol = model("llama", 576, 49_152, vec![attention(9, 3, 64, 1536); 30]);
    let settings = LlamaCppSettings { context: 8192, slots: 4, gpu_layers: Some(0), ..LlamaCppSettings::default() };
    let host = estimate_single(&smol, &settings, Overheads::NONE).unwrap().host;
    assert_eq!(host.kv, 180 * MIB);
    assert!(host.compute.abs_diff(1664 * MIB / 100) < MIB / 10, "{}", host.compute);
    let batch = LlamaCppSettings { outputs: Outputs::Batch, ..settings };
    assert_eq!(estimate_single(&smol, &batch, Overheads::NONE).unwrap().host.compute / MIB, 103);
}

/// llama-server with the shape of Gemma-3-4B, `-c 32768 -np 4 -kvu -fa on --no-repack -lv 5`: "KV buffer size = 640.00
/// MiB" and "522.00 MiB", "compute buffer size = 121.53 MiB". With Llama-3.1-8B's: 4096 and 156.02 MiB.
#[test]
fn one_cache_for_all_slots() {
    let mut layers = vec![attention(8, 4, 256, 10_240); 34];
    let bounded = layers.iter_mut().enumerate().filter(|(i, _)| i % 6 < 5);
    bounded.filter_map(|(_, l)| l.kv.as_mut()).for_each(|kv| kv.window = Some(1024));
    let settings = LlamaCppSettings {
        context: 32_768,
        slots: 4,
        kv_unified: true,
        gpu_layers: Some(0),
        ..LlamaCppSettings::default()
    };
    for (profile, kv, compute) in [(model("gemma3", 2560, 262_144, layers), 1162, 121), (llama_3_8b(), 4096, 156)] {
        let host = estimate_single(&profile, &settings, Overheads::NONE).unwrap().host;
        assert_eq!((host.kv, host.compute / MIB), (kv * MIB, compute), "{}", profile.architecture);
    }
}

/// Published: Llama-3.1-8B, Qwen2.5-7B and Llama-3-70B keep so many bytes a token in f16.
#[test]
fn bytes_per_token() {
    for (layers, heads_kv, bytes) in [(32, 8, 131_072), (28, 4, 57_344), (80, 8, 327_680)] {
        let profile = model("llama", 4096, 1000, vec![attention(64, heads_kv, 128, 1); layers]);
        let settings = LlamaCppSettings { context: 8192, ..LlamaCppSettings::default() };
        let kv = estimate_single(&profile, &settings, Overheads::NONE).unwrap().devices[0].kv;
        assert_eq!(kv, bytes * 8192);
    }
}

#[test]
fn types_have_exact_bytes() {
    let bytes: Vec<u64> = KvType::ALL.iter().map(|t| t.bytes(128)).collect();
    assert_eq!(bytes, [512, 256, 256, 136, 96, 88, 80, 72, 72]);
    for kv in KvType::ALL {
        assert_eq!(kv.name().parse(), Ok(kv));
    }
    assert!("q2_k".parse::<KvType>().unwrap_err().to_string().contains("q8_0"));
    assert_eq!(KvType::Q8_0.bytes(33), 68);
    assert_eq!(KvType::F32.bytes(u64::MAX), u64::MAX);
}

#[test]
fn the_context_is_laid_out_as_the_engine_does() {
    let layout = |context, slots, kv_unified| {
        let s = LlamaCppSettings { context, slots, kv_unified, ..LlamaCppSettings::default() };
        let layout = context_layout(&llama_3_8b(), &s).unwrap();
        (layout.cells, layout.streams, layout.tokens)
    };
    assert_eq!(layout(8192, 1, false), (8192, 1, 512));
    assert_eq!(layout(1000, 1, false), (1024, 1, 512));
    assert_eq!(layout(1000, 3, false), (512, 3, 513));
    assert_eq!(layout(8192, 4, true), (8192, 1, 512));
    assert_eq!(layout(100, 1, false), (256, 1, 100));
    assert_eq!(layout(0, 1, false), (131_072, 1, 512));
}

#[test]
fn layers_go_where_they_are_assigned() {
    let mut profile = llama_3_8b();
    profile.tied_embeddings = true;
    let settings = LlamaCppSettings { context: 8192, ..LlamaCppSettings::default() };
    let layers: Vec<usize> = (0..32).map(|i| usize::from(i >= 20)).collect();
    let both = estimate(&profile, &settings, &layers, 1, Overheads::default()).unwrap();
    let loads = layer_loads(&profile, &settings).unwrap();
    assert_eq!(loads, vec![132 * MIB; 32]);
    let load = |d: &DeviceEstimate| d.weights + d.kv;
    assert_eq!(load(&both.devices[0]), loads[..20].iter().sum());
    assert_eq!(load(&both.devices[1]), loads[20..].iter().sum::<u64>() + output_load(&profile));
    assert_eq!(output_load(&profile), 700 * MIB);
    assert_eq!(both.host.weights, 300 * MIB);
    assert!(both.devices[1].margin >= 512 * MIB && both.devices[1].runtime > 0 && both.host.margin == 0);
    let one = estimate_single(&profile, &settings, Overheads::NONE).unwrap();
    assert!(one.devices[0].compute < both.devices[0].compute, "pipelining keeps copies of the inputs");
    assert!(one.compared && one.worst() == one.devices[0].expected());

    // Thirty layers and the output: the first two stay with the host.
    let some = LlamaCppSettings { gpu_layers: Some(31), ..settings };
    let some = estimate_single(&profile, &some, Overheads::default()).unwrap();
    assert_eq!((some.host.weights, some.host.kv), (500 * MIB, 64 * MIB));
    let none = LlamaCppSettings { gpu_layers: Some(0), ..settings };
    let none = estimate_single(&profile, &none, Overheads::default()).unwrap();
    assert_eq!((none.devices[0].total(), none.host.weights), (0, profile.weights()));
    let off = LlamaCppSettings { kv_offload: false, ..settings };
    let off = estimate_single(&profile, &off, Overheads::NONE).unwrap();
    assert_eq!((off.devices[0].kv, off.host.kv), (0, 1024 * MIB));
}

#[test]
fn what_cannot_be_estimated_says_so() {
    let settings = LlamaCppSettings::default();
    let error = |profile: &ModelProfile, settings: &LlamaCppSettings| {
        estimate_single(profile, settings, Overheads::default()).unwrap_err().to_string()
    };
    let t5 = ModelProfile { architecture: "t5".into(), ..llama_3_8b() };
    assert_eq!(error(&t5, &settings), "the memory of \"t5\" models cannot be estimated: set `vram`");
    let empty = ModelProfile { layers: Vec::new(), ..llama_3_8b() };
    assert!(error(&empty, &settings).contains("set `vram`"));
    let endless = ModelProfile { context_length: 0, ..llama_3_8b() };
    assert!(error(&endless, &settings).contains("context"));
    assert!(error(&llama_3_8b(), &LlamaCppSettings { slots: 0, ..settings }).contains("slot"));
    let quantised = LlamaCppSettings { kv_type_v: KvType::Q8_0, flash_attention: FlashAttention::Off, ..settings };
    assert!(error(&llama_3_8b(), &quantised).contains("flash attention"));
    assert!(error(&llama_3_8b(), &LlamaCppSettings { slots: 257, ..settings }).contains("256"));
    let mixed = LlamaCppSettings { kv_type_k: KvType::Q8_0, ..settings };
    assert!(error(&deepseek_v2_lite(), &mixed).contains("MLA"));
    let odd = model("llama", 1600, 1000, vec![attention(20, 20, 80, 6400); 2]);
    assert!(error(&odd, &mixed).contains("multiple of 32"));
    let grok = ModelProfile { architecture: "grok".into(), ..llama_3_8b() };
    assert!(error(&grok, &LlamaCppSettings { kv_type_v: KvType::Q8_0, ..settings }).contains("flash attention"));
    let short = estimate(&llama_3_8b(), &settings, &[0; 3], 0, Overheads::default());
    assert_eq!(short, Err(EstimateError::Assignment { layers: 3, expected: 32 }));
    assert!(estimate(&llama_3_8b(), &settings, &[0; 32], usize::MAX, Overheads::default()).is_err());
}

#[test]
fn what_was_learnt_counts() {
    let estimate = DeviceEstimate { weights: 4000, kv: 1000, compute: 300, runtime: 400, margin: 500 };
    let learnt = Correction::new(5500).and(5600).and(5400);
    assert_eq!(learnt, Correction { taken: 5600, samples: 3, short: 0 });
    assert_eq!(learnt.apply(&estimate), 5600 + learnt::LEARNT_MARGIN);
    assert_eq!(Correction::new(10).apply(&estimate), 5000 + learnt::LEARNT_MARGIN);
    let two = MemoryEstimate { devices: vec![estimate; 2], host: DeviceEstimate::default(), compared: true };
    assert_eq!(two.promises(&[Some(learnt)]), [5600 + learnt::LEARNT_MARGIN, 6200]);
}

#[test]
fn an_engine_that_ran_out_is_promised_more_and_tried_only_where_more_is_free() {
    use learnt::{LEARNT_MARGIN, WORTH_A_TRY};
    let gib = 1024 * MIB;
    let once = Correction::default().ran_out(Some(6 * gib), 24 * gib, Some(10 * gib));
    assert_eq!(once, Correction { taken: 6 * gib, samples: 0, short: 10 * gib });
    assert!(
        !once.may_try(10 * gib) && !once.may_try(10 * gib + WORTH_A_TRY - 1) && once.may_try(10 * gib + WORTH_A_TRY)
    );
    // Again, with more; and with less, which says nothing new.
    let twice = once.ran_out(Some(6 * gib + LEARNT_MARGIN), 24 * gib, Some(12 * gib));
    assert_eq!((twice.taken, twice.short), (6 * gib + LEARNT_MARGIN, 12 * gib));
    assert_eq!(twice.ran_out(Some(gib), 24 * gib, Some(gib)), twice);
    // Memory that somebody took meanwhile, and gave back, is memory that came free.
    assert!(twice.since(4 * gib).may_try(5 * gib));
    // The next promise still fits on the device.
    let whole = Correction::default().ran_out(Some(24 * gib), 24 * gib, Some(24 * gib));
    assert_eq!(whole.taken + LEARNT_MARGIN, 24 * gib);
    // One that served got along: it is promised more, and tried where it was.
    let served = Correction::new(6 * gib).ran_out(Some(7 * gib), 24 * gib, None);
    assert_eq!((served.taken, served.may_try(0)), (7 * gib, true));
    // Nothing is estimated: nothing stands in for that.
    assert!(!Correction::default().ran_out(None, 24 * gib, Some(gib)).is_measured());
    // Ready: it did suffice.
    assert!(twice.and(gib).may_try(0));
}

#[test]
fn vllm_takes_a_part_of_the_total() {
    let gib = 1024 * MIB;
    let profile = ModelProfile { tensor_bytes: 15 * gib, ..llama_3_8b() };
    let settings = VllmSettings::default();
    let budget = vllm::budget(&profile, &settings, 24 * gib, 23 * gib).unwrap();
    assert_eq!((budget.bytes, budget.starts, budget.missing), (23_708_219_474, true, 0));
    assert_eq!(budget.kv_tokens, budget.kv / 131_072 / 16 * 16);
    assert!((50_000..57_000).contains(&budget.kv_tokens), "{}", budget.kv_tokens);
    let busy = vllm::budget(&profile, &settings, 24 * gib, 20 * gib).unwrap();
    assert!(!busy.starts && busy.missing == budget.bytes - 20 * gib);
    let two = VllmSettings { tensor_parallel: 2, ..settings };
    assert!(vllm::budget(&profile, &two, 24 * gib, 24 * gib).unwrap().kv_tokens > 2 * budget.kv_tokens);
    for utilization_permille in [0, 1001] {
        let wrong = VllmSettings { utilization_permille, ..settings };
        assert!(vllm::budget(&profile, &wrong, gib, gib).is_err());
    }
}

fn any_u64() -> impl Strategy<Value = u64> {
    prop_oneof![0..1_000_000_u64, any::<u64>(), Just(u64::MAX)]
}

fn any_layer() -> impl Strategy<Value = LayerProfile> {
    let kv = (any::<u32>(), any::<u32>(), any::<u32>(), prop::option::of(any_u64()));
    (any_u64(), any::<u32>(), prop::option::of(kv), any_u64(), any_u64()).prop_map(
        |(bytes, heads, kv, state, width)| {
            let kv = kv.map(|(heads_kv, key_length, value_length, window)| KvShape {
                heads_kv,
                key_length,
                value_length,
                window,
            });
            LayerProfile { bytes, heads, kv, recurrent_bytes: state, feed_forward_length: width }
        },
    )
}

prop_compose! {
    fn any_profile()(
        layers in prop::collection::vec(any_layer(), 0..5), sizes in prop::array::uniform8(any_u64()),
        experts in any::<u32>(), experts_used in any::<u32>(), name in 0..4_usize,
    ) -> ModelProfile {
        ModelProfile {
            input_bytes: sizes[0], output_bytes: sizes[1], other_bytes: sizes[2], embedding_bytes: sizes[3],
            context_length: sizes[4], tensor_bytes: sizes[5], tied_embeddings: sizes[0].is_multiple_of(2),
            experts, experts_used,
            ..model(["llama", "rwkv7", "bert", "t5"][name], sizes[6], sizes[7], layers)
        }
    }
}

prop_compose! {
    fn any_settings()(
        context in any_u64(), slots in prop_oneof![0..300_u32, any::<u32>()], k in 0..9_usize, v in 0..9_usize, flash in 0..3_usize,
        batch in any::<u32>(), ubatch in any::<u32>(), flags in any::<[bool; 4]>(),
        gpu_layers in prop::option::of(0..7_u32),
    ) -> LlamaCppSettings {
        LlamaCppSettings {
            context, slots, batch, ubatch, gpu_layers,
            kv_type_k: KvType::ALL[k], kv_type_v: KvType::ALL[v],
            flash_attention: [FlashAttention::Auto, FlashAttention::On, FlashAttention::Off][flash],
            kv_unified: flags[0], swa_full: flags[1], kv_offload: flags[2],
            outputs: if flags[3] { Outputs::Slots } else { Outputs::Batch },
        }
    }
}

proptest! {
    #[test]
    fn nothing_panics(
        profile in any_profile(), settings in any_settings(), devices in prop::collection::vec(0..4_usize, 0..5),
        output in 0..4_usize, memory in prop::array::uniform2(any_u64()), permille in 0..1200_u32,
    ) {
        let made = estimate(&profile, &settings, &devices, output, Overheads::default());
        if let Ok(made) = made {
            prop_assert!(made.worst() >= made.devices.iter().map(|d| d.weights).max().unwrap_or(0));
            prop_assert_eq!(layer_loads(&profile, &settings).map(|l| l.len()), Ok(profile.layers.len()));
        }
        let _ = output_load(&profile);
        let settings = VllmSettings { utilization_permille: permille, tensor_parallel: settings.slots, ..VllmSettings::default() };
        let _ = vllm::budget(&profile, &settings, memory[0], memory[1]);
    }

    /// More context never needs less, and several slots never keep less than one.
    #[test]
    fn more_needs_more(
        which in 0..6_usize, settings in any_settings(), short in 1..300_000_u64, more in 0..300_000_u64,
        slots in 1..=64_u32,
    ) {
        let profile = [llama_3_8b, gemma_2_9b, qwen3_30b_a3b, deepseek_v2_lite, jamba_52b, mamba_2_8b][which]();
        let of = |context, slots| {
            let settings = LlamaCppSettings {
                context, slots, gpu_layers: None, kv_offload: true, flash_attention: FlashAttention::On,
                kv_type_v: settings.kv_type_k, ..settings
            };
            estimate_single(&profile, &settings, Overheads::default()).map(|e| e.devices[0])
        };
        let (less, more) = (of(short, slots).unwrap(), of(short + more, slots).unwrap());
        prop_assert!(more.kv >= less.kv && more.compute >= less.compute && more.total() >= less.total());
        prop_assert!(less.kv >= of(short, 1).unwrap().kv);
    }
}
