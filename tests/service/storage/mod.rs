//! Storage: one suite over the client, against the embedded store under R2's rules or, where
//! `TALKIE_S3_TEST` is set, against the store that the environment names; and what goes wrong on the way.

mod conformance;
mod faults;
mod gc;
mod rules;
mod sweep;
pub mod world;
