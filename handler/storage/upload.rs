//! Uploads: one request for a small object, equal parts for a large one. An object appears whole or not at
//! all, under its one key, and holds what was sent: every piece carries its MD5, and so does the answer.

use std::future::Future;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, ServerSideEncryption};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use md5::{Digest, Md5};
use rand::Rng;

use super::client::{Clients, Failure, Tuning, quietly};
use crate::faults::kill_point;

/// S3 and R2 take no more parts than this.
const MAX_PARTS: u64 = 10_000;

/// What is uploaded.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// A file that does not change meanwhile.
    File(PathBuf),
    /// A small text or picture.
    Bytes(Bytes),
}

/// An object to be.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) key: String,
    pub(super) content_type: &'static str,
    pub(super) content: Content,
}

/// Uploads to one bucket.
pub(super) struct Uploader<'a> {
    pub(super) clients: &'a Clients,
    pub(super) bucket: &'a str,
    pub(super) tuning: &'a Tuning,
}

/// A stretch of the content that goes in one request.
#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: u64,
    len: u64,
    md5: [u8; 16],
}

impl Piece {
    fn content_md5(&self) -> String {
        BASE64_STANDARD.encode(self.md5)
    }
}

impl Uploader<'_> {
    /// Uploads `object`. With `maybe_there` it is looked for first, as it may have been uploaded before.
    pub(super) async fn upload(&self, object: &Object, maybe_there: bool) -> Result<(), Failure> {
        let pieces = self.pieces(&object.content).await?;
        if maybe_there && self.is_there(&object.key, &pieces).await {
            return Ok(());
        }
        match pieces.as_slice() {
            [piece] => self.put(object, piece).await,
            pieces => self.multipart(object, pieces).await,
        }
    }

    async fn put(&self, object: &Object, piece: &Piece) -> Result<(), Failure> {
        let what = "the upload failed";
        let send = || async {
            let body = body(&object.content, piece).await?;
            let call = self.clients.uploads.put_object().bucket(self.bucket).key(&object.key);
            let call = call.content_type(object.content_type).content_length(piece.len as i64).body(body);
            let sent = quietly(call.content_md5(piece.content_md5()).send()).await;
            let sent = sent.map_err(|e| Failure::new(what, &e))?;
            check_etag(sent.e_tag(), sent.server_side_encryption(), &etag(std::slice::from_ref(piece)))
        };
        let there = || self.is_there_then(&object.key, std::slice::from_ref(piece), ());
        self.rounds(send, there).await
    }

    async fn multipart(&self, object: &Object, pieces: &[Piece]) -> Result<(), Failure> {
        let upload = Multipart {
            client: self.clients.calls.clone(),
            bucket: self.bucket.to_string(),
            key: object.key.clone(),
            id: self.create(object).await?,
            open: true,
        };
        match self.send_parts(object, pieces, &upload).await {
            Ok(()) => {
                upload.close();
                Ok(())
            }
            Err(failure) => {
                upload.abort().await;
                Err(failure)
            }
        }
    }

    async fn create(&self, object: &Object) -> Result<String, Failure> {
        let create = || async {
            let call = self.clients.calls.create_multipart_upload().bucket(self.bucket).key(&object.key);
            let created = quietly(call.content_type(object.content_type).send()).await;
            let created = created.map_err(|e| Failure::new("the upload could not be begun", &e))?;
            let id = created.upload_id().map(str::to_string);
            id.ok_or_else(|| Failure::local("the store began an upload without an id".to_string()))
        };
        self.rounds(create, || async { None }).await
    }

    async fn send_parts(&self, object: &Object, pieces: &[Piece], upload: &Multipart) -> Result<(), Failure> {
        let sent = AtomicUsize::new(0);
        let parts = (1..).zip(pieces.iter().copied()).map(|(number, piece)| {
            let sent = &sent;
            async move {
                let part = self.part(object, upload, number, &piece).await?;
                if sent.fetch_add(1, Ordering::Relaxed) + 1 == 2 {
                    kill_point("K20");
                }
                Ok::<_, Failure>(part)
            }
        });
        let parts = futures::stream::iter(parts).buffered(self.tuning.parts_at_once);
        let parts: Vec<CompletedPart> = parts.try_collect().await?;
        let complete = || async {
            let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.clone())).build();
            let call = self.clients.uploads.complete_multipart_upload().bucket(self.bucket).key(&object.key);
            let done = quietly(call.upload_id(&upload.id).multipart_upload(parts).send()).await;
            let done = done.map_err(|e| Failure::new("the upload could not be completed", &e))?;
            check_etag(done.e_tag(), done.server_side_encryption(), &etag(pieces))
        };
        self.rounds(complete, || self.is_there_then(&object.key, pieces, ())).await
    }

    async fn part(
        &self,
        object: &Object,
        upload: &Multipart,
        number: i32,
        piece: &Piece,
    ) -> Result<CompletedPart, Failure> {
        let send = || async {
            let body = body(&object.content, piece).await?;
            let call = self.clients.uploads.upload_part().bucket(self.bucket).key(&object.key);
            let call = call.upload_id(&upload.id).part_number(number).content_length(piece.len as i64);
            let sent = quietly(call.content_md5(piece.content_md5()).body(body).send()).await;
            let sent = sent.map_err(|e| Failure::new(&format!("part {number} could not be uploaded"), &e))?;
            check_etag(sent.e_tag(), sent.server_side_encryption(), &etag(std::slice::from_ref(piece)))?;
            Ok(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build())
        };
        self.rounds(send, || async { None }).await
    }

    /// Tries `call` again while that may do. Each call is a few tries of the SDK's in quick succession; the
    /// rounds are there for outages that last longer. `settled` finds out whether a call has worked whose
    /// answer was lost.
    async fn rounds<T, C, S>(&self, call: impl Fn() -> C, settled: impl Fn() -> S) -> Result<T, Failure>
    where
        C: Future<Output = Result<T, Failure>>,
        S: Future<Output = Option<T>>,
    {
        let mut pause = self.tuning.round_pause;
        let mut round = 1;
        loop {
            let failure = match call().await {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            };
            if failure.may_have_worked()
                && let Some(done) = settled().await
            {
                return Ok(done);
            }
            if !failure.passing || round >= self.tuning.rounds {
                return Err(failure);
            }
            tracing::warn!(round, "{}; it is tried again", failure.message);
            // The source of chance belongs to its thread, and must not be held while a task waits.
            let jitter = rand::rng().random_range(0.5..=1.0);
            tokio::time::sleep(pause.mul_f64(jitter)).await;
            pause *= 2;
            round += 1;
        }
    }

    async fn is_there_then<T>(&self, key: &str, pieces: &[Piece], then: T) -> Option<T> {
        self.is_there(key, pieces).await.then_some(then)
    }

    /// Whether the store holds exactly this content under `key`.
    async fn is_there(&self, key: &str, pieces: &[Piece]) -> bool {
        let call = self.clients.calls.head_object().bucket(self.bucket).key(key);
        let Ok(found) = quietly(call.send()).await else { return false };
        let len: u64 = pieces.iter().map(|piece| piece.len).sum();
        let same_len = found.content_length().is_some_and(|found| found as u64 == len);
        same_len && check_etag(found.e_tag(), found.server_side_encryption(), &etag(pieces)).is_ok()
    }

    /// Cuts the content, and reads it once for its digests.
    async fn pieces(&self, content: &Content) -> Result<Vec<Piece>, Failure> {
        let (put_limit, part_size) = (self.tuning.put_limit, self.tuning.part_size);
        match content {
            Content::Bytes(bytes) => {
                Ok(vec![Piece { offset: 0, len: bytes.len() as u64, md5: Md5::digest(bytes).into() }])
            }
            Content::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || {
                    pieces_of(&path, put_limit, part_size)
                        .map_err(|e| Failure::local(format!("{} cannot be read: {e}", path.display())))
                });
                read.await.unwrap_or_else(|e| Err(Failure::local(format!("reading the video failed: {e}"))))
            }
        }
    }
}

