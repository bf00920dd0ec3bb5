//! Videos on their way to a bucket. A finished video stays on disk, with all that its upload needs, until the
//! upload is confirmed: computing it again would cost minutes of a GPU.
//!
//! One folder per job below `<spool>/videos`: `video.mp4`, `thumbnail.jpg`, `manifest.json` and, written last,
//! `publication.json`. A folder without the last belongs to a job that is running or was cut off.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::faults::kill_point;
use crate::job::{Code, JobError};
use crate::part_file::PartFile;

/// Below a spool: finished videos whose upload is not confirmed, and those that are being made.
pub const VIDEOS: &str = "videos";
/// Below a spool: videos whose delivery nobody can resume but the one who asked for it.
pub const UNDELIVERED: &str = "undelivered";
/// Below a spool: results that the platform does not want.
pub const REJECTED: &str = "rejected";

const VIDEO: &str = "video.mp4";
const THUMBNAIL: &str = "thumbnail.jpg";
const MANIFEST: &str = "manifest.json";
const PUBLICATION: &str = "publication.json";
/// Most file systems take names of 255 bytes.
const MAX_NAME_LEN: usize = 200;

/// The folder of videos that are not safe in a bucket yet.
#[derive(Clone, Debug)]
pub struct VideoSpool {
    dir: PathBuf,
}

/// What is to be published with a video.
#[derive(Clone, Debug, Default)]
pub struct Publication<'a> {
    /// A JPEG of the first frame.
    pub thumbnail: Option<&'a [u8]>,
    /// What the video was made of; the object keys are added to it.
    pub manifest: Value,
    /// Of the request: the keys' first part in place of `videos`.
    pub key_prefix: Option<&'a str>,
    /// Of the request: how long links last, where not as the settings say.
    pub expires: Option<Duration>,
}

/// Where a video goes; everything that a later upload has to know, and nothing secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The job's own id.
    pub job_id: String,
    /// Scheme, host and port of the store.
    pub endpoint: String,
    /// The bucket.
    pub bucket: String,
    /// The video's key; those of thumbnail and manifest follow from it.
    pub key: String,
    /// Of the request: the keys' first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_prefix: Option<String>,
    /// Of the request: how long links last, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_seconds: Option<u64>,
}

impl VideoSpool {
    /// The folder `videos` below `spool`, which is made where it is missing.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] when it cannot be made or written to, naming the path.
    pub fn open(spool: &Path) -> Result<Self, JobError> {
        let dir = spool.join(VIDEOS);
        let writable = || {
            fs::create_dir_all(&dir)?;
            tempfile::tempfile_in(&dir).map(drop)
        };
        writable().map_err(|e| {
            let message = format!("the spool {} cannot be written to: {e}", dir.display());
            JobError::new(Code::InvalidInput, message)
                .with_reason("CONFIG")
                .with_hint("set SPOOL_PATH to a folder on a disk that lasts")
        })?;
        Ok(Self { dir })
    }

    /// An empty folder for the video of the job `id`. What an attempt that was cut off has left there goes.
    ///
    /// # Errors
    /// [`Code::InsufficientDisk`] when it cannot be made.
    pub fn job(&self, id: &str) -> Result<SpooledVideo, JobError> {
        let dir = self.dir.join(folder_name(id));
        let emptied = match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => fs::create_dir(&dir).and_then(|()| sync(&self.dir)),
        };
        emptied.map_err(|e| unwritable(&dir, &e))?;
        Ok(SpooledVideo { dir, id: id.to_string(), kept: false })
    }

    /// The finished video of the job `id`, if an earlier attempt has made it.
    pub fn kept(&self, id: &str) -> Option<KeptVideo> {
        KeptVideo::read(&self.dir.join(folder_name(id))).filter(|kept| kept.place.job_id == id)
    }

    /// All finished videos, in the order of their jobs' ids.
    ///
    /// # Errors
    /// [`Code::Internal`] when the folder cannot be read.
    pub fn all_kept(&self) -> Result<Vec<KeptVideo>, JobError> {
        Ok(self.folders()?.iter().filter_map(|dir| KeptVideo::read(dir)).collect())
    }

    fn folders(&self) -> Result<Vec<PathBuf>, JobError> {
        let read = || -> io::Result<Vec<PathBuf>> {
            let entries = fs::read_dir(&self.dir)?.collect::<io::Result<Vec<_>>>()?;
            let mut folders: Vec<_> = entries.iter().map(fs::DirEntry::path).filter(|p| p.is_dir()).collect();
            folders.sort();
            Ok(folders)
        };
        read().map_err(|e| {
            JobError::new(Code::Internal, format!("the spool {} cannot be read: {e}", self.dir.display()))
        })
    }
}

/// The folder of a job that makes its video; removed when dropped, unless the video was kept.
#[derive(Debug)]
pub struct SpooledVideo {
    dir: PathBuf,
    id: String,
    kept: bool,
}

