//! What happens without a verb: the mode is picked from the flags of RunPod's own SDK and from the environment.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use serde_json::{Value, json};
use talkie::pipeline::Cancel;
use talkie::request::read_json;

use super::{EXIT_FAILED, print_json};
use crate::config::{Config, ConfigArgs};
use crate::job::{Code, JobError};
use crate::lambda;
use crate::runner::{Runner, RunnerArgs, Task};
use crate::storage::StorageArgs;

/// The rules, for `--help`.
pub(super) const HELP: &str = "Without a verb the mode is picked as RunPod's SDK does:\n  \
    --test_input ['<json>']  run one job, {\"input\": {…}}, or the one in ./test_input.json, and end\n  \
    --rp_serve_api           serve, at --rp_api_host (localhost) and --rp_api_port (8000), with\n                           \
    --rp_api_concurrency workers; --rp_log_level and --rp_debugger set the log level\n  \
    AWS_LAMBDA_RUNTIME_API   run as a function of AWS Lambda\n  \
    RUNPOD_WEBHOOK_GET_JOB   worker\n  \
    nothing of these         serve\n\
    RunPod's realtime mode (RUNPOD_REALTIME_PORT) is not offered.";

/// The local job's id, as the SDK has it.
const TEST_ID: &str = "local_test";
/// The job where the flag has no value.
const TEST_FILE: &str = "test_input.json";
/// The SDK's flags, and whether each takes a value.
const FLAGS: [(&str, bool); 7] = [
    ("--test_input", true),
    ("--rp_serve_api", false),
    ("--rp_api_host", true),
    ("--rp_api_port", true),
    ("--rp_api_concurrency", true),
    ("--rp_log_level", true),
    ("--rp_debugger", false),
];

/// The flags of RunPod's SDK.
#[derive(Debug, Parser)]
#[command(name = "handler", disable_help_flag = true)]
struct SdkFlags {
    /// A job as JSON.
    #[arg(long = "test_input", num_args = 0..=1, default_missing_value = "")]
    test_input: Option<String>,
    #[arg(long = "rp_serve_api")]
    serve_api: bool,
    #[arg(long = "rp_api_host", default_value = "localhost")]
    host: String,
    #[arg(long = "rp_api_port", default_value_t = 8000)]
    port: u16,
    #[arg(long = "rp_api_concurrency")]
    concurrency: Option<u16>,
    #[arg(long = "rp_log_level", ignore_case = true, value_parser = ["ERROR", "WARN", "INFO", "DEBUG"])]
    log_level: Option<String>,
    #[arg(long = "rp_debugger")]
    debugger: bool,
}

/// What the flags of a local job may be, beside the SDK's own.
#[derive(Debug, Parser)]
#[command(name = "handler")]
struct LocalFlags {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    runner: RunnerArgs,
    #[command(flatten)]
    storage: StorageArgs,
}

/// A command line, and what it means.
#[derive(Debug)]
pub(super) enum Mode {
    /// A verb, which may have been added.
    Verb(Vec<OsString>),
    /// One job, as JSON.
    Test(Vec<OsString>, String),
    /// A function of AWS Lambda.
    Lambda(Vec<OsString>),
}

impl Mode {
    /// Picks the mode of `args` (the program's name first). `has_verb` tells of a command line without the SDK's
    /// flags whether there is a verb in it; `is_set` tells whether a variable is.
    pub(super) fn pick(
        args: impl Iterator<Item = OsString>,
        has_verb: impl Fn(&[OsString]) -> bool,
        is_set: impl Fn(&str) -> bool,
    ) -> Result<Self, JobError> {
        let (sdk, mut rest) = split(args);
        if has_verb(&rest) {
            return match sdk.get(1) {
                None => Ok(Self::Verb(rest)),
                Some(flag) => {
                    let message = format!("`{}` goes without a verb", flag.to_string_lossy());
                    Err(JobError::new(Code::InvalidInput, message).with_reason("USAGE"))
                }
            };
        }
        let flags = SdkFlags::try_parse_from(sdk).map_err(|wrong| super::usage(&wrong))?;
        if let Some(level) = flags.log_level() {
            rest.extend(["--log-level".into(), level.into()]);
        }
        if flags.serve_api {
            rest.extend(["--addr".into(), format!("{}:{}", flags.host, flags.port).into()]);
            if let Some(workers) = flags.concurrency {
                rest.extend(["--max-workers".into(), workers.to_string().into()]);
            }
            return Ok(Self::added("serve", rest));
        }
        if let Some(job) = flags.test_input {
            return Ok(Self::Test(rest, job));
        }
        if is_set("AWS_LAMBDA_RUNTIME_API") {
            return Ok(Self::Lambda(rest));
        }
        Ok(Self::added(if is_set("RUNPOD_WEBHOOK_GET_JOB") { "worker" } else { "serve" }, rest))
    }

    /// The command line `args` with `verb` before its flags.
    fn added(verb: &str, mut args: Vec<OsString>) -> Self {
        args.insert(args.len().min(1), verb.into());
        Self::Verb(args)
    }
}

impl SdkFlags {
    fn log_level(&self) -> Option<String> {
        let level = self.log_level.as_ref().map(|level| level.to_ascii_lowercase());
        level.or_else(|| self.debugger.then(|| "debug".to_string()))
    }
}

