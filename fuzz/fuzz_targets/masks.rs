//! Device masks: no panic, and what parses is written back as itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pool_domain::DeviceMask;

fuzz_target!(|text: &str| {
    if let Ok(mask) = DeviceMask::parse(text) {
        assert_eq!(DeviceMask::parse(&mask.to_string()), Ok(mask));
    }
});
