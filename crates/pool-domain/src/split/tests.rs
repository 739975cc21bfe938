use proptest::prelude::*;

use super::*;
use crate::dice::Dice;

const GIB: u64 = 1 << 30;

fn device(at: usize, usable: u64, fixed: u64) -> SplitDevice {
    SplitDevice { uuid: format!("GPU-{at}"), usable, fixed }
}

fn devices(usable: &[u64]) -> Vec<SplitDevice> {
    usable.iter().enumerate().map(|(at, usable)| device(at, *usable, 0)).collect()
}

fn input<'a>(layers: &'a [u64], output: u64, devices: &'a [SplitDevice]) -> SplitInput<'a> {
    SplitInput { layers, kv: &[], output, devices }
}

/// How many repeating layers each device gets, and where the output layer is.
fn counts(ratios: &[f32], layers: usize, gpu_layers: usize) -> (Vec<usize>, Option<usize>) {
    let places = assign(ratios, layers, gpu_layers).unwrap();
    assert_eq!(places.len(), layers + 1);
    let count = |d| places[..layers].iter().filter(|p| **p == Some(d)).count();
    ((0..ratios.len()).map(count).collect(), places[layers])
}

#[test]
fn llama_cpps_rule_row_by_row() {
    for (text, layers, gpu_layers, expected, output) in [
        ("3,1", 32, 33, vec![25, 7], Some(1)),
        ("1,1", 32, 33, vec![17, 15], Some(1)),
        ("8,10", 80, 81, vec![36, 44], Some(1)),
        ("24,12,8", 32, 33, vec![18, 9, 5], Some(2)),
        ("1,0", 32, 33, vec![32, 0], Some(0)),
        ("0,1", 32, 33, vec![0, 32], Some(1)),
        ("1,1", 32, 999, vec![17, 15], Some(1)),
        ("1,1", 32, 0, vec![0, 0], None),
    ] {
        let devices = expected.len();
        let ratios = SplitRatios::parse(text, devices).unwrap();
        assert_eq!(counts(ratios.as_slice(), layers, gpu_layers), (expected, output), "{text} ngl {gpu_layers}");
    }
}

#[test]
fn with_32_of_32_layers_something_stays_on_the_cpu() {
    let places = |which| assign_as(which, &[1.0, 1.0], 32, 32).unwrap();
    // the row of the reference, which is of February 2025: the output layer
    let older = places(Offload::LayersFirst);
    assert_eq!((older[0], older[31], older[32]), (Some(0), Some(1), None));
    // what llama.cpp does today: the first layer
    let newer = places(Offload::OutputFirst);
    assert_eq!((newer[0], newer[1], newer[32]), (None, Some(0), Some(1)));
}

#[test]
fn what_breaks_llama_cpps_rule_is_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(assign(&[1.0, bad], 32, 33), Err(SplitError::NotFinite { place: 2, .. })));
    }
    assert!(matches!(assign(&[3e38, 3e38], 32, 33), Err(SplitError::NotFinite { place: 2, .. })));
    assert!(matches!(assign(&[3.0, -1.0], 32, 33), Err(SplitError::Negative { place: 2, .. })));
    assert_eq!(assign(&[0.0, 0.0], 32, 33), Err(SplitError::AllZero));
    assert_eq!(assign(&[], 32, 33), Err(SplitError::Empty));
    assert!(matches!(assign(&[1.0; 16], 32, 33), Err(SplitError::TooManyDevices { devices: 16 })));
    assert!(matches!(assign(&[1.0], 513, 514), Err(SplitError::Layers { layers: 513 })));
}

