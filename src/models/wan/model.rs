//! The whole network.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::Config;
use super::attention::{ContextKeysValues, KeysValues};
use super::audio::AudioProjector;
use super::block::Conditions;
use super::blocks::{BlockSource, Blocks};
use super::head::{Head, patchify};
use super::routing::{Positions, Routing};
use crate::nn::rope::Rope;
use crate::nn::{LayerNorm, Linear, gelu_erf, silu, timestep, trace};

/// Added to the variance in the norms of the image projector: the default of PyTorch's layer.
const IMAGE_NORM_EPS: f64 = 1e-5;

/// The DiT. Its dtype is that of the `VarBuilder`: f32, or bf16 with f32 inside as in the reference.
#[derive(Debug)]
pub struct Model {
    patch_embedding: Linear,
    text_embedding: (Linear, Linear),
    time_embedding: (Linear, Linear),
    time_projection: Linear,
    image_embedding: ImageEmbedding,
    audio_proj: AudioProjector,
    blocks: Blocks,
    head: Head,
    config: Config,
    dtype: DType,
    device: Device,
    /// The rotation of the grid used last: all steps of a generation share it.
    rope: Mutex<Option<(Grid, Rope)>>,
}

/// Frames, rows and columns of tokens.
type Grid = (usize, usize, usize);

/// Keys and values of text and image for every block; valid for one generation.
#[derive(Clone, Debug)]
pub struct Context {
    blocks: Vec<ContextKeysValues>,
}

/// Keys and values of the audio for every block; valid for one window.
#[derive(Clone, Debug)]
pub struct Audio {
    blocks: Vec<KeysValues>,
    persons: usize,
    latent_frames: usize,
}

/// Tokens before the blocks, and what the timestep says to blocks and head.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// Tokens (1, L, D) in the dtype of the model.
    pub xs: Tensor,
    /// Frames, rows and columns of tokens; L is their product.
    pub grid: (usize, usize, usize),
    /// Timestep embedding (1, D) in f32, for the head.
    pub temb: Tensor,
    /// Projected timestep embedding (1, 6, D) in f32, for the blocks.
    pub modulation: Tensor,
    rope: Rope,
}

/// Norm, two linear layers with an exact GELU between them, norm: image rows to the width of the tokens.
#[derive(Debug)]
struct ImageEmbedding {
    norm_in: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    norm_out: LayerNorm,
}

impl ImageEmbedding {
    fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm_in: LayerNorm::new(cfg.clip_dim, IMAGE_NORM_EPS, vb.pp("proj.0"))?,
            fc1: Linear::new(cfg.clip_dim, cfg.clip_dim, vb.pp("proj.1"))?,
            fc2: Linear::new(cfg.clip_dim, cfg.dim, vb.pp("proj.3"))?,
            norm_out: LayerNorm::new(cfg.dim, IMAGE_NORM_EPS, vb.pp("proj.4"))?,
        })
    }

    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = gelu_erf(&self.fc1.forward(&self.norm_in.forward(xs)?)?)?;
        self.norm_out.forward(&self.fc2.forward(&xs)?)
    }
}

