// Two vectors of floats at once, in the lane order that costs least for the type that they are read as.
//
// A 32-bit word holds two bf16: shifting and masking it gives the even elements and the odd ones, one
// instruction each, where widening either half takes a shuffle; on the way back the halves of the words are
// put together again. Arithmetic element by element does not mind the order, if every operand has it:
//
//     EvenOdd    a = elements 0, 2, 4 ..   b = elements 1, 3, 5 ..
//     Natural    a = the first W           b = the next W
//
// Order<In> is the better one for a kernel that reads In. Loads and stores with a count n < BLOCK take the
// first n elements; the others are read as 0.
#pragma once

#include <type_traits>

#include "simd.h"

// For member functions and for lambdas: NPU_INLINE makes functions static.
#define NPU_MEMBER inline __attribute__((always_inline))
#define NPU_LAMBDA __attribute__((always_inline))

namespace npu {
namespace {

constexpr int64_t BLOCK = 2 * W;

// A block of 16-bit elements, for what can be said of them as integers.
typedef int16_t vi16 __attribute__((vector_size(4 * W)));

NPU_INLINE vi16 max(vi16 a, vi16 b) {
#if defined(__AVX512F__)
    return (vi16)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi16)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
    vi16 greater = a > b;
    return (a & greater) | (b & ~greater);
#endif
}

struct Block {
    vf a, b;
};

NPU_INLINE Block operator+(Block x, Block y) { return {x.a + y.a, x.b + y.b}; }
NPU_INLINE Block operator*(Block x, Block y) { return {x.a * y.a, x.b * y.b}; }
NPU_INLINE Block operator/(Block x, Block y) { return {x.a / y.a, x.b / y.b}; }
NPU_INLINE Block operator+(Block x, float y) { return {x.a + y, x.b + y}; }
NPU_INLINE Block operator*(Block x, float y) { return {x.a * y, x.b * y}; }
NPU_INLINE Block operator/(Block x, float y) { return {x.a / y, x.b / y}; }
NPU_INLINE Block operator-(Block x) { return {-x.a, -x.b}; }
NPU_INLINE vi magnitude(Block x) { return max(magnitude(x.a), magnitude(x.b)); }

NPU_INLINE Block interleaved(Block x) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return {_mm512_permutex2var_ps(x.a, low, x.b),
            _mm512_permutex2var_ps(x.a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), x.b)};
#elif defined(__AVX2__)
    __m256 low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
#elif defined(__aarch64__)
    return {vzip1q_f32(x.a, x.b), vzip2q_f32(x.a, x.b)};
#else
    Block y;
    for (int i = 0; i < 2 * W; ++i) (i < W ? y.a : y.b)[i % W] = (i % 2 ? x.b : x.a)[i / 2];
    return y;
#endif
}

NPU_INLINE Block deinterleaved(Block x) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_permutex2var_ps(x.a, even, x.b),
            _mm512_permutex2var_ps(x.a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), x.b)};
#elif defined(__AVX2__)
    __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(x.a, x.b, 0x88));
    __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(x.a, x.b, 0xdd));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)),
            _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
#elif defined(__aarch64__)
    return {vuzp1q_f32(x.a, x.b), vuzp2q_f32(x.a, x.b)};
#else
    Block y;
    for (int i = 0; i < 2 * W; ++i) (i % 2 ? y.b : y.a)[i / 2] = (i < W ? x.a : x.b)[i % W];
    return y;
#endif
}

