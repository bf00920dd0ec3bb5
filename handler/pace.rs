//! How long a window took, job by job, kept on the volume: the time that is left can then be told before the
//! first step of the next job is measured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use talkie::pipeline::Sampling;
use talkie::request::GenerateRequest;

use crate::generate::DeviceChoice;
use crate::part_file;

/// The file in the spool.
pub const PACES: &str = "paces.json";

/// How much a new measurement counts beside what was known.
const WEIGHT: f64 = 0.3;

/// What decides how long a window takes: the device, the size, the preset, and what overrides it.
pub fn kind(device: DeviceChoice, model: &str, request: &GenerateRequest, sampling: &Sampling) -> String {
    let on_gpu = device != DeviceChoice::Cpu && candle_core::utils::cuda_is_available();
    let (device, preset) =
        (if on_gpu { "cuda" } else { "cpu" }, request.preset.map_or("none", |preset| preset.as_str()));
    let size = request.size.as_str();
    format!("{device} {model} {size} {preset} {}x{}", sampling.num_steps, sampling.frames_per_window)
}

/// The times of past jobs, in a file of one line per kind of job.
#[derive(Clone, Debug)]
pub struct Paces {
    path: PathBuf,
}

impl Paces {
    /// Those in the file at `path`, which may not be there yet.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// How long a window of jobs of this `kind` takes, if one has been made.
    pub fn of(&self, kind: &str) -> Option<Duration> {
        self.read().get(kind).filter(|ms| ms.is_finite() && **ms > 0.0).map(|ms| duration(*ms))
    }

    /// Adds what a job has measured. A volume that cannot be written to costs nothing but the memory of it.
    pub fn record(&self, kind: &str, per_window: Duration) {
        let mut known = self.read();
        let ms = per_window.as_secs_f64() * 1000.0;
        let ms = known.get(kind).map_or(ms, |before| before + WEIGHT * (ms - before));
        known.insert(kind.to_string(), ms);
        if let Err(e) = part_file::write_json(&self.path, &known) {
            tracing::debug!("{} cannot be written: {e}", self.path.display());
        }
    }

    /// A file that is not there or not ours tells nothing.
    fn read(&self) -> BTreeMap<String, f64> {
        std::fs::read(&self.path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }
}

/// A time from a file that anybody may have written.
fn duration(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1000.0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_remembered_by_kind_and_follow_slowly() {
        let dir = tempfile::tempdir().unwrap();
        let paces = Paces::at(dir.path().join("paces.json"));
        assert_eq!(paces.of("a"), None);
        paces.record("a", Duration::from_millis(1000));
        paces.record("b", Duration::from_millis(50));
        assert_eq!(paces.of("a"), Some(Duration::from_millis(1000)));
        paces.record("a", Duration::from_millis(2000));
        assert_eq!(paces.of("a"), Some(Duration::from_millis(1300)));
        assert_eq!(paces.of("b"), Some(Duration::from_millis(50)));
    }

    #[test]
    fn a_file_that_is_broken_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("paces.json");
        for text in ["", "[1]", "{\"a\": -5}", "{\"a\": 1e300}", "{\"a\": \"x\"}"] {
            std::fs::write(&path, text).unwrap();
            let paces = Paces::at(path.clone());
            assert!(paces.of("a").is_none_or(|pace| pace == Duration::ZERO), "{text}");
        }
        Paces::at(path.clone()).record("b", Duration::from_secs(1));
        assert!(Paces::at(path).of("b").is_some());
        Paces::at(dir.path().join("none/paces.json")).record("a", Duration::from_secs(1));
    }
}
