//! The gateway's workers: started when a job waits, ended when none does, replaced when they die; attached ones;
//! and what the gateway tells the world about the end of a job.

mod attached;
pub mod client;
pub mod gateway;
mod life;
mod lost;
mod scale;
mod stops;
mod webhooks;
