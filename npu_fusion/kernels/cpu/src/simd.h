// Vectors of W floats (or W 32-bit integers), W being what one register of the variant holds.
//
// Written in the vector extensions that GCC and Clang share: arithmetic and comparison are the operators of the
// language, so one source serves x86-64 and aarch64 without a library to install. Intrinsics stand in for the
// few things those compilers lower badly, each beside a portable form.
//
// Comparisons give integer vectors of 0 and -1. `max(a, b)` and `min(a, b)` give b where either is NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NPU_INLINE static inline __attribute__((always_inline))

namespace npu {

// Distinct types, so that a pointer says what it points to.
struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef int8_t vi8 __attribute__((vector_size(W)));

NPU_INLINE vf set(float x) { return x - vf{}; }
NPU_INLINE vi set(int32_t x) { return x - vi{}; }

template <class To, class From>
NPU_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

NPU_INLINE vf select(vi where, vf yes, vf no) {
    return bits<vf>((bits<vi>(yes) & where) | (bits<vi>(no) & ~where));
}

#if defined(__AVX512F__)
NPU_INLINE vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
NPU_INLINE vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
NPU_INLINE vi max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
NPU_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
NPU_INLINE vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
NPU_INLINE vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
NPU_INLINE vi max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
NPU_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
#else
NPU_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
NPU_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
NPU_INLINE vi max(vi a, vi b) {
    vi greater = a > b;
    return (a & greater) | (b & ~greater);
}
NPU_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    vf y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
#endif
}
#endif

NPU_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

NPU_INLINE float sum(vf x) {
    float total[W];
    std::memcpy(total, &x, sizeof x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) total[i] += total[i + width];
    return total[0];
}

NPU_INLINE int32_t largest(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(__AVX2__)
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
#elif defined(__aarch64__)
    return vmaxvq_s32(x);
#else
    int32_t each[W];
    std::memcpy(each, &x, sizeof x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) each[i] = each[i] > each[i + width] ? each[i] : each[i + width];
    return each[0];
#endif
}

// The bits of |x|. As integers they are ordered as the numbers are, and a NaN is above infinity: their maximum
// finds amax and does not lose a NaN on the way, as a maximum of floats would.
NPU_INLINE vi magnitude(vf x) { return bits<vi>(x) & 0x7fffffff; }

// -- memory: a whole vector, or its first n elements (the others are zero) --------------------------------------

template <class T>
NPU_INLINE T load_bytes(const void* p, int64_t bytes) {
    T x{};
    std::memcpy(&x, p, bytes);
    return x;
}

NPU_INLINE vf widen(vu16 x, bf16) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
    return bits<vf>(__builtin_convertvector(x, vu) << 16);
#endif
}
NPU_INLINE vf widen(vu16 x, half) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    return vcvt_f32_f16(bits<float16x4_t>(x));
#else
#error "no conversion from half precision for this architecture"
#endif
}

NPU_INLINE vf load(const float* p) { return load_bytes<vf>(p, sizeof(vf)); }
NPU_INLINE vi load(const int32_t* p) { return load_bytes<vi>(p, sizeof(vi)); }
NPU_INLINE vf load(const bf16* p) { return widen(load_bytes<vu16>(p, sizeof(vu16)), bf16{}); }
NPU_INLINE vf load(const half* p) { return widen(load_bytes<vu16>(p, sizeof(vu16)), half{}); }

NPU_INLINE vf load(const float* p, int64_t n) { return load_bytes<vf>(p, 4 * n); }
NPU_INLINE vi load(const int32_t* p, int64_t n) { return load_bytes<vi>(p, 4 * n); }
NPU_INLINE vf load(const bf16* p, int64_t n) { return widen(load_bytes<vu16>(p, 2 * n), bf16{}); }
NPU_INLINE vf load(const half* p, int64_t n) { return widen(load_bytes<vu16>(p, 2 * n), half{}); }

// Round to nearest even. The processors' own bf16 conversion is not used: it flushes denormals.
NPU_INLINE vu16 narrow(vf x, bf16) {
    vu b = bits<vu>(x);
    vu rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    vu is_nan = (vu)(x != x);
    vu y = (rounded & ~is_nan) | (is_nan & 0x7fc0);
#if defined(__AVX512F__)
    return (vu16)_mm512_cvtepi32_epi16((__m512i)y);
#elif defined(__AVX2__)
    return (vu16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)y), _mm256_extracti128_si256((__m256i)y, 1));
#else
    return __builtin_convertvector(y, vu16);
#endif
}
NPU_INLINE vu16 narrow(vf x, half) {
#if defined(__AVX512F__)
    return (vu16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (vu16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return bits<vu16>(vcvt_f16_f32(x));
#else
#error "no conversion to half precision for this architecture"
#endif
}

NPU_INLINE void store(float* p, vf x, int64_t n = W) { std::memcpy(p, &x, 4 * n); }
NPU_INLINE void store(int32_t* p, vi x, int64_t n = W) { std::memcpy(p, &x, 4 * n); }
NPU_INLINE void store(bf16* p, vf x, int64_t n = W) {
    vu16 y = narrow(x, bf16{});
    std::memcpy(p, &y, 2 * n);
}
NPU_INLINE void store(half* p, vf x, int64_t n = W) {
    vu16 y = narrow(x, half{});
    std::memcpy(p, &y, 2 * n);
}

// Adding 1.5 * 2^23 leaves no bits below the unit: the sum is rounded half to even, and its lowest byte is the
// integer in two's complement. |x| must be below 2^22.
constexpr float ROUNDER = 12582912.0f;

NPU_INLINE vf rint(vf x) {
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return vrndnq_f32(x);
#else
    return (x + ROUNDER) - ROUNDER;
#endif
}

// x rounded half to even, saturated to int8; NaN gives 0. (GCC converts 32-bit vectors to bytes one by one.)
NPU_INLINE vi8 to_int8(vf x) {
#if defined(__AVX512F__)
    __mmask16 known = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    // Above the range of int32 the conversion gives its smallest value, so only that side has to be clamped.
    return (vi8)_mm512_cvtsepi32_epi8(_mm512_maskz_cvtps_epi32(known, min(x, set(127.0f))));
#elif defined(__AVX2__)
    vf known = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
    __m256i y = _mm256_cvtps_epi32(min(known, set(127.0f)));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    return bits<vi8>(_mm_cvtsi128_si64(_mm_packs_epi16(words, words)));
#elif defined(__aarch64__)
    int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    return bits<vi8>(vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0));
#else
    vf known = bits<vf>(bits<vi>(x) & (vi)(x == x));
    vf y = min(set(127.0f), max(set(-128.0f), known)) + ROUNDER;
    return __builtin_convertvector(bits<vi>(y), vi8);
#endif
}
NPU_INLINE void store(int8_t* p, vi8 x, int64_t n = W) { std::memcpy(p, &x, n); }

// x * 2^n for a whole n between -252 and 254, with one rounding in the denormal range, to infinity above.
NPU_INLINE vf scale_by_power(vf x, vf n) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(x, n);
#else
    // One factor of 2^n would leave the range of exponents for results that are denormal or close to overflow.
    vi whole = __builtin_convertvector(n, vi);
    vi first = whole >> 1;
    vf a = bits<vf>((first + 127) << 23), b = bits<vf>((whole - first + 127) << 23);
    return x * a * b;
#endif
}

}  // namespace
}  // namespace npu
