//! How far a job is: one number that never falls, and the time that is left.

use std::time::Duration;

use serde::Serialize;
use talkie::pipeline;

/// What a job is busy with, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Waiting for a worker.
    Queued,
    /// Fetching image and voices.
    Fetch,
    /// Opening them.
    Validate,
    /// Reading weights.
    Load,
    /// Embedding the voices, encoding prompt and portrait.
    Audio,
    /// Denoising a window.
    Denoise,
    /// Decoding a window.
    Decode,
    /// Uploading the video.
    Upload,
    /// The video is complete, and where it belongs.
    Done,
}

impl Stage {
    /// As it stands in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Fetch => "fetch",
            Self::Validate => "validate",
            Self::Load => "load",
            Self::Audio => "audio",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
            Self::Upload => "upload",
            Self::Done => "done",
        }
    }

    /// The percentage at which the stage starts. Denoising and decoding share what lies between theirs and
    /// the end, window by window.
    fn starts_at(self) -> f64 {
        match self {
            Self::Queued | Self::Fetch => 0.0,
            Self::Validate => 1.0,
            Self::Load => LOAD_START,
            Self::Audio => LOAD_END,
            Self::Denoise | Self::Decode => WINDOWS_START,
            Self::Upload => WINDOWS_END,
            Self::Done => 100.0,
        }
    }
}

impl From<pipeline::Stage> for Stage {
    fn from(stage: pipeline::Stage) -> Self {
        match stage {
            pipeline::Stage::Load => Self::Load,
            pipeline::Stage::Audio => Self::Audio,
            pipeline::Stage::Denoise => Self::Denoise,
            pipeline::Stage::Decode => Self::Decode,
            pipeline::Stage::Done => Self::Done,
        }
    }
}

const LOAD_START: f64 = 2.0;
const LOAD_END: f64 = 7.0;
const WINDOWS_START: f64 = 8.0;
const WINDOWS_END: f64 = 99.0;
/// How much of a window is denoising; the rest is decoding.
const DENOISE_SHARE: f64 = 0.85;

/// A progress report, as it is sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Update {
    /// What the job is busy with.
    pub stage: Stage,
    /// How far it is, 0–100; never less than before.
    pub percent: u8,
    /// The same in words.
    pub message: String,
    /// The window being made, from 1; 0 before the first.
    pub window: usize,
    /// Windows in all; 0 until it is known.
    pub windows: usize,
    /// Denoising steps done in this window.
    pub step: usize,
    /// Denoising steps per window.
    pub steps: usize,
    /// Seconds left, once there is something to judge by.
    pub eta_s: Option<u64>,
}

/// Turns what the pipeline reports into [`Update`]s.
#[derive(Debug, Default)]
pub struct Meter {
    percent: f64,
    /// How long a window took in past jobs, to go by while there is no measurement of this one.
    expected: Option<Duration>,
    /// When the first window began.
    first_began: Option<Duration>,
    /// Which window is being made, and when it began.
    current: (usize, Duration),
}

impl Meter {
    /// Goes by `per_window` until there is something to measure.
    pub fn expect(&mut self, per_window: Option<Duration>) {
        self.expected = per_window;
    }

    /// The report for `stage` before there is a pipeline.
    pub fn stage(&mut self, stage: Stage) -> Update {
        self.percent = self.percent.max(stage.starts_at());
        Update {
            stage,
            percent: self.percent as u8,
            message: stage.as_str().to_string(),
            window: 0,
            windows: 0,
            step: 0,
            steps: 0,
            eta_s: None,
        }
    }

    /// The report for `progress` at `now`, a time since any fixed moment.
    pub fn update(&mut self, progress: pipeline::Progress, now: Duration) -> Update {
        let mut update = self.stage(progress.stage.into());
        let pipeline::Progress { window, windows, step, steps, .. } = progress;
        if let Some(loading) = progress.loading {
            self.percent = self.percent.max(LOAD_START + share(&loading) * (LOAD_END - LOAD_START));
            update.percent = self.percent as u8;
            update.message = loading_words(&loading);
            return update;
        }
        if windows == 0 || !matches!(update.stage, Stage::Denoise | Stage::Decode) {
            return update;
        }
        let in_window = match update.stage {
            Stage::Denoise => DENOISE_SHARE * step as f64 / steps.max(1) as f64,
            _ => DENOISE_SHARE,
        };
        let done = ((window as f64 + in_window) / windows as f64).min(1.0);
        self.percent = self.percent.max(WINDOWS_START + done * (WINDOWS_END - WINDOWS_START));
        update.percent = self.percent as u8;
        update.eta_s = self.seconds_left(progress, now);
        (update.window, update.windows, update.step, update.steps) = (window + 1, windows, step, steps);
        update.message = match update.stage {
            Stage::Denoise => format!("window {}/{windows}, step {step}/{steps}", window + 1),
            _ => format!("window {}/{windows}, decoding", window + 1),
        };
        update
    }

    /// The windows that are left, at the pace of those that are done. In the first there are only its steps to go
    /// by, and while it is decoded nothing, since how long that takes differs from model to model.
    fn seconds_left(&mut self, progress: pipeline::Progress, now: Duration) -> Option<u64> {
        let pipeline::Progress { stage, window, windows, step, steps, .. } = progress;
        let first_began = *self.first_began.get_or_insert(now);
        if self.current.0 != window || first_began == now {
            self.current = (window, now);
        }
        let (_, current_began) = self.current;
        let in_this = now.saturating_sub(current_began).as_secs_f64();
        let measured = match stage {
            _ if window > 0 => Some(current_began.saturating_sub(first_began).as_secs_f64() / window as f64),
            pipeline::Stage::Denoise if step > 0 => {
                Some(in_this / step as f64 * steps as f64 / DENOISE_SHARE)
            }
            _ => None,
        };
        let measured = measured.filter(|seconds| *seconds > 0.0);
        let per_window = measured.or(self.expected.map(|expected| expected.as_secs_f64()))?;
        let this_one = (per_window - in_this).max(0.0);
        let further = windows.saturating_sub(window + 1) as f64 * per_window;
        Some((this_one + further).ceil() as u64)
    }
}

