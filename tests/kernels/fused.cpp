// Holds the kernels of kernels/fused.cu to their formulas in double precision, by the emulator; scripts/check-kernels.sh
// builds and runs it. The widths are those at which a thread holds one vector, several, and none.
#include "emulator.h"
#include "talkie.h"
#include FUSED

#include <cstdio>
#include <random>

static std::mt19937 generator(1);
static int failures = 0;

template <typename T> static float get(T x);
template <> float get(float x) { return x; }
template <> float get(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> static T put(float x);
template <> float put(float x) { return x; }
template <> __nv_bfloat16 put(float x) { return __float2bfloat16_rn(x); }
template <typename T> static double rounded(double x) { return get(put<T>(float(x))); }
template <typename T> constexpr int CODE = sizeof(T) == 2 ? TALKIE_BF16 : TALKIE_F32;
template <typename T> constexpr double TOLERANCE = sizeof(T) == 2 ? 1e-2 : 1e-5;

// Memory at a multiple of 16 bytes, with a value behind its end that must stay.
template <typename T> struct Buffer {
    std::vector<float4> memory;
    size_t len;
    explicit Buffer(size_t len) : memory(len * sizeof(T) / 16 + 2), len(len) { data()[len] = put<T>(77); }
    T *data() { return reinterpret_cast<T *>(memory.data()); }
    double operator[](size_t i) { return get(data()[i]); }
    static Buffer drawn(size_t len) {
        std::normal_distribution<float> normal(0.3f, 1);
        Buffer buffer(len);
        for (size_t i = 0; i < len; i++) buffer.data()[i] = put<T>(normal(generator));
        return buffer;
    }
};

template <typename T, typename F> static void check(const char *name, int dim, Buffer<T> &found, F expected) {
    double worst = 0;
    for (size_t i = 0; i < found.len; i++) {
        const double value = expected(i), error = std::abs(found[i] - value) / std::max(1.0, std::abs(value));
        worst = error > worst || std::isnan(error) ? error : worst;
    }
    const bool holds = worst <= TOLERANCE<T> && found[found.len] == 77;
    failures += !holds;
    std::printf("%s %-24s %-4s %5d: %.1e\n", holds ? "ok    " : "FAILED", name, CODE<T> ? "f32" : "bf16", dim, worst);
}

static void called(const char *name, int error) {
    if (error) failures++, std::printf("FAILED %s returned %d\n", name, error);
}

static double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// The mean and 1 / deviation of a row.
static std::pair<double, double> moments(const std::function<double(size_t)> &row, int dim, double eps) {
    double mean = 0, squares = 0;
    for (int i = 0; i < dim; i++) mean += row(i) / dim;
    for (int i = 0; i < dim; i++) squares += (row(i) - mean) * (row(i) - mean) / dim;
    return {mean, 1 / std::sqrt(squares + eps)};
}

template <typename T> static void layer_norms(int rows, int dim) {
    const float eps = 1e-6f;
    auto xs = Buffer<T>::drawn(rows * dim), ys = Buffer<T>::drawn(rows * dim);
    auto gate = Buffer<float>::drawn(dim), weight = Buffer<float>::drawn(dim), bias = Buffer<float>::drawn(dim);
    for (int kind = 0; kind < 4; kind++) {
        const bool summed = kind > 0, gated = kind == 2, round = kind == 3;
        Buffer<T> out(rows * dim), sums(rows * dim);
        const TalkieLayerNorm args = {xs.data(), summed ? ys.data() : nullptr, gated ? gate.data() : nullptr,
                                      summed ? sums.data() : nullptr, weight.data(), bias.data(), out.data(),
                                      rows, dim, eps, round, CODE<T>};
        called("layer norm", talkie_layer_norm(&args, nullptr));
        auto sum = [&](size_t i) {
            return summed ? rounded<T>(xs[i] + ys[i] * (gated ? gate[i % dim] : 1)) : xs[i];
        };
        if (summed) check(gated ? "gated sum" : "sum", dim, sums, sum);
        std::vector<std::pair<double, double>> of_row;
        for (int r = 0; r < rows; r++) of_row.push_back(moments([&](size_t i) { return sum(r * dim + i); }, dim, eps));
        check(summed ? "layer norm of a sum" : "layer norm", dim, out, [&](size_t i) {
            const auto [mean, factor] = of_row[i / dim];
            const double x = (sum(i) - mean) * factor;
            return (round ? rounded<T>(x) : x) * weight[i % dim] + bias[i % dim];
        });
    }
}

template <typename T> static void rms_ropes(int rows, int dim, int head_dim, int tokens) {
    const float eps = 1e-6f;
    auto xs = Buffer<T>::drawn(rows * dim);
    auto weight = Buffer<float>::drawn(dim);
    auto cos = Buffer<float>::drawn(tokens * head_dim / 2), sin = Buffer<float>::drawn(tokens * head_dim / 2);
    for (int kind = 0; kind < 3; kind++) {
        const bool normed = kind != 1, turned = kind != 0;
        Buffer<T> out(rows * dim);
        const TalkieRmsRope args = {xs.data(), normed ? weight.data() : nullptr, turned ? cos.data() : nullptr,
                                    turned ? sin.data() : nullptr, out.data(), rows, dim, head_dim, tokens, eps, CODE<T>};
        called("norm and rotation", talkie_rms_rope(&args, nullptr));
        auto value = [&](size_t i) {
            if (!normed) return xs[i];
            double squares = 0;
            for (int k = 0; k < dim; k++) squares += xs[i / dim * dim + k] * xs[i / dim * dim + k] / dim;
            return rounded<T>(rounded<T>(xs[i] / std::sqrt(squares + eps)) * weight[i % dim]);
        };
        check(normed ? turned ? "RMS norm and rotation" : "RMS norm" : "rotation", dim, out, [&](size_t i) {
            if (!turned) return value(i);
            const size_t angle = i / dim % tokens * (head_dim / 2) + i % head_dim / 2, first = i / 2 * 2;
            return i % 2 == 0 ? value(first) * cos[angle] - value(first + 1) * sin[angle]
                              : value(first) * sin[angle] + value(first + 1) * cos[angle];
        });
    }
}

template <typename T> static void pointwise(int rows, int dim) {
    auto xs = Buffer<T>::drawn(rows * dim), ys = Buffer<T>::drawn(rows * dim), bias = Buffer<T>::drawn(dim);
    auto gate = Buffer<float>::drawn(dim);
    Buffer<T> out(rows * dim);
    const TalkieGate gated = {xs.data(), ys.data(), gate.data(), out.data(), rows, dim, CODE<T>};
    called("gate", talkie_gate(&gated, nullptr));
    check("gate", dim, out, [&](size_t i) { return xs[i] + ys[i] * gate[i % dim]; });
    for (int activated = 0; activated < 2; activated++) {
        Buffer<T> in_place = xs;
        const TalkieBias args = {in_place.data(), bias.data(), rows, dim, activated, CODE<T>};
        called("bias", talkie_bias(&args, nullptr));
        check(activated ? "bias and GELU" : "bias", dim, in_place, [&](size_t i) {
            const double sum = xs[i] + bias[i % dim];
            return activated ? gelu(rounded<T>(sum)) : sum;
        });
    }
}

template <typename T> static void unit_norms(int rows, int dim) {
    auto xs = Buffer<T>::drawn(rows * dim);
    for (int i = 0; i < dim; i++) xs.data()[i] = put<T>(0); // a row that has no length
    auto scale = Buffer<float>::drawn(dim);
    for (int activated = 0; activated < 2; activated++) {
        Buffer<T> out(rows * dim);
        const TalkieUnitNorm args = {xs.data(), scale.data(), out.data(), rows, dim, activated, CODE<T>};
        called("unit norm", talkie_unit_norm(&args, nullptr));
        check(activated ? "unit norm and SiLU" : "unit norm", dim, out, [&](size_t i) {
            double squares = 0;
            for (int k = 0; k < dim; k++) squares += xs[i / dim * dim + k] * xs[i / dim * dim + k];
            const double x = xs[i] / std::max(std::sqrt(squares), 1e-12) * scale[i % dim];
            return activated ? x / (1 + std::exp(-x)) : x;
        });
    }
}

template <typename T> static void all() {
    for (int dim : {8, 1000, 2048, 5120}) layer_norms<T>(3, dim), pointwise<T>(3, dim);
    rms_ropes<T>(5, 256, 128, 3), rms_ropes<T>(3, 5120, 128, 3), rms_ropes<T>(2, 80, 16, 1);
    for (int dim : {8, 96, 384}) unit_norms<T>(11, dim);
}

int main() {
    all<float>();
    all<__nv_bfloat16>();
    const TalkieGate unknown = {nullptr, nullptr, nullptr, nullptr, 1, 8, 9};
    if (talkie_gate(&unknown, nullptr) == cudaSuccess) failures++, std::printf("FAILED an unknown dtype was taken\n");
    return failures != 0;
}
