//! What is to be known of a machine before jobs are sent to it, or after they failed there.

mod gpu;
mod speed;

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use talkie::device::{self, Processor};
use talkie::media::image::Size;
use talkie::pipeline::{Activations, Budget, Extent, MemoryPlan, Settings, Weights};
use talkie::prepared::Selection;
use talkie::registry::ModelSpec;
use talkie::request::{Draft, GenerateRequest, Limits};

use self::gpu::Gpu;
use crate::cold_start::{COLD_START, LastColdStart};
use crate::disk::free_bytes;
use crate::generate::{self, DeviceChoice};
use crate::job::JobError;
use crate::models::Installation;
use crate::runner::RunnerSettings;
use crate::runpod::fitness;

/// Less space than this is little for videos on their way.
const LITTLE_SPOOL_BYTES: u64 = 2 << 30;
/// Weights are read more slowly than a cold start of a minute allows for.
const SLOW_READS: f64 = 0.85e9;
/// For the store to answer.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// Seconds of video that memory is planned for.
const PLANNED_SECONDS: usize = 60;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Jobs run, but not as well as they could.
    Warn,
    /// Jobs will fail.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The figures behind it.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub facts: Value,
}

impl Check {
    fn new(name: impl Into<String>, status: Status, message: impl Into<String>) -> Self {
        Self { name: name.into(), status, message: message.into(), remedy: None, facts: Value::Null }
    }

    fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    fn with_facts(mut self, facts: Value) -> Self {
        self.facts = facts;
        self
    }
}

/// Looks at everything; `quick` leaves out what takes time or the network. `variable` finds a variable of the
/// environment.
pub async fn examine(
    settings: &RunnerSettings,
    quick: bool,
    variable: impl Fn(&str) -> Option<String>,
) -> Vec<Check> {
    let gpu = Gpu::look();
    let mut checks = vec![gpu::check(settings.device, &gpu), memory(settings)];
    let storage = settings.config.hub.storage().root();
    checks.push(disk("model storage", storage, 0, "give MODEL_STORAGE_PATH a folder on a volume"));
    checks.push(spool(&settings.spool));
    checks.extend((!quick).then(|| volume_speed(storage)));
    let usable = settings.device != DeviceChoice::Cpu && candle_core::utils::cuda_is_available();
    let place = Place { gpu: gpu.ok().filter(|_| usable).map(|gpu| gpu.total), settings };
    checks.append(&mut models(&place).await);
    checks.push(last_cold_start(&settings.spool));
    checks.push(store(settings, quick).await);
    checks.push(runpod(variable));
    checks
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// The processor's cores, and the memory that networks may use.
fn memory(settings: &RunnerSettings) -> Check {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let limit = settings.config.memory_limit;
    match device::capacity(&candle_core::Device::Cpu) {
        Ok(host) => {
            let limited =
                limit.map_or(String::new(), |limit| format!(", of the device {:.1} GB at most", gb(limit)));
            let message = format!("{cores} cores, {:.1} GB for networks{limited}", gb(host.device));
            let facts = json!({"cores": cores, "host_bytes": host.device, "memory_limit": limit});
            Check::new("memory", Status::Ok, message).with_facts(facts)
        }
        Err(e) => Check::new("memory", Status::Warn, e.to_string()),
    }
}

/// The free space of a folder, or of the nearest one above it that is there.
fn disk(name: &str, folder: &Path, least: u64, remedy: &str) -> Check {
    let there = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
    match free_bytes(there) {
        Ok(free) => {
            let facts = json!({"path": folder, "free_bytes": free, "exists": folder.is_dir()});
            let exists = if folder.is_dir() { "" } else { " (not there yet)" };
            let message = format!("{}{exists}: {:.1} GB free", folder.display(), gb(free));
            let status = if free < least { Status::Warn } else { Status::Ok };
            let check = Check::new(name, status, message).with_facts(facts);
            if status == Status::Ok { check } else { check.with_remedy(remedy) }
        }
        Err(e) => Check::new(name, Status::Fail, format!("{}: {e}", folder.display())).with_remedy(remedy),
    }
}

/// Whether results can be kept until they are delivered.
fn spool(folder: &Path) -> Check {
    let remedy = "give SPOOL_PATH a folder that can be written to, with room for videos";
    match fitness::try_to_write(folder) {
        Ok(()) => disk("spool", folder, LITTLE_SPOOL_BYTES, remedy),
        Err(e) => {
            let message = format!("{} cannot be written to: {e}", folder.display());
            Check::new("spool", Status::Fail, message).with_remedy(remedy)
        }
    }
}

/// How fast the volume of the models is read.
fn volume_speed(storage: &Path) -> Check {
    const NAME: &str = "volume speed";
    match speed::measure(storage) {
        Ok(speed) => {
            let rate = speed.bytes as f64 / speed.time.as_secs_f64().max(1e-9);
            let message = format!("{:.2} GB/s, {}", rate / 1e9, speed.how);
            let facts = json!({"bytes_per_s": rate as u64, "bytes": speed.bytes, "direct": speed.direct});
            let check = Check::new(NAME, Status::Ok, message).with_facts(facts);
            if rate >= SLOW_READS {
                return check;
            }
            let check = Check { status: Status::Warn, ..check };
            check.with_remedy("run `handler prepare` once, so that less is read, or use a faster volume")
        }
        Err(e) => Check::new(NAME, Status::Warn, format!("{} cannot be read: {e}", storage.display())),
    }
}

/// Where models are to run.
struct Place<'a> {
    settings: &'a RunnerSettings,
    /// Bytes of the GPU's memory; `None` where the CPU computes.
    gpu: Option<u64>,
}

