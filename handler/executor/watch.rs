//! Whether the thread that computes still moves. It is asked, and asks the clock of whoever asks.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use talkie::pipeline::{Cancel, Progress, Stage};

/// Steps whose times are remembered: more than a window has.
const STEPS: usize = 64;
/// A step that takes this many times as long as others do does not end.
const STEPS_OF_PATIENCE: u32 = 10;

/// How long is waited for a sign of life.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Between two reports of a running generation; ten steps' time if that is longer. `None`: a minute on a
    /// GPU, half an hour on a processor, which has no kernels that hang but is slow.
    pub step: Option<Duration>,
    /// Between two reports while a model is read.
    pub load: Duration,
    /// For a generation to end that was cancelled.
    pub cancel: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { step: None, load: Duration::from_secs(1800), cancel: Duration::from_secs(15) }
    }
}

/// The signs of life of one thread.
pub(super) struct Watch {
    patience: Patience,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    defect: Option<String>,
    job: Option<Running>,
    /// The last steps' times, of all jobs.
    steps: VecDeque<Duration>,
}

struct Running {
    cancel: Cancel,
    on_gpu: bool,
    stage: Stage,
    moved: Instant,
    /// When it was first seen to be cancelled.
    cancelled: Option<Instant>,
}

impl Watch {
    pub(super) fn new(patience: Patience) -> Self {
        Self { patience, state: Mutex::default() }
    }

    /// A job begins.
    pub(super) fn begin(&self, cancel: Cancel, on_gpu: bool, now: Instant) {
        let job = Running { cancel, on_gpu, stage: Stage::Load, moved: now, cancelled: None };
        self.state().job = Some(job);
    }

    /// The job has reported.
    pub(super) fn moved(&self, progress: Progress, now: Instant) {
        let state = &mut *self.state();
        let Some(job) = &mut state.job else { return };
        if job.stage == Stage::Denoise && progress.stage == Stage::Denoise && progress.step > 0 {
            state.steps.push_back(now.saturating_duration_since(job.moved));
            if state.steps.len() > STEPS {
                state.steps.pop_front();
            }
        }
        (job.stage, job.moved) = (progress.stage, now);
    }

    /// The job has ended.
    pub(super) fn end(&self) {
        self.state().job = None;
    }

    /// The device is broken.
    pub(super) fn fail(&self, reason: String) {
        self.state().defect.get_or_insert(reason);
    }

    /// Why no further job can run, if that is so at `now`. It stays so: who was told acts on it.
    pub(super) fn defect(&self, now: Instant) -> Option<String> {
        let state = &mut *self.state();
        if state.defect.is_none() {
            let step = median(&state.steps);
            state.defect = state.job.as_mut().and_then(|job| self.patience.judge(job, step, now));
        }
        state.defect.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Patience {
    fn judge(&self, job: &mut Running, step: Duration, now: Instant) -> Option<String> {
        if job.cancel.check().is_err() {
            let waited = now.saturating_duration_since(*job.cancelled.get_or_insert(now));
            if waited > self.cancel {
                return Some(format!("a job was cancelled {} s ago and still runs", waited.as_secs()));
            }
        }
        let by_device = Duration::from_secs(if job.on_gpu { 60 } else { 1800 });
        let most = match job.stage {
            Stage::Load => self.load,
            _ => self.step.unwrap_or(by_device).max(STEPS_OF_PATIENCE * step),
        };
        let silent = now.saturating_duration_since(job.moved);
        (silent > most)
            .then(|| format!("the generation hangs: nothing was heard of it for {} s", silent.as_secs()))
    }
}

fn median(steps: &VecDeque<Duration>) -> Duration {
    let mut sorted: Vec<_> = steps.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience {
        step: Some(Duration::from_secs(60)),
        load: Duration::from_secs(600),
        cancel: Duration::from_secs(15),
    };

    struct Scene {
        watch: Watch,
        start: Instant,
        cancel: Cancel,
    }

    impl Scene {
        fn new(patience: Patience) -> Self {
            let (watch, start, cancel) = (Watch::new(patience), Instant::now(), Cancel::default());
            watch.begin(cancel.clone(), true, start);
            Self { watch, start, cancel }
        }

        fn at(&self, s: u64) -> Instant {
            self.start + Duration::from_secs(s)
        }

        fn step(&self, step: usize, s: u64) {
            let progress = Progress { windows: 1, step, steps: 40, ..Progress::at(Stage::Denoise) };
            self.watch.moved(progress, self.at(s));
        }

        fn is_broken(&self, s: u64) -> bool {
            self.watch.defect(self.at(s)).is_some()
        }
    }

    #[test]
    fn fault_59_a_silent_step_is_a_hang_and_a_silent_load_later() {
        let scene = Scene::new(PATIENCE);
        assert!(!scene.is_broken(600));
        scene.step(0, 600);
        assert!(!scene.is_broken(660) && scene.is_broken(661));
        scene.step(1, 662);
        assert!(scene.is_broken(663), "who was told acts on it");
        assert!(Scene::new(PATIENCE).is_broken(601));
    }

    #[test]
    fn slow_steps_lengthen_the_patience() {
        let scene = Scene::new(PATIENCE);
        scene.step(0, 0);
        (1..4).for_each(|i| scene.step(i, 20 * i as u64));
        assert!(!scene.is_broken(60 + 200) && scene.is_broken(60 + 201));
    }

    #[test]
    fn a_processor_has_more_time_where_nothing_is_set() {
        for (on_gpu, most) in [(true, 60), (false, 1800)] {
            let scene = Scene::new(Patience { step: None, ..PATIENCE });
            scene.watch.begin(Cancel::default(), on_gpu, scene.start);
            scene.step(0, 0);
            assert!(!scene.is_broken(most) && scene.is_broken(most + 1), "{on_gpu}");
        }
    }

    #[test]
    fn a_cancel_must_be_obeyed_and_no_job_means_no_hang() {
        let scene = Scene::new(PATIENCE);
        scene.step(0, 0);
        scene.cancel.cancel();
        assert!(!scene.is_broken(10), "first seen here");
        assert!(!scene.is_broken(25) && scene.is_broken(26));
        let scene = Scene::new(PATIENCE);
        scene.watch.end();
        assert!(!scene.is_broken(100_000));
        scene.watch.fail("broken".to_string());
        assert!(scene.is_broken(0));
    }
}