impl SpooledVideo {
    /// Where the MP4 is to be written.
    pub fn path(&self) -> PathBuf {
        self.dir.join(VIDEO)
    }

    /// The job's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Keeps the finished video: when this returns, all of it is on disk.
    pub(super) fn keep(mut self, place: Place, publication: &Publication<'_>) -> Result<KeptVideo, JobError> {
        let kept = KeptVideo { dir: self.dir.clone(), place, fresh: true };
        let write = || -> io::Result<()> {
            File::open(self.path())?.sync_all()?;
            if let Some(jpeg) = publication.thumbnail {
                write_whole(&kept.thumbnail(), jpeg)?;
            }
            write_whole(&self.dir.join(MANIFEST), publication.manifest.to_string().as_bytes())?;
            kept.write_place()
        };
        write().map_err(|e| unwritable(&self.dir, &e))?;
        self.kept = true;
        Ok(kept)
    }
}

impl Drop for SpooledVideo {
    fn drop(&mut self) {
        if !self.kept
            && let Err(e) = fs::remove_dir_all(&self.dir)
        {
            tracing::warn!("{} cannot be removed: {e}", self.dir.display());
        }
    }
}

/// A finished video on disk, with all that its upload needs.
#[derive(Debug)]
pub struct KeptVideo {
    dir: PathBuf,
    pub(super) place: Place,
    /// Kept by this process: no other can have uploaded it.
    pub(super) fresh: bool,
}

impl KeptVideo {
    /// None where there is no finished video. A record that cannot be read is one of a later version, or of a
    /// disk that is broken; it is left alone.
    fn read(dir: &Path) -> Option<Self> {
        let text = fs::read(dir.join(PUBLICATION)).ok()?;
        match serde_json::from_slice(&text) {
            Ok(place) => Some(Self { dir: dir.to_path_buf(), place, fresh: false }),
            Err(e) => {
                tracing::error!("{} cannot be read: {e}", dir.join(PUBLICATION).display());
                None
            }
        }
    }

    /// The job's id.
    pub fn job_id(&self) -> &str {
        &self.place.job_id
    }

    /// Where it goes.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The MP4.
    pub fn video(&self) -> PathBuf {
        self.dir.join(VIDEO)
    }

    pub(super) fn thumbnail(&self) -> PathBuf {
        self.dir.join(THUMBNAIL)
    }

    /// What the video was made of.
    ///
    /// # Errors
    /// [`Code::Internal`] when the file cannot be read.
    pub fn manifest(&self) -> Result<Value, JobError> {
        let path = self.dir.join(MANIFEST);
        let read = || serde_json::from_slice(&fs::read(&path)?).map_err(io::Error::from);
        read().map_err(|e| JobError::new(Code::Internal, format!("{} cannot be read: {e}", path.display())))
    }

    /// Sends it elsewhere than it was meant for.
    pub(super) fn set_place(&mut self, place: Place) -> Result<(), JobError> {
        self.place = place;
        self.write_place().map_err(|e| unwritable(&self.dir, &e))
    }

    fn write_place(&self) -> io::Result<()> {
        write_whole(&self.dir.join(PUBLICATION), &serde_json::to_vec(&self.place)?)
    }

    /// Forgets the video, which is safe elsewhere. To be called once its links are.
    pub fn done(self) {
        // First what makes it a finished video: a folder that is half removed must not look like one.
        let removed = fs::remove_file(self.dir.join(PUBLICATION)).and_then(|()| {
            kill_point("K24");
            fs::remove_dir_all(&self.dir)
        });
        if let Err(e) = removed
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{} cannot be removed: {e}", self.dir.display());
        }
    }
}

