// Sums of products of int8: the instruction that multiplies four pairs of bytes and adds them to an int32
// lane, and what goes with it. All results are exact modulo 2^32.
//
// AVX-512 multiplies an unsigned byte by a signed one. The weight is made the unsigned one by flipping its
// top bit, which adds SHIFT = 128 to it; the sum is then too large by SHIFT * sum(x), one number for each row
// of x. So neither sums over the weight nor a prepared copy of it are needed. AVX2 has no such instruction
// (vpmaddubsw saturates): bytes are widened to 16 bits, even and odd ones apart, so that the same four meet
// in a lane.
#pragma once

#include <type_traits>

#include "simd.h"
#include "tiles.h"

namespace npu {
namespace {

// 16 registers instead of 32, and two of them for a vector of split bytes: tiles must be smaller.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool FEW_REGISTERS = true;
#else
constexpr bool FEW_REGISTERS = false;
#endif

// fn(std::integral_constant<int, rows>) for the number of rows of a tile, 1 to MOST.
template <int MOST, class Fn>
NPU_INLINE void with_rows(int64_t rows, const Fn& fn) {
    if constexpr (MOST > 1) {
        if (rows < MOST) return with_rows<MOST - 1>(rows, fn);
    }
    fn(std::integral_constant<int, MOST>{});
}

// Bytes in a vector. Four of them are one lane of int32.
constexpr int BYTES = 4 * W;

typedef int8_t vb __attribute__((vector_size(BYTES)));

NPU_INLINE vb load(const int8_t* p) { return load_bytes<vb>(p, BYTES); }
NPU_INLINE vb load(const int8_t* p, int64_t n) { return load_bytes<vb>(p, n); }

// stored(w) is what a panel keeps of weights; weight(stored(w)) and value(x) are what dot4 takes.
#if defined(__AVX512VNNI__)

constexpr uint32_t SHIFT = 128;
typedef vb Weight;
typedef vb Value;

NPU_INLINE vb stored(vb w) { return w ^ static_cast<int8_t>(-128); }
NPU_INLINE Weight weight(vb stored_w) { return stored_w; }
NPU_INLINE Value value(vb x) { return x; }

// As text: given the intrinsic, GCC 12 copies the accumulators of a large tile to the stack and back.
NPU_INLINE vi dot4(vi sum, Weight w, Value x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

#elif defined(__AVX2__)

constexpr uint32_t SHIFT = 0;
struct Split {
    __m256i even, odd;
};
typedef Split Weight;
typedef Split Value;

NPU_INLINE Split split(vb x) {
    __m256i pairs = (__m256i)x;
    return {_mm256_srai_epi16(_mm256_slli_epi16(pairs, 8), 8), _mm256_srai_epi16(pairs, 8)};
}
NPU_INLINE vb stored(vb w) { return w; }
NPU_INLINE Weight weight(vb stored_w) { return split(stored_w); }
NPU_INLINE Value value(vb x) { return split(x); }
NPU_INLINE vi dot4(vi sum, Weight w, Value x) {
    __m256i even = _mm256_madd_epi16(w.even, x.even), odd = _mm256_madd_epi16(w.odd, x.odd);
    return (vi)_mm256_add_epi32(_mm256_add_epi32((__m256i)sum, even), odd);
}

#else

constexpr uint32_t SHIFT = 0;
typedef vb Weight;
typedef vb Value;

NPU_INLINE vb stored(vb w) { return w; }
NPU_INLINE Weight weight(vb stored_w) { return stored_w; }
NPU_INLINE Value value(vb x) { return x; }
NPU_INLINE vi dot4(vi sum, Weight w, Value x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
    // Lanes are little-endian: byte i of a lane is moved to the top, and down again with its sign.
    vu all_w = bits<vu>(w), all_x = bits<vu>(x);
    for (int byte = 0; byte < 4; ++byte) {
        int up = 24 - 8 * byte;
        sum = (vi)((vu)sum + (vu)((((vi)(all_w << up)) >> 24) * (((vi)(all_x << up)) >> 24)));
    }
    return sum;
#endif
}

#endif

// Four bytes of x in every lane.
NPU_INLINE Value broadcast4(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return value(bits<vb>(set(four)));
}
NPU_INLINE Value broadcast4(const int8_t* x, int64_t n) {
    int32_t four = 0;
    std::memcpy(&four, x, n);
    return value(bits<vb>(set(four)));
}

// -- lanes --------------------------------------------------------------------------------------------------

typedef int32_t vi4 __attribute__((vector_size(16)));
typedef uint32_t vu4 __attribute__((vector_size(16)));

// In every 16 bytes: lane j of result i is lane i of input j.
NPU_INLINE void transpose4(const vi (&x)[4], vi (&y)[4]) {
#if defined(__AVX512F__)
    __m512i low01 = _mm512_unpacklo_epi32((__m512i)x[0], (__m512i)x[1]);
    __m512i low23 = _mm512_unpacklo_epi32((__m512i)x[2], (__m512i)x[3]);
    __m512i high01 = _mm512_unpackhi_epi32((__m512i)x[0], (__m512i)x[1]);
    __m512i high23 = _mm512_unpackhi_epi32((__m512i)x[2], (__m512i)x[3]);
    y[0] = (vi)_mm512_unpacklo_epi64(low01, low23);
    y[1] = (vi)_mm512_unpackhi_epi64(low01, low23);
    y[2] = (vi)_mm512_unpacklo_epi64(high01, high23);
    y[3] = (vi)_mm512_unpackhi_epi64(high01, high23);
#elif defined(__AVX2__)
    __m256i low01 = _mm256_unpacklo_epi32((__m256i)x[0], (__m256i)x[1]);
    __m256i low23 = _mm256_unpacklo_epi32((__m256i)x[2], (__m256i)x[3]);
    __m256i high01 = _mm256_unpackhi_epi32((__m256i)x[0], (__m256i)x[1]);
    __m256i high23 = _mm256_unpackhi_epi32((__m256i)x[2], (__m256i)x[3]);
    y[0] = (vi)_mm256_unpacklo_epi64(low01, low23);
    y[1] = (vi)_mm256_unpackhi_epi64(low01, low23);
    y[2] = (vi)_mm256_unpacklo_epi64(high01, high23);
    y[3] = (vi)_mm256_unpackhi_epi64(high01, high23);
#elif defined(__aarch64__)
    int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32((int32x4_t)x[0], (int32x4_t)x[1]));
    int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32((int32x4_t)x[2], (int32x4_t)x[3]));
    int64x2_t high01 = vreinterpretq_s64_s32(vzip2q_s32((int32x4_t)x[0], (int32x4_t)x[1]));
    int64x2_t high23 = vreinterpretq_s64_s32(vzip2q_s32((int32x4_t)x[2], (int32x4_t)x[3]));
    y[0] = (vi)vzip1q_s64(low01, low23);
    y[1] = (vi)vzip2q_s64(low01, low23);
    y[2] = (vi)vzip1q_s64(high01, high23);
    y[3] = (vi)vzip2q_s64(high01, high23);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < W; ++j) y[i][j] = x[j % 4][j / 4 * 4 + i];
#endif
}

