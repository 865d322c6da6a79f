// x [m, k] @ w of int8, exactly, handed block by block to a function that says what becomes of the int32 sums
// while they are in the cache.
//
// Three ways, which way_of() chooses from:
//
//     DOTS    w as [n, k], few rows of x      int8_dots.h      w straight from memory
//     SWEEPS  w as [k, n], few rows of x      int8_sweeps.h    w straight from memory
//     PANELS  more rows of x                  int8_panels.h    w rearranged in the cache
#pragma once

#include <cstdlib>

#include "int8_dots.h"
#include "int8_panels.h"
#include "int8_sweeps.h"
#include "isa.h"
#include "parallel.h"

namespace npu {
namespace {

struct Int8Product {
    Rows x;  // [m, k]
    Rows w;  // [n, k], or [k, n]
    bool w_has_rows_of_k;
    int64_t m, n, k;
};

// A block of exact sums (modulo 2^32): rows [row, row + rows), columns [column, column + columns).
struct Sums {
    const int32_t* data;
    int64_t step;
    int64_t row, rows, column, columns;
};

enum class Way { DOTS, SWEEPS, PANELS };

// Where the ways cross on Zen 5 (AVX-512; 2048 x 2048, 4096 x 4096, 11008 x 4096). In multiples of 10^12
// operations: m = 64, dots 0.84, 0.74, 0.73, panels 0.78, 0.70, 0.68; m = 80, dots 0.84, 0.64, 0.67, panels
// 0.83, 0.71, 0.73; m = 8, sweeps 0.42, panels 0.42; m = 12, sweeps 0.44, panels 0.51.
constexpr int64_t FEW_ROWS_OF_DOTS = 72, FEW_ROWS_OF_SWEEPS = 8;

inline Way way_of(const Int8Product& p) {
    if (p.w_has_rows_of_k) return p.m < FEW_ROWS_OF_DOTS ? Way::DOTS : Way::PANELS;
    return p.m <= FEW_ROWS_OF_SWEEPS ? Way::SWEEPS : Way::PANELS;
}

// Columns are dealt to the threads in strips, each thread getting at least this many multiplications for a
// row.
constexpr int64_t STRIP = 64;
static_assert(STRIP % PANEL_COLUMNS == 0, "whole panels");
constexpr int64_t WORK_OF_A_THREAD = 1 << 17;

// Dots of more than one tile: of k, as much as lets the rows of a tile stay in the first-level cache.
constexpr int64_t DOT_DEPTH = 4096;

// Sweeps: as many columns as let the sums stay in the first-level cache, and rows of w be read in long runs.
constexpr int64_t SWEEP_SUMS = 6144, SWEEP_COLUMNS = 4096;

// Panels: bytes of w, and sums, that together stay in the second-level cache; rows of x that share them;
// strips that are packed together, because a line of each row is too little to read at a time.
constexpr int64_t PANEL_BYTES = 1 << 17, PANEL_SUMS = 1 << 15, PANEL_BLOCK = 512, PANEL_STRIPS = 8;

// Memory for as long as the object lives; null where there is none.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : memory_(std::aligned_alloc(64, ceil_div(bytes + 1, 64) * 64)) {}
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    int8_t* get() const { return static_cast<int8_t*>(memory_); }
    int32_t* sums() const { return static_cast<int32_t*>(memory_); }

  private:
    void* memory_;
};

// What the shift of the weights adds to the sums of a row of x, negated.
inline int32_t correction(const int8_t* x, int64_t k) {
    if (SHIFT == 0) return 0;
    Weight ones = weight(vb{} + 1);
    vi acc = {};
    int64_t i = 0;
    for (; i + BYTES <= k; i += BYTES) acc = dot4(acc, ones, value(load(x + i)));
    if (i < k) acc = dot4(acc, ones, value(load(x + i, k - i)));
    return static_cast<int32_t>(-SHIFT * lane_sum(acc));
}

// Sums of `rows` rows of `width` columns, before anything is added to them.
inline void start_sums(int32_t* sums, const int32_t* corrections, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < width; c += W) store(sums + r * width + c, set(corrections[r]));
    }
}

