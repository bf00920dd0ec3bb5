//! The large texts of accepted jobs (images and voices as base64), as files: one per job, which holds all of
//! its texts, so that a job costs one synchronisation of a file and one of the folder.
//!
//! A file begins with a line of JSON: for each text where it was, as a JSON pointer, and its length in bytes. The
//! texts follow without a gap. In the request `null` stands in their places, and nothing in a request can be taken
//! for a reference to a file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::job::{Code, JobError};
use crate::part_file::PartFile;

/// Longer texts, in bytes, are moved to files.
const LARGEST: usize = 64 * 1024;

/// A field that stays where it is, whatever its length: the store erases it when the job has ended.
const SECRETS: &str = "s3Config";

/// A folder with one file per job that has large texts. Its methods wait for the disk.
#[derive(Clone, Debug)]
pub struct MediaFolder(PathBuf);

impl MediaFolder {
    /// Opens the folder `dir`, or makes it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(dir: &Path) -> Result<Self, JobError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        // Portraits and voices are their senders' own.
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(dir).map_err(|e| failed("made", dir, &e))?;
        let above = dir.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(above).and_then(|above| above.sync_all()).map_err(|e| failed("made", dir, &e))?;
        Ok(Self(dir.to_path_buf()))
    }

    /// Moves every large text in `request` to a file, which is on disk when this returns.
    ///
    /// # Errors
    /// `STORE_FULL` when the disk is full; no file is left then.
    pub fn spill(&self, job: &str, request: &mut Value) -> Result<(), JobError> {
        let mut texts = Vec::new();
        if let Value::Object(fields) = &mut *request {
            for (name, value) in fields.iter_mut().filter(|(name, _)| *name != SECRETS) {
                collect(value, format!("/{}", escape(name)), &mut texts);
            }
        }
        if texts.is_empty() {
            return Ok(());
        }
        let path = self.path(job)?;
        write(&path, &texts).map_err(|e| failed("written", &path, &e))
    }

    /// Puts them back.
    ///
    /// # Errors
    /// When the file is gone or is not that of this request.
    pub fn restore(&self, job: &str, request: &mut Value) -> Result<(), JobError> {
        let path = self.path(job)?;
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            // A job without large texts has no file.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed("read", &path, &e)),
        };
        put_back(bytes, request).map_err(|e| failed("read", &path, &e))
    }

    /// Forgets a job's texts.
    pub fn remove(&self, job: &str) {
        let Ok(path) = self.path(job) else { return };
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(job, "the media of job {job} stay until the next start: {e}");
            }
            _ => {}
        }
    }

    /// Removes the files of jobs that `is_known` does not know, and what an interrupted
    /// [`spill`](Self::spill) has left. For the start: a job that is being accepted is not known yet.
    pub fn remove_orphans(&self, is_known: impl Fn(&str) -> bool) {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(e) => return tracing::warn!("{} was not tidied: {e}", self.0.display()),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| is_id(name) && is_known(name)) {
                continue;
            }
            if let Err(e) = fs::remove_file(entry.path()) {
                tracing::warn!("{} was not removed: {e}", entry.path().display());
            }
        }
    }

    fn path(&self, job: &str) -> Result<PathBuf, JobError> {
        if is_id(job) {
            return Ok(self.0.join(job));
        }
        Err(JobError::new(Code::Internal, "a job's id is not a file name").with_reason("MEDIA_FAILED"))
    }
}

/// Whether `name` is an id of ours, and so leads nowhere else as a file name.
fn is_id(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// Takes the large texts out of `value`, with the pointers to their places.
fn collect(value: &mut Value, pointer: String, texts: &mut Vec<(String, String)>) {
    match value {
        Value::String(text) if text.len() > LARGEST => {
            texts.push((pointer, std::mem::take(text)));
            *value = Value::Null;
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                collect(item, format!("{pointer}/{index}"), texts);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                collect(field, format!("{pointer}/{}", escape(name)), texts);
            }
        }
        _ => {}
    }
}

/// A field's name as it stands in a JSON pointer.
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

fn write(path: &Path, texts: &[(String, String)]) -> io::Result<()> {
    let places: Vec<(&str, usize)> =
        texts.iter().map(|(pointer, text)| (pointer.as_str(), text.len())).collect();
    let part = PartFile::create(path)?;
    let mut file = File::options().write(true).open(part.path())?;
    serde_json::to_writer(&mut file, &places)?;
    file.write_all(b"\n")?;
    for (_, text) in texts {
        file.write_all(text.as_bytes())?;
    }
    part.publish()
}

