//! What of a model lies on this machine already, and what is known of each file: from the registry, from receipts,
//! from the caches of the hub's own tools.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use talkie::registry::{FileSpec, Learned, ModelStorage, Receipt, RepoFiles};

use super::hashes::Hash;
use crate::part_file::PartFile;

/// A file that a model lists.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) repo: RepoFiles,
    pub(super) file: FileSpec,
}

impl Wanted {
    /// The files of `repos`, each once.
    pub(super) fn list<'a>(repos: impl IntoIterator<Item = &'a RepoFiles>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for repo in repos {
            for file in &repo.files {
                if !all.iter().any(|known| known.repo.repo == repo.repo && known.file.path == file.path) {
                    all.push(Self { repo: repo.clone(), file: file.clone() });
                }
            }
        }
        all
    }

    /// `owner/name/path`, for people.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.repo.repo, self.file.path)
    }

    /// Whether a file that was verified as `receipt` says is the one that the registry lists; `None` where the
    /// registry has moved to another commit and does not say what the file is there.
    fn accepts(&self, receipt: &Receipt) -> Option<bool> {
        let fits = |known: Option<bool>| known.unwrap_or(true);
        if !fits(self.file.size.known().map(|size| *size == receipt.size)) {
            return Some(false);
        }
        match self.file.sha256.known() {
            Some(sha256) => Some(*sha256 == receipt.sha256),
            None => {
                fits(self.repo.revision.known().map(|commit| *commit == receipt.revision)).then_some(true)
            }
        }
    }
}

/// Where a wanted file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// There, and verified.
    Ready(Found),
    /// There, but not verified; it should have this hash, if that is known.
    Unverified(Found, Option<Hash>),
    /// Not there, or another file.
    Missing,
}

/// A file on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) mtime_ns: i64,
    /// Whether it is a cache's, and nothing of it may be changed.
    pub(super) in_cache: bool,
    /// The commit, where the place says it.
    pub(super) commit: Option<String>,
}

impl Found {
    /// The file at `path`; `None` where there is none.
    pub(super) fn at(path: PathBuf) -> Option<Self> {
        let metadata = fs::metadata(&path).ok().filter(Metadata::is_file)?;
        let (size, mtime_ns) = (metadata.len(), mtime_ns(&metadata));
        Some(Self { path, size, mtime_ns, in_cache: false, commit: None })
    }
}

/// Writes a receipt, whole or not at all.
pub(super) fn write_receipt(path: &Path, receipt: &Receipt) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let part = PartFile::create(path)?;
    fs::write(part.path(), serde_json::to_vec(receipt)?)?;
    part.publish()
}