fn pieces_of(path: &Path, put_limit: u64, part_size: u64) -> std::io::Result<Vec<Piece>> {
    let mut file = std::fs::File::open(path)?;
    let len = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    // Files beyond 160 GB get larger parts, still all equal.
    let size = if len <= put_limit { len } else { part_size.max(len.div_ceil(MAX_PARTS)) };
    let count = if len == 0 { 1 } else { len.div_ceil(size) };
    (0..count)
        .map(|i| {
            let mut digest = Md5::new();
            let len = std::io::copy(&mut (&mut file).take(size), &mut DigestWriter(&mut digest))?;
            Ok(Piece { offset: i * size, len, md5: digest.finalize().into() })
        })
        .collect()
}

/// Feeds a digest.
struct DigestWriter<'a>(&'a mut Md5);

impl std::io::Write for DigestWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn body(content: &Content, piece: &Piece) -> Result<ByteStream, Failure> {
    match content {
        Content::Bytes(bytes) => Ok(ByteStream::from(bytes.clone())),
        Content::File(path) => {
            let stream =
                ByteStream::read_from().path(path).offset(piece.offset).length(Length::Exact(piece.len));
            let stream = stream.build().await;
            stream.map_err(|e| Failure::local(format!("{} cannot be read: {e}", path.display())))
        }
    }
}

