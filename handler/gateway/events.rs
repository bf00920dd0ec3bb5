//! A job's life as Server-Sent Events.
//!
//! `status` holds the job as `/status` shows it, and for one that waits its `position` in the queue (how many
//! are before it) and, where it is not plain, the `reason` why it waits. `progress` holds the worker's last
//! report. The stream ends after the status that is final.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::Gateway;
use super::hub::Watch;
use super::server::Closing;
use crate::job::JobStatus;
use crate::runpod::protocol::JobView;

/// How late a change of the position may be told. Nobody else's job tells this one's watchers.
const POSITION_PERIOD: Duration = Duration::from_secs(1);
/// Proxies close what is silent for longer than 30 s to 60 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The events of the job `id`.
pub(super) fn events(gateway: Arc<Gateway>, id: String, closing: Closing) -> Response {
    let watch = gateway.hub.watch(&id);
    let story = Story {
        gateway,
        id,
        closing,
        watch,
        told: None,
        progress: None,
        ready: VecDeque::new(),
        over: false,
    };
    let events = futures::stream::unfold(story, |mut story| async {
        story.next().await.map(|event| (Ok::<_, Infallible>(event), story))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE).text("still here")).into_response()
}

/// What has been told of a job, and what comes next.
struct Story {
    gateway: Arc<Gateway>,
    id: String,
    closing: Closing,
    watch: Watch,
    told: Option<Told>,
    progress: Option<Value>,
    ready: VecDeque<Event>,
    over: bool,
}

/// What makes a new `status` event.
#[derive(Clone, PartialEq)]
struct Told {
    status: JobStatus,
    retries: u32,
    position: Option<u64>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct Status {
    #[serde(flatten)]
    view: JobView,
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Story {
    /// The next event, when there is one; None at the end.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over || self.look().is_none() {
                return None;
            }
            if !self.ready.is_empty() {
                continue;
            }
            let waits = self.told.as_ref().is_some_and(|told| told.status == JobStatus::InQueue);
            let look_again = async {
                match waits {
                    true => tokio::time::sleep(POSITION_PERIOD).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.watch.changed() => {}
                () = look_again => {}
                () = self.closing.0.cancelled() => return None,
            }
        }
    }

    /// Looks at the job, and makes events of what is new. None when there is no job any more.
    fn look(&mut self) -> Option<()> {
        let job = self.gateway.store.job(&self.id).ok()??;
        let waits = job.status == JobStatus::InQueue;
        let now = Told {
            status: job.status,
            retries: job.retries,
            position: waits.then(|| self.gateway.store.position(&self.id).ok().flatten()).flatten(),
            reason: waits.then(|| self.gateway.pool.trouble()).flatten(),
        };
        if self.told.as_ref() != Some(&now) {
            let view = self.gateway.view(&job).ok()?;
            let status = Status { view, position: now.position, reason: now.reason.clone() };
            self.ready.push_back(event("status", &status)?);
            self.over = now.status.is_terminal();
            self.told = Some(now);
        }
        let progress = self.gateway.hub.progress(&self.id).filter(|_| job.status == JobStatus::InProgress);
        if let Some(progress) = progress.filter(|progress| self.progress.as_ref() != Some(progress)) {
            self.ready.push_back(event("progress", &progress)?);
            self.progress = Some(progress);
        }
        Some(())
    }
}

fn event(name: &str, data: &impl Serialize) -> Option<Event> {
    Event::default().event(name).json_data(data).ok()
}