fn put_back(bytes: Vec<u8>, request: &mut Value) -> io::Result<()> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let end = bytes.iter().position(|&byte| byte == b'\n').ok_or_else(|| wrong("it has no first line"))?;
    let places: Vec<(String, usize)> = serde_json::from_slice(&bytes[..end])?;
    let mut rest = &bytes[end + 1..];
    for (pointer, len) in places {
        let (text, after) = rest.split_at_checked(len).ok_or_else(|| wrong("it is too short"))?;
        let text = std::str::from_utf8(text).map_err(|_| wrong("it is not text"))?;
        match request.pointer_mut(&pointer) {
            Some(place @ Value::Null) => *place = Value::String(text.to_string()),
            _ => return Err(wrong("it is another request's")),
        }
        rest = after;
    }
    if rest.is_empty() { Ok(()) } else { Err(wrong("it is too long")) }
}

fn failed(what: &str, path: &Path, error: &io::Error) -> JobError {
    if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        return JobError::new(Code::StoreFull, "the disk of the job store is full")
            .with_hint("try again later");
    }
    let message = format!("the media {} cannot be {what}: {error}", path.display());
    JobError::new(Code::Internal, message).with_reason("MEDIA_FAILED")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn folder() -> (tempfile::TempDir, MediaFolder) {
        let dir = tempfile::tempdir().unwrap();
        let media = MediaFolder::open(&dir.path().join("media")).unwrap();
        (dir, media)
    }

    fn names(media: &MediaFolder) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&media.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn long(letter: &str) -> String {
        letter.repeat(LARGEST / letter.len() + 1)
    }

    #[test]
    fn large_texts_come_back_to_exactly_where_they_were() {
        let (_dir, media) = folder();
        let request = json!({
            "input": {"image": long("a"), "a/b~c": [1, {"": long("ü")}], "prompt": "short", "~1": long("\n\"")},
            "webhook": "https://example.com",
            "x": long("z"),
        });
        let mut spilled = request.clone();
        media.spill("job-1", &mut spilled).unwrap();
        assert!(spilled.to_string().len() < 200, "{spilled}");
        assert_eq!(spilled["input"]["prompt"], "short");
        media.restore("job-1", &mut spilled).unwrap();
        assert_eq!(spilled.to_string(), request.to_string(), "the order of the fields too");
    }

    #[test]
    fn a_text_is_large_above_64_kib_and_secrets_are_never_moved() {
        let (_dir, media) = folder();
        let request = json!({"input": "b".repeat(LARGEST), "s3Config": {"accessSecret": long("s")}});
        let mut spilled = request.clone();
        media.spill("job-1", &mut spilled).unwrap();
        assert_eq!(spilled, request);
        media.restore("job-1", &mut spilled).unwrap();
        assert_eq!(spilled, request);
        assert!(names(&media).is_empty());
    }

    #[test]
    fn no_request_can_name_a_file_and_no_id_can_leave_the_folder() {
        let (dir, media) = folder();
        fs::write(dir.path().join("outside"), "[]\n").unwrap();
        media.remove("../outside");
        assert!(dir.path().join("outside").exists());
        for id in ["../outside", "", ".", "a/b", "a.b"] {
            assert!(media.spill(id, &mut json!({"input": long("a")})).is_err(), "{id}");
            assert!(media.restore(id, &mut json!({})).is_err(), "{id}");
        }
    }

    #[test]
    fn a_file_that_is_not_this_requests_is_refused() {
        let (_dir, media) = folder();
        let mut spilled = json!({"input": {"image": long("a")}});
        media.spill("job-1", &mut spilled).unwrap();
        let error = media.restore("job-1", &mut json!({"input": {"image": "there"}})).unwrap_err();
        assert_eq!((error.code, error.details["reason"].as_str()), (Code::Internal, Some("MEDIA_FAILED")));
        let path = media.0.join("job-1");
        let bytes = fs::read(&path).unwrap();
        for broken in [&bytes[..bytes.len() - 1], &[bytes.as_slice(), b"x"].concat(), b"", b"[[1]]\n"] {
            fs::write(&path, broken).unwrap();
            assert!(media.restore("job-1", &mut spilled.clone()).is_err());
        }
    }

    #[test]
    fn orphans_and_interrupted_writes_go_and_the_others_stay() {
        let (_dir, media) = folder();
        for job in ["a", "b", "c"] {
            media.spill(job, &mut json!({"input": long("a")})).unwrap();
        }
        fs::write(media.0.join(".talkie-x.part"), "half").unwrap();
        media.remove("c");
        media.remove("c");
        media.remove_orphans(|job| job == "b");
        assert_eq!(names(&media), ["b"]);
    }
}
