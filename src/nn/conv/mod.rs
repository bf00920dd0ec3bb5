//! Convolutions over channels-last activations, with weights in the checkpoint's (out, in, …) layout.
//!
//! On the CPU one kernel serves all of them: for every output pixel a convolution is a sum over kernel taps of
//! (input channels) × (out, in) products, and taps that are adjacent in memory form one longer product. No
//! column matrix is built: the kernel reads the activations where they are, and copies only the windows that
//! touch padding. Weights are packed once, at construction. CUDA devices have a kernel of their own
//! (`nn::cuda`); what it does not know, and other devices, take stock operations (`portable`), which are also what
//! the tests compare with.

mod kernel;
mod packed;
mod portable;
mod tiles;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::{cpu, work};
pub(super) use packed::Geometry;
use packed::Packed;

/// Zeros added around rows and columns before a convolution, in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Padding2d {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding2d {
    /// The same number of zeros on all four sides.
    pub fn same(n: usize) -> Self {
        Self { top: n, bottom: n, left: n, right: n }
    }
}

/// A 3D convolution. Time is never padded behind the clip; before it come frames of the past or zeros
/// ([`Conv3d::forward_causal`]) or nothing ([`Conv3d::forward`]).
#[derive(Clone, Debug)]
pub struct Conv3d(Layer);

impl Conv3d {
    /// Loads `weight` (out, in, kt, kh, kw) and `bias` (out) below `vb`; `channels` = (in, out).
    pub fn new(
        channels: (usize, usize),
        kernel: (usize, usize, usize),
        stride: (usize, usize, usize),
        padding: Padding2d,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = vb.get((channels.1, channels.0, kernel.0, kernel.1, kernel.2), "weight")?;
        let bias = vb.get(channels.1, "bias")?;
        Ok(Self::from_parts(weight, Some(bias), stride, padding))
    }

    /// A layer of `weight` (out, in, kt, kh, kw) and `bias` (out).
    pub fn from_parts(
        weight: Tensor,
        bias: Option<Tensor>,
        stride: (usize, usize, usize),
        padding: Padding2d,
    ) -> Self {
        Self(Layer::new(weight, bias, Geometry::new(stride, padding)))
    }

    /// Maps `xs` (B, T, H, W, in) to (B, T', H', W', out), T' = (T − kt) / stride + 1.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.0.forward(&Input::of(xs))
    }

    /// Maps `xs` (B, T, H, W, in) to (B, T', H', W', out) as if kt − stride frames came before it, so that
    /// T' = T / stride: the last of them are the `past` (B, ≤ kt − stride, H, W, in), those before are zeros.
    /// `residual` (B, T', H', W', out) is added to the result, in the same pass.
    pub fn forward_causal(
        &self,
        xs: &Tensor,
        past: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let wanted = self.0.kernel.0.saturating_sub(self.0.geometry.stride.0);
        let known = past.map_or(Ok(0), |past| past.dim(1))?;
        if known > wanted {
            candle_core::bail!("the past has {known} frames, expected at most {wanted}");
        }
        self.0.forward(&Input { xs, past, zero_frames: wanted - known, residual })
    }
}

/// A 2D convolution.
#[derive(Clone, Debug)]
pub struct Conv2d(Layer);

impl Conv2d {
    /// Loads `weight` (out, in, kh, kw) and `bias` (out) below `vb`; `channels` = (in, out).
    pub fn new(
        channels: (usize, usize),
        kernel: (usize, usize),
        stride: usize,
        padding: Padding2d,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = vb.get((channels.1, channels.0, kernel.0, kernel.1), "weight")?;
        Self::from_parts(weight, Some(vb.get(channels.1, "bias")?), stride, padding)
    }

    /// Loads `weight` (out, in, 3, 3) and `bias` (out) below `vb`, for a convolution with padding 1 of an image
    /// whose rows and columns are first repeated (nearest neighbour, factor 2): `forward` maps (B, H, W, in) to
    /// (B, 2 H, 2 W, out), and the larger image is never made.
    pub fn of_doubled(channels: (usize, usize), vb: VarBuilder) -> Result<Self> {
        let weight = vb.get((channels.1, channels.0, 3, 3), "weight")?.unsqueeze(2)?;
        let geometry = Geometry { doubled: true, ..Geometry::new((1, 1, 1), Padding2d::same(1)) };
        Ok(Self(Layer::new(weight, Some(vb.get(channels.1, "bias")?), geometry)))
    }

