// Convolutions as implicit matrix products, channels last, by CUTLASS: no column matrix is built, and the bias is added
// before the result leaves the registers. bf16 is multiplied as it is, f32 as TF32, both summed in f32.
#include "talkie.h"

// The second header needs what the first includes.
#include "cutlass/conv/kernel/default_conv3d_fprop.h"
#include "cutlass/conv/device/implicit_gemm_convolution.h"

using Layout = cutlass::layout::TensorNDHWC;

template <typename T> struct Instruction;
template <> struct Instruction<cutlass::bfloat16_t> {
    using Shape = cutlass::gemm::GemmShape<16, 8, 16>;
    static constexpr int DEPTH = 32; // of a tile, in input channels
};
template <> struct Instruction<float> {
    using Shape = cutlass::gemm::GemmShape<16, 8, 8>;
    static constexpr int DEPTH = 16;
};

// Tiles of 128 pixels and COLS output channels on four warps.
template <typename T, int COLS> static int run(const TalkieConv &args, cudaStream_t stream) {
    using Inst = Instruction<T>;
    using Kernel = typename cutlass::conv::kernel::DefaultConv3dFprop<
        T, Layout, T, Layout, T, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
        cutlass::gemm::GemmShape<128, COLS, Inst::DEPTH>, cutlass::gemm::GemmShape<64, COLS / 2, Inst::DEPTH>,
        typename Inst::Shape, cutlass::epilogue::thread::LinearCombination<T, 16 / sizeof(T), float, float>,
        cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 4, cutlass::arch::OpMultiplyAdd,
        cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;
    using Conv = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;

    const int *size = args.size, *kernel = args.kernel, *stride = args.stride, *padding = args.padding, *out = args.out_size;
    const cutlass::Tensor5DCoord xs(args.batch, size[0], size[1], size[2], args.in_channels);
    const cutlass::Tensor5DCoord weight(args.out_channels, kernel[0], kernel[1], kernel[2], args.in_channels);
    const cutlass::Tensor5DCoord ys(args.batch, out[0], out[1], out[2], args.out_channels);
    const cutlass::conv::Conv3dProblemSize problem(
        xs, weight, cutlass::make_Coord(padding[0], padding[1], padding[2]),
        cutlass::make_Coord(stride[0], stride[1], stride[2]), cutlass::make_Coord(1, 1, 1), ys,
        cutlass::conv::Mode::kCrossCorrelation, 1);
    // Every pixel adds the same bias: a tensor whose pixels all lie at the same place.
    const Layout everywhere(cutlass::make_Coord(0, 0, 0, 0));
    typename Conv::Arguments arguments(
        problem, {(T *)args.xs, Layout::packed(xs)}, {(T *)args.weight, Layout::packed(weight)},
        {(T *)args.bias, everywhere}, {(T *)args.out, Layout::packed(ys)}, {1.0f, 1.0f});

    Conv conv;
    if (Conv::can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
    cutlass::Status status = conv.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = conv(stream);
    if (status == cutlass::Status::kSuccess) return cudaSuccess;
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorUnknown : error;
}

template <typename T> static int dispatch(const TalkieConv &args, cudaStream_t stream) {
    // The widths of the Wan VAE are 96 and its multiples: 96 and 192 fill tiles of 96 exactly.
    if (args.out_channels % 96 == 0 && args.out_channels % 128 != 0) return run<T, 96>(args, stream);
    return args.out_channels <= 64 ? run<T, 64>(args, stream) : run<T, 128>(args, stream);
}

extern "C" int talkie_conv(const TalkieConv *args, cudaStream_t stream) {
    switch (args->dtype) {
    case TALKIE_BF16: return dispatch<cutlass::bfloat16_t>(*args, stream);
    case TALKIE_F32: return dispatch<float>(*args, stream);
    default: return cudaErrorInvalidValue;
    }
}