/// When a file was last changed, in nanoseconds since 1970.
fn mtime_ns(metadata: &Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Looks for files.
#[derive(Clone, Debug)]
pub(super) struct Surveyor {
    pub(super) storage: ModelStorage,
    pub(super) caches: Vec<PathBuf>,
}

impl Surveyor {
    /// Where each of `wanted` is. With `deep`, no receipt is believed.
    pub(super) fn survey(&self, wanted: &[Wanted], deep: bool) -> Vec<State> {
        let mut learned = BTreeMap::new();
        let mut look = |wanted| match self.look(wanted, &mut learned) {
            State::Ready(found) if deep => State::Unverified(found, self.expected(wanted)),
            state => state,
        };
        wanted.iter().map(&mut look).collect()
    }

    /// The storage, with the places of what was found elsewhere.
    pub(super) fn with_places(&self, wanted: &[Wanted], states: &[State]) -> ModelStorage {
        let mut storage = self.storage.clone();
        for (wanted, state) in wanted.iter().zip(states) {
            if let State::Ready(found) | State::Unverified(found, _) = state
                && found.in_cache
            {
                storage = storage.with_place(&wanted.repo.repo, &wanted.file.path, &found.path);
            }
        }
        storage
    }

    /// Where `wanted` lies, or belongs, in the storage itself.
    pub(super) fn own_path(&self, wanted: &Wanted) -> PathBuf {
        self.storage.path(&wanted.repo, &wanted.file)
    }

    /// A receipt that cannot be read is none: the file is read again and gets a new one.
    pub(super) fn receipt(&self, wanted: &Wanted) -> Option<Receipt> {
        self.storage.receipt(&wanted.repo, &wanted.file).unwrap_or_else(|e| {
            tracing::warn!("{e}");
            None
        })
    }

    /// The hash that the file has to have, as far as it is known here.
    pub(super) fn expected(&self, wanted: &Wanted) -> Option<Hash> {
        let known = wanted.file.sha256.known().cloned();
        let learned = || self.receipt(wanted).filter(|r| wanted.accepts(r) == Some(true)).map(|r| r.sha256);
        known.or_else(learned).map(Hash::Sha256)
    }

    /// The commit at which files of `repo` have been learned.
    pub(super) fn learned_revision(&self, repo: &str) -> Option<String> {
        let mut newest: Option<(i64, String)> = None;
        let mut folders = vec![self.storage.root().join(repo)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(metadata) = entry.metadata() else { continue };
                if metadata.is_dir() {
                    folders.push(path);
                } else if path.to_str().is_some_and(|name| name.ends_with(".receipt.json")) {
                    let read =
                        fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Receipt>(&text).ok());
                    let known = read.map(|receipt| (mtime_ns(&metadata), receipt.revision));
                    newest = newest.max(known.filter(|(_, revision)| !revision.is_empty()));
                }
            }
        }
        newest.map(|(_, revision)| revision)
    }

    /// Where `wanted` is; `learned` are the commits of repositories that were looked up.
    fn look(&self, wanted: &Wanted, learned: &mut BTreeMap<String, Option<String>>) -> State {
        let receipt = self.receipt(wanted);
        let own = Found::at(self.own_path(wanted)).map(|found| self.judge(wanted, receipt.as_ref(), found));
        if let Some(state) = own.filter(|state| *state != State::Missing) {
            return state;
        }
        let repo = &wanted.repo.repo;
        let learned = learned.entry(repo.clone()).or_insert_with(|| self.learned_revision(repo));
        let found = self.in_caches(wanted, learned.as_deref());
        found.map_or(State::Missing, |found| self.judge(wanted, receipt.as_ref(), found))
    }

    fn judge(&self, wanted: &Wanted, receipt: Option<&Receipt>, found: Found) -> State {
        if wanted.file.size.known().is_some_and(|size| *size != found.size) {
            return State::Missing;
        }
        let accepted = receipt.and_then(|receipt| wanted.accepts(receipt));
        match receipt {
            Some(receipt) if (receipt.size, receipt.mtime_ns) == (found.size, found.mtime_ns) => {
                match accepted {
                    Some(true) => State::Ready(found),
                    Some(false) => State::Missing,
                    // The hub knows whether it is the same file at the new commit.
                    None => State::Unverified(found, None),
                }
            }
            _ => {
                let named = || found.in_cache.then(|| blob_hash(&found.path)).flatten();
                let expected = self.expected(wanted).or_else(named);
                State::Unverified(found, expected)
            }
        }
    }

    /// `models--owner--name/snapshots/<commit>/<path>` in the first cache that has it.
    fn in_caches(&self, wanted: &Wanted, learned: Option<&str>) -> Option<Found> {
        self.caches.iter().find_map(|cache| {
            let folder = cache.join(format!("models--{}", wanted.repo.repo.replace('/', "--")));
            let commit = match &wanted.repo.revision {
                Learned::Known(commit) => commit.clone(),
                Learned::Learn => match learned {
                    Some(commit) => commit.to_string(),
                    None => {
                        let name = fs::read_to_string(folder.join("refs").join(&wanted.repo.branch)).ok()?;
                        name.trim().to_string()
                    }
                },
            };
            // A branch that leads elsewhere than to a commit leads nowhere.
            if commit.len() != 40 || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            let found = Found::at(folder.join("snapshots").join(&commit).join(&wanted.file.path))?;
            Some(Found { in_cache: true, commit: Some(commit), ..found })
        })
    }
}

