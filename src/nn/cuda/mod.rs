//! Our kernels for NVIDIA's GPUs (`kernels/`), each in place of several of candle's operations. A function returns
//! `None` where its kernel does not run, and its caller then takes candle's operations: on another device, where plain
//! kernels are asked for, and for dtypes and shapes that the kernel does not know.

mod conv;
mod ffi;

use std::ffi::{CStr, c_int, c_longlong, c_void};
use std::ops::Deref;
use std::ptr;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, D, DType, Device, InplaceOp2, Layout, Result, Storage, Tensor, bail,
};
use half::bf16;

use super::kernels;
pub(super) use conv::Weights as ConvWeights;

/// Channels of a head that the flash kernels are made for.
const HEAD_DIM: usize = 128;
/// Bytes of one load or store; rows must consist of whole ones.
const VECTOR_BYTES: usize = 16;
/// Vectors of a row that the threads of a block, or of a warp, hold at most (`fused.cu`).
const BLOCK_VECTORS: usize = 5 * 256;
const WARP_VECTORS: usize = 3 * 32;

/// [`super::attention`] without a mask.
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let Some(device) = device(&[q, k, v]) else { return Ok(None) };
    let ((batch, q_len, heads, dim), (_, k_len, _, v_dim)) = (q.dims4()?, v.dims4()?);
    let fits = |xs: &Tensor| {
        let aligned = |elements: usize| elements * size_of::<bf16>() % VECTOR_BYTES == 0;
        let (stride, layout) = (xs.stride(), xs.layout());
        xs.dtype() == DType::BF16
            && stride[3] == 1
            && stride[..3].iter().all(|&stride| aligned(stride))
            && aligned(layout.start_offset())
    };
    let known = [q, k, v].into_iter().all(fits) && dim == HEAD_DIM && v_dim == HEAD_DIM;
    if !known || batch * q_len * heads * k_len == 0 || batch * q_len > MAX_ROWS || k_len > MAX_ROWS {
        return Ok(None);
    }
    let strides = |xs: &Tensor| {
        let stride = xs.stride();
        [stride[0], stride[1], stride[2]].map(|stride| stride as c_longlong)
    };
    let inputs = Inputs::new([Some(q), Some(k), Some(v)]);
    let (out, _) = output(device, DType::BF16, q.elem_count(), |stream, out| {
        output(device, DType::F32, batch * heads * q_len, |_, lse| {
            inputs.with(stream, |[q_at, k_at, v_at]| {
                let args = ffi::Attention {
                    q: q_at,
                    k: k_at,
                    v: v_at,
                    out,
                    lse,
                    q_strides: strides(q),
                    k_strides: strides(k),
                    v_strides: strides(v),
                    batch: batch as c_int,
                    heads: heads as c_int,
                    q_len: q_len as c_int,
                    k_len: k_len as c_int,
                    scale: scale as f32,
                };
                // SAFETY: the pointers are of tensors of these sizes and strides, which outlive the call.
                check("attention", unsafe { ffi::talkie_attention(&args, stream.cu_stream().cast()) })
            })
        })
    })?;
    Ok(Some(tensor(out, q.dims())))
}

/// What a layer norm does to its rows.
pub(super) struct LayerNorm<'a> {
    /// D values, in f32.
    pub weight: &'a Tensor,
    /// D values, in f32.
    pub bias: &'a Tensor,
    pub eps: f64,
    /// Whether the normalised values are rounded to the dtype of the rows before weight and bias.
    pub round: bool,
}

