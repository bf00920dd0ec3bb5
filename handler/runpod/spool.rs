//! Results on disk until the platform has acknowledged them.
//!
//! `<root>/results/<worker>-<random>/` belongs to one process, for as long as it lives: nobody else touches it.
//! `owner.json` in it says who that is, and its time of change that it still lives. What a dead process left is
//! taken over by the next one, by renaming its folder, which only one can do. `<root>/rejected/` holds results
//! that the platform does not want, for as long as anything undelivered is kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::owner::Owner;
use crate::part_file::PartFile;
use crate::storage::spool::REJECTED;

const OWNER: &str = "owner.json";
/// Characters of a worker's id in the name of its folder.
const MAX_NAME_CHARS: usize = 60;

/// A result, as it is kept.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The worker that ran the job: the platform may not take the result from another one.
    pub worker: String,
    /// The job.
    pub job: String,
    /// When it ended, in seconds since 1970.
    pub ended: u64,
    /// The body to post.
    pub body: Box<RawValue>,
}

impl Record {
    /// A result of now.
    pub fn new(worker: &str, job: &str, body: Box<RawValue>) -> Self {
        Self { worker: worker.to_string(), job: job.to_string(), ended: seconds_now(), body }
    }

    /// How old it is.
    pub fn age(&self) -> Duration {
        Duration::from_secs(seconds_now().saturating_sub(self.ended))
    }
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The folder of this process.
#[derive(Debug)]
pub struct Spool {
    results: PathBuf,
    rejected: PathBuf,
    own: PathBuf,
    /// A process on another machine is dead when it has not touched its folder for this long.
    stale_after: Duration,
}

impl Spool {
    /// Makes a folder for this process, below `root`.
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn open(root: &Path, worker_id: &str, stale_after: Duration) -> io::Result<Self> {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name: String = worker_id.chars().map(plain).take(MAX_NAME_CHARS).collect();
        let results = root.join("results");
        let own = results.join(format!("{name}-{:08x}", rand::random::<u32>()));
        let spool = Self { results, rejected: root.join(REJECTED), own, stale_after };
        fs::create_dir_all(&spool.rejected)?;
        spool.own_folder()?;
        Ok(spool)
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.own
    }

    /// Makes the folder, also where another process took this one for dead and moved it away.
    fn own_folder(&self) -> io::Result<()> {
        fs::create_dir_all(&self.own)?;
        fs::write(self.own.join(OWNER), serde_json::to_vec(&Owner::this_process()?)?)?;
        for folder in [&self.results, self.results.parent().unwrap_or(&self.results)] {
            fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    /// Says that this process lives.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn touch(&self) -> io::Result<()> {
        // Writing, and not setting the time, has the volume's own clock decide.
        match Owner::this_process().and_then(|owner| Ok(serde_json::to_vec(&owner)?)) {
            Ok(owner) if self.own.is_dir() => fs::write(self.own.join(OWNER), owner),
            Ok(_) => self.own_folder(),
            Err(e) => Err(e),
        }
    }

    /// Keeps a result. When this returns, it survives a loss of power.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep(&self, record: &Record) -> io::Result<()> {
        if !self.own.is_dir() {
            self.own_folder()?;
        }
        let part = PartFile::create(&self.file(&record.job))?;
        fs::write(part.path(), serde_json::to_vec(record)?)?;
        part.publish()
    }

    /// Forgets the result of `job`, which is acknowledged.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn remove(&self, job: &str) -> io::Result<()> {
        match fs::remove_file(self.file(job)) {
            // There is none where it could not be written.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Puts the result of `job` aside for good, and says where it is.
    ///
    /// # Errors
    /// When it cannot be moved; it is sent again by the next start then.
    pub fn reject(&self, job: &str) -> io::Result<PathBuf> {
        let to = self.rejected.join(file_name(job));
        // It is kept there for a while from now on, however long it was sent.
        fs::File::options().write(true).open(self.file(job))?.set_modified(SystemTime::now())?;
        fs::rename(self.file(job), &to)?;
        fs::File::open(&self.rejected)?.sync_all()?;
        Ok(to)
    }

    /// Takes over what dead processes left, and lists it, oldest first.
    ///
    /// # Errors
    /// When the spool cannot be read.
    pub fn adopt(&self) -> io::Result<Vec<Record>> {
        self.touch()?;
        let now = fs::metadata(self.own.join(OWNER))?.modified()?;
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.results)? {
            let folder = entry?.path();
            if folder == self.own || !folder.is_dir() || lives(&folder, now, self.stale_after) {
                continue;
            }
            let Some(name) = folder.file_name() else { continue };
            let taken = self.own.join(name);
            // Where this fails, another process was quicker.
            if fs::rename(&folder, &taken).is_ok() {
                self.empty(&taken, &mut records)?;
                let _ = fs::remove_dir_all(&taken);
            }
        }
        records.sort_by_key(|record: &Record| record.ended);
        Ok(records)
    }

