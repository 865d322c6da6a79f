// bf16 products with a weight kept as [k, n]: strips of columns, summed block by block of k.
//
//     for a block of k:                       its rows are read from left to right, which memory is fastest at
//         for a strip of columns:             all rows of x pass by while its weights are in the first-level cache
//             sums[r][strip] += x[r][k..] * w[k..][strip]
//
// Few rows of x take the weights as they are in memory; for more, a strip is kept as pairs in a buffer.
#pragma once

#include "dot_bf16.h"

namespace npu {
namespace {

constexpr int STRIP_VECTORS = 4;
constexpr int64_t STRIP = STRIP_VECTORS * W;

// Rows of x up to which the weights are read as they are, and so again, from the cache, for every tile.
constexpr int64_t MOST_STREAMED = 4 * TILE_ROWS;
// Rows of k in a block: of those read as they are (so many streams a processor follows), and of those kept.
constexpr int64_t STREAMS = 32;
constexpr int64_t KEPT = 256;

// The weights of one step, two rows of k and a strip of columns, in the order that interleave2 leaves.
struct Streamed {
    const bf16* w;
    int64_t step;

    NPU_INLINE void at(const Streamed& s, int64_t pair, vi (&to)[STRIP_VECTORS]) {
        const bf16 *a = s.w + 2 * pair * s.step, *b = a + s.step;
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; v += 2) {
            // The strip after the next one.
            __builtin_prefetch(a + 2 * STRIP + v * W);
            __builtin_prefetch(b + 2 * STRIP + v * W);
            interleave2(load_bytes<vi>(a + v * W, sizeof(vi)), load_bytes<vi>(b + v * W, sizeof(vi)), to[v], to[v + 1]);
        }
    }
};

struct Kept {
    const vi* pairs;

    NPU_INLINE void at(const Kept& s, int64_t pair, vi (&to)[STRIP_VECTORS]) {
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) to[v] = s.pairs[pair * STRIP_VECTORS + v];
    }
};

// k rows and `columns` <= STRIP columns as pairs; what is missing is zero.
inline void keep(const bf16* w, int64_t step, int64_t k, int64_t columns, vi* pairs) {
    for (int64_t i = 0; i < k; i += 2) {
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; v += 2) {
            vi rows[2] = {};
            for (int r = 0; r < 2 && i + r < k; ++r) {
                const bf16* from = w + (i + r) * step + v * W;
                const int64_t count = columns - v * W;
                if (count >= 2 * W) {
                    __builtin_prefetch(from + STRIP);
                    rows[r] = load_bytes<vi>(from, sizeof(vi));
                } else if (count > 0) {
                    rows[r] = load_bytes<vi>(from, 2 * count);
                }
            }
            interleave2(rows[0], rows[1], pairs[v], pairs[v + 1]);
        }
        pairs += STRIP_VECTORS;
    }
}

// sums[r][..] += x[r][0..k) * the weights, for R rows of x.
template <class Dot, int R, class Weights>
void tile(const bf16* x, int64_t x_step, const Weights& weights, int64_t k, float* sums, int64_t sums_step) {
    vf acc[R][STRIP_VECTORS];
    NPU_UNROLL for (int r = 0; r < R; ++r) {
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) acc[r][v] = load(sums + r * sums_step + v * W);
    }
    auto step = [&](int64_t pair, int64_t bytes) __attribute__((always_inline)) {
        vi raw[STRIP_VECTORS];
        Weights::at(weights, pair, raw);
        typename Dot::Pairs w[STRIP_VECTORS];
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) w[v] = Dot::pairs(raw[v]);
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            int32_t two = load_bytes<int32_t>(x + r * x_step + 2 * pair, bytes);
            typename Dot::Pairs value = Dot::pairs(set(two));
            NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) acc[r][v] = Dot::dot2(acc[r][v], w[v], value);
        }
    };
    for (int64_t pair = 0; pair < k / 2; ++pair) step(pair, 4);
    if (k % 2) step(k / 2, 2);
    NPU_UNROLL for (int r = 0; r < R; ++r) {
        NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) store(sums + r * sums_step + v * W, acc[r][v]);
    }
}

template <class Dot, class Weights>
void tiles(const bf16* x, int64_t x_step, int64_t rows, const Weights& w, int64_t k, float* sums, int64_t sums_step) {
    for (int64_t r = 0, done; r < rows; r += done) {
        done = even_tile(rows - r, TILE_ROWS);
        with_rows(done, [&](auto count) {
            tile<Dot, count>(x + r * x_step, x_step, w, k, sums + r * sums_step, sums_step);
        });
    }
}

// A row of sums of a strip, from the order of interleave2 to that of the columns, rounded.
NPU_INLINE void finish(const float* sums, int64_t columns, bf16* y) {
    typedef float vf4 __attribute__((vector_size(16)));
    vf4 from[STRIP_VECTORS][W / 4], to[STRIP_VECTORS / 2][W / 4][2];
    std::memcpy(from, sums, sizeof from);
    NPU_UNROLL for (int v = 0; v < STRIP_VECTORS; ++v) {
        NPU_UNROLL for (int part = 0; part < W / 4; ++part) to[v / 2][part][v % 2] = from[v][part];
    }
    float ordered[STRIP];
    std::memcpy(ordered, to, sizeof to);
    for (int64_t c = 0; c < columns; c += W) store(y + c, load(ordered + c), least(W, columns - c));
}

// The strips [begin, end) of one matrix.
template <class Dot>
void strips(const Bf16Product& p, int64_t batch, int64_t begin, int64_t end, float* sums, vi* pairs) {
    const bf16 *x = p.x + batch * p.x_batch, *w = p.w + batch * p.w_batch;
    const int64_t step = (end - begin) * STRIP;
    std::memset(sums, 0, sizeof(float) * p.m * step);
    const bool few = p.m <= MOST_STREAMED;
    for (int64_t i = 0, k; i < p.k; i += k) {
        k = least(few ? STREAMS : KEPT, p.k - i);
        for (int64_t s = begin; s < end; ++s) {
            const int64_t column = s * STRIP, columns = least(STRIP, p.n - column);
            const bf16* from = w + i * p.w_step + column;
            float* to = sums + (s - begin) * STRIP;
            if (few && columns == STRIP && k % 2 == 0) {
                tiles<Dot>(x + i, p.x_step, p.m, Streamed{from, p.w_step}, k, to, step);
            } else {
                keep(from, p.w_step, k, columns, pairs);
                tiles<Dot>(x + i, p.x_step, p.m, Kept{pairs}, k, to, step);
            }
        }
    }
    for (int64_t r = 0; r < p.m; ++r) {
        bf16* y = p.y + batch * p.y_batch + r * p.y_step;
        for (int64_t s = begin; s < end; ++s)
            finish(sums + r * step + (s - begin) * STRIP, least(STRIP, p.n - s * STRIP), y + s * STRIP);
    }
}

}  // namespace
}  // namespace npu
