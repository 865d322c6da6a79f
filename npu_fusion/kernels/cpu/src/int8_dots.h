// int8 products with a weight kept as [n, k]: dot products along k, straight from memory.
//
//     acc[r][c] = sum over k of x[r][k] * w[c][k]             a tile: R x C vectors of partial sums
//
// The weight is read in order and never copied: with few rows of x, reading it is what takes the time.
#pragma once

#include "dot_int8.h"

namespace npu {
namespace {

// A tile fills the registers: accumulators, the weights of one step and one value.
constexpr int DOT_COLUMNS = 4;
constexpr int DOT_ROWS = FEW_REGISTERS ? 2 : 6;

// Rows of a matrix of bytes.
struct Rows {
    const int8_t* data;
    int64_t step;

    const int8_t* at(int64_t row, int64_t column) const { return data + row * step + column; }
    Rows from(int64_t row, int64_t column) const { return {at(row, column), step}; }
};

// Weights to fetch into the cache while a tile is multiplied: in the step at i (bytes of k), line c is at
// start + c * line + (i * speed >> halvings).
struct Ahead {
    const int8_t* start;
    int64_t line, speed;
    int halvings;
};

// Adds the products of vectors of k from column i on, or of their first `n...` bytes.
template <int R, int C, class... N>
NPU_INLINE void dot_step(vi (&acc)[R][C], Rows x, Rows w, int64_t i, N... n) {
    if constexpr (R < C) {
        Value values[R];
        NPU_UNROLL for (int r = 0; r < R; ++r) values[r] = value(load(x.at(r, i), n...));
        NPU_UNROLL for (int c = 0; c < C; ++c) {
            Weight one = weight(stored(load(w.at(c, i), n...)));
            NPU_UNROLL for (int r = 0; r < R; ++r) acc[r][c] = dot4(acc[r][c], one, values[r]);
        }
    } else {
        Weight weights[C];
        NPU_UNROLL for (int c = 0; c < C; ++c) weights[c] = weight(stored(load(w.at(c, i), n...)));
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            Value one = value(load(x.at(r, i), n...));
            NPU_UNROLL for (int c = 0; c < C; ++c) acc[r][c] = dot4(acc[r][c], weights[c], one);
        }
    }
}

NPU_INLINE void add_lane_sums(const vi (&acc)[4], int32_t* y) {
    vu4 before;
    std::memcpy(&before, y, sizeof before);
    before += (vu4)lane_sums(acc);
    std::memcpy(y, &before, sizeof before);
}

// Adds to y[r][c] the products of R rows of x and C rows of w.
template <int R, int C>
void dot_tile(Rows x, Rows w, int64_t k, Ahead ahead, int32_t* y, int64_t y_step) {
    vi acc[R][C] = {};
    int64_t i = 0;
    for (; i + BYTES <= k; i += BYTES) {
        NPU_UNROLL for (int c = 0; c < C; ++c) {
            __builtin_prefetch(ahead.start + c * ahead.line + (i * ahead.speed >> ahead.halvings));
        }
        dot_step(acc, x, w, i);
    }
    if (i < k) dot_step(acc, x, w, i, k - i);
    NPU_UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (C == 4) {
            add_lane_sums(acc[r], y + r * y_step);
        } else {
            NPU_UNROLL for (int c = 0; c < C; ++c) y[r * y_step + c] += lane_sum(acc[r][c]);
        }
    }
}

// The same for four rows of w, one after the other, for so few rows of x that w comes faster from the cache
// than from memory: memory is read in its own order, which gives a third more of its bandwidth than four rows
// side by side.
constexpr int STREAM_ROWS = 2;
constexpr int64_t STREAM_AHEAD = 8192;

template <int R>
void dot_stream(Rows x, Rows w, int64_t k, int32_t* y, int64_t y_step) {
    vi acc[R][4];
    for (int c = 0; c < 4; ++c) {
        Rows row = w.from(c, 0);
        vi even[R][1] = {}, odd[R][1] = {};
        int64_t i = 0;
        for (; i + 2 * BYTES <= k; i += 2 * BYTES) {
            __builtin_prefetch(row.at(0, i + STREAM_AHEAD));
            __builtin_prefetch(row.at(0, i + STREAM_AHEAD + BYTES));
            dot_step(even, x, row, i);
            dot_step(odd, x, row, i + BYTES);
        }
        for (; i < k; i += BYTES) dot_step(even, x, row, i, k - i < BYTES ? k - i : BYTES);
        NPU_UNROLL for (int r = 0; r < R; ++r) acc[r][c] = (vi)((vu)even[r][0] + (vu)odd[r][0]);
    }
    NPU_UNROLL for (int r = 0; r < R; ++r) add_lane_sums(acc[r], y + r * y_step);
}

}  // namespace
}  // namespace npu