impl Place<'_> {
    /// What computes, and what a video may use there while no other runs.
    fn budget(&self) -> talkie::Result<(Processor, Budget)> {
        let cpu = candle_core::Device::Cpu;
        let limit = self.settings.config.memory_limit;
        match self.gpu {
            Some(total) => {
                let host = device::capacity(&cpu)?.device;
                Ok((Processor::Gpu, Budget::of_gpu(total, host).within(limit)))
            }
            None => Ok((Processor::Cpu, Budget::of(&cpu, limit)?)),
        }
    }
}

/// Of each model, what is there and how it fits into memory.
async fn models(place: &Place<'_>) -> Vec<Check> {
    let settings = place.settings;
    let registry = match generate::registry(settings.models_file.as_deref()) {
        Ok(registry) => registry,
        Err(e) => return vec![Check::new("models", Status::Fail, e.to_string())],
    };
    if let Some(name) = &settings.model
        && let Err(e) = registry.model(name)
    {
        return vec![Check::new("models", Status::Fail, e.to_string()).with_remedy("correct TALKIE_MODEL")];
    }
    let mut checks = Vec::new();
    for spec in registry.models() {
        checks.append(&mut model(place, spec).await);
    }
    checks
}

async fn model(place: &Place<'_>, spec: &ModelSpec) -> Vec<Check> {
    let settings = place.settings;
    let name = format!("model {}", spec.name);
    let wanted = settings.model.as_deref() == Some(&spec.name);
    let looked = async || -> Result<(Settings, Installation), JobError> {
        let resolved = Settings::resolve(&any_request(spec)?, spec)?;
        let hub = &settings.config.hub;
        let selection = Selection { spec, storage: hub.storage(), speakers: 1, loras: &resolved.loras };
        let installation = Installation::of(&selection, hub).await?;
        Ok((resolved, installation))
    };
    let (resolved, found) = match looked().await {
        Ok(found) => found,
        Err(e) => {
            let check = Check::new(name, Status::Fail, e.message);
            return vec![check.with_remedy("run `handler prefetch --verify`")];
        }
    };
    let facts = json!(found);
    if let Some(first) = found.missing().next() {
        let status = if wanted { Status::Fail } else { Status::Warn };
        let (count, first) = (found.missing().count(), first.place.display());
        let message = format!(
            "{count} files are missing, {:.1} GB where that is known; the first is {first}",
            gb(found.bytes_to_fetch())
        );
        let remedy = format!("run `handler prefetch --model {}`", spec.name);
        return vec![Check::new(name, status, message).with_remedy(remedy).with_facts(facts)];
    }
    let prepared = match found.prepared.as_slice() {
        [] => String::new(),
        networks => format!(", prepared: {}", networks.join(", ")),
    };
    let message = format!("installed, {:.1} GB{prepared}", gb(found.present_bytes()));
    let check = Check::new(&name, Status::Ok, message).with_facts(facts);
    let check = match (found.unverified().count(), found.notes.first()) {
        (0, None) => check,
        (0, Some(note)) => Check { status: Status::Warn, ..check }.with_remedy(note),
        (files, _) => {
            let message = format!("{}, {files} files are not verified", check.message);
            Check { status: Status::Warn, message, ..check }.with_remedy("run `handler prefetch --verify`")
        }
    };
    vec![check, plan(place, spec, &resolved)]
}

