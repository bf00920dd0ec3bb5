//! Talkie's service: what stands around the inference library `talkie`. How a job arrives, where its media come
//! from, where its video goes, and the command line.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the verbs of the binary |
//! | [`bench`] | stages to time |
//! | [`config`] | settings from flags and environment variables, read once |
//! | [`job`] | outputs and errors as they are sent; the one mapping from kinds to codes |
//! | [`schema`] | JSON Schema of input and output |
//! | [`inputs`] | fetching images and voices, with limits |
//! | [`generate`] | the seam to `talkie`: model, inputs, one video |
//! | [`progress`] | percent and time left |
//! | [`part_file`] | files that appear complete or not at all |
//! | [`interrupt`] | Ctrl-C |
//! | [`memory`] | peak memory; the allocator's settings |

pub mod bench;
pub mod cli;
pub mod config;
pub mod generate;
pub mod inputs;
pub mod interrupt;
pub mod job;
pub mod memory;
pub mod part_file;
pub mod progress;
pub mod schema;
