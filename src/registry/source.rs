//! Where weights come from: files of hub repositories at a pinned revision, or a seed.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use toml::Spanned;

use super::storage::ModelStorage;

/// What an address of the hub starts with.
const HUB: &str = "hf://";

/// Where the weights of a network come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Files, all of them together.
    Files(Vec<RepoFiles>),
    /// Drawn from this seed; written `"random:<seed>"`.
    Random(u64),
}

impl Source {
    /// The files that are needed for `speakers` persons; none where weights are drawn.
    pub fn files(&self, speakers: usize) -> impl Iterator<Item = &RepoFiles> {
        let files = match self {
            Self::Files(files) => files.as_slice(),
            Self::Random(_) => &[],
        };
        files.iter().filter(move |files| files.is_for(speakers))
    }
}

/// How text becomes token ids.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerSource {
    /// One id per byte; written `"bytes"`.
    Bytes,
    /// A `tokenizer.json`.
    Files(Vec<RepoFiles>),
}

/// Files of one hub repository; one file may be written as `"hf://owner/name[@commit]/path"`.
#[derive(Clone, Debug, PartialEq)]
pub struct RepoFiles {
    /// `owner/name`.
    pub repo: String,
    /// The commit, 40 hexadecimal digits.
    pub revision: Learned<String>,
    /// Where the commit is looked up while it is not known.
    pub branch: String,
    /// For how many persons the files are; `None` = for any number.
    pub speakers: Option<usize>,
    /// The files, none besides.
    pub files: Vec<FileSpec>,
}

impl RepoFiles {
    /// Whether the files are needed for `speakers` persons.
    pub(super) fn is_for(&self, speakers: usize) -> bool {
        self.speakers.is_none_or(|n| n == speakers)
    }
}

/// Where files lie that `handler prepare` has made of a model's own.
#[derive(Clone, Debug, PartialEq)]
pub enum Prepared {
    /// A folder, below the storage unless the path is absolute.
    Folder(PathBuf),
    /// The root of a repository, of which the files below have learned sizes and hashes; written
    /// `"hf://owner/name[@commit]"`.
    Repo {
        /// `owner/name`.
        repo: String,
        /// The commit, 40 hexadecimal digits.
        revision: Learned<String>,
    },
}

impl Prepared {
    /// The folder in which they lie, or will lie.
    pub fn folder(&self, storage: &ModelStorage) -> PathBuf {
        match self {
            Self::Folder(folder) => storage.root().join(folder),
            Self::Repo { repo, .. } => storage.root().join(repo),
        }
    }

    /// The files called `names` as they can be fetched; `None` where they can only be made.
    pub fn files(&self, names: &[String]) -> Option<RepoFiles> {
        let Self::Repo { repo, revision } = self else { return None };
        let learned =
            |name: &String| FileSpec { path: name.clone(), size: Learned::Learn, sha256: Learned::Learn };
        Some(RepoFiles {
            repo: repo.clone(),
            revision: revision.clone(),
            branch: main_branch(),
            speakers: None,
            files: names.iter().map(learned).collect(),
        })
    }
}

/// One file of a repository.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Relative to the repository, with forward slashes.
    #[serde(deserialize_with = "path")]
    pub path: String,
    /// Length in bytes.
    pub size: Learned<u64>,
    /// SHA-256 of the bytes, 64 hexadecimal digits.
    #[serde(deserialize_with = "sha256")]
    pub sha256: Learned<String>,
}

/// A fact about a file that is written down, or `"learn"`: taken from the hub at the first download and enforced from
/// then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned<T> {
    /// Written down.
    Known(T),
    /// Not known yet.
    Learn,
}

impl<T> Learned<T> {
    /// The fact, if it is known.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Learn => None,
        }
    }
}

impl<'de> Deserialize<'de> for Learned<u64> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = Learned<u64>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number of bytes or \"learn\"")
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
                let value = u64::try_from(value).ok().filter(|n| *n > 0);
                value
                    .map(Learned::Known)
                    .ok_or_else(|| E::custom("expected a positive number of bytes or \"learn\""))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
                match value {
                    "learn" => Ok(Learned::Learn),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(Size)
    }
}

