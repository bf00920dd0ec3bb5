//! `handler deploy`: makes or updates the RunPod endpoint of `runpod.toml`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::flags::{EXAMPLE_AUDIO, EXAMPLE_IMAGE};
use super::print_json;
use crate::config::Setting;
use crate::deploy::api::Api;
use crate::deploy::{self, Call, Order, Outcome, Plan, Spec, check_image};
use crate::gateway::config::Secret;
use crate::job::{Code, JobError};
use crate::storage::settings::secret;

/// RunPod's REST API.
const REST_URL: &str = "https://api.runpod.io/v2";
/// The profile that needs no weights.
const SMOKE_MODEL: &str = "tiny";

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The description of the endpoint
    #[arg(long, env = "RUNPOD_TOML", value_name = "FILE", default_value = "runpod.toml")]
    file: PathBuf,
    /// The image, as repository@sha256:…; with --rollback, only this one is undone [default: that of the file, else
    /// the one that the endpoint has]
    #[arg(long, env = "DEPLOY_IMAGE", value_name = "IMAGE")]
    image: Option<String>,
    /// Take an image by tag, which may move
    #[arg(long, env = "DEPLOY_ALLOW_TAG")]
    allow_tag: bool,
    /// The endpoint's id [default: it is found by its name]
    #[arg(long, env = "RUNPOD_ENDPOINT_ID", value_name = "ID")]
    endpoint: Option<String>,
    /// Print the requests that would change something, one JSON object a line, and send none of them. Without a
    /// key, nothing is read either: the account is taken to be empty
    #[arg(long, env = "DEPLOY_DRY_RUN")]
    dry_run: bool,
    /// Go back to the image before the present one, as RunPod's list of releases has it
    #[arg(long, env = "DEPLOY_ROLLBACK")]
    rollback: bool,
    /// Run a job of one second afterwards, of this model [default: tiny, which needs no weights]
    #[arg(
        long,
        env = "DEPLOY_SMOKE",
        value_name = "MODEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = SMOKE_MODEL
    )]
    smoke: Option<String>,
    /// How long to wait for workers, and then for the test job [default: 900]
    #[arg(long, env = "DEPLOY_TIMEOUT_SECONDS", value_name = "SECONDS")]
    deploy_timeout_seconds: Option<String>,
    /// The unit of pauses: 5 between looks, and after failures 1 at first, 16 at last [default: 1]
    #[arg(long, env = "BACKOFF_SECONDS", value_name = "SECONDS")]
    backoff_seconds: Option<String>,
    /// RunPod's API key
    #[arg(long, env = "RUNPOD_API_KEY", value_name = "KEY", hide_env_values = true, value_parser = secret)]
    runpod_api_key: Option<Secret>,
    /// Address of RunPod's REST API
    #[arg(long, env = "RUNPOD_REST_URL", value_name = "URL", default_value = REST_URL)]
    runpod_rest_url: String,
}

/// Deploys, and prints what has changed as one JSON object.
pub(super) fn run(args: &Args) -> Result<(), JobError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|e| JobError::new(Code::Internal, format!("the asynchronous runtime cannot start: {e}")))?;
    runtime.block_on(deploy(args))
}

async fn deploy(args: &Args) -> Result<(), JobError> {
    let patience = seconds("DEPLOY_TIMEOUT_SECONDS", &args.deploy_timeout_seconds, 900.0)?;
    let api = client(args)?;
    let Some(outcome) = change(args, api.as_ref()).await? else { return Ok(()) };
    let api = api.ok_or_else(no_key)?;
    let id = &outcome.endpoint_id;
    match outcome.changed.as_slice() {
        [] => say(&format!("the endpoint {id} is as it should be")),
        changed => say(&format!("the endpoint {id} has new: {}", changed.join(", "))),
    }
    // Whoever reads only the error has to know what was changed.
    let done =
        |e: JobError| e.with_detail("endpoint_id", &**id).with_detail("changed", outcome.changed.clone());
    deploy::wait(&api, id, patience, &say).await.map_err(done)?;
    let mut report = json!(outcome);
    if let Some(model) = set(&args.smoke) {
        let smoke = deploy::smoke(&api, &outcome.endpoint, &smoke_input(&model), patience, &say).await;
        report["smoke"] = json!(smoke.map_err(done)?);
    }
    print_json(&report)
}