/// Where the spool is, but for `SPOOL_PATH`: on a RunPod volume, else in the user's cache folder. What `env`
/// and the file system below `root` say decides.
pub fn default_spool(env: impl Fn(&str) -> Option<PathBuf>, root: &Path) -> PathBuf {
    let volumes = ["runpod-volume", "workspace"].map(|volume| root.join(volume));
    if let Some(volume) = volumes.iter().find(|volume| volume.is_dir()) {
        return volume.join("spool");
    }
    let set = |path: &PathBuf| !path.as_os_str().is_empty();
    let cache = env("XDG_CACHE_HOME").filter(set);
    let cache = cache.or_else(|| env("HOME").filter(set).map(|home| home.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("talkie/spool")
}

/// A job's id as the name of a folder. Ids are the platform's, so what is not plain is hashed.
fn folder_name(id: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    match !id.is_empty() && id.len() <= MAX_NAME_LEN && id.bytes().all(plain) {
        true => id.to_string(),
        false => {
            use sha2::{Digest, Sha256};
            format!("x.{}", hex::encode(Sha256::digest(id)))
        }
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = PartFile::create(path)?;
    File::options().write(true).open(part.path())?.write_all(bytes)?;
    part.publish()
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn unwritable(dir: &Path, e: &io::Error) -> JobError {
    JobError::new(Code::InsufficientDisk, format!("the spool {} cannot be written to: {e}", dir.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn place(id: &str) -> Place {
        Place {
            job_id: id.to_string(),
            endpoint: "https://s3.example.com/".to_string(),
            bucket: "talk".to_string(),
            key: "videos/e=1800000000/job-0123456789012345678901.mp4".to_string(),
            key_prefix: None,
            expires_seconds: Some(60),
        }
    }

    fn keep(spool: &VideoSpool, id: &str) -> KeptVideo {
        let video = spool.job(id).unwrap();
        std::fs::write(video.path(), "mp4").unwrap();
        let publication =
            Publication { manifest: json!({"seed": 1}), thumbnail: Some(b"jpeg"), ..Default::default() };
        video.keep(place(id), &publication).unwrap()
    }

    #[test]
    fn a_finished_video_outlives_the_process_and_an_unfinished_one_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let spool = VideoSpool::open(dir.path()).unwrap();
        let kept = keep(&spool, "job-1");
        let making = spool.job("job-2").unwrap();
        std::fs::write(making.path(), "half").unwrap();

        let later = VideoSpool::open(dir.path()).unwrap();
        assert!(later.kept("job-2").is_none() && later.kept("job-3").is_none());
        let found = later.kept("job-1").unwrap();
        assert_eq!((found.place(), found.dir()), (kept.place(), kept.dir()));
        assert_eq!(found.manifest().unwrap(), json!({"seed": 1}));
        assert_eq!(std::fs::read(found.thumbnail()).unwrap(), b"jpeg");
        assert_eq!(later.all_kept().unwrap().len(), 1);
        found.done();
        assert!(later.all_kept().unwrap().is_empty() && !kept.dir().exists());
        kept.done();
    }

    #[test]
    fn a_video_that_is_not_kept_goes() {
        let dir = tempfile::tempdir().unwrap();
        let spool = VideoSpool::open(dir.path()).unwrap();
        let video = spool.job("job").unwrap();
        std::fs::write(video.path(), "half").unwrap();
        drop(video);
        assert_eq!(std::fs::read_dir(dir.path().join("videos")).unwrap().count(), 0);
    }

    #[test]
    fn another_attempt_starts_with_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        let spool = VideoSpool::open(dir.path()).unwrap();
        let killed = spool.job("job").unwrap();
        std::fs::write(killed.path(), "half").unwrap();
        std::mem::forget(killed);
        let again = spool.job("job").unwrap();
        assert!(!again.path().exists() && again.path().parent().unwrap().is_dir());
    }

    /// Ids are the platform's, and two of them never share a folder.
    #[test]
    fn ids_are_names_of_folders_whatever_they_hold() {
        let dir = tempfile::tempdir().unwrap();
        let spool = VideoSpool::open(dir.path()).unwrap();
        let long = "x".repeat(300);
        let ids = ["a", "../a", "a/b", "..", "", "ä", "a b", "a\0b", &long];
        let folders: std::collections::HashSet<PathBuf> =
            ids.iter().map(|id| keep(&spool, id).dir().to_path_buf()).collect();
        assert_eq!(folders.len(), ids.len());
        assert!(
            folders.iter().all(|folder| folder.parent() == Some(&dir.path().join("videos"))),
            "{folders:?}"
        );
        for id in ids {
            assert_eq!(spool.kept(id).unwrap().job_id(), id);
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let spool = VideoSpool::open(dir.path()).unwrap();
        let kept = keep(&spool, "job");
        std::fs::write(kept.dir().join(PUBLICATION), "{").unwrap();
        assert!(spool.kept("job").is_none() && spool.all_kept().unwrap().is_empty());
        assert!(kept.video().is_file());
    }

    #[test]
    fn a_spool_that_cannot_be_written_to_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let e = VideoSpool::open(&file).unwrap_err();
        assert!(e.code == Code::InvalidInput && e.message.contains("file/videos"), "{e}");
    }

    #[test]
    fn the_spool_lies_on_the_volume_or_in_the_cache() {
        let root = tempfile::tempdir().unwrap();
        let spool = |env: &[(&str, &str)]| {
            default_spool(
                |name| env.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)),
                root.path(),
            )
        };
        let home = [("HOME", "/home/me"), ("XDG_CACHE_HOME", "")];
        assert_eq!(spool(&home), Path::new("/home/me/.cache/talkie/spool"));
        assert_eq!(spool(&[("XDG_CACHE_HOME", "/cache")]), Path::new("/cache/talkie/spool"));
        std::fs::create_dir(root.path().join("workspace")).unwrap();
        assert_eq!(spool(&home), root.path().join("workspace/spool"));
        std::fs::create_dir(root.path().join("runpod-volume")).unwrap();
        assert_eq!(spool(&home), root.path().join("runpod-volume/spool"));
    }
}
