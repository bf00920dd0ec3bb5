//! From the files that a model lists to files on this machine, verified: where there is a copy it is found, else the
//! hub is asked, by one process per volume.
//!
//! ```text
//! ModelSpec ─► survey: own storage, caches, receipts ─► all there? ─► ModelStorage
//!                │ no
//!                └► lock of the volume ─► verify what has no receipt ─► ask the hub ─► room? ─► fetch ─► receipts
//! ```

mod fetch;
mod hashes;
mod hold;
mod lock;
mod part;
mod progress;
mod remote;
mod settings;
mod survey;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use talkie::registry::{ModelStorage, Receipt, RepoFiles};
use tokio::sync::Semaphore;

pub use hold::Hold;
pub use progress::{Meter, Phase, Progress, bytes};
pub use settings::{HubSettings, Token};

use crate::disk::free_bytes;
use crate::job::{Code, JobError};
use fetch::{Fetcher, Order};
use hashes::{Digests, Hash};
use lock::{Attempt, VolumeLock, Waiter};
use progress::Counter;
use remote::{Facts, Remote, changed, download_failed};
use survey::{Found, State, Surveyor, Wanted};

/// The folder of lock and parts, in the storage.
const WORK_FOLDER: &str = ".downloads";
/// Between two reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);
/// Between two looks at a lock that another process has.
const LOCK_POLL: Duration = Duration::from_millis(100);
/// Between two signs of life, at most.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// What a volume needs besides the files: receipts, maps, folders.
const MARGIN_BYTES: u64 = 1 << 20;

/// Finds files, and fetches those that are missing.
#[derive(Clone, Debug)]
pub struct Hub {
    settings: HubSettings,
    surveyor: Surveyor,
}

/// What is done, and who is told of it.
pub struct Control<'a> {
    /// Read files again that were verified before.
    pub deep: bool,
    /// When all has to be there.
    pub deadline: Option<Instant>,
    /// Told how far it is.
    pub report: &'a mut (dyn FnMut(Progress) + Send),
}

/// Files that are there, all of them.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Where they are.
    pub storage: ModelStorage,
    /// Bytes that came over the network.
    pub bytes: u64,
    /// How long it took, waiting for another process included.
    pub duration: Duration,
}

/// A file of a model, as it stands on this machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileReport {
    /// `owner/name`.
    pub repo: String,
    /// The commit; `None` while it is not known.
    pub revision: Option<String>,
    /// Relative to the repository.
    pub path: String,
    /// Bytes; `None` while they are not known.
    pub size: Option<u64>,
    /// Hexadecimal; `None` while it is not known.
    pub sha256: Option<String>,
    /// How it stands.
    pub state: Standing,
    /// Bytes of it that are on this machine.
    pub have_bytes: u64,
    /// Where it lies, or will lie.
    pub place: PathBuf,
}

/// How a file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// There and verified.
    Ready,
    /// There; the next download reads it once.
    Unverified,
    /// A part of it is there.
    Partial,
    /// Not there.
    Missing,
}

/// Why work under the lock has ended.
#[derive(Debug)]
enum Stop {
    /// The lock was taken over.
    Lost,
    Failed(JobError),
}

impl From<JobError> for Stop {
    fn from(error: JobError) -> Self {
        Self::Failed(error)
    }
}

impl Hub {
    /// The same, but nothing is asked for.
    pub fn offline(mut self) -> Self {
        self.settings.offline = true;
        self
    }

    /// A hub whose files lie in `storage`.
    pub fn new(settings: HubSettings, storage: ModelStorage) -> Self {
        let surveyor = Surveyor { storage, caches: settings.caches.clone() };
        Self { settings, surveyor }
    }

    /// Where files are kept.
    pub fn storage(&self) -> &ModelStorage {
        &self.surveyor.storage
    }

    /// When a process that `started` then has to be ready, if it has to.
    pub fn ready_by(&self, started: Instant) -> Option<Instant> {
        self.settings.init_timeout.map(|timeout| started + timeout)
    }