/// What S3 calls an object of these pieces: its MD5, or the MD5 of its parts' MD5s with their number.
fn etag(pieces: &[Piece]) -> String {
    match pieces {
        [piece] => hex::encode(piece.md5),
        pieces => {
            let digests: Vec<u8> = pieces.iter().flat_map(|piece| piece.md5).collect();
            format!("{}-{}", hex::encode(Md5::digest(digests)), pieces.len())
        }
    }
}

/// Compares the store's ETag. Objects under a key of KMS have another kind, and some stores make up their own.
fn check_etag(
    found: Option<&str>,
    encryption: Option<&ServerSideEncryption>,
    expected: &str,
) -> Result<(), Failure> {
    let plain = encryption.is_none_or(|kind| *kind == ServerSideEncryption::Aes256);
    let found = found.unwrap_or_default().trim_matches('"');
    let (digest, _) = found.split_once('-').unwrap_or((found, ""));
    let is_md5 = digest.len() == 32 && digest.bytes().all(|b| b.is_ascii_hexdigit());
    if plain && is_md5 && !found.eq_ignore_ascii_case(expected) {
        let message = format!("the store holds an object with the ETag {found}, expected {expected}");
        return Err(Failure { passing: true, ..Failure::local(message) });
    }
    Ok(())
}

/// An upload in parts, which is aborted when dropped: parts that nobody completes would be paid for.
struct Multipart {
    client: Client,
    bucket: String,
    key: String,
    id: String,
    open: bool,
}

impl Multipart {
    /// The upload is complete.
    fn close(mut self) {
        self.open = false;
    }

    async fn abort(mut self) {
        self.open = false;
        self.send_abort().await;
    }

    fn send_abort(&self) -> impl Future<Output = ()> + Send + 'static {
        let call =
            self.client.abort_multipart_upload().bucket(&self.bucket).key(&self.key).upload_id(&self.id);
        async move {
            if let Err(e) = quietly(call.send()).await {
                let failure = Failure::new("an upload could not be aborted", &e);
                tracing::warn!("{}; a lifecycle rule of the bucket should remove it", failure.message);
            }
        }
    }
}

impl Drop for Multipart {
    /// The job was cancelled in the middle.
    fn drop(&mut self) {
        if self.open
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(self.send_abort());
        }
    }
}