impl LayerNorm<'_> {
    /// The norm of `xs` (…, D).
    pub(super) fn of(&self, xs: &Tensor) -> Result<Option<Tensor>> {
        let Some(rows) = Rows::of(xs, BLOCK_VECTORS)? else { return Ok(None) };
        let (out, ()) = output(rows.device, rows.xs.dtype(), rows.xs.elem_count(), |stream, out| {
            self.launch(&rows, (None, None), (ptr::null_mut(), out), stream)
        })?;
        Ok(Some(tensor(out, xs.dims())))
    }

    /// `xs + ys · gate`, both (…, D), with `gate` of D values in f32 or none; and its norm.
    pub(super) fn of_sum(
        &self,
        xs: &Tensor,
        ys: &Tensor,
        gate: Option<&Tensor>,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let Some(rows) = Rows::of(xs, BLOCK_VECTORS)? else { return Ok(None) };
        if ys.dims() != xs.dims() || ys.dtype() != xs.dtype() || !is_row_of(gate, rows.dim) {
            return Ok(None);
        }
        let (ys, gate) = (ys.contiguous()?, gate.map(Tensor::contiguous).transpose()?);
        let (dtype, len) = (rows.xs.dtype(), rows.xs.elem_count());
        let (sums, (out, ())) = output(rows.device, dtype, len, |_, sums| {
            output(rows.device, dtype, len, |stream, out| {
                self.launch(&rows, (Some(&ys), gate.as_ref()), (sums, out), stream)
            })
        })?;
        Ok(Some((tensor(sums, xs.dims()), tensor(out, xs.dims()))))
    }

    fn launch(
        &self,
        rows: &Rows,
        (ys, gate): (Option<&Tensor>, Option<&Tensor>),
        (sums, out): (*mut c_void, *mut c_void),
        stream: &CudaStream,
    ) -> Result<()> {
        let (weight, bias) = (row_of(self.weight, rows.dim)?, row_of(self.bias, rows.dim)?);
        let inputs = Inputs::new([Some(&rows.xs), ys, gate, Some(&weight), Some(&bias)]);
        inputs.with(stream, |[xs, ys, gate, weight, bias]| {
            let args = ffi::LayerNorm {
                xs,
                ys,
                gate,
                sums,
                weight,
                bias,
                out,
                rows: rows.count as c_int,
                dim: rows.dim as c_int,
                eps: self.eps as f32,
                round: self.round.into(),
                dtype: code(rows.xs.dtype())?,
            };
            // SAFETY: rows, sums and out are of `rows.count × rows.dim` contiguous elements, the others of one row.
            check("layer norm", unsafe { ffi::talkie_layer_norm(&args, stream.cu_stream().cast()) })
        })
    }
}

/// Rows `xs` (…, D) divided by their root mean square and multiplied by `norm`'s weight (D), then turned by `rope`'s
/// cosines and sines (L, head_dim / 2) in f32, where row i is token i mod L.
pub(super) fn rms_rope(
    xs: &Tensor,
    norm: Option<(&Tensor, f64)>,
    rope: Option<(&Tensor, &Tensor)>,
) -> Result<Option<Tensor>> {
    let Some(rows) = Rows::of(xs, BLOCK_VECTORS)? else { return Ok(None) };
    let (tokens, head_dim) = match rope {
        Some((cos, _)) => (cos.dim(0)?, 2 * cos.dim(1)?),
        None => (1, rows.dim),
    };
    let vector = VECTOR_BYTES / xs.dtype().size_in_bytes();
    if tokens == 0 || !head_dim.is_multiple_of(vector) || !rows.dim.is_multiple_of(head_dim) {
        return Ok(None);
    }
    let weight = norm.map(|(weight, _)| row_of(weight, rows.dim)).transpose()?;
    let angles = rope.map(|(cos, sin)| Ok::<_, candle_core::Error>((cos.contiguous()?, sin.contiguous()?)));
    let angles = angles.transpose()?;
    let (cos, sin) = (angles.as_ref().map(|a| &a.0), angles.as_ref().map(|a| &a.1));
    let inputs = Inputs::new([Some(&rows.xs), weight.as_ref(), cos, sin]);
    let (out, ()) = output(rows.device, rows.xs.dtype(), rows.xs.elem_count(), |stream, out| {
        inputs.with(stream, |[xs, weight, cos, sin]| {
            let args = ffi::RmsRope {
                xs,
                weight,
                cos,
                sin,
                out,
                rows: rows.count as c_int,
                dim: rows.dim as c_int,
                head_dim: head_dim as c_int,
                tokens: tokens as c_int,
                eps: norm.map_or(0.0, |(_, eps)| eps as f32),
                dtype: code(rows.xs.dtype())?,
            };
            // SAFETY: rows and out are of `rows.count × rows.dim` contiguous elements, the weight of one row, the
            // angles of `tokens` rows of `head_dim / 2`.
            check("norm and rotation", unsafe { ffi::talkie_rms_rope(&args, stream.cu_stream().cast()) })
        })
    })?;
    Ok(Some(tensor(out, xs.dims())))
}

