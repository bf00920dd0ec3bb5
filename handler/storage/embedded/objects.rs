//! Objects as files. A file holds a head of fixed length (a line of JSON: ETag and content type) and then the
//! object's bytes, so that one rename makes the whole object appear. Folders are named `d-…` and files `f-…`,
//! so that the keys `a` and `a/b` do not get in each other's way.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use md5::{Digest, Md5};
use s3s::{S3Error, S3ErrorCode, S3Result, StdError, s3_error};
use serde::{Deserialize, Serialize};
use tempfile::TempPath;
use tokio::io::AsyncWriteExt;

use crate::job::{Code, JobError};

/// Bytes before an object's own.
pub(super) const HEAD_LEN: u64 = 512;
const MAX_KEY_LEN: usize = 1024;
/// Most file systems take names of 255 bytes; two are ours.
const MAX_SEGMENT_LEN: usize = 253;
const MAX_CONTENT_TYPE_LEN: usize = 200;
/// Uploads that nobody has completed for so long are aborted, as a lifecycle rule does on R2.
const STALE_AFTER: Duration = Duration::from_secs(86_400);

/// What is known of an object without reading it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) etag: String,
    pub(super) content_type: Option<String>,
}

/// An object that is open for reading.
#[derive(Debug)]
pub(super) struct OpenObject {
    pub(super) file: File,
    pub(super) head: Head,
    pub(super) len: u64,
    pub(super) modified: SystemTime,
}

/// The bytes of an object on their way in.
pub(super) struct Incoming<S> {
    pub(super) body: Option<S>,
    pub(super) len: i64,
    pub(super) md5: Option<String>,
    pub(super) content_type: Option<String>,
}

/// A complete object without a name.
#[derive(Debug)]
pub(super) struct Nameless {
    pub(super) path: TempPath,
    pub(super) etag: String,
}

/// The folder of all objects.
#[derive(Debug)]
pub(super) struct Objects {
    data: PathBuf,
    temporary: PathBuf,
    pub(super) uploads: PathBuf,
    /// Held while folders appear and disappear.
    folders: Mutex<()>,
}

impl Objects {
    pub(super) fn open(root: &Path) -> Result<Self, JobError> {
        let folder = |name: &str| root.join(name);
        let objects = Self {
            data: folder("data"),
            temporary: folder("tmp"),
            uploads: folder("uploads"),
            folders: Mutex::new(()),
        };
        objects.prepare().map_err(|e| {
            let message = format!("the embedded store in {} cannot be written to: {e}", root.display());
            JobError::new(Code::InvalidInput, message).with_reason("CONFIG")
        })?;
        Ok(objects)
    }

    fn prepare(&self) -> io::Result<()> {
        for folder in [&self.data, &self.temporary, &self.uploads] {
            fs::create_dir_all(folder)?;
        }
        for leftover in stale(&self.temporary)? {
            fs::remove_file(leftover)?;
        }
        stale(&self.uploads)?.iter().try_for_each(fs::remove_dir_all)
    }

    /// Writes an object, without a name yet; it is on disk when this returns.
    pub(super) async fn receive<S>(&self, incoming: Incoming<S>) -> S3Result<Nameless>
    where
        S: Stream<Item = Result<Bytes, StdError>> + Unpin,
    {
        if incoming.content_type.as_ref().is_some_and(|text| text.len() > MAX_CONTENT_TYPE_LEN) {
            return Err(s3_error!(InvalidArgument, "Content-Type is too long"));
        }
        let path = tempfile::NamedTempFile::new_in(&self.temporary).map_err(internal)?.into_temp_path();
        let mut file = tokio::fs::File::options().write(true).open(&path).await.map_err(internal)?;
        file.write_all(&[b' '; HEAD_LEN as usize]).await.map_err(internal)?;
        let (mut digest, mut len) = (Md5::new(), 0);
        let mut body = incoming.body;
        while let Some(bytes) = match &mut body {
            Some(body) => body.next().await,
            None => None,
        } {
            let bytes = bytes.map_err(|e| S3Error::with_source(S3ErrorCode::IncompleteBody, e))?;
            digest.update(&bytes);
            len += bytes.len() as i64;
            file.write_all(&bytes).await.map_err(internal)?;
        }
        if len != incoming.len {
            return Err(s3_error!(IncompleteBody));
        }
        let digest: [u8; 16] = digest.finalize().into();
        check_md5(incoming.md5.as_deref(), &digest)?;
        let head = Head { etag: hex::encode(digest), content_type: incoming.content_type };
        file.flush().await.map_err(internal)?;
        let mut file = file.into_std().await;
        blocking(move || {
            finish(&mut file, &head)?;
            Ok(Nameless { path, etag: head.etag })
        })
        .await
    }

    /// Puts `parts` behind each other as one object.
    pub(super) fn join(&self, parts: &[PathBuf], head: Head) -> io::Result<Nameless> {
        let mut whole = tempfile::NamedTempFile::new_in(&self.temporary)?;
        whole.write_all(&[b' '; HEAD_LEN as usize])?;
        for part in parts {
            let mut part = File::open(part)?;
            part.seek(SeekFrom::Start(HEAD_LEN))?;
            io::copy(&mut part, whole.as_file_mut())?;
        }
        finish(whole.as_file_mut(), &head)?;
        Ok(Nameless { path: whole.into_temp_path(), etag: head.etag })
    }

