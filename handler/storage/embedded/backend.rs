//! S3's operations over [`Objects`]: those that storing and handing out videos takes. All others answer
//! `NotImplemented`, and so do requests that ask for what is not kept, such as tags and ACLs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CommonPrefix, CompleteMultipartUploadInput,
    CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput,
    DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
    HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input,
    ListObjectsV2Output, Object, PostObjectInput, PostObjectOutput, PutObjectInput, PutObjectOutput,
    StreamingBlob, UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::objects::{HEAD_LEN, Incoming, Objects, OpenObject, blocking, check_key, internal};
use super::uploads::MAX_PART_NUMBER;
use super::{BUCKET, Rules};

const MAX_KEYS: usize = 1000;
const READ_LEN: usize = 256 << 10;
/// The largest body of one request on S3 and R2.
const MAX_BODY_LEN: i64 = 5 << 30;
/// R2 takes one write of a key in this time.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Whether a request carries a checksum that would have to be verified.
macro_rules! has_checksum {
    ($input:expr) => {
        $input.checksum_crc32.is_some()
            || $input.checksum_crc32c.is_some()
            || $input.checksum_crc64nvme.is_some()
            || $input.checksum_sha1.is_some()
            || $input.checksum_sha256.is_some()
    };
}

pub(super) struct Backend {
    objects: Arc<Objects>,
    rules: Rules,
    /// When keys were last written.
    written: Mutex<HashMap<String, Instant>>,
}

impl Backend {
    pub(super) fn new(objects: Arc<Objects>, rules: Rules) -> Self {
        Self { objects, rules, written: Mutex::default() }
    }

    fn check(&self, bucket: &str, key: &str) -> S3Result<()> {
        check_bucket(bucket)?;
        check_key(key)
    }

    fn check_pace(&self, key: &str) -> S3Result<()> {
        if self.rules != Rules::R2 {
            return Ok(());
        }
        let mut written = self.written.lock().unwrap_or_else(|broken| broken.into_inner());
        written.retain(|_, at| at.elapsed() < WRITE_INTERVAL);
        if written.insert(key.to_string(), Instant::now()).is_none() {
            return Ok(());
        }
        let mut error = S3Error::with_message(
            S3ErrorCode::Custom("TooManyRequests".into()),
            "Reduce your concurrent request rate for the same object.",
        );
        error.set_status_code(hyper::StatusCode::TOO_MANY_REQUESTS);
        Err(error)
    }
}