/// `digits` lower-case hexadecimal digits, or "learn".
fn hex<'de, D: Deserializer<'de>>(
    deserializer: D,
    what: &str,
    digits: usize,
) -> Result<Learned<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.as_str() {
        "learn" => Ok(Learned::Learn),
        _ if is_hex(&text, digits) => Ok(Learned::Known(text)),
        _ => Err(D::Error::custom(format!(
            "`{what}` is {text:?}, expected {digits} hexadecimal digits or \"learn\""
        ))),
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn commit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Learned<String>, D::Error> {
    hex(deserializer, "revision", 40)
}

fn sha256<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Learned<String>, D::Error> {
    hex(deserializer, "sha256", 64)
}

fn repo<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if is_repo(&text) {
        Ok(text)
    } else {
        Err(D::Error::custom(format!("`repo` is {text:?}, expected owner/name")))
    }
}

fn is_repo(text: &str) -> bool {
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if is_safe(&text) {
        Ok(text)
    } else {
        Err(D::Error::custom(format!("`path` is {text:?}, expected a relative path")))
    }
}

/// Whether `path` stays inside of the folder that it is relative to.
fn is_safe(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains(['\\', '\0', ':'])
}

fn branch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if is_safe(&text) {
        Ok(text)
    } else {
        Err(D::Error::custom(format!("`branch` is {text:?}, expected the name of a branch")))
    }
}

/// An address of the hub, taken apart.
struct Address {
    repo: String,
    revision: Learned<String>,
    /// Empty for the repository itself.
    path: String,
}

impl Address {
    /// `hf://owner/name[@commit][/path]`; `None` for other text.
    fn parse<E: serde::de::Error>(text: &str) -> Option<Result<Self, E>> {
        let rest = text.strip_prefix(HUB)?;
        let mut parts = rest.splitn(3, '/');
        let (owner, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (name, None),
        };
        let repo = format!("{owner}/{name}");
        let path = parts.next().unwrap_or_default().to_owned();
        let revision = match revision {
            None => Learned::Learn,
            Some(commit) if is_hex(commit, 40) => Learned::Known(commit.to_owned()),
            Some(moving) => {
                return Some(Err(E::custom(format!(
                    "the revision of {text:?} is {moving:?}, expected 40 hexadecimal digits, or none to learn it"
                ))));
            }
        };
        if !is_repo(&repo) || !(path.is_empty() || is_safe(&path)) {
            return Some(Err(E::custom(format!("{text:?}, expected {HUB}owner/name[@commit]/path"))));
        }
        Some(Ok(Self { repo, revision, path }))
    }
}

fn speakers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    match usize::deserialize(deserializer)? {
        n @ 1..=2 => Ok(Some(n)),
        n => Err(D::Error::custom(format!("`speakers` is {n}, expected 1 or 2"))),
    }
}

fn some_files<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<FileSpec>, D::Error> {
    let files = Vec::deserialize(deserializer)?;
    if files.is_empty() {
        Err(D::Error::custom("`files` is empty, expected at least one"))
    } else {
        Ok(files)
    }
}

fn main_branch() -> String {
    "main".to_owned()
}

impl<'de> Deserialize<'de> for RepoFiles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RepoFilesVisitor)
    }
}

struct RepoFilesVisitor;

impl<'de> Visitor<'de> for RepoFilesVisitor {
    type Value = RepoFiles;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a table of `repo`, `revision` and `files`, or \"{HUB}owner/name[@commit]/path\"")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<RepoFiles, E> {
        let address = match Address::parse(value) {
            Some(address) => address?,
            None => return Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
        };
        if address.path.is_empty() {
            return Err(E::custom(format!(
                "{value:?} names no file, expected {HUB}owner/name[@commit]/path"
            )));
        }
        let file = FileSpec { path: address.path, size: Learned::Learn, sha256: Learned::Learn };
        Ok(RepoFiles {
            repo: address.repo,
            revision: address.revision,
            branch: main_branch(),
            speakers: None,
            files: vec![file],
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RepoFiles, A::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            #[serde(deserialize_with = "repo")]
            repo: String,
            #[serde(deserialize_with = "commit")]
            revision: Learned<String>,
            #[serde(default = "main_branch", deserialize_with = "branch")]
            branch: String,
            #[serde(default, deserialize_with = "speakers")]
            speakers: Option<usize>,
            #[serde(deserialize_with = "some_files")]
            files: Vec<FileSpec>,
        }
        let Table { repo, revision, branch, speakers, files } =
            Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(RepoFiles { repo, revision, branch, speakers, files })
    }
}