/// Changes what has to be changed; none for a dry run, which prints that instead.
async fn change(args: &Args, api: Option<&Api>) -> Result<Option<Outcome>, JobError> {
    let spec = read(args)?;
    let endpoint_id = set(&args.endpoint);
    let url = |path: &str| format!("{}{path}", args.runpod_rest_url.trim_end_matches('/'));
    if args.rollback {
        let api = api.ok_or_else(no_key)?;
        let from = set(&args.image);
        let (endpoint, call) =
            deploy::rollback(api, &spec.name, endpoint_id.as_deref(), from.as_deref()).await?;
        return match call {
            Some(call) if args.dry_run => print_calls(&[call], url),
            Some(call) => Ok(Some(call.send(api, &endpoint).await?)),
            None => {
                say("the endpoint has another image: there is nothing to undo");
                Ok((!args.dry_run).then(|| Outcome::unchanged(endpoint)))
            }
        };
    }
    let image = set(&args.image).or(spec.image.clone());
    if let Some(image) = &image {
        check_image(image, args.allow_tag)?;
    }
    let env = spec.env(|name| std::env::var(name).ok())?;
    if api.is_none() && args.dry_run {
        say("`RUNPOD_API_KEY` is not set: these are the requests for an empty account");
    }
    let api = if args.dry_run { api } else { Some(api.ok_or_else(no_key)?) };
    let plan = Plan::make(Order { spec, image, env, endpoint_id }, api).await?;
    match api {
        Some(api) if !args.dry_run => Ok(Some(plan.carry_out(api).await?)),
        _ => print_calls(&plan.calls()?, url),
    }
}

/// A client, where there is a key.
fn client(args: &Args) -> Result<Option<Api>, JobError> {
    let unit = seconds("BACKOFF_SECONDS", &args.backoff_seconds, 1.0)?;
    let key = args.runpod_api_key.as_ref().filter(|key| !key.expose().trim().is_empty());
    key.map(|key| Api::new(&args.runpod_rest_url, key, unit)).transpose()
}

fn no_key() -> JobError {
    let message = "`RUNPOD_API_KEY` is not set, expected a key of the account to deploy to";
    JobError::new(Code::Unauthorized, message)
        .with_hint("RunPod's console makes one under Settings, API keys; --dry-run needs none")
}

fn seconds(name: &'static str, value: &Option<String>, default: f64) -> Result<Duration, JobError> {
    let seconds = Setting::new(name, value)
        .parse("seconds from 0.001 to 86400", default, |s| (0.001..=86_400.0).contains(s))?;
    Ok(Duration::from_secs_f64(seconds))
}

fn read(args: &Args) -> Result<Spec, JobError> {
    let origin = args.file.display().to_string();
    let text = fs::read_to_string(&args.file).map_err(|e| {
        let message = format!("`--file` is {origin}, which cannot be read: {e}");
        JobError::new(Code::InvalidInput, message).with_reason("FILE_UNREADABLE")
    })?;
    Spec::parse(&text, &origin)
}

/// The example portrait, and a second of the example voice.
fn smoke_input(model: &str) -> Value {
    let data = |kind: &str, bytes: &[u8]| format!("data:{kind};base64,{}", STANDARD.encode(bytes));
    json!({
        "image": data("image/png", EXAMPLE_IMAGE), "audio": data("audio/wav", EXAMPLE_AUDIO),
        "model": model, "max_seconds": 1, "seed": 7,
    })
}

/// An empty variable is one that is not set.
fn set(value: &Option<String>) -> Option<String> {
    value.as_deref().map(str::trim).filter(|value| !value.is_empty()).map(str::to_string)
}

/// Progress, for people. Standard error may be closed, which is no reason to fail.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// One line for each request; the outcome of a dry run is none.
fn print_calls(calls: &[Call], url: impl Fn(&str) -> String) -> Result<Option<Outcome>, JobError> {
    let mut out = io::stdout().lock();
    let text: String = calls.iter().map(|call| format!("{}\n", call.shown(&url))).collect();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| JobError::new(Code::Internal, format!("standard output cannot be written: {e}")))?;
    Ok(None)
}
