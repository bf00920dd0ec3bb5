//! Uploads in parts: a folder each, with what the object is to be and its parts so far.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use md5::{Digest, Md5};
use rand::distr::{Alphanumeric, SampleString};
use s3s::dto::CompletedPart;
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};
use serde::{Deserialize, Serialize};

use super::Rules;
use super::objects::{Head, Nameless, Objects, internal, open_file};

const ID_LEN: usize = 32;
pub(super) const MAX_PART_NUMBER: i32 = 10_000;
/// S3 and R2 take smaller parts only at the end.
const MIN_PART_LEN: u64 = 5 << 20;
const PLAN: &str = "upload.json";

/// What an upload is to become.
#[derive(Serialize, Deserialize)]
struct Plan {
    key: String,
    content_type: Option<String>,
}

impl Objects {
    /// Begins an upload; its id.
    pub(super) fn create_upload(&self, key: &str, content_type: Option<String>) -> io::Result<String> {
        let id = Alphanumeric.sample_string(&mut rand::rng(), ID_LEN);
        let folder = self.uploads.join(&id);
        fs::create_dir(&folder)?;
        let plan = Plan { key: key.to_string(), content_type };
        let mut file = File::create(folder.join(PLAN))?;
        file.write_all(&serde_json::to_vec(&plan)?)?;
        file.sync_all()?;
        File::open(&folder)?.sync_all()?;
        File::open(&self.uploads)?.sync_all()?;
        Ok(id)
    }

    /// Takes a part, in place of a former one of that number.
    pub(super) fn name_part(&self, part: Nameless, place: (&str, &str), number: i32) -> S3Result<()> {
        let (folder, _) = self.upload(place)?;
        part.path.persist(part_path(&folder, number)).map_err(|e| internal(e.error))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(internal)
    }

    /// Makes the object of its parts; its ETag.
    pub(super) fn complete(
        &self,
        place: (&str, &str),
        parts: &[CompletedPart],
        rules: Rules,
    ) -> S3Result<String> {
        let (folder, plan) = self.upload(place)?;
        let (mut paths, mut digests, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = 0;
        for part in parts {
            let number = part.part_number.unwrap_or_default();
            if number <= last {
                return Err(s3_error!(InvalidPartOrder));
            }
            last = number;
            let path = part_path(&folder, number);
            let object = open_file(&path).map_err(|_| s3_error!(InvalidPart))?;
            let given = part.e_tag.as_ref().map(|etag| etag.value().trim_matches('"').to_string());
            if given.as_ref() != Some(&object.head.etag) {
                return Err(s3_error!(InvalidPart));
            }
            digests.extend(hex::decode(&object.head.etag).map_err(|e| internal(io::Error::other(e)))?);
            lens.push(object.len);
            paths.push(path);
        }
        check_lens(&lens, rules)?;
        let etag = format!("{}-{}", hex::encode(Md5::digest(digests)), parts.len());
        let head = Head { etag: etag.clone(), content_type: plan.content_type };
        let whole = self.join(&paths, head).map_err(internal)?;
        self.name(whole, &plan.key).map_err(internal)?;
        fs::remove_dir_all(folder).map_err(internal)?;
        Ok(etag)
    }

    /// Forgets an upload with its parts.
    pub(super) fn abort(&self, place: (&str, &str)) -> S3Result<()> {
        let (folder, _) = self.upload(place)?;
        fs::remove_dir_all(folder).map_err(internal)
    }

    /// The folder of the upload of that key and id.
    fn upload(&self, (key, id): (&str, &str)) -> S3Result<(PathBuf, Plan)> {
        let ours = id.len() == ID_LEN && id.bytes().all(|b| b.is_ascii_alphanumeric());
        let folder = self.uploads.join(id);
        let plan = ours.then(|| fs::read(folder.join(PLAN)).ok()).flatten();
        let plan: Option<Plan> = plan.and_then(|text| serde_json::from_slice(&text).ok());
        match plan {
            Some(plan) if plan.key == key => Ok((folder, plan)),
            _ => Err(s3_error!(NoSuchUpload)),
        }
    }
}

fn part_path(folder: &Path, number: i32) -> PathBuf {
    folder.join(format!("{number:05}"))
}

fn check_lens(lens: &[u64], rules: Rules) -> S3Result<()> {
    let Some((_, all_but_last)) = lens.split_last() else {
        return Err(s3_error!(MalformedXML, "An upload needs a part"));
    };
    if all_but_last.iter().any(|len| *len < MIN_PART_LEN) {
        return Err(s3_error!(EntityTooSmall));
    }
    let unequal = all_but_last.iter().any(|len| *len != lens[0]) || lens.last() > lens.first();
    if rules == Rules::R2 && unequal {
        let message = "All non-trailing parts must have the same length";
        return Err(S3Error::with_message(S3ErrorCode::InvalidPart, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_equal_at_r2_and_large_everywhere() {
        let mib = |sizes: &[u64]| sizes.iter().map(|n| n << 20).collect::<Vec<_>>();
        for (sizes, s3, r2) in [
            (vec![1], true, true),
            (vec![5, 5, 1], true, true),
            (vec![5, 5, 5], true, true),
            (vec![5, 6, 1], true, false),
            (vec![5, 5, 6], true, false),
            (vec![4, 4], false, false),
            (vec![], false, false),
        ] {
            assert_eq!(check_lens(&mib(&sizes), Rules::S3).is_ok(), s3, "{sizes:?}");
            assert_eq!(check_lens(&mib(&sizes), Rules::R2).is_ok(), r2, "{sizes:?}");
        }
    }
}