// 16 bytes number j of result i are 16 bytes number i of input j.
NPU_INLINE void transpose_quarters(const vi (&x)[W / 4], vi (&y)[W / 4]) {
#if defined(__AVX512F__)
    __m512i low01 = _mm512_shuffle_i32x4((__m512i)x[0], (__m512i)x[1], 0x44);
    __m512i low23 = _mm512_shuffle_i32x4((__m512i)x[2], (__m512i)x[3], 0x44);
    __m512i high01 = _mm512_shuffle_i32x4((__m512i)x[0], (__m512i)x[1], 0xee);
    __m512i high23 = _mm512_shuffle_i32x4((__m512i)x[2], (__m512i)x[3], 0xee);
    y[0] = (vi)_mm512_shuffle_i32x4(low01, low23, 0x88);
    y[1] = (vi)_mm512_shuffle_i32x4(low01, low23, 0xdd);
    y[2] = (vi)_mm512_shuffle_i32x4(high01, high23, 0x88);
    y[3] = (vi)_mm512_shuffle_i32x4(high01, high23, 0xdd);
#else
    vi4 from[W / 4][W / 4], to[W / 4][W / 4];
    std::memcpy(from, x, sizeof from);
    NPU_UNROLL for (int i = 0; i < W / 4; ++i) {
        NPU_UNROLL for (int j = 0; j < W / 4; ++j) to[i][j] = from[j][i];
    }
    std::memcpy(y, to, sizeof to);
#endif
}