    /// Whether every file of `repos` lies somewhere on this machine. A model without files is no one's installed model.
    pub fn has<'a>(&self, repos: impl IntoIterator<Item = &'a RepoFiles>) -> bool {
        let wanted = Wanted::list(repos);
        !wanted.is_empty() && !self.surveyor.survey(&wanted, false).contains(&State::Missing)
    }

    /// Makes sure that every file of `repos` is there and verified, and says where. When the returned future is
    /// dropped, what came so far stays, and is gone on with the next time.
    ///
    /// # Errors
    /// [`Code::ModelDownloadFailed`], [`Code::InsufficientDisk`].
    pub async fn ensure(&self, repos: &[RepoFiles], control: Control<'_>) -> Result<Installed, JobError> {
        let Control { deep, deadline, report } = control;
        let began = Instant::now();
        let wanted = Wanted::list(repos);
        let states = self.survey(&wanted, deep).await?;
        let mut installed = Installed {
            storage: self.surveyor.with_places(&wanted, &states),
            bytes: 0,
            duration: Duration::ZERO,
        };
        if states.iter().all(|state| matches!(state, State::Ready(_))) {
            return Ok(installed);
        }
        let counter = Arc::new(Counter::default());
        let work = Work { hub: self, wanted: &wanted, deep, counter: &counter };
        installed.storage = tokio::select! {
            error = late(deadline) => Err(error),
            never = tell(&counter, report) => match never {},
            done = work.run() => done,
        }?;
        installed.bytes = counter.bytes_fetched();
        installed.duration = began.elapsed();
        if installed.bytes > 0 {
            tracing::info!(
                bytes = installed.bytes,
                ms = installed.duration.as_millis(),
                "the model is complete"
            );
        }
        Ok(installed)
    }

    /// How every file of `repos` stands. Sizes that are not known here are asked for, where that is possible; beside
    /// the files there is why it was not.
    ///
    /// # Errors
    /// [`Code::Internal`] only.
    pub async fn plan(&self, repos: &[RepoFiles]) -> Result<(Vec<FileReport>, Option<JobError>), JobError> {
        let wanted = Wanted::list(repos);
        let states = self.survey(&wanted, false).await?;
        let mut reports: Vec<_> =
            wanted.iter().zip(&states).map(|(wanted, state)| self.describe(wanted, state)).collect();
        let unknown = |report: &FileReport| report.size.is_none();
        let failed = match reports.iter().any(unknown) && !self.settings.offline {
            true => self.ask_sizes(&wanted, &mut reports).await.err(),
            false => None,
        };
        Ok((reports, failed))
    }

    /// Bytes that may still be written to the storage.
    ///
    /// # Errors
    /// [`Code::ModelDownloadFailed`] when the volume does not answer.
    pub fn free_bytes(&self) -> Result<u64, JobError> {
        let root = self.storage().root();
        // It is made with its first file.
        let folder = root.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/"));
        free_bytes(folder).map_err(|e| volume_error(root, &e))
    }

    async fn ask_sizes(&self, wanted: &[Wanted], reports: &mut [FileReport]) -> Result<(), JobError> {
        let remote = Remote::new(&self.settings)?;
        for (repo, branch, paths) in by_repo(wanted.iter()) {
            let commit = match self.known_commit(repo, wanted) {
                Some(commit) => commit,
                None => remote.commit(repo, branch).await?,
            };
            for listed in remote.list(repo, &commit, paths).await? {
                let of_file = |report: &&mut FileReport| report.repo == repo && report.path == listed.path;
                for report in reports.iter_mut().filter(of_file) {
                    report.size.get_or_insert(listed.size);
                    report.revision.get_or_insert_with(|| commit.clone());
                }
            }
        }
        Ok(())
    }

    fn describe(&self, wanted: &Wanted, state: &State) -> FileReport {
        let receipt = self.surveyor.receipt(wanted);
        let size = wanted.file.size.known().copied().or(receipt.as_ref().map(|receipt| receipt.size));
        let hash = self.surveyor.expected(wanted);
        let revision = wanted.repo.revision.known().cloned();
        let learned = receipt.map(|receipt| receipt.revision).filter(|revision| !revision.is_empty());
        let place = match state {
            State::Ready(found) | State::Unverified(found, _) => found.path.clone(),
            State::Missing => self.surveyor.own_path(wanted),
        };
        let there = match (state, size) {
            (State::Ready(found) | State::Unverified(found, _), _) => found.size,
            (State::Missing, Some(size)) => {
                let identity = fetch::identity(&wanted.repo.repo, &wanted.file.path, size);
                part::bytes_there(&self.work_folder(), &identity, size)
            }
            (State::Missing, None) => 0,
        };
        FileReport {
            repo: wanted.repo.repo.clone(),
            revision: revision.or(learned),
            path: wanted.file.path.clone(),
            size: size.or(matches!(state, State::Unverified(..)).then_some(there)),
            sha256: hash.and_then(|hash| match hash {
                Hash::Sha256(digits) => Some(digits),
                Hash::GitBlob(_) => None,
            }),
            state: match state {
                State::Ready(_) => Standing::Ready,
                State::Unverified(..) => Standing::Unverified,
                State::Missing if there > 0 => Standing::Partial,
                State::Missing => Standing::Missing,
            },
            have_bytes: there,
            place,
        }
    }

    async fn survey(&self, wanted: &[Wanted], deep: bool) -> Result<Vec<State>, JobError> {
        let (surveyor, wanted) = (self.surveyor.clone(), wanted.to_vec());
        blocking(move || surveyor.survey(&wanted, deep)).await
    }

    /// The commit of `repo` that is written down or was learned.
    fn known_commit(&self, repo: &str, wanted: &[Wanted]) -> Option<String> {
        let written = wanted.iter().filter(|wanted| wanted.repo.repo == repo);
        let written = written.filter_map(|wanted| wanted.repo.revision.known()).next().cloned();
        written.or_else(|| self.surveyor.learned_revision(repo))
    }

    fn work_folder(&self) -> PathBuf {
        self.storage().root().join(WORK_FOLDER)
    }
}

