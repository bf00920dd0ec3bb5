//! Where videos go: any store that speaks S3, Cloudflare R2 first of all, and the embedded one where nothing
//! else is configured.
//!
//! | module | holds |
//! |---|---|
//! | [`settings`] | which bucket, with which keys, and for how long |
//! | [`key`] | object keys, which carry their expiry |
//! | `client` | timeouts, retries, the time at the store |
//! | `upload` | one request or equal parts |
//! | [`sweep`] | deletes what has expired |
//! | [`spool`] | videos on disk until their upload is confirmed |
//! | [`prune`] | an end for those whose upload never is |
//! | [`embedded`] | an S3 store over a folder |
//!
//! A job's video is written into the [`VideoSpool`], kept there by [`Storage::keep`], uploaded by
//! [`Storage::publish`], and forgotten by [`KeptVideo::done`] once its links are safe.

mod client;
pub mod embedded;
pub mod key;
mod prune;
pub mod settings;
pub mod spool;
pub mod sweep;
mod upload;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use aws_sdk_s3::presigning::PresigningConfig;
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use self::client::{Clients, Failure, quietly};
use self::key::{ObjectKey, Part};
use self::upload::{Content, Object, Uploader};
use crate::faults::kill_point;
use crate::job::{Code, JobError};

pub use self::client::Tuning;
pub use self::prune::prune;
pub use self::settings::{Lifetimes, StorageArgs, StorageSettings};
pub use self::spool::{KeptVideo, Place, Publication, SpooledVideo, VideoSpool};
pub use self::sweep::Extent;

/// An object lives this much longer than links that were signed when it was named, so that no download is cut
/// off.
const GRACE: Duration = Duration::from_secs(15 * 60);
/// What is left of it where the upload took its time. A link is shortened only where less would be.
const LEAST_GRACE: Duration = Duration::from_secs(5 * 60);

/// A connection to a bucket; clones share it.
#[derive(Clone, Debug)]
pub struct Storage {
    settings: Arc<StorageSettings>,
    tuning: Arc<Tuning>,
    clients: Clients,
}

/// Where a video is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Published {
    /// A link that ends at `expires_at`.
    pub video_url: String,
    /// RFC 3339.
    pub expires_at: String,
    /// The bucket.
    pub bucket: String,
    /// The video's key.
    pub key: String,
    /// A link to the thumbnail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thumbnail_url: Option<String>,
    /// A link to the manifest.
    pub manifest_url: String,
}

impl Storage {
    /// A connection to the configured bucket. Nothing is sent yet.
    pub fn new(settings: StorageSettings) -> Self {
        Self::with_tuning(settings, Tuning::default())
    }

    /// With other patience than real stores need.
    pub fn with_tuning(settings: StorageSettings, tuning: Tuning) -> Self {
        let clients = Clients::new(&settings, &tuning, false);
        Self { settings: Arc::new(settings), tuning: Arc::new(tuning), clients }
    }

    /// A connection to the bucket of a job's `s3Config`. Without `allow_private` it leads to public addresses
    /// only, whatever the name of the store resolves to.
    ///
    /// # Errors
    /// [`Code::InvalidInput`], [`Code::MissingField`], [`Code::UrlNotAllowed`].
    pub fn from_s3_config(
        s3_config: &Value,
        lifetimes: Lifetimes,
        allow_private: bool,
    ) -> Result<Self, JobError> {
        let settings = StorageSettings::from_s3_config(s3_config, lifetimes, allow_private)?;
        let tuning = Tuning::default();
        let clients = Clients::new(&settings, &tuning, !allow_private);
        Ok(Self { settings: Arc::new(settings), tuning: Arc::new(tuning), clients })
    }

    /// How long things last.
    pub fn lifetimes(&self) -> Lifetimes {
        self.settings.lifetimes
    }

    /// Whether the bucket answers to our keys.
    ///
    /// # Errors
    /// [`Code::UploadFailed`] with what the store says.
    pub async fn check(&self) -> Result<(), JobError> {
        let call = self.clients.calls.head_bucket().bucket(&self.settings.bucket);
        match quietly(call.send()).await {
            Ok(_) => Ok(()),
            Err(e) => Err(self.failed(Code::UploadFailed, Failure::new("the bucket cannot be used", &e))),
        }
    }

