//! GGUF headers: an error or a profile, no panic and no memory in proportion to a number in the file.
#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = model_store::profile_gguf(Cursor::new(data));
});
