//! Whether the bucket of finished videos can be used.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::job::JobError;
use crate::storage::Storage;

/// An answer counts for this long, however often it is asked for.
const FRESH: Duration = Duration::from_secs(10);
/// A bucket that takes longer is slow, and not gone.
const PATIENCE: Duration = Duration::from_secs(2);

/// A bucket, and what it last said.
pub struct Bucket {
    storage: Storage,
    said: Mutex<Option<(Instant, Result<(), JobError>)>>,
}

impl Bucket {
    /// A bucket that was not asked yet.
    pub fn new(storage: Storage) -> Self {
        Self { storage, said: Mutex::new(None) }
    }

    /// Whether it is there and answers to our keys; what may pass by itself is no error.
    ///
    /// # Errors
    /// [`UploadFailed`](crate::job::Code::UploadFailed).
    pub async fn check(&self) -> Result<(), JobError> {
        let mut said = self.said.lock().await;
        if let Some((at, answer)) = &*said
            && at.elapsed() < FRESH
        {
            return answer.clone();
        }
        let answer = match timeout(PATIENCE, self.storage.check()).await {
            Ok(Err(e)) if !e.retryable => Err(e),
            _ => Ok(()),
        };
        *said = Some((Instant::now(), answer.clone()));
        answer
    }
}
