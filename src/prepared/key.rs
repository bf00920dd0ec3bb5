//! Which weights a network has: equal keys, equal tensors.

use std::hash::{Hash, Hasher};
use std::path::PathBuf;

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// One of a model's networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// wav2vec2.
    AudioEncoder,
    /// UMT5.
    TextEncoder,
    /// CLIP.
    ImageEncoder,
    /// Wan VAE.
    Vae,
    /// The DiT with its audio adapter.
    Dit,
}

impl NetworkKind {
    /// All of them, in the order in which a generation needs them.
    pub const ALL: [Self; 5] =
        [Self::AudioEncoder, Self::TextEncoder, Self::ImageEncoder, Self::Vae, Self::Dit];

    /// The name in models.toml, in records and in file names.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AudioEncoder => "audio_encoder",
            Self::TextEncoder => "text_encoder",
            Self::ImageEncoder => "image_encoder",
            Self::Vae => "vae",
            Self::Dit => "dit",
        }
    }
}

/// How a network's weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits, 10 of them mantissa.
    F16,
    /// 16 bits, 7 of them mantissa.
    Bf16,
    /// The weights of linear layers as 8-bit floats with a scale for each row, the rest as bf16.
    Fp8,
}

impl Precision {
    /// That of a network which models.toml gives `dtype`.
    pub(super) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    /// The dtype in which such weights are read from their sources.
    pub(super) fn loaded_as(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 | Self::Fp8 => DType::BF16,
        }
    }

    /// The name in records and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        }
    }
}

/// The identity of a network's weights: the SHA-256 of what they are made from. It is the name of the prepared file
/// and, in a process, that of the loaded network. While the hash of a source file is not known, the file's place,
/// length and modification time stand in, which is enough within a process but not on a volume.
#[derive(Clone, Debug)]
pub struct NetworkKey {
    facts: NetworkFacts,
    digest: String,
}

impl NetworkKey {
    pub(super) fn new(facts: NetworkFacts) -> Self {
        Self { digest: digest(&facts), facts }
    }

    /// Which network it is.
    pub fn kind(&self) -> NetworkKind {
        self.facts.network
    }

    /// How the weights are stored.
    pub fn precision(&self) -> Precision {
        self.facts.precision
    }

    /// 64 hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The source files whose hash is neither in models.toml nor in a receipt. While there are any, the network
    /// cannot be prepared, and prepared files are not used for it.
    pub fn unverified(&self) -> Vec<PathBuf> {
        self.facts.files().filter_map(|file| Some(file.local.as_ref()?.place.clone())).collect()
    }

    /// Whether the weights are drawn, so that there is nothing to read.
    pub fn is_random(&self) -> bool {
        matches!(self.facts.source, SourceFacts::Random(_))
    }

    pub(super) fn facts(&self) -> &NetworkFacts {
        &self.facts
    }

    /// The name of the prepared file and of its record, without the end.
    pub(super) fn stem(&self) -> String {
        stem(self.kind().as_str(), &self.digest)
    }
}

impl PartialEq for NetworkKey {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for NetworkKey {}

impl Hash for NetworkKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

/// What a network's weights are made from, in the order of the canonical JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkFacts {
    pub(super) format: u32,
    pub(super) network: NetworkKind,
    pub(super) config: Value,
    pub(super) source: SourceFacts,
    pub(super) loras: Vec<LoraFacts>,
    pub(super) unused: Vec<String>,
    pub(super) precision: Precision,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SourceFacts {
    Files(Vec<FileFacts>),
    Random(u64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileFacts {
    pub(super) repo: String,
    pub(super) path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sha256: Option<String>,
    /// In place of an unknown hash; never in a record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) local: Option<LocalFacts>,
}

/// What tells a file on this machine from another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LocalFacts {
    pub(super) place: PathBuf,
    /// Length and modification time; `None` while there is no such file.
    pub(super) state: Option<(u64, i64)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LoraFacts {
    pub(super) file: FileFacts,
    pub(super) scale: f64,
    pub(super) ignored: Vec<String>,
}

impl NetworkFacts {
    /// Source files and LoRAs.
    pub(super) fn files(&self) -> impl Iterator<Item = &FileFacts> {
        let sources = match &self.source {
            SourceFacts::Files(files) => files.as_slice(),
            SourceFacts::Random(_) => &[],
        };
        sources.iter().chain(self.loras.iter().map(|lora| &lora.file))
    }

    /// [`NetworkFacts::files`], to be changed.
    pub(super) fn files_mut(&mut self) -> impl Iterator<Item = &mut FileFacts> {
        let sources = match &mut self.source {
            SourceFacts::Files(files) => files.as_mut_slice(),
            SourceFacts::Random(_) => &mut [],
        };
        sources.iter_mut().chain(self.loras.iter_mut().map(|lora| &mut lora.file))
    }
}

/// The SHA-256 of the canonical JSON of `facts`, in which fields have the order of their declaration.
pub(super) fn digest(facts: &impl Serialize) -> String {
    // Strings, numbers and lists cannot fail to be written.
    let json = serde_json::to_vec(facts).unwrap_or_default();
    hex::encode(Sha256::digest(json))
}

/// The name of a prepared file without its end: 16 digits keep names short, the record has them all.
pub(super) fn stem(what: &str, digest: &str) -> String {
    format!("{what}-{}", &digest[..16])
}
