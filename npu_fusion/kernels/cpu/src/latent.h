// Rows of a product on their way through RMSNorm and rotation: what the kernels of latent attention share.
//
// All arithmetic is fp32 in the order of the reference kernels; between its steps a row stays in a buffer of the
// thread, in the first-level cache.
#pragma once

#include "norm.h"
#include "rows.h"

namespace npu {
namespace {

// A product [rows, width] as the matrix multiplication left it: floating-point numbers, or int32 sums that are
// still to be multiplied by a scale for each row and one for each column.
struct Product {
    const void* data;
    int64_t type;
    const float* row_scale;     // [rows], null unless type is INT32
    const float* column_scale;  // [width]
    int64_t rows, width;
};

// fn(element of the product, element of the call): the same floating-point type, or int32 sums of a bfloat16 call.
template <class Fn>
Status with_product(const Product& p, int64_t type, const Fn& fn) {
    if (p.type == INT32 && type == BFLOAT16) return fn(int32_t{}, bf16{});
    if (p.type != type) return REFUSED;
    return with_float_type(type, [&](auto f) { return fn(f, f); });
}

// y[0..n) = columns at.. of a row in fp32.
template <class In>
NPU_INLINE void values(const Product& p, int64_t row, int64_t at, int64_t n, float* y) {
    const In* x = static_cast<const In*>(p.data) + row * p.width + at;
    auto step = [&](int64_t j, auto... count) __attribute__((always_inline)) {
        if constexpr (std::is_same_v<In, int32_t>) {
            vf sums = to_float(load(x + j, count...));
            store(y + j, sums * p.row_scale[row] * load(p.column_scale + at + j, count...), count...);
        } else {
            store(y + j, load(x + j, count...), count...);
        }
    };
    int64_t j = 0;
    for (; j + W <= n; j += W) step(j);
    if (j < n) step(j, n - j);
}

// x * rstd * gamma * factor, in place, with rstd = 1 / sqrt(mean(x^2) + epsilon).
template <class Gamma>
NPU_INLINE void normalize(float* x, const Gamma* gamma, float epsilon, float factor, int64_t n) {
    const float squares = sum_of_squares(n, [&](int64_t j, auto... count) __attribute__((always_inline)) {
        return load_block<Natural>(x + j, count...);
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon);
    for_blocks(n, [&](int64_t j, auto... count) __attribute__((always_inline)) {
        Block v = load_block<Natural>(x + j, count...) * rstd * load_block<Natural>(gamma + j, count...);
        store_block<Natural>(x + j, v * factor, count...);
    });
}

// The rotation of npu_interleave_rope: pairs of neighbours in, halves out. cos and sin are read by halves.
template <class Angle>
NPU_INLINE void rotate(const float* pairs, const Angle* cos, const Angle* sin, float* y, int64_t width) {
    const int64_t half = width / 2;
    auto step = [&](int64_t j, auto... n) __attribute__((always_inline)) {
        Block v = load_block<EvenOdd>(pairs + 2 * j, 2 * n...);
        store(y + j, v.a * load(cos + j, n...) + -v.b * load(sin + j, n...), n...);
        store(y + half + j, v.b * load(cos + half + j, n...) + v.a * load(sin + half + j, n...), n...);
    };
    int64_t j = 0;
    for (; j + W <= half; j += W) step(j);
    if (j < half) step(j, half - j);
}

template <class In, class Out>
NPU_INLINE void convert(const In* x, Out* y, int64_t n) {
    for_blocks(n, [&](int64_t j, auto... count) __attribute__((always_inline)) {
        store_block<Natural>(y + j, load_block<Natural>(x + j, count...), count...);
    });
}

}  // namespace
}  // namespace npu
