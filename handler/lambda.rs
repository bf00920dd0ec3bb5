//! AWS Lambda: the same runner under the Lambda runtime API. The response is the job's output; an error is
//! reported with its code as the type and its JSON as the message.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use lambda_runtime::{Diagnostic, LambdaEvent, service_fn};
use serde_json::{Value, json};
use talkie::pipeline::Cancel;

use crate::job::{Code, JobError};
use crate::runner::{Runner, Task};

/// Bytes of a response that Lambda takes; it drops a larger one without a word to the caller.
const MAX_RESPONSE_BYTES: usize = 6_291_556;
/// A job is ended this long before Lambda would kill the process, so that the caller learns why.
const BEFORE_DEADLINE: Duration = Duration::from_secs(2);
/// Results that are remembered.
const ANSWERS: usize = 16;
/// How long a cancelled job may take to end before the caller is told anyway.
const TO_END: Duration = Duration::from_secs(2);

/// Answers invocations, one at a time, until Lambda ends the process.
///
/// # Errors
/// [`Code::InvalidInput`] when a variable of Lambda's is missing, [`Code::Internal`] when its API fails.
pub async fn run(runner: Runner) -> Result<(), JobError> {
    for name in ["AWS_LAMBDA_FUNCTION_NAME", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "AWS_LAMBDA_FUNCTION_VERSION"]
    {
        if std::env::var_os(name).is_none() {
            let message =
                format!("`{name}` is not set beside AWS_LAMBDA_RUNTIME_API, expected what Lambda sets");
            return Err(JobError::new(Code::InvalidInput, message).with_reason("CONFIG"));
        }
    }
    let broken = runner.clone();
    let function = Function { runner, answered: Mutex::default() };
    let answer = service_fn(|event| function.answer(event));
    tokio::select! {
        ended = lambda_runtime::run(answer) => ended.map_err(|e| {
            JobError::new(Code::Internal, format!("the runtime API of AWS Lambda failed: {e}"))
        }),
        reason = broken.broken() => {
            // The invocation that met it is answered meanwhile. For the next one Lambda starts a new process.
            tokio::time::sleep(TO_END).await;
            Err(JobError::new(Code::WorkerLost, reason))
        }
    }
}

struct Function {
    runner: Runner,
    /// The last results. Lambda may send an event again whose answer it has lost.
    answered: Mutex<VecDeque<(String, Value)>>,
}

impl Function {
    async fn answer(&self, event: LambdaEvent<Value>) -> Result<Value, Diagnostic> {
        let (id, deadline) = (event.context.request_id.clone(), event.context.deadline());
        if let Some(output) = self.answered_before(&id) {
            return Ok(output);
        }
        let output =
            invoke(&self.runner, event.payload, &id, deadline).await.map_err(|error| Diagnostic {
                error_type: error.code.as_str().to_string(),
                error_message: json!(error).to_string(),
            })?;
        let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.push_front((id, output.clone()));
        answered.truncate(ANSWERS);
        Ok(output)
    }

    fn answered_before(&self, id: &str) -> Option<Value> {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.iter().find(|(known, _)| known == id).map(|(_, output)| output.clone())
    }
}

/// Runs the event's `input`, or the event as a whole, under the request's id: an event that Lambda sends twice is
/// the same job.
async fn invoke(runner: &Runner, event: Value, id: &str, deadline: SystemTime) -> Result<Value, JobError> {
    let cancel = Cancel::default();
    let (input, s3_config) = match event {
        Value::Object(mut fields) if fields.contains_key("input") => {
            (fields.remove("input").unwrap_or_default(), fields.remove("s3Config"))
        }
        event => (event, None),
    };
    let task = Task {
        id: id.to_string(),
        input,
        s3_config,
        cancel: cancel.clone(),
        progress: Arc::new(|update| tracing::debug!(percent = update.percent, "{}", update.message)),
    };
    let left = deadline.duration_since(SystemTime::now()).unwrap_or_default();
    let running = runner.run(task);
    tokio::pin!(running);
    let output = tokio::select! {
        output = &mut running => output?,
        () = tokio::time::sleep(left.saturating_sub(BEFORE_DEADLINE)) => {
            cancel.cancel();
            // What it comes to no longer matters, but the next invocation needs the thread.
            let _ = tokio::time::timeout(TO_END, running).await;
            let message = "the video was not complete when Lambda's time for the function was nearly over";
            return Err(JobError::new(Code::Timeout, message)
                .with_hint("give the function more time, ask for fewer `steps` or `max_seconds`, or use a GPU"));
        }
    };
    let output = json!(output);
    let len = output.to_string().len();
    if len > MAX_RESPONSE_BYTES {
        let message = format!("the response has {len} bytes, Lambda takes {MAX_RESPONSE_BYTES}");
        return Err(JobError::new(Code::Internal, message)
            .with_reason("RESULT_TOO_LARGE")
            .with_hint("lower MAX_INLINE_BYTES, or do not ask for `output.inline`"));
    }
    Ok(output)
}
