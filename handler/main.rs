//! The binary: sets up the allocator and runs a verb.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let started = Instant::now();
    handler::memory::keep_freed();
    handler::cli::run(std::env::args_os(), started)
}
