//! One downloader per volume, also where locks of the system are none.
//!
//! Network volumes answer `flock` with yes to everyone, so the lock is a file that only one process can create:
//! `lock.<n>`, where the highest n counts. Its owner writes a sign of life and its progress into it; whoever waits
//! reads them. A lock is given back by writing so into it. Whoever finds it given back, or its owner dead or silent for
//! too long, tries to create `lock.<n+1>`, in which only one succeeds; numbers are never used again. An owner that was
//! asleep meanwhile finds the higher number and stops; what it may still have written are the same bytes, and the hash
//! of the whole file decides.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::owner::Owner;

const PREFIX: &str = "lock.";
/// Bytes of the file: what is written over what was there before covers all of it.
const RECORD_BYTES: usize = 1024;

/// What stands in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    owner: Owner,
    /// Grows with each sign of life.
    beat: u64,
    released: bool,
    /// Bytes that the owner has, of those that it fetches.
    pub(super) done: u64,
    pub(super) total: u64,
}

/// The lock, while it is ours. It is given back when it is dropped.
#[derive(Debug)]
pub(super) struct VolumeLock {
    folder: PathBuf,
    number: u64,
    file: File,
    stale: Duration,
    state: Mutex<(Record, Instant)>,
}

/// What an attempt to take the lock came to.
#[derive(Debug)]
pub(super) enum Attempt {
    Taken(VolumeLock),
    /// Another process has it; its record, if it could be read.
    Busy(Option<Record>),
}

/// Somebody who wants the lock, and watches who has it meanwhile.
#[derive(Debug)]
pub(super) struct Waiter {
    folder: PathBuf,
    stale: Duration,
    /// The number and contents of the lock, and since when they are the same, by our own clock.
    seen: Option<(u64, Vec<u8>, Instant)>,
}

impl Waiter {
    /// For the lock in `folder`, which is made. An owner may be silent for `stale`.
    pub(super) fn new(folder: &Path, stale: Duration) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self { folder: folder.to_path_buf(), stale, seen: None })
    }

    /// Takes the lock if it is free.
    pub(super) fn attempt(&mut self) -> io::Result<Attempt> {
        let Some(number) = highest(&self.folder)? else { return self.create(1) };
        let text = fs::read(lock_path(&self.folder, number)).unwrap_or_default();
        let record = parse(&text);
        let free =
            record.as_ref().is_some_and(|record| record.released || record.owner.lives() == Some(false));
        let unchanged_since = match &self.seen {
            Some((seen, contents, since)) if (*seen, contents) == (number, &text) => *since,
            _ => {
                let now = Instant::now();
                self.seen = Some((number, text, now));
                now
            }
        };
        if free || unchanged_since.elapsed() >= self.stale {
            return self.create(number + 1);
        }
        Ok(Attempt::Busy(record))
    }

    fn create(&self, number: u64) -> io::Result<Attempt> {
        let path = lock_path(&self.folder, number);
        let file = match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(Attempt::Busy(None)),
            Err(e) => return Err(e),
        };
        let record = Record { owner: Owner::this_process()?, beat: 0, released: false, done: 0, total: 0 };
        let lock = VolumeLock {
            folder: self.folder.clone(),
            number,
            file,
            stale: self.stale,
            state: Mutex::new((record, Instant::now())),
        };
        if let Err(e) = lock.beat(0, 0) {
            // A full disk: an empty lock would hold up everyone until it counts as silent.
            let _ = fs::remove_file(path);
            return Err(e);
        }
        // This number may have been free only because it was deleted: then there is a higher one.
        if !lock.is_ours()? {
            let _ = fs::remove_file(path);
            return Ok(Attempt::Busy(None));
        }
        for older in numbers(&self.folder)?.into_iter().filter(|older| *older < number) {
            let _ = fs::remove_file(lock_path(&self.folder, older));
        }
        Ok(Attempt::Taken(lock))
    }
}

impl VolumeLock {
    /// A sign of life, with the bytes that are there of those that are fetched. False when the lock is lost.
    pub(super) fn beat(&self, done: u64, total: u64) -> io::Result<bool> {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.0 = Record { beat: state.0.beat + 1, done, total, ..state.0.clone() };
            self.write(&state.0)?;
        }
        self.is_ours_now()
    }

    /// Whether the lock is still ours. The volume is asked only after a silence in which it may have been taken: this
    /// process may have been stopped.
    pub(super) fn is_held(&self) -> bool {
        let beaten = self.state.lock().unwrap_or_else(PoisonError::into_inner).1;
        beaten.elapsed() < self.stale / 2 || self.is_ours_now().unwrap_or(false)
    }

    fn is_ours_now(&self) -> io::Result<bool> {
        let ours = self.is_ours()?;
        if ours {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = Instant::now();
        }
        Ok(ours)
    }

    fn is_ours(&self) -> io::Result<bool> {
        Ok(highest(&self.folder)? == Some(self.number))
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let mut text = serde_json::to_vec(record)?;
        text.resize(text.len().max(RECORD_BYTES), b' ');
        self.file.write_all_at(&text, 0)
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Where this cannot be written, the others find out that we are silent.
        let _ = self.write(&Record { released: true, ..state.0.clone() });
    }
}