// Sums as [panel][row][PANEL_COLUMNS] in the order of panels.
inline void start_panel_sums(int32_t* sums, const int32_t* corrections, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += PANEL_COLUMNS) {
        start_sums(sums + c * rows, corrections, rows, PANEL_COLUMNS);
    }
}

template <class Sink>
void finish_panel_sums(int32_t* sums, int64_t row, int64_t rows, int64_t column, int64_t columns,
                       const Sink& sink) {
    for (int64_t c = 0; c < columns; c += PANEL_COLUMNS, sums += rows * PANEL_COLUMNS) {
        for (int64_t r = 0; r < rows; ++r) in_order(sums + r * PANEL_COLUMNS);
        sink(Sums{sums, PANEL_COLUMNS, row, rows, column + c, least(PANEL_COLUMNS, columns - c)});
    }
}

template <class Sink>
void dots_of_strip(const Int8Product& p, const int32_t* corrections, int64_t column, const Sink& sink) {
    alignas(64) int32_t sums[FEW_ROWS_OF_DOTS * STRIP];
    int64_t columns = least(STRIP, p.n - column);
    start_sums(sums, corrections, p.m, STRIP);
    int64_t tiles = ceil_div(p.m, DOT_ROWS);
    int64_t depth = tiles == 1 ? p.k : DOT_DEPTH;
    // The tiles of some columns share the work of fetching the next columns, each a part that is a power of
    // 2. Where the next columns follow in memory they are fetched in that order, which is what memory is
    // fastest at.
    int halvings = tiles >= 8 ? 3 : tiles >= 4 ? 2 : tiles >= 2 ? 1 : 0;
    bool follow = depth >= p.k && p.w.step == p.k;
    for (int64_t i = 0; i < p.k; i += depth) {
        int64_t k = least(depth, p.k - i);
        for (int64_t c = 0, width; c < columns; c += width) {
            Rows w = p.w.from(column + c, i);
            width = c + DOT_COLUMNS <= columns ? DOT_COLUMNS : 1;
            if (p.m <= STREAM_ROWS && width == DOT_COLUMNS) {
                with_rows<STREAM_ROWS>(p.m, [&](auto count) {
                    dot_stream<decltype(count)::value>(p.x, w, k, sums + c, STRIP);
                });
                continue;
            }
            for (int64_t r = 0, tile, index = 0; r < p.m; r += tile, ++index) {
                tile = even_tile(p.m - r, DOT_ROWS);
                Ahead ahead{w.at(width, index * k >> halvings), w.step, 1, halvings};
                if (follow) {
                    ahead = {w.at(width, index * width * k >> halvings), BYTES >> halvings, width, halvings};
                }
                with_rows<DOT_ROWS>(tile, [&](auto count) {
                    constexpr int R = decltype(count)::value;
                    int32_t* y = sums + r * STRIP + c;
                    if (width == DOT_COLUMNS) {
                        dot_tile<R, DOT_COLUMNS>(p.x.from(r, i), w, k, ahead, y, STRIP);
                    } else {
                        dot_tile<R, 1>(p.x.from(r, i), w, k, ahead, y, STRIP);
                    }
                });
            }
        }
    }
    sink(Sums{sums, STRIP, 0, p.m, column, columns});
}

template <class Sink>
bool sweeps_of_columns(const Int8Product& p, const int32_t* corrections, int64_t begin, int64_t end,
                       const Sink& sink) {
    int64_t most = least(SWEEP_COLUMNS, SWEEP_SUMS / p.m / STRIP * STRIP);
    Scratch scratch(most * p.m * sizeof(int32_t));
    int32_t* sums = scratch.sums();
    if (!sums) return false;
    for (int64_t column = begin; column < end; column += most) {
        int64_t columns = least(most, end - column);
        start_panel_sums(sums, corrections, p.m, columns);
        for (int64_t i = 0; i < p.k; i += SWEEP_ROWS) {
            Rows w = p.w.from(i, column);
            for (int64_t r = 0, tile; r < p.m; r += tile) {
                tile = even_tile(p.m - r, SWEEP_TILE);
                with_rows<SWEEP_TILE>(tile, [&](auto count) {
                    sweep<decltype(count)::value>(p.x.from(r, i), w, least(SWEEP_ROWS, p.k - i), columns,
                                                  sums + r * PANEL_COLUMNS, p.m * PANEL_COLUMNS);
                });
            }
        }
        finish_panel_sums(sums, 0, p.m, column, columns, sink);
    }
    return true;
}

