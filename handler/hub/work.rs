//! What is done under the lock of a volume: verify what has no receipt, ask the hub, fetch what is missing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use talkie::registry::{ModelStorage, Receipt};
use tokio::sync::Semaphore;

use super::fetch::{self, Fetcher, Order};
use super::hashes::{Digests, Hash};
use super::lock::{Attempt, VolumeLock, Waiter};
use super::progress::{Counter, Phase, Progress};
use super::remote::{Facts, Remote, changed, download_failed};
use super::survey::{self, Found, State, Wanted};
use super::{BEAT_INTERVAL, Hub, LOCK_POLL, Stop, blocking, is_unwritable, part, volume_error};
use crate::job::{Code, JobError};

/// What a volume needs besides the files: receipts, maps, folders.
const MARGIN_BYTES: u64 = 1 << 20;

/// One call of [`Hub::ensure`] that has something to do.
pub(super) struct Work<'a> {
    pub(super) hub: &'a Hub,
    pub(super) wanted: &'a [Wanted],
    pub(super) deep: bool,
    pub(super) counter: &'a Arc<Counter>,
}

impl Work<'_> {
    /// Takes the lock and does what is to be done, again and again while the lock is lost to another process.
    pub(super) async fn run(&self) -> Result<ModelStorage, JobError> {
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
pub(super) fn by_repo<'a>(wanted: impl Iterator<Item = &'a Wanted>) -> Vec<(&'a str, &'a str, Vec<String>)> {
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

fn no_room(root: &Path, need: u64, free: u64) -> JobError {
    let message = format!("{} has {free} bytes free, expected {need} for the model", root.display());
    JobError::new(Code::InsufficientDisk, message)
        .with_detail("need_bytes", need)
        .with_detail("free_bytes", free)
        .with_hint("free some space, use a larger volume, or set MODEL_STORAGE_PATH")
}