/// The SDK's flags with their values, and the rest; the program's name in both.
fn split(mut args: impl Iterator<Item = OsString>) -> (Vec<OsString>, Vec<OsString>) {
    let program: Vec<OsString> = args.next().into_iter().collect();
    let (mut sdk, mut rest) = (program.clone(), program);
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let name = text.split('=').next().unwrap_or_default();
        let Some((_, takes_value)) = FLAGS.iter().find(|(flag, _)| *flag == name) else {
            rest.push(arg);
            continue;
        };
        sdk.push(arg);
        if *takes_value && !text.contains('=') {
            sdk.extend(args.next_if(|value| !value.to_string_lossy().starts_with("--")));
        }
    }
    (sdk, rest)
}

/// Runs the job `text`, or that of the file where it is empty, as the SDK does: exit code 1 for any failure.
pub(super) fn test(args: Vec<OsString>, text: &str, started: Instant) -> Result<ExitCode, JobError> {
    match local(args, started).and_then(|runner| run_test(&runner, text)) {
        Ok(output) => {
            print_json(&json!({ "output": output }))?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            // There is nobody left to tell when standard error is closed.
            let _ = writeln!(io::stderr(), "{}", json!(error));
            Ok(ExitCode::from(EXIT_FAILED))
        }
    }
}

fn run_test(runner: &Runner, text: &str) -> Result<Value, JobError> {
    let job = match text.is_empty() {
        false => read_json(text.as_bytes())?,
        true => {
            let unreadable = |e| {
                let message = format!("{TEST_FILE} cannot be read: {e}");
                JobError::new(Code::InvalidInput, message)
                    .with_hint("give the job itself, `--test_input '{\"input\": {…}}'`, or put it there")
            };
            read_json(&std::fs::read(TEST_FILE).map_err(unreadable)?)?
        }
    };
    let Some(input) = job.get("input") else {
        let message = "`input` is missing: a job is {\"input\": {…}}";
        return Err(JobError::new(Code::MissingField, message));
    };
    let id = job.get("id").and_then(Value::as_str).unwrap_or(TEST_ID);
    let task = Task {
        id: id.to_string(),
        input: input.clone(),
        s3_config: job.get("s3Config").cloned(),
        cancel: Cancel::default(),
        progress: Arc::new(|update| {
            tracing::info!(stage = update.stage.as_str(), percent = update.percent, "{}", update.message);
        }),
    };
    let output = runtime()?.block_on(runner.run(task))?;
    Ok(json!(output))
}

/// Runs as a function of AWS Lambda until Lambda ends the process.
pub(super) fn lambda(args: Vec<OsString>, started: Instant) -> Result<ExitCode, JobError> {
    let runner = runner(args, started, None)?;
    runtime()?.block_on(lambda::run(runner))?;
    Ok(ExitCode::SUCCESS)
}

/// A runner whose videos, where there is no bucket, go into this folder.
fn local(args: Vec<OsString>, started: Instant) -> Result<Runner, JobError> {
    runner(args, started, Some(PathBuf::from(".")))
}

fn runner(args: Vec<OsString>, started: Instant, folder: Option<PathBuf>) -> Result<Runner, JobError> {
    let flags = LocalFlags::try_parse_from(args).map_err(|wrong| super::usage(&wrong))?;
    let config =
        Config::new(&flags.config, |name| std::env::var_os(name).map(PathBuf::from), Path::new("/"))?;
    super::start_logging(config.log_level.into());
    let mut settings = flags.runner.settings(&config, &flags.storage, started)?;
    settings.folder = folder;
    Runner::new(settings)
}

fn runtime() -> Result<tokio::runtime::Runtime, JobError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| JobError::new(Code::Internal, format!("no thread can be started: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(line: &str, set: &[&str]) -> Result<String, JobError> {
        let args = std::iter::once("handler").chain(line.split_whitespace()).map(OsString::from);
        let has_verb = |args: &[OsString]| args.iter().any(|arg| arg == "generate" || arg == "worker");
        let joined = |args: Vec<OsString>| args[1..].join(" ".as_ref()).into_string().unwrap();
        Ok(match Mode::pick(args, has_verb, |name| set.contains(&name))? {
            Mode::Verb(args) => joined(args),
            Mode::Test(args, job) => format!("test {job}|{}", joined(args)),
            Mode::Lambda(args) => format!("lambda|{}", joined(args)),
        })
    }

    #[test]
    fn the_mode_follows_flags_then_variables() {
        let all = ["AWS_LAMBDA_RUNTIME_API", "RUNPOD_WEBHOOK_GET_JOB"];
        for (line, set, expected) in [
            ("", &[][..], "serve"),
            ("--log-level=info", &[], "serve --log-level=info"),
            ("", &all[1..], "worker"),
            ("", &all, "lambda|"),
            ("generate --seed 1", &all, "generate --seed 1"),
            ("--test_input {}", &all, "test {}|"),
            ("--test_input={} --model tiny", &all, "test {}|--model tiny"),
            ("--test_input --rp_debugger", &[], "test |--log-level debug"),
            ("--rp_serve_api", &all, "serve --addr localhost:8000"),
            (
                "--rp_serve_api --rp_api_port 9 --rp_api_host=0.0.0.0 --rp_api_concurrency 2 --rp_log_level INFO",
                &[],
                "serve --log-level info --addr 0.0.0.0:9 --max-workers 2",
            ),
        ] {
            assert_eq!(pick(line, set).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn the_sdks_flags_go_without_a_verb() {
        assert!(pick("generate --test_input {}", &[]).is_err());
        assert!(pick("--rp_serve_api --rp_api_port none", &[]).is_err());
        assert!(pick("--rp_serve_api --rp_log_level loud", &[]).is_err());
    }
}
