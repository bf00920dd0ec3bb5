//! What is lowered to make a video at all.

use talkie::pipeline::{MEMORY_PLAN, Settings};
use talkie::registry::ModelSpec;
use talkie::request::{GenerateRequest, Size};

use crate::job::{Code, JobError};

/// Lowers what the GPU had too little memory for, so that the video can be tried once more: 720p to 480p, else how much
/// of the weights stays there, which [`Generator`](crate::generate::Generator) sees to. What was lowered, for people;
/// `None` where `error` is another one, nothing is left to lower, or the request forbids it.
///
/// # Errors
/// Those of [`Settings::resolve`].
pub fn lower(
    error: &JobError,
    request: &mut GenerateRequest,
    settings: &mut Settings,
    spec: &ModelSpec,
) -> Result<Option<&'static str>, JobError> {
    if error.code != Code::GpuOutOfMemory || request.strict {
        return Ok(None);
    }
    if request.size == Size::P720 {
        request.size = Size::P480;
        *settings = Settings { seed: settings.seed, ..Settings::resolve(request, spec)? };
        return Ok(Some("size: 480p in place of 720p, for which the GPU has too little memory"));
    }
    let is_planned = error.details.get("reason").is_some_and(|reason| reason == MEMORY_PLAN);
    Ok((!is_planned).then_some("memory: the GPU ran out of it, so fewer weights stay there; it takes longer"))
}