    /// Names the objects of a finished video, and keeps it on disk with all that its upload needs.
    ///
    /// # Errors
    /// [`Code::InsufficientDisk`] when the disk is full, [`Code::InvalidInput`] for a wrong `key_prefix`.
    pub async fn keep(
        &self,
        video: SpooledVideo,
        publication: &Publication<'_>,
    ) -> Result<KeptVideo, JobError> {
        let place = self.place(video.id(), publication.key_prefix, publication.expires).await?;
        let kept = video.keep(place, publication)?;
        kill_point("K19");
        Ok(kept)
    }

    /// Uploads a kept video with all that belongs to it, and signs links. Only [`KeptVideo::done`] removes it
    /// from the disk.
    ///
    /// # Errors
    /// [`Code::UploadFailed`], whose details say where the video is kept, and [`Code::PresignFailed`].
    pub async fn publish(&self, video: &mut KeptVideo) -> Result<Published, JobError> {
        let key = self.renew(video).await?;
        let uploader =
            Uploader { clients: &self.clients, bucket: &self.settings.bucket, tuning: &self.tuning };
        let objects = self.objects(video, &key)?;
        for object in &objects {
            uploader.upload(object, !video.fresh).await.map_err(|failure| {
                self.failed(Code::UploadFailed, failure)
                    .with_hint("the video is kept; `handler gc --resume-uploads` finishes its upload")
                    .with_detail("kept", video.dir().display().to_string())
                    .with_detail("key", video.place.key.clone())
            })?;
        }
        kill_point("K21");
        self.links(video, &key).await
    }

    /// Whether a video was kept for this bucket.
    pub fn is_for(&self, place: &Place) -> bool {
        place.bucket == self.settings.bucket && place.endpoint == self.settings.endpoint.as_str()
    }

    async fn place(
        &self,
        job_id: &str,
        key_prefix: Option<&str>,
        expires: Option<Duration>,
    ) -> Result<Place, JobError> {
        // A key that is named by a wrong clock may be due at once, so the store is asked for the time first.
        if !self.clients.clock.is_known()
            && let Err(error) = self.check().await
        {
            tracing::debug!("{error}; the upload will say more");
        }
        let lives = self.settings.lifetimes.retention + GRACE;
        let key = ObjectKey::new(key_prefix, self.clients.clock.now() + lives.as_secs(), job_id)?;
        Ok(Place {
            job_id: job_id.to_string(),
            endpoint: self.settings.endpoint.to_string(),
            bucket: self.settings.bucket.clone(),
            key: key.of(Part::Video),
            key_prefix: key_prefix.map(str::to_string),
            expires_seconds: expires.map(|expires| expires.as_secs()),
        })
    }

    /// The key that the video was kept under. If little is left of its time, the video gets a new one.
    async fn renew(&self, video: &mut KeptVideo) -> Result<ObjectKey, JobError> {
        let wanted = self.link_life(&video.place);
        let recorded = ObjectKey::parse(&video.place.key).map(|(key, _)| key);
        if let Some(key) = recorded.filter(|key| self.left(key) * 2 >= wanted) {
            return Ok(key);
        }
        let Place { job_id, key_prefix, expires_seconds, .. } = video.place.clone();
        let expires = expires_seconds.map(Duration::from_secs);
        let place = self.place(&job_id, key_prefix.as_deref(), expires).await?;
        video.set_place(place)?;
        let key = ObjectKey::parse(&video.place.key).map(|(key, _)| key);
        key.ok_or_else(|| JobError::new(Code::Internal, format!("{} is no key", video.place.key)))
    }

    /// How long links are meant to last: as the request says, and no longer than the settings say.
    fn link_life(&self, place: &Place) -> u64 {
        let Lifetimes { retention, presign, .. } = self.settings.lifetimes;
        let most = retention.min(presign).as_secs();
        place.expires_seconds.map_or(most, |wanted| wanted.min(most))
    }

