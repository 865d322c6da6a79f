// int8 products of many rows: the weight is first rearranged into panels, which then stay in the second-level
// cache while all rows of x pass by.
//
//     panel[k / 4][vector][lane] = w[k .. k + 3][column]      four rows of k, of BYTES columns
//     acc[r][vector] += panel[..][vector] * x[r][k .. k + 3]  (the four bytes of x in every lane)
//
// Columns do not lie in a panel as they do in memory: in 16 bytes l of vector v are columns 16 * l + 4 * v +
// (0 .. 3), because that is how interleaving four rows of [k, n] leaves them. Accumulators keep this order
// until in_order().
#pragma once

#include "dot_int8.h"
#include "int8_dots.h"

namespace npu {
namespace {

constexpr int PANEL_VECTORS = 4;
constexpr int64_t PANEL_COLUMNS = BYTES;

// A tile fills the registers: accumulators, the weights of one step and one value.
constexpr int PANEL_ROWS = FEW_REGISTERS ? 3 : 6;
constexpr int TILE_VECTORS = FEW_REGISTERS ? 2 : 4;

// Vectors of a panel. One group more than k has: panels that lie a power of 2 apart would share the same few
// places of the cache.
NPU_INLINE int64_t panel_size(int64_t k) { return ((k + 3) / 4 + 1) * PANEL_VECTORS; }

// The first R rows of a vector each of a matrix; at its borders, from a copy that zeros complete.
template <int R>
struct Padded {
    alignas(64) int8_t copy[R * BYTES];

    NPU_INLINE Rows rows(Padded& p, Rows from, int64_t rows, int64_t columns) {
        if (rows >= R && columns >= BYTES) return from;
        std::memset(p.copy, 0, sizeof p.copy);
        for (int64_t r = 0; r < R && r < rows; ++r) {
            std::memcpy(p.copy + r * BYTES, from.at(r, 0), columns < BYTES ? columns : BYTES);
        }
        return {p.copy, BYTES};
    }
};

// While rows are packed, those that come this much later are fetched.
constexpr int64_t FETCH_ROWS = 16;

// `columns` columns of w [k, n], of which k rows, into panels of `size` vectors. Four rows are read from left
// to right: one line of each row of a large matrix would be a page, and often a bank of memory, for every
// line.
inline void pack_columns(Rows w, int64_t k, int64_t columns, vb* panels, int64_t size) {
    for (int64_t i = 0; i < k; i += 4, panels += PANEL_VECTORS) {
        vb* panel = panels;
        for (int64_t c = 0; c < columns; c += PANEL_COLUMNS, panel += size) {
            Padded<4> padded;
            Rows from = Padded<4>::rows(padded, w.from(i, c), k - i, columns - c);
            vb rows[4], mixed[4];
            NPU_UNROLL for (int r = 0; r < 4; ++r) {
                __builtin_prefetch(w.at(i + r + FETCH_ROWS, c));
                rows[r] = load(from.at(r, 0));
            }
            interleave4(rows, mixed);
            NPU_UNROLL for (int v = 0; v < 4; ++v) panel[v] = stored(mixed[v]);
        }
    }
}

// One panel of w [n, k]: `columns` <= PANEL_COLUMNS rows of k bytes.
inline void pack_rows(Rows w, int64_t k, int64_t columns, vb* panel) {
    for (int64_t v = 0; v < PANEL_VECTORS; ++v) {
        for (int64_t i = 0; i < k; i += BYTES) {
            // The 16 bytes number `part` of vector v are those of columns 16 * part + 4 * v + (0 .. 3).
            vi turned[W / 4][4], groups[4][W / 4];
            NPU_UNROLL for (int part = 0; part < W / 4; ++part) {
                int64_t c = 16 * part + 4 * v;
                Padded<4> padded;
                Rows from = Padded<4>::rows(padded, w.from(c, i), columns - c, k - i);
                vi rows[4];
                NPU_UNROLL for (int r = 0; r < 4; ++r) {
                    __builtin_prefetch(w.at(c + r + 4, i));
                    rows[r] = (vi)stored(load(from.at(r, 0)));
                }
                transpose4(rows, turned[part]);
            }
            NPU_UNROLL for (int j = 0; j < 4; ++j) {
                vi same[W / 4];
                NPU_UNROLL for (int part = 0; part < W / 4; ++part) same[part] = turned[part][j];
                transpose_quarters(same, groups[j]);
            }
            int64_t count = (k - i + 3) / 4;
            NPU_UNROLL for (int group = 0; group < W; ++group) {
                vb* to = panel + (i / 4 + group) * PANEL_VECTORS + v;
                if (group < count) *to = (vb)groups[group % 4][group / 4];
            }
        }
    }
}

// Adds to y [R, PANEL_COLUMNS] (in panel order) the products of R rows of x and a panel.
template <int R>
void panel_tile(Rows x, const vb* panel, int64_t k, int32_t* y) {
    for (int first = 0; first < PANEL_VECTORS; first += TILE_VECTORS, y += TILE_VECTORS * W) {
        const vb* from = panel + first;
        vi acc[R][TILE_VECTORS];
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            NPU_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) acc[r][v] = load(y + r * PANEL_COLUMNS + v * W);
        }
        int64_t i = 0;
        auto step = [&](auto... n) __attribute__((always_inline)) {
            Weight weights[TILE_VECTORS];
            NPU_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) weights[v] = weight(from[v]);
            NPU_UNROLL for (int r = 0; r < R; ++r) {
                Value one = broadcast4(x.at(r, i), n...);
                NPU_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) {
                    acc[r][v] = dot4(acc[r][v], weights[v], one);
                }
            }
        };
        for (; i + 4 <= k; i += 4, from += PANEL_VECTORS) step();
        if (i < k) step(k - i);
        NPU_UNROLL for (int r = 0; r < R; ++r) {
            NPU_UNROLL for (int v = 0; v < TILE_VECTORS; ++v) store(y + r * PANEL_COLUMNS + v * W, acc[r][v]);
        }
    }
}

// A row of accumulators of one panel: from the order of the panel to that of the columns.
NPU_INLINE void in_order(int32_t* y) {
    vi4 from[PANEL_VECTORS * W / 4], to[PANEL_VECTORS * W / 4];
    std::memcpy(from, y, sizeof from);
    NPU_UNROLL for (int part = 0; part < W / 4; ++part) {
        NPU_UNROLL for (int v = 0; v < 4; ++v) to[part * 4 + v] = from[v * (W / 4) + part];
    }
    std::memcpy(y, to, sizeof to);
}

}  // namespace
}  // namespace npu
