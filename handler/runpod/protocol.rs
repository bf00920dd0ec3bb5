//! What travels between clients, gateway and workers, in RunPod's words. The protocol is not documented by
//! RunPod; the shapes are those that its own clients and its Python worker send and accept.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::job::{JobError, JobStatus};

/// A job as a worker receives it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Names the job in every later message.
    pub id: String,
    /// What the sender wants; any JSON.
    pub input: Value,
    /// `webhook`, `policy`, `s3Config` and whatever else the sender gave, unchanged.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A job as `/status`, `/runsync` and the webhook show it. What does not apply is left out.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobView {
    /// The job.
    pub id: String,
    /// Where it is.
    pub status: JobStatus,
    /// Milliseconds from acceptance to the start of the last attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_time: Option<u64>,
    /// Milliseconds that the last attempt ran; only of a finished job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_time: Option<u64>,
    /// The worker of the last attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_id: Option<String>,
    /// Attempts after the first.
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: u32,
    /// The result, or the last progress of a running job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<Box<RawValue>>,
    /// Why a finished job has no result; never present before it is final, since clients stop at its sight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// The answer to `/health`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Jobs by where they are.
    pub jobs: JobCounts,
    /// Workers by what they do.
    pub workers: WorkerCounts,
}

/// Jobs by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "RunPod's own words")]
pub struct JobCounts {
    pub completed: u64,
    pub failed: u64,
    pub in_progress: u64,
    pub in_queue: u64,
    pub retried: u64,
}

/// Workers by what they do. An idle worker counts as `ready` too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "RunPod's own words")]
pub struct WorkerCounts {
    pub idle: u64,
    pub initializing: u64,
    pub ready: u64,
    pub running: u64,
    pub throttled: u64,
    pub unhealthy: u64,
}

/// What a worker posts to its job-done URL.
#[derive(Clone, Debug, PartialEq)]
pub enum Post {
    /// How far the job is. It never ends a job.
    Progress(Value),
    /// The job's end.
    Finished {
        /// Why there is no result; any truthy `error` counts.
        error: Option<String>,
        /// The result.
        output: Option<Value>,
        /// The worker asks to be replaced.
        stop_pod: bool,
    },
}

impl Post {
    /// Reads the body of a job-done request: lenient, since the Python worker writes `NaN` and error objects.
    pub fn parse(body: &[u8]) -> Self {
        let mut fields = match lenient_json(body) {
            Some(Value::Object(fields)) => fields,
            Some(other) => return Self::finished(None, Some(other), false),
            None => return Self::finished(Some("the worker's result is not JSON".to_string()), None, false),
        };
        if fields.get("status").and_then(Value::as_str) == Some(JobStatus::InProgress.as_str()) {
            return Self::Progress(fields.remove("output").unwrap_or(Value::Null));
        }
        let error = fields.remove("error").filter(is_truthy).map(|error| match error {
            Value::String(text) => text,
            other => other.to_string(),
        });
        let stop_pod = fields.get("stopPod").is_some_and(is_truthy);
        Self::finished(error, fields.remove("output"), stop_pod)
    }

    fn finished(error: Option<String>, output: Option<Value>, stop_pod: bool) -> Self {
        Self::Finished { error, output, stop_pod }
    }
}

/// Whether Python takes `value` for true.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// JSON, in which `NaN`, `Infinity` and `-Infinity` outside of strings stand for null.
fn lenient_json(body: &[u8]) -> Option<Value> {
    if let Ok(value) = serde_json::from_slice(body) {
        return Some(value);
    }
    let text = std::str::from_utf8(body).ok()?;
    let (mut plain, mut rest, mut in_string) = (String::with_capacity(text.len()), text, false);
    while let Some(next) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| rest.starts_with(word));
        let len = match word {
            Some(word) if !in_string => {
                plain.push_str("null");
                word.len()
            }
            _ => {
                // An escaped character is copied together with its backslash.
                let escaped = in_string && next == '\\';
                let len = rest.chars().take(if escaped { 2 } else { 1 }).map(char::len_utf8).sum();
                in_string ^= next == '"';
                plain.push_str(&rest[..len]);
                len
            }
        };
        rest = &rest[len..];
    }
    serde_json::from_str(&plain).ok()
}

/// Who reports an error, as RunPod's dashboards expect it beside one.
#[derive(Clone, Debug, Default)]
pub struct Reporter {
    /// `RUNPOD_POD_HOSTNAME`.
    pub hostname: String,
    /// The worker.
    pub worker_id: String,
}

/// A job's error as it is sent: a string that holds a JSON object, with our fields and RunPod's.
pub fn error_text(error: &JobError, reporter: &Reporter) -> String {
    json!({
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "retryable": error.retryable,
        "details": error.details,
        "error_type": error.code.as_str(),
        "error_message": error.message,
        "error_traceback": "",
        "hostname": reporter.hostname,
        "worker_id": reporter.worker_id,
        "runpod_version": concat!("talkie-", env!("CARGO_PKG_VERSION")),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Code;

    fn done(error: Option<&str>, output: Option<Value>, stop_pod: bool) -> Post {
        Post::finished(error.map(str::to_string), output, stop_pod)
    }

    #[test]
    fn a_post_is_read_as_the_python_worker_means_it() {
        for (body, expected) in [
            (r#"{"output": {"a": 1}}"#, done(None, Some(json!({"a": 1})), false)),
            (r#"{"output": null}"#, done(None, Some(Value::Null), false)),
            ("{}", done(None, None, false)),
            (r#"{"error": "", "output": 3}"#, done(None, Some(json!(3)), false)),
            (r#"{"error": "no", "output": 3}"#, done(Some("no"), Some(json!(3)), false)),
            (r#"{"error": {"code": 5}}"#, done(Some(r#"{"code":5}"#), None, false)),
            (r#"{"output": 1, "stopPod": true}"#, done(None, Some(json!(1)), true)),
            (r#"{"output": [NaN, -Infinity, "a \" NaN"]}"#, {
                done(None, Some(json!([null, null, "a \" NaN"])), false)
            }),
            ("<html>", done(Some("the worker's result is not JSON"), None, false)),
            (r#"{"status": "IN_PROGRESS", "output": "half"}"#, Post::Progress(json!("half"))),
        ] {
            assert_eq!(Post::parse(body.as_bytes()), expected, "{body}");
        }
    }

    #[test]
    fn an_error_is_text_that_holds_our_fields_and_runpods() {
        let error = JobError::new(Code::EmptyAudio, "`audio` is empty");
        let text = error_text(&error, &Reporter { hostname: "h".into(), worker_id: "w".into() });
        let fields: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((fields["code"].as_str(), fields["worker_id"].as_str()), (Some("EMPTY_AUDIO"), Some("w")));
        assert_eq!(fields["error_message"], "`audio` is empty");
    }

    #[test]
    fn a_view_leaves_out_what_does_not_apply() {
        let view = JobView {
            id: "a".into(),
            status: JobStatus::InQueue,
            delay_time: None,
            execution_time: None,
            worker_id: None,
            retries: 0,
            output: None,
            error: None,
        };
        assert_eq!(serde_json::to_string(&view).unwrap(), r#"{"id":"a","status":"IN_QUEUE"}"#);
    }
}