    /// How many seconds links to `key` may last from now.
    fn left(&self, key: &ObjectKey) -> u64 {
        key.expiry().saturating_sub(LEAST_GRACE.as_secs()).saturating_sub(self.clients.clock.now())
    }

    fn objects(&self, video: &KeptVideo, key: &ObjectKey) -> Result<Vec<Object>, JobError> {
        let thumbnail = has_thumbnail(video);
        let mut manifest = video.manifest()?;
        if let Value::Object(fields) = &mut manifest {
            let mut keys = json!({"video": key.of(Part::Video), "manifest": key.of(Part::Manifest)});
            if thumbnail {
                keys["thumbnail"] = key.of(Part::Thumbnail).into();
            }
            fields.insert("bucket".to_string(), self.settings.bucket.clone().into());
            fields.insert("objects".to_string(), keys);
        }
        let object =
            |part: Part, content| Object { key: key.of(part), content_type: part.content_type(), content };
        let mut objects = vec![object(Part::Video, Content::File(video.video()))];
        if thumbnail {
            objects.push(object(Part::Thumbnail, Content::File(video.thumbnail())));
        }
        objects.push(object(Part::Manifest, Content::Bytes(Bytes::from(manifest.to_string()))));
        Ok(objects)
    }

    async fn links(&self, video: &KeptVideo, key: &ObjectKey) -> Result<Published, JobError> {
        let now = self.clients.clock.now();
        let life = self.link_life(&video.place).min(self.left(key));
        let thumbnail_url = match has_thumbnail(video) {
            true => Some(self.link(key, Part::Thumbnail, (now, life)).await?),
            false => None,
        };
        let expires_at =
            OffsetDateTime::from_unix_timestamp((now + life) as i64).map(|at| at.format(&Rfc3339));
        Ok(Published {
            video_url: self.link(key, Part::Video, (now, life)).await?,
            expires_at: match expires_at {
                Ok(Ok(text)) => text,
                _ => return Err(presign_failed(format!("a link would end at {now} + {life} s"))),
            },
            bucket: self.settings.bucket.clone(),
            key: key.of(Part::Video),
            thumbnail_url,
            manifest_url: self.link(key, Part::Manifest, (now, life)).await?,
        })
    }

    /// A link that is signed at the first second and lasts as many as the second says.
    async fn link(&self, key: &ObjectKey, part: Part, (now, life): (u64, u64)) -> Result<String, JobError> {
        let config = PresigningConfig::builder()
            .start_time(UNIX_EPOCH + Duration::from_secs(now))
            .expires_in(Duration::from_secs(life))
            .build()
            .map_err(|e| presign_failed(e.to_string()))?;
        let key = key.of(part);
        let name = Path::new(&key).file_name().unwrap_or_default().to_string_lossy();
        let call = self.clients.links.get_object().bucket(&self.settings.bucket).key(&key);
        // Shown by a browser, and saved under a name that tells the job.
        let call = call.response_content_disposition(format!("inline; filename=\"{name}\""));
        let signed = quietly(call.presigned(config)).await;
        signed.map(|link| link.uri().to_string()).map_err(|e| presign_failed(crate::inputs::chain(&e)))
    }

    fn failed(&self, code: Code, failure: Failure) -> JobError {
        let host = self.settings.endpoint.host_str().unwrap_or_default();
        let bucket = &self.settings.bucket;
        let error = match failure.refused {
            true => {
                JobError::new(Code::UrlNotAllowed, format!("`s3Config.endpointUrl` at {host} leads inside"))
            }
            false => JobError::new(code, format!("bucket `{bucket}` at {host}: {}", failure.message)),
        };
        let error = error.with_retryable(failure.passing);
        match (failure.status, failure.code) {
            (Some(status), Some(code)) => error.with_detail("status", status).with_detail("store_code", code),
            (Some(status), None) => error.with_detail("status", status),
            (None, _) => error,
        }
    }
}

fn has_thumbnail(video: &KeptVideo) -> bool {
    video.thumbnail().is_file()
}

fn presign_failed(why: String) -> JobError {
    JobError::new(Code::PresignFailed, format!("a link could not be signed: {why}"))
}
