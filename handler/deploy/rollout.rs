//! After a change: waiting until workers have it, and one job as a test.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::api::Api;
use crate::job::{Code, JobError, JobStatus};

/// Pauses between looks, in units.
const BETWEEN_LOOKS: u32 = 5;
/// RunPod holds `/runsync` open for this long at most.
const LONGEST_HOLD: Duration = Duration::from_secs(300);
/// A reply that was promised for a time may come a little later.
const SLACK: Duration = Duration::from_secs(30);

/// Waits until no worker has to be replaced but those that finish a job, and none of the others starts.
///
/// # Errors
/// [`Code::Internal`] when a new worker is unhealthy, [`Code::Timeout`] after `patience`.
pub async fn wait(api: &Api, id: &str, patience: Duration, say: &impl Fn(&str)) -> Result<(), JobError> {
    let until = Instant::now() + patience;
    let mut told = String::new();
    loop {
        let list = api.get(&format!("/serverless/{id}/workers")).await?;
        let state = Workers::read(&list);
        let words = state.words();
        if words != told {
            say(&words);
            told = words;
        }
        if state.unhealthy > 0 {
            let message = format!("the endpoint {id} has unhealthy workers of the new version");
            return Err(JobError::new(Code::Internal, message)
                .with_reason("WORKER_UNHEALTHY")
                .with_hint("the worker's log in RunPod's console says why; `--rollback` goes back"));
        }
        if state.outdated == 0 && state.starting == 0 {
            return Ok(());
        }
        if Instant::now() >= until {
            let message = format!("the endpoint {id} is not ready after {} s: {told}", patience.as_secs());
            return Err(JobError::new(Code::Timeout, message).with_reason("ROLLOUT"));
        }
        api.pause(BETWEEN_LOOKS).await;
    }
}

/// How many workers are how far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Workers {
    /// Of the new version and at work, or waiting for it.
    ready: usize,
    /// Of the new version, not ready yet.
    starting: usize,
    /// Of the new version, and unfit.
    unhealthy: usize,
    /// Of the version before, at work: each is replaced after its job.
    finishing: usize,
    /// Of the version before.
    outdated: usize,
}

impl Workers {
    fn read(list: &Value) -> Self {
        let mut state = Self::default();
        for worker in list["workers"].as_array().into_iter().flatten() {
            let is_old = worker["isStale"].as_bool().unwrap_or_default();
            let count = match (is_old, worker["status"].as_str().unwrap_or_default()) {
                (true, "RUNNING") => &mut state.finishing,
                // One that waits for a machine has none of any version yet.
                (_, "THROTTLED") => continue,
                (true, _) => &mut state.outdated,
                (false, "INITIALIZING") => &mut state.starting,
                (false, "UNHEALTHY") => &mut state.unhealthy,
                (false, _) => &mut state.ready,
            };
            *count += 1;
        }
        state
    }

    fn words(&self) -> String {
        if *self == Self::default() {
            return "no worker runs; the next one starts with the new version".to_string();
        }
        let Self { ready, starting, unhealthy, finishing, outdated } = self;
        format!(
            "workers: {ready} ready, {starting} starting, {unhealthy} unhealthy; \
             of the version before: {finishing} finish a job, {outdated} end"
        )
    }
}

/// A job that went through.
#[derive(Clone, Debug, Serialize)]
pub struct Smoke {
    /// The job.
    pub job_id: String,
    /// Milliseconds that it waited, a cold start among them.
    pub delay_ms: Option<u64>,
    /// Milliseconds that it ran.
    pub execution_ms: Option<u64>,
    /// The worker that ran it.
    pub worker_id: Option<String>,
}