#[test]
fn wrong_ratios_name_the_entry() {
    for (text, part) in [
        ("", "empty"),
        ("  ", "empty"),
        ("3,-1", "entry 2, `-1`, is negative"),
        ("nan", "entry 1, `nan`, is not finite"),
        ("1,inf", "entry 2, `inf`, is not finite"),
        ("1e39,1", "entry 1, `1e39`, is not finite"),
        ("1,1e-50", "entry 2, `1e-50`, is too close to 0"),
        ("0,0", "every entry of the split is 0"),
        ("1abc", "entry 1, `1abc`, is no number"),
        ("0x1,1", "entry 1, `0x1`, is no number"),
        ("1,,1", "entry 2, ``, is no number"),
        ("1,", "entry 2, ``, is no number"),
        ("1;1", "entry 1, `1;1`, is no number"),
        ("1,1,1,5", "entry 4, `5`, is one too many: the mask has 3 devices"),
    ] {
        let e = SplitRatios::parse(text, 3).unwrap_err().to_string();
        assert!(e.contains(part), "{text}: {e}");
    }
    assert_eq!(SplitRatios::parse(" 3 , 1", 3).unwrap().as_slice(), [3.0, 1.0, 0.0]);
    assert_eq!(SplitRatios::parse("3/1.5", 2).unwrap().to_string(), "3,1.5");
    assert_eq!(SplitRatios::parse("0.0e9,-0,1", 3).unwrap().to_string(), "0,0,1");
}

