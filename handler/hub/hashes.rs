//! Hashes of files: the two by which the hub knows them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Bytes that are read at once.
pub(super) const BLOCK_BYTES: usize = 1 << 20;

/// A hash by which a file is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    /// Of the bytes: of large files the hub tells it.
    Sha256(String),
    /// Of the bytes behind git's header: of small files the hub knows no other.
    GitBlob(String),
}

impl Hash {
    /// What a header, or a cache, calls a file by.
    pub(super) fn from_etag(etag: &str) -> Option<Self> {
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        let is_hex = etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match etag.len() {
            64 if is_hex => Some(Self::Sha256(etag.to_string())),
            40 if is_hex => Some(Self::GitBlob(etag.to_string())),
            _ => None,
        }
    }

    /// Its hexadecimal digits.
    pub(super) fn as_str(&self) -> &str {
        let (Self::Sha256(digits) | Self::GitBlob(digits)) = self;
        digits
    }

    /// Whether `other` says that it is another file.
    pub(super) fn contradicts(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other) && self != other
    }
}

/// Hashes bytes as they come.
pub(super) struct Hasher {
    sha256: Sha256,
    git: Option<Sha1>,
}

/// What bytes hash to.
#[derive(Clone, Debug)]
pub(super) struct Digests {
    pub(super) sha256: String,
    git: Option<String>,
}

impl Hasher {
    /// For a file of `size` bytes that is to have `hash`.
    pub(super) fn new(hash: &Hash, size: u64) -> Self {
        let git = matches!(hash, Hash::GitBlob(_)).then(|| {
            use sha1::Digest as _;
            Sha1::new_with_prefix(format!("blob {size}\0"))
        });
        Self { sha256: Sha256::new(), git }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(git) = &mut self.git {
            use sha1::Digest as _;
            git.update(bytes);
        }
    }

    pub(super) fn finish(self) -> Digests {
        let git = self.git.map(|git| {
            use sha1::Digest as _;
            hex::encode(git.finalize())
        });
        Digests { sha256: hex::encode(self.sha256.finalize()), git }
    }
}

impl Digests {
    /// Of the file at `path`, which is to have `hash`; `read` is told of the bytes as they are read.
    pub(super) fn of_file(path: &Path, hash: &Hash, read: impl Fn(u64)) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut hasher = Hasher::new(hash, file.metadata()?.len());
        let mut block = vec![0; BLOCK_BYTES];
        loop {
            match file.read(&mut block)? {
                0 => return Ok(hasher.finish()),
                n => {
                    hasher.update(&block[..n]);
                    read(n as u64);
                }
            }
        }
    }

    pub(super) fn are(&self, hash: &Hash) -> bool {
        match hash {
            Hash::Sha256(expected) => self.sha256 == *expected,
            Hash::GitBlob(expected) => self.git.as_ref() == Some(expected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_two_kinds_of_hash() {
        let (sha256, git) = ("a".repeat(64), "b".repeat(40));
        assert_eq!(Hash::from_etag(&format!("\"{sha256}\"")), Some(Hash::Sha256(sha256.clone())));
        assert_eq!(Hash::from_etag(&format!("W/\"{git}\"")), Some(Hash::GitBlob(git.clone())));
        assert_eq!(Hash::from_etag("\"abc-3\""), None);
        let (sha256, git) = (Hash::Sha256(sha256), Hash::GitBlob(git));
        assert!(!sha256.contradicts(&git) && !sha256.contradicts(&sha256));
        assert!(sha256.contradicts(&Hash::Sha256("c".repeat(64))));
    }

    #[test]
    fn hashes_are_those_of_sha256sum_and_git() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, "foo").unwrap();
        let sha256 = Hash::Sha256("2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae".into());
        // echo -n foo | git hash-object --stdin
        let git = Hash::GitBlob("19102815663d23f8b75a47e7a01965dcdc96468c".into());
        for hash in [&sha256, &git] {
            let digests = Digests::of_file(&path, hash, |_| {}).unwrap();
            assert!(digests.are(&sha256) && digests.are(hash));
            assert!(
                !digests.are(&Hash::Sha256("0".repeat(64))) && !digests.are(&Hash::GitBlob("0".repeat(40)))
            );
        }
    }
}
