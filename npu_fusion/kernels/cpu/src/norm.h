// RMSNorm of a row, alone or of the sum of two rows: what its operators share. Formulas and roundings:
// npu_fusion/meta_impls/rms_norm.py and add_rms_norm.py.
//
// A first loop reads the row from memory, adds the squares up and, where two rows are added, stores the
// rounded sum and keeps the exact one in a buffer of the thread. The loops after it read caches. (Fetching
// the next row meanwhile is slower: with thousands of columns it drives this one out of the first level.)
#pragma once

#include "rows.h"

namespace npu {
namespace {

struct Norm {
    const void* x1;     // [T, H]
    const void* x2;     // [T, H] or null
    const void* gamma;  // [H]
    const void* beta;   // [H] or null, in the type of x1
    void* x;            // [T, H], the sum; with x2 only
    float* rstd;        // [T] or null
    int64_t rows, width, threads;
    double epsilon;
};

// Sums of at least this many bytes go past the caches: they are read again only after the layer's matrix
// products. (It saves 4 to 10 % of the time, measured on an AVX-512 machine with 32 MB of cache.)
constexpr int64_t STREAMED = 4 << 20;

typedef double vd __attribute__((vector_size(4 * W)));
typedef float vf_half __attribute__((vector_size(2 * W)));

// The sum of the squares of value(j), value(j, n). Some hundred squares at a time are added in fp32, their
// sums in double precision: all in fp32, each lane of a long row would add up the errors of hundreds of
// roundings.
template <class Value>
NPU_INLINE float sum_of_squares(int64_t width, const Value& value) {
    constexpr int64_t PART = 16 * BLOCK;
    vd total{};
    auto add = [&](Block part) NPU_LAMBDA {
        vf sums = part.a + part.b;
        vf_half half[2];
        std::memcpy(half, &sums, sizeof sums);
        total += __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
    };
    int64_t j = 0;
    while (j + BLOCK <= width) {
        const int64_t end = j + PART < width ? j + PART : width;
        Block part{};
        for (; j + BLOCK <= end; j += BLOCK) {
            Block v = value(j);
            part = {fma(v.a, v.a, part.a), fma(v.b, v.b, part.b)};
        }
        add(part);
    }
    if (j < width) {
        Block v = value(j, width - j);
        add(v * v);
    }
    double sums[W / 2];
    std::memcpy(sums, &total, sizeof total);
    for (int lanes = W / 4; lanes > 0; lanes /= 2)
        for (int i = 0; i < lanes; ++i) sums[i] += sums[i + lanes];
    return sums[0];
}

// One row: its values before the normalization, and the factor.
template <class In, class Gamma, bool added>
class NormRow {
  public:
    using O = Order<In>;

    // The first loop. Where two rows are added, `buffer` is for H floats, and `streamed` says how the sum is
    // stored.
    NPU_MEMBER NormRow(const Norm& c, int64_t row, float* buffer, bool streamed)
        : x1_(static_cast<const In*>(c.x1) + row * c.width),
          x2_(static_cast<const In*>(c.x2) + (added ? row * c.width : 0)),
          gamma_(static_cast<const Gamma*>(c.gamma)),
          beta_(static_cast<const In*>(c.beta)),
          sum_(buffer) {
        In* x = static_cast<In*>(c.x) + (added ? row * c.width : 0);
        const float squares = sum_of_squares(c.width, [&](int64_t j, auto... n) NPU_LAMBDA {
            Block v = load_block<O>(x1_ + j, n...);
            if constexpr (added) {
                v = v + load_block<O>(x2_ + j, n...);
                if (sizeof...(n) == 0 && streamed)
                    stream_block<O>(x + j, v);
                else
                    store_block<O>(x + j, v, n...);
                store_raw(sum_ + j, v);
            }
            return v;
        });
        const float mean = squares / static_cast<float>(c.width);
        rstd_ = 1.0f / __builtin_sqrtf(mean + static_cast<float>(c.epsilon));
        if (c.rstd) c.rstd[row] = rstd_;
    }

    // The normalized values at j, before they are rounded.
    template <class... N>
    NPU_MEMBER Block value(int64_t j, N... n) const {
        Block s;
        if constexpr (added)
            s = load_raw(sum_ + j);
        else
            s = load_block<O>(x1_ + j, n...);
        Block y = s * rstd_ * load_block<O>(gamma_ + j, n...);
        return beta_ ? y + load_block<O>(beta_ + j, n...) : y;
    }

  private:
    const In *x1_, *x2_;
    const Gamma* gamma_;
    const In* beta_;
    float* sum_;
    float rstd_;
};

// fn(row's number, NormRow, its sums, a row's floats of scratch memory if `scratch`) for every row.
template <class In, class Gamma, bool added, class Fn>
Status norm_rows(const Norm& c, bool scratch, const Fn& fn) {
    const int64_t padded = (c.width + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t floats = padded * (int64_t{added} + int64_t{scratch});
    const int64_t bytes = c.width * int64_t{sizeof(In)} * (added ? 3 : 2);
    const bool streamed = added && c.rows * c.width * int64_t{sizeof(In)} >= STREAMED &&
                          streamable(c.x) && streamable(static_cast<In*>(c.x) + c.width);
    if (added) expect_writes(c.x, c.rows * c.width * sizeof(In));
    return over_rows(c.rows, bytes, c.threads, floats, [&](int64_t begin, int64_t end, float* buffer) {
        for (int64_t row = begin; row < end; ++row)
            fn(row, NormRow<In, Gamma, added>(c, row, buffer, streamed), buffer,
               buffer + (added ? padded : 0));
        if (streamed) finish_streams();
    });
}

}  // namespace
}  // namespace npu
