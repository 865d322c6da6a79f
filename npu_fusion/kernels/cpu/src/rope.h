// Rotary embeddings: every row of a tensor of four dimensions beside its rows of cosines and sines.
#pragma once

#include "rows.h"

namespace npu {
namespace {

// A tensor [d0, d1, d2, D] whose last dimension is contiguous; a stride is 0 where one row serves all.
struct Strided {
    const void* data;
    int64_t strides[3];

    template <class T>
    NPU_MEMBER const T* row(int64_t i0, int64_t i1, int64_t i2) const {
        return static_cast<const T*>(data) + i0 * strides[0] + i1 * strides[1] + i2 * strides[2];
    }
};

struct Rope {
    int64_t type;
    Strided x, cos, sin;
    void* y;  // [d0, d1, d2, D], contiguous
    int64_t sizes[4];
    int64_t threads;
};

// fn(x, cos, sin, y) for every row.
template <class In, class Fn>
Status rotate_rows(const Rope& c, const Fn& fn) {
    const int64_t d1 = c.sizes[1], d2 = c.sizes[2], width = c.sizes[3];
    const int64_t rows = c.sizes[0] * d1 * d2, bytes = 2 * width * int64_t{sizeof(In)};
    expect_writes(c.y, rows * width * sizeof(In));
    return over_rows(rows, bytes, c.threads, 0, [&](int64_t begin, int64_t end, float*) {
        for (int64_t row = begin; row < end;) {
            const int64_t i1 = row / d2 % d1, i0 = row / d2 / d1, first = row % d2;
            const int64_t stop = d2 - first < end - row ? d2 : first + (end - row);
            const In *x = c.x.row<In>(i0, i1, first), *cos = c.cos.row<In>(i0, i1, first);
            const In* sin = c.sin.row<In>(i0, i1, first);
            for (int64_t i = first; i < stop; ++i, ++row) {
                fn(x, cos, sin, static_cast<In*>(c.y) + row * width);
                x += c.x.strides[2];
                cos += c.cos.strides[2];
                sin += c.sin.strides[2];
            }
        }
    });
}

}  // namespace
}  // namespace npu
