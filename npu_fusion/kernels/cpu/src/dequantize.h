// int32 sums of an int8 product to the numbers they stand for, in the order of the reference kernel:
//
//     y = float(sum + int32 bias) * scale[n] * pertoken_scale[m] + float bias + offset, and one rounding
//
// What is not given is its neutral element: 0, 1, and -0.0 (which, unlike 0.0, changes no sum).
#pragma once

#include <algorithm>

#include "int8_gemm.h"

namespace npu {
namespace {

struct Dequantization {
    const float* scale;           // [n] or [1]
    const float* pertoken_scale;  // [m] or null
    const int32_t* int_bias;      // [n] or null
    const float* float_bias;      // [n] or null
    const float* offset;          // [n], [1] or null
    int64_t scale_step, offset_step;  // 1, or 0 for [1]
};

template <class Out>
NPU_INLINE void put(Out* p, vf x, int64_t n = W) {
    store(p, x, n);
}
NPU_INLINE void put(int8_t* p, vf x, int64_t n = W) { store(p, to_int8(x), n); }

// What STRIP columns have in common, as whole vectors.
struct Columns {
    alignas(64) int32_t int_bias[STRIP];
    alignas(64) float scale[STRIP], float_bias[STRIP], offset[STRIP];

    Columns(const Dequantization& d, int64_t column, int64_t columns) {
        fill(int_bias, d.int_bias, column, columns, 1, 0);
        fill(scale, d.scale, column, columns, d.scale_step, 0.0f);
        fill(float_bias, d.float_bias, column, columns, 1, -0.0f);
        fill(offset, d.offset, column, columns, d.offset_step, -0.0f);
    }

    template <class T>
    static void fill(T* to, const T* from, int64_t column, int64_t columns, int64_t step, T neutral) {
        if (from && step == 1) {
            std::memcpy(to, from + column, columns * sizeof(T));
            // After megabytes of weights the next ones are far away, and waiting for them would stop the
            // weights.
            for (int64_t i = 0; i < STRIP; i += 64 / sizeof(T)) __builtin_prefetch(from + column + STRIP + i);
        } else {
            std::fill_n(to, STRIP, from ? *from : neutral);
        }
    }
};

// One vector of y, or its first `n...` elements.
template <class Out, class... N>
NPU_INLINE void dequantize(const int32_t* sums, const Columns& of, int64_t c, float row_scale, Out* y,
                           N... n) {
    vi sum = (vi)((vu)load(sums + c) + (vu)load(of.int_bias + c));
    vf x = to_float(sum) * load(of.scale + c) * row_scale;
    put(y + c, x + load(of.float_bias + c) + load(of.offset + c), n...);
}

// Row by row: a column of vectors of y would touch every line of y more than once, each time from farther
// away.
template <class Out>
void dequantize(const Dequantization& d, const Sums& s, Out* y, int64_t y_step) {
    for (int64_t first = 0; first < s.columns; first += STRIP) {
        int64_t columns = least(STRIP, s.columns - first);
        Columns of(d, s.column + first, columns);
        for (int64_t r = 0; r < s.rows; ++r) {
            const int32_t* sums = s.data + r * s.step + first;
            float row_scale = d.pertoken_scale ? d.pertoken_scale[s.row + r] : 1.0f;
            Out* to = y + (s.row + r) * y_step + s.column + first;
            int64_t c = 0;
            for (; c + W <= columns; c += W) dequantize(sums, of, c, row_scale, to);
            if (c < columns) dequantize(sums, of, c, row_scale, to, columns - c);
        }
    }
}

}  // namespace
}  // namespace npu