/// How much of the weights has been read, 0–1.
fn share(loading: &pipeline::LoadProgress) -> f64 {
    loading.bytes_read as f64 / loading.bytes_to_read.max(1) as f64
}

/// Which network is read, and how much of all of them has been.
fn loading_words(loading: &pipeline::LoadProgress) -> String {
    let network = loading.network.as_str().replace('_', " ");
    let gb = |bytes| bytes as f64 / 1e9;
    match loading.bytes_to_read {
        0 => network,
        all => format!("{network}, {:.1} of {:.1} GB read", gb(loading.bytes_read), gb(all)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use talkie::prepared::NetworkKind;

    use super::*;

    fn at(stage: pipeline::Stage, window: usize, step: usize) -> pipeline::Progress {
        pipeline::Progress { window, windows: 2, step, steps: 4, ..pipeline::Progress::at(stage) }
    }

    #[test]
    fn percent_never_falls_and_ends_at_100() {
        use pipeline::Stage::*;
        let mut meter = Meter::default();
        let mut seen = vec![meter.stage(Stage::Fetch).percent, meter.stage(Stage::Validate).percent];
        let reports = [
            at(Load, 0, 0),
            at(Audio, 0, 0),
            at(Denoise, 0, 0),
            at(Denoise, 0, 2),
            at(Denoise, 0, 4),
            at(Decode, 0, 4),
            // A window that is done again, on plainer kernels, after values that were not finite.
            at(Denoise, 0, 1),
            at(Denoise, 1, 0),
            at(Denoise, 1, 4),
            at(Decode, 1, 4),
            at(Done, 2, 0),
        ];
        seen.extend(reports.map(|p| meter.update(p, Duration::ZERO).percent));
        assert!(seen.is_sorted(), "{seen:?}");
        assert_eq!((seen[0], seen[seen.len() - 1]), (0, 100));
        assert!(seen[seen.len() - 2] < 100, "{seen:?}");
    }

    #[test]
    fn weights_are_counted_by_bytes_and_named_by_network() {
        let mut meter = Meter::default();
        let mut read = |network, bytes_read| {
            let loading = pipeline::LoadProgress { network, bytes_read, bytes_to_read: 40_000_000_000 };
            let progress = pipeline::Progress {
                loading: Some(loading),
                ..pipeline::Progress::at(pipeline::Stage::Load)
            };
            meter.update(progress, Duration::ZERO)
        };
        let first = read(NetworkKind::TextEncoder, 8_000_000_000);
        assert_eq!((first.stage, first.percent), (Stage::Load, 3));
        assert_eq!(first.message, "text encoder, 8.0 of 40.0 GB read");
        assert_eq!(read(NetworkKind::Dit, 40_000_000_000).percent, 7);
        assert_eq!(read(NetworkKind::Dit, 1).percent, 7);
        assert_eq!(meter.update(at(pipeline::Stage::Denoise, 0, 0), Duration::ZERO).percent, 8);
    }

    #[test]
    fn the_time_left_follows_from_the_windows_alone() {
        let mut meter = Meter::default();
        let load = meter.update(at(pipeline::Stage::Load, 0, 0), Duration::from_secs(50));
        assert_eq!(load.eta_s, None);
        let first = meter.update(at(pipeline::Stage::Denoise, 0, 0), Duration::from_secs(100));
        assert_eq!(first.eta_s, None);
        let mut left =
            |stage, window, step, s| meter.update(at(stage, window, step), Duration::from_secs(s)).eta_s;
        assert_eq!(left(pipeline::Stage::Denoise, 0, 2, 117), Some(63), "40 s a window, 17 of 80 gone");
        assert_eq!(left(pipeline::Stage::Decode, 0, 4, 134), None);
        assert_eq!(left(pipeline::Stage::Denoise, 1, 0, 150), Some(50));
        assert_eq!(left(pipeline::Stage::Decode, 1, 4, 190), Some(10));
        assert_eq!(left(pipeline::Stage::Decode, 1, 4, 300), Some(0));
    }

    #[test]
    fn past_jobs_tell_the_time_until_there_is_a_measurement() {
        let mut meter = Meter::default();
        meter.expect(Some(Duration::from_secs(30)));
        let mut left =
            |stage, window, step, s| meter.update(at(stage, window, step), Duration::from_secs(s)).eta_s;
        assert_eq!(left(pipeline::Stage::Denoise, 0, 0, 100), Some(60));
        assert_eq!(left(pipeline::Stage::Denoise, 0, 2, 117), Some(63), "40 s a window, 17 of 80 gone");
        assert_eq!(left(pipeline::Stage::Decode, 0, 4, 134), Some(30));
    }

    #[test]
    fn an_update_has_the_shape_of_the_contract() {
        let mut meter = Meter::default();
        let update = meter.update(at(pipeline::Stage::Denoise, 1, 2), Duration::ZERO);
        assert_eq!(
            serde_json::to_value(update).unwrap(),
            json!({
                "stage": "denoise", "percent": 72, "message": "window 2/2, step 2/4",
                "window": 2, "windows": 2, "step": 2, "steps": 4, "eta_s": null,
            })
        );
    }
}
