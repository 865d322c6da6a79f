// A row of blocks to int8. value(j) is the block at j, value(j, n) a last one of n elements.
#pragma once

#include "block.h"
#include "quantize.h"

namespace npu {
namespace {

// y[0..width) = the values rounded half to even, saturated; NaN gives 0.
template <class O, class Value>
NPU_INLINE void store_row(int8_t* y, int64_t width, const Value& value) {
    for_blocks(width, [&](int64_t j, auto... n) NPU_LAMBDA {
        store_int8<O>(y + j, value(j, n...), n...);
    });
}

// The same for values that are known to be between -127.5 and 127.5.
template <class O, class Value>
NPU_INLINE void store_small_row(int8_t* y, int64_t width, const Value& value) {
    int64_t j = 0;
    for (; j + BLOCK <= width; j += BLOCK) O::store_small(y + j, value(j));
    if (j < width) {
        int8_t padded[BLOCK];
        O::store_small(padded, value(j, width - j));
        std::memcpy(y + j, padded, width - j);
    }
}

// y[0..width) = round(value / scale), where `scale` is the symmetric_scale of all values. A scale of 0 gives
// 0, as on the device, and so does NaN.
template <class O, class Value>
NPU_INLINE void quantize_row(float scale, int8_t* y, int64_t width, const Value& value) {
    const Divider d(scale);
    if (scale == 0.0f) {
        std::memset(y, 0, width);
    } else if (d.by_division()) {
        store_row<O>(y, width, [&](int64_t j, auto... n) NPU_LAMBDA {
            return value(j, n...) / scale;
        });
    } else {
        // The scale is finite, so there is no NaN, and no quotient is beyond 127 by more than its rounding.
        store_small_row<O>(y, width, [&](int64_t j, auto... n) NPU_LAMBDA {
            Block v = value(j, n...);
            return Block{Divider::times(v.a, d), Divider::times(v.b, d)};
        });
    }
}

}  // namespace
}  // namespace npu
