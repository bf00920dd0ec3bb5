//! Posting a result until the platform has acknowledged it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::interval;

use super::outcome;
use super::platform::{NoReply, Platform};
use super::sender::Sender;
use super::spool::{Record, Spool};
use super::take::Pace;
use crate::faults::kill_point;

/// How results are delivered; clones share connections and spool.
#[derive(Clone)]
pub struct Delivery {
    /// Where to.
    pub platform: Platform,
    /// Where they are kept meanwhile.
    pub spool: Arc<Spool>,
    /// The unit of pauses.
    pub unit: Duration,
    /// How old a result may become.
    pub ttl: Duration,
}

/// How one attempt went.
enum Attempt {
    Acknowledged,
    /// The platform does not want this result.
    Refused(u16),
    /// It may later, after what it asked for; and why.
    Later(Option<Duration>, String),
    /// It asks for a pause.
    TooMany(Option<Duration>),
}

impl Delivery {
    /// Keeps the result of a job that has just ended, and delivers it after the progress that is on its way.
    pub async fn deliver_new(self, record: Record, sender: Option<Sender>) {
        let record = Arc::new(record);
        let (spool, kept) = (self.spool.clone(), record.clone());
        if let Err(e) = on_disk(move || spool.keep(&kept)).await {
            tracing::error!(job = record.job, %e, "the result cannot be spooled: only this process can deliver it");
        }
        kill_point("K22");
        if let Some(sender) = sender {
            sender.close().await;
        }
        self.deliver(record).await;
    }

    /// Posts until there is an end to it.
    pub async fn deliver(self, record: Arc<Record>) {
        let own = self.platform.endpoints().worker_id.clone();
        let body = Bytes::from(record.body.get().to_string());
        let mut worker = record.worker.as_str();
        let mut pace = Pace::new(self.unit);
        loop {
            let (pause, why) = match self.attempt(worker, &record.job, body.clone()).await {
                Attempt::Acknowledged => {
                    kill_point("K23");
                    let (spool, job) = (self.spool.clone(), record.job.clone());
                    let removed = on_disk(move || spool.remove(&job)).await;
                    return removed.unwrap_or_else(|e| {
                        let job = &record.job;
                        tracing::warn!(job, %e, "an acknowledged result stays in the spool, and is sent again");
                    });
                }
                // A dead worker's result may be welcome from the one that lives.
                Attempt::Refused(401 | 403 | 404) if worker != own => {
                    worker = &own;
                    continue;
                }
                Attempt::Refused(status) => return self.refused(worker, &record, status).await,
                Attempt::Later(asked, why) => (asked.unwrap_or_else(|| pace.after_failure()), why),
                Attempt::TooMany(asked) => (pace.after_too_many(asked), "HTTP 429".to_string()),
            };
            if record.age() + pause > self.ttl {
                tracing::error!(job = record.job, why, "the result could not be delivered in time");
                return self.put_aside(&record).await;
            }
            tracing::warn!(job = record.job, why, ?pause, "the result could not be delivered yet");
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt(&self, worker: &str, job: &str, body: Bytes) -> Attempt {
        let reply = match self.platform.post_result(worker, job, body).await {
            Ok(reply) => reply,
            Err(NoReply::TimedOut) => return Attempt::Later(None, "no answer in time".to_string()),
            Err(NoReply::Failed(why)) => return Attempt::Later(None, why),
        };
        match reply.status {
            200..=299 => Attempt::Acknowledged,
            429 => Attempt::TooMany(reply.retry_after),
            408 | 425 => Attempt::Later(reply.retry_after, format!("HTTP {}", reply.status)),
            status @ 400..=499 => Attempt::Refused(status),
            status => Attempt::Later(reply.retry_after, format!("HTTP {status}")),
        }
    }

    /// Says so once, that the job does not hang, and keeps what was refused.
    async fn refused(&self, worker: &str, record: &Record, status: u16) {
        tracing::error!(job = record.job, status, bytes = record.body.get().len(), "the result was refused");
        let body = outcome::refusal(status, record.body.get().len());
        if let Attempt::Refused(_) | Attempt::Later(..) | Attempt::TooMany(_) =
            self.attempt(worker, &record.job, body.get().to_string().into()).await
        {
            tracing::error!(job = record.job, "and so was the news of it");
        }
        self.put_aside(record).await;
    }

    async fn put_aside(&self, record: &Record) {
        let (spool, job) = (self.spool.clone(), record.job.clone());
        match on_disk(move || spool.reject(&job)).await {
            Ok(path) => tracing::error!(job = record.job, path = %path.display(), "the result is kept there"),
            Err(e) => tracing::error!(job = record.job, %e, "the result cannot be put aside"),
        }
    }
}

/// Runs what waits for the disk on a thread that may wait.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)))
}

/// What dead processes left in the spool.
pub(super) async fn adopt(spool: Arc<Spool>) -> Vec<Record> {
    on_disk(move || spool.adopt()).await.unwrap_or_else(|e| {
        tracing::error!(%e, "the spool cannot be searched for results that were left behind");
        Vec::new()
    })
}

/// Shows that this process lives, and looks for what dead ones left.
pub(super) async fn keep_up(spool: Arc<Spool>, every: Duration, left_behind: mpsc::Sender<Vec<Record>>) {
    let mut ticks = interval(every);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let records = adopt(spool.clone()).await;
        if !records.is_empty() && left_behind.send(records).await.is_err() {
            return;
        }
    }
}
