//! What happens with time: leases, timeouts, retention.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Gateway;
use super::store::Swept;
use crate::storage::{Extent, Storage, prune};

/// How late a lease or a timeout may be noticed while a job waits or runs.
const PERIOD: Duration = Duration::from_secs(1);
/// How late the end of a retention may be noticed while none does.
const PERIOD_AT_REST: Duration = Duration::from_secs(60);
/// Between two looks at what has expired in the bucket.
const BUCKET_PERIOD: Duration = Duration::from_secs(300);
/// What is deleted at one look.
const BUCKET_EXTENT: Extent = Extent { deletes: 1000, pages: 10, dry_run: false };

/// Ends what is overdue, for as long as the gateway lives. `changed` is rung when a job changes.
pub async fn run(gateway: Arc<Gateway>, changed: Arc<Notify>) {
    let mut due = Instant::now();
    loop {
        tokio::time::sleep_until(due).await;
        match gateway.store.sweep().await {
            Ok(swept) => act(&gateway, swept),
            Err(e) => tracing::error!("overdue jobs could not be ended: {e}"),
        }
        if !gateway.store.at_rest() {
            due = Instant::now() + PERIOD;
            continue;
        }
        // A job that comes now begins a lease or a timeout, which is seconds long at least.
        let rest = tokio::time::timeout(PERIOD_AT_REST, changed.notified()).await;
        due = if rest.is_ok() { Instant::now() + PERIOD } else { Instant::now() };
    }
}

/// Tells everybody what the store has ended.
fn act(gateway: &Gateway, swept: Swept) {
    for (job, worker) in &swept.timed_out {
        gateway.pool.time_out(worker, job);
    }
    for (_, worker) in &swept.lost {
        gateway.pool.silent(worker);
    }
    for (job, worker) in &swept.forgotten {
        if let Some(worker) = worker {
            gateway.pool.stop_job(worker, job);
        }
        gateway.hub.clear_progress(job);
        gateway.hub.job_changed(job);
        gateway.media.remove(job);
    }
}

/// Deletes expired videos, and what nobody came for in the `spool` of the workers, for as long as the gateway lives.
pub async fn sweep_bucket(storage: Storage, spool: PathBuf) {
    let keep = storage.lifetimes().spool;
    loop {
        let spool = spool.clone();
        // What fails is tried again at the next look.
        let _ = tokio::task::spawn_blocking(move || prune(&spool, keep)).await;
        if let Err(e) = storage.sweep(BUCKET_EXTENT).await {
            tracing::warn!("expired videos could not be deleted: {e}");
        }
        tokio::time::sleep(BUCKET_PERIOD).await;
    }
}
