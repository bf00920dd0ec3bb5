//! Talkie's service: what stands around the inference library `talkie`. How a job arrives, where its media come
//! from, where its video goes, and the command line.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the verbs of the binary |
//! | [`mod@bench`] | stages to time |
//! | [`config`] | settings from flags and environment variables, read once |
//! | [`job`] | outputs and errors as they are sent; the one mapping from kinds to codes |
//! | [`schema`] | JSON Schema of input and output |
//! | [`hub`] | the files of a model: found on this machine, or fetched and verified |
//! | [`doctor`] | what is to be known of a machine |
//! | [`models`] | what of a model lies here |
//! | [`cards`] | GPUs: what they can do, what they cost |
//! | [`inputs`] | fetching images and voices, with limits |
//! | [`runner`] | one job, from input to outcome |
//! | [`executor`] | the thread that computes |
//! | [`storage`] | where videos go: S3, Cloudflare R2, the embedded store |
//! | [`runpod`] | RunPod's protocol, and the worker that speaks it |
//! | [`deploy`] | the RunPod endpoint of `runpod.toml` |
//! | [`gateway`] | RunPod's endpoint API, the job store, the worker processes |
//! | [`lambda`] | AWS Lambda |
//! | [`faults`] | points at which tests kill the process |
//! | [`generate`] | the seam to `talkie`: model, inputs, one video |
//! | [`progress`] | percent and time left |
//! | [`cold_start`] | what the last cold start took |
//! | [`pace`] | how long windows took in past jobs |
//! | [`part_file`] | files that appear complete or not at all |
//! | [`interrupt`] | Ctrl-C |
//! | [`memory`] | peak memory; the allocator's settings |
//! | [`disk`] | free space |
//! | [`owner`] | which process something on a volume belongs to |

pub mod bench;
pub mod cards;
pub mod cli;
pub mod cold_start;
pub mod config;
pub mod deploy;
pub mod disk;
pub mod doctor;
pub mod downgrade;
pub mod executor;
pub mod faults;
pub mod gateway;
pub mod generate;
pub mod hub;
pub mod inputs;
pub mod interrupt;
pub mod job;
pub mod lambda;
pub mod memory;
pub mod models;
pub mod owner;
pub mod pace;
pub mod part_file;
pub mod progress;
pub mod runner;
pub mod runpod;
pub mod schema;
pub mod storage;