    /// Moves the results in `folder`, and in those that its own owner had taken over, into this one's.
    fn empty(&self, folder: &Path, records: &mut Vec<Record>) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                self.empty(&path, records)?;
                continue;
            }
            let is_result = path.extension().is_some_and(|e| e == "json") && !path.ends_with(OWNER);
            if !is_result {
                continue;
            }
            let record: Result<Record, _> = serde_json::from_slice(&fs::read(&path)?);
            match record {
                Ok(record) => {
                    fs::rename(&path, self.file(&record.job))?;
                    records.push(record);
                }
                Err(e) => {
                    tracing::error!(path = %path.display(), %e, "a spooled result cannot be read, and is put aside");
                    fs::rename(&path, self.rejected.join(path.file_name().unwrap_or_default()))?;
                }
            }
        }
        fs::File::open(&self.own)?.sync_all()
    }

    /// Removes the folder where nothing is left in it.
    pub fn close(&self) {
        let left = fs::read_dir(&self.own).map_or(0, |entries| entries.count());
        if left <= 1 {
            let _ = fs::remove_file(self.own.join(OWNER)).and_then(|()| fs::remove_dir(&self.own));
        }
    }

    fn file(&self, job: &str) -> PathBuf {
        self.own.join(file_name(job))
    }
}

/// Ids come from outside and may be no names of files.
fn file_name(job: &str) -> String {
    format!("{}.json", &hex::encode(Sha256::digest(job))[..32])
}

/// Whether the owner of `folder` lives, as far as can be told; `now` is by the volume's clock.
fn lives(folder: &Path, now: SystemTime, stale_after: Duration) -> bool {
    let file = folder.join(OWNER);
    let owner = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Owner>(&text).ok());
    if let Some(lives) = owner.and_then(|owner| owner.lives()) {
        return lives;
    }
    // The file is missing while its process is being born, or has just been taken over.
    let changed = fs::metadata(&file).or_else(|_| fs::metadata(folder)).and_then(|m| m.modified());
    changed.is_ok_and(|at| now.duration_since(at).unwrap_or_default() < stale_after)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const STALE: Duration = Duration::from_secs(60);

    fn record(job: &str) -> Record {
        let body = serde_json::value::to_raw_value(&serde_json::json!({ "output": job })).unwrap();
        Record::new("w1", job, body)
    }

    fn adopted(spool: &Spool) -> Vec<String> {
        spool.adopt().unwrap().into_iter().map(|record| record.body.get().to_string()).collect()
    }

    /// Makes `spool` that of another process.
    fn give_to(spool: &Spool, owner: &Owner) {
        fs::write(spool.own.join(OWNER), serde_json::to_vec(owner).unwrap()).unwrap();
    }

    fn dead() -> Owner {
        Owner { started: "1".into(), ..Owner::this_process().unwrap() }
    }

    #[test]
    fn a_dead_process_is_inherited_once_and_a_living_one_never() {
        let root = tempfile::tempdir().unwrap();
        let [first, second, third] = [(); 3].map(|()| Spool::open(root.path(), "w/1", STALE).unwrap());
        first.keep(&record("a")).unwrap();
        assert!(adopted(&second).is_empty(), "the owner lives");
        give_to(&first, &dead());
        assert_eq!(adopted(&second), [r#"{"output":"a"}"#]);
        assert!(adopted(&third).is_empty() && adopted(&second).is_empty(), "it is taken over already");
        // What was taken over is inherited in turn.
        give_to(&second, &dead());
        assert_eq!(adopted(&third), [r#"{"output":"a"}"#]);
        third.remove("a").unwrap();
        third.close();
        assert!(!third.own.exists());
    }

    #[test]
    fn a_process_that_ended_is_dead_at_once() {
        let mut child = Command::new("sleep").arg("100").stdin(Stdio::null()).spawn().unwrap();
        let owner = Owner::process(child.id()).unwrap();
        let root = tempfile::tempdir().unwrap();
        let [theirs, ours] = [(); 2].map(|()| Spool::open(root.path(), "w", STALE).unwrap());
        theirs.keep(&record("a")).unwrap();
        give_to(&theirs, &owner);
        assert!(adopted(&ours).is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(adopted(&ours).len(), 1);
    }

    #[test]
    fn a_process_elsewhere_is_dead_when_it_no_longer_touches_its_folder() {
        let root = tempfile::tempdir().unwrap();
        let [theirs, ours] = [(); 2].map(|()| Spool::open(root.path(), "w", STALE).unwrap());
        theirs.keep(&record("a")).unwrap();
        give_to(&theirs, &Owner { host: "elsewhere".into(), ..dead() });
        assert!(adopted(&ours).is_empty(), "it was touched just now");
        let owner = fs::File::options().write(true).open(theirs.own.join(OWNER)).unwrap();
        owner.set_modified(SystemTime::now() - 2 * STALE).unwrap();
        assert_eq!(adopted(&ours).len(), 1);
        // It was only asleep: it goes on in a new folder.
        theirs.keep(&record("b")).unwrap();
        theirs.touch().unwrap();
        assert!(theirs.file("b").exists() && !theirs.file("a").exists());
    }

    #[test]
    fn what_cannot_be_read_is_put_aside_and_names_are_harmless() {
        let root = tempfile::tempdir().unwrap();
        let [theirs, ours] = [(); 2].map(|()| Spool::open(root.path(), "../w", STALE).unwrap());
        theirs.keep(&record("../../etc/x\0")).unwrap();
        fs::write(theirs.own.join("half.json"), "{").unwrap();
        give_to(&theirs, &dead());
        let records = ours.adopt().unwrap();
        assert_eq!(records.iter().map(|r| r.job.as_str()).collect::<Vec<_>>(), ["../../etc/x\0"]);
        assert!(root.path().join("rejected/half.json").exists());
        let rejected = ours.reject("../../etc/x\0").unwrap();
        assert_eq!(rejected.parent(), Some(root.path().join("rejected").as_path()));
        assert!(!theirs.own.exists());
    }
}