/// How a video of the model's default size and a minute's length fits into this machine.
fn plan(place: &Place, spec: &ModelSpec, resolved: &Settings) -> Check {
    let name = format!("memory plan {}", spec.name);
    let planned = || -> talkie::Result<MemoryPlan> {
        let (on, budget) = place.budget()?;
        let size = resolved.video_size(Size { height: 1, width: 1 });
        let extent = Extent { size, frames: PLANNED_SECONDS * talkie::pipeline::FPS, persons: 1 };
        MemoryPlan::choose(Weights::of(spec, on)?, Activations::of(spec, resolved, extent, on), budget)
    };
    match planned() {
        Ok(plan) => {
            let message = format!(
                "{}: {:.1} of {:.1} GB of the device",
                plan.rung().as_str(),
                gb(plan.device_bytes),
                gb(plan.budget.device)
            );
            let facts = json!({
                "rung": plan.rung().as_str(),
                "device_bytes": plan.device_bytes,
                "host_bytes": plan.host_bytes,
                "usable_bytes": plan.budget.device,
            });
            Check::new(name, Status::Ok, message).with_facts(facts)
        }
        Err(e) => {
            let error = JobError::from(e);
            let remedy = error.hint.clone().unwrap_or_else(|| "take another GPU".to_string());
            Check::new(name, Status::Warn, error.message).with_remedy(remedy)
        }
    }
}

/// A request that says nothing but its model, whose portrait and voice nobody opens.
fn any_request(spec: &ModelSpec) -> talkie::Result<GenerateRequest> {
    let nowhere = "https://example.invalid/x";
    let draft = json!({"image": nowhere, "audio": nowhere, "model": spec.name});
    let (request, _) = Draft::parse(&draft, &Limits::default())?.finish()?;
    Ok(request)
}

fn last_cold_start(spool: &Path) -> Check {
    match LastColdStart::read(&spool.join(COLD_START)) {
        None => Check::new("last cold start", Status::Ok, "none is known"),
        Some(last) => {
            let phases = &last.phases;
            let all = phases.boot_ms + phases.fetch_ms + phases.load_ms + phases.first_step_ms;
            let message = format!(
                "{}: {:.1} s (boot {}, fetch {}, load {} of which read {}, convert {}, to device {}, first step {} \
                 ms), {:.1} GB at {:.2} GB/s",
                last.model,
                all as f64 / 1e3,
                phases.boot_ms,
                phases.fetch_ms,
                phases.load_ms,
                phases.read_ms,
                phases.convert_ms,
                phases.to_device_ms,
                phases.first_step_ms,
                gb(phases.bytes_read),
                phases.gb_per_s
            );
            Check::new("last cold start", Status::Ok, message).with_facts(json!(last))
        }
    }
}

