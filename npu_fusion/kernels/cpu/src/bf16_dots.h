// bf16 products with a weight kept as [n, k]: dot products along k, straight from memory.
//
//     y[r][c] = sum over k of x[r][k] * w[c][k]               a tile: R x C vectors of partial sums
//
// The weight is read in order and never copied: with few rows of x, reading it is what takes the time.
#pragma once

#include "dot_bf16.h"

namespace npu {
namespace {

constexpr int DOT_COLUMNS = 4;

template <class Dot, int R>
void dots(const Bf16Product& p, const bf16* x, const bf16* w, bf16* y, int64_t columns) {
    vf acc[R][DOT_COLUMNS] = {};
    auto step = [&](int64_t i, int64_t bytes) __attribute__((always_inline)) {
        typename Dot::Pairs weights[DOT_COLUMNS];
        NPU_UNROLL for (int c = 0; c < DOT_COLUMNS; ++c) {
            const bf16* from = w + (c < columns ? c : 0) * p.w_step + i;
            __builtin_prefetch(from + DOT_COLUMNS * p.w_step);
            weights[c] = Dot::pairs(load_bytes<vi>(from, bytes));
        }
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            typename Dot::Pairs value = Dot::pairs(load_bytes<vi>(x + r * p.x_step + i, bytes));
            NPU_UNROLL for (int c = 0; c < DOT_COLUMNS; ++c) acc[r][c] = Dot::dot2(acc[r][c], weights[c], value);
        }
    };
    int64_t i = 0;
    for (; i + 2 * W <= p.k; i += 2 * W) step(i, sizeof(vi));
    if (i < p.k) step(i, 2 * (p.k - i));
    for (int r = 0; r < R; ++r) {
        vf sums = {};
        for (int c = 0; c < DOT_COLUMNS; ++c) sums[c] = sum(acc[r][c]);
        store(y + r * p.y_step, sums, columns);
    }
}

template <class Dot>
void dot_columns(const Bf16Product& p, int64_t batch, int64_t column) {
    const int64_t columns = least(DOT_COLUMNS, p.n - column);
    const bf16* w = p.w + batch * p.w_batch + column * p.w_step;
    for (int64_t r = 0, done; r < p.m; r += done) {
        done = even_tile(p.m - r, TILE_ROWS);
        const bf16* x = p.x + batch * p.x_batch + r * p.x_step;
        bf16* y = p.y + batch * p.y_batch + r * p.y_step + column;
        with_rows(done, [&](auto rows) { dots<Dot, rows>(p, x, w, y, columns); });
    }
}

}  // namespace
}  // namespace npu
