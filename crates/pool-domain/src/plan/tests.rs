use super::*;
use crate::device::test_gpu;
use crate::model::{KvShape, LayerProfile, ModelFormat};

const GIB: u64 = 1 << 30;

fn gpu(index: u32, gib: u64) -> DeviceSnapshot {
    DeviceSnapshot { vram_total: gib * GIB, vram_free: gib * GIB, ..test_gpu(index) }
}

/// The shape of Llama-3.1-8B, with `scale` times its layers' bytes.
fn llama(scale: u64) -> Arc<ModelProfile> {
    let kv = KvShape { heads_kv: 8, key_length: 128, value_length: 128, window: None };
    let layer = LayerProfile {
        bytes: scale * 130 * (1 << 20),
        heads: 32,
        kv: Some(kv),
        feed_forward_length: 14_336,
        ..LayerProfile::default()
    };
    Arc::new(ModelProfile {
        format: ModelFormat::Gguf,
        architecture: "llama".into(),
        layers: vec![layer; 32],
        input_bytes: 300 << 20,
        output_bytes: 400 << 20,
        other_bytes: 0,
        tied_embeddings: false,
        embedding_bytes: 300 << 20,
        embedding_length: 4096,
        context_length: 131_072,
        vocabulary: 128_256,
        experts: 0,
        experts_used: 0,
        quantisation: "Q4_K_M".into(),
        tensor_bytes: 4900 << 20,
        header_digest: "sha256:x".into(),
    })
}

fn demand(scale: u64, context: u64) -> Demand {
    Demand {
        profile: Some(llama(scale)),
        memory: EngineMemory::LlamaCpp(LlamaCppSettings { context, ..LlamaCppSettings::default() }),
        vram: None,
        split: Split::Off,
        learnt: None,
    }
}

fn none(_: &str) -> u64 {
    0
}

#[test]
fn a_model_that_fits_gets_the_roomiest_device_and_its_estimate() {
    let devices = [gpu(0, 12), gpu(1, 24)];
    let fit = fit(&demand(1, 8192), &DeviceMask::Auto, &devices, &none).unwrap();
    assert_eq!(fit.devices.uuids, [devices[1].uuid.clone()]);
    let row = &fit.rows[0];
    assert_eq!((row.estimate.kv, row.estimate.weights), (GIB, (32 * 130 + 400) << 20));
    assert_eq!(fit.bytes(), [row.estimate.total()]);
    assert_eq!((fit.context, row.free_after()), (Some(8192), 24 * GIB - row.promised));
}

#[test]
fn nobodys_context_is_the_largest_that_fits_up_to_the_default() {
    let context = |gib| fit(&demand(1, 0), &DeviceMask::Auto, &[gpu(0, gib)], &none).map(|f| f.context.unwrap());
    assert_eq!(context(24), Ok(DEFAULT_CONTEXT));
    let tight = context(6).unwrap();
    assert!((256..8192).contains(&tight) && tight.is_multiple_of(CONTEXT_STEP), "{tight}");
    assert!(matches!(context(4), Err(Refusal::NeverFits(_))));
    // Crowded, it waits for the room that an unused device would have.
    let crowded = fit(&demand(1, 0), &DeviceMask::Auto, &[gpu(0, 6)], &|_| 2 * GIB);
    assert!(matches!(crowded, Err(Refusal::Vram(_))), "{crowded:?}");
}

#[test]
fn what_somebody_said_wins_and_what_nobody_knows_has_to_be_said() {
    let devices = [gpu(0, 24)];
    let said = Demand { vram: Some(3 * GIB), ..demand(1, 8192) };
    assert_eq!(fit(&said, &DeviceMask::Auto, &devices, &none).unwrap().bytes(), [3 * GIB]);
    let unknown = Demand { memory: EngineMemory::Unknown, ..demand(1, 8192) };
    let Err(Refusal::NeverFits(why)) = fit(&unknown, &DeviceMask::Auto, &devices, &none) else { panic!() };
    assert!(why.ends_with("set `vram`"), "{why}");
    let stub = Demand { memory: EngineMemory::Fixed(0), profile: None, ..demand(1, 0) };
    assert_eq!(fit(&stub, &DeviceMask::Auto, &devices, &none).unwrap().bytes(), [0]);
    let learnt = Demand { learnt: Some(Correction::new(6 * GIB)), ..demand(1, 8192) };
    let fit = fit(&learnt, &DeviceMask::Auto, &devices, &none).unwrap();
    assert_eq!((fit.bytes(), fit.learnt), (vec![6 * GIB + crate::estimate::learnt::LEARNT_MARGIN], true));
}

