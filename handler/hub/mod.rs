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
mod work;

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use talkie::registry::{ModelStorage, RepoFiles};

pub use hold::Hold;
pub use progress::{Meter, Phase, Progress, bytes};
pub use settings::{HubSettings, Token};

use crate::disk::free_bytes;
use crate::job::{Code, JobError};
use hashes::Hash;
use progress::Counter;
use remote::{Remote, download_failed};
use survey::{State, Surveyor, Wanted};
use work::{Work, by_repo};

/// The folder of lock and parts, in the storage.
const WORK_FOLDER: &str = ".downloads";
/// Between two reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);
/// Between two looks at a lock that another process has.
const LOCK_POLL: Duration = Duration::from_millis(100);
/// Between two signs of life, at most.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);

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

    use super::lock::{Attempt, Waiter};
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
