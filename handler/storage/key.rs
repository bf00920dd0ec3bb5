//! Object keys. A key says when its object has to go, so that the sweeper needs no database: keys of one
//! prefix sort by their expiry.

use rand::distr::{Alphanumeric, SampleString};

use crate::job::{Code, JobError};

/// The first part of a key where the request names none.
pub const DEFAULT_PREFIX: &str = "videos";
/// What stands between a key's prefix and its expiry. A prefix of a request cannot hold it, since `=` is not
/// among the characters that a prefix may have.
pub(super) const EXPIRY_MARK: &str = "/e=";
/// 62^22 > 2^128: nobody guesses a key.
const RANDOM_LEN: usize = 22;
/// Ten digits hold the years 2001 to 2286.
const EXPIRY_DIGITS: usize = 10;
/// With the rest of a key this stays far below the 1024 bytes that S3 allows.
const MAX_PREFIX_LEN: usize = 512;
const MAX_JOB_LEN: usize = 128;

/// One of the objects that a job leaves behind. They differ in the end of their key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The MP4.
    Video,
    /// The JPEG of its first frame.
    Thumbnail,
    /// What it was made of, as JSON.
    Manifest,
}

impl Part {
    const ALL: [Self; 3] = [Self::Video, Self::Thumbnail, Self::Manifest];

    /// The end of the key, with its dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Video => ".mp4",
            Self::Thumbnail => ".jpg",
            Self::Manifest => ".json",
        }
    }

    /// The media type of the object.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Video => "video/mp4",
            Self::Thumbnail => "image/jpeg",
            Self::Manifest => "application/json",
        }
    }
}

/// What the keys of one job share: `<prefix>/e=<expiry>/<job>-<random>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectKey {
    prefix: String,
    expiry: u64,
    name: String,
}