impl<'de> Deserialize<'de> for Prepared {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match Address::parse(&text) {
            Some(address) => match address? {
                Address { repo, revision, path } if path.is_empty() => Ok(Self::Repo { repo, revision }),
                _ => Err(D::Error::custom(format!(
                    "`prepared` is {text:?}, expected {HUB}owner/name[@commit]"
                ))),
            },
            None if is_safe(text.strip_prefix('/').unwrap_or(&text)) => Ok(Self::Folder(text.into())),
            None => {
                Err(D::Error::custom(format!("`prepared` is {text:?}, expected a folder or {HUB}owner/name")))
            }
        }
    }
}

/// A [`Source`] as written: an error can name the line of each entry.
#[derive(Clone)]
pub(super) enum RawSource {
    Random(u64),
    Files(Vec<Spanned<RepoFiles>>),
}

impl RawSource {
    pub(super) fn entries(&self) -> &[Spanned<RepoFiles>] {
        match self {
            Self::Random(_) => &[],
            Self::Files(entries) => entries,
        }
    }
}

impl From<&RawSource> for Source {
    fn from(raw: &RawSource) -> Self {
        match raw {
            RawSource::Random(seed) => Self::Random(*seed),
            RawSource::Files(entries) => Self::Files(plain(entries)),
        }
    }
}

/// The entries without their places.
pub(super) fn plain(entries: &[Spanned<RepoFiles>]) -> Vec<RepoFiles> {
    entries.iter().map(|entry| entry.get_ref().clone()).collect()
}

/// A [`TokenizerSource`] as written.
#[derive(Clone)]
pub(super) enum RawTokenizer {
    Bytes,
    Files(Vec<Spanned<RepoFiles>>),
}

impl RawTokenizer {
    pub(super) fn entries(&self) -> &[Spanned<RepoFiles>] {
        match self {
            Self::Bytes => &[],
            Self::Files(entries) => entries,
        }
    }
}

impl From<&RawTokenizer> for TokenizerSource {
    fn from(raw: &RawTokenizer) -> Self {
        match raw {
            RawTokenizer::Bytes => Self::Bytes,
            RawTokenizer::Files(entries) => Self::Files(plain(entries)),
        }
    }
}

impl<'de> Deserialize<'de> for RawSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = |text: &str| text.strip_prefix("random:")?.parse().ok().map(Self::Random);
        deserializer.deserialize_any(WordOr::new(
            "\"random:<seed>\" or files of repositories",
            word,
            Self::Files,
        ))
    }
}

impl<'de> Deserialize<'de> for RawTokenizer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = |text: &str| (text == "bytes").then_some(Self::Bytes);
        deserializer.deserialize_any(WordOr::new("\"bytes\" or files of repositories", word, Self::Files))
    }
}

/// Visits a string, which `word` understands, or a list of files.
struct WordOr<W, T> {
    expecting: &'static str,
    word: W,
    files: fn(Vec<Spanned<RepoFiles>>) -> T,
    result: PhantomData<T>,
}

impl<W, T> WordOr<W, T> {
    fn new(expecting: &'static str, word: W, files: fn(Vec<Spanned<RepoFiles>>) -> T) -> Self {
        Self { expecting, word, files, result: PhantomData }
    }
}

impl<'de, W: Fn(&str) -> Option<T>, T> Visitor<'de> for WordOr<W, T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<T, E> {
        (self.word)(value).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(value), &self))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<T, A::Error> {
        let files = Vec::deserialize(SeqAccessDeserializer::new(seq))?;
        if files.is_empty() {
            return Err(A::Error::custom(format!("there is no file, expected {}", self.expecting)));
        }
        Ok((self.files)(files))
    }
}