/// One call of [`Hub::ensure`] that has something to do.
struct Work<'a> {
    hub: &'a Hub,
    wanted: &'a [Wanted],
    deep: bool,
    counter: &'a Arc<Counter>,
}

impl Work<'_> {
    /// Takes the lock and does what is to be done, again and again while the lock is lost to another process.
    async fn run(&self) -> Result<ModelStorage, JobError> {
        loop {
            let lock = match self.lock().await? {
                Turn::Ours(lock) => lock,
                Turn::Complete(storage) => return Ok(storage),
            };
            let done = match &lock {
                Some(lock) => tokio::select! {
                    done = self.complete(Some(lock)) => done,
                    stop = beat(lock, self.counter, self.hub.settings.stale) => Err(stop),
                },
                None => self.complete(None).await,
            };
            match done {
                Ok(storage) => return Ok(storage),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Lost) => tracing::warn!("another process has taken the download over"),
            }
        }
    }

    /// Waits until the lock is ours, or others have done all there was to do. Where nothing can be written there is no
    /// lock, and nothing to be fetched.
    async fn lock(&self) -> Result<Turn, JobError> {
        let folder = self.hub.work_folder();
        let mut waiter = match Waiter::new(&folder, self.hub.settings.stale) {
            Ok(waiter) => waiter,
            Err(e) if is_unwritable(&e) => return Ok(Turn::Ours(None)),
            Err(e) => return Err(volume_error(&folder, &e)),
        };
        let mut seen = (0, 0);
        loop {
            let (attempt, returned) = blocking(move || (waiter.attempt(), waiter)).await?;
            waiter = returned;
            match attempt {
                Ok(Attempt::Taken(lock)) => return Ok(Turn::Ours(Some(Arc::new(lock)))),
                Ok(Attempt::Busy(record)) => {
                    seen = record.map_or(seen, |record| (record.done, record.total));
                    self.counter.begin(Phase::Wait, seen.0, seen.1);
                }
                Err(e) if is_unwritable(&e) => return Ok(Turn::Ours(None)),
                Err(e) => return Err(volume_error(&folder, &e)),
            }
            let states = self.hub.survey(self.wanted, self.deep).await?;
            if states.iter().all(|state| matches!(state, State::Ready(_))) {
                return Ok(Turn::Complete(self.hub.surveyor.with_places(self.wanted, &states)));
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }

    /// Verifies what is there and fetches what is not.
    async fn complete(&self, lock: Option<&VolumeLock>) -> Result<ModelStorage, Stop> {
        let mut states = self.hub.survey(self.wanted, self.deep).await?;
        let hashes = states.iter().map(|state| match state {
            State::Unverified(_, hash) => hash.clone(),
            _ => None,
        });
        let hashes = hashes.collect();
        self.verify(&mut states, hashes, &BTreeMap::new()).await?;
        if self.hub.settings.offline {
            return self.offline(&states);
        }
        if states.iter().all(|state| matches!(state, State::Ready(_))) {
            return Ok(self.hub.surveyor.with_places(self.wanted, &states));
        }
        let remote = Remote::new(&self.hub.settings)?;
        let facts = self.facts(&remote, &states).await?;
        let hashes = states.iter().zip(&facts).map(|(state, facts)| match state {
            State::Unverified(..) => facts.as_ref().map(|facts| facts.hash.clone()),
            _ => None,
        });
        let hashes = hashes.collect();
        let commits =
            facts.iter().flatten().map(|facts| (facts.repo.clone(), facts.commit.clone())).collect();
        self.verify(&mut states, hashes, &commits).await?;
        let missing = states.iter().zip(facts).zip(self.wanted);
        let missing = missing.filter_map(|((state, facts), wanted)| {
            facts.filter(|_| *state == State::Missing).map(|facts| self.order(wanted, facts))
        });
        let orders: Vec<_> = missing.collect();
        if !orders.is_empty() {
            let lock = lock.ok_or_else(|| self.unwritable(&orders))?;
            self.fetch(&remote, lock, &orders).await?;
        }
        let states = self.hub.survey(self.wanted, false).await?;
        Ok(self.hub.surveyor.with_places(self.wanted, &states))
    }

    /// Reads the files that are to have these hashes. What has its hash is ready, anything else missing.
    async fn verify(
        &self,
        states: &mut [State],
        hashes: Vec<Option<Hash>>,
        commits: &BTreeMap<String, String>,
    ) -> Result<(), Stop> {
        let to_read = states.iter().zip(&hashes).map(|(state, hash)| match (state, hash) {
            (State::Unverified(found, _), Some(_)) => found.size,
            _ => 0,
        });
        let total: u64 = to_read.sum();
        if total > 0 {
            self.counter.begin(Phase::Verify, 0, total);
        }
        for ((state, hash), wanted) in states.iter_mut().zip(hashes).zip(self.wanted) {
            let (State::Unverified(found, _), Some(hash)) = (&*state, hash) else { continue };
            let digests = self.read(found, &hash).await?;
            *state = match digests.are(&hash) {
                true => {
                    let commit = found.commit.clone().or_else(|| commits.get(&wanted.repo.repo).cloned());
                    self.note(wanted, found, digests, commit).await?;
                    let identity = fetch::identity(&wanted.repo.repo, &wanted.file.path, found.size);
                    part::remove(&self.hub.work_folder(), &identity);
                    State::Ready(found.clone())
                }
                false => {
                    tracing::warn!("{} is damaged or another file; it is fetched", found.path.display());
                    if self.deep && !found.in_cache {
                        // Its receipt would make it pass the next time, should it not come now.
                        let _ = std::fs::remove_file(&found.path);
                    }
                    State::Missing
                }
            };
        }
        Ok(())
    }

    async fn read(&self, found: &Found, hash: &Hash) -> Result<Digests, Stop> {
        let (path, hash, counter) = (found.path.clone(), hash.clone(), self.counter.clone());
        let digests = blocking(move || Digests::of_file(&path, &hash, |n| counter.add(n))).await?;
        Ok(digests.map_err(|e| volume_error(&found.path, &e))?)
    }

    /// Writes the receipt of a file that was read. Where nothing can be written the file is read each time.
    async fn note(
        &self,
        wanted: &Wanted,
        found: &Found,
        digests: Digests,
        commit: Option<String>,
    ) -> Result<(), JobError> {
        let written = wanted.repo.revision.known().cloned();
        let before = self.hub.surveyor.receipt(wanted).map(|receipt| receipt.revision);
        let receipt = Receipt {
            revision: written.or(commit).or(before).unwrap_or_default(),
            size: found.size,
            sha256: digests.sha256,
            mtime_ns: found.mtime_ns,
        };
        let path = self.hub.storage().receipt_path(&wanted.repo, &wanted.file);
        if let Err(e) = blocking(move || survey::write_receipt(&path, &receipt)).await? {
            tracing::warn!("the receipt of {} cannot be written: {e}", found.path.display());
        }
        Ok(())
    }

    /// What the hub says of the files that are not ready.
    async fn facts(&self, remote: &Remote, states: &[State]) -> Result<Vec<Option<Facts>>, JobError> {
        self.counter.begin(Phase::Ask, 0, 0);
        let open = |(_, state): &(&Wanted, &State)| !matches!(state, State::Ready(_));
        let open: Vec<_> = self.wanted.iter().zip(states).filter(open).map(|(wanted, _)| wanted).collect();
        let mut all = BTreeMap::new();
        for (repo, branch, paths) in by_repo(open.iter().copied()) {
            let commit = match self.hub.known_commit(repo, self.wanted) {
                Some(commit) => commit,
                None => remote.commit(repo, branch).await?,
            };
            for listed in remote.list(repo, &commit, paths).await? {
                let of_file = |wanted: &&&Wanted| wanted.repo.repo == repo && wanted.file.path == listed.path;
                let Some(wanted) = open.iter().find(of_file) else { continue };
                if let Some(size) = wanted.file.size.known().filter(|size| **size != listed.size) {
                    let message =
                        format!("{} has {} bytes on the hub, expected {size}", wanted.name(), listed.size);
                    return Err(changed(message));
                }
                let hash = match self.hub.surveyor.expected(wanted) {
                    Some(hash) => hash,
                    None => remote.hash(repo, &commit, &listed).await?,
                };
                let (repo, path, commit) = (repo.to_string(), listed.path.clone(), commit.clone());
                all.insert(
                    (repo.clone(), path.clone()),
                    Facts { repo, path, commit, size: listed.size, hash },
                );
            }
        }
        let of = |wanted: &Wanted| all.get(&(wanted.repo.repo.clone(), wanted.file.path.clone())).cloned();
        Ok(self.wanted.iter().map(of).collect())
    }

    fn order(&self, wanted: &Wanted, facts: Facts) -> Order {
        Order {
            facts,
            target: self.hub.surveyor.own_path(wanted),
            receipt_path: self.hub.storage().receipt_path(&wanted.repo, &wanted.file),
        }
    }

    /// Fetches `orders`, if there is room for all of them.
    async fn fetch(&self, remote: &Remote, lock: &VolumeLock, orders: &[Order]) -> Result<(), Stop> {
        let folder = self.hub.work_folder();
        part::remove_abandoned(&folder);
        let total: u64 = orders.iter().map(|order| order.facts.size).sum();
        let there =
            orders.iter().map(|order| part::bytes_there(&folder, &order.identity(), order.facts.size));
        let there: u64 = there.sum();
        let (need, free) = (total - there, self.hub.free_bytes()?);
        if need.saturating_add(MARGIN_BYTES) > free {
            return Err(no_room(self.hub.storage().root(), need, free).into());
        }
        tracing::info!(need, free, files = orders.len(), "fetching");
        self.counter.begin(Phase::Fetch, there, total);
        let fetcher = Fetcher {
            remote,
            lock,
            folder: &folder,
            connections: Semaphore::new(self.hub.settings.connections),
            counter: self.counter,
        };
        fetcher.all(orders).await
    }

    /// What is there is all that there is.
    fn offline(&self, states: &[State]) -> Result<ModelStorage, Stop> {
        let missing = self.wanted.iter().zip(states).filter(|(_, state)| **state == State::Missing);
        let missing: Vec<_> = missing.map(|(wanted, _)| wanted.name()).collect();
        if !missing.is_empty() {
            let message = format!(
                "{} of {} files are missing, and nothing is fetched offline: {}",
                missing.len(),
                self.wanted.len(),
                missing.join(", ")
            );
            let error = download_failed(message).with_reason("OFFLINE").with_retryable(false);
            return Err(error.with_hint("run `handler prefetch` without HF_HUB_OFFLINE once").into());
        }
        for (wanted, state) in self.wanted.iter().zip(states) {
            if let State::Unverified(found, _) = state {
                tracing::warn!(
                    "{} is {}, and nothing says what it should be",
                    wanted.name(),
                    found.path.display()
                );
            }
        }
        Ok(self.hub.surveyor.with_places(self.wanted, states))
    }

    fn unwritable(&self, orders: &[Order]) -> JobError {
        let root = self.hub.storage().root().display();
        let first = orders.first().map(|order| order.target.display().to_string()).unwrap_or_default();
        let message = format!(
            "{root} cannot be written to, and {} files are missing, the first is {first}",
            orders.len()
        );
        download_failed(message).with_reason("VOLUME_UNWRITABLE").with_retryable(false)
    }
}

/// Who acts next.
enum Turn {
    /// We do; with the lock, unless nothing can be written.
    Ours(Option<Arc<VolumeLock>>),
    /// Nobody has to.
    Complete(ModelStorage),
}

/// Files by repository: its name, its branch, their paths.
fn by_repo<'a>(wanted: impl Iterator<Item = &'a Wanted>) -> Vec<(&'a str, &'a str, Vec<String>)> {
    let mut repos: Vec<(&str, &str, Vec<String>)> = Vec::new();
    for wanted in wanted {
        let path = wanted.file.path.clone();
        match repos.iter_mut().find(|(repo, ..)| *repo == wanted.repo.repo) {
            Some((.., paths)) => paths.push(path),
            None => repos.push((&wanted.repo.repo, &wanted.repo.branch, vec![path])),
        }
    }
    repos
}