fn parse(text: &[u8]) -> Option<Record> {
    serde_json::from_slice(text).ok()
}

fn lock_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{PREFIX}{number}"))
}

fn numbers(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u64>().ok()));
    }
    Ok(numbers)
}

fn highest(folder: &Path) -> io::Result<Option<u64>> {
    Ok(numbers(folder)?.into_iter().max())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn waiter(dir: &Path, stale: Duration) -> Waiter {
        Waiter::new(dir, stale).unwrap()
    }

    fn take(dir: &Path) -> Option<VolumeLock> {
        match waiter(dir, LONG).attempt().unwrap() {
            Attempt::Taken(lock) => Some(lock),
            Attempt::Busy(_) => None,
        }
    }

    /// Makes the lock that of another process.
    fn give_to(lock: &VolumeLock, owner: Owner) {
        let state = lock.state.lock().unwrap();
        lock.write(&Record { owner, ..state.0.clone() }).unwrap();
    }

    fn elsewhere() -> Owner {
        Owner { host: "elsewhere".into(), ..Owner::this_process().unwrap() }
    }

    #[test]
    fn one_has_it_until_it_is_given_back_and_the_others_see_the_progress() {
        let dir = tempfile::tempdir().unwrap();
        let lock = take(dir.path()).unwrap();
        assert!(lock.beat(3, 7).unwrap() && lock.is_held());
        let Attempt::Busy(Some(record)) = waiter(dir.path(), LONG).attempt().unwrap() else {
            panic!("it is taken")
        };
        assert_eq!((record.done, record.total), (3, 7));
        drop(lock);
        let again = take(dir.path()).unwrap();
        assert!(take(dir.path()).is_none());
        assert_eq!(numbers(dir.path()).unwrap(), [again.number], "one file is left");
    }

    #[test]
    fn a_dead_owner_is_followed_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let lock = take(dir.path()).unwrap();
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        give_to(&lock, Owner::process(child.id()).unwrap());
        assert!(take(dir.path()).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(take(dir.path()).is_some());
        assert!(!lock.beat(0, 0).unwrap(), "a lock that was taken over is noticed");
    }

    #[test]
    fn an_owner_elsewhere_is_followed_when_it_is_silent_by_the_waiters_own_clock() {
        let dir = tempfile::tempdir().unwrap();
        let lock = take(dir.path()).unwrap();
        give_to(&lock, elsewhere());
        let mut patient = waiter(dir.path(), LONG);
        let mut hasty = waiter(dir.path(), Duration::ZERO);
        assert!(matches!(patient.attempt().unwrap(), Attempt::Busy(_)));
        assert!(matches!(patient.attempt().unwrap(), Attempt::Busy(_)));
        let Attempt::Taken(taken) = hasty.attempt().unwrap() else { panic!("nobody has beaten") };
        // The old owner writes into its own file only, which is gone.
        assert!(!lock.beat(1, 1).unwrap() && taken.beat(0, 0).unwrap());
        drop(lock);
        assert!(take(dir.path()).is_none(), "the end of the old owner gives nothing back");
        drop(taken);
    }

    #[test]
    fn after_a_silence_the_volume_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let Attempt::Taken(lock) = waiter(dir.path(), Duration::ZERO).attempt().unwrap() else {
            panic!("free")
        };
        assert!(lock.is_held());
        fs::write(lock_path(dir.path(), lock.number + 1), "").unwrap();
        assert!(!lock.is_held());
    }

    #[test]
    fn of_many_who_try_at_once_one_succeeds() {
        for free in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let before = (!free).then(|| take(dir.path()).unwrap());
            if let Some(lock) = &before {
                give_to(lock, elsewhere());
            }
            let (barrier, taken) = (Barrier::new(8), AtomicUsize::new(0));
            let locks: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            let mut waiter = waiter(dir.path(), if free { LONG } else { Duration::ZERO });
                            barrier.wait();
                            match waiter.attempt().unwrap() {
                                Attempt::Taken(lock) => {
                                    taken.fetch_add(1, Ordering::SeqCst);
                                    Some(lock)
                                }
                                Attempt::Busy(_) => None,
                            }
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            // With no patience at all one may follow another, but only the last is ours.
            let ours = locks.iter().flatten().filter(|lock| lock.is_ours().unwrap()).count();
            assert_eq!(ours, 1);
            assert!(!free || taken.load(Ordering::SeqCst) == 1);
        }
    }
}
