//! `handler doctor`: whether this machine can make videos, and how well.

use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;

use super::{EXIT_FAILED, print_json};
use crate::config::Config;
use crate::doctor::{self, Check, Status};
use crate::job::{Code, JobError};
use crate::runner::RunnerArgs;
use crate::storage::StorageArgs;

/// Flags of the verb: what a worker is started with, so that its settings are what is looked at.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// Print one JSON object in place of lines
    #[arg(long, env = "DOCTOR_JSON")]
    json: bool,
    /// Leave out what takes more than a moment or needs the network
    #[arg(long, env = "DOCTOR_QUICK")]
    quick: bool,
    #[command(flatten)]
    runner: RunnerArgs,
    #[command(flatten)]
    storage: StorageArgs,
}

/// Prints what was found. The exit code is 1 when a check has failed, 0 otherwise.
pub(super) fn run(args: &Args, config: &Config) -> Result<ExitCode, JobError> {
    let settings = args.runner.settings(config, &args.storage, Instant::now())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|e| JobError::new(Code::Internal, format!("the asynchronous runtime cannot start: {e}")))?;
    let variable = |name: &str| std::env::var(name).ok();
    let checks = runtime.block_on(doctor::examine(&settings, args.quick, variable));
    let worst = checks.iter().map(|check| check.status).max().unwrap_or(Status::Ok);
    match args.json {
        true => print_json(&json!({"status": worst, "checks": checks}))?,
        false => checks.iter().try_for_each(print)?,
    }
    Ok(if worst == Status::Fail { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS })
}

fn print(check: &Check) -> Result<(), JobError> {
    let mark = match check.status {
        Status::Ok => "ok  ",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    };
    super::print_line(&format!("{mark}  {:<22} {}", check.name, check.message))?;
    match &check.remedy {
        Some(remedy) => super::print_line(&format!("{:28} → {remedy}", "")),
        None => Ok(()),
    }
}