impl ObjectKey {
    /// A new key below `prefix` for objects that may be deleted from `expiry` on, in seconds since 1970. No
    /// two calls return the same key.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] for a prefix that is not plain segments; [`Code::Internal`] for an expiry
    /// outside the years 2001 to 2286, which only a broken clock gives.
    pub fn new(prefix: Option<&str>, expiry: u64, job: &str) -> Result<Self, JobError> {
        let prefix = prefix.unwrap_or(DEFAULT_PREFIX).trim_matches('/');
        check_prefix(prefix)?;
        if expiry.to_string().len() != EXPIRY_DIGITS {
            let message =
                format!("an object would expire at {expiry}, expected {EXPIRY_DIGITS} digits of seconds");
            return Err(JobError::new(Code::Internal, message).with_hint("set the clock of this machine"));
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
        let job: String = job.chars().map(plain).take(MAX_JOB_LEN).collect();
        // A leading dot would make a hidden file where a store keeps objects as files.
        let job = if job.is_empty() || job.starts_with('.') { format!("job{job}") } else { job };
        let random = Alphanumeric.sample_string(&mut rand::rng(), RANDOM_LEN);
        Ok(Self { prefix: prefix.to_string(), expiry, name: format!("{job}-{random}") })
    }

    /// The key that `text` is, with what it holds. Anything that [`ObjectKey::new`] would not have made is
    /// somebody else's object.
    pub fn parse(text: &str) -> Option<(Self, Part)> {
        let (prefix, rest) = text.split_once(EXPIRY_MARK)?;
        let (expiry, file) = rest.split_once('/')?;
        let part = Part::ALL.into_iter().find(|part| file.ends_with(part.extension()))?;
        let name = &file[..file.len() - part.extension().len()];
        let (job, random) = name.rsplit_once('-')?;
        let digits = expiry.len() == EXPIRY_DIGITS && expiry.bytes().all(|b| b.is_ascii_digit());
        let expiry = expiry.parse().ok().filter(|_| digits && !expiry.starts_with('0'))?;
        let ours = is_prefix(prefix)
            && is_segment(job)
            && job.len() <= MAX_JOB_LEN + "job".len()
            && random.len() == RANDOM_LEN
            && random.bytes().all(|b| b.is_ascii_alphanumeric());
        ours.then(|| (Self { prefix: prefix.to_string(), expiry, name: name.to_string() }, part))
    }

    /// The key of `part`.
    pub fn of(&self, part: Part) -> String {
        format!("{}{EXPIRY_MARK}{}/{}{}", self.prefix, self.expiry, self.name, part.extension())
    }

    /// From when on the objects may be deleted, in seconds since 1970.
    pub fn expiry(&self) -> u64 {
        self.expiry
    }

    /// The part before the expiry.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}

/// Whether keys can start with `prefix`; to be asked before a video is made.
///
/// # Errors
/// [`Code::InvalidInput`].
pub fn check_prefix(prefix: &str) -> Result<(), JobError> {
    if is_prefix(prefix.trim_matches('/')) {
        return Ok(());
    }
    let shown: String = prefix.chars().take(60).collect();
    let message = format!(
        "`output.key_prefix` is {shown:?} ({} bytes), expected segments of letters, digits, `.`, `_`, `-` with \
         `/` between, none starting with `.`, {MAX_PREFIX_LEN} bytes at most",
        prefix.len()
    );
    Err(JobError::new(Code::InvalidInput, message))
}

fn is_prefix(prefix: &str) -> bool {
    prefix.len() <= MAX_PREFIX_LEN && prefix.split('/').all(is_segment)
}

fn is_segment(segment: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !segment.is_empty() && !segment.starts_with('.') && segment.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn a_key_has_the_shape_of_the_contract() {
        let key = ObjectKey::new(None, 1_800_000_000, "job-1-u1").unwrap();
        let video = key.of(Part::Video);
        let random = video.strip_prefix("videos/e=1800000000/job-1-u1-").and_then(|r| r.strip_suffix(".mp4"));
        assert_eq!(random.map(str::len), Some(22), "{video}");
        assert_eq!(key.of(Part::Manifest), video.replace(".mp4", ".json"));
        assert_eq!(key.of(Part::Thumbnail), video.replace(".mp4", ".jpg"));
        let own = ObjectKey::new(Some("/clients/a-b/"), 1_800_000_000, "x").unwrap();
        assert!(own.of(Part::Video).starts_with("clients/a-b/e=1800000000/x-"), "{own:?}");
    }

    #[test]
    fn wrong_prefixes_and_clocks_are_refused() {
        for prefix in
            ["", "a//b", "../a", "a/../b", "a/.b", "a b", "a=b", "ä", "a\\b", "a\0", &"x".repeat(513)]
        {
            let e = ObjectKey::new(Some(prefix), 1_800_000_000, "x").unwrap_err();
            assert_eq!(e.code, Code::InvalidInput, "{prefix:?}");
        }
        for expiry in [0, 999_999_999, 10_000_000_000] {
            assert_eq!(ObjectKey::new(None, expiry, "x").unwrap_err().code, Code::Internal);
        }
    }

    /// Job ids are the platform's, so anything may stand in them.
    #[test]
    fn every_key_is_read_back_and_is_a_plain_path() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..2000 {
            let len = rng.random_range(0..200);
            let job: String = (0..len).map(|_| rng.random::<char>()).collect();
            let job = if rng.random_bool(0.3) { format!("../{job}-/e=1700000000/{job}.mp4") } else { job };
            let expiry = rng.random_range(1_000_000_000..10_000_000_000);
            let prefix = [None, Some("a"), Some("a/b-c/d.e")][rng.random_range(0..3)];
            let key = ObjectKey::new(prefix, expiry, &job).unwrap();
            for part in Part::ALL {
                let text = key.of(part);
                assert_eq!(ObjectKey::parse(&text), Some((key.clone(), part)), "{text}");
                assert!(text.len() <= 1024 && text.is_ascii(), "{text}");
                assert!(text.split('/').all(|s| !s.is_empty() && !s.starts_with('.')), "{text}");
            }
        }
    }

    /// A mutation anywhere either gives a key that is written the same way, or no key of ours.
    #[test]
    fn what_is_not_of_our_shape_is_not_ours() {
        let mut rng = StdRng::seed_from_u64(2);
        for _ in 0..5000 {
            let key = ObjectKey::new(None, 1_800_000_000, "job").unwrap();
            let mut text: Vec<char> = key.of(Part::Video).chars().collect();
            let at = rng.random_range(0..text.len());
            match rng.random_range(0..3) {
                0 => drop(text.remove(at)),
                1 => text.insert(at, rng.random::<char>()),
                _ => text[at] = rng.random::<char>(),
            }
            let text: String = text.into_iter().collect();
            if let Some((key, part)) = ObjectKey::parse(&text) {
                assert_eq!(key.of(part), text);
            }
        }
        for foreign in [
            "",
            "videos/",
            "videos/e=",
            "videos/e=1700000000/",
            "videos/e=1700000000/readme.txt",
            "videos/e=1700000000/a.mp4",
            "videos/e=1700000000/a-short.mp4",
            "videos/e=170000000/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=17000000000/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=+700000000/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=0700000000/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=1700000000/x/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=1700000000/job-abcdefghijklmnopqrstuv.mov",
            "videos/1700000000/job-abcdefghijklmnopqrstuv.mp4",
            "/e=1700000000/job-abcdefghijklmnopqrstuv.mp4",
            "videos/e=1700000000/-abcdefghijklmnopqrstuv.mp4",
        ] {
            assert_eq!(ObjectKey::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn keys_sort_by_expiry() {
        let text = |expiry| ObjectKey::new(None, expiry, "job").unwrap().of(Part::Video);
        assert!(text(1_700_000_000) < text(1_700_000_001) && text(1_999_999_999) < text(9_000_000_000));
    }

    /// Stores such as R2 take one write a second for each key; ours is written once at all.
    #[test]
    fn fault_70_no_key_is_made_twice() {
        let keys: HashSet<String> = (0..20_000)
            .map(|_| ObjectKey::new(None, 1_800_000_000, "job").unwrap().of(Part::Video))
            .collect();
        assert_eq!(keys.len(), 20_000);
    }
}