#[test]
fn a_split_takes_as_few_devices_as_do_and_promises_each_its_share() {
    let devices = [gpu(0, 12), gpu(1, 24), gpu(2, 12)];
    let auto = |scale| Demand { split: Split::Auto, ..demand(scale, 8192) };
    let one = fit(&auto(1), &DeviceMask::Auto, &devices, &none).unwrap();
    assert_eq!((one.rows.len(), one.tensor_split), (1, None));
    let two = fit(&auto(6), &DeviceMask::Auto, &devices, &none).unwrap();
    assert_eq!(two.rows.iter().map(|r| r.index).collect::<Vec<_>>(), [0, 1]);
    assert!(two.tensor_split.is_some());
    assert_eq!(two.rows.iter().map(|r| r.layers.len()).sum::<usize>(), 32);
    assert!(two.rows.iter().all(|r| r.promised <= r.room && r.promised == r.estimate.total()));
    assert!(two.rows[1].output && !two.rows[0].output);
    // Room that others hold now may come back; room that there is not, never.
    let crowded = |u: &str| if u == devices[1].uuid { 20 * GIB } else { 0 };
    assert!(matches!(fit(&auto(6), &DeviceMask::All, &devices[..2], &crowded), Err(Refusal::Vram(_))));
    assert!(matches!(fit(&auto(20), &DeviceMask::All, &devices, &none), Err(Refusal::NeverFits(_))));
    // The same with the choice of devices left to the planner, and with one of them ill.
    assert!(matches!(fit(&auto(6), &DeviceMask::Auto, &devices[..2], &crowded), Err(Refusal::Vram(_))));
    let mut ill = devices.clone();
    ill[1].health = crate::DeviceHealth::Lost("test".into());
    assert!(matches!(fit(&auto(6), &DeviceMask::Auto, &ill, &none), Err(Refusal::Vram(_) | Refusal::Devices(_))));
    assert_eq!(
        fit(&auto(4), &DeviceMask::Auto, &ill, &none).unwrap().rows.iter().map(|r| r.index).collect::<Vec<_>>(),
        [0, 2]
    );
    // Layers that stay off the devices are no part of a split.
    let partly = LlamaCppSettings { context: 8192, gpu_layers: Some(16), ..LlamaCppSettings::default() };
    let partly = Demand { memory: EngineMemory::LlamaCpp(partly), ..auto(6) };
    assert!(matches!(fit(&partly, &DeviceMask::All, &devices, &none), Err(Refusal::NeverFits(_))));
    let huge = LlamaCppSettings { context: u64::MAX, ubatch: u32::MAX, batch: u32::MAX, ..LlamaCppSettings::default() };
    let huge = Demand { memory: EngineMemory::LlamaCpp(huge), ..auto(1) };
    assert!(fit(&huge, &DeviceMask::All, &devices, &none).is_err());
    assert!(remedies(&huge, &DeviceMask::All, &devices, &none).len() < 8);
}

#[test]
fn ratios_are_followed_and_malformed_ones_named() {
    let devices = [gpu(0, 24), gpu(1, 24)];
    let with = |text: &str| Demand { split: Split::Ratios(text.into()), ..demand(1, 8192) };
    let three_to_one = fit(&with("3,1"), &DeviceMask::All, &devices, &none).unwrap();
    assert_eq!(three_to_one.rows.iter().map(|r| r.layers.len()).collect::<Vec<_>>(), [25, 7]);
    for (text, word) in [("3,-1", "`-1`"), ("nan", "nan"), ("0,0", "0"), ("1,1,1", "too many"), ("", "empty")] {
        let Err(Refusal::NeverFits(why)) = fit(&with(text), &DeviceMask::All, &devices, &none) else {
            panic!("{text}")
        };
        assert!(why.contains(word), "{text}: {why}");
    }
}

