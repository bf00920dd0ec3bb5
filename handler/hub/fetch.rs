//! Bytes from the hub into files: several connections, each piece resumed where it was cut, everything hashed as it
//! comes, and no file under its name before its hash is right.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::{try_join, try_join_all};
use talkie::registry::Receipt;
use tokio::sync::Semaphore;

use super::hashes::{BLOCK_BYTES, Digests, Hasher};
use super::lock::VolumeLock;
use super::part::Part;
use super::progress::Counter;
use super::remote::{Facts, Failure, Remote, download_failed, passing};
use super::{Stop, blocking, survey, volume_error};
use crate::faults::kill_point;

/// Bytes that are kept back before they are written. Of each connection no more than twice as many are lost, and
/// fetched once more, when the process is killed.
const WRITE_BYTES: usize = 256 << 10;

/// Fetches into one volume.
pub(super) struct Fetcher<'a> {
    pub(super) remote: &'a Remote,
    pub(super) lock: &'a VolumeLock,
    /// Where parts are kept.
    pub(super) folder: &'a Path,
    /// Connections that are free.
    pub(super) connections: Semaphore,
    pub(super) counter: &'a Counter,
}

/// A file to fetch.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) facts: Facts,
    pub(super) target: PathBuf,
    pub(super) receipt_path: PathBuf,
}

impl Order {
    /// The [`identity`] of the file.
    pub(super) fn identity(&self) -> String {
        identity(&self.facts.repo, &self.facts.path, self.facts.size)
    }
}

/// What a part of a file is told from others by. The hash is not in it: a file is known by git's before it was fetched,
/// and by another once it has a receipt. A part of another commit's file is noticed by its hash, and fetched anew.
pub(super) fn identity(repo: &str, path: &str, size: u64) -> String {
    [repo, path, &size.to_string()].join("\n")
}

