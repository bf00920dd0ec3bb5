//! What a video was made of: enough to make it again.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use talkie::media::audio::Speakers;
use talkie::pipeline::Settings;
use talkie::registry::{Learned, ModelSpec, RepoFiles};
use talkie::request::{FPS, GenerateRequest};

use crate::job::JobOutput;

/// Length and hash of each input file, under the names of their fields.
pub(super) fn files<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Map<String, Value> {
    let described =
        |bytes: &[u8]| json!({"sha256": hex::encode(Sha256::digest(bytes)), "size_bytes": bytes.len()});
    files.into_iter().map(|(name, bytes)| (name.to_string(), described(bytes))).collect()
}

/// What a video was made of.
pub(super) struct Origin<'a> {
    pub(super) job_id: &'a str,
    pub(super) digest: &'a str,
    pub(super) files: &'a Map<String, Value>,
    pub(super) request: &'a GenerateRequest,
    pub(super) settings: &'a Settings,
    pub(super) spec: &'a ModelSpec,
}

/// The manifest of the video that `output` describes. Its `input` is a request for the same video, once the files
/// of the same hashes are put beside it.
pub(super) fn manifest(origin: &Origin<'_>, output: &JobOutput) -> Value {
    let Origin { job_id, digest, files, request, settings, spec } = origin;
    let mut output = json!(output);
    if let Value::Object(fields) = &mut output {
        // Where the video is, is not known yet, and a link ends.
        fields.remove("video_url");
    }
    json!({
        "talkie": env!("CARGO_PKG_VERSION"),
        "job_id": job_id,
        "request_sha256": digest,
        "files": files,
        "input": input(request, settings, spec),
        "model": {"name": spec.name, "loras": settings.loras, "files": model_files(spec, files, settings)},
        "output": output,
    })
}

/// The output that a manifest tells of, if it is that of the job's request.
pub(super) fn output_of(manifest: &Value, digest: &str) -> Option<JobOutput> {
    let same = manifest.get("request_sha256").is_some_and(|recorded| recorded == digest);
    JobOutput::deserialize(manifest.get("output").filter(|_| same)?).ok()
}

/// What tells one request from another: the hash of its JSON.
pub(super) fn digest(input: &Value) -> String {
    let mut hasher = Sha256::new();
    // Neither the hasher nor the value can fail.
    let _ = serde_json::to_writer(&mut hasher, input);
    hex::encode(hasher.finalize())
}

/// Every setting by its name in a request, with what the request left open filled in.
fn input(request: &GenerateRequest, settings: &Settings, spec: &ModelSpec) -> Value {
    let sampling = &settings.sampling;
    let mut input = json!({
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "model": spec.name,
        "size": request.size.as_str(),
        "steps": sampling.num_steps,
        "shift": sampling.shift,
        "text_guidance": sampling.guidance.text,
        "audio_guidance": sampling.guidance.audio,
        "seed": settings.seed,
        "color_correction": sampling.color_correction,
        "motion_frames": sampling.motion_frames,
        "frames_per_window": sampling.frames_per_window,
    });
    // A preset brings LoRAs and caching with it, which have no fields of their own.
    if let Some(preset) = request.preset {
        input["preset"] = preset.as_str().into();
    }
    if let Some(frames) = request.max_frames {
        input["max_seconds"] = (f64::from(frames) / f64::from(FPS)).into();
    }
    if request.audio_2.is_some() {
        input["speakers"] = match settings.speakers {
            Speakers::Together => "together",
            Speakers::InTurn => "in_turn",
        }
        .into();
        if let Some(boxes) = request.bbox {
            input["bbox"] = json!(boxes.map(|b| [b.row_min, b.col_min, b.row_max, b.col_max]));
        }
    }
    input
}

/// The weight files; none where they are drawn from a seed.
fn model_files(spec: &ModelSpec, files: &Map<String, Value>, settings: &Settings) -> Vec<Value> {
    let speakers = if files.contains_key("audio_2") { 2 } else { 1 };
    spec.files(speakers, &settings.loras).flat_map(repo_files).collect()
}

fn repo_files(repo: &RepoFiles) -> impl Iterator<Item = Value> {
    repo.files.iter().map(|file| {
        json!({
            "repo": repo.repo,
            "revision": known(&repo.revision),
            "path": file.path,
            "size_bytes": known(&file.size),
            "sha256": known(&file.sha256),
        })
    })
}

fn known<T: Clone + Into<Value>>(fact: &Learned<T>) -> Value {
    fact.known().cloned().map_or(Value::Null, Into::into)
}