/// Signs of life, until the lock is lost.
async fn beat(lock: &Arc<VolumeLock>, counter: &Counter, stale: Duration) -> Stop {
    let mut interval = tokio::time::interval((stale / 6).min(BEAT_INTERVAL));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Progress { done, total, .. } = counter.get();
        let lock = lock.clone();
        match blocking(move || lock.beat(done, total)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Stop::Lost,
            Ok(Err(e)) => tracing::warn!("the lock of the volume cannot be kept: {e}"),
            Err(error) => return error.into(),
        }
    }
}

async fn tell(counter: &Counter, report: &mut (dyn FnMut(Progress) + Send)) -> Infallible {
    let mut interval = tokio::time::interval(REPORT_INTERVAL);
    loop {
        interval.tick().await;
        report(counter.get());
    }
}

/// Ends when it is too late.
async fn late(deadline: Option<Instant>) -> JobError {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
    download_failed("the model is not complete within RUNPOD_INIT_TIMEOUT".to_string())
        .with_reason("INIT_TIMEOUT")
        .with_hint(
            "run `handler prefetch` once on this volume, or raise RUNPOD_INIT_TIMEOUT; what came is kept",
        )
        .with_retryable(true)
}

/// Runs what waits for a disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JobError> {
    let ended = |e| JobError::new(Code::Internal, format!("a part of the download has ended early: {e}"));
    tokio::task::spawn_blocking(work).await.map_err(ended)
}

