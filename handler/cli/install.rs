//! Fetching a model from the command line: progress on standard error, Ctrl-C at any time.

use std::time::Instant;

use talkie::pipeline::Cancel;
use talkie::registry::RepoFiles;

use crate::generate::cancelled;
use crate::hub::{Control, Hub, Installed, Meter, Progress};
use crate::job::{Code, JobError};
use crate::progress::Update;

/// Makes sure that the files of `repos` are there; with `deep`, reads again what was verified before. `show` is told
/// how far it is.
///
/// # Errors
/// Those of [`Hub::ensure`]; [`Code::Cancelled`] soon after `cancel` was called.
pub(super) fn install(
    hub: &Hub,
    repos: &[RepoFiles],
    deep: bool,
    cancel: &Cancel,
    show: &mut (dyn FnMut(Update) + Send),
) -> Result<Installed, JobError> {
    let mut meter = Meter::default();
    let mut report = |progress: Progress| show(meter.update(progress, Instant::now()));
    runtime()?.block_on(async {
        tokio::select! {
            biased;
            error = cancelled(cancel) => Err(error),
            done = hub.ensure(repos, Control { deep, deadline: None, report: &mut report }) => done,
        }
    })
}

/// Several threads: decrypting is most of the work of a download.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, JobError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| JobError::new(Code::Internal, format!("no download can be started: {e}")))
}