// In every 16 bytes: lane j of result i is byte 4 * i + j of each of the four inputs.
NPU_INLINE void interleave4(const vb (&x)[4], vb (&y)[4]) {
#if defined(__AVX512F__)
    __m512i low01 = _mm512_unpacklo_epi8((__m512i)x[0], (__m512i)x[1]);
    __m512i low23 = _mm512_unpacklo_epi8((__m512i)x[2], (__m512i)x[3]);
    __m512i high01 = _mm512_unpackhi_epi8((__m512i)x[0], (__m512i)x[1]);
    __m512i high23 = _mm512_unpackhi_epi8((__m512i)x[2], (__m512i)x[3]);
    y[0] = (vb)_mm512_unpacklo_epi16(low01, low23);
    y[1] = (vb)_mm512_unpackhi_epi16(low01, low23);
    y[2] = (vb)_mm512_unpacklo_epi16(high01, high23);
    y[3] = (vb)_mm512_unpackhi_epi16(high01, high23);
#elif defined(__AVX2__)
    __m256i low01 = _mm256_unpacklo_epi8((__m256i)x[0], (__m256i)x[1]);
    __m256i low23 = _mm256_unpacklo_epi8((__m256i)x[2], (__m256i)x[3]);
    __m256i high01 = _mm256_unpackhi_epi8((__m256i)x[0], (__m256i)x[1]);
    __m256i high23 = _mm256_unpackhi_epi8((__m256i)x[2], (__m256i)x[3]);
    y[0] = (vb)_mm256_unpacklo_epi16(low01, low23);
    y[1] = (vb)_mm256_unpackhi_epi16(low01, low23);
    y[2] = (vb)_mm256_unpacklo_epi16(high01, high23);
    y[3] = (vb)_mm256_unpackhi_epi16(high01, high23);
#elif defined(__aarch64__)
    int16x8_t low01 = vreinterpretq_s16_s8(vzip1q_s8((int8x16_t)x[0], (int8x16_t)x[1]));
    int16x8_t low23 = vreinterpretq_s16_s8(vzip1q_s8((int8x16_t)x[2], (int8x16_t)x[3]));
    int16x8_t high01 = vreinterpretq_s16_s8(vzip2q_s8((int8x16_t)x[0], (int8x16_t)x[1]));
    int16x8_t high23 = vreinterpretq_s16_s8(vzip2q_s8((int8x16_t)x[2], (int8x16_t)x[3]));
    y[0] = (vb)vzip1q_s16(low01, low23);
    y[1] = (vb)vzip2q_s16(low01, low23);
    y[2] = (vb)vzip1q_s16(high01, high23);
    y[3] = (vb)vzip2q_s16(high01, high23);
#else
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < BYTES; ++j) y[i][j] = x[j % 4][j / 16 * 16 + 4 * i + j % 16 / 4];
#endif
}

// The sums over the lanes of four vectors, and of one.
NPU_INLINE vi4 lane_sums(const vi (&x)[4]) {
    vi y[4];
    transpose4(x, y);
    vu all = ((vu)y[0] + (vu)y[1]) + ((vu)y[2] + (vu)y[3]);
    vu4 parts[W / 4];
    std::memcpy(parts, &all, sizeof all);
    vu4 total = parts[0];
    for (int i = 1; i < W / 4; ++i) total += parts[i];
    return (vi4)total;
}
NPU_INLINE uint32_t lane_sum(vi x) {
    uint32_t lanes[W], total = 0;
    std::memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < W; ++i) total += lanes[i];
    return total;
}

}  // namespace
}  // namespace npu
