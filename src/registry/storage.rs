//! Where the files of hub repositories lie on this machine, and what has been verified of them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{FileSpec, RepoFiles};
use crate::{Error, ErrorKind, Result};

/// A folder of model files: `<root>/<repo>/<path>`, but for files that were found elsewhere, as in a cache of the hub's
/// own tools. What was verified of a file stands in its [`Receipt`] at `<root>/<repo>/<path>.receipt.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelStorage {
    root: PathBuf,
    elsewhere: BTreeMap<(String, String), PathBuf>,
}

/// What a file was when it was verified: its facts are enforced from then on, and while length and modification time
/// are the same it is not read again to be checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The commit that the file was fetched at, 40 hexadecimal digits.
    pub revision: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256 of the bytes, 64 hexadecimal digits.
    pub sha256: String,
    /// When the verified file was last changed, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

impl ModelStorage {
    /// The files below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), elsewhere: BTreeMap::new() }
    }

    /// The same, but file `path` of `repo` lies at `place`.
    pub fn with_place(mut self, repo: &str, path: &str, place: impl Into<PathBuf>) -> Self {
        self.elsewhere.insert((repo.to_owned(), path.to_owned()), place.into());
        self
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where `file` of `repo` lies, or will lie.
    pub fn path(&self, repo: &RepoFiles, file: &FileSpec) -> PathBuf {
        let elsewhere = self.elsewhere.get(&(repo.repo.clone(), file.path.clone()));
        elsewhere.cloned().unwrap_or_else(|| self.own_path(repo, file))
    }

    /// Where the files of `repos` lie, in order.
    pub fn paths<'a>(
        &'a self,
        repos: impl IntoIterator<Item = &'a RepoFiles> + 'a,
    ) -> impl Iterator<Item = PathBuf> + 'a {
        repos.into_iter().flat_map(move |repo| repo.files.iter().map(move |file| self.path(repo, file)))
    }

    /// What was verified of `file`; `None` if nothing was.
    ///
    /// # Errors
    /// `ModelCorrupt` naming a receipt that cannot be read.
    pub fn receipt(&self, repo: &RepoFiles, file: &FileSpec) -> Result<Option<Receipt>> {
        let path = self.receipt_path(repo, file);
        let unreadable = |e: &dyn std::fmt::Display| {
            Error::new(ErrorKind::ModelCorrupt, format!("receipt {}: {e}", path.display()))
                .with_hint("delete it, and run `handler prefetch --verify`")
        };
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| unreadable(&e).with_source(e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unreadable(&e).with_source(e)),
        }
    }

    /// Where the receipt of `file` lies, or will lie.
    pub fn receipt_path(&self, repo: &RepoFiles, file: &FileSpec) -> PathBuf {
        let mut path = self.own_path(repo, file).into_os_string();
        path.push(".receipt.json");
        path.into()
    }

    fn own_path(&self, repo: &RepoFiles, file: &FileSpec) -> PathBuf {
        self.root.join(&repo.repo).join(&file.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Learned;

    fn repo() -> RepoFiles {
        RepoFiles {
            repo: "owner/name".into(),
            revision: Learned::Learn,
            branch: "main".into(),
            speakers: None,
            files: ["a/b.safetensors", "c.pth"]
                .map(|path| FileSpec { path: path.into(), size: Learned::Learn, sha256: Learned::Learn })
                .into(),
        }
    }

    #[test]
    fn files_lie_by_repository_unless_they_were_found_elsewhere() {
        let storage = ModelStorage::at("/m").with_place("owner/name", "c.pth", "/cache/blob");
        let paths: Vec<_> = storage.paths([&repo()]).collect();
        assert_eq!(paths, [PathBuf::from("/m/owner/name/a/b.safetensors"), "/cache/blob".into()]);
        let receipt = storage.receipt_path(&repo(), &repo().files[1]);
        assert_eq!(receipt, Path::new("/m/owner/name/c.pth.receipt.json"));
    }

    #[test]
    fn a_receipt_is_read_back_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let storage = ModelStorage::at(dir.path());
        let (repo, receipt) =
            (repo(), Receipt { revision: "r".into(), size: 1, sha256: "s".into(), mtime_ns: 2 });
        assert_eq!(storage.receipt(&repo, &repo.files[1]).unwrap(), None);
        let path = storage.receipt_path(&repo, &repo.files[1]);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, serde_json::to_vec(&receipt).unwrap()).unwrap();
        assert_eq!(storage.receipt(&repo, &repo.files[1]).unwrap(), Some(receipt));
        fs::write(&path, "{").unwrap();
        let error = storage.receipt(&repo, &repo.files[1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ModelCorrupt);
        assert!(error.to_string().contains("c.pth.receipt.json"), "{error}");
    }
}
