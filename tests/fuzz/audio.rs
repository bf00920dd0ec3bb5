//! Any bytes are a voice or a typed error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use talkie::media::audio::{Limits, Voice};

fuzz_target!(|bytes: &[u8]| {
    let limits = Limits { max_seconds: Some(2.0), ..Limits::default() };
    let _ = Voice::open(bytes.to_vec().into(), &limits);
});
