//! Where weights come from: files of hub repositories at a pinned revision, or a seed.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};

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
        files.iter().filter(move |files| files.speakers.is_none_or(|n| n == speakers))
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

/// Files of one hub repository.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepoFiles {
    /// `owner/name`.
    #[serde(deserialize_with = "repo")]
    pub repo: String,
    /// The commit, 40 hexadecimal digits.
    #[serde(deserialize_with = "commit")]
    pub revision: Learned<String>,
    /// Where the commit is looked up while it is not known.
    #[serde(default = "main_branch")]
    pub branch: String,
    /// For how many persons the files are; `None` = for any number.
    #[serde(default, deserialize_with = "speakers")]
    pub speakers: Option<usize>,
    /// The files, none besides.
    #[serde(deserialize_with = "some_files")]
    pub files: Vec<FileSpec>,
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
    let is_hex = text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match text.as_str() {
        "learn" => Ok(Learned::Learn),
        _ if is_hex => Ok(Learned::Known(text)),
        _ => Err(D::Error::custom(format!(
            "`{what}` is {text:?}, expected {digits} hexadecimal digits or \"learn\""
        ))),
    }
}

fn commit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Learned<String>, D::Error> {
    hex(deserializer, "revision", 40)
}

fn sha256<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Learned<String>, D::Error> {
    hex(deserializer, "sha256", 64)
}

fn repo<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let is_name = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    match text.split_once('/') {
        Some((owner, name)) if is_name(owner) && is_name(name) => Ok(text),
        _ => Err(D::Error::custom(format!("`repo` is {text:?}, expected owner/name"))),
    }
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let is_safe =
        text.split('/').all(|part| !matches!(part, "" | "." | "..")) && !text.contains(['\\', '\0', ':']);
    if is_safe {
        Ok(text)
    } else {
        Err(D::Error::custom(format!("`path` is {text:?}, expected a relative path")))
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

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = |text: &str| text.strip_prefix("random:")?.parse().ok().map(Self::Random);
        deserializer.deserialize_any(WordOr::new(
            "\"random:<seed>\" or files of repositories",
            word,
            Self::Files,
        ))
    }
}

impl<'de> Deserialize<'de> for TokenizerSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = |text: &str| (text == "bytes").then_some(Self::Bytes);
        deserializer.deserialize_any(WordOr::new("\"bytes\" or files of repositories", word, Self::Files))
    }
}

/// Visits a string, which `word` understands, or a list of files.
struct WordOr<W, T> {
    expecting: &'static str,
    word: W,
    files: fn(Vec<RepoFiles>) -> T,
    result: PhantomData<T>,
}

impl<W, T> WordOr<W, T> {
    fn new(expecting: &'static str, word: W, files: fn(Vec<RepoFiles>) -> T) -> Self {
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
