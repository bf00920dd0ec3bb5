//! Any bytes are a portrait or a typed error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use talkie::media::image::{Limits, Portrait};

fuzz_target!(|bytes: &[u8]| {
    let _ = Portrait::open(bytes, &Limits::default());
});