impl Model {
    /// Loads the network below `vb`, or fails naming the field of `cfg` that it does not implement.
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        Self::build(cfg, vb, cfg.num_layers, None)
    }

    /// Like [`Model::new`], but only the first `resident` blocks are loaded: the others come from `source` each time
    /// they are needed. The results are the same.
    pub fn with_streamed_blocks(
        cfg: &Config,
        vb: VarBuilder,
        resident: usize,
        source: Arc<dyn BlockSource>,
    ) -> Result<Self> {
        Self::build(cfg, vb, resident, Some(source))
    }

    fn build(
        cfg: &Config,
        vb: VarBuilder,
        resident: usize,
        source: Option<Arc<dyn BlockSource>>,
    ) -> Result<Self> {
        cfg.validate()?;
        let [_, patch_rows, patch_cols] = cfg.patch_size;
        let patch = vb.pp("patch_embedding");
        let weight = patch.get((cfg.dim, cfg.in_dim, 1, patch_rows, patch_cols), "weight")?;
        // The convolution's stride is its kernel, so it is a linear layer over patches.
        let weight = weight.permute((0, 2, 3, 4, 1))?.contiguous()?.flatten_from(1)?;
        let patch_embedding = Linear::from_parts(weight, Some(patch.get(cfg.dim, "bias")?));
        let pair = |name: &str, in_dim: usize| -> Result<(Linear, Linear)> {
            let vb = vb.pp(name);
            Ok((Linear::new(in_dim, cfg.dim, vb.pp("0"))?, Linear::new(cfg.dim, cfg.dim, vb.pp("2"))?))
        };
        Ok(Self {
            patch_embedding,
            text_embedding: pair("text_embedding", cfg.text_dim)?,
            time_embedding: pair("time_embedding", cfg.freq_dim)?,
            time_projection: Linear::new(cfg.dim, 6 * cfg.dim, vb.pp("time_projection.1"))?,
            image_embedding: ImageEmbedding::new(cfg, vb.pp("img_emb"))?,
            audio_proj: AudioProjector::new(cfg, vb.pp("audio_proj"))?,
            head: Head::new(cfg, vb.pp("head"))?,
            blocks: Blocks::new(cfg, vb.clone(), resident, source)?,
            config: cfg.clone(),
            dtype: vb.dtype(),
            device: vb.device().clone(),
            rope: Mutex::new(None),
        })
    }

    /// The dimensions that the network was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Keys and values of every block for text rows `context` (n, text_dim), n ≤ text_len, and `image_embeds`
    /// (1, rows, clip_dim): once per generation, or once per reference image.
    pub fn encode_context(&self, context: &Tensor, image_embeds: &Tensor) -> Result<Context> {
        let (rows, _) = context.dims2()?;
        let Some(padding) = self.config.text_len.checked_sub(rows) else {
            bail!("the text has {rows} rows, expected at most {}", self.config.text_len)
        };
        // The rows of zeros take part in attention, as they did in training.
        let text = context.to_dtype(self.dtype)?.pad_with_zeros(0, 0, padding)?.unsqueeze(0)?;
        let text = self.text_embedding.0.forward_gelu_tanh(&text)?;
        let text = self.text_embedding.1.forward(&text)?;
        let image = self.image_embedding.forward(&image_embeds.to_dtype(self.dtype)?)?;
        trace::record(|| "text_tokens".to_owned(), &text);
        trace::record(|| "image_tokens".to_owned(), &image);
        let mut blocks = Vec::with_capacity(self.config.num_layers);
        self.blocks.each(|block| {
            blocks.push(block.encode_context(&text, &image)?);
            Ok(())
        })?;
        Ok(Context { blocks })
    }

    /// Keys and values of every block for `audio` (P, F, audio_window, audio_blocks, audio_channels) of one or
    /// two persons and F = vae_scale·n + 1 frames: once per window.
    pub fn encode_audio(&self, audio: &Tensor) -> Result<Audio> {
        let persons = audio.dim(0)?;
        let tokens = self.audio_proj.forward(&audio.to_dtype(self.dtype)?)?; // (T, A, output_dim)
        let rope = match persons {
            1 => None,
            2 => {
                let positions = Positions::new(&self.config);
                Some(positions.keys(self.config.context_tokens, self.config.head_dim(), &self.device)?)
            }
            _ => bail!("the audio is of {persons} persons, expected 1 or 2"),
        };
        let mut blocks = Vec::with_capacity(self.config.num_layers);
        self.blocks.each(|block| {
            blocks.push(block.encode_audio(&tokens, rope.as_ref())?);
            Ok(())
        })?;
        Ok(Audio { blocks, persons, latent_frames: tokens.dim(0)? })
    }

    /// Tokens of noisy `latents` (out_dim, T, h, w) and condition `y` (in_dim - out_dim, T, h, w) at
    /// `timestep` (0…1000).
    pub fn embed(&self, latents: &Tensor, y: &Tensor, timestep: f64) -> Result<Embedded> {
        let (_, frames, height, width) = latents.dims4()?;
        let [_, patch_rows, patch_cols] = self.config.patch_size;
        let xs = Tensor::cat(&[latents.to_dtype(self.dtype)?, y.to_dtype(self.dtype)?], 0)?;
        let xs = self.patch_embedding.forward(&patchify(&xs, (patch_rows, patch_cols))?)?; // (1, L, D)
        trace::record(|| "patch_tokens".to_owned(), &xs);

        let (temb, modulation) = self.modulation(timestep)?;
        trace::record(|| "e".to_owned(), &temb);
        trace::record(|| "e0".to_owned(), &modulation);

        let grid = (frames, height / patch_rows, width / patch_cols);
        Ok(Embedded { xs, grid, temb, modulation, rope: self.rope(grid)? })
    }

    /// What `timestep` (0…1000) says to head (1, D) and blocks (1, 6, D), in f32.
    pub fn modulation(&self, timestep: f64) -> Result<(Tensor, Tensor)> {
        let temb = timestep::sinusoid(&[timestep], self.config.freq_dim, &self.device)?;
        let temb = self.time_embedding.1.forward(&silu(&self.time_embedding.0.forward(&temb)?)?)?;
        let modulation = self.time_projection.forward(&silu(&temb)?)?.reshape((1, 6, self.config.dim))?;
        Ok((temb, modulation))
    }

    /// Runs the blocks: (1, L, D). `masks` (3, h, w) tell where person 1, person 2 and neither are in the
    /// latents of the first frame; they are needed for two persons and not looked at for one.
    pub fn blocks(
        &self,
        embedded: &Embedded,
        context: &Context,
        audio: &Audio,
        masks: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (frames, rows, cols) = embedded.grid;
        if audio.latent_frames != frames {
            bail!("the audio is of {} latent frames, the latents of {frames}", audio.latent_frames)
        }
        let routing = match (audio.persons, masks) {
            (1, _) => None,
            (_, Some(masks)) => Some(Routing::new(&self.config, masks, (rows, cols))?),
            (persons, None) => {
                bail!("the audio is of {persons} persons, but there are no masks of where they are")
            }
        };
        let mut xs = embedded.xs.clone();
        let mut conditions = context.blocks.iter().zip(&audio.blocks);
        self.blocks.each(|block| {
            let Some((context, audio)) = conditions.next() else {
                bail!("the context is of fewer blocks than the network has")
            };
            let conditions = Conditions {
                modulation: &embedded.modulation,
                rope: &embedded.rope,
                context,
                audio,
                routing: routing.as_ref(),
            };
            xs = block.forward(&xs, &conditions)?;
            Ok(())
        })?;
        Ok(xs)
    }

    /// Tokens `xs` (1, L, D) after the blocks to the velocity (out_dim, T, h, w) in f32.
    pub fn head(&self, xs: &Tensor, embedded: &Embedded) -> Result<Tensor> {
        self.head.forward(xs, &embedded.temb, embedded.grid)
    }

    /// [`Model::embed`], [`Model::blocks`], [`Model::head`]: the velocity (out_dim, T, h, w) in f32.
    pub fn forward(
        &self,
        latents: &Tensor,
        y: &Tensor,
        timestep: f64,
        context: &Context,
        audio: &Audio,
        masks: Option<&Tensor>,
    ) -> Result<Tensor> {
        let embedded = self.embed(latents, y, timestep)?;
        let xs = self.blocks(&embedded, context, audio, masks)?;
        self.head(&xs, &embedded)
    }

    /// The rotation of `grid`, made anew only when the grid changes.
    fn rope(&self, grid: Grid) -> Result<Rope> {
        let mut cached = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, rope)) = cached.as_ref().filter(|(of, _)| *of == grid) {
            return Ok(rope.clone());
        }
        let rope = Rope::grid(grid, self.config.head_dim(), &self.device)?;
        *cached = Some((grid, rope.clone()));
        Ok(rope)
    }
}
