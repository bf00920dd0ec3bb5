//! Where a job's video goes: into the output itself, to the sender's own URL, into a bucket or a folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::Url;
use serde_json::Value;
use sha2::{Digest, Sha256};
use talkie::request::OutputOptions;

use super::RunnerSettings;
use super::put::{self, Put};
use crate::generate::{file_url, unwritable};
use crate::job::{Code, JobError, JobOutput};
use crate::part_file::PartFile;
use crate::storage::spool::UNDELIVERED;
use crate::storage::{KeptVideo, Publication, SpooledVideo, Storage};

const HINT_NO_STORE: &str = "configure a bucket (R2_… or BUCKET_…), or send `s3Config` with the job, or ask for \
    `output.put_url` or `output.inline`";

/// Where a job's video goes.
pub(super) struct Delivery {
    /// The way by link; there need not be one for a video that goes into the output.
    link: Option<Link>,
    inline: Option<u64>,
    key_prefix: Option<String>,
    expires: Option<Duration>,
}

enum Link {
    PutUrl(Url),
    Bucket(Storage),
    Folder(PathBuf),
}

/// What is delivered.
pub(super) struct Parcel {
    pub(super) video: SpooledVideo,
    pub(super) thumbnail: Option<Vec<u8>>,
    pub(super) manifest: Value,
}

impl Delivery {
    /// The job's own wishes come before the settings.
    pub(super) fn choose(
        options: &OutputOptions,
        s3_config: Option<&Value>,
        settings: &RunnerSettings,
    ) -> Result<Self, JobError> {
        let private = settings.config.allow_private_urls;
        let link = if let Some(url) = &options.put_url {
            Some(Link::PutUrl(put::parse_url(url, private)?))
        } else if let Some(config) = s3_config.filter(|config| !config.is_null()) {
            Some(Link::Bucket(Storage::from_s3_config(config, settings.lifetimes, private)?))
        } else {
            let bucket = settings.storage.clone().map(Link::Bucket);
            bucket.or_else(|| settings.folder.clone().map(Link::Folder))
        };
        if link.is_none() && !options.inline {
            let message =
                "there is no place for the video: this worker has no bucket, and the job brings none";
            return Err(JobError::new(Code::UploadFailed, message)
                .with_reason("NO_STORE")
                .with_hint(HINT_NO_STORE)
                .with_retryable(false));
        }
        Ok(Self {
            link,
            inline: options.inline.then_some(settings.max_inline_bytes),
            key_prefix: options.key_prefix.clone(),
            expires: options.expires_seconds.map(|seconds| Duration::from_secs(seconds.into())),
        })
    }

    /// Delivers, and writes into `output` where to.
    ///
    /// # Errors
    /// [`Code::UploadFailed`], whose details say where the video is kept; [`Code::PresignFailed`];
    /// [`Code::InsufficientDisk`].
    pub(super) async fn deliver(
        &self,
        parcel: Parcel,
        spool: &Path,
        put: &Put,
        output: &mut JobOutput,
    ) -> Result<(), JobError> {
        if let Some(most) = self.inline {
            if output.size_bytes <= most {
                output.video_url = data_uri("video/mp4", &read(&parcel.video.path()).await?);
                output.thumbnail_url = parcel.thumbnail.as_deref().map(|jpeg| data_uri("image/jpeg", jpeg));
                return Ok(());
            }
            let said = format!(
                "the video has {} bytes, at most {most} are handed out as base64: `video_url` is a link",
                output.size_bytes
            );
            output.warnings.push(said);
        }
        match &self.link {
            Some(Link::Bucket(storage)) => self.upload(storage, parcel, output).await,
            Some(Link::Folder(folder)) => into_folder(folder, &parcel, output),
            Some(Link::PutUrl(url)) => match put.send(url, &parcel.video.path()).await {
                Ok(()) => {
                    // The signature lets everybody write there, and the sender knows it.
                    let mut place = url.clone();
                    place.set_query(None);
                    output.video_url = place.to_string();
                    let unplaced = "with `output.put_url` there is no place for the thumbnail";
                    output.warnings.extend(parcel.thumbnail.map(|_| unplaced.to_string()));
                    Ok(())
                }
                Err(e) => Err(undelivered(spool, &parcel.video, e)),
            },
            None => {
                let message = format!("the video has {} bytes, too many for base64", output.size_bytes);
                let error = JobError::new(Code::UploadFailed, message).with_reason("NO_STORE");
                let error = error.with_hint(HINT_NO_STORE).with_retryable(false);
                Err(undelivered(spool, &parcel.video, error))
            }
        }
    }