/// The hash that a cache has named a file by.
fn blob_hash(path: &Path) -> Option<Hash> {
    Hash::from_etag(fs::canonicalize(path).ok()?.file_name()?.to_str()?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    const OTHER: &str = "1123456789abcdef0123456789abcdef01234567";
    const HASH: &str = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae";

    struct Bench {
        dir: TempDir,
        surveyor: Surveyor,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let surveyor = Surveyor {
                storage: ModelStorage::at(dir.path().join("m")),
                caches: vec![dir.path().join("none"), dir.path().join("cache")],
            };
            Self { dir, surveyor }
        }

        fn write(&self, path: &str, bytes: &str) -> PathBuf {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        }

        fn receipt(&self, revision: &str, sha256: &str) {
            let found = Found::at(self.dir.path().join("m/o/n/w")).unwrap();
            let receipt = Receipt {
                revision: revision.into(),
                size: found.size,
                sha256: sha256.into(),
                mtime_ns: found.mtime_ns,
            };
            self.write("m/o/n/w.receipt.json", &serde_json::to_string(&receipt).unwrap());
        }

        fn state(&self, wanted: &Wanted) -> State {
            self.surveyor.survey(std::slice::from_ref(wanted), false).remove(0)
        }
    }

    fn wanted(change: impl Fn(&mut Wanted)) -> Wanted {
        let file = FileSpec { path: "w".into(), size: Learned::Learn, sha256: Learned::Learn };
        let mut wanted = Wanted {
            repo: RepoFiles {
                repo: "o/n".into(),
                revision: Learned::Learn,
                branch: "main".into(),
                speakers: None,
                files: vec![file.clone()],
            },
            file,
        };
        change(&mut wanted);
        wanted
    }

    #[test]
    fn a_receipt_is_believed_while_the_file_is_as_it_was() {
        let bench = Bench::new();
        let plain = wanted(|_| {});
        assert_eq!(bench.state(&plain), State::Missing);
        let path = bench.write("m/o/n/w", "foo");
        assert!(matches!(bench.state(&plain), State::Unverified(_, None)));
        bench.receipt(COMMIT, HASH);
        assert!(matches!(bench.state(&plain), State::Ready(_)));
        assert!(matches!(
            bench.surveyor.survey(std::slice::from_ref(&plain), true)[0],
            State::Unverified(_, Some(_))
        ));
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(
            matches!(bench.state(&plain), State::Unverified(_, Some(Hash::Sha256(hash))) if hash == HASH)
        );
        bench.write("m/o/n/w.receipt.json", "{");
        assert!(matches!(bench.state(&plain), State::Unverified(_, None)), "a damaged receipt is none");
    }

    #[test]
    fn the_registry_overrules_a_receipt() {
        let bench = Bench::new();
        bench.write("m/o/n/w", "foo");
        bench.receipt(COMMIT, HASH);
        let pinned = |commit: &str| wanted(|w| w.repo.revision = Learned::Known(commit.into()));
        assert!(matches!(bench.state(&pinned(COMMIT)), State::Ready(_)));
        assert!(matches!(bench.state(&pinned(OTHER)), State::Unverified(_, None)), "the hub has to say");
        let hashed = |hash: &str| {
            wanted(|w| {
                w.file.sha256 = Learned::Known(hash.into());
                w.repo.revision = Learned::Known(OTHER.into());
            })
        };
        assert!(matches!(bench.state(&hashed(HASH)), State::Ready(_)), "the same bytes at any commit");
        assert_eq!(bench.state(&hashed(&"0".repeat(64))), State::Missing);
        assert_eq!(bench.state(&wanted(|w| w.file.size = Learned::Known(4))), State::Missing);
    }

    #[test]
    fn caches_of_the_hubs_tools_are_read_by_commit_and_by_branch() {
        let bench = Bench::new();
        let blob = bench.write(&format!("cache/models--o--n/blobs/{HASH}"), "foo");
        let folder = bench.dir.path().join("cache/models--o--n/snapshots").join(COMMIT);
        fs::create_dir_all(&folder).unwrap();
        symlink(&blob, folder.join("w")).unwrap();
        let by_branch = wanted(|w| w.repo.branch = "refs/pr/1".into());
        assert_eq!(bench.state(&by_branch), State::Missing, "the branch is not known");
        bench.write("cache/models--o--n/refs/refs/pr/1", &format!("{COMMIT}\n"));
        for wanted in [by_branch, wanted(|w| w.repo.revision = Learned::Known(COMMIT.into()))] {
            let State::Unverified(found, Some(Hash::Sha256(hash))) = bench.state(&wanted) else {
                panic!("it is there, and named by its hash")
            };
            assert_eq!((found.commit.as_deref(), hash.as_str(), found.in_cache), (Some(COMMIT), HASH, true));
            let states = bench.surveyor.survey(std::slice::from_ref(&wanted), false);
            let storage = bench.surveyor.with_places(std::slice::from_ref(&wanted), &states);
            assert_eq!(storage.path(&wanted.repo, &wanted.file), folder.join("w"));
        }
        bench.write("cache/models--o--n/refs/main", "../../../x");
        assert_eq!(bench.state(&wanted(|_| {})), State::Missing);
    }
}
