// Paged caches: where rows go, and in what form. Layouts and traps: npu_fusion/kernels/reference/_cache.py.
#pragma once

#include <cstdlib>

#include "latent.h"
#include "quantize_row.h"

namespace npu {
namespace {

// The order of the fields of both structs is that of ../_key_rows.py.
struct Cache {
    void* data;
    int64_t type;         // INT8 where there is a scale, otherwise that of the call
    const float* scale;   // or null
    int64_t scale_step;   // 1: a number for each column; 0: one for all
    const float* offset;  // or null
    int64_t offset_step;
    int64_t page_stride, row_stride, column_stride;  // in elements
};

// The pages that all caches of a call have, and the slot of each row: row `slot % block` of page `slot / block`.
struct Pages {
    const int64_t* slots;  // null: row r has slot r
    int64_t block, count, nz;

    int64_t slot(int64_t row) const { return slots ? slots[row] : row; }

    bool hold(int64_t rows) const {
        int64_t highest = slots ? -1 : rows - 1;
        for (int64_t row = 0; slots && row < rows; ++row) highest = slots[row] > highest ? slots[row] : highest;
        return highest < count * block;
    }
};

// Which rows are written. Not those whose slot is negative, or that of a later row: the last one stays,
// whatever the threads do.
class Written {
  public:
    Written(const Pages& pages, int64_t rows) : pages_(pages) {
        if (!pages.slots || ascending(rows)) return;
        // Read where it has been written only, so that a large cache costs no more than a small one.
        last_ = static_cast<int64_t*>(std::malloc(sizeof(int64_t) * pages.count * pages.block));
        ok_ = last_ != nullptr;
        for (int64_t row = 0; ok_ && row < rows; ++row)
            if (pages.slots[row] >= 0) last_[pages.slots[row]] = row;
    }
    Written(const Written&) = delete;
    ~Written() { std::free(last_); }

    // Whether there was memory for it.
    bool ok() const { return ok_; }

    bool row(int64_t row) const {
        const int64_t slot = pages_.slot(row);
        return slot >= 0 && (!last_ || last_[slot] == row);
    }

  private:
    bool ascending(int64_t rows) const {
        for (int64_t row = 1; row < rows; ++row)
            if (pages_.slots[row] <= pages_.slots[row - 1]) return false;
        return true;
    }

    const Pages& pages_;
    int64_t* last_ = nullptr;
    bool ok_ = true;
};

// y = rint(x * scale + offset), saturated.
NPU_INLINE void quantize(const Cache& c, const float* x, int8_t* y, int64_t width) {
    store_row<Natural>(y, width, [&](int64_t j, auto... n) __attribute__((always_inline)) {
        Block v = load_block<Natural>(x + j, n...);
        v = c.scale_step ? v * load_block<Natural>(c.scale + j, n...) : v * *c.scale;
        if (!c.offset) return v;
        return c.offset_step ? v + load_block<Natural>(c.offset + j, n...) : v + *c.offset;
    });
}

constexpr int64_t NZ_BYTES = 32;

// The elements of a row to where they belong, one by one: element e of a page, in its order, is in row e / width.
NPU_INLINE void scatter(const Cache& c, const Pages& pages, int64_t row, const char* x, int64_t width, int64_t size,
                        char* page) {
    const int64_t d0 = NZ_BYTES / size;
    for (int64_t j = 0; j < width; ++j) {
        const int64_t e = pages.nz ? j / d0 * pages.block * d0 + row * d0 + j % d0 : row * width + j;
        const int64_t at = e / width * c.row_stride + e % width * c.column_stride;
        std::memcpy(page + at * size, x + j * size, size);
    }
}

// Write one row. `bytes` has room for a row of the cache.
template <class In>
void write_row(const Cache& c, const Pages& pages, int64_t slot, const float* x, int64_t width, char* bytes) {
    const int64_t size = c.scale ? 1 : sizeof(In);
    const int64_t page = slot / pages.block, row = slot % pages.block;
    char* first = static_cast<char*>(c.data) + page * c.page_stride * size;
    const bool together = c.column_stride == 1 && (!pages.nz || c.row_stride == width);
    char* out = together && !pages.nz ? first + row * c.row_stride * size : bytes;
    if (c.scale)
        quantize(c, x, reinterpret_cast<int8_t*>(out), width);
    else
        convert(x, reinterpret_cast<In*>(out), width);
    if (!together) {
        scatter(c, pages, row, bytes, width, size, first);
    } else if (pages.nz) {
        for (int64_t j = 0; j * NZ_BYTES < width * size; ++j)
            std::memcpy(first + (j * pages.block + row) * NZ_BYTES, bytes + j * NZ_BYTES, NZ_BYTES);
    }
}

}  // namespace
}  // namespace npu