    /// A layer of `weight` (out, in, kh, kw) and `bias` (out).
    pub fn from_parts(
        weight: Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: Padding2d,
    ) -> Result<Self> {
        let geometry = Geometry::new((1, stride, stride), padding);
        Ok(Self(Layer::new(weight.unsqueeze(2)?, bias, geometry)))
    }

    /// Maps `xs` (B, H, W, in) to (B, H', W', out).
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.forward_add(xs, None)
    }

    /// Maps `xs` (B, H, W, in) to (B, H', W', out) and adds `residual` (B, H', W', out), in the same pass.
    pub fn forward_add(&self, xs: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let (xs, residual) = (xs.unsqueeze(1)?, residual.map(|r| r.unsqueeze(1)).transpose()?);
        self.0.forward(&Input { residual: residual.as_ref(), ..Input::of(&xs) })?.squeeze(1)
    }
}

/// A 1D convolution without padding, in one or more groups.
#[derive(Clone, Debug)]
pub struct Conv1d(Layer);

impl Conv1d {
    /// A layer of `weight` (out, in / groups, k) and `bias` (out).
    pub fn from_parts(weight: Tensor, bias: Option<Tensor>, stride: usize, groups: usize) -> Self {
        // A weight of another rank stays as it is: `forward` then says so.
        let weight = weight.unsqueeze(2).and_then(|w| w.unsqueeze(2)).unwrap_or(weight);
        let geometry = Geometry { groups, ..Geometry::new((1, 1, stride), Padding2d::default()) };
        Self(Layer::new(weight, bias, geometry))
    }

    /// Maps `xs` (B, L, in) to (B, L', out), L' = (L − k) / stride + 1.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = xs.unsqueeze(1)?.unsqueeze(1)?; // (B, 1, 1, L, in)
        self.0.forward(&Input::of(&xs))?.squeeze(1)?.squeeze(1)
    }
}

/// What a layer is applied to: `zero_frames` frames of zeros, then `past`, then `xs`.
struct Input<'a> {
    xs: &'a Tensor, // (B, T, H, W, in)
    past: Option<&'a Tensor>,
    zero_frames: usize,
    residual: Option<&'a Tensor>, // (B, T', H', W', out)
}

impl<'a> Input<'a> {
    /// `xs` (B, T, H, W, in) and nothing else.
    fn of(xs: &'a Tensor) -> Self {
        Self { xs, past: None, zero_frames: 0, residual: None }
    }

    /// The past and what follows it.
    fn frames(&self) -> Result<Tensor> {
        match self.past {
            Some(past) => Tensor::cat(&[past, self.xs], 1),
            None => Ok(self.xs.clone()),
        }
    }
}

/// Weights in the form that their device computes with.
#[derive(Clone)]
struct Layer {
    geometry: Geometry,
    kernel: (usize, usize, usize),
    weights: Weights,
}

#[derive(Clone)]
enum Weights {
    Packed(Arc<Packed>),
    #[cfg(feature = "cuda")]
    ChannelsLast(super::cuda::ConvWeights),
    Stock {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("kernel", &self.kernel).field("geometry", &self.geometry).finish()
    }
}

impl Layer {
    /// A layer of `weight` (out, in / groups, kt, kh, kw) and `bias` (out).
    fn new(weight: Tensor, bias: Option<Tensor>, geometry: Geometry) -> Self {
        let kernel = weight.dims5().map_or((1, 1, 1), |(_, _, kt, kh, kw)| (kt, kh, kw));
        // Weights that cannot be packed keep the stock path, whose first forward reports what is wrong with them.
        // One value seen as a whole weight stays one value: so a network's names and shapes can be listed without
        // its memory.
        let packed = match weight.device() {
            Device::Cpu if !is_one_value(&weight) => Packed::new(&weight, bias.as_ref(), geometry).ok(),
            _ => None,
        };
        if let Some(packed) = packed {
            return Self { geometry, kernel, weights: Weights::Packed(Arc::new(packed)) };
        }
        #[cfg(feature = "cuda")]
        if let Ok(Some(weights)) = super::cuda::ConvWeights::new(&weight, bias.as_ref(), geometry) {
            return Self { geometry, kernel, weights: Weights::ChannelsLast(weights) };
        }
        Self { geometry, kernel, weights: Weights::Stock { weight, bias } }
    }

    fn forward(&self, input: &Input) -> Result<Tensor> {
        let ys = self.convolve(input)?;
        let (kt, kh, kw) = self.kernel;
        let taps = kt * kh * kw * input.xs.dim(4)? / self.geometry.groups;
        work::note(|| Ok(2 * ys.elem_count() * taps), &[input.xs, &ys])?;
        Ok(ys)
    }