/// Sends a job with `input`, and checks that a video comes of it.
///
/// # Errors
/// [`Code::Internal`] when the job fails, [`Code::Timeout`] after `patience`; the job is cancelled then.
pub async fn smoke(
    api: &Api,
    endpoint: &Value,
    input: &Value,
    patience: Duration,
    say: &impl Fn(&str),
) -> Result<Smoke, JobError> {
    let until = Instant::now() + patience;
    let url = |name: &str| {
        endpoint["requestUrls"][name].as_str().ok_or_else(|| {
            let message = format!("the endpoint has no address for `{name}`");
            JobError::new(Code::Internal, message).with_reason("PLATFORM")
        })
    };
    let hold = patience.clamp(Duration::from_secs(1), LONGEST_HOLD);
    let runsync = format!("{}?wait={}", url("runSync")?, hold.as_millis());
    let mut job = api.endpoint(&runsync, Some(&json!({"input": input})), hold + SLACK).await?;
    let id = job["id"].as_str().unwrap_or_default().to_string();
    let mut told = Value::Null;
    loop {
        let status = job["status"].as_str().and_then(JobStatus::from_name);
        match status {
            Some(JobStatus::Completed) => return completed(&job, id),
            Some(status) if status.is_terminal() => return Err(failed(&id, status, &job["error"])),
            _ => {}
        }
        if job["status"] != told {
            say(&format!("the test job {id} is {}", job["status"].as_str().unwrap_or("in no known state")));
            told = job["status"].clone();
        }
        if Instant::now() >= until {
            let cancel = url("cancel")?.replace("{job_id}", &id);
            // The job is given up whether or not it hears of it.
            let _ = api.endpoint(&cancel, Some(&json!({})), SLACK).await;
            let message = format!("the test job {id} has no result after {} s", patience.as_secs());
            return Err(JobError::new(Code::Timeout, message).with_reason("SMOKE"));
        }
        api.pause(BETWEEN_LOOKS).await;
        job = api.endpoint(&url("status")?.replace("{job_id}", &id), None, SLACK).await?;
    }
}

fn completed(job: &Value, job_id: String) -> Result<Smoke, JobError> {
    if job["output"]["video_url"].as_str().is_none_or(str::is_empty) {
        let message = format!("the test job {job_id} is completed without a video");
        return Err(JobError::new(Code::Internal, message).with_reason("SMOKE"));
    }
    Ok(Smoke {
        job_id,
        delay_ms: job["delayTime"].as_u64(),
        execution_ms: job["executionTime"].as_u64(),
        worker_id: job["workerId"].as_str().map(str::to_string),
    })
}

/// A worker's error is a text that holds JSON.
fn failed(id: &str, status: JobStatus, error: &Value) -> JobError {
    let text = error.as_str().unwrap_or_default();
    let inner: Value = serde_json::from_str(text).unwrap_or_default();
    let field = |name: &str| inner[name].as_str();
    let said = field("message").or(field("error_message")).unwrap_or(text);
    let code = field("code").unwrap_or("no code");
    let message = format!("the test job {id} is {}: {code}: {said}", status.as_str());
    let failed = JobError::new(Code::Internal, message).with_reason("SMOKE");
    match field("hint") {
        Some(hint) => failed.with_hint(hint),
        None => failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_counted_by_version_and_state() {
        let worker = |status: &str, is_old: bool| json!({"id": "w", "status": status, "isStale": is_old});
        let list = json!({"workers": [
            worker("RUNNING", false), worker("IDLE", false), worker("INITIALIZING", false),
            worker("UNHEALTHY", false), worker("THROTTLED", false), worker("RUNNING", true),
            worker("IDLE", true), worker("UNHEALTHY", true), worker("THROTTLED", true),
        ]});
        let state = Workers::read(&list);
        assert_eq!(state, Workers { ready: 2, starting: 1, unhealthy: 1, finishing: 1, outdated: 2 });
        assert!(Workers::read(&json!({"workers": []})).words().starts_with("no worker runs"));
    }

    #[test]
    fn a_failed_job_is_told_in_its_own_words() {
        let error =
            json!(r#"{"code": "UPLOAD_FAILED", "message": "no bucket", "hint": "set R2_BUCKET_NAME"}"#);
        let e = failed("j", JobStatus::Failed, &error);
        assert_eq!(e.message, "the test job j is FAILED: UPLOAD_FAILED: no bucket");
        assert_eq!(e.hint.as_deref(), Some("set R2_BUCKET_NAME"));
        assert!(failed("j", JobStatus::TimedOut, &json!("job timed out")).message.ends_with("job timed out"));
        assert!(completed(&json!({"output": {}}), "j".into()).is_err());
    }
}
