// What kernels share that work row by row: threads, a buffer for each of them, types, groups of rows.
#pragma once

#include <cstdlib>

#include "block.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace npu {
namespace {

// Rows are handed to threads in parts of at least this many bytes: below, waking a thread costs more.
constexpr int64_t GRAIN = 1 << 16;

// fn(begin, end, buffer) over parts of 0..rows on at most `threads` threads; each has a buffer of its own for
// `floats` floats, rounded up to whole blocks and aligned to a cache line.
template <class Fn>
Status over_rows(int64_t rows, int64_t row_bytes, int64_t threads, int64_t floats, const Fn& fn) {
    int failed = 0;
    parallel_for(rows, threads, GRAIN / (row_bytes + 1) + 1, [&](int64_t begin, int64_t end) {
        float* buffer = nullptr;
        if (floats > 0) {
            const int64_t blocks = (floats + BLOCK - 1) / BLOCK, bytes = 4 * BLOCK * blocks;
            buffer = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (!buffer) {
                __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
                return;
            }
        }
        fn(begin, end, buffer);
        std::free(buffer);
    });
    return failed ? NO_MEMORY : DONE;
}

// fn(element of the type) for a floating-point type.
template <class Fn>
Status with_float_type(int64_t type, const Fn& fn) {
    switch (type) {
        case BFLOAT16: return fn(bf16{});
        case HALF: return fn(half{});
        case FLOAT: return fn(float{});
        default: return REFUSED;
    }
}

// The group of each row, for rows in ascending order. Groups are consecutive rows; their sizes are given, or
// their ends (a size is then the difference to the end before). A size below 0 counts as 0.
template <class Int>
class Groups {
  public:
    Groups(const Int* given, int64_t count, bool ends) : given_(given), count_(count), ends_(ends) {}

    // -1 beyond the last group.
    int64_t of(int64_t row) {
        while (row >= end_ && group_ < count_) {
            ++group_;
            if (group_ < count_) end_ += size(group_);
        }
        return group_ < count_ ? group_ : -1;
    }

  private:
    int64_t size(int64_t group) const {
        int64_t n = given_[group];
        if (ends_ && group > 0) n -= given_[group - 1];
        return n > 0 ? n : 0;
    }

    const Int* given_;
    int64_t count_, group_ = -1, end_ = 0;
    bool ends_;
};

}  // namespace
}  // namespace npu
