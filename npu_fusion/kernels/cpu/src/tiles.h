// What the matrix products share: tiles of rows that fill the registers.
#pragma once

#include <cstdint>

#include "simd.h"

// Loops over registers: unrolled by the front end, or arrays of accumulators would live in memory.
#define NPU_UNROLL _Pragma("GCC unroll 8")

namespace npu {
namespace {

NPU_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
NPU_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of at most `most` rows, as even as possible: the size of the next one when `rows` are left.
NPU_INLINE int64_t even_tile(int64_t rows, int64_t most) { return ceil_div(rows, ceil_div(rows, most)); }

}  // namespace
}  // namespace npu