/// `xs + ys · gate`, both (…, D), with `gate` of D values in f32.
pub(super) fn residual_gate(xs: &Tensor, ys: &Tensor, gate: &Tensor) -> Result<Option<Tensor>> {
    let Some(rows) = Rows::of(xs, usize::MAX)? else { return Ok(None) };
    if ys.dims() != xs.dims() || ys.dtype() != xs.dtype() || !is_row_of(Some(gate), rows.dim) {
        return Ok(None);
    }
    let (ys, gate) = (ys.contiguous()?, gate.contiguous()?);
    let inputs = Inputs::new([Some(&rows.xs), Some(&ys), Some(&gate)]);
    let (out, ()) = output(rows.device, rows.xs.dtype(), rows.xs.elem_count(), |stream, out| {
        inputs.with(stream, |[xs, ys, gate]| {
            let (count, dim) = (rows.count as c_int, rows.dim as c_int);
            let args = ffi::Gate { xs, ys, gate, out, rows: count, dim, dtype: code(rows.xs.dtype())? };
            // SAFETY: xs, ys and out are of `rows × dim` contiguous elements, the gate of `dim`.
            check("gate", unsafe { ffi::talkie_gate(&args, stream.cu_stream().cast()) })
        })
    })?;
    Ok(Some(tensor(out, xs.dims())))
}

/// Adds `bias` (D) to `xs` (…, D), which nothing else may look at, and applies GELU (tanh) with `gelu`; both in place.
/// False where the kernel does not run.
pub(super) fn add_bias(xs: &Tensor, bias: &Tensor, gelu: bool) -> Result<bool> {
    let known = Rows::of(xs, usize::MAX)?.is_some_and(|rows| rows.dim == bias.elem_count());
    if !known || !xs.is_contiguous() {
        return Ok(false);
    }
    xs.inplace_op2(&bias.to_dtype(xs.dtype())?.contiguous()?, &AddBias { gelu })?;
    Ok(true)
}

struct AddBias {
    gelu: bool,
}

impl InplaceOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("the kernel that adds a bias is for CUDA devices")
    }

    fn cuda_fwd(
        &self,
        xs: &mut CudaStorage,
        xs_l: &Layout,
        bias: &CudaStorage,
        bias_l: &Layout,
    ) -> Result<()> {
        fn launch<T: CudaDType + DeviceRepr>(
            gelu: bool,
            (xs, xs_l): (&mut CudaStorage, &Layout),
            (bias, bias_l): (&CudaStorage, &Layout),
        ) -> Result<()> {
            let (stream, dtype) = (xs.device().cuda_stream(), xs.dtype());
            let (dim, len) = (bias_l.shape().elem_count(), xs_l.shape().elem_count());
            let (xs_at, _written) = xs.as_cuda_slice_mut::<T>()?.device_ptr_mut(&stream);
            let (bias_at, _read) = bias.as_cuda_slice::<T>()?.device_ptr(&stream);
            let at = |start: u64, layout: &Layout| {
                (start + (layout.start_offset() * size_of::<T>()) as u64) as *mut c_void
            };
            let args = ffi::Bias {
                xs: at(xs_at, xs_l),
                bias: at(bias_at, bias_l),
                rows: (len / dim) as c_int,
                dim: dim as c_int,
                gelu: gelu.into(),
                dtype: code(dtype)?,
            };
            // SAFETY: xs is of `rows × dim` contiguous elements, which this operation alone holds; the bias of `dim`.
            check("bias", unsafe { ffi::talkie_bias(&args, stream.cu_stream().cast()) })
        }
        match xs.dtype() {
            DType::BF16 => launch::<bf16>(self.gelu, (xs, xs_l), (bias, bias_l)),
            _ => launch::<f32>(self.gelu, (xs, xs_l), (bias, bias_l)),
        }
    }
}