fn no_room(root: &Path, need: u64, free: u64) -> JobError {
    let message = format!("{} has {free} bytes free, expected {need} for the model", root.display());
    JobError::new(Code::InsufficientDisk, message)
        .with_detail("need_bytes", need)
        .with_detail("free_bytes", free)
        .with_hint("free some space, use a larger volume, or set MODEL_STORAGE_PATH")
}

/// What an error of the volume at `path` means.
fn volume_error(path: &Path, e: &io::Error) -> JobError {
    let message = format!("{}: {e}", path.display());
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            JobError::new(Code::InsufficientDisk, message)
        }
        _ if is_unwritable(e) => {
            download_failed(message).with_reason("VOLUME_UNWRITABLE").with_retryable(false)
        }
        _ => download_failed(message).with_reason("VOLUME_FAILED"),
    }
}

fn is_unwritable(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use talkie::registry::{FileSpec, Learned};

    use super::*;

    /// A hub at an address where nobody answers.
    fn unreachable(dir: &Path) -> Hub {
        let variables = [("HF_ENDPOINT", "http://127.0.0.1:9"), ("HUB_BACKOFF_SECONDS", "3600")];
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
        Hub::new(HubSettings::from_env(find, dir).unwrap(), ModelStorage::at(dir.join("m")))
    }

    fn repo() -> RepoFiles {
        RepoFiles {
            repo: "o/m".into(),
            revision: Learned::Learn,
            branch: "main".into(),
            speakers: None,
            files: vec![FileSpec { path: "w".into(), size: Learned::Learn, sha256: Learned::Learn }],
        }
    }

    #[tokio::test]
    async fn what_takes_too_long_for_the_start_of_a_worker_names_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let mut told = 0;
        let mut report = |_| told += 1;
        let deadline = Some(Instant::now() + Duration::from_millis(50));
        let control = Control { deep: false, deadline, report: &mut report };
        let error = unreachable(dir.path()).ensure(&[repo()], control).await.unwrap_err();
        assert_eq!(error.details["reason"], "INIT_TIMEOUT");
        assert!(error.hint.unwrap().contains("handler prefetch"));
        assert!(told > 0, "somebody is told that the hub is asked");
        // The lock was given back.
        assert!(matches!(
            Waiter::new(&dir.path().join("m/.downloads"), Duration::MAX).unwrap().attempt(),
            Ok(Attempt::Taken(_))
        ));
    }

    #[test]
    fn a_model_is_there_when_all_its_files_are() {
        let dir = tempfile::tempdir().unwrap();
        let hub = unreachable(dir.path());
        assert!(!hub.has([&repo()]) && !hub.has([]));
        std::fs::create_dir_all(dir.path().join("m/o/m")).unwrap();
        std::fs::write(dir.path().join("m/o/m/w"), "x").unwrap();
        assert!(hub.has([&repo()]));
    }

    #[test]
    fn errors_of_a_volume_are_told_apart() {
        let error = |kind: io::ErrorKind| {
            let error = volume_error(Path::new("/v"), &kind.into());
            (error.code, error.details.get("reason").cloned())
        };
        assert_eq!(error(io::ErrorKind::StorageFull), (Code::InsufficientDisk, None));
        assert_eq!(error(io::ErrorKind::ReadOnlyFilesystem).1.unwrap(), "VOLUME_UNWRITABLE");
        assert_eq!(error(io::ErrorKind::StaleNetworkFileHandle).1.unwrap(), "VOLUME_FAILED");
    }
}
