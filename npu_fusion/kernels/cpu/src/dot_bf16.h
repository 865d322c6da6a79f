// Sums of products of bf16 in fp32: two neighbours of k in each 32-bit lane, multiplied pair by pair and added to the
// lane's sum.
//
// Processors with AVX512_BF16 have an instruction for it. It treats denormals as zero, as the matrix products of
// oneDNN on these processors do. Elsewhere a pair is widened: the even number is the upper half of an fp32 number
// after a shift, the odd one already is.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"
#include "tiles.h"

namespace npu {
namespace {

struct WidenedPairs {
    struct Pairs {
        vf even, odd;
    };
    NPU_INLINE Pairs pairs(vi x) { return {bits<vf>(x << 16), bits<vf>(x & static_cast<int32_t>(0xffff0000))}; }
    NPU_INLINE vf dot2(vf sum, Pairs w, Pairs x) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }

    static bool available() { return true; }
};

#if defined(__AVX512F__)
struct NativePairs {
    typedef vi Pairs;
    NPU_INLINE Pairs pairs(vi x) { return x; }
    // As text: the variant is compiled for processors without it, too.
    NPU_INLINE vf dot2(vf sum, Pairs w, Pairs x) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }

    static bool available() { return __builtin_cpu_supports("avx512bf16"); }
};
#else
typedef WidenedPairs NativePairs;
#endif

// Two rows of 2 W numbers become pairs: in every 16 bytes, low has those of the first four columns of eight.
NPU_INLINE void interleave2(vi a, vi b, vi& low, vi& high) {
#if defined(__AVX512F__)
    low = (vi)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    high = (vi)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    low = (vi)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
    high = (vi)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
    low = (vi)vzip1q_s16((int16x8_t)a, (int16x8_t)b);
    high = (vi)vzip2q_s16((int16x8_t)a, (int16x8_t)b);
#endif
}

// -- what products are made of -----------------------------------------------------------------------------------

// y = x @ w for each matrix of a batch. Steps are elements from one matrix (batch) or row to the next; the elements
// of a row lie together.
struct Bf16Product {
    const bf16* x;
    int64_t x_batch, x_step;
    const bf16* w;  // [k, n], or [n, k] if w_has_rows_of_k
    int64_t w_batch, w_step, w_has_rows_of_k;
    bf16* y;
    int64_t y_batch, y_step;
    int64_t batches, m, n, k, threads;
};

// A tile fills the registers: sums, the weights of one step, one value.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TILE_ROWS = 2;
#else
constexpr int TILE_ROWS = 6;
#endif

// fn(std::integral_constant<int, rows>) for 1 <= rows <= TILE_ROWS.
template <int R = TILE_ROWS, class Fn>
NPU_INLINE void with_rows(int64_t rows, const Fn& fn) {
    if (rows == R)
        fn(std::integral_constant<int, R>{});
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, fn);
}

}  // namespace
}  // namespace npu