/// Rows `xs` (…, C) scaled to length 1, times `scale` (C) in f32, with `silu` through that activation.
pub(super) fn unit_norm(xs: &Tensor, scale: &Tensor, silu: bool) -> Result<Option<Tensor>> {
    let Some(rows) = Rows::of(xs, WARP_VECTORS)? else { return Ok(None) };
    if !is_row_of(Some(scale), rows.dim) {
        return Ok(None);
    }
    let scale = scale.contiguous()?;
    let inputs = Inputs::new([Some(&rows.xs), Some(&scale)]);
    let (out, ()) = output(rows.device, rows.xs.dtype(), rows.xs.elem_count(), |stream, out| {
        inputs.with(stream, |[xs, scale]| {
            let args = ffi::UnitNorm {
                xs,
                scale,
                out,
                rows: rows.count as c_longlong,
                dim: rows.dim as c_int,
                silu: silu.into(),
                dtype: code(rows.xs.dtype())?,
            };
            // SAFETY: xs and out are of `rows × dim` contiguous elements, the scale of `dim`.
            check("unit norm", unsafe { ffi::talkie_unit_norm(&args, stream.cu_stream().cast()) })
        })
    })?;
    Ok(Some(tensor(out, xs.dims())))
}

/// Rows that a kernel's grid or a `c_int` can count.
const MAX_ROWS: usize = c_int::MAX as usize;

/// The device of `tensors`, if it is one whose kernels are to be used.
fn device<'a>(tensors: &[&'a Tensor]) -> Option<&'a CudaDevice> {
    let mut devices = tensors.iter().map(|xs| match xs.device() {
        Device::Cuda(device) => Some(device),
        _ => None,
    });
    let first = devices.next()??;
    (!kernels::are_plain() && devices.all(|device| device.is_some())).then_some(first)
}

/// A tensor as contiguous rows of its last dimension.
struct Rows<'a> {
    device: &'a CudaDevice,
    xs: Tensor,
    count: usize,
    dim: usize,
}

impl<'a> Rows<'a> {
    /// The rows of `xs`, if they consist of whole vectors, of at most `most` of them.
    fn of(xs: &'a Tensor, most: usize) -> Result<Option<Self>> {
        let Some(device) = device(&[xs]) else { return Ok(None) };
        let dim = xs.dim(D::Minus1)?;
        let bytes = dim * xs.dtype().size_in_bytes();
        let known = matches!(xs.dtype(), DType::BF16 | DType::F32);
        let whole = bytes.is_multiple_of(VECTOR_BYTES) && bytes / VECTOR_BYTES <= most;
        if !known || !whole || xs.elem_count() == 0 || xs.elem_count() / dim > MAX_ROWS {
            return Ok(None);
        }
        // A view may begin between two vectors, where the kernels cannot load.
        let xs = xs.contiguous()?;
        let aligned = (xs.layout().start_offset() * xs.dtype().size_in_bytes()).is_multiple_of(VECTOR_BYTES);
        let xs = if aligned { xs } else { xs.force_contiguous()? };
        Ok(Some(Self { device, count: xs.elem_count() / dim, dim, xs }))
    }
}

/// Whether `xs`, where there is one, is a row of `dim` values in f32.
fn is_row_of(xs: Option<&Tensor>, dim: usize) -> bool {
    xs.is_none_or(|xs| xs.elem_count() == dim && xs.dtype() == DType::F32)
}

