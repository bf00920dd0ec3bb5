//! How often a key may ask for what, as RunPod limits its endpoints.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

use super::error::ApiError;
use crate::job::{Code, JobError};

/// The time that the counts below stand for.
const PERIOD: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A job.
    Run,
    /// A job and its result.
    RunSync,
    /// Where a job is, or how the endpoint does.
    Status,
    /// The end of a job, or a second run.
    Cancel,
    /// The end of all that wait.
    Purge,
    /// The recent jobs.
    Requests,
}

impl Operation {
    const ALL: [Self; 6] =
        [Self::Run, Self::RunSync, Self::Status, Self::Cancel, Self::Purge, Self::Requests];

    /// Requests in a [`PERIOD`], and requests at once.
    fn limits(self) -> (u32, usize) {
        match self {
            Self::Run => (1000, 200),
            Self::RunSync => (2000, 400),
            Self::Status => (2000, 400),
            Self::Cancel => (100, 20),
            Self::Purge => (2, 2),
            Self::Requests => (10, 2),
        }
    }
}

/// Counts the requests of each key.
pub struct Quotas {
    rates: HashMap<Operation, DefaultKeyedRateLimiter<String>>,
    clock: DefaultClock,
    under_way: Arc<Mutex<HashMap<(String, Operation), usize>>>,
}

/// One request under way; dropping it ends that.
#[derive(Debug)]
pub struct Pass {
    under_way: Arc<Mutex<HashMap<(String, Operation), usize>>>,
    key: (String, Operation),
}

impl Default for Quotas {
    fn default() -> Self {
        let rate = |operation: Operation| {
            let (most, _) = operation.limits();
            let most = NonZeroU32::new(most).unwrap_or(NonZeroU32::MIN);
            let quota = Quota::with_period(PERIOD / most.get()).unwrap_or(Quota::per_second(most));
            (operation, RateLimiter::keyed(quota.allow_burst(most)))
        };
        Self {
            rates: Operation::ALL.into_iter().map(rate).collect(),
            clock: DefaultClock::default(),
            under_way: Arc::default(),
        }
    }
}

impl Quotas {
    /// Counts one request of `key`.
    ///
    /// # Errors
    /// [`Code::RateLimited`] when there were too many, or too many are under way.
    pub fn enter(&self, key: &str, operation: Operation) -> Result<Pass, ApiError> {
        let (rate, at_once) = operation.limits();
        let Some(limiter) = self.rates.get(&operation) else {
            return Err(ApiError::new(Code::Internal, "an operation has no limit"));
        };
        if let Err(early) = limiter.check_key(&key.to_string()) {
            let wait = early.wait_time_from(self.clock.now());
            // Rounded up: whoever waits for less asks in vain.
            let seconds = (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1);
            let message = format!("more than {rate} such requests in {} s with one key", PERIOD.as_secs());
            return Err(limited(message).with_retry_after(seconds));
        }
        let key = (key.to_string(), operation);
        let mut under_way = lock(&self.under_way);
        let count = under_way.entry(key.clone()).or_default();
        if *count >= at_once {
            let message = format!("more than {at_once} such requests at once with one key");
            return Err(limited(message));
        }
        *count += 1;
        drop(under_way);
        Ok(Pass { under_way: self.under_way.clone(), key })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut under_way = lock(&self.under_way);
        let count = under_way.get_mut(&self.key).map(|count| {
            *count = count.saturating_sub(1);
            *count
        });
        if count == Some(0) {
            under_way.remove(&self.key);
        }
    }
}

fn limited(message: String) -> ApiError {
    JobError::new(Code::RateLimited, message).with_hint("wait as `Retry-After` says").into()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_keys_requests_are_counted_apart_from_anothers() {
        let quotas = Quotas::default();
        for _ in 0..2 {
            quotas.enter("a", Operation::Purge).unwrap();
        }
        let refused = quotas.enter("a", Operation::Purge).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(5)));
        quotas.enter("b", Operation::Purge).unwrap();
        quotas.enter("a", Operation::Run).unwrap();
    }

    #[test]
    fn requests_at_once_are_limited_until_they_end() {
        let quotas = Quotas::default();
        let passes: Vec<_> = (0..20).map(|_| quotas.enter("a", Operation::Cancel).unwrap()).collect();
        let refused = quotas.enter("a", Operation::Cancel).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.retry_after), (429, Some(1)));
        drop(passes);
        quotas.enter("a", Operation::Cancel).unwrap();
        assert!(lock(&quotas.under_way).is_empty(), "what has ended is not remembered");
    }
}
