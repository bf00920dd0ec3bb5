//! The body that ends a job: never larger than the platform takes, and never empty.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::protocol::{Reporter, error_text};
use crate::job::{Code, JobError, JobOutput};

/// Characters of a message or a hint; of what is longer the middle is cut.
const MAX_TEXT_CHARS: usize = 8192;
/// Bytes of `details`, as JSON; what is longer is left out.
const MAX_DETAILS_BYTES: usize = 16_384;

/// How ends are written.
#[derive(Clone, Debug)]
pub struct Writer {
    /// Who reports errors.
    pub reporter: Reporter,
    /// Bytes that a body may have.
    pub max_bytes: usize,
    /// Each end asks the platform to replace this worker.
    pub stop_pod: bool,
}

impl Writer {
    /// The body for `outcome`.
    pub fn body(&self, outcome: Result<&JobOutput, &JobError>) -> Box<RawValue> {
        let body = match outcome {
            Ok(output) => json!({ "output": output }),
            Err(error) => json!({ "error": error_text(&cut(error), &self.reporter) }),
        };
        let body = self.finished(body);
        if body.get().len() <= self.max_bytes {
            return body;
        }
        let (len, most) = (body.get().len(), self.max_bytes);
        let message = format!("the result has {len} bytes, at most {most} can be sent to the platform");
        let error = JobError::new(Code::Internal, message).with_reason("RESULT_TOO_LARGE");
        self.finished(json!({ "error": error_text(&error, &self.reporter) }))
    }

    fn finished(&self, mut body: Value) -> Box<RawValue> {
        if self.stop_pod {
            body["stopPod"] = true.into();
        }
        raw(&body)
    }
}

/// Tells, in place of a result that the platform does not take, that there was one.
pub fn refusal(status: u16, bytes: usize) -> Box<RawValue> {
    raw(&json!({ "error": format!("result refused: HTTP {status} ({bytes} bytes)") }))
}

/// JSON of a value is JSON; the fallback says what it cannot happen to say.
fn raw(value: &Value) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).unwrap_or_default()
}

/// `error` with long texts cut.
fn cut(error: &JobError) -> JobError {
    let mut error = error.clone();
    error.message = cut_text(&error.message);
    error.hint = error.hint.as_deref().map(cut_text);
    let bytes = json!(error.details).to_string().len();
    if bytes > MAX_DETAILS_BYTES {
        error.details.clear();
        return error.with_detail("cut", format!("{bytes} bytes of details were left out"));
    }
    error
}

fn cut_text(text: &str) -> String {
    shorten(text, MAX_TEXT_CHARS)
}

/// `text`, or its ends and how much is missing between them, in `most` characters and a note.
pub fn shorten(text: &str, most: usize) -> String {
    let chars = text.chars().count();
    if chars <= most {
        return text.to_string();
    }
    let head: String = text.chars().take(most / 2).collect();
    let tail: String = text.chars().skip(chars - most / 2).collect();
    format!("{head}\n...TRUNCATED {} CHARACTERS...\n{tail}", chars - 2 * (most / 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runpod::protocol::Post;

    fn writer(max_bytes: usize, stop_pod: bool) -> Writer {
        Writer { reporter: Reporter::default(), max_bytes, stop_pod }
    }

    fn error_in(body: &RawValue) -> Value {
        let Post::Finished { error: Some(text), output: None, .. } = Post::parse(body.get().as_bytes())
        else {
            panic!("no error: {body}")
        };
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn an_end_is_read_by_the_gateway_as_it_was_meant() {
        let output = JobOutput { video_url: "https://x/v.mp4".into(), ..JobOutput::default() };
        let body = writer(20_000_000, true).body(Ok(&output));
        let Post::Finished { error: None, output: Some(read), stop_pod: true } =
            Post::parse(body.get().as_bytes())
        else {
            panic!("{body}")
        };
        assert_eq!(read, json!(output));
        let error = JobError::new(Code::EmptyAudio, "`audio` is empty");
        let body = writer(20_000_000, false).body(Err(&error));
        assert_eq!(error_in(&body)["code"], "EMPTY_AUDIO");
        assert!(!body.get().contains("stopPod"));
    }

    #[test]
    fn fault_32_a_result_over_the_limit_is_replaced_by_an_error_that_says_so() {
        for chars in [10, 9_900, 100_000] {
            let output = JobOutput { warnings: vec!["x".repeat(chars)], ..JobOutput::default() };
            let body = writer(10_000, false).body(Ok(&output));
            assert!(body.get().len() <= 10_000);
            assert_eq!(body.get().contains("RESULT_TOO_LARGE"), chars > 8_000, "{chars}");
        }
    }

    #[test]
    fn fault_32_a_long_error_is_cut_with_a_note() {
        let error = JobError::new(Code::Internal, "ä".repeat(3_000_000))
            .with_hint("h".repeat(1_000_000))
            .with_detail("log", "l".repeat(1_000_000));
        let body = writer(20_000_000, false).body(Err(&error));
        assert!(body.get().len() < 100_000, "{}", body.get().len());
        let read = error_in(&body);
        let message = read["message"].as_str().unwrap();
        assert!(message.contains("TRUNCATED 2991808 CHARACTERS"), "{}", message.len());
        assert_eq!(read["details"]["cut"], "1000010 bytes of details were left out");
    }
}
