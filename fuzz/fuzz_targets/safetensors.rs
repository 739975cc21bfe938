//! A `config.json`, a zero byte, and a safetensors file: an error or a profile.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (config, file) = data.split_at(data.iter().position(|b| *b == 0).unwrap_or(data.len()));
    let _ = model_store::profile_safetensors(config, file.get(1..).unwrap_or_default());
});
