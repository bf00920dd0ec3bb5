//! Deletes what has expired. The keys themselves say when, and a list of one prefix is in the order of expiry,
//! so a sweep ends at the first object that is not due. It may be interrupted anywhere and run at once with
//! others: an object that is already gone is no error.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt};

use super::Storage;
use super::client::{Failure, quietly};
use super::key::{DEFAULT_PREFIX, EXPIRY_MARK, ObjectKey};
use crate::job::{Code, JobError};

const DELETES_AT_ONCE: usize = 8;

/// How much one sweep may do.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Objects that are deleted at most.
    pub deletes: usize,
    /// Pages of a thousand keys in which prefixes are looked for, besides the usual one.
    pub pages: usize,
    /// Only say what would be deleted.
    pub dry_run: bool,
}

impl Extent {
    /// What is done by the way, between jobs.
    pub const SMALL: Self = Self { deletes: 100, pages: 1, dry_run: false };
    /// Everything.
    pub const FULL: Self = Self { deletes: usize::MAX, pages: usize::MAX, dry_run: false };
}

/// One page of keys and of prefixes that lead to expiries.
struct Page {
    keys: Vec<String>,
    prefixes: Vec<String>,
    next: Option<String>,
}

impl Storage {
    /// Deletes what has expired, within `extent`; the keys that were deleted. Objects that we did not name are
    /// never touched.
    ///
    /// # Errors
    /// [`Code::Internal`] when the store cannot be listed or an object cannot be deleted.
    pub async fn sweep(&self, extent: Extent) -> Result<Vec<String>, JobError> {
        self.sweep_within(extent).await.map_err(|failure| self.failed(Code::Internal, failure))
    }

    async fn sweep_within(&self, extent: Extent) -> Result<Vec<String>, Failure> {
        let mut deleted = Vec::new();
        for prefix in self.prefixes(extent.pages).await? {
            self.sweep_prefix(&prefix, extent, &mut deleted).await?;
        }
        Ok(deleted)
    }

    /// The prefixes that have an expiry after them. Requests may name their own.
    async fn prefixes(&self, pages: usize) -> Result<BTreeSet<String>, Failure> {
        let mut prefixes = BTreeSet::from([DEFAULT_PREFIX.to_string()]);
        let mut next = None;
        for _ in 0..pages {
            let page = self.list("", Some(EXPIRY_MARK), next).await?;
            let found = page.prefixes.iter().filter_map(|prefix| prefix.strip_suffix(EXPIRY_MARK));
            prefixes.extend(found.map(str::to_string));
            // A store that knows only one-character delimiters lists the keys themselves.
            let keys = page.keys.iter().filter_map(|key| ObjectKey::parse(key));
            prefixes.extend(keys.map(|(key, _)| key.prefix().to_string()));
            next = page.next;
            if next.is_none() {
                break;
            }
        }
        Ok(prefixes)
    }

    async fn sweep_prefix(
        &self,
        prefix: &str,
        extent: Extent,
        deleted: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let prefix = format!("{prefix}{EXPIRY_MARK}");
        let mut next = None;
        loop {
            let page = self.list(&prefix, None, next).await?;
            // The store's own time, of the answer just received.
            let now = self.clients.clock.now();
            let ours = page.keys.into_iter().filter_map(|text| Some((ObjectKey::parse(&text)?.0, text)));
            let ours: Vec<_> = ours.collect();
            let due = ours.iter().take_while(|(key, _)| key.expiry() <= now);
            let due: Vec<String> =
                due.take(extent.deletes - deleted.len()).map(|(_, text)| text.clone()).collect();
            let all = due.len() == ours.len();
            if !extent.dry_run {
                // Each delete owns its key: of a borrowed one the compiler cannot tell that it may be on any thread.
                let deletes = futures::stream::iter(due.clone());
                let deletes = deletes.map(|key| async move { self.delete(&key).await });
                deletes.buffer_unordered(DELETES_AT_ONCE).try_collect::<()>().await?;
            }
            deleted.extend(due);
            next = page.next;
            if next.is_none() || !all {
                return Ok(());
            }
        }
    }

    async fn list(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        next: Option<String>,
    ) -> Result<Page, Failure> {
        let call = self.clients.calls.list_objects_v2().bucket(&self.settings.bucket).prefix(prefix);
        let call = call.set_delimiter(delimiter.map(str::to_string)).set_continuation_token(next);
        let found =
            quietly(call.send()).await.map_err(|e| Failure::new("the bucket could not be listed", &e))?;
        let truncated = found.is_truncated() == Some(true);
        Ok(Page {
            keys: found.contents().iter().filter_map(|object| object.key().map(str::to_string)).collect(),
            prefixes: found.common_prefixes().iter().filter_map(|p| p.prefix().map(str::to_string)).collect(),
            next: found.next_continuation_token.filter(|_| truncated),
        })
    }

    /// One by one: deleting in bulk needs a checksum that not every store takes.
    async fn delete(&self, key: &str) -> Result<(), Failure> {
        let call = self.clients.calls.delete_object().bucket(&self.settings.bucket).key(key);
        match quietly(call.send()).await {
            Ok(_) => Ok(()),
            Err(e) => {
                let failure = Failure::new("an expired object could not be deleted", &e);
                if failure.status == Some(404) { Ok(()) } else { Err(failure) }
            }
        }
    }
}