impl Fetcher<'_> {
    /// Fetches all `orders`, from the first to the last.
    pub(super) async fn all(&self, orders: &[Order]) -> Result<(), Stop> {
        try_join_all(orders.iter().map(|order| self.file(order))).await.map(drop)
    }

    /// Fetches a file, and once more from its beginning if its hash is wrong.
    async fn file(&self, order: &Order) -> Result<(), Stop> {
        let Facts { size, hash, .. } = &order.facts;
        let mut wrong = String::new();
        for _ in 0..2 {
            let (folder, identity, size) = (self.folder.to_path_buf(), order.identity(), *size);
            let part = blocking(move || Part::open(&folder, &identity, size)).await?;
            let part = Arc::new(part.map_err(|e| volume_error(self.folder, &e))?);
            let pieces = part.missing().into_iter().map(|piece| self.piece(order, &part, piece));
            let hasher = Hasher::new(hash, size);
            let (_, digests) = try_join(try_join_all(pieces), follow(&part, hasher, self.folder)).await?;
            if digests.are(hash) {
                return self.publish(order, part, digests).await;
            }
            tracing::warn!("{}/{} hashes to {}", order.facts.repo, order.facts.path, digests.sha256);
            self.counter.remove(part.done());
            part.discard();
            wrong = digests.sha256;
        }
        let Facts { repo, path, .. } = &order.facts;
        let message =
            format!("{repo}/{path} came twice with another hash, {wrong}, expected {}", hash.as_str());
        Err(download_failed(message).with_reason("MODEL_CHECKSUM_MISMATCH").with_retryable(false).into())
    }

    /// Fetches what is missing of one piece.
    async fn piece(&self, order: &Order, part: &Arc<Part>, piece: usize) -> Result<(), Stop> {
        // It is never closed.
        let Ok(_connection) = self.connections.acquire().await else { return Ok(()) };
        let mut failures = 0;
        loop {
            let (from, until) = part.rest(piece);
            if from == until {
                return Ok(());
            }
            let (error, retry_after) = match self.stretch(order, part, piece).await {
                Ok(()) => continue,
                Err(Trouble::Stop(stop)) => return Err(stop),
                Err(Trouble::Failure(Failure::Final(error))) => return Err(error.into()),
                Err(Trouble::Failure(Failure::Whole(error))) if piece == 0 => {
                    self.counter.remove(from);
                    part.reset(piece).map_err(|e| volume_error(self.folder, &e))?;
                    (error, None)
                }
                Err(Trouble::Failure(Failure::Whole(error))) => return Err(error.into()),
                Err(Trouble::Failure(Failure::Passing(error, retry_after))) => (error, retry_after),
            };
            // Whoever gets on has all the attempts again.
            failures = if part.rest(piece).0 > from { 1 } else { failures + 1 };
            self.remote.pause_or_give_up(error, retry_after, failures).await?;
        }
    }

    /// One request: as much of the piece as it brings.
    async fn stretch(&self, order: &Order, part: &Arc<Part>, piece: usize) -> Result<(), Trouble> {
        let (from, until) = part.rest(piece);
        let mut response = self.remote.open(&order.facts, from, until).await?;
        let mut left = until - from;
        let mut buffer = Vec::with_capacity(WRITE_BYTES);
        while left > 0 {
            let arrived = response.chunk().await;
            let ended = match arrived {
                Ok(Some(bytes)) => {
                    let useful = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    buffer.extend_from_slice(&bytes[..useful]);
                    left -= useful as u64;
                    None
                }
                Ok(None) => Some("the answer ended early".to_string()),
                Err(e) => Some(format!("the answer broke off: {}", e.without_url())),
            };
            if left == 0 || ended.is_some() || buffer.len() >= WRITE_BYTES {
                buffer = self.write(part, piece, buffer).await?;
            }
            if let Some(why) = ended {
                let Facts { repo, path, size, .. } = &order.facts;
                return Err(passing(format!(
                    "{repo}/{path}, {left} bytes before byte {until} of {size}: {why}"
                ))
                .into());
            }
        }
        Ok(())
    }

    /// Adds `bytes` to a piece and gives the empty buffer back.
    async fn write(&self, part: &Arc<Part>, piece: usize, bytes: Vec<u8>) -> Result<Vec<u8>, Stop> {
        if !self.lock.is_held() {
            return Err(Stop::Lost);
        }
        self.counter.fetched(bytes.len() as u64);
        let part = part.clone();
        let written = blocking(move || part.append(piece, &bytes).map(|()| bytes)).await?;
        let mut buffer = written.map_err(|e| volume_error(self.folder, &e))?;
        buffer.clear();
        Ok(buffer)
    }

    /// Gives a file whose hash is right its receipt and its name.
    async fn publish(&self, order: &Order, part: Arc<Part>, digests: Digests) -> Result<(), Stop> {
        if !self.lock.is_held() {
            return Err(Stop::Lost);
        }
        let order = order.clone();
        let target = order.target.clone();
        let published = blocking(move || {
            part.sync()?;
            let Some(found) = survey::Found::at(part.path().to_path_buf()) else {
                return Err(io::ErrorKind::NotFound.into());
            };
            let receipt = Receipt {
                revision: order.facts.commit,
                size: found.size,
                sha256: digests.sha256,
                mtime_ns: found.mtime_ns,
            };
            // First the receipt: a crash in between leaves a complete part, and nothing that looks like another file.
            survey::write_receipt(&order.receipt_path, &receipt)?;
            kill_point("K25");
            part.publish(&order.target)?;
            kill_point("K26");
            Ok(())
        });
        Ok(published.await?.map_err(|e| volume_error(&target, &e))?)
    }
}

/// Hashes the beginning of `part` as it grows, up to its end.
async fn follow(part: &Arc<Part>, mut hasher: Hasher, folder: &Path) -> Result<Digests, Stop> {
    let mut hashed = 0;
    loop {
        let prefix = part.prefix();
        if prefix > hashed {
            let (part, from) = (part.clone(), hashed);
            let read = blocking(move || hash(&part, &mut hasher, from, prefix).map(|()| hasher)).await?;
            hasher = read.map_err(|e| volume_error(folder, &e))?;
            hashed = prefix;
        } else if hashed == part.size() {
            return Ok(hasher.finish());
        } else {
            part.written.notified().await;
        }
    }
}

fn hash(part: &Part, hasher: &mut Hasher, from: u64, until: u64) -> io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = from;
    while at < until {
        let len = usize::try_from(until - at).unwrap_or(usize::MAX).min(BLOCK_BYTES);
        part.read(&mut block[..len], at)?;
        hasher.update(&block[..len]);
        at += len as u64;
    }
    Ok(())
}

/// Why a request brought less than it should have.
enum Trouble {
    Failure(Failure),
    Stop(Stop),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<Stop> for Trouble {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}
