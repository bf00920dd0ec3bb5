//! Any bytes as the body of `/run`: they are read, or refused as bad input.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use handler::config::{Config, ConfigArgs};
use handler::gateway::admission::Request;
use libfuzzer_sys::fuzz_target;

static CONFIG: LazyLock<Config> = LazyLock::new(|| {
    Config::new(&ConfigArgs::default(), |_| None, Path::new("/nonexistent")).expect("the defaults are sound")
});

fuzz_target!(|body: &[u8]| {
    for is_talkie in [true, false] {
        if let Err(e) = Request::read(body, is_talkie, &CONFIG) {
            assert!(e.code.is_bad_input(), "{e}");
        }
    }
});