    /// Gives an object its name, in place of a former one.
    pub(super) fn name(&self, object: Nameless, key: &str) -> io::Result<()> {
        let target = self.path(key);
        let _held = self.folders.lock().unwrap_or_else(|broken| broken.into_inner());
        let folder = target.parent().unwrap_or(&self.data);
        let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
        fs::create_dir_all(folder)?;
        object.path.persist(&target).map_err(|e| e.error)?;
        sync(folder)?;
        // A new folder is safe once its parent is.
        missing.iter().filter_map(|folder| folder.parent()).try_for_each(sync)
    }

    /// Removes an object, and the folders that it leaves empty. That there is none is no error. It is not
    /// brought to disk: an object that a power cut brings back is swept again.
    pub(super) fn remove(&self, key: &str) -> io::Result<()> {
        let path = self.path(key);
        let _held = self.folders.lock().unwrap_or_else(|broken| broken.into_inner());
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed?,
        }
        let mut folders = path.ancestors().skip(1).take_while(|folder| *folder != self.data);
        // The first folder that is not empty ends it.
        while folders.next().is_some_and(|folder| fs::remove_dir(folder).is_ok()) {}
        Ok(())
    }

    pub(super) fn open_object(&self, key: &str) -> S3Result<OpenObject> {
        open_file(&self.path(key)).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => s3_error!(NoSuchKey),
            _ => internal(e),
        })
    }

    /// All keys that start with `prefix`, in order.
    pub(super) fn keys(&self, prefix: &str) -> io::Result<Vec<String>> {
        let mut keys = Vec::new();
        collect(&self.data, "", prefix, &mut keys)?;
        keys.sort_unstable();
        Ok(keys)
    }

    fn path(&self, key: &str) -> PathBuf {
        let (folders, name) = key.rsplit_once('/').unwrap_or(("", key));
        let mut path = self.data.clone();
        path.extend(
            folders.split('/').filter(|segment| !segment.is_empty()).map(|segment| format!("d-{segment}")),
        );
        path.push(format!("f-{name}"));
        path
    }
}

/// What has lain in `folder` for so long that nobody is writing it. Another process may have the store open.
fn stale(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?);
        stale.extend(age.is_ok_and(|age| age > STALE_AFTER).then(|| entry.path()));
    }
    Ok(stale)
}

/// Refuses keys that a file system would take for something else.
pub(super) fn check_key(key: &str) -> S3Result<()> {
    if key.len() > MAX_KEY_LEN || key.split('/').any(|segment| segment.len() > MAX_SEGMENT_LEN) {
        return Err(s3_error!(KeyTooLongError));
    }
    let plain = |segment: &str| !matches!(segment, "" | "." | "..") && !segment.chars().any(char::is_control);
    match key.split('/').all(plain) {
        true => Ok(()),
        false => Err(s3_error!(
            InvalidArgument,
            "The key has a segment that is empty, `.`, `..` or not plain text"
        )),
    }
}

pub(super) fn open_file(path: &Path) -> io::Result<OpenObject> {
    let mut file = File::open(path)?;
    let mut head = [0; HEAD_LEN as usize];
    file.read_exact(&mut head)?;
    let metadata = file.metadata()?;
    let (len, modified) = (metadata.len() - HEAD_LEN, metadata.modified()?);
    Ok(OpenObject { head: serde_json::from_slice(&head)?, file, len, modified })
}

/// Writes the head into the space that was left for it, and brings the file to disk.
fn finish(file: &mut File, head: &Head) -> io::Result<()> {
    let mut text = serde_json::to_vec(head)?;
    if text.len() >= HEAD_LEN as usize {
        return Err(io::Error::other("the head of an object is too long"));
    }
    text.push(b'\n');
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&text)?;
    file.sync_all()
}

fn collect(folder: &Path, parent: &str, prefix: &str, keys: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        // It was removed meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(name) = name.strip_prefix("f-") {
            let key = format!("{parent}{name}");
            keys.extend(key.starts_with(prefix).then_some(key));
        } else if let Some(name) = name.strip_prefix("d-") {
            let parent = format!("{parent}{name}/");
            if parent.starts_with(prefix) || prefix.starts_with(&parent) {
                collect(&entry.path(), &parent, prefix, keys)?;
            }
        }
    }
    Ok(())
}

fn check_md5(given: Option<&str>, digest: &[u8; 16]) -> S3Result<()> {
    use base64::Engine;
    let Some(given) = given else { return Ok(()) };
    match base64::prelude::BASE64_STANDARD.decode(given) {
        Ok(given) if given == digest => Ok(()),
        Ok(given) if given.len() == digest.len() => Err(s3_error!(BadDigest)),
        _ => Err(s3_error!(InvalidDigest)),
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Runs `work` where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> S3Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(internal),
        Err(e) => Err(S3Error::with_source(S3ErrorCode::InternalError, Box::new(e))),
    }
}

/// With the reason for the client: the disk is full, say.
pub(super) fn internal(e: io::Error) -> S3Error {
    S3Error::with_message(S3ErrorCode::InternalError, e.to_string())
}