fn check_bucket(bucket: &str) -> S3Result<()> {
    if bucket == BUCKET { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
}

/// Refuses a request that sets what is not kept.
fn refuse(asked: &[(bool, &'static str)]) -> S3Result<()> {
    match asked.iter().find(|(is_set, _)| *is_set) {
        Some((_, what)) => {
            Err(S3Error::with_message(S3ErrorCode::NotImplemented, format!("{what} is not implemented")))
        }
        None => Ok(()),
    }
}

fn body_len(len: Option<i64>) -> S3Result<i64> {
    match len {
        None => Err(s3_error!(MissingContentLength)),
        Some(len) if len > MAX_BODY_LEN => Err(s3_error!(EntityTooLarge)),
        Some(len) => Ok(len),
    }
}

fn check_conditions(
    etag: &str,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
) -> S3Result<()> {
    let is = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(given) => given.value() == etag,
    };
    if if_match.is_some_and(|condition| !is(condition)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(is) {
        return Err(s3_error!(NotModified));
    }
    Ok(())
}

/// `len` bytes of an object from `offset` on, as they are read.
fn stream(
    object: OpenObject,
    offset: u64,
    len: u64,
) -> impl Stream<Item = std::io::Result<Bytes>> + Send + Sync {
    let file = tokio::fs::File::from_std(object.file);
    futures::stream::try_unfold((file, Some(offset), len), |(mut file, offset, left)| async move {
        if let Some(offset) = offset {
            file.seek(std::io::SeekFrom::Start(HEAD_LEN + offset)).await?;
        }
        let mut piece = vec![0; READ_LEN.min(left as usize)];
        let read = file.read(&mut piece).await?;
        if left == 0 {
            return Ok(None);
        }
        if read == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        }
        piece.truncate(read);
        Ok(Some((Bytes::from(piece), (file, None, left - read as u64))))
    })
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        let grants =
            [&input.grant_full_control, &input.grant_read, &input.grant_read_acp, &input.grant_write_acp];
        refuse(&[
            (input.acl.is_some() || grants.iter().any(|grant| grant.is_some()), "an ACL"),
            (input.tagging.is_some(), "tagging"),
            (input.metadata.is_some_and(|metadata| !metadata.is_empty()), "metadata"),
            (input.server_side_encryption.is_some() || input.sse_customer_key.is_some(), "encryption"),
            (input.object_lock_mode.is_some() || input.object_lock_legal_hold_status.is_some(), "a lock"),
            (input.website_redirect_location.is_some(), "a redirect"),
            (input.content_encoding.is_some(), "a content encoding"),
            (input.if_match.is_some() || input.if_none_match.is_some(), "a conditional write"),
            (input.write_offset_bytes.is_some(), "appending"),
            (has_checksum!(input), "a checksum other than Content-MD5"),
        ])?;
        let len = body_len(input.content_length)?;
        self.check_pace(&input.key)?;
        let incoming =
            Incoming { body: input.body, len, md5: input.content_md5, content_type: input.content_type };
        let object = self.objects.receive(incoming).await?;
        let (objects, etag) = (self.objects.clone(), object.etag.clone());
        blocking(move || objects.name(object, &input.key)).await?;
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    /// Forms of web pages; by default they would be written as other objects are.
    async fn post_object(&self, _req: S3Request<PostObjectInput>) -> S3Result<S3Response<PostObjectOutput>> {
        Err(s3_error!(NotImplemented, "PostObject is not implemented"))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        refuse(&[
            (input.part_number.is_some(), "reading a part"),
            (input.version_id.is_some(), "a version"),
            (input.sse_customer_key.is_some(), "encryption"),
        ])?;
        let objects = self.objects.clone();
        let object = blocking(move || Ok(objects.open_object(&input.key))).await??;
        check_conditions(&object.head.etag, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        let whole = object.len;
        let (range, content_range) = match input.range {
            None => (0..whole, None),
            Some(range) => {
                let range = range.check(whole).map_err(|_| s3_error!(InvalidRange))?;
                let shown = format!("bytes {}-{}/{whole}", range.start, range.end.saturating_sub(1));
                (range, Some(shown))
            }
        };
        let len = range.end - range.start;
        let output = GetObjectOutput {
            accept_ranges: Some("bytes".to_string()),
            content_length: Some(len as i64),
            content_range,
            content_type: object.head.content_type.clone(),
            e_tag: Some(ETag::Strong(object.head.etag.clone())),
            last_modified: Some(object.modified.into()),
            body: Some(StreamingBlob::wrap(stream(object, range.start, len))),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        refuse(&[
            (input.part_number.is_some(), "reading a part"),
            (input.version_id.is_some(), "a version"),
            (input.range.is_some(), "a range"),
        ])?;
        let objects = self.objects.clone();
        let object = blocking(move || Ok(objects.open_object(&input.key))).await??;
        check_conditions(&object.head.etag, input.if_match.as_ref(), input.if_none_match.as_ref())?;
        Ok(S3Response::new(HeadObjectOutput {
            accept_ranges: Some("bytes".to_string()),
            content_length: Some(object.len as i64),
            content_type: object.head.content_type,
            e_tag: Some(ETag::Strong(object.head.etag)),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        refuse(&[
            (input.version_id.is_some(), "a version"),
            (input.if_match.is_some(), "a conditional delete"),
        ])?;
        let objects = self.objects.clone();
        blocking(move || objects.remove(&input.key)).await?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        check_bucket(&input.bucket)?;
        refuse(&[
            (input.encoding_type.is_some(), "an encoding of keys"),
            (input.fetch_owner == Some(true), "an owner"),
        ])?;
        let objects = self.objects.clone();
        blocking(move || Ok(list(&objects, input))).await?.map(S3Response::new)
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        let grants =
            [&input.grant_full_control, &input.grant_read, &input.grant_read_acp, &input.grant_write_acp];
        refuse(&[
            (input.acl.is_some() || grants.iter().any(|grant| grant.is_some()), "an ACL"),
            (input.tagging.is_some(), "tagging"),
            (input.metadata.is_some_and(|metadata| !metadata.is_empty()), "metadata"),
            (input.server_side_encryption.is_some() || input.sse_customer_key.is_some(), "encryption"),
            (input.object_lock_mode.is_some() || input.object_lock_legal_hold_status.is_some(), "a lock"),
            (input.website_redirect_location.is_some(), "a redirect"),
            (input.content_encoding.is_some(), "a content encoding"),
            (input.checksum_algorithm.is_some(), "a checksum other than Content-MD5"),
        ])?;
        let (objects, key, content_type) = (self.objects.clone(), input.key.clone(), input.content_type);
        let id = blocking(move || objects.create_upload(&key, content_type)).await?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        refuse(&[
            (input.sse_customer_key.is_some(), "encryption"),
            (has_checksum!(input), "a checksum other than Content-MD5"),
        ])?;
        if !(1..=MAX_PART_NUMBER).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "A part has a number from 1 to 10000"));
        }
        let len = body_len(input.content_length)?;
        let incoming = Incoming { body: input.body, len, md5: input.content_md5, content_type: None };
        let part = self.objects.receive(incoming).await?;
        let (objects, etag) = (self.objects.clone(), part.etag.clone());
        let (key, id, number) = (input.key, input.upload_id, input.part_number);
        blocking(move || Ok(objects.name_part(part, (&key, &id), number))).await??;
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        refuse(&[(input.if_match.is_some() || input.if_none_match.is_some(), "a conditional write")])?;
        self.check_pace(&input.key)?;
        let parts = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let (objects, rules) = (self.objects.clone(), self.rules);
        let (key, id) = (input.key.clone(), input.upload_id);
        let etag = blocking(move || Ok(objects.complete((&key, &id), &parts, rules))).await??;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(etag)),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        self.check(&input.bucket, &input.key)?;
        let objects = self.objects.clone();
        blocking(move || Ok(objects.abort((&input.key, &input.upload_id)))).await??;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}

/// One page of keys. The token of the next is the last key or prefix of this one.
fn list(objects: &Objects, input: ListObjectsV2Input) -> S3Result<ListObjectsV2Output> {
    let prefix = input.prefix.clone().unwrap_or_default();
    let most = usize::try_from(input.max_keys.unwrap_or(MAX_KEYS as i32)).unwrap_or(0).min(MAX_KEYS);
    let token = input.continuation_token.as_ref().map(|token| {
        let bytes = hex::decode(token).ok();
        bytes
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| s3_error!(InvalidArgument, "The token is wrong"))
    });
    let after = token.transpose()?.or(input.start_after.clone()).unwrap_or_default();
    let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
    let (mut contents, mut prefixes, mut last, mut truncated) = (Vec::new(), Vec::new(), None, false);
    for key in objects.keys(&prefix).map_err(internal)? {
        let rest = &key[prefix.len()..];
        let group =
            delimiter.as_ref().and_then(|d| rest.find(d.as_str()).map(|at| prefix.len() + at + d.len()));
        let item = &key[..group.unwrap_or(key.len())];
        if item <= after.as_str() || last.as_deref() == Some(item) {
            continue;
        }
        if contents.len() + prefixes.len() == most {
            truncated = true;
            break;
        }
        last = Some(item.to_string());
        if group.is_some() {
            prefixes.push(CommonPrefix { prefix: Some(item.to_string()) });
            continue;
        }
        // It may have been deleted since its name was read.
        let Ok(object) = objects.open_object(&key) else { continue };
        contents.push(Object {
            key: Some(key),
            size: Some(object.len as i64),
            e_tag: Some(ETag::Strong(object.head.etag)),
            last_modified: Some(object.modified.into()),
            ..Default::default()
        });
    }
    Ok(ListObjectsV2Output {
        name: Some(input.bucket),
        prefix: input.prefix,
        delimiter: input.delimiter,
        start_after: input.start_after,
        continuation_token: input.continuation_token,
        max_keys: Some(most as i32),
        key_count: Some((contents.len() + prefixes.len()) as i32),
        is_truncated: Some(truncated),
        next_continuation_token: last.filter(|_| truncated).map(hex::encode),
        contents: Some(contents),
        common_prefixes: Some(prefixes),
        ..Default::default()
    })
}
