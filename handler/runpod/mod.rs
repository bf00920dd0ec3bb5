//! RunPod's serverless protocol: the wire types of both sides, and the worker that speaks it.
//!
//! | module | holds |
//! |---|---|
//! | [`protocol`] | the wire types |
//! | [`platform`] | the addresses that `RUNPOD_*` give, and the client for them |
//! | [`take`] | polling for jobs and for stops; how long to pause between polls |
//! | [`held`] | the jobs that this worker answers for, and whether they move |
//! | [`heartbeat`] | the thread that says so |
//! | [`sender`] | progress of a job, in order |
//! | [`outcome`] | the body that ends a job |
//! | [`spool`] | results on disk until they are acknowledged |
//! | [`delivery`] | posting results until they are acknowledged |
//! | [`worker`] | the loop |
//! | [`fitness`] | what is checked before the first job |
//! | [`logs`] | log lines as RunPod reads them |

pub mod delivery;
pub mod fitness;
pub mod heartbeat;
pub mod held;
pub mod logs;
pub mod outcome;
pub mod platform;
pub mod protocol;
pub mod sender;
pub mod spool;
pub mod take;
pub mod worker;