/// Whether the bucket answers.
async fn store(settings: &RunnerSettings, quick: bool) -> Check {
    let Some(storage) = &settings.storage else {
        return Check::new("store", Status::Warn, "no bucket is configured")
            .with_remedy("set R2_… or BUCKET_…, or let jobs bring `s3Config` or ask for `output.inline`");
    };
    if quick {
        return Check::new("store", Status::Ok, "a bucket is configured");
    }
    let remedy = "look at the bucket's name, its keys and the network";
    match tokio::time::timeout(STORE_TIMEOUT, storage.check()).await {
        Ok(Ok(())) => Check::new("store", Status::Ok, "the bucket answers"),
        Ok(Err(e)) => Check::new("store", Status::Fail, e.message).with_remedy(remedy),
        Err(_) => {
            let message = format!("the bucket has not answered in {} s", STORE_TIMEOUT.as_secs());
            Check::new("store", Status::Fail, message).with_remedy(remedy)
        }
    }
}

/// Variables by which RunPod tells a worker what it is.
const RUNPOD_VARIABLES: [&str; 8] = [
    "RUNPOD_WEBHOOK_GET_JOB",
    "RUNPOD_WEBHOOK_POST_OUTPUT",
    "RUNPOD_WEBHOOK_PING",
    "RUNPOD_POD_ID",
    "RUNPOD_ENDPOINT_ID",
    "RUNPOD_AI_API_KEY",
    "RUNPOD_GPU_TYPE_ID",
    "RUNPOD_INIT_TIMEOUT",
];

/// Which of RunPod's variables are set. Their values are nobody's business here.
fn runpod(variable: impl Fn(&str) -> Option<String>) -> Check {
    let is_set = |name: &&str| variable(name).is_some_and(|value| !value.is_empty());
    let seen: Vec<&str> = RUNPOD_VARIABLES.into_iter().filter(is_set).collect();
    let needed = ["RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_WEBHOOK_POST_OUTPUT"];
    let missing: Vec<&str> = needed.into_iter().filter(|name| !seen.contains(name)).collect();
    let facts = json!({"seen": seen});
    if seen.is_empty() {
        return Check::new("runpod", Status::Ok, "this is no RunPod worker").with_facts(facts);
    }
    match missing.as_slice() {
        [] => Check::new("runpod", Status::Ok, format!("{} of its variables are set", seen.len())),
        missing => Check::new("runpod", Status::Warn, format!("{} is not set", missing.join(" and ")))
            .with_remedy("a worker gets them from the platform; outside of it, start `handler serve`"),
    }
    .with_facts(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runpods_variables_are_named_and_not_told() {
        let secret = |name: &str| (name == "RUNPOD_AI_API_KEY").then(|| "rpa_SECRET".to_string());
        let check = runpod(secret);
        assert_eq!(check.status, Status::Warn);
        assert!(!json!(check).to_string().contains("SECRET"));
        assert_eq!(runpod(|_| None).status, Status::Ok);
        assert_eq!(runpod(|name| name.contains("WEBHOOK").then(|| "x".to_string())).status, Status::Ok);
    }

    #[test]
    fn a_folder_that_is_not_there_has_the_space_of_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("none/models");
        let check = disk("model storage", &none, 0, "");
        assert_eq!((check.status, check.facts["exists"].as_bool()), (Status::Ok, Some(false)));
        assert_eq!(disk("spool", dir.path(), u64::MAX, "more").status, Status::Warn);
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(spool(&dir.path().join("file")).status, Status::Fail);
    }

    #[test]
    fn a_cold_start_is_told_by_its_phases() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_cold_start(dir.path()).message, "none is known");
        let phases = crate::job::ColdStart { load_ms: 41_000, gb_per_s: 1.3, ..Default::default() };
        LastColdStart::new("infinitetalk", &phases).record(&dir.path().join(COLD_START));
        let check = last_cold_start(dir.path());
        assert!(check.message.contains("infinitetalk: 41.0 s") && check.message.contains("1.30 GB/s"));
    }
}
