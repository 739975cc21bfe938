//! Split ratios and plans: no panic, and every plan is what the engine reads from its ratios.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_domain::split::{SplitDevice, SplitInput, SplitPlan, SplitRatios, assign};

fuzz_target!(|data: &[u8]| {
    let devices = 1 + data.len() % 15;
    if let Some(ratios) = std::str::from_utf8(data).ok().and_then(|text| SplitRatios::parse(text, devices).ok()) {
        assert_eq!(SplitRatios::parse(&ratios.to_string(), devices), Ok(ratios));
    }
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
    let (given, rest) = data.split_at(data.len().min(16 * (data.len() % 15)));
    let device = |b: &[u8]| SplitDevice { uuid: String::new(), usable: number(&b[..8]), fixed: number(&b[8..]) };
    let devices: Vec<_> = given.chunks_exact(16).map(device).collect();
    let layers: Vec<u64> = rest.chunks(3).map(number).collect();
    let input = SplitInput { layers: &layers, kv: &[], output: layers.len() as u64, devices: &devices };
    let Ok(plan) = SplitPlan::compute(&input) else {
        // Too little or too much to split is refused; anything else must be expressible.
        assert!(devices.is_empty() || layers.is_empty() || layers.len() > 512);
        return;
    };
    let _ = plan.validate();
    let read = SplitRatios::parse(&plan.tensor_split(), devices.len()).unwrap();
    let places = assign(read.as_slice(), layers.len(), plan.gpu_layers()).unwrap();
    for (at, share) in plan.shares().iter().enumerate() {
        assert!(places[share.layers.clone()].iter().all(|p| *p == Some(at)));
    }
});
