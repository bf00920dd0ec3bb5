//! The command line: verbs, exit codes, and errors as JSON on standard error.

mod bench;
mod deploy;
mod display;
mod doctor;
mod estimate;
mod flags;
mod gc;
mod generate;
mod install;
mod keys;
mod prefetch;
mod prepare;
mod rp;
mod serve;
mod worker;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};
use serde::Serialize;
use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Config, ConfigArgs};
use crate::job::{Code, JobError};
use crate::runpod::logs;
use crate::schema;
use rp::Mode;

/// The exit code for input that has to change.
const EXIT_BAD_INPUT: u8 = 2;
/// The exit code for everything else.
const EXIT_FAILED: u8 = 1;

const AFTER_HELP: &str = "Exit codes: 0 done, 2 bad input, 1 any other failure. Results are JSON on standard \
    output; an error is one line of JSON on standard error, after progress and messages.";

/// A portrait and a voice in, a talking video out.
#[derive(Debug, Parser)]
#[command(name = "handler", version, after_help = [rp::HELP, AFTER_HELP].join("\n\n"))]
struct Cli {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make one video from files or URLs
    Generate(Box<flags::Args>),
    /// Say what a request will take, in time, memory and money, without making it
    Estimate(Box<estimate::Args>),
    /// Check this machine: GPU, memory, disks, models, bucket
    Doctor(Box<doctor::Args>),
    /// Offer RunPod's endpoint API here, and start workers on demand
    Serve(Box<serve::Args>),
    /// Take jobs from RunPod, or from a gateway, and run them
    Worker(Box<worker::Args>),
    /// Fetch a model's files, verified and resumable, before they are needed
    Prefetch(Box<prefetch::Args>),
    /// Create, list and revoke the gateway's keys
    Keys(keys::Args),
    /// Delete expired videos, and finish interrupted uploads
    Gc(Box<gc::Args>),
    /// Convert a model's weights once, so that each later cold start reads less
    Prepare(Box<prepare::Args>),
    /// Make or update the RunPod endpoint of runpod.toml
    Deploy(Box<deploy::Args>),
    /// Time the stages of a generation on this machine, with random weights
    Bench(bench::Args),
    /// Print the JSON Schema of input and output
    Schema,
}

/// Runs the verb that `args` (the program's name first) ask for. `started` is when the process began.
pub fn run(args: impl Iterator<Item = OsString>, started: Instant) -> ExitCode {
    match try_run(args, started) {
        Ok(code) => code,
        Err(error) => {
            // There is nobody left to tell when standard error is closed.
            let _ = writeln!(io::stderr(), "{}", json!(error));
            ExitCode::from(if error.code.is_bad_input() { EXIT_BAD_INPUT } else { EXIT_FAILED })
        }
    }
}

fn try_run(args: impl Iterator<Item = OsString>, started: Instant) -> Result<ExitCode, JobError> {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let args = match Mode::pick(args, has_verb, is_set)? {
        Mode::Verb(args) => args,
        Mode::Test(args, job) => return rp::test(args, &job, started),
        Mode::Lambda(args) => return rp::lambda(args, started),
    };
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(shown) if !shown.use_stderr() => {
            // `--help` and `--version`; a reader who has closed the pipe has seen enough.
            let _ = shown.print();
            return Ok(ExitCode::SUCCESS);
        }
        Err(wrong) => return Err(usage(&wrong)),
    };
    let config = Config::new(&cli.config, |name| std::env::var_os(name).map(PathBuf::from), Path::new("/"))?;
    // A worker logs in a form of its own where RunPod reads it.
    if !matches!(cli.verb, Verb::Worker(_)) {
        start_logging(config.log_level.into());
    }
    match cli.verb {
        Verb::Generate(args) => print_json(&generate::run(&args, &config, started)?)?,
        Verb::Estimate(args) => print_json(&estimate::run(&args, &config)?)?,
        Verb::Doctor(args) => return doctor::run(&args, &config),
        Verb::Serve(args) => serve::run(&args, &config)?,
        Verb::Worker(args) => worker::run(&args, &config, started)?,
        Verb::Prefetch(args) => print_json(&prefetch::run(&args, &config)?)?,
        Verb::Prepare(args) => print_json(&prepare::run(&args, &config)?)?,
        Verb::Keys(args) => print_json(&keys::run(&args)?)?,
        Verb::Gc(args) => gc::run(&args)?,
        Verb::Deploy(args) => deploy::run(&args)?,
        Verb::Bench(args) => bench::run(&args)?,
        Verb::Schema => print_json(&json!({"input": schema::input(), "output": schema::output()}))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a command line needs no mode: it has a verb, or asks the parser itself something.
fn has_verb(args: &[OsString]) -> bool {
    let command = Cli::command();
    let verbs: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
    let asks = ["help", "--help", "-h", "--version", "-V"];
    args.iter().skip(1).filter_map(|arg| arg.to_str()).any(|arg| verbs.contains(&arg) || asks.contains(&arg))
}

/// The parser's own words, for people, and its first line for programs.
fn usage(wrong: &clap::Error) -> JobError {
    let _ = wrong.print();
    let text = wrong.render().to_string();
    let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
    let tip = text.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    JobError::new(Code::InvalidInput, first)
        .with_reason("USAGE")
        .with_hint(tip.unwrap_or("see `handler --help`"))
}

fn start_logging(level: LevelFilter) {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        // Standard error may be closed, which is no reason to fail.
        .log_internal_errors(false)
        .finish()
        .with(logs::targets(level));
    // A test that runs verbs in its own process has set one already.
    let _ = subscriber.try_init();
}

/// One line for programs, several for people.
fn print_json(value: &impl Serialize) -> Result<(), JobError> {
    let out = io::stdout();
    let text =
        if out.is_terminal() { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    let text = text.map_err(|e| JobError::new(Code::Internal, format!("the output is not JSON: {e}")))?;
    print_line(&text)
}

fn print_line(line: &str) -> Result<(), JobError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|e| JobError::new(Code::Internal, format!("standard output cannot be written: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_a_variable() {
        let mut command = Cli::command();
        command.build();
        for verb in std::iter::once(&command).chain(command.get_subcommands()) {
            for arg in verb.get_arguments().filter(|a| !matches!(a.get_id().as_str(), "help" | "version")) {
                assert!(
                    arg.get_env().is_some() || arg.is_positional(),
                    "{} {}",
                    verb.get_name(),
                    arg.get_id()
                );
            }
        }
    }
}
