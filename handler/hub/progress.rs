//! How far downloads are.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use crate::progress::{Stage, Update};

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Asking the hub what there is.
    Ask,
    /// Reading files that are there.
    Verify,
    /// Another process fetches for everybody.
    Wait,
    /// Fetching.
    Fetch,
    /// Converting what was fetched.
    Prepare,
}

const PHASES: [Phase; 5] = [Phase::Ask, Phase::Verify, Phase::Wait, Phase::Fetch, Phase::Prepare];

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes that are done of it.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Counts bytes, on any thread.
#[derive(Debug, Default)]
pub(super) struct Counter {
    phase: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    fetched: AtomicU64,
}

impl Counter {
    /// Begins `phase` with `total` bytes, of which `done` are done.
    pub(super) fn begin(&self, phase: Phase, done: u64, total: u64) {
        self.phase.store(PHASES.iter().position(|p| *p == phase).unwrap_or(0) as u8, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn remove(&self, bytes: u64) {
        self.done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes that came over the network.
    pub(super) fn fetched(&self, bytes: u64) {
        self.add(bytes);
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    pub(super) fn get(&self) -> Progress {
        Progress {
            phase: PHASES[usize::from(self.phase.load(Ordering::Relaxed))],
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        }
    }
}

/// Turns what is reported into updates with a rate and the time left.
#[derive(Debug, Default)]
pub struct Meter {
    /// The phase, when it was first seen, and how many bytes were done then.
    began: Option<(Phase, Instant, u64)>,
}

impl Meter {
    /// The update for `progress` at `now`.
    pub fn update(&mut self, progress: Progress, now: Instant) -> Update {
        let Progress { phase, done, total } = progress;
        let (began, before) = match self.began {
            Some((seen, began, before)) if seen == phase && before <= done => (began, before),
            _ => {
                self.began = Some((phase, now, done));
                (now, done)
            }
        };
        let seconds = now.saturating_duration_since(began).as_secs_f64();
        let rate = (done - before) as f64 / seconds.max(1e-3);
        let left = total.saturating_sub(done) as f64 / rate;
        let verb = match phase {
            Phase::Ask => "asking the hub",
            Phase::Verify => "verifying",
            Phase::Wait => "another process fetches or prepares",
            Phase::Fetch => "fetching",
            Phase::Prepare => "preparing",
        };
        let mut message = verb.to_string();
        if total > 0 {
            message += &format!(" {} of {}", bytes(done), bytes(total));
        }
        if done > before && seconds > 0.0 {
            message += &format!(", {}/s", bytes(rate as u64));
        }
        Update {
            stage: Stage::Fetch,
            percent: (done.min(total) * 100).checked_div(total).unwrap_or(0) as u8,
            message,
            window: 0,
            windows: 0,
            step: 0,
            steps: 0,
            eta_s: (done > before && left.is_finite()).then(|| left.ceil() as u64),
        }
    }
}

/// Bytes for people, as disks and networks count them.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rate_and_time_left_are_those_of_the_phase() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let mut at = |phase, done, s| {
            let progress = Progress { phase, done, total: 10_000_000 };
            let update = meter.update(progress, start + Duration::from_secs(s));
            (update.percent, update.message, update.eta_s)
        };
        assert_eq!(at(Phase::Verify, 5_000_000, 0), (50, "verifying 5.0 MB of 10.0 MB".into(), None));
        assert_eq!(at(Phase::Fetch, 2_000_000, 10), (20, "fetching 2.0 MB of 10.0 MB".into(), None));
        let moving = "fetching 4.0 MB of 10.0 MB, 500.0 kB/s".to_string();
        assert_eq!(at(Phase::Fetch, 4_000_000, 14), (40, moving, Some(12)));
        assert_eq!(at(Phase::Fetch, 1_000_000, 20).2, None, "a file was begun anew");
    }

    #[test]
    fn bytes_are_written_for_people() {
        assert_eq!([900, 9_948_708_152, 507_609_880].map(bytes), ["0.9 kB", "9.95 GB", "507.6 MB"]);
    }
}
