//! Progress of one job, in order: the latest report wins, at most one at a time, and none after the end.

use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::platform::Platform;
use crate::job::JobStatus;
use crate::progress::Update;

/// The sender of one job.
#[derive(Debug)]
pub struct Sender {
    over: DropGuard,
    task: JoinHandle<()>,
}

/// Where a job puts its reports, from any thread. Those that come faster than they are sent are replaced.
pub type Reports = watch::Sender<Option<Update>>;

impl Sender {
    /// Sends the reports of `job`, one in `interval` at most.
    pub fn start(platform: Platform, job: String, interval: Duration) -> (Self, Reports) {
        let (reports, latest) = watch::channel(None);
        let over = CancellationToken::new();
        let task = tokio::spawn(send(platform, job, interval, latest, over.clone()));
        (Self { over: over.drop_guard(), task }, reports)
    }

    /// Ends it. A report that is on its way arrives first; one that waits is dropped, since what follows says
    /// more.
    pub async fn close(self) {
        drop(self.over);
        if let Err(e) = self.task.await {
            tracing::error!(%e, "sending progress failed in a way that was not foreseen");
        }
    }
}

async fn send(
    platform: Platform,
    job: String,
    interval: Duration,
    mut latest: watch::Receiver<Option<Update>>,
    over: CancellationToken,
) {
    loop {
        tokio::select! {
            biased;
            () = over.cancelled() => return,
            changed = latest.changed() => if changed.is_err() { return },
        }
        let next = tokio::time::Instant::now() + interval;
        let Some(update) = latest.borrow_and_update().clone() else { continue };
        let body = json!({"status": JobStatus::InProgress, "output": update}).to_string();
        match platform.post_progress(&job, body.into()).await {
            Ok(reply) if reply.status < 300 => {}
            Ok(reply) => tracing::debug!(status = reply.status, "progress was refused"),
            Err(why) => tracing::debug!(?why, "progress could not be sent"),
        }
        tokio::select! {
            biased;
            () = over.cancelled() => return,
            () = tokio::time::sleep_until(next) => {}
        }
    }
}
