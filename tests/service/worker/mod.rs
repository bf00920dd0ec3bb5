//! `handler worker` against a platform that follows a script.

mod faults;
mod platform;
mod process;
mod rig;
mod scenarios;
