// int8 products of few rows with a weight kept as [k, n]: a few rows of the weight at a time, from left to
// right.
//
//     y[r][column] += sum over i < SWEEP_ROWS of x[r][i] * w[i][column]
//
// The weight is read in the order of memory, and once; the values of x stay in registers and y in the
// first-level cache. y is in the order of a panel, see int8_panels.h.
#pragma once

#include "dot_int8.h"
#include "int8_panels.h"

namespace npu {
namespace {

constexpr int SWEEP_GROUPS = FEW_REGISTERS ? 1 : 2;
constexpr int SWEEP_TILE = FEW_REGISTERS ? 2 : 6;
constexpr int64_t SWEEP_ROWS = 4 * SWEEP_GROUPS;

// From k <= SWEEP_ROWS rows of w, for R rows of x. Between the sums of one panel and of the next are y_step.
template <int R>
void sweep(Rows x, Rows w, int64_t k, int64_t columns, int32_t* y, int64_t y_step) {
    Value values[R][SWEEP_GROUPS];
    if (k == SWEEP_ROWS) {
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            NPU_UNROLL for (int g = 0; g < SWEEP_GROUPS; ++g) values[r][g] = broadcast4(x.at(r, 4 * g));
        }
    } else {
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            NPU_UNROLL for (int g = 0; g < SWEEP_GROUPS; ++g) {
                int64_t left = k - 4 * g;
                values[r][g] = broadcast4(x.at(r, 4 * g), left > 4 ? 4 : left < 0 ? 0 : left);
            }
        }
    }
    for (int64_t c = 0; c < columns; c += PANEL_COLUMNS, y += y_step) {
        Padded<SWEEP_ROWS> padded;
        Rows from = Padded<SWEEP_ROWS>::rows(padded, w.from(0, c), k, columns - c);
        vb rows[SWEEP_GROUPS][4], mixed[SWEEP_GROUPS][4];
        NPU_UNROLL for (int i = 0; i < SWEEP_ROWS; ++i) {
            __builtin_prefetch(w.at(SWEEP_ROWS + i, c));
            rows[i / 4][i % 4] = load(from.at(i, 0));
        }
        NPU_UNROLL for (int g = 0; g < SWEEP_GROUPS; ++g) interleave4(rows[g], mixed[g]);
        NPU_UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
            Weight weights[SWEEP_GROUPS];
            NPU_UNROLL for (int g = 0; g < SWEEP_GROUPS; ++g) weights[g] = weight(stored(mixed[g][v]));
            NPU_UNROLL for (int r = 0; r < R; ++r) {
                int32_t* at = y + r * PANEL_COLUMNS + v * W;
                vi sum = load(at);
                NPU_UNROLL for (int g = 0; g < SWEEP_GROUPS; ++g) sum = dot4(sum, weights[g], values[r][g]);
                store(at, sum);
            }
        }
    }
}

}  // namespace
}  // namespace npu
