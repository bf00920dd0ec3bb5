//! The job store, from outside: what it promises, on disks and clocks that fail.

mod disk;
mod faults;
mod kills;
mod power_cut;
mod states;
mod steps;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use handler::gateway::store::{Clock, Loss, NewJob, OnChange, Options, Outcome, Queue, Store, Taker, World};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);

/// A folder in memory where the machine has such: these tests wait for no disk.
fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn options() -> Options {
    Options { max_queued: 1_000_000, max_attempts: 3, lease: Duration::from_secs(30), retention: 24 * HOUR }
}

fn silent() -> OnChange {
    Box::new(|_, _| ())
}

fn open(dir: &Path) -> Store {
    Store::open(dir, options(), silent()).unwrap()
}

fn job(id: &str) -> NewJob {
    NewJob {
        id: id.to_string(),
        endpoint: "e".to_string(),
        queue: Queue::Talkie,
        request: format!(r#"{{"input":{{"prompt":"{id}"}}}}"#),
        webhook: None,
        execution_timeout: Duration::from_secs(600),
        ttl: 24 * HOUR,
        low_priority: false,
        idempotency: None,
    }
}

fn taker(worker: &str) -> Taker {
    Taker { worker: worker.to_string(), spawned: false }
}

fn completed() -> Outcome {
    Outcome::Completed(r#"{"video_url":"u"}"#.to_string())
}

fn loss(reason: &str) -> Loss {
    Loss { reason: reason.to_string(), log_tail: format!("log of {reason}"), counts: true }
}

/// A clock that stands until it is moved.
#[derive(Default)]
struct HandClock {
    wall_ms: AtomicI64,
    elapsed_ms: AtomicI64,
}

impl HandClock {
    fn new() -> Arc<Self> {
        Arc::new(Self { wall_ms: AtomicI64::new(1_700_000_000_000), elapsed_ms: AtomicI64::new(5_000_000) })
    }

    /// Time passes.
    fn advance(&self, time: Duration) {
        self.elapsed_ms.fetch_add(time.as_millis() as i64, Ordering::SeqCst);
        self.jump(time.as_millis() as i64);
    }

    /// The wall clock alone is set by so many milliseconds.
    fn jump(&self, ms: i64) {
        self.wall_ms.fetch_add(ms, Ordering::SeqCst);
    }

    fn world(self: &Arc<Self>) -> World {
        World { clock: self.clone(), ..World::default() }
    }
}

impl Clock for HandClock {
    fn wall_ms(&self) -> i64 {
        self.wall_ms.load(Ordering::SeqCst)
    }

    fn elapsed(&self) -> Duration {
        Duration::from_millis(self.elapsed_ms.load(Ordering::SeqCst).unsigned_abs())
    }

    fn awake(&self) -> Duration {
        self.elapsed()
    }
}