/// `xs` as a contiguous row of `dim` values in f32.
fn row_of(xs: &Tensor, dim: usize) -> Result<Tensor> {
    if xs.elem_count() != dim {
        bail!("a norm with {} weights was given rows of {dim}", xs.elem_count())
    }
    xs.to_dtype(DType::F32)?.contiguous()
}

/// Tensors that a kernel reads, locked as long as this lives.
struct Inputs<'a, const N: usize>([Option<(Box<dyn Deref<Target = Storage> + 'a>, &'a Layout)>; N]);

impl<'a, const N: usize> Inputs<'a, N> {
    fn new(tensors: [Option<&'a Tensor>; N]) -> Self {
        Self(tensors.map(|xs| {
            xs.map(|xs| {
                let (storage, layout) = xs.storage_and_layout();
                (Box::new(storage) as Box<dyn Deref<Target = Storage> + 'a>, layout)
            })
        }))
    }

    /// Calls `launch` with where the tensors begin, null for those that are not there. What other streams still write
    /// of them is waited for on `stream`, and what `launch` puts on it is known to them as a use.
    fn with<T>(&self, stream: &CudaStream, launch: impl FnOnce([*mut c_void; N]) -> Result<T>) -> Result<T> {
        let mut uses: Vec<SyncOnDrop> = Vec::with_capacity(N);
        let mut pointers = [ptr::null_mut(); N];
        for (pointer, input) in pointers.iter_mut().zip(&self.0) {
            let Some((storage, layout)) = input else { continue };
            let Storage::Cuda(storage) = &***storage else {
                bail!("a kernel was given a tensor of another device")
            };
            let (start, used) = match storage.dtype() {
                DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(stream),
                DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(stream),
                other => bail!("a kernel was given a tensor of {other:?}"),
            };
            *pointer =
                (start + (layout.start_offset() * storage.dtype().size_in_bytes()) as u64) as *mut c_void;
            uses.push(used);
        }
        launch(pointers)
    }
}

/// Memory of `len` elements that `launch` has a kernel fill, and what it returns beside.
fn output<R>(
    device: &CudaDevice,
    dtype: DType,
    len: usize,
    launch: impl FnOnce(&CudaStream, *mut c_void) -> Result<R>,
) -> Result<(CudaStorage, R)> {
    fn of<T: CudaDType + DeviceRepr, R>(
        device: &CudaDevice,
        len: usize,
        launch: impl FnOnce(&CudaStream, *mut c_void) -> Result<R>,
    ) -> Result<(CudaStorage, R)> {
        // SAFETY: nothing reads the memory before the kernel has written all of it, on the same stream.
        let mut slice = unsafe { device.alloc::<T>(len)? };
        let stream = device.cuda_stream();
        let done = {
            let (pointer, _written) = slice.device_ptr_mut(&stream);
            launch(&stream, pointer as *mut c_void)?
        };
        Ok((CudaStorage::wrap_cuda_slice(slice, device.clone()), done))
    }
    match dtype {
        DType::BF16 => of::<bf16, R>(device, len, launch),
        DType::F32 => of::<f32, R>(device, len, launch),
        other => bail!("no kernel writes {other:?}"),
    }
}

fn tensor(storage: CudaStorage, shape: &[usize]) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// The kernels' word for a dtype.
fn code(dtype: DType) -> Result<c_int> {
    match dtype {
        DType::BF16 => Ok(ffi::BF16),
        DType::F32 => Ok(ffi::F32),
        other => bail!("no kernel knows {other:?}"),
    }
}

/// A failed launch as an error in candle's words for those of the driver.
fn check(kernel: &str, error: c_int) -> Result<()> {
    if error == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a string that lives as long as the process.
    let name = unsafe { CStr::from_ptr(ffi::talkie_error_name(error)) }.to_string_lossy();
    bail!("the kernel for {kernel} was not launched: DriverError({name})")
}
