//! Checkpoints with the names, formats and shards of the published ones (`tests/manifest`), at a fraction of their
//! width. The shapes are what the networks ask for at that width.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use talkie::models::{clip_vision, umt5, wan, wan_vae, wav2vec2};
use talkie::registry::{ModelSpec, Registry};
use talkie::weights::{LoadPlan, Weights};

use super::archive::{self, Item, Storage, View};

/// A network of the model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Dit,
    TextEncoder,
    ImageEncoder,
    Vae,
    AudioEncoder,
}

/// A network at a fraction of its size.
#[derive(Clone, Copy, Debug)]
pub struct Network {
    pub kind: Kind,
    /// What widths are divided by.
    pub divisor: usize,
    /// Blocks of the DiT; the other networks have all of theirs.
    pub layers: usize,
}

/// Name and shape, in the order of the file.
type Tensors = Vec<(String, Vec<usize>)>;

impl Network {
    pub fn new(kind: Kind, divisor: usize) -> Self {
        Self { kind, divisor, layers: wan::Config::infinitetalk_14b().num_layers }
    }

    /// The dtype that it is published in.
    pub fn stored_dtype(self) -> DType {
        if self.kind == Kind::TextEncoder { DType::BF16 } else { DType::F32 }
    }

    /// What the network takes of `weights`.
    pub fn plan(self, weights: &Weights, dtype: DType) -> talkie::Result<LoadPlan> {
        weights.plan(dtype, &Device::Cpu, &self.unused(), |vb| self.build(vb))
    }

    /// The network.
    pub fn load(self, weights: &Weights, dtype: DType) -> talkie::Result<Box<dyn Any>> {
        weights.load(dtype, &Device::Cpu, &self.unused(), |vb| self.build(vb))
    }

    fn unused(self) -> Vec<String> {
        let model = self.model();
        match self.kind {
            Kind::Dit => model.dit.unused,
            Kind::TextEncoder => model.text_encoder.unused,
            Kind::ImageEncoder => model.image_encoder.unused,
            Kind::Vae => model.vae.unused,
            Kind::AudioEncoder => model.audio_encoder.unused,
        }
    }

    /// The official model with all networks at this width.
    pub fn model(self) -> ModelSpec {
        let part = |width: usize| width / self.divisor;
        // Narrow networks keep heads of a width that rotary positions can be applied to.
        let heads = |full: usize| if self.divisor == 1 { full } else { 5 };
        let mut model = Registry::built_in().unwrap().model("infinitetalk").unwrap().clone();
        let full = wan::Config::infinitetalk_14b();
        model.dit.config = wan::Config {
            dim: part(full.dim),
            ffn_dim: part(full.ffn_dim),
            num_heads: heads(full.num_heads),
            num_layers: self.layers,
            text_dim: part(full.text_dim),
            clip_dim: part(full.clip_dim),
            audio_channels: part(full.audio_channels),
            intermediate_dim: part(full.intermediate_dim),
            output_dim: part(full.output_dim),
            ..full
        };
        let full = umt5::Config::umt5_xxl();
        model.text_encoder.config = umt5::Config {
            vocab: part(full.vocab),
            dim: part(full.dim),
            dim_attn: part(full.dim_attn),
            dim_ffn: part(full.dim_ffn),
            ..full
        };
        let full = clip_vision::Config::vit_h_14();
        let (vision_dim, vision_heads) = (part(full.vision_dim), heads(full.vision_heads));
        model.image_encoder.config = clip_vision::Config { vision_dim, vision_heads, ..full };
        let full = wan_vae::Config::wan2_1();
        model.vae.config = wan_vae::Config { dim: part(full.dim).max(2), ..full };
        let full = wav2vec2::Config::chinese_base();
        model.audio_encoder.config = wav2vec2::Config {
            conv_dim: full.conv_dim.iter().map(|dim| part(*dim)).collect(),
            hidden_size: part(full.hidden_size).max(48),
            intermediate_size: part(full.intermediate_size),
            ..full
        };
        model
    }

    fn build(self, vb: VarBuilder) -> candle_core::Result<Box<dyn Any>> {
        let model = self.model();
        Ok(match self.kind {
            Kind::Dit => Box::new(wan::Model::new(&model.dit.config, vb)?),
            Kind::TextEncoder => Box::new(umt5::Model::new(&model.text_encoder.config, vb)?),
            Kind::ImageEncoder => Box::new(clip_vision::Model::new(&model.image_encoder.config, vb)?),
            Kind::Vae => Box::new(wan_vae::Vae::new(&model.vae.config, vb)?),
            Kind::AudioEncoder => Box::new(wav2vec2::Model::new(&model.audio_encoder.config, vb)?),
        })
    }

