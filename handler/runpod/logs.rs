//! Log lines as RunPod reads them: one JSON object each, on standard output.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};

use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use super::outcome::shorten;
use super::platform::VERSION;
use crate::job::{Code, JobError};

/// RunPod cuts longer messages.
const MAX_MESSAGE_CHARS: usize = 4096;
/// Room for the note that says so.
const NOTE_CHARS: usize = 64;

/// The level that `RUNPOD_LOG_LEVEL`, else `RUNPOD_DEBUG_LEVEL`, asks for.
///
/// # Errors
/// [`Code::InvalidInput`] when it is none.
pub fn level(env: impl Fn(&str) -> Option<String>) -> Result<Option<LevelFilter>, JobError> {
    for name in ["RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"] {
        let Some(text) = env(name).filter(|text| !text.trim().is_empty()) else { continue };
        return match text.trim().to_ascii_uppercase().as_str() {
            "NOTSET" | "0" => Ok(Some(LevelFilter::OFF)),
            "TRACE" | "1" => Ok(Some(LevelFilter::TRACE)),
            "DEBUG" | "2" => Ok(Some(LevelFilter::DEBUG)),
            "INFO" | "3" => Ok(Some(LevelFilter::INFO)),
            "WARN" | "4" => Ok(Some(LevelFilter::WARN)),
            "ERROR" | "5" => Ok(Some(LevelFilter::ERROR)),
            _ => {
                let message = format!(
                    "`{name}` is {text:?}, expected NOTSET, TRACE, DEBUG, INFO, WARN, ERROR or 0 to 5"
                );
                Err(JobError::new(Code::InvalidInput, message).with_reason("CONFIG"))
            }
        };
    }
    Ok(None)
}

/// What is logged at `level`: our own lines. Those of libraries may hold addresses with keys in them, and are
/// left out unless they warn.
pub fn targets(level: LevelFilter) -> Targets {
    let libraries = level.min(LevelFilter::WARN);
    let targets = Targets::new().with_default(libraries).with_target("handler", level);
    // It calls each attempt that fails an error; whether it is one is decided where it is repeated.
    targets.with_target("talkie", level).with_target("hf_hub", LevelFilter::OFF)
}

/// Logs for RunPod from now on. Its first line is the one that RunPod's own worker begins with.
pub fn start(level: LevelFilter) {
    print(&format!("--- Starting Serverless Worker |  Version {VERSION} ---"));
    // A test that runs several workers in its own process has set one already.
    let _ = Registry::default().with(Lines.with_filter(targets(level))).try_init();
}

/// A line that nobody reads is no reason to fail: standard output may be closed.
fn print(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

struct Lines;

/// The job that a span is about.
struct JobId(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let (Some(job), Some(span)) = (fields.job, context.span(id)) {
            span.extensions_mut().insert(JobId(job));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let of_span = || {
            let spans = context.event_scope(event)?;
            spans.into_iter().find_map(|span| span.extensions().get::<JobId>().map(|job| job.0.clone()))
        };
        let job = fields.job.clone().or_else(of_span);
        print(&line(job.as_deref(), &fields.text(), event.metadata().level().as_str()));
    }
}

fn line(job: Option<&str>, message: &str, level: &str) -> String {
    let message = match message.chars().count() > MAX_MESSAGE_CHARS {
        true => shorten(message, MAX_MESSAGE_CHARS - NOTE_CHARS),
        false => message.to_string(),
    };
    json!({"requestId": job, "message": message, "level": level}).to_string()
}

/// The fields of an event: what it says, of which job, and the rest as `name=value`.
#[derive(Default)]
struct Fields {
    message: String,
    job: Option<String>,
    rest: String,
}

impl Fields {
    fn text(&self) -> String {
        format!("{}{}", self.message, self.rest)
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "job" => self.job = Some(format!("{value:?}")),
            // Writing to a text does not fail.
            name => drop(write!(self.rest, " {name}={value:?}")),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "job" => self.job = Some(value.to_string()),
            _ => self.record_debug(field, &value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_json_object_with_the_middle_of_long_messages_cut() {
        assert_eq!(
            line(Some("a\"1"), "two\nlines", "INFO"),
            r#"{"requestId":"a\"1","message":"two\nlines","level":"INFO"}"#
        );
        assert_eq!(line(None, "m", "WARN"), r#"{"requestId":null,"message":"m","level":"WARN"}"#);
        let long: serde_json::Value =
            serde_json::from_str(&line(None, &format!("a{}z", "ü".repeat(9_998)), "INFO")).unwrap();
        let message = long["message"].as_str().unwrap();
        assert!(message.chars().count() <= MAX_MESSAGE_CHARS);
        assert!(message.starts_with('a') && message.ends_with('z'));
        assert!(message.contains("\n...TRUNCATED 5968 CHARACTERS...\n"), "{}", message.len());
        let whole = "x".repeat(MAX_MESSAGE_CHARS);
        assert!(line(None, &whole, "INFO").contains(&whole));
    }

    #[test]
    fn levels_are_runpods_names_and_numbers() {
        let level = |value: &str, old: &str| {
            let (value, old) = (value.to_string(), old.to_string());
            level(move |name| Some(if name == "RUNPOD_LOG_LEVEL" { value.clone() } else { old.clone() }))
        };
        assert_eq!(level("info", "ERROR").unwrap(), Some(LevelFilter::INFO));
        assert_eq!(level("", "2").unwrap(), Some(LevelFilter::DEBUG));
        assert_eq!(level("", "").unwrap(), None);
        assert_eq!(level("0", "").unwrap(), Some(LevelFilter::OFF));
        let said =
            "`RUNPOD_LOG_LEVEL` is \"loud\", expected NOTSET, TRACE, DEBUG, INFO, WARN, ERROR or 0 to 5";
        assert_eq!(level("loud", "").unwrap_err().message, said);
    }
}