    async fn upload(
        &self,
        storage: &Storage,
        parcel: Parcel,
        output: &mut JobOutput,
    ) -> Result<(), JobError> {
        let publication = Publication {
            thumbnail: parcel.thumbnail.as_deref(),
            manifest: parcel.manifest,
            key_prefix: self.key_prefix.as_deref(),
            expires: self.expires,
        };
        publish(storage, storage.keep(parcel.video, &publication).await?, output).await
    }

    /// Delivers a video that was kept for the same bucket.
    ///
    /// # Errors
    /// [`Code::UploadFailed`], [`Code::PresignFailed`].
    pub(super) async fn resume(&self, video: KeptVideo, output: &mut JobOutput) -> Result<(), JobError> {
        match &self.link {
            Some(Link::Bucket(storage)) => publish(storage, video, output).await,
            _ => Err(JobError::new(Code::Internal, "a kept video has no bucket to go to")),
        }
    }

    /// Whether `video` was kept on its way to where this leads.
    pub(super) fn is_for(&self, video: &KeptVideo) -> bool {
        self.inline.is_none()
            && matches!(&self.link, Some(Link::Bucket(storage)) if storage.is_for(video.place()))
    }
}

async fn publish(storage: &Storage, mut video: KeptVideo, output: &mut JobOutput) -> Result<(), JobError> {
    let published = storage.publish(&mut video).await;
    let published =
        published.map_err(|e| e.with_detail("spooled_path", video.video().display().to_string()))?;
    video.done();
    output.video_url = published.video_url;
    output.expires_at = Some(published.expires_at);
    output.bucket = Some(published.bucket);
    output.key = Some(published.key);
    output.thumbnail_url = published.thumbnail_url;
    output.manifest_url = Some(published.manifest_url);
    Ok(())
}

fn into_folder(folder: &Path, parcel: &Parcel, output: &mut JobOutput) -> Result<(), JobError> {
    let name = file_name(parcel.video.id());
    let target = folder.join(format!("{name}.mp4"));
    let place = |target: &Path, fill: &dyn Fn(&Path) -> io::Result<()>| {
        let part = PartFile::create(target)?;
        fill(part.path())?;
        part.publish()
    };
    // The spool may be on another disk.
    place(&target, &|part| fs::copy(parcel.video.path(), part).map(drop))
        .map_err(|e| unwritable(&target, &e))?;
    let (url, path) = file_url(&target)?;
    (output.video_url, output.video_path) = (url, Some(path));
    if let Some(jpeg) = &parcel.thumbnail {
        let target = target.with_extension("jpg");
        place(&target, &|part| fs::write(part, jpeg)).map_err(|e| unwritable(&target, &e))?;
        output.thumbnail_url = Some(file_url(&target)?.0);
    }
    Ok(())
}

/// Puts a video aside that could not be delivered, and adds to `error` where it is.
fn undelivered(spool: &Path, video: &SpooledVideo, error: JobError) -> JobError {
    let folder = spool.join(UNDELIVERED);
    let target = folder.join(format!("{}.mp4", file_name(video.id())));
    let moved = fs::create_dir_all(&folder).and_then(|()| fs::rename(video.path(), &target));
    match moved {
        Ok(()) => error.with_detail("spooled_path", target.display().to_string()),
        Err(e) => {
            tracing::error!("{} cannot be put aside: {e}", video.path().display());
            error
        }
    }
}

/// A job's id as the name of a file. Ids are the platform's, so what is not plain is hashed.
fn file_name(id: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    match (1..=128).contains(&id.len()) && id.bytes().all(plain) {
        true => id.to_string(),
        false => hex::encode(Sha256::digest(id)),
    }
}

fn data_uri(media_type: &str, bytes: &[u8]) -> String {
    format!("data:{media_type};base64,{}", BASE64_STANDARD.encode(bytes))
}

async fn read(path: &Path) -> Result<Vec<u8>, JobError> {
    let bytes = tokio::fs::read(path).await;
    bytes.map_err(|e| JobError::new(Code::EncodeFailed, format!("the video cannot be read back: {e}")))
}