#[test]
fn layers_follow_the_memory_and_leave_out_what_is_too_small() {
    let layers = vec![GIB / 2; 32];
    let devices = [device(0, 24 * GIB, GIB), device(1, 8 * GIB, GIB), device(2, GIB / 2, GIB)];
    let plan = SplitPlan::compute(&input(&layers, GIB, &devices)).unwrap();
    let ranges: Vec<_> = plan.shares().iter().map(|s| s.layers.clone()).collect();
    assert_eq!(ranges, [0..27, 27..32, 32..32]);
    assert_eq!(plan.shares().iter().map(|s| s.output).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(plan.ratios()[2], 0.0);
    assert_eq!(plan.gpu_layers(), 33);
    // The device without layers has the runtime's context all the same, for which it is too small.
    let short = plan.validate().unwrap_err();
    assert_eq!(short.misses, [Miss { device: 2, uuid: "GPU-2".into(), needed: GIB, usable: GIB / 2 }]);
    assert_eq!(short.to_string(), "GPU-2 needs 1.0 GiB, which is 0.5 GiB more than it has");
}

#[test]
fn what_the_worst_device_leaves_open_is_evened_out() {
    // The first layer alone is the worst load; the rest could lie anywhere below that.
    let layers = [90, 10, 10, 10, 10, 10, 10];
    let plan = SplitPlan::compute(&input(&layers, 0, &devices(&[100, 100, 100]))).unwrap();
    assert_eq!(plan.shares().iter().map(|s| s.load).collect::<Vec<_>>(), [90, 30, 30]);
}

#[test]
fn a_split_that_misses_says_by_how_much_and_what_context_fits() {
    // KV of 1 KiB a token and layer, weights of 256 MiB a layer.
    let plan = |context: u64| {
        let layers = vec![(256 << 20) + context * 1024; 40];
        let kv = vec![context * 1024; 40];
        let devices = [device(0, 8 * GIB, GIB), device(1, 6 * GIB, GIB)];
        SplitPlan::compute(&SplitInput { layers: &layers, kv: &kv, output: GIB / 2, devices: &devices }).unwrap()
    };
    let short = plan(131_072).validate().unwrap_err();
    assert!(short.missing() > 0 && short.capped_by.is_some(), "{short:?}");
    let best = largest_context(|c| plan(c).validate().is_ok(), 131_072, 256).unwrap();
    assert_eq!(best % 256, 0);
    assert!(plan(best).validate().is_ok() && plan(best + 256).validate().is_err(), "{best}");
    let (plan, cap) = (plan(best), plan(best).kv_cap().unwrap());
    for (share, most) in plan.shares().iter().zip(&cap.most) {
        assert!(share.kv <= *most, "resident KV is capped by the device with the least room");
    }
}

#[test]
fn the_largest_context_is_found_or_there_is_none() {
    assert_eq!(largest_context(|_| true, 1000, 256), Some(1000));
    assert_eq!(largest_context(|c| c <= 999, 1000, 256), Some(768));
    assert_eq!(largest_context(|c| c <= 256, u64::MAX, 256), Some(256));
    assert_eq!(largest_context(|c| c < 256, 8192, 256), None);
    assert_eq!(largest_context(|_| true, 0, 0), None);
}

#[test]
fn impossible_inputs_are_errors() {
    let two = devices(&[1, 1]);
    let compute = |layers: &[u64], kv: &[u64], devices: &[SplitDevice]| {
        SplitPlan::compute(&SplitInput { layers, kv, output: 0, devices }).map(|_| ())
    };
    assert_eq!(compute(&[1], &[], &[]), Err(SplitError::Empty));
    assert_eq!(compute(&[], &[], &two), Err(SplitError::Layers { layers: 0 }));
    assert_eq!(compute(&[1; 513], &[], &two), Err(SplitError::Layers { layers: 513 }));
    assert_eq!(compute(&[1], &[], &devices(&[1; 16])), Err(SplitError::TooManyDevices { devices: 16 }));
    assert!(matches!(compute(&[u64::MAX, 1], &[], &two), Err(SplitError::Loads(_))));
    assert!(matches!(compute(&[1, 1], &[2, 0], &two), Err(SplitError::Loads(_))));
    assert!(matches!(compute(&[1, 1], &[1], &two), Err(SplitError::Loads(_))));
    // No memory anywhere: still a plan, which does not fit.
    let plan = SplitPlan::compute(&input(&[u64::MAX], 0, &devices(&[0, 0]))).unwrap();
    assert!(plan.validate().is_err());
}

#[test]
fn a_users_ratios_are_planned_as_the_engine_reads_them() {
    let (layers, devices) = (vec![10; 80], devices(&[1000, 1000]));
    let ratios = SplitRatios::parse("8,10", 2).unwrap();
    let plan = SplitPlan::from_ratios(&input(&layers, 7, &devices), &ratios).unwrap();
    assert_eq!(plan.shares().iter().map(|s| s.load).collect::<Vec<_>>(), [360, 447]);
    assert_eq!(plan.tensor_split(), "8,10");
    assert!((plan.ratios().iter().sum::<f32>() - 1.0).abs() < 1e-6);
    let three = SplitRatios::parse("8,10", 3).unwrap();
    assert!(matches!(SplitPlan::from_ratios(&input(&layers, 7, &devices), &three), Err(SplitError::Loads(_))));
}

/// The worst load of a partition as an exact fraction; a device without layers counts nothing.
fn worst(ends: &[usize], input: &SplitInput<'_>) -> (u128, u128) {
    let mut start = 0;
    let mut worst = (0, 1);
    for (end, d) in ends.iter().zip(input.devices) {
        let mut load: u128 = input.layers[start..*end].iter().map(|l| u128::from(*l)).sum();
        if start < *end {
            load += u128::from(d.fixed);
            if *end == input.layers.len() {
                load += u128::from(input.output);
            }
            let of = u128::from(d.usable);
            if load * worst.1 > worst.0 * of {
                worst = (load, of);
            }
        }
        start = *end;
    }
    worst
}

/// Calls `f` with the ends of every partition of `n` layers over `devices`.
fn partitions(n: usize, devices: usize, ends: &mut Vec<usize>, f: &mut impl FnMut(&[usize])) {
    if ends.len() + 1 == devices {
        ends.push(n);
        f(ends);
        ends.pop();
        return;
    }
    for end in ends.last().copied().unwrap_or(0)..=n {
        ends.push(end);
        partitions(n, devices, ends, f);
        ends.pop();
    }
}

fn ends(plan: &SplitPlan) -> Vec<usize> {
    plan.shares().iter().map(|s| s.layers.end).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_other_split_has_a_lower_worst_load(
        layers in prop::collection::vec(1u64..5000, 1..=24),
        output in 0u64..9000,
        given in prop::collection::vec((1u64..100_000, 0u64..3000), 1..=4),
    ) {
        let devices: Vec<_> = given.iter().enumerate().map(|(at, (usable, fixed))| device(at, *usable, *fixed)).collect();
        let input = input(&layers, output, &devices);
        let plan = SplitPlan::compute(&input).unwrap();
        let ours = worst(&ends(&plan), &input);
        let mut best: Option<(u128, u128)> = None;
        partitions(layers.len(), devices.len(), &mut Vec::new(), &mut |ends| {
            let here = worst(ends, &input);
            if best.is_none_or(|b| here.0 * b.1 < b.0 * here.1) {
                best = Some(here);
            }
        });
        let best = best.unwrap();
        prop_assert_eq!(ours.0 * best.1, best.0 * ours.1, "{:?} against {:?}", ours, best);
    }

    #[test]
    fn parsing_never_panics_and_what_it_takes_is_expressible(text in "[-+0-9.,/eEainf x]{0,24}", devices in 0usize..18) {
        if let Ok(ratios) = SplitRatios::parse(&text, devices) {
            prop_assert_eq!(SplitRatios::parse(&ratios.to_string(), devices), Ok(ratios.clone()));
            prop_assert!(assign(ratios.as_slice(), 32, 33).unwrap().iter().all(|p| p.is_some_and(|d| d < devices)));
        }
    }
}

/// A million splits of every shape up to the limits, most of them small: each gets its plan, whose ratios llama.cpp
/// reads back as that plan, with the output layer beside the last one.
#[test]
fn a_million_splits_round_trip() {
    let mut dice = Dice(3);
    for i in 0..1_000_000u64 {
        let wide = i % 2_000 == 0;
        let n = 1 + dice.below(if wide { 512 } else { 12 });
        let count = 1 + dice.below(if wide { 15 } else { 3 });
        let size = *dice.pick(&[1u64, 2, 100, 1 << 20, 1 << 34, 1 << 50]);
        let layers: Vec<u64> = (0..n).map(|_| dice.below(size)).collect();
        let devices: Vec<_> = (0..count)
            .map(|at| SplitDevice {
                uuid: String::new(),
                usable: dice.below(size).saturating_mul(at + 1),
                fixed: dice.below(size) / 8,
            })
            .collect();
        let output = dice.below(size);
        let input = input(&layers, output, &devices);
        let plan = SplitPlan::compute(&input).unwrap_or_else(|e| panic!("{e}: {input:?}"));
        let read = SplitRatios::parse(&plan.tensor_split(), devices.len()).unwrap();
        let places = assign(read.as_slice(), layers.len(), 999).unwrap();
        if i % 64 == 0 {
            assert_eq!(assign_as(Offload::LayersFirst, read.as_slice(), layers.len(), 999).as_ref(), Ok(&places));
        }
        for (at, share) in plan.shares().iter().enumerate() {
            assert!(places[share.layers.clone()].iter().all(|p| *p == Some(at)), "{input:?}: {plan:?}");
        }
        assert_eq!(places[layers.len()], places[layers.len() - 1], "{input:?}");
        let carried: u64 = plan.shares().iter().map(|s| s.load).sum();
        assert_eq!(carried, layers.iter().sum::<u64>() + output);
        assert!((plan.ratios().iter().sum::<f32>() - 1.0).abs() < 1e-5, "{plan:?}");
    }
}

fn parallel(heads: u32, kv_heads: u32, usable: &[u64]) -> Result<TensorParallelPlan, SplitError> {
    let devices = devices(usable);
    TensorParallelPlan::compute(&TensorParallelInput { weights: 1000, kv: 800, heads, kv_heads, devices: &devices })
}

#[test]
fn tensor_parallel_shares_are_equal_and_the_smallest_device_caps_them() {
    let plan = parallel(32, 8, &[1000, 700, 1000, 1000]).unwrap();
    assert_eq!((plan.weights, plan.kv, plan.kv_heads, plan.kv_replicas), (250, 200, 2, 1));
    assert_eq!(plan.ratios(), [0.25; 4]);
    assert_eq!(plan.kv_cap(), 450);
    assert_eq!(plan.validate(), Ok(()));
    let short = parallel(32, 8, &[1000, 400, 1000, 1000]).unwrap().validate().unwrap_err();
    assert_eq!((short.missing(), short.capped_by), (50, Some(1)));
    // fewer KV heads than devices: copies, so the KV cache is shared by no more than there are heads
    let plan = parallel(64, 2, &[1000; 8]).unwrap();
    assert_eq!((plan.weights, plan.kv, plan.kv_heads, plan.kv_replicas), (125, 400, 1, 4));
    assert_eq!(parallel(16, 1, &[1000; 4]).unwrap().kv, 800);
}

#[test]
fn heads_that_do_not_divide_say_what_would() {
    let e = parallel(28, 4, &[1000; 3]).unwrap_err();
    assert_eq!(e.to_string(), "28 attention heads cannot be shared evenly by 3 devices: use 1, 2");
    assert!(matches!(parallel(24, 4, &[1000; 6]), Err(SplitError::Heads { what: "KV heads", .. })));
    assert_eq!(parallel(32, 8, &[]), Err(SplitError::Empty));
    assert!(parallel(0, 0, &[1]).is_err());
}
