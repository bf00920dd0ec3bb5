//! Keeps a worker that cannot start from being started over and over.

use std::time::{Duration, Instant};

/// The longest pause between two starts.
const LONGEST: Duration = Duration::from_secs(300);

/// Counts the workers in a row that ended by themselves without having done anything. The first is replaced at
/// once, since any process may die; each one after that doubles the pause.
#[derive(Debug)]
pub(super) struct Breaker {
    first_pause: Duration,
    failures: u32,
    reason: String,
    closed_until: Option<Instant>,
}

impl Breaker {
    pub(super) fn new(first_pause: Duration) -> Self {
        Self { first_pause, failures: 0, reason: String::new(), closed_until: None }
    }

    /// A worker has ended, for this reason.
    pub(super) fn failure(&mut self, reason: String, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.reason = reason;
        self.closed_until = (self.failures > 1).then(|| now + self.pause());
    }

    /// A worker has done what it is there for.
    pub(super) fn success(&mut self) {
        self.failures = 0;
        self.closed_until = None;
    }

    fn pause(&self) -> Duration {
        // 2^20 times any pause worth setting is beyond the longest.
        let doublings = self.failures.saturating_sub(2).min(20);
        self.first_pause.saturating_mul(1 << doublings).min(LONGEST)
    }

    /// Until when no worker may be started.
    pub(super) fn closed_until(&self, now: Instant) -> Option<Instant> {
        self.closed_until.filter(|until| *until > now)
    }

    /// How many workers in a row have ended without having done anything.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// What is wrong, for people.
    pub(super) fn trouble(&self, now: Instant) -> Option<String> {
        if self.failures < 2 {
            return None;
        }
        let next = match self.closed_until(now) {
            Some(until) => format!("the next start is in {} s", (until - now).as_secs() + 1),
            None => "the next start is due".to_string(),
        };
        Some(format!(
            "{} workers in a row have ended without finishing a job: {}; {next}",
            self.failures, self.reason
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_up_to_five_minutes_and_end_with_a_success() {
        let (mut breaker, now) = (Breaker::new(SECOND), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..12 {
            breaker.failure("exit code 1".to_string(), now);
            pauses.push(breaker.closed_until(now).map_or(0, |until| (until - now).as_secs()));
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(breaker.closed_until(now + LONGEST), None);
        breaker.success();
        assert_eq!((breaker.closed_until(now), breaker.trouble(now)), (None, None));
    }

    #[test]
    fn the_trouble_names_count_reason_and_next_start() {
        let (mut breaker, now) = (Breaker::new(SECOND), Instant::now());
        breaker.failure("exit code 1".to_string(), now);
        assert_eq!(breaker.trouble(now), None);
        breaker.failure("exit code 1".to_string(), now);
        breaker.failure("exit code 1".to_string(), now);
        let said = breaker.trouble(now).unwrap();
        assert!(said.starts_with("3 workers in a row") && said.contains("exit code 1"), "{said}");
        assert!(said.ends_with("the next start is in 3 s"), "{said}");
        assert!(breaker.trouble(now + 3 * SECOND).unwrap().ends_with("the next start is due"));
    }
}