    fn convolve(&self, input: &Input) -> Result<Tensor> {
        let dtype = input.xs.dtype();
        let frame_dims = |x: &Tensor| x.dims5().map(|(b, _, h, w, c)| (b, h, w, c));
        if let Some(past) = input.past
            && frame_dims(past)? != frame_dims(input.xs)?
        {
            candle_core::bail!("the past is {:?}, the input {:?}", past.shape(), input.xs.shape());
        }
        match &self.weights {
            Weights::Packed(packed) if matches!(input.xs.device(), Device::Cpu) => {
                let plain = |x: &Tensor| x.to_dtype(DType::F32)?.contiguous();
                let (xs, past) = (plain(input.xs)?, input.past.map(plain).transpose()?);
                let residual = input.residual.map(plain).transpose()?;
                let zero_frames = input.zero_frames;
                let input = Input { xs: &xs, past: past.as_ref(), zero_frames, residual: residual.as_ref() };
                forward_packed(packed, &input)?.to_dtype(dtype)
            }
            Weights::Packed(_) => candle_core::bail!("the weights are on the CPU, the input is not"),
            #[cfg(feature = "cuda")]
            Weights::ChannelsLast(weights) => {
                let xs = input.frames()?;
                let doubled = if self.geometry.doubled { portable::double(&xs)? } else { xs };
                let ys = match weights.convolve(&doubled, input.zero_frames, self.geometry)? {
                    Some(ys) => ys,
                    None => {
                        let (weight, bias) = weights.stock()?;
                        return self.forward_stock(input, &weight, bias.as_ref());
                    }
                };
                input.residual.map_or(Ok(ys.clone()), |residual| ys + residual)
            }
            Weights::Stock { weight, bias } => self.forward_stock(input, weight, bias.as_ref()),
        }
    }

    /// By candle's operations.
    fn forward_stock(&self, input: &Input, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let xs = input.frames()?.pad_with_zeros(1, input.zero_frames, 0)?;
        let ys = portable::conv(&xs, weight, bias, self.geometry)?;
        input.residual.map_or(Ok(ys.clone()), |residual| ys + residual)
    }
}

/// Whether `xs` is one value in memory, broadcast to more.
fn is_one_value(xs: &Tensor) -> bool {
    let mut axes = xs.dims().iter().zip(xs.stride());
    xs.elem_count() > 1 && axes.all(|(&dim, &stride)| dim == 1 || stride == 0)
}

/// Runs the CPU kernel on f32 tensors that lie contiguously in memory.
fn forward_packed(packed: &Packed, input: &Input) -> Result<Tensor> {
    let Input { xs, past, zero_frames, residual } = *input;
    let (batch, num_frames, height, width, channels) = xs.dims5()?;
    if channels != packed.in_channels() {
        candle_core::bail!("the input has {channels} channels, expected {}", packed.in_channels());
    }
    let num_past = past.map_or(Ok(0), |past| past.dim(1))?;
    let total = zero_frames + num_past + num_frames;
    let (frames_out, height_out, width_out) = packed.output_size((total, height, width))?;
    let shape = (batch, frames_out, height_out, width_out, packed.out_channels());
    if let Some(residual) = residual
        && residual.dims5()? != shape
    {
        candle_core::bail!("the residual is {:?}, the result {shape:?}", residual.shape());
    }

    let xs = cpu::Values::new(xs);
    let past = past.map(cpu::Values::new);
    let residual = residual.map(cpu::Values::new);
    let xs = xs.contiguous()?;
    let past = past.as_ref().map_or(Ok(&[][..]), cpu::Values::contiguous)?;
    let residual = residual.as_ref().map(cpu::Values::contiguous).transpose()?;

    let frame_len = height * width * channels;
    let mut frames = Vec::with_capacity(batch * total);
    for b in 0..batch {
        frames.extend(std::iter::repeat_n(None, zero_frames));
        frames.extend(
            (b * num_past..(b + 1) * num_past).map(|t| Some(&past[t * frame_len..(t + 1) * frame_len])),
        );
        frames.extend(
            (b * num_frames..(b + 1) * num_frames).map(|t| Some(&xs[t * frame_len..(t + 1) * frame_len])),
        );
    }
    let clip = tiles::Clip { frames: &frames, frames_per_item: total, size: (height, width), residual };
    let mut out = vec![0f32; batch * frames_out * height_out * width_out * packed.out_channels()];
    tiles::run(packed, &clip, (frames_out, height_out, width_out), &mut out);
    Tensor::from_vec(out, shape, &Device::Cpu)
}

#[cfg(test)]
mod tests;
