//! The jobs that this worker answers for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The jobs that this worker answers for, in the order in which they came; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<Mutex<Vec<(String, Phase)>>>);

/// How far a job is, in this worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It runs, or waits for a slot.
    Busy,
    /// It has ended, and the platform does not know yet.
    Undelivered,
}

impl Held {
    /// Notes that `id` is in `phase` now.
    pub fn set(&self, id: &str, phase: Phase) {
        let mut jobs = self.lock();
        match jobs.iter_mut().find(|(held, _)| held == id) {
            Some((_, now)) => *now = phase,
            None => jobs.push((id.to_string(), phase)),
        }
    }

    /// Notes that nothing is left to do for `id`.
    pub fn remove(&self, id: &str) {
        self.lock().retain(|(held, _)| held != id);
    }

    /// Whether there is something left to do for `id`.
    pub fn contains(&self, id: &str) -> bool {
        self.lock().iter().any(|(held, _)| held == id)
    }

    /// Whether there is nothing left to do.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// The jobs that run or wait.
    pub fn busy(&self) -> usize {
        self.lock().iter().filter(|(_, phase)| *phase == Phase::Busy).count()
    }

    /// Every job, for the heartbeat.
    pub fn ids(&self) -> Vec<String> {
        self.lock().iter().map(|(id, _)| id.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Phase)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_held_until_they_are_delivered() {
        let held = Held::default();
        held.set("a", Phase::Busy);
        held.set("b", Phase::Busy);
        assert_eq!((held.busy(), held.ids()), (2, vec!["a".to_string(), "b".to_string()]));
        held.set("b", Phase::Undelivered);
        assert_eq!((held.busy(), held.contains("b"), held.is_empty()), (1, true, false));
        held.remove("a");
        held.remove("b");
        assert!(held.is_empty() && !held.contains("b"));
    }
}