#[test]
fn what_does_not_fit_is_answered_with_what_would() {
    let devices = [gpu(0, 12), gpu(1, 12)];
    let long = demand(1, 131_072);
    assert!(fit(&long, &DeviceMask::Auto, &devices, &none).is_err());
    let told = remedies(&long, &DeviceMask::Auto, &devices, &none);
    let says = |text: &str| told.iter().any(|r| r.to_string().contains(text));
    assert!(says("context = ") && says("q4_0") && says("over 2 devices"), "{told:?}");
    for remedy in &told {
        let Remedy::Context { tokens } = remedy else { continue };
        assert!(fit(&demand(1, *tokens), &DeviceMask::Auto, &devices, &none).is_ok());
        assert!(fit(&demand(1, tokens + 256), &DeviceMask::Auto, &devices, &none).is_err());
    }
    // Too large by far: more devices are what helps.
    let big = remedies(&demand(4, 8192), &DeviceMask::Auto, &devices, &none);
    assert!(matches!(big[..], [Remedy::Split { devices: 2, .. }]), "{big:?}");
    // Too large for all of them: a smaller file is what helps.
    let huge = remedies(&demand(9, 8192), &DeviceMask::Auto, &devices, &none);
    let [Remedy::Smaller { weights, devices: 2 }] = huge[..] else { panic!("{huge:?}") };
    assert!((18 * GIB..24 * GIB).contains(&weights), "{weights}");
    // Only others' memory stands in the way.
    let busy = |_: &str| 8 * GIB;
    let wait = remedies(&demand(1, 8192), &DeviceMask::Auto, &devices, &busy);
    assert!(wait.iter().any(|r| matches!(r, Remedy::Free { .. })), "{wait:?}");
    // What fits is told how far it could go.
    assert!(
        matches!(remedies(&demand(1, 8192), &DeviceMask::Auto, &devices, &none)[..], [Remedy::Context { tokens }] if tokens > 8192)
    );
}

/// It was promised what the estimate said, and ran out where `short` were free to it.
fn ran_out(scale: u64, context: u64, short: u64) -> Demand {
    let learnt = Correction::default().ran_out(None, 24 * GIB, Some(short));
    Demand { learnt: Some(learnt), ..demand(scale, context) }
}

#[test]
fn a_start_that_ran_out_waits_for_more_than_it_had_or_goes_where_there_is_more() {
    let devices = [gpu(0, 24), gpu(1, 12)];
    let first: DeviceMask = "0".parse().unwrap();
    let there = |used: u64| move |u: &str| if u.ends_with('0') { used * GIB } else { 0 };
    assert!(devices[0].uuid.ends_with('0') && !devices[1].uuid.ends_with('0'));
    // It had 10 GiB: the same, or a little more, is not tried again.
    let again = ran_out(1, 8192, 10 * GIB);
    let Err(Refusal::Vram(why)) = fit(&again, &first, &devices, &there(14)) else { panic!() };
    assert_eq!(why, "its engine ran out of GPU memory where 10.0 GiB were free to it, and 10.0 GiB are now");
    assert!(fit(&again, &first, &devices, &there(13)).is_ok(), "a GiB more came free");
    // Nor on another that has less; on one that has more it is.
    assert!(fit(&again, &DeviceMask::Auto, &devices[..1], &there(14)).is_err());
    let auto = fit(&again, &DeviceMask::Auto, &devices, &there(14)).unwrap();
    assert_eq!(auto.devices.uuids, [devices[1].uuid.clone()]);
    // Over several devices, what they have together counts.
    assert!(fit(&ran_out(1, 8192, 36 * GIB), &DeviceMask::All, &devices, &none).is_err());
    assert!(fit(&ran_out(1, 8192, 30 * GIB), &DeviceMask::All, &devices, &none).is_ok());
}

#[test]
fn what_would_fit_is_told_of_a_start_that_ran_out() {
    let devices = [gpu(0, 24), gpu(1, 12)];
    let second: DeviceMask = "1".parse().unwrap();
    let told = remedies(&ran_out(1, 32_768, 12 * GIB), &second, &devices, &none);
    let Some(Remedy::Context { tokens }) = told.first() else { panic!("{told:?}") };
    assert!((256..32_768).contains(tokens), "its estimate was too low, so less than that says: {told:?}");
    assert!(
        told.contains(&Remedy::Elsewhere { index: 0 }) && told.contains(&Remedy::Larger { bytes: 12 * GIB }),
        "{told:?}"
    );
    // With half of it in the hands of others, free memory is what may help.
    let busy = remedies(&ran_out(1, 8192, 7 * GIB), &second, &devices, &|_| 5 * GIB);
    assert!(busy.contains(&Remedy::Free { bytes: 256 << 20, index: 1 }), "{busy:?}");
    // Nothing is known of what it takes.
    let said = Demand { vram: Some(3 * GIB), profile: None, ..ran_out(1, 8192, 12 * GIB) };
    let words: Vec<String> = remedies(&said, &second, &devices, &none).iter().map(ToString::to_string).collect();
    assert_eq!(words[0], "devices = \"0\" has more room");
    assert!(words.last().unwrap().contains("fewer `slots`"), "{words:?}");
    // Where it may be tried nothing has to be said.
    assert_eq!(remedies(&said, &DeviceMask::Auto, &devices, &none), []);
}
