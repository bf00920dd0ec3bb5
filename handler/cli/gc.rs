//! `handler gc`: deletes expired videos, finishes uploads that failed, and gives up what nobody came for.

use std::path::PathBuf;

use reqwest::Url;
use serde_json::{Value, json};

use super::print_json;
use crate::gateway;
use crate::job::{Code, JobError};
use crate::storage::embedded::{BUCKET, Embedded, Rules};
use crate::storage::spool::default_spool;
use crate::storage::{Extent, KeptVideo, Storage, StorageArgs, VideoSpool, prune};

/// How clients reach a gateway that was started without flags.
const DEFAULT_PUBLIC_URL: &str = "http://127.0.0.1:8000";

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// Only say what would be deleted
    #[arg(long, env = "GC_DRY_RUN")]
    dry_run: bool,
    /// Upload the videos that are still in the spool, and print their links
    #[arg(long, env = "GC_RESUME_UPLOADS", conflicts_with = "dry_run")]
    resume_uploads: bool,
    /// Folder of the spool [default: that of the gateway's data folder where no bucket is configured, else
    /// /runpod-volume/spool, else /workspace/spool, else the user's cache folder]
    #[arg(long, env = "SPOOL_PATH", value_name = "DIR")]
    spool_path: Option<PathBuf>,
    /// The gateway's data folder, whose store is meant where no bucket is configured [default: the user's data
    /// folder]
    #[arg(long, env = "DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    storage: StorageArgs,
}

/// Deletes, uploads, and prints what came of it as one JSON object.
pub(super) fn run(args: &Args) -> Result<(), JobError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build();
    let runtime = runtime
        .map_err(|e| JobError::new(Code::Internal, format!("the asynchronous runtime cannot start: {e}")))?;
    runtime.block_on(collect(args))
}

async fn collect(args: &Args) -> Result<(), JobError> {
    let store = Store::open(args).await?;
    let deleted = store.storage.sweep(Extent { dry_run: args.dry_run, ..Extent::FULL }).await?;
    if args.dry_run {
        return print_json(&json!({"expired": deleted}));
    }
    let mut report = json!({"deleted": deleted.len()});
    let spool_retention = args.storage.lifetimes()?.spool;
    let mut first_error = None;
    if args.resume_uploads {
        let spool = VideoSpool::open(&store.spool)?;
        let (mut resumed, mut failed) = (Vec::new(), Vec::new());
        for video in spool.all_kept()? {
            let job_id = video.job_id().to_string();
            match store.resume(video).await {
                Ok(links) => resumed.push(links),
                Err(error) => {
                    failed.push(json!({"job_id": job_id, "error": error}));
                    first_error.get_or_insert(error);
                }
            }
        }
        report["resumed"] = resumed.into();
        report["failed"] = failed.into();
    }
    // What could be uploaded is gone by now.
    report["pruned"] = prune(&store.spool, spool_retention).into();
    print_json(&report)?;
    first_error.map_or(Ok(()), Err)
}

/// The store that is meant, and the spool of its videos.
struct Store {
    storage: Storage,
    spool: PathBuf,
    embedded: bool,
}

impl Store {
    async fn open(args: &Args) -> Result<Self, JobError> {
        let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let set = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let spool = set(&args.spool_path);
        if let Some(settings) = args.storage.settings()? {
            let spool = spool.unwrap_or_else(|| default_spool(env, std::path::Path::new("/")));
            return Ok(Self { storage: Storage::new(settings), spool, embedded: false });
        }
        let home =
            || env("HOME").filter(|home| !home.as_os_str().is_empty()).map(|home| home.join(".local/share"));
        let data = env("XDG_DATA_HOME").filter(|path| !path.as_os_str().is_empty()).or_else(home);
        let data_dir = set(&args.data_dir).or(data.map(|data| data.join("talkie")));
        let Some(data_dir) = data_dir.filter(|dir| dir.join("objects").is_dir()) else {
            let message = "no bucket is configured, and there is no gateway's data folder";
            return Err(JobError::new(Code::InvalidInput, message)
                .with_reason("CONFIG")
                .with_hint("set R2_ACCOUNT_ID and its companions, or give the gateway's --data-dir"));
        };
        let public_url = match args.storage.public_url()? {
            Some(url) => url,
            None => {
                Url::parse(DEFAULT_PUBLIC_URL).map_err(|e| JobError::new(Code::Internal, e.to_string()))?
            }
        };
        let embedded = Embedded::open(&data_dir, Rules::default())?;
        let storage = embedded.serve_here(public_url, args.storage.lifetimes()?).await?;
        Ok(Self {
            storage,
            spool: spool.unwrap_or_else(|| gateway::config::spool(&data_dir)),
            embedded: true,
        })
    }

    /// Finishes the upload of `video`, and forgets it.
    async fn resume(&self, mut video: KeptVideo) -> Result<Value, JobError> {
        let place = video.place();
        // The embedded store has another address each time.
        let is_ours = self.storage.is_for(place) || (self.embedded && place.bucket == BUCKET);
        if !is_ours {
            let message = format!(
                "the video of job {} is meant for bucket `{}` at {}, for which no keys are configured",
                place.job_id, place.bucket, place.endpoint
            );
            return Err(JobError::new(Code::UploadFailed, message)
                .with_retryable(false)
                .with_hint("configure that bucket, and run this again")
                .with_detail("kept", video.dir().display().to_string()));
        }
        let published = self.storage.publish(&mut video).await?;
        let mut links = json!(published);
        links["job_id"] = video.job_id().into();
        video.done();
        Ok(links)
    }
}