    /// Writes the network's files to `dir`.
    pub fn write(self, dir: &Path) -> Result<Vec<PathBuf>> {
        match self.kind {
            Kind::Dit => {
                let tensors = self.tensors("wan2.1_i2v_14b_480p.diffusion_pytorch_model.json");
                let mut files = shards(tensors, 7)
                    .into_iter()
                    .enumerate()
                    .map(|(i, shard)| {
                        let name = format!("diffusion_pytorch_model-{:05}-of-00007.safetensors", i + 1);
                        safetensors(dir.join(name), &shard)
                    })
                    .collect::<Result<Vec<_>>>()?;
                let adapter = self.tensors("infinitetalk.safetensors.json");
                files.push(safetensors(dir.join("infinitetalk.safetensors"), &adapter)?);
                Ok(files)
            }
            Kind::TextEncoder => self.archive(dir, "models_t5_umt5-xxl-enc-bf16.pth"),
            Kind::ImageEncoder => {
                self.archive(dir, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
            }
            Kind::Vae => self.archive(dir, "Wan2.1_VAE.pth"),
            Kind::AudioEncoder => {
                let tensors = self.tensors("chinese-wav2vec2-base.model.safetensors.json");
                Ok(vec![safetensors(dir.join("model.safetensors"), &tensors)?])
            }
        }
    }

    fn archive(self, dir: &Path, name: &str) -> Result<Vec<PathBuf>> {
        let path = dir.join(name);
        torch_archive(&path, &self.tensors(&format!("{name}.json")), self.stored_dtype())?;
        Ok(vec![path])
    }

    /// The tensors of one published file at this width.
    fn tensors(self, manifest: &str) -> Tensors {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifest").join(manifest);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let published: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
        let plan = self.plan(&Weights::random(1), DType::F32).unwrap();
        let mut asked: BTreeMap<_, _> =
            plan.tensors.into_iter().map(|tensor| (tensor.name, tensor.shape.into_dims())).collect();
        let is_left_out = |name: &str| {
            let block = name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse().ok());
            self.kind == Kind::Dit && block.is_some_and(|block: usize| block >= self.layers)
        };
        let tensors = published.into_iter().filter(|(name, _)| !is_left_out(name)).map(|(name, shape)| {
            let full: Vec<usize> = serde_json::from_value(shape).unwrap();
            let shape = asked.remove(name.strip_prefix("wav2vec2.").unwrap_or(&name));
            let shape = shape.unwrap_or_else(|| full.iter().map(|dim| (dim / self.divisor).max(1)).collect());
            assert_eq!(shape.len(), full.len(), "{name}");
            if self.divisor == 1 {
                assert_eq!(shape, full, "{name}");
            }
            (name, shape)
        });
        tensors.collect()
    }
}

/// `count` shards of about the same size, in order.
fn shards(tensors: Tensors, count: usize) -> Vec<Tensors> {
    let total: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let mut shards: Vec<Tensors> = vec![Vec::new(); count];
    let mut before = 0;
    for (name, shape) in tensors {
        let len: usize = shape.iter().product();
        shards[before * count / total].push((name, shape));
        before += len;
    }
    shards
}

/// Writes f32 tensors.
fn safetensors(path: PathBuf, tensors: &Tensors) -> Result<PathBuf> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (name, shape) in tensors {
        values(&mut out, name, shape.iter().product(), DType::F32)?;
    }
    out.into_inner()?.sync_all()?;
    Ok(path)
}

fn torch_archive(path: &Path, tensors: &Tensors, dtype: DType) -> Result<()> {
    let storage = |(name, shape): &(String, Vec<usize>)| {
        let (name, len) = (name.clone(), shape.iter().product());
        let class = if dtype == DType::BF16 { "BFloat16Storage" } else { "FloatStorage" };
        Storage { class, len, bytes: Box::new(move |out| values(out, &name, len, dtype)) }
    };
    let storages: Vec<_> = tensors.iter().map(storage).collect();
    let items = tensors.iter().enumerate();
    let items = items.map(|(i, (name, shape))| (name.clone(), Item::Tensor(View::whole(i, shape))));
    let pickle = archive::pickle(&Item::Dict(items.collect()), &storages);
    let file = File::create(path)?;
    archive::write(BufWriter::with_capacity(1 << 20, &file), &pickle, &storages, Some("little"))?;
    file.sync_all()
}

/// Writes `len` small numbers that look random and depend on `name`.
fn values(out: &mut dyn Write, name: &str, len: usize, dtype: DType) -> Result<()> {
    let size = dtype.size_in_bytes();
    let mut state = name.bytes().fold(1u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let mut block = vec![0; size << 18];
    let mut left = len * size;
    while left > 0 {
        // One block of random numbers stands for the next fifteen, turned by one element each: making numbers must
        // not take longer than writing them.
        for bytes in block.chunks_exact_mut(size) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            bytes.copy_from_slice(&value.to_le_bytes()[4 - size..]);
        }
        for _ in 0..16 {
            let part = left.min(block.len());
            out.write_all(&block[..part])?;
            left -= part;
            block.rotate_left(size);
        }
    }
    Ok(())
}