// The low 16 bits of each 32, which have to be all there is on AVX2.
NPU_INLINE vu16 low_words(vu x) {
#if defined(__AVX512F__)
    return (vu16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
    __m256i y = (__m256i)x;
    return (vu16)_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
#else
    return __builtin_convertvector(x, vu16);
#endif
}

// A bf16 in the upper half of each word; what is below it is still to be cut off.
NPU_INLINE vu rounded_to_bf16(vf x) {
    vu b = bits<vu>(x);
    vu rounded = b + 0x7fff + ((b >> 16) & 1);
#if defined(__AVX512F__)
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return (vu)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
#else
    vu is_nan = (vu)(x != x);
    return (rounded & ~is_nan) | (is_nan & 0x7fc00000);
#endif
}

struct Natural {
    template <class T>
    NPU_INLINE Block load(const T* p) {
        return {npu::load(p), npu::load(p + W)};
    }
    template <class T>
    NPU_INLINE void store(T* p, Block x) {
        npu::store(p, x.a);
        npu::store(p + W, x.b);
    }
    NPU_INLINE Block natural(Block x) { return x; }

    // The roundings of x, |x| at most 127.5: nothing to saturate, no NaN.
    NPU_INLINE void store_small(int8_t* p, Block x) {
        npu::store(p, to_int8(x.a));
        npu::store(p + W, to_int8(x.b));
    }
};

struct EvenOdd {
    NPU_INLINE Block load(const bf16* p) {
        vu words = load_bytes<vu>(p, sizeof(vu));
        return {bits<vf>(words << 16), bits<vf>(words & 0xffff0000)};
    }
    template <class T>
    NPU_INLINE Block load(const T* p) {
        return deinterleaved(Natural::load(p));
    }
    NPU_INLINE void store(bf16* p, Block x) {
        vu words = (rounded_to_bf16(x.a) >> 16) | (rounded_to_bf16(x.b) & 0xffff0000);
        std::memcpy(p, &words, sizeof words);
    }
    template <class T>
    NPU_INLINE void store(T* p, Block x) {
        Natural::store(p, interleaved(x));
    }
    NPU_INLINE Block natural(Block x) { return interleaved(x); }

    NPU_INLINE void store_small(int8_t* p, Block x) {
        // See ROUNDER in simd.h: the sums' lowest bytes are the results.
        vu a = bits<vu>(x.a + ROUNDER), b = bits<vu>(x.b + ROUNDER);
        vu16 words = low_words((a & 0xff) | (b << 8 & 0xff00));
        std::memcpy(p, &words, sizeof words);
    }
};

template <class In>
using Order = std::conditional_t<std::is_same_v<In, bf16>, EvenOdd, Natural>;

template <class O, class T>
NPU_INLINE Block load_block(const T* p) {
    return O::load(p);
}
template <class O, class T>
NPU_INLINE Block load_block(const T* p, int64_t n) {
    T padded[BLOCK] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return O::load(padded);
}

template <class O, class T>
NPU_INLINE void store_block(T* p, Block x) {
    O::store(p, x);
}
template <class O, class T>
NPU_INLINE void store_block(T* p, Block x, int64_t n) {
    T padded[BLOCK];
    O::store(padded, x);
    std::memcpy(p, padded, n * sizeof(T));
}

// Asks for the block at p, which may lie beyond the end of the data.
template <class T>
NPU_INLINE void fetch_block(const T* p) {
    for (int64_t i = 0; i < BLOCK; i += 64 / int64_t{sizeof(T)}) __builtin_prefetch(p + i, 0, 3);
}

// Stores past the caches, for what is not read again soon, and is too much to stay in them until it is. The
// address has to be streamable; before another thread may read the results, finish_streams has to be called.
NPU_INLINE bool streamable(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(vu) == 0; }
NPU_INLINE void stream(void* p, vu x) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#else
    std::memcpy(p, &x, sizeof x);
#endif
}
NPU_INLINE void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
template <class O, class T>
NPU_INLINE void stream_block(T* p, Block x) {
    T y[BLOCK];
    O::store(y, x);
    constexpr int64_t EACH = sizeof(vu) / sizeof(T);
    for (int64_t i = 0; i < BLOCK; i += EACH) stream(p + i, load_bytes<vu>(y + i, sizeof(vu)));
}

// Rounded half to even, saturated; NaN gives 0.
template <class O>
NPU_INLINE void store_int8(int8_t* p, Block x, int64_t n = BLOCK) {
    Block y = O::natural(x);
    int8_t padded[BLOCK];
    npu::store(padded, to_int8(y.a));
    npu::store(padded + W, to_int8(y.b));
    std::memcpy(p, padded, n);
}

// The first n elements of x, and 0 for the others.
template <class O>
NPU_INLINE Block first(Block x) {
    return x;
}
template <class O>
NPU_INLINE Block first(Block x, int64_t n) {
    float each[BLOCK];
    Natural::store(each, O::natural(x));
    return load_block<Natural>(each, n);
}

// Blocks that stay in the kernel's own memory, a whole number of them, keep their order.
NPU_INLINE Block load_raw(const float* p) { return Natural::load(p); }
NPU_INLINE void store_raw(float* p, Block x) { Natural::store(p, x); }

// step(j) for every whole block that begins at j, step(j, n) for the n elements of a last one.
template <class Step>
NPU_INLINE void for_blocks(int64_t width, const Step& step) {
    int64_t j = 0;
    for (; j + BLOCK <= width; j += BLOCK) step(j);
    if (j < width) step(j, width - j);
}

}  // namespace
}  // namespace npu