template <class Sink>
void panels_of_block(const Int8Product& p, const int32_t* corrections, int64_t row, int64_t rows,
                     int64_t column, int64_t columns, vb* panels, int32_t* sums, const Sink& sink) {
    int64_t count = ceil_div(columns, PANEL_COLUMNS);
    int64_t depth = PANEL_BYTES / (count * PANEL_COLUMNS) / 4 * 4;
    start_panel_sums(sums, corrections + row, rows, columns);
    for (int64_t i = 0; i < p.k; i += depth) {
        int64_t k = least(depth, p.k - i), size = panel_size(k);
        if (p.w_has_rows_of_k) {
            for (int64_t c = 0; c < count; ++c) {
                int64_t first = c * PANEL_COLUMNS, width = least(PANEL_COLUMNS, columns - first);
                pack_rows(p.w.from(column + first, i), k, width, panels + c * size);
            }
        } else {
            pack_columns(p.w.from(i, column), k, columns, panels, size);
        }
        for (int64_t c = 0; c < count; ++c) {
            for (int64_t r = 0, tile; r < rows; r += tile) {
                tile = even_tile(rows - r, PANEL_ROWS);
                with_rows<PANEL_ROWS>(tile, [&](auto count) {
                    panel_tile<decltype(count)::value>(p.x.from(row + r, i), panels + c * size, k,
                                                       sums + (c * rows + r) * PANEL_COLUMNS);
                });
            }
        }
    }
    finish_panel_sums(sums, row, rows, column, columns, sink);
}

template <class Sink>
bool panels_of_columns(const Int8Product& p, const int32_t* corrections, int64_t begin, int64_t end,
                       const Sink& sink) {
    int64_t block = even_tile(p.m, PANEL_BLOCK);
    int64_t most = p.w_has_rows_of_k ? STRIP : least(PANEL_STRIPS, PANEL_SUMS / block / STRIP) * STRIP;
    int64_t count = most / PANEL_COLUMNS;
    int64_t bytes = count * panel_size(PANEL_BYTES / most / 4 * 4) * sizeof(vb);
    Scratch scratch(bytes + block * most * sizeof(int32_t));
    if (!scratch.get()) return false;
    vb* panels = reinterpret_cast<vb*>(scratch.get());
    int32_t* sums = reinterpret_cast<int32_t*>(scratch.get() + bytes);
    for (int64_t column = begin; column < end; column += most) {
        for (int64_t row = 0; row < p.m; row += block) {
            panels_of_block(p, corrections, row, least(block, p.m - row), column, least(most, end - column),
                            panels, sums, sink);
        }
    }
    return true;
}

// Calls sink(Sums) for blocks that together are x @ w, on up to `threads` threads.
template <class Sink>
int64_t int8_gemm(const Int8Product& p, int64_t threads, const Sink& sink) {
    if (p.m == 0 || p.n == 0) return DONE;
    Scratch corrections(p.m * sizeof(int32_t));
    if (!corrections.get()) return NO_MEMORY;
    for (int64_t r = 0; r < p.m; ++r) corrections.sums()[r] = correction(p.x.at(r, 0), p.k);

    Way way = way_of(p);
    int64_t status = DONE;
    int64_t grain = 1 + WORK_OF_A_THREAD / (STRIP * (p.k + 1));
    parallel_for(ceil_div(p.n, STRIP), threads, grain, [&](int64_t first, int64_t last) {
        int64_t begin = first * STRIP, end = least(last * STRIP, p.n);
        bool done = true;
        if (way == Way::DOTS) {
            for (int64_t c = begin; c < end; c += STRIP) dots_of_strip(p, corrections.sums(), c, sink);
        } else if (way == Way::SWEEPS) {
            done = sweeps_of_columns(p, corrections.sums(), begin, end, sink);
        } else {
            done = panels_of_columns(p, corrections.sums(), begin, end, sink);
        }
        if (!done) __atomic_store_n(&status, int64_t{NO_MEMORY}, __ATOMIC_RELAXED);
    });
    return status;
}

}  // namespace
}  // namespace npu
